"""The largest or least value of each row on a GPU: :class:`bnntvm.spec.RowExtreme`. See :mod:`.warps`."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import cells, simt, warps
from bnntvm.schedules.row_extreme import reference

__all__ = ["Schedule", "build", "default_schedule", "reference", "space"]


@dataclass(frozen=True)
class Schedule:
    """Nothing to choose: a warp takes a row."""


def default_schedule(spec, isa):
    """The only one."""
    return Schedule()


def space(spec, isa):
    """The only one."""
    return [Schedule()]


def build(spec, schedule, isa):
    """The kernel: data ``float32[M, C]``, result ``float32[M, 1]``. M is dynamic."""
    rows = tirx.Var("m", "int64")
    data, output = tir.buffer("x", (rows, spec.channels), "float32"), tir.buffer("y", (rows, 1), "float32")
    (read, declared), (written, declared_too) = simt.flat(data), simt.flat(output)
    name, identity = ("bnn_max", float("-inf")) if spec.op == "max" else ("bnn_min", float("inf"))

    def combine(a, b):
        return simt.call(name, a, b, dtype="float32")

    def body(row, exists, lane):
        best, allocate = simt.registers("best", 1, "float32")

        def step(channel):
            there = tirx.And(exists, channel < spec.channels)
            value = cells.guarded(there, read, simt.wide(row) * spec.channels + simt.wide(channel), identity)
            return simt.put(best, 0, combine(simt.at(best, 0), value))

        first = simt.put(best, 0, tir.constant(identity, "float32"))
        value, named = simt.bind("best_of_lane", simt.at(best, 0))
        joins, value = warps.reduce(combine, value)
        store = tirx.IfThenElse(tirx.And(exists, tirx.EQ(lane, simt.i32(0))), simt.put(written, row, value), None)
        return [allocate, first, warps.along(spec.channels, lane, step), named, *joins, store]

    return warps.build("row_extreme", [data, output], rows, [declared, declared_too], body)
