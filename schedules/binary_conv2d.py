"""Convolution of packed bit planes: the family of :class:`bnntvm.spec.BinaryConv2d`.

A direct convolution: a register tile of pixels times output channels, the activation word broadcast, the weights one word per channel and
lane, ``a ^ w`` counted into the lanes. See :mod:`.binary_conv2d_kernel` for the loops, :mod:`.binary_conv2d_adders` for the ways to count.
Depthwise convolutions count all bits of a word side by side, see :mod:`.binary_conv2d_sliced`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bnntvm.schedules import binary_conv2d_neon as neon
from bnntvm.schedules import binary_conv2d_sliced as sliced
from bnntvm.schedules import by_bytes, epilogue, tile_product
from bnntvm.schedules.binary_conv2d_adders import Tables
from bnntvm.schedules.binary_conv2d_kernel import Kernel
from bnntvm.schedules.binary_conv2d_tiles import Geometry, pools
from bnntvm.spec import POOLED, WORD_BITS, words

#: Fields of a schedule that cut the work into parallel tasks.
GRAIN = ("task_rows", "task_blocks")
#: Words of a window from which on pairs of them go through full adders.
_MANY_WORDS = 16
#: First-level data cache of the processors that count vectors by one instruction.
_FIRST_LEVEL_BYTES = 32 << 10


#: Pixels of an image whose tensors a network's other layers drive out of the second-level cache: 56 x 56, not 28 x 28.
_FAR_PIXELS = 2048


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
        ``plain``, ``carry_save`` or ``tables``, see :mod:`.binary_conv2d_adders`; ``neon``, see :mod:`.binary_conv2d_neon`; ``planes``,
        see :mod:`.tile_product`.
    task_rows, task_blocks : int
        Output rows and blocks of 32 output channels of one parallel task.
    prefetch : bool
        Ask for the lines of the tensors that a tile's epilogue reads and writes before its products are computed.
    fetch : bool
        Ask for the weights of the next 32 output channels while those of the present ones are used.
    """

    pixels: int
    vectors: int
    adder: str
    task_rows: int
    task_blocks: int
    prefetch: bool = False
    fetch: bool = False


def default_schedule(spec, isa):
    """A schedule that is fast without tuning.

    Returns
    -------
    Schedule
    """
    if neon.claims(spec, isa) and not sliced.claims(spec):
        pixels, rows, blocks = neon.schedule_numbers(spec, isa)
        return Schedule(pixels, 1, "neon", rows, blocks)
    if pools(spec.epilogue):
        return _counting_schedule(spec, isa)
    if tile_product.wins(spec, isa):
        pixels, vectors, rows = tile_product.numbers(spec)
        return Schedule(pixels, vectors, tile_product.ADDER, rows, 1)
    if by_bytes.wins(spec, isa):
        pixels, rows, blocks = by_bytes.numbers(spec, isa)
        return Schedule(pixels, 1, by_bytes.ADDER, rows, blocks)
    return _counting_schedule(spec, isa)


def _counting_schedule(spec, isa):
    geometry = Geometry.of(spec)
    carry_save = _carry_save_pays(spec, isa)
    if isa.popcount != "vector":  # table look-ups need the registers: narrow tiles unless there are 32
        vectors, most = (1, 7) if isa.registers == 32 else (1, 2)
    elif carry_save:
        vectors, most = 1, 13
    elif isa.vendor == "AMD":
        vectors, most = (2 if _two_blocks_fit(geometry) else 1), 13
    else:
        vectors, most = (1, 7) if _carry_save_fits(spec) else (2, 12)
    # Tiles of one vector leave the other out of the last block, a quarter of the work for 48 channels.
    if vectors == 2 and epilogue.half_a_word_is_left(spec.out_channels, isa):
        vectors, most = 1, 13
    adder = "carry_save" if carry_save else "plain"
    task_rows, task_blocks = _tasks(geometry, words(spec.out_channels))
    task_rows += task_rows % 2 * pools(spec.epilogue)  # pairs of rows are pooled
    # Weights that are used once pass by in order, which the processor sees by itself.
    fetch = geometry.out_height * geometry.out_width > 1
    if _tables_fit(spec, isa) and geometry.out_width >= 4:  # else splitting the weights into nibbles costs more than it saves
        return Schedule(_tile_width(geometry, 7), 4, "tables", task_rows, task_blocks, fetch=True)
    zen = _is_zen4(isa)
    # Layers of few channels, as of dense blocks, read their data once or twice: wide tiles make them 1 to 2 % faster on Zen 4.
    pixels = _tile_width(geometry, most, 7 if zen and words(spec.out_channels) <= 2 else 4)
    return Schedule(pixels, vectors, adder, task_rows, task_blocks, zen and _leaves_the_cache(spec, geometry), fetch)


