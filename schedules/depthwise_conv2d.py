"""Depthwise float32 convolution, NHWC: :class:`bnntvm.spec.FloatConv2d` with one input channel per group.

Vectorised over channels, several pixels of a row at a time; see :mod:`.sliding`. With more than one output channel per input channel the
input vectors are gathered lane by lane.
"""

from __future__ import annotations

import numpy as np
from tvm import tirx

from . import float_conv2d, sliding, tir
from .sliding import Schedule

__all__ = ["Schedule", "build", "claims", "default_schedule", "pack_weights", "reference", "space"]


def claims(spec):
    """Whether a convolution belongs to this family (else to :mod:`.float_conv2d`)."""
    return spec.groups > 1 and spec.groups == spec.in_channels


def default_schedule(spec, isa):
    """A schedule that is fast without tuning."""
    return sliding.default_schedule(spec.window, spec.out_channels, spec.epilogue, isa, extra=spec.window.kernel[1])


def space(spec, isa):
    """Valid schedules, the default one first."""
    return sliding.space(spec.window, spec.out_channels, spec.epilogue, isa, extra=spec.window.kernel[1])


def pack_weights(spec, schedule, isa, weights):
    """Weights with channels last.

    Parameters
    ----------
    weights : ndarray
        float32 ``[O, kh, kw, 1]``.

    Returns
    -------
    ndarray
        float32 ``[kh, kw, O']``, O' = O padded with zeros to a multiple of 16.
    """
    packed = np.zeros((*spec.window.kernel, _padded(spec)), np.float32)
    packed[..., : spec.out_channels] = weights[..., 0].transpose(1, 2, 0)
    return packed


def _padded(spec):
    return -(-spec.out_channels // 16) * 16


def build(spec, schedule, isa):
    """The kernel: data ``float32[N, H, W, I]``, packed weights, the epilogue's inputs and outputs. N is dynamic.

    Returns
    -------
    tirx.PrimFunc
    """
    return Depthwise(spec, schedule, isa).function()


class Depthwise(sliding.Kernel):
    def __init__(self, spec, schedule, isa):
        super().__init__("depthwise_conv2d", spec.window, spec.in_channels, spec.out_channels, spec.epilogue, schedule, isa)
        self.multiplier = spec.out_channels // spec.in_channels
        self.last = spec.in_channels - 1
        self.packed = tir.buffer("w", (*spec.window.kernel, _padded(spec)), "float32")
        self.operands.append(self.packed)

    def load(self, at, y, x, vector):
        if self.multiplier == 1:
            return super().load(at, y, x, vector)
        channels = tirx.Ramp(at.channel + vector * self.lanes, tir.i64(1), self.lanes)
        sources = tirx.floordiv(channels, tirx.Broadcast(tir.i64(self.multiplier), self.lanes))
        return tirx.BufferLoad(self.data, [at.image, y, x, tirx.min(sources, tirx.Broadcast(tir.i64(self.last), self.lanes))])

    def weights(self, at, r, vector):
        body, found = [], {}
        for s in range(self.window.kernel[1]):
            found[s], statement = tir.bind("w", tir.load_vector(self.packed, [r, s, at.channel + vector * self.lanes], self.lanes))
            body.append(statement)
        return body, found

    def combine(self, total, value, weight):
        return total + value * weight


reference = float_conv2d.reference
