"""Exchange of two axes (:class:`bnntvm.spec.Transpose`) in square blocks that are transposed in registers, see :func:`square`."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from tvm import tirx

from bnntvm.schedules import tir

#: Fields of a schedule that cut the work into parallel tasks.
GRAIN = ("bands",)


@dataclass(frozen=True)
class Schedule:
    """``bands``: bands of L rows that a thread takes at a time; of the result's rows, or of the operand's if ``along_operand``."""

    bands: int
    along_operand: bool = False


def default_schedule(spec, isa):
    """One band at a time; long rows of the result are better written a line of each at once than one after the other."""
    return Schedule(1, spec.rows > spec.columns)


def space(spec, isa):
    """Band counts."""
    return [Schedule(bands, along) for bands in (1, 2, 4) for along in (False, True)]


def reference(spec, operands, epilogue_inputs=()):
    """The transposed array; ``operands`` is ``[data]``."""
    data = operands[0].reshape(len(operands[0]), spec.rows, spec.columns)
    return [np.ascontiguousarray(data.transpose(0, 2, 1)).reshape(len(data), *spec.shapes[1])]


def build(spec, schedule, isa):
    """The kernel: data float32 ``[N, *shapes[0]]``, output ``[N, *shapes[1]]``; N is dynamic."""
    return _Kernel(spec, schedule, isa).function()


class _Kernel:
    def __init__(self, spec, schedule, isa):
        self.spec, self.schedule, self.lanes = spec, schedule, isa.lanes
        assert prod(spec.shapes[0]) == prod(spec.shapes[1]) == spec.rows * spec.columns
        self.batch = tirx.Var("n", "int64")
        self.data = tir.buffer("x", (self.batch, *spec.shapes[0]), "float32")
        self.out = tir.buffer("y", (self.batch, *spec.shapes[1]), "float32")

    def function(self):
        rows, columns, lanes = self.spec.rows, self.spec.columns, self.lanes
        if rows < lanes or columns < lanes:

            def image(n):
                return tir.for_("c", columns, lambda c: tir.for_("r", rows, lambda r: self._one(n, r, c)))

            body = tir.parallel("n", self.batch, image)
            return tir.function("transpose", [self.data, self.out], body)
        bands = -(-(rows if self.schedule.along_operand else columns) // lanes)
        tasks = -(-bands // self.schedule.bands)

        def task(number):
            n, part = tirx.floordiv(number, tir.i64(tasks)), tirx.floormod(number, tir.i64(tasks))
            first = part * self.schedule.bands
            return tir.for_("band", tirx.min(tir.i64(self.schedule.bands), bands - first), lambda b: self._band(n, (first + b) * lanes))

        return tir.function("transpose", [self.data, self.out], tir.parallel("task", self.batch * tasks, task))

    def _one(self, n, r, c):
        return tir.store(self.out, self._load(n, r, c, 1), *self._at(self.out, n, c * self.spec.rows + r))

    def _at(self, array, n, offset):
        """Indices of the element ``offset`` elements into image ``n``: the last axis may run past its end."""
        return (n, *([0] * (len(array.shape) - 2)), offset)

    def _load(self, n, r, c, lanes):
        return tir.load_vector(self.data, self._at(self.data, n, r * self.spec.columns + c), lanes)

    def _band(self, n, begin):
        """A band of blocks; the last band, and the last block of one, start earlier instead of being narrower."""
        lanes, along = self.lanes, self.schedule.along_operand
        outer, inner = (self.spec.rows, self.spec.columns) if along else (self.spec.columns, self.spec.rows)
        fixed, named = tir.bind("band", tirx.min(begin, tir.i64(outer - lanes)))

        def block(number):
            moving, named_block = tir.bind("block", tirx.min(number * lanes, tir.i64(inner - lanes)))
            return [named_block, *(self._block(n, fixed, moving) if along else self._block(n, moving, fixed))]

        return [named, tir.for_("block", -(-inner // lanes), block)]

    def _block(self, n, row, column):
        body, columns = square(lambda i, j: self._load(n, row + i, column + j, QUAD), self.lanes)
        return [
            *body,
            *(tir.store_vector(self.out, self._at(self.out, n, (column + i) * self.spec.rows + row), c) for i, c in enumerate(columns)),
        ]


#: Numbers in the part of a vector within which x86 moves lanes cheaply.
QUAD = 4


def square(load, lanes):
    """A block of ``lanes`` x ``lanes`` float32 numbers, transposed in registers.

    Parameters
    ----------
    load : callable
        (row, column) to the vector of four numbers that begins there; both are Python ints.
    lanes : int
        A multiple of 4.

    Returns
    -------
    (list of statements, list of vectors)
        The columns of the block, in order.
    """
    parts = [quad(lambda row, column=column: load(row, column), lanes) for column in range(0, lanes, QUAD)]
    return [statement for body, _ in parts for statement in body], [column for _, four in parts for column in four]


def quad(load, lanes):
    """Four columns of ``lanes`` rows of numbers of four bytes, transposed in registers.

    Vectors are put together from quads of four rows as they are loaded, which is cheap; what is left is to transpose 4 x 4 blocks within
    quads.

    Parameters
    ----------
    load : callable
        Row, a Python int, to the vector of its four numbers.
    lanes : int
        A multiple of 4.

    Returns
    -------
    (list of statements, list of vectors)
        The four columns.
    """
    body, columns, rows = [], [], []

    def named(value):
        variable, statement = tir.bind("t", value)
        body.append(statement)
        return variable

    def pairs(a, b, first, second):
        """Quad by quad: numbers ``first`` and ``second`` of ``a`` and of ``b``, alternating."""
        return named(tir.shuffle([a, b], [at for q in range(0, lanes, QUAD) for k in (q + first, q + second) for at in (k, lanes + k)]))

    def halves(a, b, first):
        """Quad by quad: two numbers of ``a`` and two of ``b``, from number ``first`` on."""
        return named(tir.shuffle([a, b], [side + q + first + k for q in range(0, lanes, QUAD) for side in (0, lanes) for k in (0, 1)]))

    for row in range(QUAD):
        quads = [named(load(row + first)) for first in range(0, lanes, QUAD)]
        rows.append(quads[0] if lanes == QUAD else named(tir.shuffle(quads, range(lanes))))
    for first in (0, 2):
        low, high = pairs(rows[0], rows[1], first, first + 1), pairs(rows[2], rows[3], first, first + 1)
        columns += [halves(low, high, 0), halves(low, high, 2)]
    return body, columns
