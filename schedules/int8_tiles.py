"""Products of 8-bit integers in tile registers (AMX), see :mod:`.int8_engines`.

A group of up to six tiles of pixels is multiplied with one tile of weights after the other, for 16 output channels and then for the next
16. The steps of a block go through all taps of 64 channels before they come to the next 64: these channels of the pixels around a tile
stay in the first-level cache, and come once from the second. The weights' bits become bytes some steps ahead, so that a tile is not
loaded from stores that are still under way.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from tvm import tirx

from bnntvm.schedules import tir as T
from bnntvm.schedules.int8_tiling import MOST_TILES, TILE, Tiling

TILE_BYTES = 64  #: bytes of a row
HALVES = 2  #: tiles of weights side by side in a block
_DATA, _WEIGHTS = MOST_TILES, MOST_TILES + 1  #: registers, after those of sums
#: Groups from which on a block's bytes are kept for the next: until then unpacking once more costs less than the cache they take.
_REUSES = 6
#: Steps from unpacking weights to their use, and the most of which bytes are kept in turn. Their stores wait for those of results.
_AHEAD, _MOST_SLOTS = 3, 6


class Tiles:
    """Register tiles: six of sums, one of data, one of weights (the processor renames them).

    Weights: ``[halves of a block, steps, 16 quads, 16 outputs x 4 channels]``; step ``k * runs + run`` is part k of a run.
    """

    def __init__(self, kernel, data_type):
        self.kernel, self.layout, self.data_type = kernel, kernel.layout, data_type
        self.offset = 0
        self.tiling = Tiling.of(self.layout)
        self.groups, self.most, self.large_groups = self.tiling.groups(kernel.schedule.cover // TILE)
        self.runs = len(self.layout.runs)
        self.full, self.rest = divmod(self.layout.quads, TILE)
        self.total = self.runs * self.layout.steps
        self.weight_bytes = HALVES * self.total * TILE * TILE_BYTES

    @property
    def bits(self):
        """Whether weights are stored as bits."""
        return self.kernel.spec.weights != "int8"

    # Weights --------------------------------------------------------------------------------------------------------------------------

    def order(self, quads):
        """Vectors ``[blocks, runs, quads, 2, 64]`` in the order of the kernel, ``[blocks, vectors, 64]``."""
        blocks, runs = quads.shape[:2]
        full = self.full * TILE
        parts = [quads[:, :, :full].reshape(blocks, runs, -1, TILE, HALVES, TILE_BYTES).transpose(0, 4, 2, 1, 3, 5),
                 quads[:, :, full:].transpose(0, 3, 1, 2, 4)]  # fmt: skip
        parts = [p.reshape(blocks, HALVES, -1, TILE_BYTES) for p in parts]
        return np.concatenate(parts, 2).reshape(blocks, -1, TILE_BYTES)

    def pad(self, quads):
        """The same with the zeros of the last step of every run."""
        missing = self.layout.steps * TILE - quads.shape[2]
        quads = np.pad(quads, ((0, 0), (0, 0), (0, missing), (0, 0), (0, 0)))
        blocks, runs = quads.shape[:2]
        ordered = quads.reshape(blocks, runs, -1, TILE, HALVES, TILE_BYTES).transpose(0, 4, 2, 1, 3, 5)
        return ordered.reshape(blocks, -1, TILE_BYTES)

    @property
    def source_bytes(self):
        """Bytes of a vector of weights as stored."""
        return self.kernel.mask_bytes * len(self.kernel.spec.weights.coefficients)

    def _bits_at(self, step):
        """Byte of a block where the bits of a step begin, counted through both halves."""
        whole = TILE * self.source_bytes
        if not self.rest:
            return step * whole
        second = tirx.Select(step >= T.i64(self.total), T.i64(1), T.i64(0))
        short = (TILE - self.rest) * self.source_bytes  # a last step of a run is shorter by
        skipped = self.total - self.runs * self.full
        within = step - second * self.total
        before = tirx.max(T.i64(0), within - self.runs * self.full)
        return step * whole - (second * skipped + before) * short

    @cached_property
    def reused(self):
        """Whether the bytes of a whole block are kept because many groups use them."""
        return min(self.groups, self.kernel.schedule.task_tiles) >= _REUSES

    @cached_property
    def slots(self):
        """Steps of which bytes are kept; a divisor of the number of steps, so that the next job goes on where this one ends."""
        steps = HALVES * self.total
        return steps if self.reused else next((n for n in range(_AHEAD + 1, _MOST_SLOTS + 1) if steps % n == 0), 2)

    @property
    def ahead(self):
        """Steps from unpacking to use."""
        return min(_AHEAD, self.slots - 1)

    def prepare(self, block):
        """Statements that unpack the first weights of a task, whose first block is ``block``."""
        return [self.unpack(T.i64(i), block, block) for i in range(self.ahead)] if self.bits else []

    def unpack(self, step, block, following):
        """Statements that write the weights of a step as bytes; steps from ``2 * total`` on are the first ones of block ``following``."""
        steps, row = HALVES * self.total, self.kernel.weight_shape()[1]
        later = step >= T.i64(steps)
        own, bind_own = T.bind("own", tirx.Select(later, step - steps, step))
        at, bind = T.bind("bits", tirx.Select(later, following, block) * row + self._bits_at(own))
        to, bind_to = T.bind("to", (own if self.reused else step % self.slots) * (TILE * TILE_BYTES))

        def vectors(quads):
            zero, size = T.splat(0, "int8", TILE_BYTES), self.source_bytes
            made = [self.kernel.unpacked(0, at + i * size) for i in range(quads)] + [zero] * (TILE - quads)
            return [T.store_vector(self.bytes, [to + i * TILE_BYTES], one) for i, one in enumerate(made)]

        body = [bind_own, bind, bind_to]
        if not self.full or not self.rest:
            return [*body, vectors(self.rest or TILE)]
        within = tirx.Select(own >= T.i64(self.total), own - self.total, own)
        return [*body, T.when(within >= T.i64(self.runs * self.full), vectors(self.rest), vectors(TILE))]

    # Products -------------------------------------------------------------------------------------------------------------------------

    def start(self):
        """Statements at the start of a task: shapes of the registers, and for every step the distance of its data from a flat pixel."""
        self.data_at, data_at = T.memory("data_at", self.total, "int64")

        def note(run, offset):
            return T.for_("k", T.runtime(self.layout.steps), lambda k: T.store(self.data_at, offset + k * TILE_BYTES, k * self.runs + run))

        fill = [note(run, offset) for run, offset in enumerate(self.layout.offsets)]
        room = []
        if self.bits:
            self.bytes, room = T.memory("bytes", self.slots * TILE * TILE_BYTES, "int8")
        return [room, data_at, fill, configure(self.tiling.rows)]

    def finish(self):
        """Statements at the end of a task: the system saves less of a thread that holds no tiles."""
        return tile("release")

    def products(self, starts, block, following, results, beside):
        """Tiles times a block of output channels. The sums of its second half stay in registers: see :meth:`keep`.

        Parameters
        ----------
        starts : list of expressions
            Flat pixels where the tiles begin.
        block, following : (expression, expression)
            The number of the block, and whether its weights are still bits; the same for the next job.
        results : callable
            Half to the element of ``kernel.results`` from which on the sums of the half before it are stored, ``[pixels, 16]``.
        beside : callable
            ``beside(half, step)`` gives statements that vector units execute beside a step.
        """
        bound = [T.bind("at", start * self.layout.pixel) for start in starts]
        tiles = [value for value, _ in bound]

        def half(n):
            to, bind = T.bind("sums", results(n))
            return [bind, T.for_("step", T.runtime(self.total), lambda s: self._step(n, s, block, following, tiles, to, beside))]

        return [[b[1] for b in bound], T.for_("n", T.runtime(HALVES), half)]

    def keep(self, m, results):
        """Statement that stores the sums of tile ``m`` of half a block."""
        return tile("store", m, self.kernel.results, [results + m * self.tiling.rows * TILE], 4 * TILE)

    def _step(self, n, step, block, following, tiles, results, beside):
        """One tile of weights times every tile of data.

        The first step stores the sums of the half before, one tile after the other: their last products, the stores and the first products
        of the next sums overlap.
        """
        distance, bind = T.bind("distance", T.load(self.data_at, step))
        number, bind_number = T.bind("number", n * self.total + step)
        body = [bind, bind_number]
        if self.bits:
            coming = number + self.ahead
            unpack = self.unpack(coming, block[0], following[0])
            if self.reused:
                unpack = T.when(tirx.Select(coming >= T.i64(HALVES * self.total), following[1], block[1]), unpack)
            slot = number if self.reused else number % self.slots
            body += [unpack, tile("load", _WEIGHTS, self.bytes, [slot * (TILE * TILE_BYTES)], TILE_BYTES)]
        else:
            body.append(tile("load", _WEIGHTS, self.kernel.weights, [block[0], number * (TILE * TILE_BYTES)], TILE_BYTES))
        products = [self._product(m, at + distance) for m, at in enumerate(tiles)]
        first = [[self.keep(m, results), tile("zero", m), product] for m, product in enumerate(products)]
        first += [self.keep(m, results) for m in range(len(tiles), self.most)]
        return [*body, T.when(step == 0, first, products), beside(n, step)]

    def _product(self, m, at):
        """Tile ``m`` of data, which begins at byte ``at``, times the tile of weights."""
        kind = "dot_usd" if self.data_type == "uint8" else "dot_ssd"
        return [tile("load", _DATA, self.kernel.scratch, [at], self.layout.pixel), tile(kind, m, _DATA, _WEIGHTS)]


_TILE_TEXTS = {
    "zero": "call void @llvm.x86.tilezero(i8 {0})",
    "load": "call void @llvm.x86.tileloadd64(i8 {0}, ptr %p, i64 %stride)",
    "store": "call void @llvm.x86.tilestored64(i8 {0}, ptr %p, i64 %stride)",
    "dot_ssd": "call void @llvm.x86.tdpbssd(i8 {0}, i8 {1}, i8 {2})",
    "dot_usd": "call void @llvm.x86.tdpbusd(i8 {0}, i8 {1}, i8 {2})",
    "dot_sud": "call void @llvm.x86.tdpbsud(i8 {0}, i8 {1}, i8 {2})",
    "release": "call void @llvm.x86.tilerelease()",
}


def tile(action, *args):
    """A statement on tile registers.

    ``("zero", t)``, ``("load" or "store", t, array, indices, bytes from row to row)``, ``("dot_ssd", sums, data, weights)`` of signed and
    signed bytes, with ``u`` of unsigned ones, ``("release",)``.
    """
    text = _TILE_TEXTS[action]
    memory_ = action in ("load", "store")
    numbers, rest = (args[:1], args[1:]) if memory_ else (args, ())
    name = "_".join(["bnn_tile", action, *map(str, numbers)])
    params, values = "", []
    if memory_:
        array, indices, stride = rest
        # Not a base and an offset: TVM may narrow an index to 32 bits, and the types would no longer match.
        values = [tirx.address_of(T.load(array, *indices)), T.i64(stride)]
        params = "ptr %p, i64 %stride"
    declare = {"zero": "tilezero(i8 immarg)", "load": "tileloadd64(i8 immarg, ptr, i64)", "store": "tilestored64(i8 immarg, ptr, i64)",
               "dot_ssd": "tdpbssd(i8 immarg, i8 immarg, i8 immarg)", "dot_usd": "tdpbusd(i8 immarg, i8 immarg, i8 immarg)",
               "dot_sud": "tdpbsud(i8 immarg, i8 immarg, i8 immarg)", "release": "tilerelease()"}[action]  # fmt: skip
    body = f"i32 @{name}({params}) alwaysinline nounwind {{\n  {text.format(*numbers)}\n  ret i32 0\n}}\ndeclare void @llvm.x86.{declare}"
    return tirx.Evaluate(T.extern(name, body, "int32", *values))


def configure(rows):
    """A statement that gives all registers rows of 64 bytes, those of weights 16 of them and the others ``rows``."""
    name = f"bnn_tile_config_{rows}"
    heights = [rows] * _WEIGHTS + [TILE]
    shapes = [1] + [0] * 15 + [TILE_BYTES, 0] * 8 + [0] * 16 + heights + [0] * 8
    text = f"i32 @{name}() alwaysinline nounwind {{\n  call void @llvm.x86.ldtilecfg(ptr @bnn_tile_shapes_{rows})\n  ret i32 0\n}}\n"
    text += "declare void @llvm.x86.ldtilecfg(ptr)\n"
    text += f"@bnn_tile_shapes_{rows} = weak_odr hidden constant [64 x i8] [{', '.join(f'i8 {b}' for b in shapes)}], align 64"
    return tirx.Evaluate(T.extern(name, text, "int32"))
