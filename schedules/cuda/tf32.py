"""Float convolutions and dense layers on tensor cores: three products of tf32 for each product of float32 (from sm_80 on).

A float32 is a tf32 (11 significant bits) and a rest: ``x = X + x'``, ``w = W + w'``. Tensor cores multiply tf32 exactly, so

    x * w = x' * W + X * w' + X * W + x' * w'

needs three products; the last one is below 2^-21 of ``x * w`` and left out, and so is what of the rests no tf32 has: 2^-21 at most, as
much again. (The scheme is described in Ootomo, Yokota: Recovering single precision accuracy from Tensor Cores while surpassing the FP32
theoretical peak performance, 2022.) Weights are split at compile time, ``W`` rounded to nearest, so that errors have either sign; data are
split in registers, ``X`` cut off, which is one operation and cannot overflow. Two products of bfloat16 a number would be twice as fast, but
leave 2^-16, which flips signs and levels that are decided by what is computed here.

Tensor cores round their sums towards zero. They add up eight products at a time, from zero; these sums are added as elsewhere, rounded to
nearest. So results are as close to the exact ones as those of CUDA cores, and where numbers have few bits (levels, signs, small integers),
bit by bit the same.

Infinity has no rest (it would be NaN), and makes NaN of a rest that is 0. So where a sum is not finite, or so large that it may have been
cut off, it is computed once more as CUDA cores do, output by output.

Layouts
-------
A block computes a tile of pixels by 32-bit words of channels, in the shapes of :mod:`.patches`; a warp has 64 pixels and a word. It walks
the input channels in chunks: a ring of stages in shared memory has the patch of the image that the tile's windows cover, and the chunk's
weights, which come asynchronously. Where all weights of a block's channels fit beside the ring they stay (``resident``), and so do blocks:
they take one tile after another, and the next one's patch comes while this one's is multiplied.

Along K, which is padded to a multiple of eight for each chunk, shared memory holds the patch

* channels last: ``[rows, columns][units + 4]`` where a pixel's channels lie side by side, four of them a copy; K is ``[taps, units]``.
  Rows of four channels are ``units + 4`` apart, so that those of eight pixels in a row lie in different banks;
* as planes: ``[units][rows, columns]`` elsewhere (images in the order of an ONNX file, four pixels a copy where rows allow it; odd numbers
  of channels); K is ``[units, taps]``, and a table says how far from its first pixel each element lies.

Weights are ``uint32[column blocks, chunks, steps, words, 4, 32, 4]``: a lane reads what it needs of eight channels at once, ``W`` of rows t
and t + 4 of K, then their rests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import cells, functions, patches, simt
from bnntvm.schedules.cuda import epilogue as tail
from bnntvm.schedules.cuda.patches import WARP_PIXELS, WORD

STEP = 8  #: elements of K that tensor cores multiply at once
SLAB = 32  #: elements of K of a row of the weights of warpgroups
_FRAGMENT = 512  # words of a step's weights for a word of channels
_WARPS = ((3, 4), (2, 4), (6, 2), (4, 2), (3, 2), (2, 2), (6, 1), (4, 1))
_GROUPS = ((3, 2), (2, 2), (1, 2), (3, 1), (2, 1), (1, 1))
_UNITS = (32, 16, 8, 4, 2, 1)
_WARPS_TOGETHER = 12  # that registers are for on a multiprocessor, so that a thread has 168
_RESERVED = 1 << 10  # bytes of shared memory that every block takes beside its own
#: About what a multiprocessor of an H200 multiplies by mma and wgmma, and gets from its second-level cache.
_TF32_OF_CYCLE, _BYTES_OF_CYCLE = (640, 1000), 32


@dataclass(frozen=True)
class Schedule:
    """What may be tuned.

    Attributes
    ----------
    warps : tuple of int
        Warps along the pixels and along the channels of a block's tile.
    shape : tuple of int
        Rows and columns of a warp's 64 pixels, as in :class:`.patches.Schedule`.
    units : int
        Input channels of a chunk.
    stages : int
        Of the ring.
    resident : bool
        Whether all weights of a block stay in shared memory, and blocks on their multiprocessor.
    grouped : bool
        Whether warpgroups multiply (:mod:`.tf32_groups`): four warps for each 64 pixels, with all channels of the block.
    """

    warps: tuple[int, int]
    shape: tuple[int, int]
    units: int
    stages: int
    resident: bool
    grouped: bool = False


class Layout:
    """Sizes that follow from a problem and a schedule, in words of shared memory and elements."""

    def __init__(self, problem, schedule):
        self.problem, self.schedule, units = problem, schedule, schedule.units
        self.together = in_fours(problem)
        self.rows, self.columns, self.plane = patches.patch(problem, schedule.warps, schedule.shape)
        self.lead, self.each = 0, 4 if self.together else 1
        if rows_in_fours(problem, schedule):  # from a column on that is a multiple of four
            self.lead, self.each = -problem.window.pads[1] % 4, 4
            self.columns = -(-(self.columns + self.lead) // 4) * 4
            self.plane = self.rows * self.columns
        self.pixels, self.pitch = self.rows * self.columns, units + 4
        self.steps = -(-problem.taps * units // STEP)
        self.chunks = -(-problem.units // units)
        self.column_blocks = -(-problem.words // schedule.warps[1])
        self.channels = WORD * schedule.warps[1]
        # Of warpgroups rows of 32 elements of K, W and then the rests; of warps fragments.
        self.slabs = -(-self.steps * STEP // SLAB)
        self.part_weights = self.slabs * SLAB * self.channels
        self.chunk_weights = 2 * (self.part_weights if schedule.grouped else self.steps * STEP * self.channels)
        self.patch_words = self.pixels * self.pitch if self.together else -(-units * self.plane // 4) * 4
        self.table_at = self.chunks * self.chunk_weights if schedule.resident else 0
        self.ring_at = self.table_at + (0 if self.together else self.steps * STEP)
        self.stage_words = self.patch_words + (0 if schedule.resident else self.chunk_weights)
        self.shared_words = self.ring_at + schedule.stages * self.stage_words

    @property
    def warps(self):
        """Warps of a block."""
        return self.schedule.warps[0] * (4 if self.schedule.grouped else self.schedule.warps[1])

    @property
    def threads(self):
        """Threads of a block."""
        return simt.WARP * self.warps

    @property
    def weight_words(self):
        """Elements of the packed weights."""
        return self.column_blocks * self.chunks * self.chunk_weights

    def blocks(self, isa):
        """Blocks that fit on a multiprocessor."""
        return min(isa.shared_bytes // (4 * self.shared_words + _RESERVED), self.most_blocks)

    @property
    def most_blocks(self):
        """Blocks of a multiprocessor for which there are registers."""
        return max(1, _WARPS_TOGETHER // self.warps)

    def element(self, k):
        """``(unit, tap)`` of element k of a chunk; arrays. There are fewer elements than places in a chunk."""
        units, taps = self.schedule.units, self.problem.taps
        return (k % units, k // units) if self.together else (k // taps, k % taps)


def in_fours(problem):
    """Whether a pixel's channels come to shared memory four at a time."""
    return problem.channels_last and problem.units % 4 == 0


