"""Padding of packed images (:class:`bnntvm.spec.BitPad`): rows are copied as vectors between borders of one constant word."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx

from bnntvm.schedules import tir


@dataclass(frozen=True)
class Schedule:
    """Nothing to choose."""


def default_schedule(spec, isa):
    """The only schedule."""
    return Schedule()


def space(spec, isa):
    """The only schedule."""
    return [Schedule()]


def reference(spec, operands, epilogue_inputs=()):
    """The padded words in numpy; ``operands`` is ``[data]``, uint32 [N, H, W, words]."""
    top, left, bottom, right = spec.pads
    return [np.pad(operands[0], ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=np.uint32(spec.value))]


def build(spec, schedule, isa):
    """The kernel: data ``uint32[N, H, W, words]``, output ``uint32[N, top + H + bottom, left + W + right, words]``; N is dynamic."""
    height, width = spec.spatial
    top, left, bottom, right = spec.pads
    rows, columns = height + top + bottom, width + left + right
    batch = tirx.Var("n", "int64")
    data = tir.buffer("x", (batch, height, width, spec.words), "uint32")
    out = tir.buffer("y", (batch, rows, columns, spec.words), "uint32")

    def fill(n, y, first, count):
        value = tir.splat(spec.value, "uint32", isa.lanes)
        return _runs(count * spec.words, isa.lanes, lambda k, keep: _store(out, [n, y, 0, first * spec.words + k], value, keep))

    def copy(n, y):
        def run(k, keep):
            where = [n, y - top, 0, k]
            value = tir.load_vector(data, where, isa.lanes) if keep is None else tir.load_masked(data, where, keep)
            return _store(out, [n, y, 0, left * spec.words + k], value, keep)

        return _runs(width * spec.words, isa.lanes, run)

    def row(task):
        n, y = tirx.floordiv(task, tir.i64(rows)), tirx.floormod(task, tir.i64(rows))
        inside = [*fill(n, y, 0, left), *copy(n, y), *fill(n, y, left + width, right)]
        if top == bottom == 0:
            return inside
        return tir.when(tirx.all(y >= tir.i64(top), y < tir.i64(top + height)), inside, fill(n, y, 0, columns))

    size = 4 * spec.words * (height * width + rows * columns)
    return tir.function("bit_pad", [data, out], tir.parallel_if_large("row", rows, batch, size, row))


def _runs(count, lanes, body):
    """``body(first, mask or None)`` for ``count`` consecutive words, a vector at a time."""
    whole, rest = divmod(count, lanes)
    steps = [tir.for_("k", whole, lambda k: body(k * lanes, None))] if whole else []
    return steps + ([body(tir.i64(whole * lanes), tir.prefix_mask(rest, lanes))] if rest else [])


def _store(array, where, value, keep):
    return tir.store_vector(array, where, value) if keep is None else tir.store_masked(array, where, value, keep)
