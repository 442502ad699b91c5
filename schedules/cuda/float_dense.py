"""float32 dense layers on a GPU: :class:`bnntvm.spec.FloatDense`. See :mod:`.rows`, and :mod:`.tf32_dense` for many rows."""

from __future__ import annotations

import numpy as np

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import functions, rows, simt, tf32_dense
from bnntvm.schedules.float_dense import reference

__all__ = ["build", "default_schedule", "pack_weights", "reference", "space"]

assert functions.SIDE  # bnn_fma is defined there


def default_schedule(spec, isa):
    """A schedule that is fast without tuning."""
    return space(spec, isa)[0]


def space(spec, isa):
    """Valid schedules, the default one first."""
    found, plain = tf32_dense.schedules(spec, isa), rows.space(spec, isa)
    return [*found, *plain] if tf32_dense.pays(spec, isa) else [*plain, *found]


def pack_weights(spec, schedule, isa, weights):
    """float32 ``[K, O']`` from ``[O, K]``, channels padded with zeros to whole words."""
    packed = np.zeros((spec.in_features, -(-spec.out_features // 32) * 32), np.float32)
    packed[:, : spec.out_features] = weights.T
    return packed


def build(spec, schedule, isa):
    """The kernel: data ``float32[M, K]``, packed weights, the epilogue's inputs and outputs. M is dynamic."""
    channels = -(-spec.out_features // 32) * 32
    weights = tir.buffer("w", (spec.in_features, channels), "float32")
    array, declared = simt.flat(weights)

    def weight(feature, channel):
        return [], simt.at(array, feature * channels + channel)

    operands = rows.Operands(spec, [weights], [declared], arrays=[array])
    if not isinstance(schedule, tf32_dense.Schedule):
        return rows.function("float_dense", spec, schedule, operands, weight)
    few = rows.function("float_dense", spec, rows.Schedule(schedule.few, 8), operands, weight)
    return tf32_dense.function("float_dense", spec, schedule, operands, few)
