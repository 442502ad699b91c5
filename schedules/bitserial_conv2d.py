"""Convolution of sums of bit planes: the family of :class:`bnntvm.spec.PlanesConv2d`.

One kernel for all pairs of planes, see :mod:`.bitserial_conv2d_kernel` for the loops, :mod:`.bitserial_adders` for the algebra.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bnntvm.schedules import bitserial_lookup as lookup
from bnntvm.schedules import by_bytes, epilogue, neon
from bnntvm.schedules.binary_conv2d import _convolve, _tasks, _tile_width
from bnntvm.schedules.binary_conv2d_tiles import Geometry
from bnntvm.schedules.bitserial_conv2d_kernel import PlanesKernel
from bnntvm.schedules.bitserial_conv2d_lookup import MOST_UNROLLED, LookupKernel
from bnntvm.spec import WORD_BITS, words


@dataclass(frozen=True)
class Schedule:
    """What may be tuned.

    Attributes
    ----------
    pixels : int
        Pixels of a row in the register tile.
    vectors : int
        Vectors of output channels in the register tile; times the lanes, a divisor of 32.
    adder : str
        ``plain`` or ``pairs``, see :mod:`.bitserial_adders`; ``lookup``, see :mod:`.bitserial_lookup`: then ``vectors`` counts registers
        of one byte for each output channel, and tasks have all blocks; ``bytes``, see :mod:`.by_bytes`.
    task_rows, task_blocks : int
        Output rows and blocks of 32 output channels of one parallel task.
    """

    pixels: int
    vectors: int
    adder: str
    task_rows: int
    task_blocks: int


def default_schedule(spec, isa):
    """A schedule that is fast without tuning."""
    rate = isa.bit_macs * lookup.counting_one(isa) / min(lookup.counting(spec, isa), lookup.looking_up(spec, isa))
    if by_bytes.wins(spec, isa) and isa.int8_macs > rate:
        pixels, rows, blocks = by_bytes.numbers(spec, isa)
        return Schedule(pixels, 1, by_bytes.ADDER, rows, blocks)
    found = lookup_schedule(spec, isa)
    return found if found is not None and lookup.looking_up(spec, isa) < lookup.counting(spec, isa) else _counting_schedule(spec, isa)


def _counting_schedule(spec, isa):
    geometry, adder = Geometry.of(spec), "pairs" if lookup.pairs_fit(spec) and not neon.is_neon(isa) else "plain"
    if isa.popcount != "vector":  # table look-ups need the registers
        vectors, most = (1, 7) if isa.registers == 32 else (1, 2)
    else:
        narrow = adder == "pairs" or epilogue.half_a_word_is_left(spec.out_channels, isa)
        vectors, most = (1, 13) if narrow else (2, 12 if spec.planes.words_per_weight == 1 else 11)
    return Schedule(_tile_width(geometry, most), vectors, adder, *_tasks(geometry, words(spec.out_channels)))


def lookup_schedule(spec, isa):
    """A schedule for sums that are looked up, or None where that is not possible."""
    if not lookup.claims(spec, isa):
        return None
    geometry, count = Geometry.of(spec), -(-spec.out_channels // lookup.octets(isa))
    vectors = 2 if count % 2 == 0 else 1
    return Schedule(_lookup_tile(spec, isa, vectors), vectors, "lookup", _tasks(geometry, 1, 4)[0], 1)


def _lookup_tile(spec, isa, vectors):
    """The tile width that computes the fewest pixels twice; of those the largest that is unrolled as a whole, or the largest."""
    width, most = Geometry.of(spec).out_width, _lookup_pixels(isa, vectors)
    look_ups = vectors * lookup.flush_every(spec.planes, isa)
    return min(range(min(width, 6, most), min(width, most) + 1), key=lambda p: (-(-width // p) * p, p * look_ups > MOST_UNROLLED, -p))


def _lookup_pixels(isa, vectors):
    """Pixels whose byte counters take three quarters of the registers, less on NEON, where LLVM moves them about otherwise."""
    counters = isa.registers * 3 // 4 if not neon.is_neon(isa) else 20 if isa.registers == 32 else 6
    return max(1, counters * 4 * isa.lanes // (vectors * lookup.octets(isa)))


def space(spec, isa):
    """Schedules worth trying, the default first."""
    first = _counting_schedule(spec, isa)
    found, width = [default_schedule(spec, isa), first], Geometry.of(spec).out_width
    for adder in ("plain", "pairs") if lookup.pairs_fit(spec) else ("plain",):
        for vectors in (1, 2, 4):
            weights = vectors * max(spec.planes.words_per_weight, 2 if adder == "pairs" else 1)
            cells = (isa.registers - weights - 1) // (2 if adder == "pairs" else 1)
            if WORD_BITS % (vectors * isa.lanes):
                continue
            for pixels in range(1, min(width, 14, cells // vectors) + 1):
                found.append(replace(first, pixels=pixels, vectors=vectors, adder=adder))
    found += [Schedule(pixels, 1, by_bytes.ADDER, rows, blocks) for pixels, rows, blocks in by_bytes.space(spec, isa)]
    looked_up, count = lookup_schedule(spec, isa), -(-spec.out_channels // lookup.octets(isa))
    for vectors in [v for v in (1, 2, 4) if looked_up and count % v == 0]:
        for pixels in range(1, min(width, _lookup_pixels(isa, vectors)) + 1):
            found.append(replace(looked_up, pixels=pixels, vectors=vectors))
    return list(dict.fromkeys(found))


def pack_weights(spec, schedule, isa, weights):
    """Bring weights into the kernel's layout.

    Parameters
    ----------
    weights : uint32[Q', O, kh, kw, words(in_channels / groups)]
        Planes of words, tail bits 0.

    Returns
    -------
    uint32[words(O), elements]
        For a block of 32 output channels: for each weight plane and part of ``schedule.vectors`` vectors the words, one channel per lane,
        of a ternary plane signs and mask in turn. For sums that are looked up see :func:`.bitserial_lookup.pack`, for products of bytes
        :mod:`.int8_conv2d`.
    """
    if schedule.adder == by_bytes.ADDER:
        return by_bytes.pack_weights(spec, schedule, isa, weights)
    if schedule.adder == "lookup":
        indices = lookup.pack(lookup.weight_bits(spec.planes, weights, spec.in_channels), isa)
        return indices.reshape(len(indices), -1)
    planes, blocks, channels = spec.planes, words(spec.out_channels), schedule.vectors * isa.lanes
    halves = planes.words_per_weight
    flat = np.zeros((len(weights), blocks * WORD_BITS, int(np.prod(weights.shape[2:]))), "uint32")
    flat[:, : spec.out_channels] = weights.reshape(*weights.shape[:2], -1)
    if spec.dense_groups:  # to the place that the channel's group has in its word
        groups = np.arange(flat.shape[1], dtype="uint32") // (spec.out_channels // spec.groups)
        flat <<= (groups * (spec.in_channels // spec.groups) % WORD_BITS)[:, None]
    parts = flat.reshape(-1, halves, blocks, WORD_BITS // channels, channels, flat.shape[-1])
    return np.ascontiguousarray(parts.transpose(2, 0, 3, 5, 1, 4)).reshape(blocks, -1)


def reference(spec, operands, epilogue_inputs):
    """The kernel in numpy: slow and plain.

    Parameters
    ----------
    operands : list of ndarray
        The data planes, canonical weights (not packed), the zeros' mask if ``spec.zeros``, the scales if ``spec.planes.scaled``.
    """
    count, rest = len(spec.planes.data), list(operands[len(spec.planes.data) :])
    weights, zeros = rest.pop(0), rest.pop(0) if spec.zeros else None

    def product(p, q):
        return _product(spec, operands[p], weight_values(spec.planes, weights, q, spec.in_channels // spec.groups), zeros)

    dots = [product(p, q) for p in range(count) for q in range(len(spec.planes.weights))]
    return epilogue.reference(spec.epilogue, total(spec.planes, dots, rest), epilogue_inputs)


def total(planes, dots, scales):
    """The sum over pairs of planes; ``dots``: int32 arrays in the order of pairs, ``scales``: a list of the operand, if there is one."""
    if planes.scaled:
        result = None
        for dot, scale in zip(dots, scales[0]):
            value = dot.astype(np.float32) * scale[: dot.shape[-1]]
            result = value if result is None else result + value
        return result
    coefficients = [a * w for a in planes.data for w in planes.weights]
    return sum(np.int32(c) * dot for c, dot in zip(coefficients, dots)).astype(np.int32)


def weight_values(planes, weights, q, bits):
    """int64[O, ..., bits]: the values of weight plane ``q`` of the words ``weights``."""
    if planes.weight_kind == "ternary":
        signs, mask = (epilogue.unpack(weights[2 * q + half], bits).astype(np.int64) for half in (0, 1))
        return mask * (1 - 2 * signs)
    plane = epilogue.unpack(weights[q], bits).astype(np.int64)
    return plane if planes.weight_kind == "unipolar" else 1 - 2 * plane


def _product(spec, data, weights, zeros):
    """int32[N, OH, OW, O]: the product of one data plane with values of weights."""
    outputs, result = spec.out_channels // spec.groups, []
    for group in range(spec.groups):
        values = _group(spec, data, group).astype(np.int64)
        if spec.planes.data_kind == "bipolar":
            values = 1 - 2 * values
        if zeros is not None:
            values = values * ~_group(spec, zeros, group)
        result.append(_convolve(spec.window, values, weights[group * outputs : (group + 1) * outputs]))
    return np.concatenate(result, axis=-1).astype(np.int32)


def _group(spec, data, group):
    """bool[N, H, W, in_channels / groups] of one group."""
    bits = spec.in_channels // spec.groups
    if spec.dense_groups:
        return epilogue.unpack(data, spec.in_channels)[..., group * bits : (group + 1) * bits]
    return epilogue.unpack(data[..., group * words(bits) : (group + 1) * words(bits)], bits)


def stores_planar(spec, _isa):
    """Whether the kernel can store its one result in channel order (output kind ``planar``)."""
    return [o.kind for o in spec.epilogue.outputs] == ["tensor"]


def build(spec, schedule, isa):
    """The kernel.

    Returns
    -------
    tirx.PrimFunc
        Parameters: data planes, weights (see :func:`pack_weights`), the zeros' mask if ``spec.zeros``, scales if ``spec.planes.scaled``,
        epilogue inputs, epilogue outputs. The leading dimension is symbolic.
    """
    if schedule.adder == by_bytes.ADDER:
        return by_bytes.build(spec, schedule, isa)
    kernel = LookupKernel if schedule.adder == "lookup" else PlanesKernel
    return kernel(spec, schedule, isa).build()
