"""float32 dense layer with constant weights: the family of :class:`bnntvm.spec.FloatDense`.

Weights are packed in blocks of output features, ``[blocks, K, block]``. How many rows there are is known at run time only, so a kernel has
three bodies: register tiles of many rows, tiles of a few, and one row at a time.

One row is bound by the speed at which weights arrive; it reads a block front to back and splits the reduction over several accumulators. The
rows of a large tile are first copied to scratch memory, where they lie an odd number of cache lines apart: at their own distance, often a
power of two, they would evict each other from the few cache sets that they share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from tvm import tirx

from . import epilogue as epilogues
from . import tir
from .float_conv2d import most_pixels, multiply_add, tile_vectors


#: float32 values of a cache line.
_LINE = 16


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
        Blocks of features that a task computes for a large tile.
    """

    rows: int
    few: int
    vectors: int
    split: int
    group: int


def default_schedule(spec, isa):
    """A schedule that is fast without tuning."""
    vectors = tile_vectors(spec.out_features, spec.epilogue, isa)
    rows = min(14, most_pixels(vectors, isa))
    return Schedule(rows, min(4, rows), vectors, max(1, 8 // vectors), 8)


def space(spec, isa):
    """Valid schedules, the default one first."""
    first = default_schedule(spec, isa)
    found = [first]
    for rows in (12, 8, 6):
        rows = min(rows, first.rows)
        found.append(replace(first, rows=rows, few=min(first.few, rows)))
    found.append(replace(first, split=max(1, first.split // 2)))
    found.append(replace(first, group=32))
    return list(dict.fromkeys(found))


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
    count = -(-spec.out_features // size)
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
        self.spec, self.schedule, self.lanes = spec, schedule, isa.lanes
        self.size = schedule.vectors * isa.lanes
        self.blocks = -(-spec.out_features // self.size)
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

    def _tiles(self, count, groups, task):
        """``task(group, first row)`` for all tiles of ``count`` rows and all groups of features, in parallel.

        The last tile overlaps its neighbour. The tiles of a group follow each other, so that its weights stay near.
        """
        tiles = tirx.floordiv(self.rows + (count - 1), tir.i64(count))

        def body(number):
            first, bind_first = tir.bind("first", tirx.min(tirx.floormod(number, tiles) * count, self.rows - count))
            group, bind_group = tir.bind("group", tirx.floordiv(number, tiles))
            return [bind_first, bind_group, task(group, first)]

        return tir.parallel("task", tiles * groups, body)

    def _small_tiles(self, count):
        if count == 1:
            return self._tiles(1, self.blocks, self._single)
        return self._tiles(count, self.blocks, lambda block, first: self._tile(block, first, count, self.data, first))

    def _large_tiles(self, count):
        """Tiles whose rows are copied before they are used, once for ``group`` blocks of features."""
        depth, group = self.spec.in_features, min(self.schedule.group, self.blocks)
        stride = (-(-depth // _LINE) | 1) * _LINE
        scratch = tirx.decl_buffer((tir.i64(count), tir.i64(stride)), "float32", "rows")

        def task(number, first):
            start = number * group
            blocks = tirx.min(tir.i64(group), self.blocks - start) if self.blocks % group else group
            copy = tir.for_("copy", count, lambda p: self._copy(scratch, p, first + p))
            return [
                tirx.AllocBuffer(scratch),
                copy,
                tir.for_("block", blocks, lambda b: self._tile(start + b, first, count, scratch, tir.i64(0))),
            ]

        return self._tiles(count, -(-self.blocks // group), task)

    def _copy(self, scratch, target, source):
        lanes, depth = self.lanes, self.spec.in_features

        def move(k, width):
            return tir.store_vector(scratch, [target, k], tir.load_vector(self.data, [source, k], width))

        whole = depth // lanes
        body = [tir.for_("k", whole, lambda k: move(k * lanes, lanes))] if whole else []
        return body + [move(tir.i64(k), 1) for k in range(whole * lanes, depth)]

    def _clear(self, sums, count):
        zero = tir.splat(0.0, "float32", self.lanes)
        return [tir.store_vector(sums, [i * self.lanes], zero) for i in range(count)]

    def _weight(self, block, k, v):
        return tir.load_vector(self.weights, [block, k, v * self.lanes], self.lanes)

    def _tile(self, block, first, count, data, origin):
        """``count`` rows times ``vectors`` vectors of features; row ``first`` is row ``origin`` of ``data``."""
        vectors, lanes = self.schedule.vectors, self.lanes
        sums, allocate = tir.local("sum", count * vectors * lanes, "float32")

        def step(k):
            def value(p):
                return tir.load(data, origin + p, k)

            return multiply_add(sums, range(count), vectors, lanes, value, lambda v: self._weight(block, k, v))

        reduce = tir.for_("k", self.spec.in_features, step)
        scope, finish = {}, []
        for p in range(count):
            values = [tir.load_vector(sums, [(p * vectors + v) * lanes], lanes) for v in range(vectors)]
            finish.append(self.emitter.emit(values, (first + p,), block * self.size, scope))
        return [allocate, self._clear(sums, count * vectors), reduce, finish]

    def _single(self, block, row):
        """One row: ``split`` accumulators for each vector, consecutive steps of the reduction go to different ones."""
        vectors, lanes, split = self.schedule.vectors, self.lanes, self.schedule.split
        sums, allocate = tir.local("sum", split * vectors * lanes, "float32")

        def add(part, v, expression):
            index = [(part * vectors + v) * lanes]
            return tir.store_vector(sums, index, tir.load_vector(sums, index, lanes) + expression)

        def step(k, part):
            a, statement = tir.bind("x", tir.broadcast(tir.load(self.data, row, k), lanes))
            return [statement, [add(part, v, a * self._weight(block, k, v)) for v in range(vectors)]]

        whole, rest = divmod(self.spec.in_features, split)
        body = [tir.for_("k", whole, lambda k: [step(k * split + part, part) for part in range(split)])] if whole else []
        body += [step(tir.i64(whole * split + part), part) for part in range(rest)]
        body += [
            add(0, v, tir.load_vector(sums, [(part * vectors + v) * lanes], lanes)) for part in range(1, split) for v in range(vectors)
        ]
        values = [tir.load_vector(sums, [v * lanes], lanes) for v in range(vectors)]
        return [allocate, self._clear(sums, split * vectors), body, self.emitter.emit(values, (row,), block * self.size)]


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
