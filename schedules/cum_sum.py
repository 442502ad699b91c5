"""Running sums along an axis: the family of :class:`bnntvm.spec.CumSum`.

Numbers are added one by one, in the order of the axis, so that sums of floats are rounded as numpy and ONNX Runtime round them.
"""

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
    """In numpy: data ``dtype[M, size, inner]``."""
    (data,) = operands
    data = data[:, ::-1] if spec.backward else data
    sums = np.cumsum(data, 1, dtype=data.dtype)
    if spec.exclusive:
        sums = np.concatenate([np.zeros_like(sums[:, :1]), sums[:, :-1]], 1)[:, : data.shape[1]]
    return [np.ascontiguousarray(sums[:, ::-1] if spec.backward else sums)]


def arrays(spec):
    """``(size, inner, data, sums)``: dimensions, variables where they are dynamic, and buffers ``dtype[M, size, inner]``; M is dynamic."""
    size, inner = (tirx.Var(name, "int64") if d is None else tir.i64(d) for name, d in (("size", spec.size), ("inner", spec.inner)))
    shape = tirx.Var("m", "int64"), size, inner
    return size, inner, tir.buffer("x", shape, spec.dtype), tir.buffer("y", shape, spec.dtype)


def build(spec, schedule, isa):
    """The kernel: data and sums ``dtype[M, size, inner]``. Each sum is that of its neighbour and one number more.

    Returns
    -------
    tirx.PrimFunc
    """
    size, inner, data, sums = arrays(spec)

    def place(k):
        return size - 1 - k if spec.backward else k

    def first(m, i):
        start = tir.constant(0, spec.dtype) if spec.exclusive else tir.load(data, m, place(tir.i64(0)), i)
        return tir.store(sums, start, m, place(tir.i64(0)), i)

    def following(m, k, i):
        own = place(k) if spec.exclusive else place(k + 1)
        return tir.store(sums, tir.load(sums, m, place(k), i) + tir.load(data, m, own, i), m, place(k + 1), i)

    def group(m):
        begin = tir.for_("i", inner, lambda i: first(m, i))
        return [begin, tir.for_("k", size - 1, lambda k: tir.for_("i", inner, lambda i: following(m, k, i)))]

    return tir.function("cum_sum", [data, sums], tir.parallel("group", data.shape[0], lambda m: tir.when(size > 0, group(m))))
