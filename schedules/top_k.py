"""The largest or smallest elements of rows, in order (:class:`bnntvm.spec.TopK`).

Each of the ``count`` searches scans the row for the best element behind the one found last: count * size comparisons and no memory of its
own. That suits the few best of a classifier's scores; it is not a sort.
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
    """Values and indices; among equal elements the lowest index comes first (ONNX TopK). ``operands`` is ``[data]``."""
    (data,) = operands
    # A stable sort of the reversed row puts the highest index first among equals; reversing that puts the lowest first.
    ranks = spec.size - 1 - np.argsort(data[:, ::-1], 1, kind="stable")[:, ::-1] if spec.largest else np.argsort(data, 1, kind="stable")
    best = ranks[:, : spec.count]
    return [np.take_along_axis(data, best, 1), best.astype(np.int64)]


def build(spec, schedule, isa):
    """The kernel: data ``spec.dtype[M, size]``, values ``spec.dtype[M, count]``, indices int64 ``[M, count]``; M is dynamic."""
    rows = tirx.Var("m", "int64")
    data = tir.buffer("x", (rows, spec.size), spec.dtype)
    values, indices = tir.buffer("values", (rows, spec.count), spec.dtype), tir.buffer("indices", (rows, spec.count), "int64")

    def better(a, b):
        return a > b if spec.largest else a < b

    def search(row, rank):
        before = tirx.max(rank - 1, tir.i64(0))
        last, index = tir.load(values, row, before), tir.load(indices, row, before)
        best, best_index = tir.load(values, row, rank), tir.load(indices, row, rank)

        def look(i):
            here = tir.load(data, row, i)
            fresh = tirx.any(rank == 0, better(last, here), tirx.all(last == here, index < i))
            take = tirx.all(fresh, tirx.any(best_index < 0, better(here, best)))
            return tir.when(take, [tir.store(values, here, row, rank), tir.store(indices, i, row, rank)])

        first = [tir.store(indices, tir.i64(-1), row, rank), tir.store(values, tir.load(data, row, 0), row, rank)]
        return [*first, tir.for_("i", spec.size, look)]

    body = tir.parallel("row", rows, lambda row: tir.for_("rank", spec.count, lambda rank: search(row, rank)))
    return tir.function("top_k", [data, values, indices], body)
