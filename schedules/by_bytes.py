"""Convolutions of bit planes as products of bytes, where a processor multiplies bytes faster than it counts bits for every pair of planes.

Data and weights stay packed in memory; the 8-bit kernel unpacks them on the way (:mod:`.int8_kernel`). Its sums are the dot products
themselves, so that unipolar data and masks of zeros need no corrections.
"""

from __future__ import annotations

import numpy as np

from bnntvm.schedules import epilogue, int8_conv2d
from bnntvm.spec import BinaryConv2d, Digits, Int8Conv2d

#: ``Schedule.adder`` of this way to count; then ``pixels`` is int8_conv2d's ``cover``, and ``task_rows`` its ``task_tiles``.
ADDER = "bytes"
#: Binary multiply-accumulates that the kernel which counts bits does in a cycle of an Emerald Rapids processor.
COUNTED_PER_CYCLE = 380


def claims(spec, isa):
    """Whether the 8-bit kernel can do it."""
    other = spec.plus_one if isinstance(spec, BinaryConv2d) else spec.planes.scaled  # padding is 0 here
    planar = any(output.kind == "planar" for output in spec.epilogue.outputs)
    if isa.products == "tiles" and planar and not int8_conv2d.stores_planar(spec, isa, "planar"):
        return False
    return bool(isa.products) and spec.groups == 1 and not other and _fits(as_bytes(spec))


def _fits(spec):
    """Whether all values are bytes."""
    return (
        -128 <= spec.data.low
        and spec.data.high <= (127 if spec.data.low < 0 else 255)
        and max(-spec.weights.low - 1, spec.weights.high) <= 127
    )


def wins(spec, isa):
    """Whether it is expected to be faster than a pass for every pair of planes."""
    if not claims(spec, isa):
        return False
    if isinstance(spec, BinaryConv2d):
        return isa.products == "tiles" and _tiles_beat_counting(spec, isa)
    return len(spec.planes.data) * len(spec.planes.weights) * isa.int8_macs > isa.bit_macs


def _tiles_beat_counting(spec, isa):
    """Whether tiles of bytes are estimated to be clearly faster for a single pair: with cold caches they gain less than it says."""
    window = spec.window
    taps = [_taps(window, axis) for axis in (0, 1)]
    macs = taps[0] * taps[1] * spec.in_channels * spec.out_channels
    wide = as_bytes(spec)
    return 1.1 * int8_conv2d.image_cycles(wide, int8_conv2d.default_schedule(wide, isa), isa) < macs / COUNTED_PER_CYCLE


def _taps(window, axis):
    """Taps inside the image, summed over the outputs of an axis: counting skips the others."""
    size, outputs = (window.in_height, window.in_width)[axis], (window.out_height, window.out_width)[axis]
    places = np.arange(outputs)[:, None] * window.strides[axis] - window.pads[axis]
    places = places + np.arange(window.kernel[axis]) * window.dilations[axis]
    return int(np.sum((places >= 0) & (places < size)))


def numbers(spec, isa):
    """``(pixels, task_rows, task_blocks)`` of the default schedule."""
    found = int8_conv2d.default_schedule(as_bytes(spec), isa)
    return found.cover, found.task_tiles, found.task_blocks


def space(spec, isa):
    """The same of the schedules worth trying, none where there is no such kernel."""
    found = int8_conv2d.space(as_bytes(spec), isa) if claims(spec, isa) else []
    return [(s.cover, s.task_tiles, s.task_blocks) for s in found]


def as_bytes(spec):
    """The same convolution of 8-bit integers."""
    if isinstance(spec, BinaryConv2d):
        return _spec(spec, (1,), "unipolar" if spec.unipolar else "bipolar", Digits(1, (-2,)))
    return _spec(spec, spec.planes.data, spec.planes.data_kind, _weight_digits(spec.planes))


def _spec(spec, data, kind, weights):
    """A bipolar bit is worth c - 2 c b; bit 1 of the mask of zeros takes the c of a bit 0 away."""
    digits = Digits(0, tuple(data)) if kind == "unipolar" else Digits(sum(data), tuple(-2 * c for c in data))
    if spec.zeros and kind == "bipolar":
        digits = Digits(digits.base, (*digits.coefficients, -sum(data)))
    elif spec.zeros:
        digits = Digits(digits.base, (*digits.coefficients, 0))
    return Int8Conv2d(spec.window, spec.in_channels, spec.out_channels, digits, weights, spec.epilogue, spec.zeros)


def _weight_digits(planes):
    if planes.weight_kind == "ternary":  # a plane of -1, 0, 1 takes two bits either way
        return Digits(-sum(planes.weights), tuple(c * digit for c in planes.weights for digit in (1, 2)))
    if planes.weight_kind == "unipolar":
        return Digits(0, planes.weights)
    return Digits(sum(planes.weights), tuple(-2 * c for c in planes.weights))


def weight_values(spec, weights):
    """int8[O, kh, kw, I] of packed weights, uint32[(planes of words,) O, kh, kw, words(I)]."""
    if isinstance(spec, BinaryConv2d):
        return 1 - 2 * epilogue.unpack(weights, spec.in_channels).astype(np.int8)
    planes, bits = spec.planes, epilogue.unpack(weights, spec.in_channels).astype(np.int8)
    if planes.weight_kind == "ternary":
        values = bits[1::2] * (1 - 2 * bits[0::2])
    else:
        values = bits if planes.weight_kind == "unipolar" else 1 - 2 * bits
    return sum(np.int8(c) * plane for c, plane in zip(planes.weights, values))


def pack_weights(spec, schedule, isa, weights):
    """As the family's own."""
    return int8_conv2d.pack_weights(as_bytes(spec), _schedule(schedule), isa, weight_values(spec, weights))


def build(spec, schedule, isa):
    """The kernel."""
    return int8_conv2d.build(as_bytes(spec), _schedule(schedule), isa)


def _schedule(schedule):
    return int8_conv2d.Schedule(schedule.pixels, schedule.task_rows, schedule.task_blocks)
