"""Weights as integers, and integers as few bit planes.

A layer on planes costs one pass for each pair of an activation plane and a weight plane, whatever the kind of the weight plane: bipolar,
unipolar and ternary ones all take one logic operation, one population count and one addition for each word (spec.PlaneSum). So weights on
a grid that contains zero are best written without a constant term: {-1, 0, 1} as one ternary plane, other ranges in two's complement.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bnntvm.bits import pack_bits
from bnntvm.planes import GRID_ERROR, MOST_LEVELS


@dataclass(frozen=True, eq=False)
class DigitPlanes:
    """``w[o] = scale[o] * sum(coefficients[q] * plane[q])``.

    Attributes
    ----------
    scale : np.ndarray
        float32 [O].
    kind : str
        Of all planes: ``bipolar``, ``unipolar`` or ``ternary``.
    coefficients : tuple of int
    words : np.ndarray
        uint32 [Q', O, ..., words(I)]; ternary planes are two, signs and mask.
    """

    scale: np.ndarray
    kind: str
    coefficients: tuple
    words: np.ndarray


def digit_planes(weights):
    """The :class:`DigitPlanes` of :class:`bnntvm.planes.WeightPlanes`, or None if they are no integers times one scale per channel."""
    found = integer_weights(weights)
    if found is None:
        return None
    scale, integers = found
    kind, coefficients, planes = _digits(integers)
    return DigitPlanes(scale, kind, coefficients, np.stack([pack_bits(plane) for plane in planes]))


def integer_weights(weights):
    """``(scale, integers)``: float32 [O] and int64 [O, ...] with w = scale * integers, as small as possible; None if there are none."""
    if not all(np.ndim(c) == 0 and float(c) == int(c) for c, _ in weights.planes):
        return None
    integers = sum(int(c) * (1 - 2 * negative.astype(np.int64)) for c, negative in weights.planes)
    scale, ones = weights.scale, (1,) * (integers.ndim - 1)
    if weights.offset is not None:
        steps = weights.offset.astype(np.float64) / np.where(scale > 0, scale, 1)
        whole = np.rint(steps)
        reach = np.abs(integers).reshape(len(integers), -1).max(1) + np.abs(whole)
        if np.any(np.abs(steps - whole) > 4 * GRID_ERROR * reach) or np.any((scale <= 0) & (weights.offset != 0)):
            return None
        integers = integers + whole.astype(np.int64).reshape(-1, *ones)
    if not np.any(integers % 2):
        integers, scale = integers // 2, scale * np.float32(2)
    return (scale, integers) if np.abs(integers).max(initial=0) < 2 * MOST_LEVELS else None


def _digits(integers):
    """Kind, coefficients and planes (bool, like ``integers``) of the decomposition with the fewest planes."""
    low, high = int(integers.min(initial=0)), int(integers.max(initial=0))
    if max(-low, high) <= 1 and np.any(integers == 0):
        return "ternary", (1,), [integers < 0, integers != 0]
    if np.all(integers % 2):
        bits = (max(-low, high) + 1).bit_length() - 1
        numbers = (2**bits - 1 - integers) // 2
        return "bipolar", tuple(2**j for j in range(bits)), [(numbers >> j) & 1 == 1 for j in range(bits)]
    sign = 1 if _bits(low, high) <= _bits(-high, -low) else -1
    low, high = (low, high) if sign > 0 else (-high, -low)
    bits = _bits(low, high)
    coefficients = [sign * 2**j for j in range(bits)]
    if low < 0:
        coefficients[-1] = -coefficients[-1]
    return "unipolar", tuple(coefficients), [(integers * sign >> j) & 1 == 1 for j in range(bits)]


def _bits(low, high):
    """Digits of two's complement, of plain binary numbers if none is negative."""
    return max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0) + (low < 0)
