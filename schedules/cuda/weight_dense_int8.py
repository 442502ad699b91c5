"""Products of 8-bit data with packed weights on a GPU: :class:`bnntvm.spec.WeightDenseInt8`, exact integers. See :mod:`.rows`."""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules.cuda import rows
from bnntvm.schedules.cuda.rows import Schedule, default_schedule, space
from bnntvm.schedules.cuda.weight_dense import pack_weights, packed_operands
from bnntvm.schedules.weight_dense_int8 import reference

__all__ = ["Schedule", "build", "default_schedule", "pack_weights", "reference", "space"]


def build(spec, schedule, isa):
    """The kernel: data ``float32[M, K]`` that hold integers, packed weights, the epilogue's inputs and outputs. M is dynamic."""
    arrays, declared, decoder = packed_operands(spec)

    def weight(feature, channel):
        statements, value = decoder.weight(0, feature, channel)
        return statements, tirx.Cast("int32", value)

    def read(value):
        return tirx.Cast("int32", value)

    return rows.build("weight_dense_int8", spec, schedule, arrays, declared, weight, "int32", read)
