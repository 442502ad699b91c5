"""The inner loop of binary layers on NEON: popc(a ^ w) for a tile of rows times channels.

Both operands run along K: a step takes 128 bits of each row and of each channel, and every pair of them is ``eor``, ``cnt`` and ``add``
into sixteen byte counters of its own. A tile of r rows and c channels has 3 r c such operations for r + c loads, half of which are ``ldp``.
Counters are added up when K is done, two operations for each sum; where K is longer than bytes can count, they go to 16-bit counters in
memory every 31 steps (``uadalp``).

Where K is short and ends within 64 bits of a step, the last step is a half: a vector holds the bits of two channels, and those of a row
twice, so that half the operations do. Its counts are added when neighbours were added once, and two channels share a vector anyway.
"""

from __future__ import annotations

import numpy as np
from tvm import tirx

from bnntvm.schedules import neon, neon_product_arm
from bnntvm.schedules import tir as T

#: Bits, and words, of one step.
STEP_BITS, STEP_WORDS = 128, 4
#: Channels whose sums become one vector.
QUAD = 4


def steps(words):
    """Number of steps for ``words`` 32-bit words of K."""
    return -(-words // STEP_WORDS)


def ends_with_half(words):
    """Whether K of so many words ends with a half step; bytes have to hold the sums of neighbours twice."""
    return words % STEP_WORDS in (1, 2) and 2 <= steps(words) <= 8


def pack_rows(words, channels, half=False):
    """Weights in the order in which :class:`Product` reads them.

    Parameters
    ----------
    words : uint32[N, words(K)]
    channels : int
        N, padded with zeros to a whole number of blocks of this many channels.
    half : bool
        Whether the last step has two words of each channel instead of four.

    Returns
    -------
    uint32[blocks, channels / 4, steps * 16 - (8 if half else 0)]
        Quads of channels; of each, step after step, the words of each of the four channels.
    """
    depth, blocks = steps(words.shape[1]), -(-len(words) // channels)
    padded = np.zeros((blocks * channels, depth * STEP_WORDS), "uint32")
    padded[: len(words), : words.shape[1]] = words
    packed = padded.reshape(blocks, channels // QUAD, QUAD, depth, STEP_WORDS).transpose(0, 1, 3, 2, 4)
    parts = [packed[:, :, :-1], packed[:, :, -1, :, : STEP_WORDS // 2]] if half else [packed]
    return np.concatenate([part.reshape(blocks, channels // QUAD, -1) for part in parts], axis=-1)


def product(isa, rows, depth, row, weight, zeros=None, unipolar=False, half=False):
    """The product of ``rows`` rows and a quad of channels; parameters as of :class:`Product`."""
    if isa.machine == "arm":
        return neon_product_arm.ArmProduct(rows, depth, row, weight, zeros, unipolar, half)
    return Product(isa, rows, 1, depth, row, weight, zeros, unipolar, half)


class Product:
    """Counts of a tile.

    Parameters
    ----------
    isa : Isa
    rows, quads : int
        Size of the tile; ``rows * quads * 4`` counters.
    depth : int
        Steps of K.
    row : function
        ``row(r, k)``: where the four words of row r at step k are, an array ``uint32`` and indices.
    weight : function
        ``weight(quad, c, k)``: where those of a channel are; the four channels of a quad lie side by side.
    zeros : function, optional
        ``zeros(r, k)``: where the bits of row r are that do not count.
    unipolar : bool
        AND instead of XOR.
    half : bool
        Whether the last step is a half (:func:`ends_with_half`; not with ``zeros``): ``row`` says where its two words lie, twice, and
        ``weight`` where those of two channels.
    """

    def __init__(self, isa, rows, quads, depth, row, weight, zeros=None, unipolar=False, half=False):
        self.isa, self.half = isa, half
        self.rows, self.quads, self.depth = rows, quads, depth
        self.row, self.weight, self.zeros, self.unipolar = row, weight, zeros, unipolar
        self.counts = T.Registers("counts", rows * quads * QUAD, "uint8", 16)
        self.long = depth > neon.BYTE_STEPS
        if self.long:
            self.totals = T.Registers("totals", rows * quads * QUAD, "uint16", 8)

    def _index(self, r, quad, c):
        return (r * self.quads + quad) * QUAD + c

    def statements(self):
        """Statements that count, to be placed before the use of :meth:`sums`."""
        allocate = [self.counts.allocate, self.totals.allocate if self.long else []]
        if not self.long:
            return [allocate, self._count(T.i64(0), self.depth - self.half)]
        chunks, rest = divmod(self.depth, neon.BYTE_STEPS)

        def chunk(begin, length):
            return [self._count(begin, length), self._flush()]

        body = [allocate, self.totals.fill(T.splat(0, "uint16", 8))]
        body.append(T.for_("chunk", chunks, lambda c: chunk(c * neon.BYTE_STEPS, neon.BYTE_STEPS)))
        return body + ([chunk(T.i64(chunks * neon.BYTE_STEPS), rest)] if rest else [])

    def _count(self, begin, length):
        """Count ``length`` steps; the first one sets the counters."""
        first = self._step(begin, True)
        if length == 1:
            return first
        count, bind = T.bind("steps", neon.hidden(length - 1))
        return [first, bind, T.for_("k", count, lambda k: [neon.rolled(), self._step(begin + 1 + k, False)])]

    def _step(self, k, first):
        body = []

        def name(value):
            variable, statement = T.bind("b", value)
            body.append(statement)
            return variable

        weights = [[name(neon.load_bytes(*self.weight(quad, c, k))) for c in range(QUAD)] for quad in range(self.quads)]
        for r in range(self.rows):
            a = name(neon.load_bytes(*self.row(r, k)))
            keep = name(~neon.load_bytes(*self.zeros(r, k))) if self.zeros else None
            for quad in range(self.quads):
                for c in range(QUAD):
                    w, index = weights[quad][c], self._index(r, quad, c)
                    bits = a & w if self.unipolar else a ^ w
                    count = tirx.popcount(bits if keep is None else bits & keep)
                    body.append(self.counts.set(index, count if first else self.counts.get(index) + count))
        return body

    def _flush(self):
        return [self.totals.set(i, neon.widen(self.totals.get(i), self.counts.get(i), self.isa)) for i in range(len(self.counts.arrays))]

    def sums(self, r, quad):
        """``int32x4``: counts of row r and the channels of a quad."""
        first = self._index(r, quad, 0)
        counts, most = (self.totals, 8 * 2 * self.depth) if self.long else (self.counts, 8 * self.depth)
        return neon.four_sums([counts.get(first + c) for c in range(QUAD)], most, self.isa, self._tails(r, quad) if self.half else ())

    def _tails(self, r, quad):
        """Counts of the half step, two channels in each vector."""
        last, tails = T.i64(self.depth - 1), []
        a = neon.load_bytes(*self.row(r, last))
        for pair in range(QUAD // 2):
            w = neon.load_bytes(*self.weight(quad, pair, last))
            tails.append(tirx.popcount(a & w if self.unipolar else a ^ w))
        return tails
