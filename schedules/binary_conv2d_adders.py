"""Inner loops of a binary convolution: how the bits of one activation word times one weight word are counted.

An adder keeps one or two vectors of counters for every pixel and weight vector of a register tile. They count down, so that a counter
that starts at the right share of K (the number of values summed up) ends as half the dot product, K / 2 - popc(a ^ w), without further
arithmetic; padded taps are not counted and not in K.

================== ============================================ ==================== ==================
adder              what is taken away per word                  dot product          operations
================== ============================================ ==================== ==================
:class:`Adder`     popc(a ^ w)                                  2 value (+ K)        3 a word
:class:`CarrySave` two words at a time                          2 value (+ K)        5 a pair
:class:`Zeros`     2 popc((a ^ w) & ~z) + popc(z)               value (+ K)          8 a word
================== ============================================ ==================== ==================

With :class:`Bytes` both of the former count in 8 bits, for processors without vpopcnt; :class:`Tables` looks popc(a ^ w) up.
(+ K): where the counters started at 0. Unipolar data use the same adders, see :mod:`.binary_conv2d_unipolar`.
"""

from __future__ import annotations

import numpy as np

from bnntvm.schedules import tir as T
from bnntvm.schedules.tir import memory  # noqa: F401  (for the kernels)

#: 8-bit counters hold this many words of at most 8 set bits per byte.
BYTE_STEPS = 31
_XOR3 = 0x96
#: pternlog table of ``a != b ? a : c``.
_SELECT_CHANGED = 0xB2


def popcount(vector):
    """Set bits of every lane."""
    return T.tirx.popcount(vector)


def inverted(vector):
    """All bits flipped. (TensorIR's own operator makes a negative unsigned constant, which its simplifier refuses.)"""
    return vector ^ T.splat(0xFFFFFFFF, "uint32", T.lanes_of(vector))


class Adder:
    """Counters of a tile of ``pixels`` times ``vectors`` vectors of ``lanes`` 32-bit lanes.

    Parameters
    ----------
    pixels, vectors, lanes : int
    """

    #: Weight words that one step takes.
    words = 1
    #: The dot product is ``scale * value``.
    scale = 2
    #: ``value`` counts ``totals`` so many times.
    weight = 1
    #: Steps after which ``flush`` must be called, or None.
    flush_every = None
    #: Whether the data are read from a copy that the kernel makes of the rows of a task.
    copies = False

    def __init__(self, pixels, vectors, lanes):
        self.pixels, self.vectors, self.lanes = pixels, vectors, lanes
        self.cells = [(p, v) for p in range(pixels) for v in range(vectors)]
        self.totals, self.allocations = self._array("total", "int32")

    def _array(self, name, dtype):
        array = T.Registers(name, len(self.cells), dtype, self.lanes)
        return array, array.allocate

    def _get(self, array, p, v):
        return array.get(p * self.vectors + v)

    def _put(self, array, p, v, value):
        return array.set(p * self.vectors + v, value)

    def _add(self, p, v, word):
        """Count the set bits of ``word``."""
        return self._take(p, v, popcount(word))

    def _take(self, p, v, count):
        """total -= count, a uint32 vector."""
        return self._put(self.totals, p, v, self._get(self.totals, p, v) - T.tirx.Cast(T.vector_type("int32", self.lanes), count))

    def start(self, initial=None):
        """Statements that set the counters: to 0, or to ``initial[p]`` (int32 vectors), that is K / (scale * weight)."""
        zero = T.splat(0, "int32", self.lanes)
        return [self._put(self.totals, p, v, initial[p] if initial else zero) for p, v in self.cells]

    def step(self, p, v, data, weights):
        """Statements that add ``words`` words: ``data`` and ``weights`` are lists of uint32 vectors."""
        return [self._add(p, v, data[0] ^ weights[0])]

    def single(self, p, v, data, weights):
        """Statements that add one word that is left over from steps of several."""
        return self.step(p, v, data, weights)

    def flush(self):
        """Statements that move partial counters into the totals."""
        return []

    def value(self, p, v):
        """``int32`` vector: the dot product is ``scale`` times this, plus K if the counters started at 0."""
        return self._get(self.totals, p, v)


class SumBits:
    """What adders of pairs of words share: a full adder's sum bits stay in a register, only its carries, which count twice, are counted."""

    words = 2
    weight = 2

    def __init__(self, pixels, vectors, lanes):
        super().__init__(pixels, vectors, lanes)
        self.ones, allocation = self._array("ones", "uint32")
        self.allocations = self.allocations + allocation

    def start(self, initial=None):
        return super().start(initial) + [self._put(self.ones, p, v, T.splat(0, "uint32", self.lanes)) for p, v in self.cells]

    def value(self, p, v):
        pairs = self._get(self.totals, p, v)
        return pairs + pairs - T.tirx.Cast(T.vector_type("int32", self.lanes), popcount(self._get(self.ones, p, v)))


