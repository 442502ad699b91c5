"""Depthwise convolution of bit planes, bit-sliced.

With one input and one output channel per group, every bit of a data word belongs to another channel, and no two bits are summed up. The
terms of the sums are counted for all bits of a word at once: plane k holds bit k of the counters of all channels. A full adder takes three
words to a sum and a carry with two operations of AVX-512, so that nine taps cost about thirty operations for 512 channels. Only the
finished counters of a row, four planes of them for nine taps, are spread to one 32-bit lane per channel, by masks.

========== ==============================================
data       dot product
========== ==============================================
bipolar    taps - 2 popc(a ^ w)
with zeros taps - 2 popc((a ^ w) & ~z) - popc(z)
unipolar   popc(a) - 2 popc(a & w)
========== ==============================================

Here popc counts over the taps inside the image; there is no padded copy. Rows of taps are bounded at run time, columns when the kernel is
built: pixels of a row with the same columns are one span of words, which vectors cover without regard to pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from tvm import tirx

from bnntvm.schedules import epilogue, windows
from bnntvm.schedules import tir as T
from bnntvm.schedules.binary_conv2d_adders import inverted, memory
from bnntvm.schedules.epilogue import Emitter
from bnntvm.spec import WORD_BITS, words


def claims(spec):
    """Whether a convolution is depthwise with one output per channel, its data packed densely."""
    return spec.dense_groups and spec.groups == spec.in_channels == spec.out_channels


def pack_weights(weights):
    """``uint32[kh * kw, words(O)]`` of ``uint32[O, kh, kw, 1]``: channels side by side, one bit for each."""
    bits = (weights[..., 0] & 1).astype(bool)
    return epilogue.pack(bits.reshape(len(bits), -1).T)


@dataclass(frozen=True)
class Term:
    """One counter: it counts the set bits of ``word(a, w, z)``, and the dot product has ``coefficient`` times that."""

    coefficient: int
    word: object


_DIFFER = Term(-2, lambda a, w, z: a ^ w)
_DIFFER_NOT_ZERO = Term(-2, lambda a, w, z: (a ^ w) & inverted(z))
_ZERO = Term(-1, lambda a, w, z: z)
_SET = Term(1, lambda a, w, z: a)
_SET_NEGATIVE = Term(-2, lambda a, w, z: a & w)


class Kernel:
    """Builds one PrimFunc. The methods that return statements follow the loop nest from outside in."""

    def __init__(self, spec, schedule, isa):
        self.spec, self.isa, self.lanes, self.window = spec, isa, isa.lanes, spec.window
        self.task_rows, self.words = schedule.task_rows, words(spec.in_channels)
        self.row_words = self.window.out_width * self.words
        self.taps = self.window.kernel[0] * self.window.kernel[1]
        self.terms = (_SET, _SET_NEGATIVE) if spec.unipolar else (_DIFFER_NOT_ZERO, _ZERO) if spec.zeros else (_DIFFER,)
        self.bits = self.taps.bit_length()
        self.planes = len(self.terms) * self.bits

    def build(self):
        w, batch = self.window, tirx.Var("n", "int64")
        shape = (batch, w.in_height, w.in_width, self.words)
        self.data = T.buffer("data", shape, "uint32")
        self.weights = T.buffer("weights", (self.taps, self.words), "uint32")
        self.zeros = T.buffer("zeros", shape, "uint32") if self.spec.zeros else None
        self.emitter = Emitter(self.spec.epilogue, self.spec.out_channels, self.isa, (batch, w.out_height, w.out_width), "int32")
        params = [self.data, self.weights, *([self.zeros] if self.spec.zeros else []), *self.emitter.inputs, *self.emitter.outputs]
        tasks = -(-w.out_height // self.task_rows)

        def task(number):
            image, bind_image = T.bind("image", number // tasks)
            first, bind_first = T.bind("row", number % tasks * self.task_rows)
            rows = tirx.min(T.i64(self.task_rows), w.out_height - first) if w.out_height % self.task_rows else self.task_rows
            return [bind_image, bind_first, self.task(image, first, rows)]

        return T.function("binary_conv2d_sliced", params, T.parallel("task", batch * tasks, task))

    def task(self, image, first, rows):
        self.image = image
        self.tiled, allocate_tiled = memory("tiled", self.taps * self._period, "uint32")
        self.counters, allocate_counters = memory("counters", self.planes * self.row_words, "uint32")
        return [allocate_tiled, allocate_counters, self.tile_weights(), T.for_("y", rows, lambda y: self.row(first + y))]

    @property
    def _period(self):
        return self.words + self.lanes - 1

    def tile_weights(self):
        """Statements that repeat the words of every tap, so that a vector may start at any word of a pixel and reach into the next."""

        def copy(tap, i):
            return T.store(self.tiled, T.load(self.weights, tap, i % self.words), tap * self._period + i)

        return T.for_("tap", self.taps, lambda tap: T.for_("i", self._period, lambda i: copy(tap, i)))

    def row(self, y):
        y, bind = T.bind("y", y)
        first, count = windows.row_taps(self.window, y)
        first, bind_first = T.bind("first", T.i64(first))
        count, bind_count = T.bind("count", T.i64(count))
        body = [bind, bind_first, bind_count]
        for columns, pixels in groupby(range(self.window.out_width), self._columns):
            pixels = list(pixels)
            body.append(self.pixels((y, first, count), columns, pixels[0], len(pixels)))
        return [body, T.for_("word", self.row_words, lambda word: self.store(y, count, word))]

    def _columns(self, x):
        """The kernel columns inside the image for output column ``x``, as (first, stop)."""
        w = self.window
        origin = x * w.strides[1] - w.pads[1]
        inside = [s for s in range(w.kernel[1]) if 0 <= origin + s * w.dilations[1] < w.in_width]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)

    def pixels(self, place, columns, x, count):
        """The ``count`` pixels from ``x`` on, all with the same kernel columns."""
        if self.window.strides[1] == 1:
            return self.span(place, columns, T.i64(x), count * self.words)
        return T.for_("x", count, lambda i: self.span(place, columns, x + i, self.words))

    def span(self, place, columns, x, length):
        """``length`` words of results from pixel ``x`` on; their operands lie side by side as well."""
        x, bind = T.bind("x", x)
        size = max(lanes for lanes in (1, 2, 4, 8, 16) if lanes <= min(self.lanes, length))

        def chunk(number):
            at = number * size if length % size == 0 else tirx.min(number * size, T.i64(length - size))
            at, bind_at = T.bind("at", at)
            return [bind_at, self.count(place, columns, x, at, size)]

        return [bind, T.for_("chunk", -(-length // size), chunk)]

    # Counting -------------------------------------------------------------------------------------------------------------------------

    def count(self, place, columns, x, at, size):
        """Statements that count the taps of ``size`` words, from word ``at`` after pixel ``x`` on, into ``counters``."""
        y, first, count = place
        w = self.window
        planes = T.Registers("plane", self.planes, "uint32", size)
        weights_at, bind_weights = T.bind("weights", at % self.words)
        origin = (y * w.strides[0] - w.pads[0]) * w.in_width + (x * w.strides[1] - w.pads[1])
        origin, bind_origin = T.bind("origin", origin * self.words + at)

        def row(r):
            r, bind_r = T.bind("r", first + r)
            body, found = [bind_r], []
            for s in range(*columns):
                offset = origin + (r * (w.dilations[0] * w.in_width) + s * w.dilations[1]) * self.words
                weight = T.load_vector(self.tiled, [weights_at + (r * w.kernel[1] + s) * self._period], size)
                arrays = (self.data, self.zeros) if self.spec.zeros else (self.data,)
                loaded = [T.bind("a", T.load_vector(array, [self.image, 0, 0, offset], size)) for array in arrays]
                weight, bind_weight = T.bind("w", weight)
                body += [bind_weight, *(statement for _, statement in loaded)]
                found.append((loaded[0][0], weight, loaded[-1][0]))
            for i, term in enumerate(self.terms):
                body += self.add(planes, i * self.bits, [term.word(*operands) for operands in found])
            return body

        target = x * self.words + at
        stores = [T.store_vector(self.counters, [k * self.row_words + target], planes.get(k)) for k in range(self.planes)]
        return [
            planes.allocate, bind_weights, bind_origin, planes.fill(T.splat(0, "uint32", size)),
            T.for_("r", count, row) if columns[1] > columns[0] else [], stores,
        ]  # fmt: skip

    def add(self, planes, first, found):
        """Statements that add one bit per word of ``found`` to the counters that start at plane ``first``."""
        body = []

        def name(value):
            variable, bind = T.bind("b", value)
            body.append(bind)
            return variable

        carries = [name(word) for word in found]
        for k in range(self.bits):
            column, carries = [name(planes.get(first + k)), *carries], []
            while len(column) > 1:
                if len(column) == 2:
                    a, b = column
                    total, carry = a ^ b, a & b
                else:
                    a, b, c, *_ = column
                    total, carry = a ^ b ^ c, (a & b) | (c & (a ^ b))
                carries.append(name(carry))
                column = [*column[3:], name(total)]
            body.append(planes.set(first + k, column[0]))
        return body

    # Results --------------------------------------------------------------------------------------------------------------------------

    def store(self, y, rows, word):
        """The epilogue of the 32 channels of word ``word`` of a row; ``rows`` of the kernel's rows are inside the image."""
        lanes, per_word = self.lanes, WORD_BITS // self.lanes
        pixel, bind_pixel = T.bind("pixel", word // self.words)
        channel, bind_channel = T.bind("channel", word % self.words * WORD_BITS)
        body = [bind_pixel, bind_channel]
        base = 0 if self.spec.unipolar else rows * self.column_count(pixel)
        base, bind = T.bind("base", T.broadcast(tirx.Cast("int32", T.i64(base)), lanes))
        body.append(bind)
        values = [base] * per_word
        for k in range(self.planes):
            factor = T.splat(self.terms[k // self.bits].coefficient << (k % self.bits), "int32", lanes)
            bits, bind = T.bind("bits", T.load(self.counters, k * self.row_words + word))
            body.append(bind)
            for v in range(per_word):
                mask = self.lane_mask(bits, v * lanes)
                # Each value is named once: TVM writes names out, and a chain that names them twice grows exponentially.
                values[v], bind = T.bind("value", values[v] + tirx.Select(mask, factor, T.splat(0, "int32", lanes)))
                body.append(bind)
        return [body, self.emitter.emit(values, (self.image, y, pixel), channel)]

    def column_count(self, x):
        """Number of kernel columns inside the image for output column ``x``, as an expression."""
        w = self.window
        step, origin = w.dilations[1], x * w.strides[1] - w.pads[1]
        first = tirx.max(T.i64(0), (step - 1 - origin) // step)
        last = tirx.min(T.i64(w.kernel[1]), (w.in_width - 1 - origin) // step + 1)
        return tirx.max(T.i64(0), last - first)

    def lane_mask(self, bits, first):
        """Bool vector of the bits from ``first`` on of a word."""
        lanes = self.lanes
        if lanes == 16:
            return T.expand_mask(tirx.Cast("uint16", bits >> T.constant(first, "uint32")), lanes)
        numbers = tirx.Cast(T.vector_type("uint32", lanes), T.lane_numbers(lanes, first))
        bit = T.splat(1, "uint32", lanes) << numbers
        return tirx.EQ(T.broadcast(bits, lanes) & bit, bit)
