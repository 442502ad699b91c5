"""Depthwise float32 convolution with packed weights: :class:`bnntvm.spec.WeightConv2d` with one input channel per group.

The convolution of :mod:`.depthwise_conv2d`; a row of taps is decoded before it is used by the pixels of a tile. Codings ``sign`` and
``ternary``.
"""

from __future__ import annotations

import numpy as np
from tvm import tirx

from bnntvm import spec as specs
from bnntvm.bits import unpack_bits

from . import depthwise_conv2d, packed_weights, tir, weight_conv2d
from .depthwise_conv2d import Schedule, default_schedule, space

__all__ = ["Schedule", "build", "default_schedule", "pack_weights", "reference", "space"]


def pack_weights(spec, schedule, isa, weights):
    """Weights in the order in which the kernel reads them.

    Parameters
    ----------
    weights : ndarray
        uint32 ``[planes, O, kh, kw, 1]``.

    Returns
    -------
    ndarray
        uint32 ``[words(kh * kw), planes, O']``, bit j of word i is tap 32 * i + j; O' = O padded with zeros to a multiple of 16.
    """
    planes = unpack_bits(weights, 1).reshape(len(weights), spec.out_channels, -1)
    planes = np.pad(planes, ((0, 0), (0, -spec.out_channels % 16), (0, 0)))
    return packed_weights.pack(planes[:, None].transpose(0, 1, 3, 2))[0]


def build(spec, schedule, isa):
    """The kernel: data ``float32[N, H, W, I]``, packed weights, the epilogue's inputs and outputs. N is dynamic.

    Returns
    -------
    tirx.PrimFunc
    """
    return _Kernel(spec, schedule, isa).function()


class _Kernel(depthwise_conv2d.Depthwise):
    def __init__(self, spec, schedule, isa):
        super().__init__(spec, schedule, isa)
        self.name, self.coding = "weight_depthwise", spec.coding
        channels = -(-spec.out_channels // 16) * 16
        taps = spec.window.kernel[0] * spec.window.kernel[1]
        self.packed = tir.buffer("w", (specs.words(taps), spec.coding.planes, channels), "uint32")
        self.operands[-1] = self.packed

    def weights(self, at, r, vector):
        """Taps of row ``r``: it is known at run time only, so the word is shifted until its first tap is bit 0."""
        body, found = [], {}
        for s in range(self.window.kernel[1]):
            tap = tir.i64(r) * self.window.kernel[1] + s
            words = []
            for plane in range(self.coding.planes):
                index = [tirx.floordiv(tap, specs.WORD_BITS), plane, at.channel + vector * self.lanes]
                shift = tirx.Cast("uint32", tirx.floormod(tap, specs.WORD_BITS))
                words.append(tir.load_vector(self.packed, index, self.lanes) >> tir.broadcast(shift, self.lanes))
            decoder = packed_weights.Decoder(self.coding, self.lanes, words)
            found[s], statement = tir.bind("w", decoder.weight(0))
            body.append(statement)
        return body, found


reference = weight_conv2d.reference