class CarrySave(SumBits, Adder):
    """Pairs of words through a full adder whose sum bits stay in a register.

    Words are stored encoded: the pair (x0, x1) as x0 and x0 ^ x1, activations and weights alike. With ``ones`` the sum bits so far and the
    two products a0 ^ w0, a1 ^ w1, the full adder's sum is ones' = ones ^ (a0 ^ a1) ^ (w0 ^ w1), one operation, and its carry is ones
    where that sum changed (the products differ) and a0 ^ w0 where it did not. The carry counts twice: five operations for two words
    with AVX-512, whose vpternlogd makes the sum and the choice one operation each.
    """

    copies = True

    def step(self, p, v, data, weights):
        ones, first = self._get(self.ones, p, v), data[0] ^ weights[0]
        if self.lanes == 16:
            sums, bind = T.bind("sum", ternary_logic(ones, data[1], weights[1], _XOR3))
            return [bind, self._add(p, v, ternary_logic(ones, sums, first, _SELECT_CHANGED)), self._put(self.ones, p, v, sums)]
        differ, bind_differ = T.bind("differ", data[1] ^ weights[1])
        first, bind_first = T.bind("first", first)
        carry = first ^ ((ones ^ first) & differ)
        return [bind_differ, bind_first, self._add(p, v, carry), self._put(self.ones, p, v, ones ^ differ)]

    def single(self, p, v, data, weights):
        """A pair whose second product is 0."""
        return self.step(p, v, data * 2, weights * 2)


class CarrySaveOdd(CarrySave):
    """The same with an odd number of words for each tap: the last one is counted by itself, in counters of its own.

    Those are the ones that start at K / 2.
    """

    weight = 1

    def __init__(self, pixels, vectors, lanes):
        super().__init__(pixels, vectors, lanes)
        self.singles, allocation = self._array("singles", "int32")
        self.allocations = self.allocations + allocation

    def start(self, initial=None):
        zero = T.splat(0, "int32", self.lanes)
        return super().start() + [self._put(self.singles, p, v, initial[p] if initial else zero) for p, v in self.cells]

    def single(self, p, v, data, weights):
        count = T.tirx.Cast(T.vector_type("int32", self.lanes), popcount(data[0] ^ weights[0]))
        return [self._put(self.singles, p, v, self._get(self.singles, p, v) - count)]

    def value(self, p, v):
        return super().value(p, v) + self._get(self.singles, p, v)


class Bytes(Adder):
    """Counts in bytes, for processors that count bits by looking nibbles up: widening to 32 bits waits for ``flush``."""

    flush_every = BYTE_STEPS

    def __init__(self, pixels, vectors, lanes):
        super().__init__(pixels, vectors, lanes)
        self.counts, allocation = self._array("counts", "uint32")
        self.allocations = self.allocations + allocation

    def start(self, initial=None):
        return super().start(initial) + [self._put(self.counts, p, v, T.splat(0, "uint32", self.lanes)) for p, v in self.cells]

    def _add(self, p, v, word):
        as_bytes = T.vector_type("uint8", 4 * self.lanes)
        count = T.tirx.reinterpret(as_bytes, self._get(self.counts, p, v)) + popcount(T.tirx.reinterpret(as_bytes, word))
        return self._put(self.counts, p, v, T.tirx.reinterpret(T.vector_type("uint32", self.lanes), count))

    def flush(self):
        statements = []
        for p, v in self.cells:
            counts = self._get(self.counts, p, v)
            low = T.splat(0x00FF00FF, "uint32", self.lanes)
            pairs, bind = T.bind("pairs", (counts & low) + ((counts >> T.splat(8, "uint32", self.lanes)) & low))
            count = (pairs + (pairs >> T.splat(16, "uint32", self.lanes))) & T.splat(0xFFFF, "uint32", self.lanes)
            statements += [bind, self._take(p, v, count), self._put(self.counts, p, v, T.splat(0, "uint32", self.lanes))]
        return statements


class CarrySaveBytes(Bytes, CarrySave):
    """Carries counted in bytes."""


