"""float32 dense layer with constant weights: the family of :class:`bnntvm.spec.FloatDense`.

Weights are packed in blocks of output features, ``[blocks, K, block]``. How many rows there are is known at run time only, so a kernel has
three bodies: register tiles of many rows, tiles of a few, and one row at a time.

One row is bound by the speed at which weights arrive; it reads a block front to back and splits the reduction over several accumulators.
The rows of large tiles are copied to scratch memory, some columns at a time, where they lie an odd number of cache lines apart: at
their own distance, often a power of two, they would evict each other from the few cache sets that they share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from tvm import tirx

from . import epilogue as epilogues
from . import float_neon, tir, windows
from .float_conv2d import most_pixels, multiply_add, tile_vectors, vector_counts

#: float32 values of a cache line.
_LINE = 16


#: Fields of a schedule that cut the work into parallel tasks.
GRAIN = ("group", "tiles")


@dataclass(frozen=True)
class Schedule:
    """What may be tuned.

    Attributes
    ----------
    rows : int
        Rows of a large register tile.
    few : int
        Rows of a small one.
    vectors : int
        Vectors of output features in a tile; a whole 32-bit word of features if the epilogue packs bits.
    split : int
        Accumulators per vector for a single row.
    group : int
        Blocks of features that a task computes.
    tiles : int
        Large tiles that a task computes.
    chunk : int
        Steps of the reduction that a large tile takes at a time: a block's weights for them stay in the level-1 cache.
    ahead : int
        Ask for the weights of a single row that are so many bytes ahead; 0 leaves that to the processor, which stops at the end of a page.
    """

    rows: int
    few: int
    vectors: int
    split: int
    group: int
    tiles: int
    chunk: int
    ahead: int = 0


def default_schedule(spec, isa):
    """A schedule that is fast without tuning."""
    vectors = tile_vectors(spec.out_features, spec.epilogue, isa)
    rows = min(14, most_pixels(vectors, isa))
    if float_neon.by_element(isa):
        rows, vectors = float_neon.tile(spec.out_features, spec.epilogue)
        return Schedule(rows, min(4, rows), vectors, min(4, max(1, 16 // vectors)), 8, 16, 128)
    return Schedule(rows, min(4, rows), vectors, max(1, 8 // vectors), 8, 16, 128)


def space(spec, isa):
    """Valid schedules, the default one first."""
    first = default_schedule(spec, isa)
    found = [first]
    for rows in (12, 8, 6):
        rows = min(rows, first.rows)
        found.append(replace(first, rows=rows, few=min(first.few, rows)))
    found.append(replace(first, split=max(1, first.split // 2)))
    found.append(replace(first, group=32, tiles=4))
    found.append(replace(first, chunk=256))
    free = first.vectors > 1 and not windows.has_bits(spec.epilogue)
    for vectors in vector_counts(spec.out_features, isa) if free else [first.vectors]:
        one = replace(first, vectors=vectors)
        rows = range(1, min(16, most_pixels(vectors, isa)) + 1)
        found += [replace(one, rows=r, few=min(r, few), tiles=t) for r in rows for few in (2, 4, 6) for t in (4, 8, 16)]
        found += [replace(one, split=split, group=group) for split in (1, 2, 4, 8) for group in (1, 2, 4, 8)]
        found += [replace(one, split=split, ahead=ahead) for split in (1, 2, 4, 8) for ahead in (0, 1024, 2048, 4096, 8192)]
        found += [
            replace(one, chunk=chunk, tiles=tiles, group=group) for chunk in (64, 256, 512) for tiles in (4, 16, 32) for group in (2, 8)
        ]
    return [s for s in dict.fromkeys(found) if s.rows * s.vectors < isa.registers and s.few <= s.rows]


def pack_weights(spec, schedule, isa, weights):
    """Weights in the order in which the kernel reads them.

    Parameters
    ----------
    weights : ndarray
        float32 ``[N, K]``.

    Returns
    -------
    ndarray
        float32 ``[blocks, K, block]``, output features padded with zeros to whole blocks.
    """
    size = schedule.vectors * isa.lanes
    count = _ceildiv(spec.out_features, size)
    padded = np.zeros((count * size, spec.in_features), np.float32)
    padded[: spec.out_features] = weights
    return np.ascontiguousarray(padded.reshape(count, size, spec.in_features).transpose(0, 2, 1))


def build(spec, schedule, isa):
    """The kernel: data ``float32[M, K]``, packed weights, the epilogue's inputs and outputs. M is dynamic.

    Returns
    -------
    tirx.PrimFunc
    """
    return _Kernel(spec, schedule, isa).function()


class _Kernel:
    """Writes one dense layer."""

    def __init__(self, spec, schedule, isa):
        self.spec, self.schedule, self.isa, self.lanes = spec, schedule, isa, isa.lanes
        self.size = schedule.vectors * isa.lanes
        self.blocks = _ceildiv(spec.out_features, self.size)
        self.rows = tirx.Var("m", "int64")
        self.data = tir.buffer("x", (self.rows, spec.in_features), "float32")
        self.weights = tir.buffer("w", (self.blocks, spec.in_features, self.size), "float32")
        self.emitter = epilogues.Emitter(spec.epilogue, spec.out_features, isa, (self.rows,), "float32")

    def function(self):
        few, many = self.schedule.few, self.schedule.rows
        body = self._small_tiles(1)
        if few > 1:
            body = tir.when(self.rows < few, body, self._small_tiles(few))
        if many > few:
            body = tir.when(self.rows < many, body, self._large_tiles(many))
        params = [self.data, self.weights, *self.emitter.inputs, *self.emitter.outputs]
        return tir.function("float_dense", params, body)

    def _parallel(self, outer, inner, task):
        """``task(i, j)`` for all i < outer, j < inner; those of one i follow each other."""

        def body(number):
            i, bind_i = tir.bind("i", tirx.floordiv(number, inner))
            j, bind_j = tir.bind("j", tirx.floormod(number, inner))
            return [bind_i, bind_j, task(i, j)]

        return tir.parallel("task", outer * inner, body)

    def _first_row(self, tile, count):
        """First row of a tile of ``count`` rows; the last tile overlaps its neighbour."""
        return tir.bind("first", tirx.min(tile * count, self.rows - count))

    def _small_tiles(self, count):
        def task(block, tile):
            first, bind_first = self._first_row(tile, count)
            return [bind_first, self._single(block, first) if count == 1 else self._few(block, first, count)]

        return self._parallel(tir.i64(self.blocks), _ceildiv(self.rows, count), task)

    def _few(self, block, first, count):
        sums = self._sums(count)
        reduce = self._reduce(sums, count, block, self.data, first, 0, self.spec.in_features)
        return [sums.allocate, sums.fill(self._zero), reduce, self._emit(sums, block, first, count)]

    def _large_tiles(self, count):
        """Tasks of ``tiles`` tiles times ``group`` blocks.

        The reduction goes in chunks: their part of the rows is copied, then each block's part of the weights stays in the level-1 cache
        while all tiles use it.
        """
        group, tiles = min(self.schedule.group, self.blocks), _ceildiv(self.rows, count)
        pieces = _Pieces(self.spec.in_features, self.schedule.chunk)
        size = count * self.schedule.vectors
        rows = tirx.decl_buffer((tir.i64(self.schedule.tiles * count), tir.i64(pieces.stride)), "float32", "rows")
        partial = tirx.decl_buffer((tir.i64(group), tir.i64(self.schedule.tiles), tir.i64(size * self.lanes)), "float32", "partial")

        def task(number, part):
            start, first_tile = number * group, part * self.schedule.tiles
            blocks = tirx.min(tir.i64(group), self.blocks - start) if self.blocks % group else group
            here, bind_here = tir.bind("tiles", tirx.min(tir.i64(self.schedule.tiles), tiles - first_tile))

            def each_tile(body):
                def tile(t):
                    first, bind_first = self._first_row(first_tile + t, count)
                    return [bind_first, body(t, first)]

                return tir.for_("tile", here, tile)

            def add_chunk(base, length, finish):
                def one(b, t, first):
                    sums = self._sums(count)
                    kept = [(i, [b, t, i * self.lanes]) for i in range(size)]
                    begin = [sums.set(i, tir.load_vector(partial, at, self.lanes)) for i, at in kept]
                    reduce = self._reduce(sums, count, start + b, rows, t * count, base, length)
                    end = [tir.store_vector(partial, at, sums.get(i)) for i, at in kept]
                    begin = begin if pieces.count > 1 else sums.fill(self._zero)
                    return [sums.allocate, begin, reduce, self._emit(sums, start + b, first, count) if finish else end]

                copy = each_tile(lambda t, first: self._copy_rows(rows, t * count, first, count, base, length))
                return [copy, tir.for_("block", blocks, lambda b: each_tile(lambda t, first: one(b, t, first)))]

            body = [bind_here, tirx.AllocBuffer(rows)]
            if pieces.count > 1:
                clear = tir.for_("block", blocks, lambda b: tir.for_("tile", here, lambda t: self._clear(partial, [b, t], size)))
                body += [tirx.AllocBuffer(partial), clear]
                body.append(tir.for_("chunk", pieces.count - 1, lambda c: add_chunk(c * pieces.size, pieces.size, False)))
            return [*body, add_chunk(tir.i64(pieces.last), self.spec.in_features - pieces.last, True)]

        return self._parallel(tir.i64(_ceildiv(self.blocks, group)), _ceildiv(tiles, self.schedule.tiles), task)

    def _copy_rows(self, rows, target, first, count, base, length):
        """Copy ``length`` columns from ``base`` on of rows ``first ...`` of the data to rows ``target ...``."""
        lanes, whole = self.lanes, length // self.lanes

        def row(p):
            def move(k, width):
                return tir.store_vector(rows, [target + p, k], tir.load_vector(self.data, [first + p, base + k], width))

            vectors = [tir.for_("k", whole, lambda k: move(k * lanes, lanes))] if whole else []
            return vectors + [move(tir.i64(k), 1) for k in range(whole * lanes, length)]

        return tir.for_("copy", count, row)

    def _sums(self, count):
        return tir.Registers("sum", count * self.schedule.vectors, "float32", self.lanes)

    @property
    def _zero(self):
        return tir.splat(0.0, "float32", self.lanes)

    def _clear(self, array, where, count):
        return [tir.store_vector(array, [*where, i * self.lanes], self._zero) for i in range(count)]

    def _weight(self, block, k, v):
        return tir.load_vector(self.weights, [block, k, v * self.lanes], self.lanes)

    def _reduce(self, sums, count, block, data, origin, base, length):
        """Add to a tile what ``length`` features from ``base`` on contribute. Rows ``origin ...`` of ``data`` begin with those features."""

        def step(k):
            def weight(v):
                return self._weight(block, base + k, v)

            return multiply_add(sums, range(count), self.schedule.vectors, lambda p: tir.load(data, origin + p, k), weight)

        if float_neon.by_element(self.isa):
            rows, vectors = range(count), self.schedule.vectors
            return float_neon.reduction(
                sums, rows, vectors, lambda p, k: (data, [origin + p, k]), lambda k, v: self._weight(block, base + k, v), length, step
            )
        return tir.for_("k", length, step)

    def _emit(self, sums, block, first, count):
        vectors, scope, body = self.schedule.vectors, {}, []
        for p in range(count):
            values = [sums.get(p * vectors + v) for v in range(vectors)]
            body.append(self.emitter.emit(values, (first + p,), block * self.size, scope))
        return body

    def _single(self, block, row):
        """One row: ``split`` accumulators for each vector, consecutive steps of the reduction go to different ones."""
        vectors, lanes, split = self.schedule.vectors, self.lanes, self.schedule.split
        sums = self._sums(split)

        def add(part, v, expression):
            return sums.set(part * vectors + v, sums.get(part * vectors + v) + expression)

        def step(k, part):
            a, statement = tir.bind("x", tir.broadcast(tir.load(self.data, row, k), lanes))
            return [statement, self._fetch(block, k), [add(part, v, a * self._weight(block, k, v)) for v in range(vectors)]]

        def four(k):
            """Steps whose data are the lanes of a register."""
            x, bind = tir.bind("x", tir.load_vector(self.data, [row, k * float_neon.STEPS], float_neon.STEPS))
            body = [bind]
            for lane in range(float_neon.STEPS):
                a, at = tir.shuffle([x], [lane] * float_neon.STEPS), k * float_neon.STEPS + lane
                body.append([add(lane % split, v, a * self._weight(block, at, v)) for v in range(vectors)])
            return body

        by_element = float_neon.by_element(self.isa) and float_neon.STEPS % split == 0
        unrolled = float_neon.STEPS if by_element else split
        whole, rest = divmod(self.spec.in_features, unrolled)
        many = four if by_element else lambda k: [step(k * split + part, part) for part in range(split)]
        body = [tir.for_("k", whole, many)] if whole else []
        body += [step(tir.i64(whole * unrolled + part), part % split) for part in range(rest)]
        body += [add(0, v, sums.get(part * vectors + v)) for part in range(1, split) for v in range(vectors)]
        values = [sums.get(v) for v in range(vectors)]
        return [sums.allocate, sums.fill(self._zero), body, self.emitter.emit(values, (row,), block * self.size)]


    def _fetch(self, block, k):
        """Statements that ask for the lines of a later step's weights."""
        later = k + self.schedule.ahead // (4 * self.size)
        lines = range(0, self.size, _LINE) if self.schedule.ahead else ()
        return [tir.prefetch(self.weights, [block, later, at]) for at in lines]


class _Pieces:
    """A reduction of ``depth`` steps in ``count`` chunks of ``size`` steps (whole cache lines), the last of which begins at ``last``.

    Copied rows lie ``stride`` floats apart.
    """

    def __init__(self, depth, most):
        self.size = _ceildiv(depth, _ceildiv(depth, most) * _LINE) * _LINE
        self.count = _ceildiv(depth, self.size)
        self.last = (self.count - 1) * self.size
        self.stride = (self.size // _LINE | 1) * _LINE


def _ceildiv(a, b):
    return -(-a // b) if isinstance(a, int) else tirx.floordiv(a + (b - 1), tir.i64(b))


def reference(spec, operands, epilogue_inputs):
    """The layer in numpy.

    Parameters
    ----------
    operands : list
        data float32 ``[M, K]``, weights float32 ``[N, K]``.
    epilogue_inputs : list of ndarray

    Returns
    -------
    list of ndarray
        One for each output of the epilogue.
    """
    data, weights = (np.asarray(a, np.float64) for a in operands)
    return epilogues.reference(spec.epilogue, (data @ weights.T).astype(np.float32), epilogue_inputs)
