"""Pooling of packed bits (:class:`bnntvm.spec.BitPool`): and / or over sliding windows, a word at a time.

The window is taken apart: rows are combined first, into a scratch row that is padded with the identity on both sides, then columns. A
row of an image is one run of words, so the vertical step always works on full vectors. The horizontal step does too where the stride is
1, or where a whole number of pixels fits into a vector (a shuffle then drops the columns between the strides); else it goes pixel by
pixel.

The identity of "and" is one in every channel's bit and zero in the tail bits, so tails stay 0 even where a window holds only padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx

from bnntvm import spec as specs
from bnntvm.schedules import epilogue as tail
from bnntvm.schedules import tir

#: Strides up to this are done with shuffles.
LONGEST_SHUFFLED_STRIDE = 4


#: Fields of a schedule that cut the work into parallel tasks.
GRAIN = ("rows",)


@dataclass(frozen=True)
class Schedule:
    """``rows``: output rows that a thread takes at a time."""

    rows: int


def default_schedule(spec, isa):
    """Eight rows, which share one scratch row."""
    return Schedule(min(8, spec.window.out_height))


def space(spec, isa):
    """Row counts."""
    return [Schedule(rows) for rows in (4, 8, 16, 56) if rows <= spec.window.out_height] or [default_schedule(spec, isa)]


def reference(spec, operands, epilogue_inputs=()):
    """The pool in numpy, from unpacked bits ``bool[N, H, W, C]``; ``operands`` is ``[data]``."""
    window, bits = spec.window, tail.unpack(operands[0], spec.channels)
    top, left, bottom, right = window.pads
    identity = spec.op == "and"
    padded = np.pad(bits, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=identity)
    result = np.full((len(bits), window.out_height, window.out_width, spec.channels), identity)
    combine = np.logical_and if identity else np.logical_or
    for r in range(window.kernel[0]):
        for s in range(window.kernel[1]):
            rows, columns = (
                slice(k * d, k * d + (n - 1) * stride + 1, stride)
                for k, d, n, stride in zip((r, s), window.dilations, (window.out_height, window.out_width), window.strides)
            )
            result = combine(result, padded[:, rows, columns])
    return [tail.pack(result)]


def build(spec, schedule, isa):
    """The kernel: data ``uint32[n, H, W, words(C)]``, output ``uint32[n, OH, OW, words(C)]``."""
    return _Kernel(spec, schedule, isa).function()


class _Kernel:
    def __init__(self, spec, schedule, isa):
        if spec.op not in ("and", "or"):
            raise ValueError(f"no bit pool {spec.op!r}")
        self.spec, self.window, self.lanes = spec, spec.window, isa.lanes
        self.rows = schedule.rows
        self.words = specs.words(spec.channels)
        window = spec.window
        self.images = tirx.Var("n", "int64")
        self.data = tir.buffer("data", (self.images, window.in_height, window.in_width, self.words), "uint32")
        self.result = tir.buffer("result", (self.images, window.out_height, window.out_width, self.words), "uint32")
        # The scratch row: padded columns, and as many words as a vector of the horizontal step may read too far.
        slack = (window.strides[1] + 1) * self.lanes + window.dilations[1] * window.kernel[1] * self.words
        columns = window.pads[1] + window.in_width + window.pads[3]
        self.scratch, self.allocate = tir.scratch("scratch", (columns * self.words + slack,), "uint32")

    def function(self):
        chunks = -(-self.window.out_height // self.rows)

        def chunk(number):
            image, part = tirx.floordiv(number, tir.i64(chunks)), tirx.floormod(number, tir.i64(chunks))
            count = tirx.min(tir.i64(self.rows), self.window.out_height - part * self.rows)
            rows = tir.for_("y", count, lambda y: self._row(image, part * self.rows + y))
            return [self.allocate, self._pad(), rows]

        return tir.function("bit_pool", [self.data, self.result], tir.parallel("chunk", self.images * chunks, chunk))

    def _combine(self, vectors):
        """Balanced and / or of vectors."""
        while len(vectors) > 1:
            pairs = [a & b if self.spec.op == "and" else a | b for a, b in zip(vectors[::2], vectors[1::2])]
            vectors = pairs + vectors[len(pairs) * 2 :]
        return vectors[0]

    def _identity(self, word):
        """The identity in word ``word`` of a pixel."""
        bits = min(specs.WORD_BITS, self.spec.channels - word * specs.WORD_BITS)
        return tir.constant((1 << bits) - 1 if self.spec.op == "and" else 0, "uint32")

    def _fill(self, first, columns):
        """Set columns of the scratch row to the identity."""

        def column(x):
            return [tir.store(self.scratch, self._identity(w), (x + first) * self.words + w) for w in range(self.words)]

        return tir.for_("x", columns, column) if columns else []

    def _pad(self):
        left, width, right = self.window.pads[1], self.window.in_width, self.window.pads[3]
        return [self._fill(0, left), self._fill(left + width, right)]

    def _row(self, image, y):
        return [self._vertical(image, y), self._horizontal(image, y)]

    # Rows

    def _taps(self, y):
        """Input rows of output row ``y``. A row in the padding is replaced by the nearest row of the window that is not: that changes
        nothing, as both operations are idempotent."""
        window, height = self.window, self.window.in_height
        start = y * window.strides[0] - window.pads[0]
        step, count = window.dilations[0], window.kernel[0]
        first = tirx.max(tir.i64(0), tirx.floordiv(tir.i64(step - 1) - start, tir.i64(step)))
        last = tirx.min(tir.i64(count - 1), tirx.floordiv(tir.i64(height - 1) - start, tir.i64(step)))
        return start, first, last

    def _rows_in_padding(self):
        """Output rows whose window lies in the padding altogether."""
        window = self.window
        taps = [k * window.dilations[0] for k in range(window.kernel[0])]
        starts = [y * window.strides[0] - window.pads[0] for y in range(window.out_height)]
        return [y for y, start in enumerate(starts) if not any(0 <= start + t < window.in_height for t in taps)]

    def _vertical(self, image, y):
        """Combine the rows of the window into the scratch row."""
        window, body, rows = self.window, [], []
        start, first, last = self._taps(y)
        padded = any(window.pads[0::2])
        for k in range(window.kernel[0]):
            tap = tirx.max(tirx.min(tir.i64(k), last), first) if padded else k
            row, named = tir.bind("r", start + tap * window.dilations[0])
            body.append(named)
            rows.append(row)
        words, offset, lanes = window.in_width * self.words, window.pads[1] * self.words, self.lanes

        def vector(w):
            loads = [tir.load_vector(self.data, [image, row, 0, w * lanes], lanes) for row in rows]
            return tir.store_vector(self.scratch, [w * lanes + offset], self._combine(loads))

        whole, rest = divmod(words, lanes)
        if whole:
            body.append(tir.for_("w", whole, vector))
        if rest:
            mask = tir.prefix_mask(rest, lanes)
            loads = [tir.load_masked(self.data, [image, row, 0, whole * lanes], mask) for row in rows]
            body.append(tir.store_vector(self.scratch, [tir.i64(whole * lanes + offset)], self._combine(loads)))
            body.append(self._fill(window.pads[1] + window.in_width, window.pads[3]))  # the vector ran into the padding
        nothing = self._fill(window.pads[1], window.in_width)
        for empty in self._rows_in_padding():
            body = tir.when(y != empty, body, nothing)
        return body

    # Columns

    def _horizontal(self, image, y):
        stride, lanes = self.window.strides[1], self.lanes
        if stride == 1 or (stride <= LONGEST_SHUFFLED_STRIDE and lanes % self.words == 0 and self.words < lanes):
            return self._by_vectors(image, y)
        return self._by_pixels(image, y)

    def _columns(self, first, lanes):
        """``lanes`` words of the scratch row from ``first`` on, combined with those at the window's other columns."""
        step = self.window.dilations[1] * self.words
        return self._combine([tir.load_vector(self.scratch, [first + s * step], lanes) for s in range(self.window.kernel[1])])

    def _by_vectors(self, image, y):
        lanes, stride = self.lanes, self.window.strides[1]
        whole, rest = divmod(self.window.out_width * self.words, lanes)
        # Word w of output pixel p is word w of column p * stride.
        pick = [(lane // self.words) * stride * self.words + lane % self.words for lane in range(lanes)]

        def vector(number):
            parts = [self._columns((number * stride + j) * lanes, lanes) for j in range(stride)]
            return parts[0] if stride == 1 else tir.shuffle(parts, pick)

        body = [tir.for_("w", whole, lambda w: tir.store_vector(self.result, [image, y, 0, w * lanes], vector(w)))] if whole else []
        if rest:
            value, named = tir.bind("last", vector(tir.i64(whole)))
            body += [named, tir.store_masked(self.result, [image, y, 0, whole * lanes], value, tir.prefix_mask(rest, lanes))]
        return body

    def _by_pixels(self, image, y):
        def pixel(x):
            body, word = [], 0
            while word < self.words:
                lanes = next(n for n in (16, 8, 4, 2, 1) if n <= min(self.lanes, self.words - word))
                first = x * (self.window.strides[1] * self.words) + word
                body.append(tir.store_vector(self.result, [image, y, x, word], self._columns(first, lanes)))
                word += lanes
            return body

        return tir.for_("x", self.window.out_width, pixel)
