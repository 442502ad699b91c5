"""Convolution of 8-bit integers on a GPU: :class:`bnntvm.spec.Int8Conv2d`.

Tiles in shared memory (:mod:`.patches`) whose units are four channels: ``dp4a`` adds four products to a sum. Digits become bytes on the
way to shared memory, of the data and of the weights, which are stored at one bit for each coefficient.
"""

from __future__ import annotations

import numpy as np
from tvm import tirx

from bnntvm import spec as specs
from bnntvm.schedules import tir
from bnntvm.schedules.cuda import cells, coding, functions, patches, simt
from bnntvm.schedules.cuda import epilogue as tail
from bnntvm.schedules.int8_conv2d import reference

__all__ = ["build", "default_schedule", "pack_weights", "reference", "space", "stores_planar"]

QUAD = 4
assert functions.SIDE  # the products are defined there


def stores_planar(spec, isa):
    """Images may be stored in the order of an ONNX file."""
    return True


def _problem(spec):
    return patches.Problem(spec.window, -(-spec.in_channels // QUAD), spec.out_channels, True)


def default_schedule(spec, isa):
    """A schedule that is fast without tuning."""
    return space(spec, isa)[0]


def space(spec, isa):
    """Valid schedules, the default one first."""
    return [*patches.schedules(_problem(spec)), cells.Schedule(1)]


def _sizes(spec, schedule):
    """Quads and channels of the weights' array."""
    if isinstance(schedule, cells.Schedule):
        return -(-spec.in_channels // QUAD), -(-spec.out_channels // 32) * 32
    return patches.padded(_problem(spec), schedule)


def _signed(spec):
    """Whether the data's bytes are."""
    return spec.data.low < 0 if isinstance(spec.data, specs.Digits) else spec.data == "int8"


def pack_weights(spec, schedule, isa, weights):
    """Bring weights into the kernel's layout.

    Parameters
    ----------
    weights : ndarray
        int8 ``[O, kh, kw, I]``.

    Returns
    -------
    ndarray
        uint32 ``[kh * kw, quads, O']``, the bytes of four input channels from the lowest on; of digits uint32 ``[coefficients, kh * kw, 4 *
        quads, words(O')]``, bit j of a word is output channel 32 * i + j.
    """
    quads, channels = _sizes(spec, schedule)
    taps = weights.reshape(len(weights), -1, spec.in_channels).transpose(1, 2, 0)
    full = np.zeros((taps.shape[0], QUAD * quads, channels), np.int16)
    full[:, : spec.in_channels, : len(weights)] = taps
    if isinstance(spec.weights, specs.Digits):
        return _planes(full - spec.weights.base, spec.weights.coefficients, spec.in_channels, len(weights))
    bytes_ = np.ascontiguousarray(full.astype(np.int8).reshape(taps.shape[0], quads, QUAD, channels).transpose(0, 1, 3, 2))
    return bytes_.view("<u4")[..., 0].astype(np.uint32)


def _planes(values, coefficients, in_channels, out_channels):
    """The bits whose coefficients sum up to ``values``; where no weight is they are 0."""
    sums = {sum(c * (code >> j & 1) for j, c in enumerate(coefficients)): code for code in range(1 << len(coefficients))}
    table = np.zeros(max(sums) - min(sums) + 1, np.uint8)
    for total, code in sums.items():
        table[total - min(sums)] = code
    codes = np.zeros(values.shape, np.uint8)
    codes[:, :in_channels, :out_channels] = table[values[:, :in_channels, :out_channels] - min(sums)]
    return coding.pack_bits(np.stack([codes >> j & 1 for j in range(len(coefficients))]).astype(bool))


def build(spec, schedule, isa):
    """The kernel: data, packed weights, a mask plane if the last plane is one, the epilogue's inputs and outputs. N is dynamic."""
    return _Writer(spec, schedule).function()


def join(numbers):
    """Four int32 numbers as the bytes of a word."""
    word = None
    for i, number in enumerate(numbers):
        byte = tirx.shift_left(tirx.Cast("uint32", number) & simt.u32(0xFF), simt.u32(8 * i))
        word = byte if word is None else word | byte
    return word


class _Writer:
    def __init__(self, spec, schedule):
        self.spec, self.schedule, window = spec, schedule, spec.window
        self.batch = tirx.Var("n", "int64")
        self.quads, self.channels = _sizes(spec, schedule)
        image = (self.batch, window.in_height, window.in_width)
        if isinstance(spec.data, specs.Digits):
            count = len(spec.data.coefficients)
            data = [tir.buffer(f"x{i}", (*image, specs.words(spec.in_channels)), "uint32") for i in range(count)]
        else:
            data = [tir.buffer("x", (*image, spec.in_channels), "float32" if spec.floats else spec.data)]
        taps = window.kernel[0] * window.kernel[1]
        self.weights_shape = (taps, self.quads, self.channels)
        if isinstance(spec.weights, specs.Digits):
            self.weights_shape = (len(spec.weights.coefficients), taps, QUAD * self.quads, self.channels // 32)
        weights = tir.buffer("w", self.weights_shape, "uint32")
        flat = [simt.flat(one) for one in (*data, weights)]
        self.data, self.weights = [array for array, _ in flat[:-1]], flat[-1][0]
        self.dims = (self.batch, window.out_height, window.out_width)
        self.emitter = tail.Emitter(spec.epilogue, spec.out_channels, self.dims, "int32")
        self.emitter.declarations[:0] = [declared for _, declared in flat]
        at = len(data) - spec.mask_last
        self.params = [*data[:at], weights, *data[at:]]

    def function(self):
        if isinstance(self.schedule, cells.Schedule):
            return cells.build("int8_conv2d", self.params, self.emitter, self.dims, self._one, self.schedule.cells)
        products = "bnn_dots" if _signed(self.spec) else "bnn_dots_unsigned"
        problem, arguments = _problem(self.spec), (self.batch, self._unit, self._weight, products, "int32")
        return patches.Kernel("int8_conv2d", problem, self.schedule, self.emitter, self.params, *arguments).function()

    # Data

    def _unit(self, n, y, x, quad, exists):
        """Four channels of a pixel, as bytes."""
        window = self.spec.window
        pixel = simt.wide((n * window.in_height + y) * window.in_width + x)
        if isinstance(self.spec.data, specs.Digits):
            return self._digits(pixel, quad, exists)
        numbers = []
        for i in range(QUAD):
            channel = quad * QUAD + i
            there = exists if self.spec.in_channels % QUAD == 0 else tirx.And(exists, channel < self.spec.in_channels)
            value = cells.guarded(there, self.data[0], pixel * self.spec.in_channels + simt.wide(channel))
            numbers.append(tirx.Cast("int32", value))
        return [], join(numbers)

    def _digits(self, pixel, quad, exists):
        """Bits that a channel does not have are read as 0; its weights are 0."""
        words = [
            cells.guarded(exists, plane, pixel * specs.words(self.spec.in_channels) + simt.wide(simt.div(quad, 8))) for plane in self.data
        ]
        pairs = [simt.bind("plane", tirx.shift_right(word, simt.u32(simt.mod(quad, 8) * QUAD))) for word in words]
        numbers = [self._number(self.spec.data, [bit(word, i) for word, _ in pairs]) for i in range(QUAD)]
        joined = tirx.Select(exists, join(numbers), simt.u32(0))
        return [statement for _, statement in pairs], joined

    @staticmethod
    def _number(digits, bits):
        total = simt.i32(digits.base)
        for coefficient, one in zip(digits.coefficients, bits):
            total = total + one * coefficient
        return total

    # Weights

    def _weight(self, tap, quad, channel):
        if not isinstance(self.spec.weights, specs.Digits):
            return [], simt.at(self.weights, (simt.i32(tap) * self.quads + quad) * self.channels + channel)
        count, taps, inputs, words = self.weights_shape
        statements, numbers = [], []
        for i in range(QUAD):
            found = []
            for p in range(count):
                place = ((simt.i32(tap) + p * taps) * inputs + quad * QUAD + i) * words + simt.div(channel, 32)
                word, named = simt.bind("bits", tirx.shift_right(simt.at(self.weights, place), simt.u32(simt.mod(channel, 32))))
                statements.append(named)
                found.append(bit(word, 0))
            number = self._number(self.spec.weights, found)
            if self.spec.in_channels % QUAD or inputs > self.spec.in_channels:
                number = tirx.Select(quad * QUAD + i < self.spec.in_channels, number, simt.i32(0))
            numbers.append(number)
        return statements, join(numbers)

    # One output after the other

    def _one(self, cell):
        window, spec = self.spec.window, self.spec
        total, allocate = simt.registers(f"total_{cell.row.name}", 1, "int32")

        def step(r, s, q):
            y = cell.y * window.strides[0] - window.pads[0] + r * window.dilations[0]
            x = cell.x * window.strides[1] - window.pads[1] + s * window.dilations[1]
            there = tirx.And(cell.exists, cells.within(y, window.in_height, x, window.in_width))
            there, named = simt.bind("there", there)
            bound, data = self._unit(cell.image, y, x, q, there)
            bound_too, factor = self._weight(r * window.kernel[1] + s, q, cell.channel)
            name = "bnn_dot" if _signed(spec) else "bnn_dot_unsigned"
            add = simt.put(total, 0, simt.call(name, simt.at(total, 0), data, factor, dtype="int32"))
            return [named, *bound, tirx.IfThenElse(there, tir.seq([*bound_too, add]), None)]

        rows, columns = window.kernel
        walk = simt.loop("r", rows, lambda r: simt.loop("s", columns, lambda s: simt.loop("q", self.quads, lambda q: step(r, s, q))))
        return [allocate, simt.put(total, 0, simt.i32(0)), walk], simt.at(total, 0)


def bit(word, number):
    """A bit of a uint32, as int32."""
    return tirx.Cast("int32", tirx.bitwise_and(tirx.shift_right(word, simt.u32(number)), simt.u32(1)))
