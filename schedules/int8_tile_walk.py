"""The way of a task through its tiles (AMX): products run beside the epilogue of what was multiplied before.

A job is a group of tiles times a block of 32 output channels, computed in two halves. Tiles are multiplied by a unit of their own; vector
units have time for the epilogue of sums that are in ``results`` already, a few items beside each step:

* a pixel of the 32 channels of the job before, as everywhere else (:meth:`.epilogue.Emitter.emit`), or
* for results in channel order four channels of a vector of pixels of the half before, transposed in registers
  (:meth:`.epilogue.Emitter.emit_planes`).
"""

from __future__ import annotations

import math

from tvm import tirx

from bnntvm.schedules import tir as T
from bnntvm.schedules.int8_layout import BLOCK
from bnntvm.schedules.int8_tiles import HALVES, TILE
from bnntvm.schedules.transpose import QUAD, quad

#: Steps of half a block above which the first one, which stores the sums of the half before, is not waited for.
_LONG = 4


class Walk:
    """The jobs of a task.

    Parameters
    ----------
    kernel : int8_kernel.Kernel
    """

    def __init__(self, kernel):
        self.kernel, self.engine, self.layout, self.emitter = kernel, kernel.engine, kernel.layout, kernel.emitter
        self.tiling = self.engine.tiling
        self.groups, self.large, self.large_groups = self.engine.groups, self.engine.most, self.engine.large_groups
        # Sums of half a block, ``[pixels, 16]``. Planes are cut from 16 rows, which may begin before the first and end behind the last.
        self.half = (self.large * self.tiling.rows + TILE) * TILE
        planar = [o.kind for o in self.emitter.epilogue.outputs] == ["planar"]
        self.items = _Planes(self) if planar else _Pixels(self)
        #: Whether the kernel needs the numbers of flat pixels.
        self.numbers_pixels = not (planar or self.tiling.along)

    def work(self, blocks, groups):
        """Statements of a task: ``blocks`` of channels for each of ``groups`` of tiles, each (first, number)."""
        kernel, engine = self.kernel, self.engine
        kernel.results, allocation = T.memory("results", self.items.jobs * HALVES * self.half + TILE * TILE, "int32")
        start = engine.start()  # first: what follows uses its arrays
        jobs, bind_jobs = T.bind("jobs", T.i64(blocks[1]) * groups[1])

        def parts(number):
            """Block, number of the group in the task, first tile and number of tiles of a job."""
            within, bind_within = T.bind("within", number % groups[1])
            group, bind_group = T.bind("group", groups[0] + within)
            block, bind_block = T.bind("block", blocks[0] + number // groups[1])
            first, count = group * (self.large - 1) + tirx.min(group, T.i64(self.large_groups)), T.i64(self.large)
            if self.large_groups != self.groups:
                count = tirx.Select(group < self.large_groups, T.i64(self.large), T.i64(self.large - 1))
            else:
                first = group * self.large
            first, bind_first = T.bind("first", first)
            return block, within, group, first, count, [bind_within, bind_group, bind_block, bind_first]

        def job(number):
            block, within, group, first, count, binds = parts(number)
            after, bind_next = T.bind("after", tirx.min(number + 1, jobs - 1))
            fresh = (block, within == T.i64(0)), (blocks[0] + after // groups[1], after % groups[1] == T.i64(0))
            last_block, _, _, last_first, last_count, last_binds = parts(tirx.max(number - 1, T.i64(0)))
            last_count, bind_count = T.bind("count", tirx.Select(number > 0, last_count, T.i64(0)))
            last, current = (last_block, last_first, last_count, number + 1), (block, first, count, number)

            def products(tiles):
                starts = [self.start_of(first + m) for m in range(tiles)]
                return engine.products(starts, *fresh, to, lambda n, step: self.items.beside(n, step, last, current))

            def to(n):
                return tirx.Select(n == 0, self.sums(number + 1, 1), self.sums(number, 0))

            both = T.when(group < self.large_groups, products(self.large), products(self.large - 1))
            body = products(self.large) if self.large_groups == self.groups else both
            return [binds, bind_next, last_binds, bind_count, body]

        block, _, _, first, count, binds = parts(jobs - 1)
        keep = [engine.keep(m, self.sums(jobs - 1, 1)) for m in range(self.large)]
        drain = self.items.drain((block, first, count, jobs - 1))
        prepare = engine.prepare(T.i64(blocks[0]))
        return [allocation, start, bind_jobs, prepare, T.for_("job", jobs, job), binds, keep, drain, engine.finish()]

    def sums(self, job, half):
        """Element of ``results`` from which on the sums of half a block lie."""
        number = half if self.items.jobs == 1 else job % 2 * HALVES + half
        return number * self.half + TILE * TILE

    def start_of(self, tile):
        """Flat pixel where a tile begins."""
        tiling = self.tiling
        if not tiling.along:
            return tile * tiling.rows
        return tile // tiling.along * self.layout.pitch + self._within(tile)

    def pixel_of(self, tile):
        """Pixel of the result where a tile begins, or the first one behind."""
        tiling, layout = self.tiling, self.layout
        if tiling.along:
            return tile // tiling.along * tiling.line + self._within(tile)
        at, width = tile * tiling.rows, layout.window.out_width
        return at // layout.pitch * width + tirx.min(at % layout.pitch, T.i64(width))

    def _within(self, tile):
        """Pixels of a line before a tile."""
        before = tile % self.tiling.along * self.tiling.rows
        return before if self.tiling.dense else tirx.min(before, T.i64(self.tiling.line - self.tiling.rows))


class _Pixels:
    """Pixel after pixel, 32 channels of each."""

    #: Jobs whose sums are kept at a time.
    jobs = 2

    def __init__(self, walk):
        self.walk = walk
        self.most = walk.large * walk.tiling.rows

    def beside(self, n, step, last, current):  # noqa: ARG002
        """Items beside a step of half ``n``."""
        steps = HALVES * self.walk.engine.total
        share = -(-self.most // steps)
        return [self.item((n * self.walk.engine.total + step) * share + i, last) for i in range(share)]

    def drain(self, job):
        """Items of the last job."""
        return T.for_("item", self.most, lambda number: self.item(number, job))

    def item(self, number, job):
        """The epilogue of pixel ``number`` of a job, if it has so many."""
        walk, kernel, (block, first, count, own) = self.walk, self.walk.kernel, job
        rows, lanes = walk.tiling.rows, kernel.lanes
        if walk.tiling.dense:
            pixel, exists = walk.pixel_of(first) + number, None
        elif walk.tiling.along:
            pixel, exists = walk.pixel_of(first + number // rows) + number % rows, None
        else:
            pixel = tirx.Cast("int64", T.load(kernel.pixels, first * rows + number))
        pixel, bind = T.bind("pixel", pixel)
        if not walk.tiling.along:
            exists = pixel >= T.i64(0)
        values = [T.load_vector(kernel.results, [walk.sums(own, half) + number * TILE], lanes) for half in range(HALVES)]
        emitted = walk.emitter.emit(values, kernel.place(pixel), block * BLOCK, {})
        emitted = [bind, emitted if exists is None else T.when(exists, emitted)]
        return T.when(number < count * rows, emitted)


class _Planes:
    """Four channels after four, for each one vector of pixels after the other: they are neighbours in memory."""

    jobs = 1

    def __init__(self, walk):
        self.walk, self.layout, self.tiling, self.emitter = walk, walk.layout, walk.tiling, walk.emitter
        self.lanes = walk.kernel.lanes
        pixels, window = walk.large * self.tiling.rows, self.layout.window
        #: Whether vectors begin where cache lines do: a store across two lines takes twice as long.
        self.aligned = self.tiling.dense and window.out_height * window.out_width % self.lanes == 0
        before = self.lanes - math.gcd(self.tiling.rows, self.lanes) if self.aligned else 0
        self.vectors = -(-(pixels + before) // self.lanes) if self.tiling.dense else walk.large
        self.most = TILE // QUAD * self.vectors

    def beside(self, n, step, last, current):
        """Items beside a step of half ``n``: of the half before, whose sums are stored in the first step."""
        later = 1 if self.walk.engine.total > _LONG else 0
        share = -(-self.most // (self.walk.engine.total - later))
        job = [tirx.Select(n == 0, a, b) for a, b in zip(last, current)]
        half = 1 - n
        items = [self.item((step - later) * share + i, half, job) for i in range(share)]
        return T.when(step > 0, items) if later else items

    def drain(self, job):
        """Items of the last half."""
        return T.for_("item", self.most, lambda number: self.item(number, T.i64(1), job))

    def item(self, number, half, job):
        """The epilogue of four channels of a vector of pixels, if the job has it."""
        walk, kernel, (block, first, count, own) = self.walk, self.walk.kernel, job
        vector, bind_vector = T.bind("vector", number % self.vectors)
        part, bind_part = T.bind("part", number // self.vectors * QUAD)
        channel, bind_channel = T.bind("channel", block * BLOCK + half * TILE + part)
        row, exists, bind_where, store = (self._of_pixels if self.tiling.dense else self._of_tile)(first, count, vector)
        at, bind_at = T.bind("at", walk.sums(own, half) + row * TILE + part)
        body, planes = quad(lambda row: T.load_vector(kernel.results, [at + row * TILE], QUAD), self.lanes)
        more, planes = self.emitter.emit_planes(planes, kernel.image_number, channel)
        exists = tirx.And(exists, number < T.i64(self.most))
        if self.emitter.channels % BLOCK:
            exists = tirx.And(exists, channel < self.emitter.channels)
        return [bind_vector, bind_part, bind_channel, bind_where, T.when(exists, [bind_at, body, more, store(channel, planes)])]

    def _of_pixels(self, first, count, vector):
        """(first row of the job's results, whether the job has it, statements, store) of a vector, where all rows are pixels."""
        begin, bind_begin = T.bind("begin", self.walk.pixel_of(first))
        shift = begin % self.lanes if self.aligned else T.i64(0)
        row, bind_row = T.bind("row", vector * self.lanes - shift)
        end, bind_end = T.bind("end", count * self.tiling.rows)

        def store(channel, planes):
            lane = T.lane_numbers(self.lanes)
            here, bind_here = T.bind("here", tirx.Cast("int32", row))
            inside = lane < T.broadcast(tirx.Cast("int32", end) - here, self.lanes)
            if self.aligned:
                inside = tirx.And(inside, T.broadcast(T.constant(0, "int32") - here, self.lanes) <= lane)
            mask, bind_mask = T.bind("mask", inside)
            return [bind_here, bind_mask, self._stores(begin + row, channel, planes, mask)]

        return row, row < end, [bind_begin, bind_row, bind_end], store

    def _of_tile(self, first, count, vector):
        """The same of a tile."""

        def store(channel, planes):
            tile, bind_tile = T.bind("tile", first + vector)
            pixel, bind_pixel = T.bind("pixel", self.walk.pixel_of(tile))
            body = [bind_tile, bind_pixel]
            if self.tiling.along:
                return [body, self._stores(pixel, channel, planes, T.prefix_mask(self.tiling.rows, self.lanes))]
            valid, number, binds = self._valid(tile)
            names = [T.bind("plane", T.compress(plane, valid)) for plane in planes]
            mask, bind_mask = T.bind("mask", T.prefix_mask(number, self.lanes))
            return [body, binds, [n[1] for n in names], bind_mask, self._stores(pixel, channel, [n[0] for n in names], mask)]

        return vector * self.tiling.rows, vector < count, [], store

    def _stores(self, pixel, channel, planes, mask):
        """Statements that store four planes from a pixel on."""
        target, channels, body = self.emitter.outputs[0], self.emitter.channels, []
        for i, plane in enumerate(planes):
            store = T.store_masked(target, [self.walk.kernel.image_number, channel + i, 0, pixel], plane, mask)
            body.append(store if channels % QUAD == 0 else T.when(channel + i < channels, store))
        return body

    def _valid(self, tile):
        """``(mask, number, statements)`` of the rows of a tile that are pixels of the result."""
        layout, rows, lanes = self.layout, self.tiling.rows, self.lanes
        width, pitch = layout.window.out_width, layout.pitch
        at, bind = T.bind("flat", tile * rows)
        column, bind_column = T.bind("column", tirx.Cast("int32", at % pitch))
        lane = T.broadcast(column, lanes) + T.lane_numbers(lanes)
        left = tirx.min(layout.flat - at, T.i64(rows))
        lane, bind_lane = T.bind("lane", tirx.Select(T.prefix_mask(left, lanes), lane, T.splat(width, "int32", lanes)))
        mask = lane < T.splat(width, "int32", lanes)
        for begin in range(pitch, pitch + rows - 1, pitch):
            mask = tirx.Or(mask, tirx.And(T.splat(begin, "int32", lanes) <= lane, lane < T.splat(begin + width, "int32", lanes)))
        mask, bind_mask = T.bind("valid", mask)
        word = tirx.Cast("uint32", T.mask_word([mask]))
        count, bind_count = T.bind("number", tirx.Cast("int64", tirx.popcount(word)))
        return mask, count, [bind, bind_column, bind_lane, bind_mask, bind_count]
