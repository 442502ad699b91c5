"""Packed weights of :class:`bnntvm.spec.WeightCoding`: their layout, and how vectors of them become float32 again.

``uint32[blocks, words(D), planes, size]``: bit j of a word is step 32 * i + j of a reduction of D steps, a lane is an output channel of the
block. A step's weights of neighbouring channels are then one bit each of a vector's lanes, at the same place: shifts and logic decode
them on any instruction set.
"""

from __future__ import annotations

import numpy as np

from bnntvm import spec as specs
from bnntvm.bits import pack_bits

from . import tir

WORD = specs.WORD_BITS


def pack(planes):
    """bool ``[planes, blocks, D, size]`` -> uint32 ``[blocks, words(D), planes, size]``."""
    return np.ascontiguousarray(pack_bits(planes.transpose(1, 0, 3, 2)).transpose(0, 3, 1, 2))


class Decoder:
    """Vectors of float weights from words.

    Parameters
    ----------
    coding : bnntvm.spec.WeightCoding
    lanes : int
    words : list of uint32 vectors
        One for each plane.
    levels : list of float32 vectors
        For coding ``levels``, of each channel; else empty.
    """

    def __init__(self, coding, lanes, words, levels=()):
        self.coding, self.lanes, self.words, self.levels = coding, lanes, words, levels

    def weight(self, bit):
        """float32 vector of the weights at bit ``bit`` (an int) of the words: +-1, {-1, 0, 1}, or levels."""
        kind, one = self.coding.kind, self._number(0x3F800000)
        if kind == "sign":
            return tir.reinterpret("float32", self._sign(self.words[0], bit) | one)
        if kind == "ternary":
            plus, minus = self.words
            size = self._everywhere(plus | minus, bit) & one
            return tir.reinterpret("float32", size | self._sign(minus, bit))
        value = tir.reinterpret("uint32", self.levels[0])
        for word, level in zip(self.words, self.levels[1:]):
            mask = self._everywhere(word, bit)
            value = (mask & tir.reinterpret("uint32", level)) | (~mask & value)
        return tir.reinterpret("float32", value)

    def _number(self, value):
        return tir.splat(value, "uint32", self.lanes)

    def _top(self, word, bit):
        """``word`` with its bit ``bit`` at the top."""
        return word << self._number(WORD - 1 - bit) if bit < WORD - 1 else word

    def _sign(self, word, bit):
        return self._top(word, bit) & self._number(0x80000000)

    def _everywhere(self, word, bit):
        """All bits of a lane set to its bit ``bit``."""
        signed = tir.reinterpret("int32", self._top(word, bit)) >> tir.splat(WORD - 1, "int32", self.lanes)
        return tir.reinterpret("uint32", signed)


def values(planes, coding, levels=None):
    """The weights in numpy.

    Parameters
    ----------
    planes : ndarray
        bool ``[planes, O, ...]``.
    levels : ndarray, optional
        float32 ``[planes + 1, O or more]``.

    Returns
    -------
    ndarray
        float32 ``[O, ...]``.
    """
    if coding.kind == "sign":
        return np.where(planes[0], np.float32(-1), np.float32(1))
    if coding.kind == "ternary":
        return planes[0].astype(np.float32) - planes[1].astype(np.float32)
    table = levels[:, : planes.shape[1]].reshape(len(levels), -1, *(1 for _ in planes.shape[2:]))
    out = np.broadcast_to(table[0], planes.shape[1:])
    for plane, level in zip(planes, table[1:]):
        out = np.where(plane, level, out)
    return out
