"""Layers of bits on the tensor cores of single warps: ``mma`` on bits.

A block has a grid of warps, each of which computes ``warp_rows`` x ``warp_columns``; ``slices`` such grids share the steps of each slab
and add their sums up in shared memory, which keeps more warps busy where a result has few tiles.

So can blocks: the ``split`` blocks of a cluster share the slabs of one tile (from sm_90 on). Each leaves its sums in its own shared memory,
where the first one reads them; it alone has results. Sums are integers, so nothing depends on who comes first. Without clusters they meet
in the device's memory, see :mod:`.parts`.

sm_75 has xor and 8 x 8 x 128 bits, later ones and, 16 x 8 x 256.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import simt
from bnntvm.schedules.cuda.fragments import FragmentKernel
from bnntvm.schedules.cuda.tiles import swizzle


@dataclass(frozen=True)
class Instruction:
    """Rows, and bytes of K, of an instruction; accumulators of a thread; words of a fragment of A and of B."""

    function: str
    rows: int
    step: int
    accumulators: int
    a_words: int
    b_words: int


INSTRUCTIONS = {
    "and": Instruction("bnn_mma_and", 16, 32, 4, 4, 2),
    "xor": Instruction("bnn_mma_xor", 8, 16, 2, 1, 1),
}


class MmaKernel(FragmentKernel):
    """The kernel.

    Parameters
    ----------
    shape : tiles.Shape
    warp_rows, warp_columns : int
        Tile of a warp; columns a multiple of 32.
    slices : int
    split : int
        Blocks that share the slabs; not more than there are.

    Attributes
    ----------
    cluster : int
        Those of them that reach each other's shared memory.
    """

    counts_columns = False

    def __init__(self, shape, warp_rows, warp_columns, slices, isa, name, split=1):
        self.warp_rows, self.warp_columns, self.slices, self.split = warp_rows, warp_columns, slices, split
        self.cluster = split
        self.grid = shape.rows // warp_rows, shape.columns // warp_columns
        self.warps = self.grid[0] * self.grid[1]
        super().__init__(shape, self.warps * slices * simt.WARP, isa, name)
        self.instruction = INSTRUCTIONS[isa.operation]
        self.asynchronous = isa.async_copy
        one = self.instruction
        self.pieces(warp_rows // one.rows, warp_columns // 8, one.rows)

    @property
    def ring_words(self):
        """Words of shared memory of the stages, which the reductions of slices and of blocks use again."""
        reduction = max(self.slices - 1, int(self.cluster > 1)) * self.warps * self.sums_of_thread * simt.WARP
        return max(self.shape.stages * self.shape.stage_words, reduction)

    @property
    def shared_words(self):
        """Words of shared memory: the ring, and a sum for each row."""
        return self.ring_words + (self.shape.rows if self.counts_rows else 0)

    @property
    def counts(self):
        """Whether anything is counted beside the products."""
        return self.counts_rows

    def function(self):
        blocks = self.row_tiles() * self.column_tiles * self.split
        return simt.kernel(self.name, self.params, blocks, self.threads, self._body, cluster=self.cluster)

    def _body(self, block, thread):
        body = []
        named = simt.namer(body)
        self.begin(named, body)
        self.memory, allocate = simt.shared(self.shared_words)
        body.append(allocate)
        self.thread, self.lane, warp = thread, named("lane", simt.mod(thread, 32)), named("warp", simt.div(thread, 32))
        self.rank = named("rank", simt.mod(block, self.split))
        row_tile, column_tile = self.tile_of(named, named("tile", simt.div(block, self.split)))
        self._share(named)
        self.slice, warp = named("slice", simt.div(warp, self.warps)), named("place", simt.mod(warp, self.warps))
        self.warp, self.warp_row = warp, named("warp_row", simt.div(warp, self.grid[1]) * self.warp_rows)
        self.warp_column = named("warp_column", simt.mod(warp, self.grid[1]) * self.warp_columns)
        self.sums_begin = self.ring_words
        self.tile_results(named, row_tile, column_tile)
        self._operands(named, row_tile, column_tile)
        body += self.allocate_sums()
        several = len(self.passes) > 1
        self._addresses(named)
        self._fragments(body)
        for number in range(len(self.layer.products)):
            own = [one for one in self.passes if one.product == number]
            body += [s for loader in self.loaders for s in loader.clear()]
            for index, one in enumerate(own):
                body += self._walk(named, one)
                body += self.fold(one, index == 0)
            body += self._reduce_slices(self.totals if several else self.sums)
            body += self._publish()
            body.append(simt.sync() if self.counts else [])
            body += self._finish(number, self.totals if several else self.sums)
        return [*body, *self._results()]

    def _finish(self, number, sums):
        """What is done with the sums of one product, which the first slice has."""
        body = self._reduce_blocks(sums)
        if self.layer.scaled:
            body += self.scale(number)
            body.append(simt.sync())  # the sums of rows are written again
        return body

    def _results(self):
        """What is done with the sums of all."""
        return [self._where_first(tir.seq(self.emit()))]

    def _where_first(self, statement):
        """What the first block does, the first of its slices: it has the sums of all."""
        own = [tirx.EQ(one, simt.i32(0)) for one, count in ((self.slice, self.slices), (self.rank, self.cluster)) if count > 1]
        for condition in own:
            statement = tirx.IfThenElse(condition, statement, None)
        return statement

    def _operands(self, named, row_tile, column_tile):
        """Where the tile's operands begin: the loader of the data, and the weights in memory."""
        self.offset, self.first_weight = named("offset", self.group_offset(column_tile)), named("weights", self.weight_base(column_tile))
        self.rows = self.rows_of_threads(named, self.thread, self.threads)
        self.loaders = [self.rows]
        for statement in self.rows.allocate + self.rows.begin(row_tile):
            named.append(statement)

    def _publish(self):
        """What the threads have counted of the data, to shared memory."""
        return self.rows.publish(self.memory, self.ring_words)

    # Walking along K

    def _share(self, named):
        """The block's slabs: ``slab_count`` of them (an int if that is the same in all blocks) from ``first_slab`` on, at most ``most``."""
        slabs, self.most = self.shape.slabs, -(-self.shape.slabs // self.split)
        self.first_slab, self.slab_count = simt.i32(0), slabs
        if self.split > 1:
            self.first_slab = named("first_slab", simt.div(self.rank * slabs, self.split))
            self.slab_count = named("slab_count", simt.div((self.rank + 1) * slabs, self.split) - self.first_slab)

    def _own_slab(self, one, slab, stage):
        """Copies of the block's slab ``slab``, if it has one."""
        load = self._load(one, slab + self.first_slab, stage)
        if isinstance(slab, tirx.IntImm) and isinstance(self.slab_count, int):
            return load if int(slab) < self.slab_count else []
        return [tirx.IfThenElse(slab < simt.i32(self.slab_count), tir.seq(load), None)]

    def _walk(self, named, one):
        """One pass: copies run ``stages - 1`` slabs ahead of the products."""
        shape, body = self.shape, []
        ahead = shape.stages - 1
        body += [simt.put(self.sums, i, simt.i32(0)) for i in range(self.sums_of_thread)]
        body.append(simt.sync())  # the ring may still be read
        for slab in range(min(ahead, self.most)):
            body += self._own_slab(one, simt.i32(slab), simt.i32(slab)) + self._commit()
        body += [s for _ in range(ahead - min(ahead, self.most)) for s in self._commit()]

        def step(slab, steps):
            inner = []
            here = simt.namer(inner)
            stage = here("stage", simt.mod(slab, shape.stages))
            if self.asynchronous:
                inner.append(simt.do(f"bnn_copy_wait{ahead - 1}"))
            for loader, factor in zip(self.loaders, (one.row_factor, one.column_factor)):
                inner += loader.count_bits(self.memory, stage, factor) if factor else []
            inner.append(simt.sync())
            coming = slab + ahead
            inner += self._own_slab(one, coming, simt.mod(coming, shape.stages))
            inner += self._commit()
            return inner + self._multiply(here, stage, steps)

        if self.split > 1:  # the last slab is zero where K does not fill it
            return [*body, simt.loop("slab", self.slab_count, lambda slab: step(slab, shape.slab // self.instruction.step), rolled=True)]
        size, bytes_of_k = self.instruction.step, self.layer.taps * self.layer.group_words * 4
        whole, rest = divmod(bytes_of_k, shape.slab)
        if whole:
            body.append(simt.loop("slab", whole, lambda slab: step(slab, shape.slab // size), rolled=True))
        if rest:  # K does not fill the last slab
            last = step(simt.i32(whole), -(-rest // size))
            body += last if len(self.passes) == 1 else [simt.apart(last)]  # addresses of all passes at once would need too many registers
        return body

    def _commit(self):
        return [simt.do("bnn_copy_commit")] if self.asynchronous else []

    def _load(self, one, slab, stage):
        """Copies of one slab."""
        body = []
        function = "bnn_copy_async" if self.asynchronous else "bnn_copy"
        self.rows.copy(simt.namer(body), self.memory, self._planes[one.data], self.offset, slab, stage, function)
        self._load_weights(body, one, slab, stage, function)
        return body

    def _load_weights(self, body, one, slab, stage, function):
        """Copies of the weights of one slab."""
        shape, named = self.shape, simt.namer(body)
        count = shape.columns * shape.row_words // 4  # 16-byte chunks of the weights, already in order
        source = named("source", self.first_weight + simt.wide(slab + one.weights * shape.slabs) * shape.packed_slab_words)
        target = stage * shape.stage_words + shape.rows * shape.row_words
        for i in range(-(-count // self.threads)):
            chunk = self.thread + i * self.threads
            copy = simt.do(f"{function}4", simt.pointer(self.memory, target + chunk * 4),
                           simt.pointer(self.weights, source + simt.wide(chunk * 4)), tir.constant(True, "bool"))  # fmt: skip
            whole = (i + 1) * self.threads <= count
            body.append(copy if whole else tirx.IfThenElse(chunk < simt.i32(count), copy, None))

    # Products

    def _addresses(self, named):
        """Where a lane's rows of the four 8 x 16-byte matrices of a load begin, without the slab's swizzle."""
        matrix, row = simt.div(self.lane, 8), simt.mod(self.lane, 8)
        if self.instruction.rows == 16:
            # A: rows 0-7 and 8-15 of the first 16 bytes, then of the second; B: both halves of eight rows, then of the next eight.
            a_row, self.a_half = tirx.bitwise_and(matrix, simt.i32(1)) * 8 + row, named("a_half", simt.div(matrix, 2))
            b_row, self.b_half = simt.div(matrix, 2) * 8 + row, named("b_half", tirx.bitwise_and(matrix, simt.i32(1)))
        else:  # four times 8 rows
            a_row = b_row = matrix * 8 + row
            self.a_half = self.b_half = simt.i32(0)
        self.a_row, self.b_row = named("a_row", self.warp_row + a_row), named("b_row", self.warp_column + b_row)

    def _fragments(self, body):
        loads = -(-self.row_pieces * self.instruction.a_words // 4), -(-self.column_pieces * self.instruction.b_words // 4)
        self.loads = loads
        self.a, allocate_a = simt.registers("a", loads[0] * 4, "uint32")
        self.b, allocate_b = simt.registers("b", loads[1] * 4, "uint32")
        body += [allocate_a, allocate_b]

    def _multiply(self, here, stage, steps):
        """The products of ``steps`` steps of one slab, shared out among slices."""
        one, base, body = self.instruction, here("a_base", stage * self.shape.stage_words), []
        for k in range(-(-steps // self.slices)):
            if self.slices == 1:
                body += self._step(base, k * (one.step // 16))
                continue
            number = here("step", self.slice + k * self.slices)
            own = tir.seq(self._step(base, number * (one.step // 16)))
            whole = (k + 1) * self.slices <= steps
            body.append(own if whole else tirx.IfThenElse(number < simt.i32(steps), own, None))
        return body

    def _step(self, base, chunk):
        """One step along K from 16-byte chunk ``chunk`` of the slab on."""
        shape, one, body = self.shape, self.instruction, []
        a_rows = 4 // one.a_words * one.rows  # rows of a load
        b_rows = 4 // one.b_words * 8
        for target, count, rows, row, half, begin in (
            (self.a, self.loads[0], a_rows, self.a_row, self.a_half, 0),
            (self.b, self.loads[1], b_rows, self.b_row, self.b_half, shape.rows * shape.row_words),
        ):
            for i in range(count):
                place = tirx.bitwise_xor(simt.i32(chunk), tirx.bitwise_xor(half, swizzle(row, shape.slab)))
                where = base + begin + (row + i * rows) * shape.row_words + place * 4
                body.append(simt.do("bnn_load_matrices", simt.pointer(target, 4 * i), simt.pointer(self.memory, where)))
        for i in range(self.row_pieces):
            for j in range(self.column_pieces):
                d = simt.pointer(self.sums, self.number(i, j, 0))
                a, b = simt.pointer(self.a, i * one.a_words), simt.pointer(self.b, j * one.b_words)
                body.append(simt.do(one.function, d, a, b))
        return body

    def _place_of_sum(self, number, i):
        """Where sum ``i`` of a thread of slice ``number`` lies in shared memory while sums are added up."""
        return ((number * self.warps + self.warp) * self.sums_of_thread + i) * simt.WARP + self.lane

    def _reduce_slices(self, sums):
        """Add the sums of all slices to those of the first one."""
        if self.slices == 1:
            return []
        place = self._place_of_sum
        count, before = self.sums_of_thread, self.slice - 1
        give = [simt.put(self.memory, place(before, i), tirx.reinterpret("uint32", simt.at(sums, i))) for i in range(count)]
        take = []
        for i in range(self.sums_of_thread):
            value = simt.at(sums, i)
            for number in range(self.slices - 1):
                value = value + tirx.reinterpret("int32", simt.at(self.memory, place(simt.i32(number), i)))
            take.append(simt.put(sums, i, value))
        first = tirx.EQ(self.slice, simt.i32(0))
        return [
            simt.sync(),
            tirx.IfThenElse(tirx.Not(first), tir.seq(give), None),
            simt.sync(),
            tirx.IfThenElse(first, tir.seq(take), None),
        ]

    def _reduce_blocks(self, sums):
        """Add the sums of all blocks of a cluster, and what they counted of rows and columns, to those of the first one."""
        if self.cluster == 1:
            return []
        here = [self._place_of_sum(simt.i32(0), i) for i in range(self.sums_of_thread)]
        give = [simt.put(self.memory, place, tirx.reinterpret("uint32", simt.at(sums, i))) for i, place in enumerate(here)]

        def other(place, rank):
            return tirx.reinterpret("int32", simt.call("bnn_load_other", simt.pointer(self.memory, place), rank))

        def take(before):
            return [simt.put(sums, i, simt.at(sums, i) + other(place, before + 1)) for i, place in enumerate(here)]

        first, rest = tirx.EQ(self.slice, simt.i32(0)), tirx.Not(tirx.EQ(self.rank, simt.i32(0)))
        return [
            simt.sync(),
            tirx.IfThenElse(tirx.And(first, rest), tir.seq(give), None),
            simt.do("bnn_cluster_sync"),
            self._where_first(tir.seq(simt.loop("other", self.split - 1, take, rolled=True))),
            *self._add_counts(other),
            simt.do("bnn_cluster_sync"),
        ]

    def _add_counts(self, other):
        """Sums of rows of all blocks, in the first one."""
        body, count = [], self.shared_words - self.ring_words
        for i in range(-(-count // self.threads)):
            place = self.thread + i * self.threads
            where = place + self.ring_words

            def take(before, where=where):
                value = tirx.reinterpret("int32", simt.at(self.memory, where)) + other(where, before + 1)
                return [simt.put(self.memory, where, tirx.reinterpret("uint32", value))]

            own = tirx.And(tirx.EQ(self.rank, simt.i32(0)), place < simt.i32(count))
            body.append(tirx.IfThenElse(own, tir.seq(simt.loop("other", self.split - 1, take, rolled=True)), None))
        return body
