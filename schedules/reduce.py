"""Reductions that keep no window: global pooling over an image and softmax over a row.

The families of :class:`bnntvm.spec.GlobalPool` and :class:`bnntvm.spec.Softmax`. Both walk channels in blocks of several vectors, followed
by what is left of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce as fold

import numpy as np
from tvm import tirx

from bnntvm import spec as specs

from . import epilogue as epilogues
from . import tir, vector_math
from .pool2d import divide


@dataclass(frozen=True)
class Schedule:
    """What may be tuned.

    Attributes
    ----------
    vectors : int
        Vectors of channels that are reduced side by side; together they hold whole 32-bit words of channels.
    """

    vectors: int


def default_schedule(spec, isa):
    """A schedule that is fast without tuning."""
    return Schedule(8)


def space(spec, isa):
    """Valid schedules, the default one first."""
    return [Schedule(8)] if isa.lanes == 4 else [Schedule(8), Schedule(4)]


def build(spec, schedule, isa):
    """The kernel: data ``float32[N, H, W, C]`` or ``float32[M, classes]``, the epilogue's inputs and outputs. N or M is dynamic.

    Returns
    -------
    tirx.PrimFunc
    """
    return (_Softmax if isinstance(spec, specs.Softmax) else _GlobalPool)(spec, schedule, isa).function()


@dataclass(frozen=True)
class _Block:
    """Consecutive channels: the first one, the number of vectors, the mask of the last vector (or None), whether all of them exist."""

    first: object
    vectors: int
    mask: object
    whole: bool


class _Blocks:
    """Cuts ``channels`` into blocks of ``vectors`` vectors and a rest."""

    def __init__(self, channels, vectors, lanes):
        self.lanes, self.vectors = lanes, vectors
        self.whole, self.rest = divmod(channels, vectors * lanes)
        self.count = self.whole + (self.rest > 0)

    def block(self, number):
        return _Block(number * (self.vectors * self.lanes), self.vectors, None, True)

    def last(self):
        """The rest, or None."""
        if not self.rest:
            return None
        mask = tir.prefix_mask(self.rest % self.lanes, self.lanes) if self.rest % self.lanes else None
        return _Block(tir.i64(self.whole * self.vectors * self.lanes), -(-self.rest // self.lanes), mask, False)

    def each(self, body):
        """``body(block)`` for all blocks, one after the other."""
        statements = [tir.for_("block", self.whole, lambda b: body(self.block(b)))] if self.whole else []
        return statements + ([body(self.last())] if self.rest else [])

    def one(self, number, body):
        """``body(block)`` for the block ``number``, an expression."""
        if not self.rest:
            return body(self.block(number))
        return tir.when(number < self.whole, body(self.block(number)), body(self.last())) if self.whole else body(self.last())


def _load(array, where, block, v, lanes, outside=0.0):
    """Vector ``v`` of a block of channels; lanes that do not exist hold ``outside``."""
    where = [*where, block.first + v * lanes]
    if block.mask is None or v < block.vectors - 1:
        return tir.load_vector(array, where, lanes)
    value = tir.load_masked(array, where, block.mask)
    return value if outside == 0.0 else tirx.Select(block.mask, value, tir.splat(outside, "float32", lanes))


class _GlobalPool:
    """One task for each image and block of channels."""

    def __init__(self, spec, schedule, isa):
        self.spec, self.lanes = spec, isa.lanes
        self.blocks = _Blocks(spec.channels, schedule.vectors, isa.lanes)
        self.batch = tirx.Var("n", "int64")
        self.data = tir.buffer("x", (self.batch, *spec.spatial, spec.channels), "float32")
        self.emitter = epilogues.Emitter(spec.epilogue, spec.channels, isa, (self.batch, 1, 1), "float32")

    def function(self):
        count = self.blocks.count

        def task(number):
            image = tirx.floordiv(number, count)
            return self.blocks.one(tirx.floormod(number, count), lambda block: self._block(image, block))

        size = 4 * self.spec.channels * self.spec.spatial[0] * self.spec.spatial[1]
        body = tir.parallel_if_large("task", count, self.batch, size, task)
        return tir.function("global_pool", [self.data, *self.emitter.inputs, *self.emitter.outputs], body)

    def _combine(self, a, b):
        return tirx.Max(a, b) if self.spec.op == "max" else a + b

    def _block(self, image, block):
        pixels, lanes, vectors = self.spec.spatial[0] * self.spec.spatial[1], self.lanes, block.vectors
        split = min(max(1, 8 // vectors), pixels)  # few vectors: several pixels at once, or each addition would wait for the last one
        sums = tir.Registers("sum", split * vectors, "float32", lanes)
        start = tir.splat(float("-inf") if self.spec.op == "max" else 0.0, "float32", lanes)

        def total(part, v):
            return sums.get(part * vectors + v)

        def add(part, v, value):
            return sums.set(part * vectors + v, self._combine(total(part, v), value))

        def step(pixel, part):
            return [add(part, v, _load(self.data, (image, 0, pixel), block, v, lanes)) for v in range(vectors)]

        steps, rest = divmod(pixels, split)
        body = [tir.for_("pixel", steps, lambda i: [step(i * split + part, part) for part in range(split)])]
        body += [step(tir.i64(steps * split + part), part) for part in range(rest)]
        body += [add(0, v, total(part, v)) for part in range(1, split) for v in range(vectors)]
        values = [total(0, v) for v in range(vectors)]
        if self.spec.op == "avg":
            values = [divide(value, pixels, lanes) for value in values]
        position = (image, tir.i64(0), tir.i64(0))
        return [sums.allocate, sums.fill(start), body, self.emitter.emit(values, position, block.first, whole=block.whole or None)]


class _Softmax:
    """One parallel task for each row: the maximum; exp(x - maximum), kept in scratch memory, and the sum; the products with 1 / sum."""

    def __init__(self, spec, schedule, isa):
        self.spec, self.lanes = spec, isa.lanes
        self.blocks = _Blocks(spec.classes, schedule.vectors, isa.lanes)
        self.narrow = _Blocks(spec.classes, min(schedule.vectors, isa.registers // 8), isa.lanes)  # exp wants registers for itself
        self.rows = tirx.Var("m", "int64")
        self.data = tir.buffer("x", (self.rows, spec.classes), "float32")
        padded = -(-spec.classes // isa.lanes) * isa.lanes
        self.scratch = tirx.decl_buffer((tir.i64(padded),), "float32", "exponentials")
        self.emitter = epilogues.Emitter(spec.epilogue, spec.classes, isa, (self.rows,), "float32")

    def function(self):
        body = tir.parallel("row", self.rows, self._row)
        return tir.function("softmax", [self.data, *self.emitter.inputs, *self.emitter.outputs], body)

    def _row(self, row):
        lanes = self.lanes

        def value(block, v):
            return _load(self.data, (row,), block, v, lanes, outside=float("-inf"))

        def copy(block, v, bind):
            return [], bind("v", value(block, v))

        def exponential(block, v, bind):
            result = bind("e", vector_math.exp(value(block, v) - highest, bind))
            return tir.store_vector(self.scratch, [block.first + v * lanes], result), result

        reduce_max, highest = self._reduce(self.blocks, copy, tirx.Max, float("-inf"))
        highest, bind_highest = tir.bind("highest", tir.broadcast(highest, lanes))
        reduce_sum, total = self._reduce(self.narrow, exponential, tirx.Add, 0.0)
        scale, bind_scale = tir.bind("scale", tir.broadcast(tirx.Div(tir.constant(1.0, "float32"), total), lanes))

        def finish(block):
            values = [tir.load_vector(self.scratch, [block.first + v * lanes], lanes) * scale for v in range(block.vectors)]
            return self.emitter.emit(values, (row,), block.first, whole=block.whole or None)

        allocate = tirx.AllocBuffer(self.scratch)
        return [allocate, reduce_max, bind_highest, reduce_sum, bind_scale, self.blocks.each(finish)]

    def _reduce(self, blocks, value, combine, identity):
        """``(statements, scalar)``: all channels combined; ``value(block, v, bind)`` is ``(statements that follow, vector)``."""
        lanes = self.lanes
        total, allocate = tir.local("total", lanes, "float32")

        def one(block):
            body, bind = _binder()
            values = []
            for v in range(block.vectors):
                statements, vector = value(block, v, bind)
                body.append(statements)
                values.append(vector)
            return [body, tir.store_vector(total, [0], combine(tir.load_vector(total, [0], lanes), _tree(combine, values)))]

        clear = tir.store_vector(total, [0], tir.splat(identity, "float32", lanes))
        return [allocate, clear, blocks.each(one)], _tree(combine, [tir.load(total, i) for i in range(lanes)])


def _binder():
    """``(statements, bind)``: bind(name, value) names a value and appends the statement."""
    body = []

    def bind(name, value):
        variable, statement = tir.bind(name, value)
        body.append(statement)
        return variable

    return body, bind


def _tree(combine, values):
    """All values combined in pairs, pairs of pairs, and so on."""
    while len(values) > 1:
        values = [fold(combine, values[i : i + 2]) for i in range(0, len(values), 2)]
    return values[0]


def reference(spec, operands, epilogue_inputs):
    """Global pooling or softmax in numpy.

    Parameters
    ----------
    operands : list
        data float32 ``[N, H, W, C]``, or ``[M, classes]`` for softmax.
    epilogue_inputs : list of ndarray

    Returns
    -------
    list of ndarray
        One for each output of the epilogue.
    """
    data = operands[0].astype(np.float64)
    if isinstance(spec, specs.Softmax):
        exponentials = np.exp(data - data.max(axis=-1, keepdims=True))
        result = exponentials / exponentials.sum(axis=-1, keepdims=True)
    else:
        result = {"avg": np.mean, "max": np.max}[spec.op](data, axis=(1, 2), keepdims=True)
    return epilogues.reference(spec.epilogue, result.astype(np.float32), epilogue_inputs)
