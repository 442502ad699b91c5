"""Packed weights of :class:`bnntvm.spec.WeightCoding` on a GPU: their layout, and how a bit becomes a float again.

``uint32[planes, taps, units, words(O)]``: bit j of a word is output channel 32 * i + j. The threads that bring neighbouring channels read
one word between them.
"""

from __future__ import annotations

import numpy as np
from tvm import tirx

from bnntvm import spec as specs
from bnntvm.bits import pack_bits, unpack_bits
from bnntvm.schedules import tir
from bnntvm.schedules.cuda import simt


def pack(weights, units, channels):
    """uint32 ``[planes, O, taps, words(I)]`` to ``[planes, taps, units, channels / 32]``; what is added is 0."""
    planes, outputs, taps, _ = weights.shape
    bits = unpack_bits(weights, min(units, weights.shape[3] * 32)).transpose(0, 2, 3, 1)
    full = np.zeros((planes, taps, units, -(-channels // 32) * 32), bool)
    full[:, :, : bits.shape[2], :outputs] = bits
    return np.ascontiguousarray(pack_bits(full))


class Decoder:
    """Finds weights.

    Parameters
    ----------
    coding : bnntvm.spec.WeightCoding
    array : Buffer
        Of :func:`pack`, flat.
    shape : tuple
        Its shape.
    levels : Buffer, optional
        float32 ``[planes + 1, padded channels]``, flat.
    """

    def __init__(self, coding, array, shape, levels=None, padded=0):
        self.coding, self.array, self.shape, self.levels, self.padded = coding, array, shape, levels, padded

    def bit(self, plane, tap, unit, channel):
        """0 or 1, uint32."""
        _, taps, units, words = self.shape
        place = ((simt.i32(tap) + plane * taps) * units + unit) * words + simt.div(channel, 32)
        word = simt.at(self.array, place)
        return tirx.bitwise_and(tirx.shift_right(word, simt.u32(simt.mod(channel, 32))), simt.u32(1))

    def weight(self, tap, unit, channel):
        """``(statements, float32)``; ``channel`` may be one of those that were added, if it has a word."""
        kind = self.coding.kind
        one, zero = tir.constant(1.0, "float32"), tir.constant(0.0, "float32")
        pairs = [simt.bind("bit", self.bit(p, tap, unit, channel)) for p in range(self.coding.planes)]
        bits, statements = [variable for variable, _ in pairs], [statement for _, statement in pairs]
        is_set = [tirx.NE(bit, simt.u32(0)) for bit in bits]
        if kind == "sign":
            return statements, tirx.Select(is_set[0], -one, one)
        if kind == "ternary":
            return statements, tirx.Select(is_set[0], one, tirx.Select(is_set[1], -one, zero))
        exists = channel < self.padded
        found = [tirx.if_then_else(exists, simt.at(self.levels, p * self.padded + channel), zero) for p in range(self.coding.planes + 1)]
        value = found[0]
        for condition, level in zip(is_set, found[1:]):
            value = tirx.Select(condition, level, value)
        return statements, value


def operands(coding, shape, out_channels):
    """``(buffers, declarations, Decoder)`` for packed weights of a shape, and levels where the coding has them."""
    packed = tir.buffer("w", shape, "uint32")
    array, declared = simt.flat(packed)
    if coding.kind != "levels":
        return [packed], [declared], Decoder(coding, array, shape)
    padded = specs.words(out_channels) * specs.WORD_BITS
    levels = tir.buffer("levels", (coding.planes + 1, padded), "float32")
    flat, declared_levels = simt.flat(levels)
    return [packed, levels], [declared, declared_levels], Decoder(coding, array, shape, flat, padded)