def rows_in_fours(problem, schedule):
    """Whether pixels of a row of the image, a plane, come to shared memory four at a time: all four are in the image, or none is."""
    window = problem.window
    step = schedule.shape[1] * window.strides[1]
    return not (problem.channels_last or problem.pointwise or window.in_width % 4 or step % 4)


def pays(problem, isa):
    """Whether tensor cores are the default: three products, with those of K's padding, in less time than CUDA cores take for one.

    What surrounds the products is much the same on both. Where K is short that decides, and its padding is large.
    """
    return 3 * padded_depth(problem) < isa.tf32_rate * problem.taps * problem.units


def padded_depth(problem):
    """Elements along K with the padding of the fullest chunks."""
    if in_fours(problem):
        return problem.taps * (-(-problem.units // STEP) * STEP)
    return min(layout.chunks * layout.steps * STEP for layout in (_depths(problem, units) for units in _chunks(problem)))


def _depths(problem, units):
    return Layout(problem, Schedule((1, 1), (8, 8) if not problem.pointwise else (0, WARP_PIXELS), units, 1, False))


def _chunks(problem):
    """Units of a chunk to choose from."""
    if in_fours(problem):
        many = (128, 64) if problem.taps == 1 else ()
        return [units for units in (*many, *_UNITS) if units % STEP == 0 and units < problem.units + STEP]
    return list(dict.fromkeys([*([problem.units] if problem.units < _UNITS[0] else []), *(u for u in _UNITS if u <= problem.units)]))


def schedules(problem, isa):
    """Valid schedules, a good one first; none where there is no tf32, or not even a chunk of the smallest tile fits."""
    if not isa.tf32:
        return []
    found = []
    for warps, grouped in [*((w, False) for w in _WARPS), *((w, True) for w in _GROUPS if isa.wgmma)]:
        if warps[1] > 1 and warps[1] >= 2 * problem.words:
            continue
        for shape in [(0, WARP_PIXELS)] if problem.pointwise else patches.shapes(problem.window, warps[0]):
            for units in _chunks(problem):
                for resident, stages in ((True, 2), (True, 3), (False, 1), (False, 2), (False, 3)):
                    one = Schedule(warps, shape, units, stages, resident, grouped)
                    layout = Layout(problem, one)
                    if resident or not grouped and (stages == 1) is (layout.chunks == 1):
                        if 4 * layout.shared_words <= isa.block_shared_bytes:
                            found.append(one)
    return sorted(found, key=_cost(problem, isa))


def _cost(problem, isa):
    """A function that orders schedules: cycles of a multiprocessor for each result. Estimated, not measured.

    Tensor cores take so many for their products, padding included, or shared memory for what they read; what passes through it comes from
    the second-level cache. At the end of a chunk nothing is under way. Few warps wait for each other, those of warpgroups less, and a block
    that is alone computes nothing while it stores its results.
    """
    window = problem.window

    def key(schedule):
        layout, grouped = Layout(problem, schedule), schedule.grouped
        blocks = layout.blocks(isa)
        if not blocks:
            return float("inf"), 0, 0
        pixels, channels = WARP_PIXELS * schedule.warps[0], WORD * schedule.warps[1]
        used = window.out_height * window.out_width / _computed(problem, schedule)
        used *= problem.out_channels / (layout.column_blocks * channels)
        steps = layout.chunks * layout.steps
        products = steps * STEP * pixels * channels * 3 / _TF32_OF_CYCLE[grouped]
        # A warp reads 64 x 8 numbers of the data and W and rests of 32 channels; a warpgroup all channels, W twice.
        read = steps * (schedule.warps[0] * (24 + channels * 3 // 4) if grouped else layout.warps * 34)
        fetched = 4 * layout.chunks * (layout.patch_words + (0 if schedule.resident else layout.chunk_weights)) / _BYTES_OF_CYCLE
        waiting = 1 + (1 if grouped else 4) / (blocks * layout.warps) + 0.1 * (blocks == 1)
        cycles = (max(products, read) + fetched) * waiting + 100 * layout.chunks / blocks
        return cycles / (pixels * channels * used), -schedule.units, schedule.stages

    return key


def _computed(problem, schedule):
    """Pixels that tiles compute for an image; where they are counted through images, its own."""
    window = problem.window
    if problem.pointwise:
        return window.out_height * window.out_width
    high, wide = schedule.shape[0] * schedule.warps[0], schedule.shape[1]
    return -(-window.out_height // high) * high * (-(-window.out_width // wide) * wide)


def split(values):
    """``(W, w')`` of float32 numbers: the nearest tf32, and an exact rest of either sign, 0 for what is not finite."""
    values = np.ascontiguousarray(values, np.float32)
    nearest = functions.truncated((values.view(np.uint32) + np.uint32(0x1000)).view(np.float32))
    with np.errstate(invalid="ignore"):
        big = np.where(np.isfinite(values) & np.isfinite(nearest), nearest, functions.truncated(values))
        big = np.where(np.isnan(values), np.float32(np.nan), big)
        return big, np.where(np.isfinite(values), values - big, np.float32(0))


def pack_weights(problem, schedule, weights):
    """Weights in the order of :mod:`.tf32`.

    Parameters
    ----------
    weights : ndarray
        float32 ``[O, taps, I]``.

    Returns
    -------
    ndarray
        uint32, one axis; the bits of W and of the rests, 0 where there is no weight.
    """
    layout = Layout(problem, schedule)
    k = np.arange(layout.steps * STEP)
    unit, tap = layout.element(k)
    full = np.zeros((layout.chunks, len(k), layout.column_blocks * schedule.warps[1] * WORD), np.float32)
    for chunk in range(layout.chunks):
        channel = chunk * schedule.units + unit
        there = (channel < problem.units) & (tap < problem.taps) & (unit < schedule.units)
        full[chunk, there, : len(weights)] = weights[:, tap[there], channel[there]].T
    parts = np.stack(split(full))  # W and rests
    if schedule.grouped:
        return _rows(layout, parts)
    shape = (2, layout.chunks, layout.steps, 2, 4, layout.column_blocks, schedule.warps[1], 4, 8)
    # part, chunk, step, slot, t, block, word, piece, g -> block, chunk, step, word, piece, g, t, part, slot
    return np.ascontiguousarray(parts.reshape(shape).transpose(5, 1, 2, 6, 7, 8, 4, 0, 3)).reshape(-1).view(np.uint32)


def _rows(layout, parts):
    """``uint32[column blocks, chunks, 2, slabs, channels, 32]``, the 16-byte parts of a row exchanged by xor with the row's number."""
    full = np.zeros((2, layout.chunks, layout.slabs * SLAB, parts.shape[-1]), np.float32)
    full[:, :, : parts.shape[2]] = parts
    full = full.reshape(2, layout.chunks, layout.slabs, 8, 4, layout.column_blocks, layout.channels)
    rows = full.transpose(5, 1, 0, 2, 6, 3, 4)  # block, chunk, part, slab, channel, 16 bytes, word
    swizzled, number = np.empty(rows.shape, np.float32), np.arange(layout.channels)
    for chunk in range(8):
        swizzled[..., number, chunk ^ number % 8, :] = rows[..., chunk, :]
    return swizzled.reshape(-1).view(np.uint32)


class Kernel(patches.Kernel):
    """Writes one kernel.

    Parameters
    ----------
    name : str
    problem : patches.Problem
    schedule : Schedule
    emitter : epilogue.Emitter
    data, weights : Buffer
        The anchor's operands.
    batch : int64 expression
    place : callable
        ``place(image, y, x, channel)``: where a number lies in the data, int64.
    isa : CudaIsa
    """

    def __init__(self, name, problem, schedule, emitter, data, weights, batch, place, isa):
        super().__init__(name, problem, schedule, emitter, [data, weights], batch, None, None)
        self.layout, self.isa, self.place = Layout(problem, schedule), isa, place
        self.threads, self.sums_of_thread = self.layout.threads, 64
        self.columns, self.plane, self.lead = self.layout.columns, self.layout.plane, self.layout.lead
        (self.source, declared), (self.packed, declared_too) = simt.flat(data), simt.flat(weights)
        self.emitter.declarations[:0] = [declared, declared_too]

    def function(self):
        params = [*self.params, *self.emitter.inputs, *self.emitter.outputs]
        self.tiles = simt.i32(self._tiles())
        self.in_turn = self.tiles
        if self.schedule.resident:
            together = max(1, self.isa.multiprocessors * max(1, self.layout.blocks(self.isa)) // self.channel_blocks)
            self.in_turn = tirx.min(self.tiles, simt.i32(together))
        grid = self.in_turn * self.channel_blocks
        return simt.kernel(self.name, params, grid, self.threads, self._body, self.layout.most_blocks)

    def _body(self, block, thread):
        layout, body = self.layout, []
        named = simt.namer(body)
        self.shared, allocate = simt.shared(layout.shared_words)
        body += [allocate, *self._registers(), *self.emitter.declarations]
        self._who(named, block, thread)
        self.block = named("column_block", simt.mod(block, self.channel_blocks))
        self.first_tile = named("first_tile", simt.div(block, self.channel_blocks))
        self._fragment_places(named)
        body += self._table()
        count = simt.i32(1)
        if self.schedule.resident:
            self.stride = named("stride", self.in_turn)
            count = named("count", tirx.truncdiv(self.tiles - self.first_tile + self.stride - 1, self.stride))
        self.slabs = named("slabs", count * layout.chunks)
        body += self._start()
        if not self.schedule.resident:
            return [*body, *self._one_tile(simt.i32(0))]
        return [*body, simt.loop("turn", count, self._one_tile, rolled=True)]

    def _registers(self):
        """Sums, and fragments of a step."""
        self.sums, allocate_sums = simt.registers("sums", self.sums_of_thread, "float32")
        self.a, allocate_a = simt.registers("a", 32, "uint32")
        self.b, allocate_b = simt.registers("b", 16, "uint32")
        return [allocate_sums, allocate_a, allocate_b]

    # Copies

    def _start(self):
        """Weights that stay, and the first copies."""
        layout, body = self.layout, []
        if self.schedule.resident:
            words = layout.chunks * layout.chunk_weights
            body += self._copy_weights(simt.wide(self.block) * words, simt.i32(0), words)
        for number in range(max(1, self.schedule.stages - 1)):
            body += [self._copies(simt.i32(number), simt.i32(number)), simt.do("bnn_copy_commit")]
        return body

    def _copies(self, number, stage):
        """Copies of the block's chunk ``number``, counted through its tiles, if there is one."""
        layout, body = self.layout, []
        named = simt.namer(body)
        chunk = named("chunk", simt.mod(number, layout.chunks))
        tile = self.first_tile
        if self.schedule.resident:
            tile = named("tile", self.first_tile + simt.div(number, layout.chunks) * self.stride)
        self._where(named, tile)
        begin = named("begin", stage * layout.stage_words + layout.ring_at)
        body += self._copy_patch(chunk * self.schedule.units, begin)
        if not self.schedule.resident:
            first = simt.wide(self.block * layout.chunks + chunk) * layout.chunk_weights
            body += self._copy_weights(named("source", first), begin + layout.patch_words, layout.chunk_weights)
        return tirx.IfThenElse(number < self.slabs, tir.seq(body), None)

    def _copy_weights(self, source, target, words):
        """As they lie in memory; ``words`` is a multiple of what all threads copy at once, or nearly."""

        def step(i):
            index, named = simt.bind("index", (i * self.threads + self.thread) * 4)
            copy = simt.do("bnn_copy_async4", simt.pointer(self.shared, target + index),
                           simt.pointer(self.packed, source + simt.wide(index)), tir.constant(True, "bool"))  # fmt: skip
            return [named, copy if words % (4 * self.threads) == 0 else tirx.IfThenElse(index < words, copy, None)]

        return [simt.loop("step", -(-words // (4 * self.threads)), step)]

    def _copy_patch(self, first, begin):
        """The patch of ``units`` channels from ``first`` on; what is not in the image, or no channel, is 0."""
        layout, units, each = self.layout, self.schedule.units, self.layout.each
        count = layout.pixels * units // each

        def step(i):
            body = []
            named = simt.namer(body)
            index = named("index", i * self.threads + self.thread)
            if self.problem.channels_last:
                of_pixel = units // each if layout.together else units
                unit, at = simt.mod(index, of_pixel) * (units // of_pixel), named("at", simt.div(index, of_pixel))
            else:
                of_unit = layout.pixels // each
                unit, at = simt.div(index, of_unit), named("at", simt.mod(index, of_unit) * each)
            unit = named("unit", unit)
            image, y, x, exists = self._source(named, at)
            exists = named("exists", self._unit_exists(first + unit, exists))
            where = tirx.Select(exists, self.place(image, y, x, first + unit), tir.i64(0))
            target = at * layout.pitch + unit if layout.together else unit * layout.plane + at
            copy = simt.do(f"bnn_fetch{each}", simt.pointer(self.shared, begin + target), simt.pointer(self.source, where), exists)
            body.append(copy)
            return body if count % self.threads == 0 else [body[0], tirx.IfThenElse(index < count, tir.seq(body[1:]), None)]

        return [simt.loop("step", -(-count // self.threads), step)]

    def _table(self):
        """How far from its pixel the elements of K lie in the patch; those of the padding, whose weights are 0, as the first one."""
        layout, window = self.layout, self.problem.window
        if layout.together:
            return []

        def step(i):
            k, named = simt.bind("k", i * self.threads + self.thread)
            unit, tap = simt.div(k, self.problem.taps), simt.mod(k, self.problem.taps)
            r, s = simt.div(tap, window.kernel[1]), simt.mod(tap, window.kernel[1])
            place = unit * layout.plane + (r * (window.dilations[0] * layout.columns) + s * window.dilations[1])
            place = tirx.Select(k < self.problem.taps * self.schedule.units, place, simt.i32(0))
            store = simt.put(self.shared, k + layout.table_at, tirx.Cast("uint32", place))
            return [named, tirx.IfThenElse(k < layout.steps * STEP, store, None)]

        return [simt.loop("step", -(-layout.steps * STEP // self.threads), step)]

    # Products

    def _one_tile(self, turn):
        layout, stages, body = self.layout, self.schedule.stages, []
        named = simt.namer(body)
        body += [simt.put(self.sums, i, tir.constant(0.0, "float32")) for i in range(self.sums_of_thread)]

        def walk(chunk):
            inner = []
            here = simt.namer(inner)
            number = here("number", turn * layout.chunks + chunk)
            inner += [simt.do(f"bnn_copy_wait{max(0, stages - 2)}"), simt.sync()]
            if stages > 1:  # whoever read that stage before is behind the barrier
                coming = here("coming", number + (stages - 1))
                inner += [self._copies(coming, here("to", simt.mod(coming, stages))), simt.do("bnn_copy_commit")]
            begin = here("patch", simt.mod(number, stages) * layout.stage_words + layout.ring_at)
            weights = chunk * layout.chunk_weights if self.schedule.resident else begin + layout.patch_words
            return inner + self._multiply_chunk(here, begin, weights)

        body.append(simt.loop("chunk", layout.chunks, walk, rolled=layout.chunks > 1))
        self._where(named, self.first_tile + turn * self.stride if self.schedule.resident else self.first_tile)
        return body + self._again_if_infinite() + self._finish()

    def _fragment_places(self, named):
        """Where in the patch a lane's first pixel lies, and how much further those of the other pieces of 16 pixels are.

        Channels last: its row of the first of four 8 x 4 matrices, which follow each other by pixels, then by channels.
        """
        layout = self.layout
        base, offsets = self._patch_places(named)
        if not layout.together:
            self.patch_base, self.offsets = base, offsets
            return
        row, half = simt.mod(self.lane, 8), simt.mod(simt.div(self.lane, 8), 2)
        step = 1 if self.problem.pointwise else self.problem.window.strides[1]
        base = base + (row - self.group) * step + half * (offsets[1] - offsets[0])
        self.patch_base = named("row", base * layout.pitch + simt.div(self.lane, 16) * 4)
        self.offsets = [offset * layout.pitch for offset in offsets]

    def _multiply_chunk(self, named, patch, weights):
        layout, first = self.layout, patch + self.patch_base
        weights = named("weights", weights + self.warp_word * _FRAGMENT + self.lane * 4)
        if layout.together:
            return [self._over_taps(lambda number, tap: self._step(self._matrices(first + tap), number, weights))]
        return [simt.loop("k", layout.steps, lambda k: self._step(self._elements(first, k), k, weights))]

    def _over_taps(self, step):
        """A loop over the steps of a chunk, channels last: ``step(number, how far in the patch it lies)``."""
        layout, window, parts = self.layout, self.problem.window, self.schedule.units // STEP
        down, across = (d * layout.pitch for d in (window.dilations[0] * layout.columns, window.dilations[1]))

        def one(r, s, u):
            return step((r * window.kernel[1] + s) * parts + u, r * down + s * across + u * STEP)

        rows, columns = window.kernel
        return simt.loop("r", rows, lambda r: simt.loop("s", columns, lambda s: simt.loop("u", parts, lambda u: one(r, s, u))))

    def _matrices(self, at):
        """``(statements, loads of each piece of 16 pixels)`` of a step, channels last."""
        at, named = simt.bind("from", at)
        return [named], [
            [simt.do("bnn_load_matrices", self._a(i), simt.pointer(self.shared, at + self.offsets[2 * i]))] for i in range(4)
        ]

    def _elements(self, first, k):
        """The same of planes."""
        body, at = self._places_of_elements(first, k)
        return body, [
            [simt.put(self.a, 8 * i + 2 * h + q, simt.at(self.shared, at[h] + self.offsets[2 * i + q])) for h in (0, 1) for q in (0, 1)]
            for i in range(4)
        ]

    def _places_of_elements(self, first, k):
        """``(statements, places)`` of the two elements of K that a lane reads of its first pixel."""
        body, lane = [], tirx.bitwise_and(self.lane, simt.i32(3))
        named = simt.namer(body)
        entries = [simt.at(self.shared, k * STEP + (lane + (4 * h + self.layout.table_at))) for h in (0, 1)]
        return body, [named("from", first + tirx.Cast("int32", entry)) for entry in entries]

    def _a(self, i):
        return simt.pointer(self.a, 8 * i)

    def _step(self, data, number, weights):
        """The products of eight elements of K."""
        statements, loads = data
        at, named = simt.bind("at", number * (self.schedule.warps[1] * _FRAGMENT) + weights)
        fragments = [simt.do("bnn_load4", simt.pointer(self.b, 4 * j), simt.pointer(self.shared, at + 128 * j)) for j in range(4)]
        body = [*statements, named, *fragments]
        for i, load in enumerate(loads):
            body += [*load, simt.do("bnn_split_tf32", self._a(i))]
            for j in range(4):
                body.append(simt.do("bnn_mma_tf32", simt.pointer(self.sums, 16 * i + 4 * j), self._a(i), simt.pointer(self.b, 4 * j)))
        return body

    # Results

    def _again_if_infinite(self):
        """Sums that are not finite, computed once more."""
        count = self.sums_of_thread
        again, allocate = simt.registers("again", count, "float32")  # in memory, of threads that need it
        keep = [simt.put(again, i, simt.at(self.sums, i)) for i in range(count)]
        back = [simt.put(self.sums, i, simt.at(again, i)) for i in range(count)]

        def one(number):
            body = []
            named = simt.namer(body)
            j, channel = self._of_sum(number)
            j = named("j", j)
            channel = named("channel", (self.first_word + self.warp_word) * WORD + channel)
            statements, pixel = self._pixel(j)
            exists = tirx.And(pixel.exists, channel < self.problem.out_channels)
            finite = simt.call("bnn_all_finite1", simt.pointer(again, number), dtype="bool")
            compute = [*body, *statements, tirx.IfThenElse(exists, tir.seq(self._alone(again, number, pixel, channel)), None)]
            return tirx.IfThenElse(tirx.Not(finite), tir.seq(compute), None)

        finite = simt.call(f"bnn_all_finite{count}", simt.pointer(self.sums, 0), dtype="bool")
        body = [*keep, simt.loop("number", count, one, rolled=True), *back]
        return [allocate, tirx.IfThenElse(tirx.Not(finite), tir.seq(body), None)]

    def _of_sum(self, number):
        """Which pixel of the thread, and which channel of the warp's first word, sum ``number`` is of."""
        pixel = simt.div(number, 16) * 2 + simt.mod(simt.div(number, 2), 2)
        return pixel, self.quad * 2 + simt.mod(simt.div(number, 4), 4) * 8 + simt.mod(number, 2)

    def _weight(self, chunk, k, channel):
        """Where W of an element of a chunk lies in the packed weights for a channel of the block, and how far its rest is from there."""
        words = self.schedule.warps[1] * _FRAGMENT
        step = simt.wide((self.block * self.layout.chunks + chunk) * self.layout.steps + simt.div(k, STEP)) * words
        lane = simt.div(channel, 8) * 128 + simt.mod(channel, 8) * 16 + simt.mod(k, 4) * 4
        return step + simt.wide(lane + simt.div(simt.mod(k, STEP), 4)), 2

    def _alone(self, sums, number, pixel, channel):
        """One sum as on CUDA cores, of the weights as they were: W plus its rest."""
        window, layout, schedule = self.problem.window, self.layout, self.schedule
        total, allocate = simt.registers("alone", 1, "float32")
        body = [allocate, simt.put(total, 0, tir.constant(0.0, "float32"))]
        named = simt.namer(body)
        top = named("y", simt.div(pixel.inside, window.out_width) * window.strides[0] - window.pads[0])
        left = named("x", simt.mod(pixel.inside, window.out_width) * window.strides[1] - window.pads[1])
        column = named("column", simt.mod(channel, layout.channels))

        def step(place):
            one = []
            here = simt.namer(one)
            tap, c = here("tap", simt.div(place, self.problem.units)), here("c", simt.mod(place, self.problem.units))
            y = here("y", top + simt.div(tap, window.kernel[1]) * window.dilations[0])
            x = here("x", left + simt.mod(tap, window.kernel[1]) * window.dilations[1])
            chunk, unit = simt.div(c, schedule.units), simt.mod(c, schedule.units)
            k = here("k", tap * schedule.units + unit if layout.together else unit * self.problem.taps + tap)
            at, rest = self._weight(chunk, k, column)
            at = here("at", at)
            parts = [tirx.reinterpret("float32", simt.at(self.packed, at + h * rest)) for h in (0, 1)]
            weight = simt.call("bnn_add", *parts, dtype="float32")
            value = simt.at(self.source, self.place(pixel.image, y, x, c))
            add = simt.put(total, 0, simt.call("bnn_fma", value, weight, simt.at(total, 0), dtype="float32"))
            there = cells.within(y, window.in_height, x, window.in_width)
            return [*one, tirx.IfThenElse(there, add, None)]

        walk = simt.loop("place", self.problem.taps * self.problem.units, step, rolled=True)
        return [*body, walk, simt.put(sums, number, simt.at(total, 0))]

    def _finish(self):
        word, named = simt.bind("word", self.first_word + self.warp_word)
        exists = None if self.problem.words % self.schedule.warps[1] == 0 else word < self.problem.words
        scope, body = {}, [named]
        many = sum(one.kind == "channel" for one in self.emitter.epilogue.inputs) > 1  # too many to stay in registers for all pixels
        for i in range(4):
            for half in range(2):
                statements, pixel = self._pixel(2 * i + half)
                places = [(16 * i + 4 * j + 2 * half + e, 8 * j + e) for j in range(4) for e in (0, 1)]
                values = [tail.Value(simt.at(self.sums, number), self.quad * 2, place) for number, place in places]
                body += [*statements, *self.emitter.emit(values, pixel, word, tail.Quad(self.lane), {} if many else scope, exists)]
        return body
