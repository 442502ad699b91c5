"""Sums of bit planes by looking them up: the algebra, the packing and the loops' bookkeeping of :mod:`.bitserial_conv2d_lookup`.

For ``bits`` input channels of a pixel there are 2 ** bits sums with weights of one bit each. They are written to a table once for each
pixel, as bytes, and every output channel looks its sum up: one shuffle of bytes and one addition for ``bits`` products in each byte of a
register, whatever the number of activation planes (vpermb looks 6 bits up, vpshufb and NEON's tbl 4).

Activations are made non-negative, plane by plane: c * b = -|c| + |c| (1 - b) for c < 0, and a bipolar plane is c - 2 c b. With a = base +
A, A = sum(e[p] * b'[p]) between 0 and E = sum(e), and a weight bit b,

    bipolar    sum(A (1 - 2 b)) = sum(e[p] * popc(b'[p] ^ b)) - E popc(b)
    unipolar   sum(A b)         = sum(e[p] * popc(b'[p] & b))

so the table holds the first sums and what is left depends on the weights alone. A ternary plane is two unipolar ones. Planes whose sum
would fill a byte too soon are split into parts with tables of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, inf, prod

import numpy as np

from bnntvm.schedules import epilogue, neon
from bnntvm.schedules.binary_conv2d_tiles import Geometry
from bnntvm.schedules.bitserial_adders import Share
from bnntvm.spec import WORD_BITS, words

#: Largest sum of the (reduced) coefficients of a part: three binary digits.
MOST = 7


@dataclass(frozen=True)
class Part:
    """Data planes that share a table: sum(factor * weights[i] * (plane ^ inverted[i]))."""

    planes: tuple[int, ...]
    weights: tuple[int, ...]
    inverted: tuple[bool, ...]
    factor: int

    @property
    def high(self):
        """Largest sum of one input channel."""
        return sum(self.weights)


def shape(isa):
    """``(bits of an index, entries of a table in memory)``, or None where bytes are not looked up."""
    if neon.is_neon(isa):
        return 4, 16
    if isa.lanes < 8:
        return None
    return (6, 64) if isa.lanes == 16 and isa.popcount == "vector" else (4, 16)


def octets(isa):
    """Bytes of a vector of indices, one for each output channel: a register, or two of NEON, so that there are whole words of channels."""
    return max(32, 4 * isa.lanes)


def terms(planes):
    """``(base, e, inverted)``: activations are base + sum(e[p] * (plane p ^ inverted[p]))."""
    if planes.data_kind == "bipolar":  # c - 2 c b
        signed, base = [-2 * c for c in planes.data], sum(planes.data)
    else:
        signed, base = list(planes.data), 0
    return base + sum(c for c in signed if c < 0), [abs(c) for c in signed], [c < 0 for c in signed]


def parts(planes):
    """The data planes as few :class:`Part`, or None if a plane has too many neighbours in between."""
    _, e, inverted = terms(planes)
    order = sorted(range(len(e)), key=lambda p: e[p])
    for count in range(1, len(e) + 1):
        size = -(-len(e) // count)
        found = []
        for chunk in (order[i : i + size] for i in range(0, len(order), size)):
            factor = gcd(*(e[p] for p in chunk))
            found.append(Part(tuple(chunk), tuple(e[p] // factor for p in chunk), tuple(inverted[p] for p in chunk), factor))
        if all(part.high <= MOST for part in found):
            return found
    return None


def flush_every(planes, isa):
    """Steps after which counters of bytes may be full."""
    return 255 // (shape(isa)[0] * max(part.high for part in parts(planes)))


def weight_coefficients(planes):
    """Coefficients of the weight planes of one bit."""
    return tuple(c * sign for c in planes.weights for sign in ((1, -1) if planes.weight_kind == "ternary" else (1,)))


def weight_bits(planes, weights, bits):
    """bool[Q, O, taps, bits]: the weight planes of one bit, of packed words uint32[Q', O, kh, kw, words]."""
    plane = epilogue.unpack(weights, bits)
    if planes.weight_kind == "ternary":
        signs, mask = plane[0::2], plane[1::2]
        plane = np.stack([mask & ~signs, signs], axis=1).reshape(-1, *signs.shape[1:])
    return plane.reshape(*plane.shape[:2], -1, bits)


def share(planes, channels, width):
    """What the weights of a tap contribute, of the planes of :func:`weight_bits`; ``width`` bits of an index.

    Bits past the last channel are 0 in data and weights; an inverted plane counts them as ones where it is xored.
    """
    base, e, inverted = terms(planes)
    constant, factor = 0, base
    if planes.weight_kind == "bipolar":
        tail = -channels % width * sum(w for w, turned in zip(e, inverted) if turned)
        constant, factor = base * channels - tail, -2 * base - sum(e)
    coefficients = weight_coefficients(planes)
    factors = tuple((q, c * factor) for q, c in enumerate(coefficients) if c * factor)
    return Share(constant * sum(coefficients), factors)


def claims(spec, isa):
    """Whether a kernel can look the sums up; totals have 16 bits. Indices of few channels may take much more memory than planes."""
    if shape(isa) is None or spec.groups > 1 or spec.zeros or spec.planes.scaled or parts(spec.planes) is None:
        return False
    width, _ = shape(isa)
    _, _, padded = steps(spec.window.kernel, spec.in_channels, width)
    if padded * width > 1.1 * prod(spec.window.kernel) * words(spec.in_channels) * WORD_BITS:
        return False
    count = prod(spec.window.kernel) * spec.in_channels
    return all(count * part.high < 2**16 for part in parts(spec.planes))


def pairs_fit(spec):
    """Whether counting two words at a time pays: not with ternary weights, whose logic has no operand free, nor where runs are one word."""
    geometry = Geometry.of(spec)
    return spec.planes.weight_kind != "ternary" and (geometry.group_words > 1 or geometry.contiguous and geometry.kernel[1] > 1)


def counting_one(isa, fit=True):
    """Instructions for a product of one bit by one bit that is counted: a word takes a logic operation, a population count (six
    instructions where it is done with nibble tables) and an addition; two words together take two more than a population count and an
    addition."""
    if neon.is_neon(isa):  # two words together take as many
        return 3 / (32 * isa.lanes)
    population = 1 if isa.popcount == "vector" else 6
    return ((4 + population) / 2 if fit else 2 + population) / (32 * isa.lanes)


def counting(spec, isa):
    """Instructions for a product if the bits of every pair of planes are counted."""
    return len(spec.planes.data) * len(spec.planes.weights) * counting_one(isa, pairs_fit(spec))


def looking_up(spec, isa):
    """The same if sums are looked up, infinite where that is not possible.

    A look-up is a shuffle, an addition, and three instructions when the byte counters are emptied. A table takes four instructions for each
    plane, and its store costs as much as fourteen: tables do not fit in the first-level cache (Emerald Rapids, measured).
    """
    if not claims(spec, isa):
        return inf
    planes, (width, _) = spec.planes, shape(isa)
    found, lanes, one = parts(planes), octets(isa), 3 if isa.machine == "arm" else 2
    empties = sum(3 / (255 // (width * part.high)) for part in found)
    filled = -(-spec.out_channels // lanes) * lanes / spec.out_channels
    look_ups = len(weight_coefficients(planes)) * (one * len(found) + empties) * filled / (width * 4 * isa.lanes)
    return look_ups + (4 * len(planes.data) + 14) / (width * prod(spec.window.kernel) * spec.out_channels)


def pack(plane, isa):
    """Indices of all steps, packed: uint32[vectors, Q, words].

    Parameters
    ----------
    plane : bool[Q, O, taps, bits]

    Returns
    -------
    ndarray
        A vector holds as many output channels as a register bytes (V): byte 4 i + j is channel j * V / 4 + i. Steps run over taps, then
        groups of input channels. Four steps of 6 bits are three bytes, the fourth step in their upper two bits; two of 4 bits are one.
    """
    width, _ = shape(isa)
    lanes = octets(isa)
    count, outputs, taps, channels = plane.shape
    vectors, groups = -(-outputs // lanes), -(-channels // width)
    padded = np.zeros((count, vectors * lanes, taps, groups * width), np.uint8)
    padded[:, :outputs, :, :channels] = plane
    digits = np.arange(width, dtype=np.uint8)
    values = np.sum(padded.reshape(count, vectors, lanes, taps * groups, width) << digits, -1, dtype=np.uint8)
    values = values.reshape(count, vectors, 4, lanes // 4, -1).transpose(1, 0, 4, 3, 2).reshape(vectors, count, -1, lanes)
    values = np.pad(values, ((0, 0), (0, 0), (0, -values.shape[2] % together(width)), (0, 0)))
    if width == 4:
        packed = values[:, :, 0::2] | values[:, :, 1::2] << 4
    else:
        last = values[:, :, 3::4]
        packed = np.stack([values[:, :, i::4] | (last >> 2 * i & 3) << 6 for i in range(3)], axis=3)
    return np.ascontiguousarray(packed.reshape(vectors, count, -1)).view(np.uint32)


def together(width):
    """Steps that are packed together."""
    return 4 if width == 6 else 2


def steps(kernel, channels, width):
    """``(groups of input channels, steps of a weight plane, the same padded)``."""
    groups = -(-channels // width)
    count = kernel[0] * kernel[1] * groups
    return groups, count, -(-count // together(width)) * together(width)
