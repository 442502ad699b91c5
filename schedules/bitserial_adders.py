"""Inner loops of layers on several planes: how the bits of one data word and one weight word are counted.

The product of a data plane and a weight plane is ``factor * X + constant``, X the population count of one logic function of words, and the
constant one of the weights alone (of the taps inside the image):

=========  =========  ============  ======  ==========================
data       weights    X = popc of   factor  constant
=========  =========  ============  ======  ==========================
bipolar    bipolar    a ^ w           -2    K
unipolar   bipolar    a ^ w            1    -popc(w)
bipolar    unipolar   a & w           -2    popc(w)
unipolar   unipolar   a & w            1    0
bipolar    ternary    (a ^ s) & m     -2    popc(m)
unipolar   ternary    (a ^ s) & m      1    -popc(s)
=========  =========  ============  ======  ==========================

(s is 0 where m is; a unipolar a = 1 adds 1 - 2 s under the mask.) Adders keep -X: see :class:`.binary_conv2d_adders.Adder`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bnntvm.schedules import binary_conv2d_adders as single
from bnntvm.schedules import tir as T

#: Truth tables of ternary logic, bit 4a + 2b + c: a ^ (b ^ c), a ^ (b & c), (a ^ b) & c.
_TABLES = {"xor": 0x96, "and": 0x78}
TERNARY = 0x28
#: (o, o ^ x, o ^ x ^ y) to the majority of o, x and y.
_CARRY = sum(1 << (4 * o + 2 * t + n) for o in (0, 1) for t in (0, 1) for n in (0, 1) if o + (o ^ t) + (t ^ n) >= 2)


def logic(planes):
    """The logic function of a spec.PlaneSum: ``xor``, ``and`` or ``ternary``."""
    return {"bipolar": "xor", "unipolar": "and", "ternary": "ternary"}[planes.weight_kind]


def factor(planes):
    """What X counts times."""
    return -2 if planes.data_kind == "bipolar" else 1


@dataclass(frozen=True)
class Share:
    """What the weights alone contribute for each tap: ``constant + sum(factor * popc(words of a plane))``.

    ``factors``: pairs of a plane of words and its factor.
    """

    constant: int
    factors: tuple[tuple[int, int], ...] = ()

    def of(self, counts):
        """In numpy; ``counts`` int64[planes of words, ...] of set bits."""
        return sum((factor * counts[plane] for plane, factor in self.factors), np.full(counts.shape[1:], self.constant, np.int64))


def shares(planes, bits):
    """The table's constants for taps of ``bits`` bits: one for each weight plane if planes are scaled, else their sum with coefficients."""
    bipolar, count = planes.data_kind == "bipolar", range(len(planes.weights))
    if planes.weight_kind == "ternary":  # signs, mask
        found = [Share(0, ((2 * q + 1, 1) if bipolar else (2 * q, -1),)) for q in count]
    elif planes.weight_kind == "unipolar":
        found = [Share(0, ((q, 1),) if bipolar else ()) for q in count]
    else:
        found = [Share(bits) if bipolar else Share(0, ((q, -1),)) for q in count]
    if planes.scaled:
        return found
    scales = [sum(planes.data) * c for c in planes.weights]
    factors = ((plane, f * scale) for scale, share in zip(scales, found) for plane, f in share.factors)
    return [Share(sum(s * share.constant for s, share in zip(scales, found)), tuple(pair for pair in factors if pair[1]))]


class Plain(single.Adder):
    """One logic operation, one population count, one addition a word.

    ``kind`` is the logic function; subclasses say which.
    """

    kind = "xor"

    def product(self, data, weights):
        """The word whose set bits count."""
        if self.kind == "ternary":
            signs, mask = weights
            if self.lanes == 16:
                return single.ternary_logic(data, signs, mask, TERNARY)
            return (data ^ signs) & mask
        return data & weights[0] if self.kind == "and" else data ^ weights[0]

    def step(self, p, v, data, weights):
        return [self._add(p, v, self.product(data[0], weights[0]))]


class Pairs(single.SumBits, Plain):
    """Two words at a time through a full adder whose sum bits stay in a register; not for ternary weights.

    With o the sum bits so far and the products x and y, t = o ^ x and n = t ^ y are one operation of ternary logic each, and so is the
    carry, the majority of o, x and y, as a function of o, t and n. A carry counts twice: five operations for two words instead of six.
    """

    def step(self, p, v, data, weights):
        ones = self._get(self.ones, p, v)
        if self.lanes == 16:
            table = _TABLES[self.kind]
            first, bind_first = T.bind("first", single.ternary_logic(ones, data[0], weights[0][0], table))
            both, bind_both = T.bind("both", single.ternary_logic(first, data[1], weights[1][0], table))
            carry = single.ternary_logic(ones, first, both, _CARRY)
            return [bind_first, bind_both, self._add(p, v, carry), self._put(self.ones, p, v, both)]
        x, bind_x = T.bind("x", self.product(data[0], weights[0]))
        y, bind_y = T.bind("y", self.product(data[1], weights[1]))
        first, bind_first = T.bind("first", ones ^ x)
        carry = (ones & x) | (first & y)
        return [bind_x, bind_y, bind_first, self._add(p, v, carry), self._put(self.ones, p, v, first ^ y)]

    def single(self, p, v, data, weights):
        """A pair whose second product is 0."""
        ones = self._get(self.ones, p, v)
        x, bind_x = T.bind("x", self.product(data[0], weights[0]))
        return [bind_x, self._add(p, v, ones & x), self._put(self.ones, p, v, ones ^ x)]


class PlainBytes(single.Bytes, Plain):
    """Words counted in bytes."""


class PairsBytes(single.Bytes, Pairs):
    """Carries counted in bytes."""


class Masked(single.Zeros):
    """For data with zeros: takes -X = 2 popc(product & ~z) + popc(z & nonzero weights). ``data`` is a word and its zeros."""

    kind = "xor"

    def step(self, p, v, data, weights):
        word, zeros = data
        differ = single.popcount(Plain.product(self, word, weights[0]) & single.inverted(zeros))
        mask = {"xor": [], "and": weights[0][:1], "ternary": weights[0][1:]}[self.kind]
        missing = single.popcount(zeros & mask[0] if mask else zeros)
        return [self._take(p, v, differ + differ + missing)]


def adder(base, kind):
    """The class of adders ``base`` for one logic function."""
    return type(f"{base.__name__}_{kind}", (base,), {"kind": kind})
