"""The largest or smallest elements of each row on a GPU, in order: :class:`bnntvm.spec.TopK`. A thread takes a row."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import simt
from bnntvm.schedules.top_k import reference

__all__ = ["Schedule", "build", "default_schedule", "reference", "space"]

_THREADS = 32


@dataclass(frozen=True)
class Schedule:
    """Nothing to choose."""


def default_schedule(spec, isa):
    """The only one."""
    return Schedule()


def space(spec, isa):
    """The only one."""
    return [Schedule()]


def build(spec, schedule, isa):
    """The kernel: data ``dtype[M, size]``; values ``dtype[M, count]`` and their indices ``int64[M, count]``. M is dynamic.

    Each rank is a walk over the row: the best element behind the one found last, of equal ones the first.
    """
    rows = tirx.Var("m", "int64")
    data = tir.buffer("x", (rows, spec.size), spec.dtype)
    values, indices = tir.buffer("values", (rows, spec.count), spec.dtype), tir.buffer("indices", (rows, spec.count), "int64")
    (read, a), (values_flat, b), (indices_flat, c) = simt.flat(data), simt.flat(values), simt.flat(indices)
    better = tirx.GT if spec.largest else tirx.LT

    def body(block, thread):
        row, named = simt.bind("row", simt.wide(block) * _THREADS + simt.wide(thread))
        found, allocate = simt.registers("found", 2, spec.dtype)  # the last one, the best so far
        places, allocate_places = simt.registers("places", 2, "int32")

        def look(rank, i):
            here, named_here = simt.bind("here", simt.at(read, row * spec.size + simt.wide(i)))
            last, place = simt.at(found, 0), simt.at(places, 0)
            behind = tirx.Or(better(last, here), tirx.And(tirx.EQ(last, here), place < i))
            fresh = tirx.Or(tirx.EQ(rank, simt.i32(0)), behind)
            none = simt.at(places, 1) < simt.i32(0)
            take = tirx.And(fresh, tirx.Or(none, better(here, simt.at(found, 1))))
            return [named_here, tirx.IfThenElse(take, tir.seq([simt.put(found, 1, here), simt.put(places, 1, i)]), None)]

        def search(rank):
            start = simt.put(places, 1, simt.i32(-1))
            walk = simt.loop("i", spec.size, lambda i: look(rank, i))
            keep = [simt.put(found, 0, simt.at(found, 1)), simt.put(places, 0, simt.at(places, 1))]
            where = row * spec.count + simt.wide(rank)
            stores = [simt.put(values_flat, where, simt.at(found, 0)), simt.put(indices_flat, where, simt.wide(simt.at(places, 0)))]
            return [start, walk, *keep, *stores]

        clear = [simt.put(found, i, tir.constant(0, spec.dtype)) for i in range(2)] + [simt.put(places, i, simt.i32(-1)) for i in range(2)]
        ranks = simt.loop("rank", spec.count, search)
        return [a, b, c, named, allocate, allocate_places, *clear, tirx.IfThenElse(row < rows, tir.seq([ranks]), None)]

    return simt.kernel("top_k", [data, values, indices], simt.i32(simt.ceil_div(rows, _THREADS)), _THREADS, body)
