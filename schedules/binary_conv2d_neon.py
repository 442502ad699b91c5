"""Packed binary convolution on NEON.

The windows of a few output rows are copied to scratch memory, one after the other, each padded with 0 bits to whole steps of 128 (or, where
the last step is a half, with its two words once more): a copy costs one load and one store for as many bits as every output channel then
spends three operations on. What follows is a product of rows (:mod:`.neon_product`), whatever strides, dilations and pads there are, and 32
output channels at a time the epilogue.

Zero padding
------------
A tap outside the image should add 0. Its bits are 0 in the copy, so that popc(a ^ w) counts w's bits there: known numbers that depend on
the channel and on which taps are missing. With P such taps of C channels and B bits set in their weights,

    dot = (K - P C) - 2 (popc - B) = K - 2 (popc + P C / 2 - B)

The second number, an integer if C is even, is added to the count; else ``2 B - P C`` to the dot product. A table of these per class of
pixels follows the weights. Unipolar data need no classes: dot = popc(a ^ w) - popc(w) holds for absent taps as well. With zeros (mask z)
an absent tap is all zeros: dot = (K - popc(z)) - 2 popc((a ^ w) & ~z).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from itertools import groupby

import numpy as np
from tvm import tirx

from bnntvm.schedules import neon, neon_product
from bnntvm.schedules import tir as T
from bnntvm.schedules.binary_conv2d_adders import memory
from bnntvm.schedules.binary_conv2d_tiles import Geometry
from bnntvm.schedules.epilogue import Emitter
from bnntvm.spec import WORD_BITS, BinaryConv2d, words

BLOCK = WORD_BITS
#: The table's entries are 16 bits wide.
_LARGEST = 32767
#: Bytes of copied windows that stay in the first-level cache beside a block's weights.
_COPY_BYTES = 16384


def claims(spec, isa):
    """Whether this kernel takes a convolution: not where groups split a block of channels, nor where 16 bits do not hold corrections."""
    if not neon.is_neon(isa) or not isinstance(spec, BinaryConv2d):
        return False
    bits = spec.window.kernel[0] * spec.window.kernel[1] * spec.in_channels // spec.groups
    whole_groups = spec.groups == 1 or (spec.out_channels // spec.groups % BLOCK == 0 and not spec.dense_groups)
    return whole_groups and bits <= _LARGEST


def schedule_numbers(spec, isa):
    """``(pixels, rows, blocks)``: pixels of the register tile, times four channels, and rows and blocks of a task.

    A step of a tile of p pixels takes 12 p operations, p + 2 loads and 3 or 4 instructions for the loop; tiles that overlap compute pixels
    twice. 32 registers hold 24 counters, 4 weights and what is in flight; in-order processors have more in flight.
    """
    plan = Plan(spec)
    most = (6 if isa.mcpu not in IN_ORDER else 5) if isa.registers == 32 else 2

    def cost(choice):
        pixels, rows = choice
        tasks = [rows] * (plan.height // rows) + ([plan.height % rows] if plan.height % rows else [])
        copies = 40 * len(tasks)  # weights are read anew for every task
        return sum(-(-task * plan.width // pixels) * (13 * pixels + 6) + copies for task in tasks)

    fits = max(1, min(_COPY_BYTES // (plan.depth * 16 * plan.width), plan.height))
    choices = [(p, r) for r in range(fits, 0, -1) for p in range(most, 0, -1) if p <= (plan.height % r or r) * plan.width]
    pixels, rows = min([choice for choice in choices if choice[0] >= min(most, 5)] or choices, key=cost)
    return pixels, rows, _task_blocks(spec, -(-plan.height // rows))


def _task_blocks(spec, row_tasks):
    """Blocks of channels of a task: all, or fewer where there would be less than four tasks."""
    blocks = words(spec.out_channels // spec.groups)
    wanted = max(1, 4 // row_tasks)
    return blocks // max(d for d in range(1, wanted + 1) if blocks % d == 0)


#: Processors that execute in order: LLVM places more independent work between an instruction and its use.
IN_ORDER = ("cortex-a53", "cortex-a55")


def space(spec, isa, first):
    """Schedules around ``first``."""
    pixels = range(3, 7) if isa.registers == 32 else range(1, 3)
    return [first, *(replace(first, pixels=p) for p in pixels if p != first.pixels)]


class Plan:
    """Sizes, and which taps each output pixel has."""

    def __init__(self, spec):
        g, w = Geometry.of(spec), spec.window
        self.spec, self.window = spec, w
        self.width, self.height = w.out_width, w.out_height
        self.group_words, self.pixel_words = g.group_words, g.pixel_words
        self.kernel_words = w.kernel[0] * w.kernel[1] * g.group_words
        self.depth = neon_product.steps(self.kernel_words)
        self.bits = w.kernel[0] * w.kernel[1] * (spec.in_channels // spec.groups)
        #: Whether the last step is a half: its two words are copied twice.
        self.half = not spec.zeros and neon_product.ends_with_half(self.kernel_words)
        #: Words of a quad of channels, and of a block.
        self.quad_words = self.depth * neon_product.STEP_WORDS * neon_product.QUAD - (8 if self.half else 0)
        self.block_words = self.quad_words * BLOCK // neon_product.QUAD

    def taps(self, axis, position):
        """Interval of the taps inside the image, as ``(first, stop)``."""
        w = self.window
        size, step = (w.in_height, w.in_width)[axis], w.dilations[axis]
        origin = position * w.strides[axis] - w.pads[axis]
        inside = [k for k in range(w.kernel[axis]) if 0 <= origin + k * step < size]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)

    @cached_property
    def kinds(self):
        """Per axis, the different intervals of taps; that of all taps is the first."""
        found = []
        for axis, size in enumerate((self.height, self.width)):
            full = (0, self.window.kernel[axis])
            found.append(list(dict.fromkeys([full, *(self.taps(axis, p) for p in range(size))])))
        return found

    @property
    def classes(self):
        """Number of classes of pixels; 1 if no tap is ever outside."""
        return len(self.kinds[0]) * len(self.kinds[1])

    @property
    def corrected(self):
        """Whether counts are corrected: by the table's row of the pixel's class, or (unipolar) by its only row."""
        return self.spec.unipolar or self.classes > 1

    @property
    def on_counts(self):
        """Whether corrections of counts are integers, so that the epilogue may compare counts."""
        return not self.spec.unipolar and all(int(n) % 2 == 0 for n in self._missing_bits())

    def _missing_bits(self):
        rows, columns = self.window.kernel
        inside = [(b - a) * (d - c) for a, b in self.kinds[0] for c, d in self.kinds[1]]
        return [(rows * columns - n) * (self.spec.in_channels // self.spec.groups) for n in inside]

    def corrections(self, weights):
        """``int16[classes, O]`` from ``uint32[O, kh, kw, words]``."""
        bits = np.bitwise_count(weights).sum(-1, dtype=np.int64)  # [O, kh, kw]
        if self.spec.unipolar:
            return -bits.sum((1, 2))[None].astype(np.int16)
        table = []
        for (a, b), (c, d) in ((rows, columns) for rows in self.kinds[0] for columns in self.kinds[1]):
            table.append(bits.sum((1, 2)) - bits[:, a:b, c:d].sum((1, 2)))
        table, missing = np.array(table), np.array(self._missing_bits())[:, None]
        return (missing // 2 - table if self.on_counts else 2 * table - missing).astype(np.int16)


def pack_weights(spec, weights):
    """Weights in the kernel's order.

    Parameters
    ----------
    weights : uint32[O, kh, kw, words(in_channels / groups)]

    Returns
    -------
    uint32[words(O), steps * 128 (a half step: 64) + classes * 16]
        For each block of 32 channels its weights (:func:`.neon_product.pack_rows`), then ``int16[classes, 32]`` if counts are corrected.
    """
    plan = Plan(spec)
    packed = neon_product.pack_rows(weights.reshape(len(weights), -1), BLOCK, plan.half)
    packed = packed.reshape(len(packed), -1)
    if not plan.corrected:
        return packed
    table = np.zeros((len(packed) * BLOCK, plan.classes if not spec.unipolar else 1), np.int16)
    table[: len(weights)] = plan.corrections(weights).T
    table = table.reshape(len(packed), BLOCK, -1).transpose(0, 2, 1)
    return np.concatenate([packed, np.ascontiguousarray(table).reshape(len(packed), -1).view("<u4")], axis=1)


class Kernel:
    """Builds one PrimFunc. The methods that return statements follow the loop nest from outside in."""

    def __init__(self, spec, schedule, isa):
        self.spec, self.schedule, self.isa, self.plan = spec, schedule, isa, Plan(spec)
        plan = self.plan
        self.blocks, self.group_blocks = words(spec.out_channels), words(spec.out_channels // spec.groups)
        self.rows = min(schedule.task_rows, plan.height)
        least = plan.width * (plan.height % self.rows or self.rows)  # pixels of the smallest task
        self.pixels = min(schedule.pixels, least)
        self.row_words = plan.depth * neon_product.STEP_WORDS
        #: Whether counts themselves are corrected, those of pixels that need it.
        self.in_place = plan.corrected and plan.on_counts
        w = spec.window
        plain = w.kernel == (1, 1) and w.strides == (1, 1) and not any(w.pads)
        #: Whether the data themselves are rows of whole steps.
        self.direct = plain and spec.groups == 1 and plan.group_words == self.row_words and not spec.zeros

    def build(self):
        w, spec, plan = self.spec.window, self.spec, self.plan
        batch = tirx.Var("n", "int64")
        shape = (batch, w.in_height, w.in_width, plan.pixel_words)
        self.data = T.buffer("data", shape, "uint32")
        table = (plan.classes if not spec.unipolar else 1) * BLOCK // 2 if plan.corrected else 0
        self.weights = T.buffer("weights", (self.blocks, plan.block_words + table), "uint32")
        self.mask = T.buffer("zeros", shape, "uint32") if spec.zeros else None
        self.emitter = Emitter(spec.epilogue, spec.out_channels, self.isa, (batch, plan.height, plan.width), "int32")
        params = [self.data, self.weights, *([self.mask] if spec.zeros else []), *self.emitter.inputs, *self.emitter.outputs]
        row_tasks, step = -(-plan.height // self.rows), min(self.schedule.task_blocks, self.group_blocks)
        group_tasks = -(-self.group_blocks // step)
        block_tasks = spec.groups * group_tasks

        def task(number):
            image, bind_image = T.bind("image", number // (row_tasks * block_tasks))
            first, bind_first = T.bind("row", number // block_tasks % row_tasks * self.rows)
            group, bind_group = T.bind("group", number // group_tasks % spec.groups)
            block, bind_block = T.bind("block", number % group_tasks * step)
            count = step if self.group_blocks % step == 0 else tirx.min(T.i64(step), self.group_blocks - block)
            self.offset, first_block = group * plan.group_words, group * self.group_blocks + block
            return [bind_image, bind_first, bind_group, bind_block, self.task(image, first, first_block, count)]

        return T.function("binary_conv2d_neon", params, T.parallel("task", batch * (row_tasks * block_tasks), task))

    def task(self, image, first, block, blocks):
        """Output rows from ``first`` on, ``blocks`` blocks of channels from ``block`` on; all of one group."""
        plan = self.plan
        rows = self.rows if plan.height % self.rows == 0 else tirx.min(T.i64(self.rows), plan.height - first)
        self.image, self.first = image, first
        self.results, allocate = T.local("results", self.pixels * BLOCK, "int32")
        body = [allocate]
        pixels = self.rows * plan.width
        if not self.direct:
            self.copy, allocate_copy = memory("windows", pixels * self.row_words, "uint32")
            body += [allocate_copy]
        if plan.classes > 1:
            self.classes, allocate_classes = memory("classes", pixels, "int32")
            body += [allocate_classes]
        if self.spec.zeros:
            self.zeros, allocate_zeros = memory("zeros_windows", pixels * self.row_words, "uint32")
            self.base, allocate_base = memory("base", pixels, "int32")
            body += [allocate_zeros, allocate_base]
        count, bind_count = T.bind("pixels", T.i64(1) * rows * plan.width)
        body += [bind_count, [] if self.direct else T.for_("y", rows, lambda i: self.copy_row(first + i, i * plan.width))]

        def nest(tile_of, pixels_):
            return T.for_("block", blocks, lambda b: tile_of(block + b, pixels_))

        if not self.spec.zeros:
            return [*body, nest(self.tiles, count)]
        found, scan = self.any_zero(count)
        return [*body, scan, T.when(found == T.constant(0, "int32"), nest(self.tiles, count), nest(self.slow_tiles, count))]

    # Windows --------------------------------------------------------------------------------------------------------------------------

    def copy_row(self, y, first):
        """Copy the windows of output row ``y``; its first pixel has the number ``first`` in the task."""
        plan = self.plan
        y, bind_y = T.bind("y", y)
        first, bind_first = T.bind("first", first)
        kind, bind_kind = T.bind("kind", tirx.Cast("int32", self.row_kind(y))) if plan.classes > 1 else (None, [])
        body = [bind_y, bind_first, bind_kind]
        for taps, run in groupby(range(plan.width), lambda x: plan.taps(1, x)):
            run = list(run)

            def pixel(i, taps=taps, begin=run[0]):
                x, bind_x = T.bind("x", begin + i)
                statements = [bind_x, self.copy_window(y, x, first + x, taps)]
                if plan.classes > 1:
                    column = plan.kinds[1].index(taps)
                    number = kind * len(plan.kinds[1]) + column
                    statements.append(T.store(self.classes, number * (BLOCK // 2), first + x))
                return statements

            body.append(T.for_("x", len(run), pixel))
        return body

    def row_kind(self, y):
        """Number of the kind of an output row, as an expression."""
        plan, value = self.plan, T.i64(0)
        for position in range(plan.height):
            number = plan.kinds[0].index(plan.taps(0, position))
            if number:
                value = tirx.Select(tirx.EQ(y, T.i64(position)), T.i64(number), value)
        return value

    def copy_window(self, y, x, pixel, taps):
        """Copy one window: kernel rows and columns outside the image are 0."""
        plan, w = self.plan, self.spec.window
        at, bind_at = T.bind("at", pixel * self.row_words)
        body = [bind_at]
        row_words = w.kernel[1] * plan.group_words
        for r in range(w.kernel[0]):
            target, source_row = at + r * row_words, y * w.strides[0] + (r * w.dilations[0] - w.pads[0])
            inside = [self.copy_taps(source_row, x, target, taps)]
            low, high = r * w.dilations[0] - w.pads[0], (plan.height - 1) * w.strides[0] + r * w.dilations[0] - w.pads[0]
            if 0 <= low and high < w.in_height:
                body += inside
            else:
                condition = tirx.And(source_row >= T.i64(0), source_row < T.i64(w.in_height))
                body.append(T.when(condition, inside, self.fill(target, row_words, True)))
        end = at + plan.kernel_words
        if not plan.half:
            return [*body, self.fill(end, self.row_words - plan.kernel_words, False)]
        last = at + (self.row_words - neon_product.STEP_WORDS)
        again = T.store_vector(self.copy, [last + 2], T.load_vector(self.copy, [last], 2))
        return [*body, self.fill(end, plan.kernel_words % 2, False), again]

    def copy_taps(self, source_row, x, target, taps):
        """Copy the taps of one kernel row."""
        plan, w = self.plan, self.spec.window
        first, stop = taps
        size = plan.group_words
        body = [self.fill(target, first * size, True), self.fill(target + stop * size, (w.kernel[1] - stop) * size, True)]
        if first == stop:
            return body
        column = x * w.strides[1] - w.pads[1]
        source, bind = T.bind("source", (source_row * w.in_width + column) * plan.pixel_words + self.offset)
        body.append(bind)
        joined = w.dilations[1] == 1 and self.spec.groups == 1
        runs = [(first, stop - first)] if joined else [(s, 1) for s in range(first, stop)]
        for s, count in runs:
            body.append(self.move(source + s * w.dilations[1] * plan.pixel_words, target + s * size, count * size))
        return body

    def move(self, source, target, length):
        """Copy ``length`` words."""

        def one(at, lanes):
            index = [self.image, 0, 0, source + at]
            pairs = [(self.copy, self.data)] + ([(self.zeros, self.mask)] if self.spec.zeros else [])
            return [T.store_vector(to, [target + at], T.load_vector(array, index, lanes)) for to, array in pairs]

        return _vectors(length, one)

    def fill(self, target, length, outside):
        """Clear ``length`` words; the mask of ``outside`` taps is set instead, in the bits of channels."""

        def one(at, lanes):
            statements = [T.store_vector(self.copy, [target + at], T.splat(0, "uint32", lanes))]
            if self.spec.zeros and not outside:
                statements.append(T.store_vector(self.zeros, [target + at], T.splat(0, "uint32", lanes)))
            return statements

        body = _vectors(length, one) if length else []
        if self.spec.zeros and outside and length:
            size, bits = self.plan.group_words, self.spec.in_channels // self.spec.groups
            last = T.constant((1 << (bits - 1) % WORD_BITS + 1) - 1, "uint32")

            def tap(number):
                ones = [T.store(self.zeros, T.constant(0xFFFFFFFF, "uint32"), target + number * size + i) for i in range(size - 1)]
                return [ones, T.store(self.zeros, last, target + number * size + size - 1)]

            body = [body, T.for_("tap", length // size, tap)]
        return body

    # Zeros ----------------------------------------------------------------------------------------------------------------------------

    def any_zero(self, pixels):
        """``(word, statements)``: not 0 where one of the task's windows has a zero; sets K - popc(z) of every pixel."""
        found, allocate = T.local("found", 1, "int32")
        outside = self.plan.bits

        def pixel(p):
            count, allocate_count = T.local("count", 4, "int32")

            def step(k):
                words_ = T.load_vector(self.zeros, [p * self.row_words + k * 4], 4)
                bits = tirx.reinterpret("int32x4", tirx.popcount(words_))
                return T.store_vector(count, [0], T.load_vector(count, [0], 4) + bits)

            total = T.sum_lanes(T.load_vector(count, [0], 4))
            return [
                allocate_count, T.store_vector(count, [0], T.splat(0, "int32", 4)), T.for_("k", self.plan.depth, step),
                T.store(self.base, T.constant(outside, "int32") - total, p),
                T.store(found, T.load(found, 0) | (total ^ self.missing(p)), 0),
            ]  # fmt: skip

        start = T.store(found, T.constant(0, "int32"), 0)
        variable, bind = T.bind("any", T.load(found, 0))
        return variable, [allocate, start, T.for_("p", pixels, pixel), bind]

    def missing(self, p):
        """Bits of the taps that pixel ``p`` has outside the image."""
        plan = self.plan
        if plan.classes == 1:
            return T.constant(0, "int32")
        number, value = T.load(self.classes, p), T.constant(0, "int32")
        for kind, bits in enumerate(plan._missing_bits()):
            if bits:
                value = tirx.Select(tirx.EQ(number, T.constant(kind * (BLOCK // 2), "int32")), T.constant(bits, "int32"), value)
        return value

    # Tiles ----------------------------------------------------------------------------------------------------------------------------

    def row(self, first):
        """``row(r, k)`` for :class:`Product`, of the pixels from ``first`` on."""
        if self.direct:
            base = (self.first * self.plan.width + first) * self.row_words
            return lambda r, k: (self.data, [self.image, 0, 0, base + (r * self.row_words + k * 4)])
        base = first * self.row_words
        return lambda r, k: (self.copy, [base + (r * self.row_words + k * 4)])

    def tiles(self, block, pixels):
        """All tiles of a block of channels."""
        block, bind_block = T.bind("block", block)

        def each(step, first):
            return T.for_("p", self.pixels, lambda p: step(block, first + p, p))

        def tile_(number):
            first, bind = T.bind("first", tirx.min(number * self.pixels, pixels - self.pixels))
            parts = T.for_("part", BLOCK // neon_product.QUAD, lambda part: self.product(self.pixels, first, block, part))
            # LLVM finds better addresses in two loops than in one with a branch in it.
            return [bind, parts, each(self.correct, first) if self.in_place else [], each(self.finish, first)]

        count = (pixels + (self.pixels - 1)) // self.pixels
        return [bind_block, T.for_("tile", count, tile_)]

    def weight(self, block, part):
        base = part * self.plan.quad_words
        return lambda _quad, c, k: (self.weights, [block, base + (k * 16 + c * 4)])

    def product(self, rows, first, block, part, zeros=None):
        """One quad of channels of a tile, into ``results``."""
        base, bind = T.bind("rows", T.i64(0) + first)
        places = self.row(base), self.weight(block, part), zeros
        product = neon_product.product(self.isa, rows, self.plan.depth, *places, half=self.plan.half)
        stores = [T.store_vector(self.results, [part * 4 + r * BLOCK], product.sums(r, 0)) for r in range(rows)]
        return [bind, product.statements(), stores]

    def finish(self, block, pixel, p):
        """Corrections and the epilogue of a pixel."""
        plan, total, body = self.plan, self.plan.bits, []
        corrected = plan.corrected and not self.in_place
        if corrected:
            at, body = self.table_row(pixel)
        values = []
        for v in range(BLOCK // 4):
            value = T.load_vector(self.results, [p * BLOCK + v * 4], 4)
            if corrected:
                correction = self.correction(block, at, v)
                value = value + correction if self.spec.unipolar else T.splat(total, "int32", 4) - (value + value) + correction
            values.append(value)
        return [body, self.emit(block, pixel, values, None if corrected else total)]

    def table_row(self, pixel):
        """``(index, statements)``: where a block's corrections of a pixel begin."""
        if self.plan.classes == 1 or self.spec.unipolar:
            return T.i64(self.plan.block_words), []
        at, bind = T.bind("class", tirx.Cast("int64", T.load(self.classes, pixel)) + self.plan.block_words)
        return at, [bind]

    def correction(self, block, at, v):
        """Corrections of the four channels of a vector."""
        short = tirx.reinterpret("int16x4", T.load_vector(self.weights, [block, at + v * 2], 2))
        return T.opaque(tirx.Cast("int32x4", short))

    def correct(self, block, pixel, p):
        """Corrections of counts, which are 0 for pixels all of whose taps are inside the image."""
        at, bind = self.table_row(pixel)

        def one(v):
            place = [p * BLOCK + v * 4]
            return T.store_vector(self.results, place, T.load_vector(self.results, place, 4) + self.correction(block, at, v))

        return T.when(tirx.NE(T.load(self.classes, pixel), T.constant(0, "int32")), [bind, *map(one, range(BLOCK // 4))])

    def emit(self, block, pixel, values, popcounts_of):
        place = (T.i64(0), self.first * self.plan.width + pixel)
        return self.emitter.emit(values, (self.image, *place), block * BLOCK, {}, popcounts_of=popcounts_of)

    def slow_tiles(self, block, pixels):
        """Pixels one by one, with the mask."""
        block, bind_block = T.bind("block", block)

        def pixel(p):
            def zeros(_r, k):
                return self.zeros, [p * self.row_words + k * 4]

            base, bind = T.bind("base", T.broadcast(T.load(self.base, p), 4))
            parts = T.for_("part", BLOCK // 4, lambda part: self.product(1, p, block, part, zeros))
            counts = [T.load_vector(self.results, [v * 4], 4) for v in range(BLOCK // 4)]
            return [bind, parts, self.emit(block, p, [base - (count + count) for count in counts], None)]

        return [bind_block, T.for_("p", pixels, pixel)]


def _vectors(length, one):
    """``one(at, lanes)`` for ``length`` words, as vectors of 4, 2 and 1 words; long runs in a loop."""
    whole, body = length // 4, []
    if whole > 16:
        body.append(T.for_("i", whole, lambda i: one(i * 4, 4)))
    else:
        body += [one(4 * i, 4) for i in range(whole)]
    at = whole * 4
    for lanes in (2, 1):
        if length - at >= lanes:
            body.append(one(at, lanes))
            at += lanes
    return body
