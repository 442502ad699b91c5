"""Results that take more than one pixel to store, from a kernel that computes words of channels pixel by pixel.

A task collects a strip of its pixels, 32 channels wide and small enough for the first-level cache. For results in channel order,
``float32[N, C, H, W]``, it transposes the strip in registers into the planes of these channels, where the pixels of consecutive rows are
one run of memory. For pooled results the strip is two rows, of which 2x2 pixels become one.
"""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.transpose import square
from bnntvm.spec import POOLED, WORD_BITS

#: A strip is as many rows as stay below this number of pixels: 16 KiB.
_PIXELS = 128


class Strips:
    """The strips of a task, one for each planar or pooled output; nothing for an epilogue without any. There are not both.

    Parameters
    ----------
    emitter : epilogue.Emitter
    width : int
        Pixels of a row.
    row_counts : list of int
        The numbers of rows that a task may have.
    words : int
        Words of channels that are collected side by side.

    Attributes
    ----------
    allocation : list of statements
        To be placed where a task begins.
    """

    def __init__(self, emitter, width, row_counts, words=1):
        self.emitter, self.width, self.lanes = emitter, width, emitter.lanes
        self.numbers = [i for i, output in enumerate(emitter.epilogue.outputs) if output.kind in ("planar", *POOLED)]
        self.pools = any(output.kind in POOLED for output in emitter.epilogue.outputs)
        self.allocation, self.first = [], None
        self.rows = 2 if self.pools else _strip_rows(max(row_counts), width, self.lanes)
        rests = [count % self.rows for count in row_counts if count % self.rows]
        #: Whether rows that are left over belong to the last strip of a task, because they are too few for a strip of their own.
        self.joined = any(rest * width < self.lanes for rest in rests)
        #: Whether there are strips shorter than a vector, so that stores must leave lanes out.
        self.short = min([self.rows, *row_counts]) * width < self.lanes
        # Vectors of the last pixels may reach beyond them.
        self.size = (max(map(self._last, row_counts)) * width + self.lanes) * WORD_BITS
        for number in self.numbers:
            array, allocate = tir.memory(f"strip{number}", self.size * words, "float32")
            emitter.strips[number] = array
            self.allocation += allocate

    def _last(self, rows):
        """Rows of the longest strip of a task with ``rows`` rows."""
        return self.rows + rows % self.rows * self.joined if rows >= self.rows else rows

    @classmethod
    def of_pixels(cls, emitter, most):
        """Strips of any number of pixels up to ``most``."""
        strips = cls(emitter, most, [1])
        strips.short = True
        return strips

    def place(self, pixel, word=0):
        """Where in the strips a pixel of the image begins; ``word`` counts the words that are collected side by side."""
        return None if self.first is None else (pixel - self.first) * WORD_BITS + word * self.size

    def fetch(self, image, block, pixel):
        """Statements for each pixel that ask for its share of the lines that will be written.

        A strip is written at once, faster than lines come from the second-level cache; asked for while it is computed they are there.
        """
        statements, each = [], WORD_BITS // self.lanes
        for number in [] if self.pools else self.numbers:
            within = pixel - self.first
            channel = block * WORD_BITS + tirx.floormod(within, tir.i64(self.lanes)) * each
            first = pixel - tirx.floormod(within, tir.i64(self.lanes))
            target = self.emitter.outputs[number]
            statements += [tir.prefetch(target, [image, channel + i, 0, first], write=True) for i in range(each)]
        return statements

    def walk(self, rows, row, image, block, first_row):
        """Loops over the rows of a task, ``row(number)``, for a block of 32 channels, strip by strip."""
        if not self.numbers:
            return tir.for_("y", rows, row)
        strips = tirx.floordiv(rows + (0 if self.joined else self.rows - 1), tir.i64(self.rows))
        strips = tirx.max(tir.i64(1), strips)

        def strip(number):
            begin, named = tir.bind("begin", number * self.rows)
            count = tirx.Select(number == strips - 1, rows - begin, tir.i64(self.rows))
            count, named_count = tir.bind("count", count)
            self.first, named_first = tir.bind("pixel", (first_row + begin) * self.width)
            walked = tir.for_("y", count, lambda y: row(begin + y))
            return [named, named_count, named_first, walked, self.flush(image, block, count * self.width)]

        return tir.for_("strip", strips, strip)

    def collect(self, first, count, image, block, body):
        """Statements that ``body`` makes, which put ``count`` pixels of the image from ``first`` on into the strips, and their way out."""
        self.first = first
        return [body(), self.flush(image, block, count)]

    def flush(self, image, block, count, word=0):
        """Make the output of the strips' ``count`` pixels."""
        if self.pools:
            return [self._pool(output, image, block) for output in self.numbers]
        groups = tirx.floordiv(count + (self.lanes - 1), tir.i64(self.lanes))

        def group(number, output, part):
            at = number * self.lanes
            at, named = tir.bind("at", at if self.short else tirx.min(at, count - self.lanes))
            mask = tir.prefix_mask(count - at, self.lanes) if self.short else None
            return [named, self._square(output, (image, block, word), at, part, mask)]

        # Planes lie in pages of their own, and processors know few pages to write to at a time: one part of the channels after the other.
        return [
            tir.for_("group", groups, lambda number, output=output, part=part: group(number, output, part))
            for output in self.numbers
            for part in range(0, WORD_BITS, self.lanes)
        ]

    def _pool(self, number, image, block):
        """Make one pixel of every 2x2 of a strip of two rows."""
        strip, target, width = self.emitter.strips[number], self.emitter.outputs[number], self.width
        kind, channels = self.emitter.epilogue.outputs[number].kind, self.emitter.channels
        row = tirx.floordiv(self.first, tir.i64(2 * width))

        def vector(x, part):
            taps = [tir.load_vector(strip, [(y * width + 2 * x + s) * WORD_BITS + part], self.lanes) for y in (0, 1) for s in (0, 1)]
            channel = block * WORD_BITS + part
            place, left = [image, row, x, channel], tir.i64(channels) - channel
            if channels % self.lanes == 0:
                store = tir.store_vector(target, place, _pooled(kind, taps, self.lanes))
                return store if channels % WORD_BITS == 0 else tir.when(left > 0, store)
            mask = tir.prefix_mask(tirx.min(left, tir.i64(self.lanes)), self.lanes)
            return tir.when(left > 0, tir.store_masked(target, place, _pooled(kind, taps, self.lanes), mask))

        return tir.for_("x", width // 2, lambda x: [vector(x, part) for part in range(0, WORD_BITS, self.lanes)])

    def _square(self, number, place, at, part, mask):
        """Transpose ``lanes`` pixels from pixel ``at`` of a strip on, channels ``part`` ... ``part + lanes - 1`` of the block."""
        (image, block, word), strip, target = place, self.emitter.strips[number], self.emitter.outputs[number]
        body, planes = square(lambda i, j: tir.load_vector(strip, [(at + i) * WORD_BITS + part + j + word * self.size], 4), self.lanes)
        channels, stores = self.emitter.channels, []
        for i, plane in enumerate(planes):
            channel = block * WORD_BITS + part + i
            where = [image, channel, 0, self.first + at]
            store = tir.store_vector(target, where, plane) if mask is None else tir.store_masked(target, where, plane, mask)
            exists = channels % self.lanes == 0 or tir.i64(0) + channel < channels
            stores.append(tir.when(exists, store))
        some = channels % WORD_BITS == 0 or channels % self.lanes != 0 or block * WORD_BITS + part < channels
        return tir.when(some, [body, stores])


def _pooled(kind, taps, lanes):
    """Four vectors made one, in the order of :mod:`.pool2d`."""
    total = taps[0]
    for tap in taps[1:]:
        total = tirx.Max(total, tap) if kind == "max_pool" else total + tap
    return total if kind == "max_pool" else total * tir.splat(0.25, "float32", lanes)


def _strip_rows(rows, width, lanes):
    """Rows of a strip: those of at most ``_PIXELS`` pixels that fill vectors best, at least one if that is possible."""
    fits = range(1, max(1, min(rows, _PIXELS // width)) + 1)
    return min(fits, key=lambda n: (n * width < lanes, -(-n * width // lanes) * lanes / (n * width), n))
