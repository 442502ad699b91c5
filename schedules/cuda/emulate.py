"""Runs a kernel of :mod:`.simt` on a CPU, without a device: what a GPU's sanitizer would see, in numpy.

The TensorIR of a kernel is executed statement by statement, all threads of a few blocks at once: a scalar of the kernel is an array with
one element for each thread, a branch is a mask. Device functions are run by their descriptions (:mod:`.device`). So index maps, swizzles,
fragment layouts, barriers and the order of asynchronous copies are those of the kernel that is compiled. What is checked on the way:

* every access of every thread lies inside its array (memcheck);
* shared memory and registers are not read before they are written (initcheck);
* between two barriers no two threads touch the same word of shared memory if one of them writes (racecheck);
* what a block writes to the device's memory no other block of the launch touches, unless it writes the same; a workspace is written before
  it is read;
* barriers and warp functions are reached by all threads that they are for (synccheck);
* asynchronous copies and products take effect as late as they may: data that are used before they were waited for are wrong.

Branches of a :func:`role` (warps with different jobs) run in turns, each up to its next wait. So do the blocks of a cluster in a random
``order``; otherwise they run in step.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
from tvm import tirx
from tvm.ir import Call

from bnntvm.schedules.cuda import device, simt
from bnntvm.schedules.cuda.races import Clocks, Launch, Trace


class Fault(Exception):
    """The kernel did something that it must not."""


class Memory:
    """An array: one for all threads, for each block, or for each thread (``rows``)."""

    def __init__(self, name, data, owners=None, watch=None):
        self.name, self.data, self.owners = name, data, owners  # data [rows, size]; owners: row of each thread, None: 0
        self.written = np.zeros(data.shape, bool) if owners is not None else None
        self.trace, self.launch = watch, None


@dataclass
class Pointer:
    """Address of element ``index`` (one for each thread) of a memory."""

    memory: Memory
    index: np.ndarray

    def __add__(self, elements):
        return Pointer(self.memory, self.index + elements)


@dataclass
class Barrier:
    """An mbarrier: arrivals and bytes that its phase still waits for, and what those who wait for it will have seen."""

    count: int
    left: int
    coming: np.ndarray
    known: np.ndarray | None = None
    bytes: int = 0
    phase: int = 0
    pending: list = field(default_factory=list)  # bulk copies, which take effect when nothing else is waited for

    def arrive(self, seen, threads, size):
        """Threads arrive."""
        self.left, self.bytes = self.left - threads, self.bytes + size * threads
        if self.left < 0:
            raise Fault("too many arrivals at a barrier")
        self.coming = np.maximum(self.coming, seen)
        if not self.left and not self.bytes:
            self._next()

    def _next(self):
        self.phase, self.left, self.known = self.phase + 1, self.count, self.coming

    def passed(self, parity):
        """Whether the phase of that parity is over."""
        if not self.left and self.phase % 2 == parity and self.bytes == sum(size for size, _ in self.pending):
            for _, copy in self.pending:
                copy()
            self.pending.clear()
            self.bytes = 0
            self._next()
        return self.phase % 2 != parity


class Threads:
    """The threads that run together: their numbers, who is active, and how they reach memory."""

    def __init__(self, blocks, per_block, races, cluster=1):
        self.cluster, self.arrived = cluster, np.zeros(len(blocks), np.int64)  # how often each block has come to wait for its cluster
        self.block = np.repeat(np.asarray(blocks, np.int64), per_block)
        self.thread = np.tile(np.arange(per_block, dtype=np.int64), len(blocks))
        self.row = np.repeat(np.arange(len(blocks)), per_block)  # of the block among those that run
        self.per_block, self.count, self.races = per_block, len(blocks) * per_block, races
        self.everyone = np.arange(self.count)
        self.active = None  # None: all; else bool[count]
        self.copies = {}  # what is under way, by role
        self.role = ()
        self.barriers, self.clocks = {}, Clocks(len(blocks), per_block)

    def spread(self, value):
        """One element for each thread."""
        return np.broadcast_to(value, (self.count,))

    def running(self):
        """Numbers of the active threads."""
        return self.everyone if self.active is None else np.flatnonzero(self.active)

    def by_warp(self, value, name):
        """[warps, 32] of a value; all lanes of a warp must be there."""
        if self.active is not None:
            lanes = self.active.reshape(-1, 32)
            if (lanes.any(1) != lanes.all(1)).any():
                raise Fault(f"{name}: some lanes of a warp are elsewhere")
        return self.spread(value).reshape(-1, 32)

    @staticmethod
    def fault(message):
        """An exception for a description to raise."""
        return Fault(message)

    # Memory

    def _where(self, memory, index, what):
        who = self.running()
        index = self.spread(index)[who]
        if len(index) and (index.min() < 0 or index.max() >= memory.data.shape[1]):
            bad = int(np.flatnonzero((index < 0) | (index >= memory.data.shape[1]))[0])
            raise Fault(f"{what} of {memory.name}[{index[bad]}] of {memory.data.shape[1]} by thread {self.thread[who[bad]]} "
                        f"of block {self.block[who[bad]]}")  # fmt: skip
        return who, (memory.owners[who] if memory.owners is not None else np.zeros(len(who), np.int64)), index

    def load(self, memory, index):
        """The elements; 0 in threads that are not active."""
        who, rows, index = self._where(memory, index, "load")
        if memory.written is not None and not memory.written[rows, index].all():
            bad = int(np.flatnonzero(~memory.written[rows, index])[0])
            raise Fault(f"{memory.name}[{index[bad]}] is read before it is written, by thread {self.thread[who[bad]]}")
        self.note_read(memory, who, rows, index)
        if len(who) == self.count:
            return memory.data[rows, index]
        result = np.zeros(self.count, memory.data.dtype)
        result[who] = memory.data[rows, index]
        return result

    def store(self, memory, index, value, note=True):
        """Store the active threads' elements."""
        who, rows, index = self._where(memory, index, "store")
        if note:
            self.note_write(memory, who, rows, index)
        value = self.spread(value)[who]
        if memory.launch is not None:
            other = memory.launch.writes(self.block[who], index, memory.data[rows, index], value)
            self._race(memory, other, who, index, "writes", "block")
        memory.data[rows, index] = value
        if memory.written is not None:
            memory.written[rows, index] = True

    def claim(self, memory, index, count):
        """Note that the threads will write ``count`` elements some time from now on: until it waits, nobody else may use them."""
        for k in range(count):
            self.note_write(memory, *self._where(memory, index + k, "copy"))

    def note_read(self, memory, who, rows, index):
        """Look for a race of a read, and remember it."""
        if memory.launch is not None:
            self._race(memory, memory.launch.reads(self.block[who], index), who, index, "reads", "block")
        if memory.trace is not None and self.races:
            self._race(memory, self.clocks.reads(memory.trace, rows, self.thread[who], index), who, index, "reads")

    def note_write(self, memory, who, rows, index):
        """Look for a race of a write, and remember it."""
        if memory.trace is not None and self.races:
            self._race(memory, self.clocks.writes(memory.trace, rows, self.thread[who], index), who, index, "writes")

    def _race(self, memory, other, who, index, what, kind="thread"):
        bad = np.flatnonzero(other >= 0)
        if len(bad):
            i, own = bad[0], self.thread if kind == "thread" else self.block
            where = f"{memory.name}[{index[i]}]"
            raise Fault(f"race: {kind} {own[who[i]]} {what} {where}, which {kind} {other[i]} uses at the same time")

    def barrier(self, name="barrier"):
        """All threads of every block that has an active one wait."""
        self.clocks.block_barrier(slice(None) if self.active is None else np.flatnonzero(self._all_or_none(name)))

    # Clusters

    def cluster_barrier(self):
        """Yields until all blocks of the active threads' clusters are there."""
        active = self.active
        rows = np.arange(len(self.arrived)) if active is None else np.flatnonzero(self._all_or_none("bnn_cluster_sync"))
        self.arrived[rows] += 1
        mates = np.unique(rows // self.cluster)[:, None] * self.cluster + np.arange(self.cluster)
        wanted = self.arrived[rows[0]]
        if (self.arrived[mates] == wanted).all():  # the last ones
            self.clocks.cluster_barrier(mates.reshape(-1))
        while (self.arrived[mates] < wanted).any():
            yield False
            self.active = active
        yield True
        self.active = active

    def _all_or_none(self, name):
        """bool[blocks]: those whose threads are active, all of them."""
        blocks = self.active.reshape(-1, self.per_block)
        if (blocks.any(1) != blocks.all(1)).any():
            raise Fault(f"{name}: some threads of a block are elsewhere")
        return blocks.all(1)

    def load_other(self, memory, index, rank):
        """The elements of the memory of block ``rank`` of the cluster; 0 in threads that are not active."""
        who, own, index = self._where(memory, index, "load")
        rows = own // self.cluster * self.cluster + self.spread(rank)[who]
        if not memory.written[rows, index].all():
            raise Fault(f"{memory.name} of another block is read before it is written")
        if memory.trace is not None and self.races:
            self._race(memory, self.clocks.reads_elsewhere(memory.trace, rows, index), who, index, "of another block reads")
        result = np.zeros(self.count, memory.data.dtype)
        result[who] = memory.data[rows, index]
        return result

    # Barriers, bulk copies and products of warpgroups

    def barriers_of(self, pointer):
        """(block, word) of every barrier that active threads name, and who they are."""
        who = self.running()
        words = self.spread(pointer.index)[who]
        if (words % 2).any():
            raise Fault("a barrier is not aligned")
        keys = self.row[who] * (1 << 32) + words
        return {(int(key >> 32), int(key & 0xFFFFFFFF)): self.thread[who[keys == key]] for key in np.unique(keys)}

    def new_barrier(self, count):
        """A barrier."""
        return Barrier(count, count, np.zeros(self.per_block, np.int32))

    def arrive(self, pointer, size=0):
        """Active threads arrive."""
        for key, threads in self.barriers_of(pointer).items():
            self.barriers[key].arrive(self.clocks.release(key[0], threads), len(threads), size)

    def arrive_other(self, pointer, rank):
        """Active threads arrive at the barrier of a block of their cluster; what they did is not known there."""
        for (row, word), threads in self.barriers_of(pointer).items():
            for thread in threads:
                other = row // self.cluster * self.cluster + int(rank[self._number(row, thread)])
                known = self.clocks.release(row, threads[:1]) if other == row else np.zeros(self.per_block, np.int32)
                self.barriers[other, word].arrive(known, 1, 0)

    def wait_for(self, pointer, parity):
        """Yields until the phase of that parity is over."""
        active, parities = self.active, self.spread(parity)
        waited = [(key, threads, int(parities[self._number(key[0], threads[0])])) for key, threads in self.barriers_of(pointer).items()]
        while not all(self.barriers[key].passed(wanted) for key, _, wanted in waited):
            yield False
            self.active = active
        for key, threads, _ in waited:
            if self.barriers[key].known is not None:
                self.clocks.acquire(key[0], threads, self.barriers[key].known)
        yield True
        self.active = active

    def _number(self, row, thread):
        return row * self.per_block + thread

    def bulk(self, target, source, thread, to, begin, size, row=None):
        """``(bytes, function that copies)``; ``row`` of the block whose memory is written, if it is not the thread's."""
        own, words = target.owners[thread], size // 4
        row = own if row is None else row
        place = np.arange(to, to + words)
        if row == own:
            self.note_write(target, np.full(words, thread), np.full(words, row), place)
        if begin < 0 or begin + words > source.data.shape[1] or to < 0 or to + words > target.data.shape[1]:
            raise Fault(f"bulk copy of {source.name}[{begin}:{begin + words}] to {target.name}[{to}:{to + words}]")
        self.note_read(source, np.full(words, thread), np.zeros(words, np.int64), np.arange(begin, begin + words))

        def copy():
            target.data[row, to : to + words] = source.data[0, begin : begin + words]
            target.written[row, to : to + words] = True
            if target.trace is not None:
                self.clocks.forget(target.trace, row, to, to + words)

        return size, copy

    def by_warpgroup(self, value, name):
        """All threads of a warpgroup must be there."""
        who = self.running()
        if len(who) % 128 or (who.reshape(-1, 128) != who[::128][:, None] + np.arange(128)).any() or (who[::128] % 128).any():
            raise Fault(f"{name}: some threads of a warpgroup are elsewhere")
        index = self.spread(value)[who].reshape(-1, 128)
        if (index != index[:, :1]).any():
            raise Fault(f"{name}: threads of a warpgroup differ")

    def swizzled(self, pointer, group, rows):
        """uint32[rows, 8]: 32 bytes of rows of a matrix, as a descriptor with 128-byte swizzle has them read."""
        memory, start = pointer.memory, int(pointer.index[group[0]]) * 4
        if start % 16:
            raise Fault("a matrix is not aligned")
        r, word = np.arange(rows)[:, None], np.arange(8)[None]
        linear = start + r // 8 * 1024 + r % 8 * 128 + word * 4
        place = (linear ^ (linear >> 7 & 7) << 4) // 4
        if place.max() >= memory.data.shape[1]:
            raise Fault("a matrix ends behind shared memory")
        owner = memory.owners[group[0]]
        if not memory.written[owner, place].all():
            raise Fault("a matrix is read before it is written")
        flat = place.reshape(-1)
        self.note_read(memory, np.full(len(flat), group[0]), np.full(len(flat), owner), flat)
        return memory.data[owner, place]

    def fenced(self):
        """A fence between ordinary stores and tensor cores."""

    # Asynchronous work: a list of groups, the last one open

    def later(self, kind, action):
        """Run ``action`` when the group that is open now is waited for."""
        self.copies.setdefault((self.role, kind), [[]])[-1].append((self.active, action))

    def commit(self, kind):
        """Close the open group."""
        self.copies.setdefault((self.role, kind), [[]]).append([])

    def wait(self, kind, left):
        """Finish all closed groups but the last ``left``."""
        groups = self.copies.setdefault((self.role, kind), [[]])
        done = max(0, len(groups) - 1 - left)
        outer = self.active
        for group in groups[:done]:
            for active, action in group:
                self.active = active
                action()
        self.active = outer
        del groups[:done]


def run(function, arrays, blocks_at_once=16, races=True, only_blocks=None, order=None):
    """Run a kernel.

    Parameters
    ----------
    function : tirx.PrimFunc
        Of :func:`.simt.kernel`, :func:`.simt.either` or :func:`.simt.both`.
    arrays : list of ndarray
        Its parameters, contiguous; written in place. A workspace may be left out.
    blocks_at_once : int
        Blocks that share the numpy operations.
    races : bool
        Look for races.
    only_blocks : list of int, optional
        Blocks to run, instead of all; of a single kernel.
    order : int, optional
        Seed of a random order of the clusters, and of the blocks of each, which then run in turns; not where threads have roles.

    Raises
    ------
    Fault
    """
    kernels = _Program(function, arrays, races).launches
    if only_blocks is not None and len(kernels) > 1:
        raise ValueError("blocks of which kernel?")
    for launch in kernels:
        launch.run(blocks_at_once, only_blocks, order)


def launches(function, shapes):
    """How many kernels a function starts for parameters of these ``(shape, type)``."""
    return len(_Program(function, [np.empty(*one) for one in shapes], False).bodies)


class _Program:
    """A function that starts kernels: its parameters, and what it starts for them."""

    def __init__(self, function, arrays, races):
        self.races, self.env, self.memories = races, {}, {}
        params = [function.buffer_map[p] for p in function.params] if getattr(function, "buffer_map", None) else list(function.params)
        own = simt.workspace(function)
        if own and len(arrays) == len(params) - 1:
            arrays = [*arrays, np.full(own[0], 77, own[1])]
        if len(params) != len(arrays):
            raise Fault(f"{len(arrays)} arrays for {len(params)} parameters")
        for buffer, array in zip(params, arrays):
            self._bind_parameter(buffer, array)
        if own:
            memory = self.memories[params[-1].name]
            memory.written = np.zeros(memory.data.shape, bool)
        self.bodies = self._chosen(function.body)

    @property
    def launches(self):
        """The kernels, in order, to be run one after the other."""
        return [_Launch(self, body) for body in self.bodies]

    def _chosen(self, body):
        """Bodies of the kernels that are started: those of a sequence, of several ones that which the condition chooses."""
        if isinstance(body, tirx.SeqStmt):
            return [one for part in body.seq for one in self._chosen(part)]
        if isinstance(body, tirx.IfThenElse):
            chosen = np.asarray(_Launch.condition(self, body.condition)(None))
            return self._chosen(body.then_case if chosen else body.else_case)
        return [body]

    def _bind_parameter(self, buffer, array):
        if str(array.dtype) != str(buffer.dtype):
            raise Fault(f"{buffer.name} is {buffer.dtype}, not {array.dtype}")
        if len(buffer.shape) != array.ndim:
            raise Fault(f"{buffer.name} has {len(buffer.shape)} dimensions, not {array.ndim}")
        for extent, size in zip(buffer.shape, array.shape):
            if isinstance(extent, tirx.Var):
                if self.env.setdefault(extent.name, np.int64(size)) != size:
                    raise Fault(f"{extent.name} of {buffer.name} is {size} and {self.env[extent.name]}")
            elif isinstance(extent, tirx.IntImm) and int(extent) != size:
                raise Fault(f"{buffer.name} has shape {array.shape}, not {list(buffer.shape)}")
        data = array.reshape(1, -1)
        if data.size and not np.shares_memory(data, array):
            raise Fault(f"{buffer.name} is not contiguous")
        self.memories[buffer.name] = Memory(buffer.name, data)


class _Launch:
    """A kernel as Python closures."""

    def __init__(self, program, body):
        self.races, self.env, self.memories = program.races, dict(program.env), dict(program.memories)
        self.threads = self.per_block = self.grid = None
        self.body = self._kernel(body)

    @classmethod
    def condition(cls, program, expression):
        """Closure of an expression of the host."""
        host = cls.__new__(cls)
        host.env, host.memories = program.env, program.memories
        return host._expr(expression)

    def _kernel(self, body):
        """Take the axes off."""
        names = {}
        while isinstance(body, tirx.AttrStmt) and str(body.attr_key) == "thread_extent":
            tag = str(body.node.thread_tag)
            names[tag] = body.node.var.name, int(np.asarray(self._expr(body.value)(None)))
            body = body.body
        self.block_name, self.grid = names["blockIdx.x"]
        self.thread_name, self.per_block = names["threadIdx.x"]
        self.cluster = names["clusterCtaIdx.x"][1] if "clusterCtaIdx.x" in names else 1
        return self._stmt(body)

    def run(self, blocks_at_once, only_blocks, order):
        for memory in self.memories.values():  # the launch before is over
            memory.launch = Launch(memory.data.shape[1]) if self.races else None
        blocks = list(range(self.grid)) if only_blocks is None else list(only_blocks)
        if order is not None:
            clusters = [blocks[i : i + self.cluster] for i in range(0, len(blocks), self.cluster)]
            random.Random(order).shuffle(clusters)
            blocks, blocks_at_once = [block for one in clusters for block in one], self.cluster
        for first in range(0, len(blocks), blocks_at_once):
            threads = Threads(blocks[first : first + blocks_at_once], self.per_block, self.races, self.cluster)
            self.env[self.block_name], self.env[self.thread_name] = (n.astype(np.int32) for n in (threads.block, threads.thread))
            self.threads = threads
            with np.errstate(all="ignore"):
                if order is None or self.cluster == 1:
                    self._finish(self.body(threads) or ())
                else:
                    self._in_turns(threads, random.Random(order))
            self._no_reader_left(threads)

    @staticmethod
    def _finish(waits):
        """All blocks in step: whoever waits, waits for nobody else."""
        stuck = 0
        for progress in waits:
            stuck = 0 if progress else stuck + 1
            if stuck > 1:
                raise Fault("deadlock: blocks wait for their cluster")

    def _in_turns(self, t, order):
        """The blocks of a cluster, one up to its next wait and then another one."""
        masks = [t.row == row for row in range(self.cluster)]
        tasks = [[mask, (row,), self._started(t, self.body), dict(self.env)] for row, mask in enumerate(masks)]
        self._take_turns(t, tasks, lambda: order.sample(tasks, len(tasks)))

    def _no_reader_left(self, threads):
        """Blocks stay until nobody reads their shared memory any more."""
        for memory in self.memories.values():
            if memory.trace is not None and getattr(memory, "threads", None) is threads:
                left = threads.clocks.left_open(memory.trace)
                if len(left) and self.cluster > 1:
                    raise Fault(f"{memory.name} of block {threads.block[left[0] * self.per_block]} may be read after its end")

    # Statements: a closure returns None, or an iterator that yields where it has to wait

    def _stmt(self, s):
        kind = type(s).__name__
        return getattr(self, f"_stmt_{kind}", self._unknown)(s)

    def _unknown(self, s):
        raise NotImplementedError(f"{type(s).__name__}: {s}")

    def _stmt_SeqStmt(self, s):
        parts = [self._stmt(part) for part in s.seq]

        def go(t):
            for i, part in enumerate(parts):
                waits = part(t)
                if waits is not None:
                    return rest(t, waits, i)
            return None

        def rest(t, waits, i):
            yield from waits
            for part in parts[i + 1 :]:
                yield from part(t) or ()

        return go

    def _stmt_AttrStmt(self, s):
        if str(s.attr_key) == "bnn.roles":
            return self._roles(s)
        return self._stmt(s.body)

    def _roles(self, s):
        """Branches of threads with different jobs, in turns."""
        branch, size = s.body, int(s.value)
        condition, then, otherwise = self._expr(branch.condition), self._stmt(branch.then_case), self._stmt(branch.else_case)

        def go(t):
            outer, role = t.active, t.role
            chosen = t.spread(condition(t)).astype(bool)
            masks = [chosen if outer is None else chosen & outer, ~chosen if outer is None else ~chosen & outer]
            tasks = []
            for number, (mask, body) in enumerate(zip(masks, (then, otherwise))):
                jobs = t.thread // size + t.row * t.per_block * (self.cluster > 1)  # blocks of a cluster are at different places
                for group in np.unique(jobs[mask]):
                    own = mask & (jobs == group)
                    tasks.append([own, (*role, number, int(group)), self._started(t, body), dict(self.env)])
            order, often = random.Random(len(tasks)), (0, 1, 1, 4) if self.cluster > 1 else (1,)
            # Some run ahead of others, as far as barriers let them.
            self._take_turns(t, tasks, lambda: [task for task in tasks for _ in range(order.choice(often))])
            t.active, t.role = outer, role

        return go

    def _take_turns(self, t, tasks, turns):
        """Run ``[threads, role, generator, names]`` until all are done; ``turns()``: whose turn it is next, in order."""
        stuck = 0
        while tasks:
            for task in turns() or list(tasks):
                if not any(task is one for one in tasks):
                    continue
                t.active, t.role, self.env = task[0], task[1], task[3]
                try:
                    progress = next(task[2])
                    stuck = 0 if progress else stuck + 1
                except StopIteration:
                    tasks[:] = [other for other in tasks if other is not task]
                    stuck = 0
                task[3] = self.env
            if stuck > 20 * len(tasks) + 20:
                raise Fault(f"deadlock: all wait; barriers (block, word): {self._waiting(t)}")
        t.active, t.role = None, ()

    @staticmethod
    def _waiting(t):
        return {key: (b.phase, b.left, b.bytes) for key, b in t.barriers.items() if b.left != b.count or b.bytes}

    @staticmethod
    def _started(t, body):
        yield True
        yield from body(t) or ()

    def _stmt_For(self, s):
        name, extent, body, kind = s.loop_var.name, self._expr(s.extent), self._stmt(s.body), np.dtype(_numpy(s.loop_var)).type
        first = int(s.min)

        def steps(t):
            limit = np.asarray(extent(t))
            if limit.ndim == 0:
                for i in range(int(limit)):
                    self.env[name] = kind(first + i)
                    yield body(t)
                return
            outer = t.active
            alive = t.running()
            for i in range(int(t.spread(limit)[alive].max()) if len(alive) else 0):
                mask = t.spread(limit) > i
                t.active = mask if outer is None else mask & outer
                if t.active.any():
                    self.env[name] = kind(first + i)
                    yield body(t)
            t.active = outer

        def go(t):
            iterator = steps(t)
            for waits in iterator:
                if waits is not None:
                    return rest(t, iterator, waits)
            return None

        def rest(t, iterator, waits):
            yield from waits
            for more in iterator:
                yield from more or ()

        return go

    def _stmt_IfThenElse(self, s):
        condition, then = self._expr(s.condition), self._stmt(s.then_case)
        otherwise = self._stmt(s.else_case) if s.else_case is not None else None

        def go(t):
            c = np.asarray(condition(t))
            if c.ndim == 0:
                chosen = then if c else otherwise
                return chosen(t) if chosen else None
            return branch(t, t.spread(c).astype(bool))

        def branch(t, c):
            outer = t.active
            running = c if outer is None else c[outer]
            if running.all():
                return then(t)
            pairs = [(then, c if outer is None else c & outer)]
            if otherwise:
                pairs.append((otherwise, ~c if outer is None else ~c & outer))
            for body, mask in pairs:
                t.active = mask
                waits = body(t) if mask.any() else None
                if waits is not None:
                    return rest(t, pairs, waits, body, outer)
                t.active = outer
            return None

        def rest(t, pairs, waits, current, outer):
            yield from waits
            seen = False
            for body, mask in pairs:
                if seen:
                    t.active = mask
                    if mask.any():
                        yield from body(t) or ()
                seen = seen or body is current
            t.active = outer

        return go

    def _stmt_Bind(self, s):
        name, value, dtype = s.var.name, self._expr(s.value), np.dtype(_numpy(s.var))

        def go(t):
            found = np.asarray(value(t))
            if found.dtype != dtype:
                raise Fault(f"{name} is {found.dtype}, not {dtype}: the description of what it is made of is wrong")
            self.env[name] = found

        return go

    def _stmt_BufferStore(self, s):
        name, value = s.buffer.name, self._expr(s.value)
        (index,) = [self._expr(i) for i in s.indices]

        def go(t):
            t.store(self.memories[name], index(t), value(t))

        return go

    def _stmt_AllocBuffer(self, s):
        buffer = s.buffer
        name, scope = buffer.name, str(buffer.scope() if callable(buffer.scope) else buffer.scope)
        size = int(np.prod([int(e) for e in buffer.shape]))
        dtype = np.dtype(str(buffer.dtype))

        def go(t):
            known = self.memories.get(name)
            if known is not None and known.owners is not None and known.threads is t:
                return
            rows, owners = (t.count // t.per_block, t.row) if scope.startswith("shared") else (t.count, t.everyone)
            trace = Trace((rows, size), t.per_block) if scope.startswith("shared") and t.races else None
            memory = Memory(name, np.zeros((rows, size), dtype), owners, trace)
            memory.threads = t
            self.memories[name] = memory

        return go

    def _stmt_DeclBuffer(self, s):
        alias, source = s.buffer.name, _source(s.data)

        def go(_t):
            self.memories[alias] = self.memories[source]

        return go

    def _stmt_Evaluate(self, s):
        if isinstance(s.value, Call):
            name = _op(s.value)
            if name == "tvm_storage_sync":
                return lambda t: t.barrier()
            if name == "cuda.func_call":
                function, args = self._call_parts(s.value)
                waits = getattr(function.describe, "waits", False)
                if waits:
                    return lambda t: function.describe(t, *[a(t) for a in args])

                def go(t):
                    function.describe(t, *[a(t) for a in args])

                return go
        value = self._expr(s.value)

        def evaluate(t):
            value(t)

        return evaluate

    # Expressions

    def _expr(self, e):
        kind = type(e).__name__
        if kind in ("IntImm", "FloatImm"):
            value = np.dtype(_numpy(e)).type(e.value)
            return lambda t: value
        if kind == "Var":
            name = e.name
            return lambda t: self.env[name]
        if kind == "TensorLoad":
            name = e.source.name
            (index,) = [self._expr(i) for i in e.indices]
            return lambda t: t.load(self.memories[name], index(t))
        if kind == "Cast":
            value, dtype = self._expr(e.value), np.dtype(_numpy(e))
            return lambda t: np.asarray(value(t)).astype(dtype)
        if kind in _BINARY:
            a, b, f = self._expr(e.a), self._expr(e.b), _BINARY[kind]
            return lambda t: f(a(t), b(t))
        if kind == "Not":
            a = self._expr(e.a)
            return lambda t: np.logical_not(a(t))
        if kind == "BitwiseNot":
            a = self._expr(e.a)
            return lambda t: np.invert(a(t))
        if kind == "Select":
            c, a, b = self._expr(e.condition), self._expr(e.true_value), self._expr(e.false_value)
            return lambda t: np.where(c(t), a(t), b(t))
        if kind == "Call":
            return self._call(e)
        raise NotImplementedError(f"{kind}: {e}")

    def _call_parts(self, e):
        args = list(e.args)
        name = args[0].value
        return device.FUNCTIONS[name], [self._expr(a) for a in args[1:-1]]

    def _call(self, e):
        name = _op(e)
        if name == "cuda.func_call":
            function, args = self._call_parts(e)
            return lambda t: function.describe(t, *[a(t) for a in args])
        if name == "if_then_else":
            return self._if_then_else(*[self._expr(a) for a in e.args], np.dtype(_numpy(e)))
        if name == "address_of":
            load = e.args[0]
            buffer, (index,) = load.source.name, [self._expr(i) for i in load.indices]
            return lambda t: Pointer(self.memories[buffer], t.spread(index(t)).astype(np.int64))
        args = [self._expr(a) for a in e.args]
        if name == "reinterpret":
            dtype = np.dtype(_numpy(e))
            return lambda t: np.asarray(args[0](t)).view(dtype)
        if name in _CALLS:
            f = _CALLS[name]
            return lambda t: f(*[a(t) for a in args])
        raise NotImplementedError(f"{name}: {e}")

    @staticmethod
    def _if_then_else(condition, yes, no, dtype):
        def go(t):
            c = np.asarray(condition(t))
            if c.ndim == 0:
                return yes(t) if c else no(t)
            c, outer = t.spread(c).astype(bool), t.active
            try:
                t.active = c if outer is None else c & outer
                a = yes(t) if t.active.any() else dtype.type(0)
                t.active = ~c if outer is None else ~c & outer
                b = no(t) if t.active.any() else dtype.type(0)
            finally:
                t.active = outer
            return np.where(c, a, b)

        return go


def _op(call):
    """The operation's name without its dialect."""
    return str(call.op.name).split(".", 1)[1]


def _source(data):
    """Name of the buffer whose memory an alias uses."""
    return data.args[0].name if isinstance(data, Call) else data.name


def _numpy(e):
    return str(e.ty.dtype)


def _truncdiv(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return np.where((a < 0) != (b < 0), -(abs(a) // abs(b)), abs(a) // abs(b)).astype(a.dtype) if a.dtype.kind == "i" else a / b


def _truncmod(a, b):
    return (np.asarray(a) - _truncdiv(a, b) * b).astype(np.asarray(a).dtype)


def _shift(f):
    def go(a, b):
        a = np.asarray(a)
        return f(a, np.asarray(b).astype(a.dtype)).astype(a.dtype)

    return go


_BINARY = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": _truncdiv, "Mod": _truncmod, "FloorDiv": np.floor_divide,
    "FloorMod": np.mod, "Min": np.minimum, "Max": np.maximum, "EQ": np.equal, "NE": np.not_equal, "LT": np.less, "LE": np.less_equal,
    "GT": np.greater, "GE": np.greater_equal, "And": np.logical_and, "Or": np.logical_or,
    "BitwiseAnd": np.bitwise_and, "BitwiseOr": np.bitwise_or, "BitwiseXor": np.bitwise_xor,
    "LShift": _shift(np.left_shift), "RShift": _shift(np.right_shift),
}  # fmt: skip
_CALLS = {
    "bitwise_and": np.bitwise_and, "bitwise_or": np.bitwise_or, "bitwise_xor": np.bitwise_xor,
    "bitwise_not": np.invert, "shift_left": _shift(np.left_shift), "shift_right": _shift(np.right_shift),
    "popcount": lambda a: np.bitwise_count(a).astype(np.asarray(a).dtype),
}  # fmt: skip
