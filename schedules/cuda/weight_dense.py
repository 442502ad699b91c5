"""Dense layers of float data with packed weights on a GPU: :class:`bnntvm.spec.WeightDense`. See :mod:`.rows` and :mod:`.coding`."""

from __future__ import annotations

from bnntvm.schedules.cuda import coding, functions, rows
from bnntvm.schedules.cuda.rows import Schedule, default_schedule, space
from bnntvm.schedules.weight_dense import reference

__all__ = ["Schedule", "build", "default_schedule", "pack_weights", "reference", "space"]

assert functions.SIDE  # bnn_fma is defined there


def pack_weights(spec, schedule, isa, weights):
    """uint32 ``[planes, 1, K, words(O)]`` from ``[planes, O, words(K)]``."""
    return coding.pack(weights[:, :, None], spec.in_features, spec.out_features)


def packed_operands(spec):
    """``(buffers, declarations, Decoder)`` of the weights."""
    shape = (spec.coding.planes, 1, spec.in_features, -(-spec.out_features // 32))
    return coding.operands(spec.coding, shape, spec.out_features)


def build(spec, schedule, isa):
    """The kernel: data ``float32[M, K]``, packed weights, levels if any, the epilogue's inputs and outputs. M is dynamic."""
    arrays, declared, decoder = packed_operands(spec)
    return rows.build("weight_dense", spec, schedule, arrays, declared, lambda feature, channel: decoder.weight(0, feature, channel))