def _is_zen4(isa):
    """Whether the processor is one of AMD's that count vectors by one instruction."""
    return isa.vendor == "AMD" and isa.popcount == "vector"


def _has_tensors(epilogue):
    """Whether an epilogue reads or stores values of every pixel that are no bits."""
    return any(end.kind == "tensor" for end in (*epilogue.inputs, *epilogue.outputs))


def _carry_save_fits(spec):
    """Whether there are pairs of words, and the data of all channels are the same words, so that encoding them is cheap."""
    return spec.groups == 1 and Geometry.of(spec).group_words > 1


def _carry_save_pays(spec, isa):
    """Whether encoding the data is repaid. Where vectors are counted by one instruction, it saves one operation of six for two words: that
    takes many words, none of which is left over, and a processor that loads as fast as it computes. AMD's Zen 4 loads one vector of 512
    bits a cycle beside two operations, and plain counting was 3 to 10 % faster there in nearly all layers of the zoo."""
    if _is_zen4(isa):
        return False
    geometry = Geometry.of(spec)
    height, width = geometry.kernel
    many = geometry.group_words % 2 == 0 and height * width * geometry.group_words >= _MANY_WORDS
    return _carry_save_fits(spec) and (many or isa.popcount != "vector")


def _two_blocks_fit(geometry):
    """Whether the first-level cache holds the weights of two blocks of 32 output channels: one in use, and the next that is asked for."""
    height, width = geometry.kernel
    return 2 * height * width * geometry.group_words * WORD_BITS * 4 <= _FIRST_LEVEL_BYTES


def _leaves_the_cache(spec, geometry):
    """Whether an epilogue's tensors come from beyond the second-level cache, and a tile takes long enough to wait for them: 1 to 4 % of
    such layers on Zen 4."""
    height, width = geometry.kernel
    many = height * width * geometry.group_words >= 2 * _MANY_WORDS
    return _has_tensors(spec.epilogue) and many and geometry.out_height * geometry.out_width >= _FAR_PIXELS


def _tables_fit(spec, isa):
    """Whether the nibbles of bipolar data without zeros can be looked up: with AVX2, and sums that 16 bits hold."""
    height, width = spec.window.kernel
    short = height * width * spec.in_channels <= Tables.most_bits
    return isa.lanes == 8 and isa.popcount == "shuffle" and spec.groups == 1 and short and not spec.zeros and not spec.unipolar


