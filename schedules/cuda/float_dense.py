"""float32 dense layers on a GPU: :class:`bnntvm.spec.FloatDense`. See :mod:`.rows`."""

from __future__ import annotations

import numpy as np

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import functions, rows, simt
from bnntvm.schedules.cuda.rows import Schedule, default_schedule, space
from bnntvm.schedules.float_dense import reference

__all__ = ["Schedule", "build", "default_schedule", "pack_weights", "reference", "space"]

assert functions.SIDE  # bnn_fma is defined there


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

    return rows.build("float_dense", spec, schedule, [weights], [declared], weight)