class Tables(Adder):
    """Nibbles looked up by vpshufb, for AVX2: 32 channels in the bytes of one register.

    The table is that of an activation nibble a, popc(a ^ w) for the sixteen w, and the indices are weight nibbles: two operations for four
    bits of 32 channels. A vector of packed weights holds one byte of a word for each channel. Byte 4 l + j belongs to channel 8 j + l, so
    that :meth:`value` finds channels side by side when it takes bytes apart. A word adds up to 32 to its byte; ``flush`` widens to 16 bits.
    """

    flush_every = 7
    copies = True
    #: Longest sum that 16 bits hold.
    most_bits = 0xFFFF
    #: Rows of the table follow each other.
    table_bytes = 16 * 16

    def __init__(self, pixels, vectors, lanes):
        self.pixels, self.vectors, self.lanes = pixels, vectors, lanes
        self.counts = T.Registers("counts", pixels, "uint8", 4 * lanes)
        self.pairs = T.Registers("pairs", 2 * pixels, "uint32", lanes)
        self.allocations = self.counts.allocate + self.pairs.allocate

    @staticmethod
    def table(array):
        """Statements that write the table to ``array``."""
        nibbles = T.tirx.Cast("uint8x16", T.lane_numbers(16))
        rows = [popcount(nibbles ^ T.splat(a, "uint8", 16)) for a in range(16)]
        return [T.store_vector(array, [16 * a], row) for a, row in enumerate(rows)]

    @staticmethod
    def pack(words):
        """``uint32[..., 32]`` in the order of lanes of ``uint32[..., 32]``, one word for each of 32 channels."""
        octets = np.ascontiguousarray(words, "<u4").view("u1").reshape(*words.shape[:-1], 4, 8, 4)  # j, l, byte of the word
        octets = np.moveaxis(octets, (-1, -2, -3), (-3, -2, -1))
        return np.ascontiguousarray(octets).reshape(*words.shape[:-1], 128).view("<u4")

    def start(self, initial=None):
        self.initial = initial
        lanes = self.lanes
        return [self.counts.fill(T.splat(0, "uint8", 4 * lanes)), self.pairs.fill(T.splat(0, "uint32", lanes))]

    def nibbles(self, weights):
        """Low and high nibbles of a ``uint32`` vector, as indices."""
        low = T.splat(0x0F0F0F0F, "uint32", self.lanes)
        halves = (weights & low, (weights >> T.splat(4, "uint32", self.lanes)) & low)
        return [T.tirx.reinterpret(T.vector_type("uint8", 4 * self.lanes), half) for half in halves]

    def look_up(self, p, row, indices):
        """Statements that count a nibble: ``row`` is the activation's row of the table, ``uint8x16``.

        The sum does not saturate, but LLVM would regroup a plain one to add all terms of a word first, in more registers than there are.
        """
        row, bind = T.bind("row", row)
        found = T.intrinsic("llvm.x86.avx2.pshuf.b", T.shuffle([row, row], range(32)), indices)
        return [bind, self.counts.set(p, T.intrinsic("llvm.uadd.sat", self.counts.get(p), found))]

    def flush(self):
        low, statements = T.splat(0x00FF00FF, "uint32", self.lanes), []
        for p in range(self.pixels):
            counts, bind = T.bind("counts", T.tirx.reinterpret(T.vector_type("uint32", self.lanes), self.counts.get(p)))
            odd = (counts >> T.splat(8, "uint32", self.lanes)) & low
            statements += [
                bind,
                self.pairs.set(2 * p, self.pairs.get(2 * p) + (counts & low)),
                self.pairs.set(2 * p + 1, self.pairs.get(2 * p + 1) + odd),
                self.counts.set(p, T.splat(0, "uint8", 4 * self.lanes)),
            ]
        return statements

    def value(self, p, v):
        pair = self.pairs.get(2 * p + v % 2)
        count = pair >> T.splat(16, "uint32", self.lanes) if v >= 2 else pair & T.splat(0xFFFF, "uint32", self.lanes)
        initial = self.initial[p] if self.initial else T.splat(0, "int32", self.lanes)
        return initial - T.tirx.Cast(T.vector_type("int32", self.lanes), count)


class Zeros(Adder):
    """Takes twice the bits that differ and once the zeros. ``data`` is signs and zeros, alternating."""

    scale = 1

    def step(self, p, v, data, weights):
        count = None
        for signs, zeros, weight in zip(data[::2], data[1::2], self.decode(weights)):
            differ = popcount((signs ^ weight) & inverted(zeros))
            missing = differ + differ + popcount(zeros)
            count = missing if count is None else count + missing
        return [self._take(p, v, count)]

    def decode(self, weights):
        """Plain weight words."""
        return weights


class EncodedZeros(Zeros):
    """The same with the weights of :class:`CarrySave`."""

    words = 2

    def decode(self, weights):
        return [weights[0], weights[0] ^ weights[1]] if len(weights) == 2 else weights


def ternary_logic(a, b, c, table):
    """Bitwise function of three ``uint32x16`` vectors; bit 4a + 2b + c of ``table`` is its value (AVX-512 only)."""
    return T.intrinsic("llvm.x86.avx512.pternlog.d.512", a, b, c, T.constant(table, "int32"))