def _tile_width(geometry, most, few=4):
    """The tile width that computes the fewest pixels twice; of those the smallest that keeps all ports busy.

    ``few`` pixels do for long sums; short ones, as of 1x1 kernels, need more work for each start of a loop; single words have no loop.
    """
    width, kernel_words = geometry.out_width, geometry.kernel[0] * geometry.kernel[1] * geometry.group_words
    least = max(few, min(7, -(-126 // kernel_words))) if kernel_words > 1 else 4
    return min(range(min(width, least), min(width, most) + 1), key=lambda p: (-(-width // p) * p, p), default=min(width, most))


def _tasks(geometry, blocks, wanted=8):
    """Rows and blocks per task, so that there are about ``wanted`` tasks of equal size.

    A task reads all weights of its blocks from the second-level cache: with fewer than about a hundred pixels that shows.
    """
    rows, width = geometry.out_height, geometry.out_width
    heights = {d: -(-rows // d) for d in (1, 2, 4, 8) if d <= min(wanted, rows)}
    fair = [d for d, height in heights.items() if -(-rows // height) == d and height * d <= rows * 1.15]
    row_tasks = max([d for d in fair if rows * width >= 96 * d], default=1)
    task_rows = -(-rows // row_tasks)
    block_tasks = max(d for d in range(1, wanted // row_tasks + 1) if blocks % d == 0)
    return task_rows, blocks // block_tasks


def space(spec, isa):
    """Schedules worth trying, the default first.

    Returns
    -------
    list of Schedule
    """
    first = default_schedule(spec, isa)
    found = [first]
    if first.adder in (by_bytes.ADDER, tile_product.ADDER):
        first = _counting_schedule(spec, isa)
        found.append(first)
    if sliced.claims(spec):
        return [replace(first, task_rows=rows) for rows in dict.fromkeys((first.task_rows, 1, 4, spec.window.out_height))]
    if first.adder == "neon":
        return neon.space(spec, isa, first)
    width = Geometry.of(spec).out_width
    if _tables_fit(spec, isa):
        found += [replace(first, pixels=pixels, vectors=4, adder="tables") for pixels in range(1, min(width, 13) + 1)]
    adders = ["plain", "carry_save"] if _carry_save_fits(spec) else ["plain"]
    for adder in adders:
        for vectors in (1, 2, 4):
            cells = isa.registers // (2 if adder != "plain" else 1) - vectors - 1
            if WORD_BITS % (vectors * isa.lanes):
                continue
            for pixels in range(1, min(width, 14, cells // vectors) + 1):
                found.append(replace(first, pixels=pixels, vectors=vectors, adder=adder))
    # One row at a time with all blocks is the other loop order: the data stay in the first-level cache and the weights pass by.
    rows, blocks = Geometry.of(spec).out_height, words(spec.out_channels)
    pooled = pools(spec.epilogue)
    row_counts = dict.fromkeys(r for r in (first.task_rows, 1, 2, 4, 7, 14, 28, rows) if r <= rows and not (pooled and r % 2))
    block_counts = dict.fromkeys(b for b in (first.task_blocks, 1, 2, 4, 8, blocks) if b <= blocks)
    own = [replace(s, fetch=not s.fetch) for s in dict.fromkeys(found)]
    found = [replace(s, task_rows=r, task_blocks=b) for r in row_counts for b in block_counts for s in dict.fromkeys(found)]
    found += own
    if _has_tensors(spec.epilogue):
        found += [replace(s, prefetch=True) for s in found if s.adder != by_bytes.ADDER]
    if pooled:
        return found
    if tile_product.claims(spec, isa):
        found += [Schedule(pixels, vectors, tile_product.ADDER, rows, 1) for pixels, vectors, rows in tile_product.space(spec)]
    tiles = by_bytes.space(spec, isa) if isa.products == "tiles" else []
    return found + [Schedule(pixels, 1, by_bytes.ADDER, rows, blocks) for pixels, rows, blocks in tiles]


def pack_weights(spec, schedule, isa, weights):
    """Bring weights into the kernel's layout.

    Parameters
    ----------
    weights : uint32[O, kh, kw, words(in_channels / groups)]
        Bit 1 <-> -1, tail bits 0.

    Returns
    -------
    uint32[words(O), parts * kh * kw * words(in_channels / groups) * channels], parts * channels = 32
        ``channels`` output channels side by side, one per lane. For ``carry_save`` the second word of each
        pair of a tap is xored with the first. ``tables``: see :meth:`.binary_conv2d_adders.Tables.pack`.
        Other layouts for depthwise convolutions, see :mod:`.binary_conv2d_sliced`, and for products of bytes, see :mod:`.int8_conv2d` and
        :mod:`.tile_product`.
    """
    if schedule.adder == by_bytes.ADDER:
        return by_bytes.pack_weights(spec, schedule, isa, weights)
    if schedule.adder == tile_product.ADDER:
        return tile_product.pack_weights(spec, weights)
    if sliced.claims(spec):
        return sliced.pack_weights(weights)
    if schedule.adder == "neon":
        return neon.pack_weights(spec, weights)
    blocks, channels = words(spec.out_channels), schedule.vectors * isa.lanes
    flat = np.zeros((blocks * WORD_BITS, int(np.prod(weights.shape[1:]))), "uint32")
    flat[: spec.out_channels] = weights.reshape(weights.shape[0], -1)
    if spec.dense_groups:  # to the place that the channel's group has in its word
        groups = np.arange(len(flat), dtype="uint32") // (spec.out_channels // spec.groups)
        flat <<= (groups * (spec.in_channels // spec.groups) % WORD_BITS)[:, None]
    if schedule.adder == "carry_save":
        taps = flat.reshape(len(flat), -1, weights.shape[-1])
        pairs = weights.shape[-1] // 2 * 2
        taps[..., 1:pairs:2] ^= taps[..., 0:pairs:2]
    parts = flat.reshape(blocks, WORD_BITS // channels, channels, -1)
    if schedule.adder == "tables":
        return Tables.pack(parts.transpose(0, 1, 3, 2)).reshape(blocks, -1)
    return np.ascontiguousarray(parts.transpose(0, 1, 3, 2)).reshape(blocks, -1)


def reference(spec, operands, epilogue_inputs):
    """The kernel in numpy: slow and plain.

    Parameters
    ----------
    spec : BinaryConv2d
    operands : list of ndarray
        Data, canonical weights ``uint32[O, kh, kw, words(in_channels / groups)]`` (not packed), the zeros' mask if ``spec.zeros``.
    epilogue_inputs : list of ndarray

    Returns
    -------
    list of ndarray
        The epilogue's outputs.
    """
    return epilogue.reference(spec.epilogue, _dot_products(spec, *operands), epilogue_inputs)


def pads_with_ones(spec, isa):
    """Whether padding with +1 is better left out and corrected, as for ``spec.plus_one``, than written into the data before.

    It saves the padded taps, and costs two operations for each result beside five for two words.
    """
    fits = isa.popcount == "vector" and spec.groups == 1 and not (spec.zeros or spec.unipolar)
    if not fits or neon.claims(spec, isa) or sliced.claims(spec):
        return False
    geometry, taps = Geometry.of(spec), spec.window.kernel[0] * spec.window.kernel[1]
    sizes = (geometry.out_height, geometry.out_width)
    rows, columns = (sum(b - a for a, b in (geometry.taps(axis, i) for i in range(sizes[axis]))) for axis in (0, 1))
    return 1 - rows * columns / (sizes[0] * sizes[1] * taps) > 1 / (taps * geometry.group_words)


def _dot_products(spec, data, weights, zeros=None):
    if spec.plus_one:
        top, left, bottom, right = spec.window.pads
        data = np.pad(data, ((0, 0), (top, bottom), (left, right), (0, 0)))  # bit 0 <-> +1
        height, width = spec.window.in_height + top + bottom, spec.window.in_width + left + right
        spec = replace(spec, plus_one=False, window=replace(spec.window, in_height=height, in_width=width, pads=(0, 0, 0, 0)))
    bits, outputs = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    result = []
    for group in range(spec.groups):
        values = _group_plane(spec, data, group).astype(np.int64)
        if not spec.unipolar:
            values = 1 - 2 * values
        if zeros is not None:
            values = values * ~_group_plane(spec, zeros, group)
        kernel = 1 - 2 * epilogue.unpack(weights[group * outputs : (group + 1) * outputs], bits).astype(np.int64)
        result.append(_convolve(spec.window, values, kernel))
    return np.concatenate(result, axis=-1).astype(np.int32)


def _group_plane(spec, data, group):
    """bool ``[N, H, W, in_channels / groups]`` of one group."""
    bits = spec.in_channels // spec.groups
    if spec.dense_groups:
        return epilogue.unpack(data, spec.in_channels)[..., group * bits : (group + 1) * bits]
    return epilogue.unpack(data[..., group * words(bits) : (group + 1) * words(bits)], bits)


def _convolve(window, values, kernel):
    """Plain convolution, ``[N, H, W, I]`` with ``[O, kh, kw, I]``."""
    top, left, bottom, right = window.pads
    padded = np.pad(values, ((0, 0), (top, bottom), (left, right), (0, 0)))
    height, width = window.out_height, window.out_width
    result = 0
    for r in range(window.kernel[0]):
        for s in range(window.kernel[1]):
            y, x = r * window.dilations[0], s * window.dilations[1]
            rows = slice(y, y + (height - 1) * window.strides[0] + 1, window.strides[0])
            columns = slice(x, x + (width - 1) * window.strides[1] + 1, window.strides[1])
            result = result + padded[:, rows, columns] @ kernel[:, r, s].T
    return result


def stores_planar(spec, isa):
    """Whether the kernel can store its one result in channel order (output kind ``planar``)."""
    return not sliced.claims(spec) and not neon.claims(spec, isa) and [o.kind for o in spec.epilogue.outputs] == ["tensor"]


def stores_pooled(spec, isa):
    """Whether the kernel can pool 2x2 pixels of results that it would store as tensors (output kinds ``max_pool``, ``avg_pool``)."""
    counts = not sliced.claims(spec) and not neon.claims(spec, isa) and not tile_product.wins(spec, isa) and not by_bytes.wins(spec, isa)
    even = spec.window.out_height % 2 == 0 and spec.window.out_width % 2 == 0
    return isa.machine == "x86_64" and counts and even and all(o.kind in ("tensor", "bits", *POOLED) for o in spec.epilogue.outputs)


def build(spec, schedule, isa):
    """The kernel.

    Parameters
    ----------
    spec : BinaryConv2d
    schedule : Schedule
    isa : Isa

    Returns
    -------
    tirx.PrimFunc
        Parameters: data, weights (see :func:`pack_weights`), the zeros' mask if ``spec.zeros``, epilogue inputs, epilogue outputs. The
        leading dimension is symbolic.
    """
    if schedule.adder == by_bytes.ADDER:
        return by_bytes.build(spec, schedule, isa)
    if schedule.adder == tile_product.ADDER:
        return tile_product.Kernel(spec, schedule, isa).build()
    kernel = sliced.Kernel if sliced.claims(spec) else neon.Kernel if schedule.adder == "neon" else Kernel
    return kernel(spec, schedule, isa).build()
