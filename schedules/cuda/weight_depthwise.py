"""Depthwise float32 convolution with packed weights on a GPU: :class:`bnntvm.spec.WeightConv2d` with one input channel per group."""

from __future__ import annotations

from bnntvm.schedules.cuda import coding
from bnntvm.schedules.cuda.depthwise_conv2d import Schedule, default_schedule, depthwise, space
from bnntvm.schedules.weight_depthwise import reference

__all__ = ["Schedule", "build", "default_schedule", "pack_weights", "reference", "space"]


def _taps(spec):
    return spec.window.kernel[0] * spec.window.kernel[1]


def pack_weights(spec, schedule, isa, weights):
    """uint32 ``[planes, kh * kw, 1, words(O)]`` from ``[planes, O, kh, kw, 1]``, see :mod:`.coding`."""
    return coding.pack(weights.reshape(len(weights), spec.out_channels, _taps(spec), 1), 1, spec.out_channels)


def build(spec, schedule, isa):
    """The kernel: data ``float32[N, H, W, I]``, packed weights, levels if any, the epilogue's inputs and outputs. N is dynamic."""
    shape = (spec.coding.planes, _taps(spec), 1, -(-spec.out_channels // 32))
    arrays, declared, decoder = coding.operands(spec.coding, shape, spec.out_channels)

    def weight(cell, tap):
        return decoder.weight(tap, 0, cell.channel)

    return depthwise("weight_depthwise", spec, schedule, arrays, declared, weight)
