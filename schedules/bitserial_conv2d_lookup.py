"""The kernel of a convolution on several planes that looks sums up, see :mod:`.bitserial_lookup`.

Loop order, outermost first: tasks (image, rows; parallel), rows, blocks of ``vectors`` registers of output channels, tiles of pixels, pairs
of a part of the data planes and a weight plane, taps and groups of input channels. A task unpacks all weights to one index per byte, and
keeps the tables of as many input rows as the kernel reaches over.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx

from bnntvm.schedules import bitserial_lookup as lookup
from bnntvm.schedules import neon
from bnntvm.schedules import tir as T
from bnntvm.schedules.binary_conv2d_adders import memory, popcount, ternary_logic
from bnntvm.schedules.binary_conv2d_kernel import BLOCK, Kernel
from bnntvm.schedules.binary_conv2d_tiles import segments
from bnntvm.schedules.bitserial_conv2d_kernel import Corrections, choose
from bnntvm.schedules.epilogue import Emitter
from bnntvm.schedules.strips import Strips

#: Most look-ups that are unrolled: their code fits in the cache of decoded instructions.
MOST_UNROLLED = 200
#: Most pixels of a row that are collected before they are stored in channel order.
_STRIP_PIXELS = 128


class LookupKernel(Kernel):
    """Builds one PrimFunc. Positions in tables and weights count steps: one for each group of input channels."""

    unipolar = False

    def __init__(self, spec, schedule, isa):
        super().__init__(spec, replace(schedule, vectors=1), isa)
        self.planes, self.vectors, self.bytes = spec.planes, schedule.vectors, lookup.octets(isa)
        self.lanes = self.bytes // 4
        self.bits, self.entries = lookup.shape(isa)
        self.sources_parts, self.coefficients = lookup.parts(spec.planes), lookup.weight_coefficients(spec.planes)
        self.words_of_pixel = self.geometry.pixel_words
        self.groups, self.steps, self.padded_steps = lookup.steps(self.geometry.kernel, spec.in_channels, self.bits)
        self.geometry = replace(self.geometry, group_words=self.groups, pixel_words=self.groups)
        self.word_step = self.parts = 1
        self.vector_blocks = -(-spec.out_channels // self.bytes)
        self.blocks = self.vector_blocks // self.vectors
        self.channels = self.vectors * self.bytes  # of a block
        self.reach = (self.geometry.kernel[0] - 1) * self.geometry.dilations[0] + 1
        self.blocks_at_once = self.channels // BLOCK
        self.corrections = Corrections(self, [lookup.share(spec.planes, spec.in_channels, self.bits)], self.blocks_at_once)

    @property
    def packed_words(self):
        """Packed words of one vector of channels and one weight plane."""
        return self.padded_steps * self.bits * self.bytes // 8 // 4

    def build(self):
        spec, g = self.spec, self.geometry
        batch = tirx.Var("n", "int64")
        shape = (batch, spec.window.in_height, spec.window.in_width, self.words_of_pixel)
        self.sources = [T.buffer(f"data{p}", shape, "uint32") for p in range(len(self.planes.data))]
        self.weights = T.buffer("weights", (self.vector_blocks, len(self.coefficients) * self.packed_words), "uint32")
        dims = (batch, spec.window.out_height, spec.window.out_width)
        self.emitter = Emitter(spec.epilogue, spec.out_channels, self.isa, dims, "int32")
        rows = self.schedule.task_rows
        tasks = -(-g.out_height // rows)

        def task(number):
            image, bind_image = T.bind("image", number // tasks)
            row, bind_row = T.bind("row", number % tasks * rows)
            return [bind_image, bind_row, self.rows_of_task(image, row)]

        params = [*self.sources, self.weights, *self.emitter.inputs, *self.emitter.outputs]
        steps = self.vector_blocks * len(self.coefficients) * self.padded_steps
        self.indices, indices = memory("indices", steps * self.bytes, "uint8")
        body = [indices, self.unpack(), self.corrections.prepare(), T.parallel("task", batch * tasks, task)]
        return T.function("bitserial_conv2d_lookup", params, body)

    def rows_of_task(self, image, row):
        """All blocks of channels of the output rows from ``row`` on that belong to one task."""
        g, tile = self.geometry, max(self.plan.pixels, 1)
        rows = self._count(g.out_height, self.schedule.task_rows, row)
        self.image = image
        self.table_rows = self.reach * g.width * self.groups  # of a part of the data planes
        self.results, results = memory("results", tile * self.channels, "int32")
        self.strips = self._strips(tile)
        self.totals, totals = memory("totals", tile * self.vectors * self.bytes, "uint16")
        self.tables, tables = memory("tables", len(self.sources_parts) * self.table_rows * self.entries, "uint8")
        self.sums, sums = memory("sums", len(self.planes.data) * 2**self.bits * self.entries, "uint8")

        def line(i):
            y, bind = T.bind("y", row + i)
            bottom = y * g.strides[0] - g.before[0]
            old = tirx.Select(tirx.GT(i, T.i64(0)), T.i64(max(self.reach - g.strides[0], 0)), T.i64(0))
            first, bind_first = T.bind("new", bottom + old)
            # Rows below the last one that was written are new; strides longer than the kernel skip some.
            write = T.for_("fill", bottom + self.reach - first, lambda j: self.write_tables(first + j))
            return [bind, bind_first, write, T.for_("block", self.blocks, lambda b: self.block_of_row(b, y))]

        prepared = [results, totals, tables, sums, self.strips.allocation, self.sums_of_indices()]
        return [*prepared, T.for_("line", rows, line)]

    def _strips(self, tile):
        """Results in channel order are collected for a row, so that whole lines are written, or for a tile if rows are long."""
        width = self.geometry.out_width
        self.whole_rows = width <= _STRIP_PIXELS
        return Strips(self.emitter, width, [1], self.blocks_at_once) if self.whole_rows else Strips.of_pixels(self.emitter, tile)

    @property
    def _leaves_the_cache(self):
        """Whether the results of an image are too large to wait in a second-level cache for being overwritten."""
        window = self.spec.window
        return window.out_height * window.out_width * self.spec.out_channels * 4 > 1 << 20

    def block_of_row(self, block, y):
        block, bind = T.bind("block", block)
        self.block_number = block * self.blocks_at_once
        body = [bind, self.corrections.allocation()]
        if not (self.strips.numbers and self.whole_rows):
            return [*body, self.row(Sums, block, y)]
        width = self.geometry.out_width
        self.strips.first, bind_first = T.bind("pixel", y * width)

        def flush(number):
            first, bind = T.bind("block", block * self.blocks_at_once + number)
            return [bind, self._if_exists(first, self.strips.flush(self.image, first, T.i64(width), number))]

        return [*body, bind_first, self.row(Sums, block, y), T.for_("b", self.blocks_at_once, flush)]

    def _if_exists(self, block, statements):
        """``statements`` where there is a block of 32 channels with this number."""
        if self.spec.out_channels % self.channels == 0:
            return statements
        return T.when(tirx.LT(block * BLOCK, T.i64(self.spec.out_channels)), statements)

    # What a call prepares, and a task ---------------------------------------------------------------------------------------------------

    def unpack(self):
        """Statements that write the weights as one index in each byte."""
        octets, lanes = self.bytes, self.lanes
        together = lookup.together(self.bits)
        packed = together * self.bits // 8  # vectors that hold the steps
        rows = self.padded_steps // together

        def vector(v, i):
            loaded, binds = [], []
            for part in range(packed):
                w, bind = T.bind("w", T.load_vector(self.weights, [v, (i * packed + part) * lanes], lanes))
                loaded.append(w)
                binds.append(bind)
            at = (v * (rows * len(self.coefficients)) + i) * (together * octets)
            stores = []
            for number, value in enumerate(self._indices(loaded)):
                value = T.tirx.reinterpret(T.vector_type("uint8", octets), value)
                stores.append(T.store_vector(self.indices, [at + number * octets], value))
            return [binds, stores]

        whole = rows * len(self.coefficients)
        return T.for_("v", self.vector_blocks, lambda v: T.for_("i", whole, lambda i: vector(v, i)))

    def _indices(self, loaded):
        def number(value):
            return T.splat(value, "uint32", self.lanes)

        if self.bits == 4:
            low = number(0x0F0F0F0F)
            return [loaded[0] & low, (loaded[0] >> number(4)) & low]
        # vpermb ignores the two upper bits of an index.
        first, second, third = (word >> number(6 - 2 * i) for i, word in enumerate(loaded))
        select = 0xCA  # a ? b : c
        rest = ternary_logic(number(0x0C0C0C0C), second, third, select)
        return [*loaded, ternary_logic(number(0x03030303), first, rest, select)]

    def count_taps(self, corrections):
        """Statements that write what the weights of every tap contribute: bits of indices, added in bytes while they fit."""
        (share,), most = corrections.shares, 255 // self.bits
        groups, count = self.steps // corrections.taps, len(self.coefficients)
        unused = T.splat(2**self.bits - 1, "uint8", self.bytes)

        def run(first, length, factor, sums):
            """Statements that add the bits of ``length`` indices from step ``first`` on."""
            octets = T.Registers("octets", 1, "uint8", self.bytes)

            def step(k):
                return octets.set(0, octets.get(0) + popcount(T.load_vector(self.indices, [(first + k) * self.bytes], self.bytes) & unused))

            word, bind = T.bind("octets", T.tirx.reinterpret(T.vector_type("uint32", self.lanes), octets.get(0)))
            scale, low = T.splat(factor, "int32", self.lanes), T.splat(255, "uint32", self.lanes)
            parts = [T.reinterpret("int32", (word >> T.splat(8 * j, "uint32", self.lanes)) & low) for j in range(4)]
            add = [sums.set(j, sums.get(j) + part * scale) for j, part in enumerate(parts)]
            return [*octets.allocate, *octets.fill(T.splat(0, "uint8", self.bytes)), T.for_("k", length, step), bind, add]

        def tap(vector, number):
            sums = T.Registers("share", 4, "int32", self.lanes)
            body = [*sums.allocate, *sums.fill(T.splat(corrections.constant(0), "int32", self.lanes))]
            for plane, factor in share.factors:
                first = (vector * count + plane) * self.padded_steps + number * groups
                body += [T.for_("chunk", groups // most, lambda c, f=first, w=factor: run(f + c * most, most, w, sums)),
                         run(first + groups // most * most, groups % most, factor, sums) if groups % most else []]  # fmt: skip
            for j in range(4):
                block, lane = divmod(j * self.lanes, BLOCK)
                at = corrections.tap_at(vector * (self.bytes // BLOCK) + block, 0, number, lane)
                body.append(T.store_vector(corrections.counts, at, sums.get(j)))
            return body

        return T.for_("v", self.vector_blocks, lambda v: T.for_("tap", corrections.taps, lambda number: tap(v, number)))

    def sums_of_indices(self):
        """Statements that write, for every plane and index of data bits, the sums with all weight bits."""
        weights = T.tirx.Cast(T.vector_type("uint8", self.entries), T.lane_numbers(self.entries))
        body = []
        for part in self.sources_parts:
            for p, weight, inverted in zip(part.planes, part.weights, part.inverted):
                body.append(T.for_("a", 2**self.bits, lambda a, p=p, w=weight, inv=inverted: self._sum_row(weights, a, p, w, inv)))
        return body

    def _sum_row(self, weights, index, plane, weight, inverted):
        data = index ^ T.i64(2**self.bits - 1) if inverted else index
        data = T.broadcast(tirx.Cast("uint8", data), self.entries)
        both = data ^ weights if self.planes.weight_kind == "bipolar" else data & weights
        row = popcount(both) * T.splat(weight, "uint8", self.entries)
        return T.store_vector(self.sums, [(index + plane * 2**self.bits) * self.entries], row)

    def write_tables(self, y):
        """Statements that write the tables of input row ``y``, if it is inside the image."""
        g = self.geometry
        slot = tirx.floormod(y, T.i64(self.reach)) * (g.width * self.groups)
        inside = tirx.And(tirx.GE(y, T.i64(0)), tirx.LT(y, T.i64(g.height)))
        at, bind = T.bind("slot", slot)
        pixels = T.for_("x", g.width, lambda x: self._pixel((y * g.width + x) * self.words_of_pixel, at + x * self.groups))
        return T.when(inside, [bind, pixels])

    def _pixel(self, source, target):
        """The tables of a pixel: runs of words that hold a whole number of groups, then what is left."""
        run = 3 if self.bits == 6 else 1
        groups = run * BLOCK // self.bits
        whole = self.words_of_pixel // run
        if self.spec.in_channels < whole * run * BLOCK:  # the last run has fewer groups
            whole -= 1
        rest = self.words_of_pixel - whole * run
        loop = T.for_("run", whole, lambda i: self._run_of_words(source + i * run, run, target + i * groups, groups))
        left = self.groups - whole * groups
        return [loop, self._run_of_words(source + whole * run, rest, target + whole * groups, left) if left else []]

    def _run_of_words(self, source, words, target, groups):
        body = []
        for d, part in enumerate(self.sources_parts):
            loaded = []
            for p in part.planes:
                found = []
                for word in range(words):
                    value, bind = T.bind("a", T.load(self.sources[p], self.image, 0, 0, source + word))
                    found.append(value)
                    body.append(bind)
                loaded.append(found)
            for group in range(groups):
                row = None
                for p, found in zip(part.planes, loaded):
                    at = tirx.Cast("int64", self._group_bits_of(found, group)) + p * 2**self.bits
                    one = T.load_vector(self.sums, [at * self.entries], self.entries)
                    row = one if row is None else row + one
                body.append(T.store_vector(self.tables, [(target + d * self.table_rows + group) * self.entries], row))
        return body

    def _group_bits_of(self, found, group):
        word, shift = divmod(group * self.bits, BLOCK)
        value = found[word] >> T.constant(shift, "uint32")
        if shift + self.bits > BLOCK and word + 1 < len(found):
            value = value | (found[word + 1] << T.constant(BLOCK - shift, "uint32"))
        return value & T.constant(2**self.bits - 1, "uint32")

    # Base class hooks ------------------------------------------------------------------------------------------------------------------

    def correct_row(self, first_row, last_row):
        return self.corrections.row(self.block_number, first_row, last_row)

    def correct_point(self, first_row, last_row, first, last):
        return self.corrections.point(self.block_number, first_row, last_row, first, last)

    def epilogue(self, adder, place, x, pixels):
        block, y = place[:2]
        g = self.geometry
        begin, bind_begin = T.bind("pixel", y * g.out_width + x)

        def pixel(p, number, block):
            at, channel = p * self.channels + number * BLOCK, block * BLOCK
            values = [T.load_vector(self.results, [at + lane], self.isa.lanes) for lane in range(0, BLOCK, self.isa.lanes)]
            where = (y, x + p) if g.out_width == self.spec.window.out_width else (T.i64(0), begin + p)
            strip = self.strips.place(begin + p, number if self.whole_rows else 0)
            fetch = self.strips.fetch(self.image, block, begin + p) if self.whole_rows and self._leaves_the_cache else []
            return [fetch, self.emitter.emit(values, (self.image, *where), channel, strip=strip)]

        def words(number):
            first, bind = T.bind("block", block * self.blocks_at_once + number)

            def each():
                return T.for_("p", pixels, lambda p: pixel(p, number, first))

            tile = each() if self.whole_rows else self.strips.collect(begin, T.i64(pixels), self.image, first, each)
            return [bind, self._if_exists(first, tile)]

        return [bind_begin, T.for_("b", self.blocks_at_once, words)]

    # Sums ------------------------------------------------------------------------------------------------------------------------------

    def reduce(self, adder, place, x, pattern, part, columns=None):
        """Compute the tile at ``x`` for a block of channels, into ``results``."""
        block, g = place[0], self.geometry
        start_at, bind_start = T.bind("at", (x * g.strides[1] - g.before[1]) * self.groups)
        columns = columns if columns is not None else segments(pattern)
        count = len(self.coefficients)

        def pair(number):
            d, q = number // count, number % count
            sums = Sums(self, len(pattern))
            at, bind_at = T.bind("at", start_at + d * self.table_rows)
            weights_at, bind_weights = T.bind("weights", (block * (self.vectors * count) + q) * self.padded_steps)
            factor = choose([part.factor for part in self.sources_parts], d) * choose(self.coefficients, q)
            return [sums.allocations, bind_at, bind_weights, sums.start(), self.kernel_rows(sums, place, columns, at, weights_at, None),
                    sums.add_to_results(factor)]  # fmt: skip

        body = [bind_start, self._begin(pattern)]
        return [*body, T.for_("pair", len(self.sources_parts) * count, pair)]

    def _begin(self, pattern):
        """Results start at the corrections."""
        return [
            T.for_("c", self.channels // BLOCK, lambda b, p=p, interval=interval: [
                T.store_vector(self.results, [p * self.channels + b * BLOCK + lane], self.corrections.load(interval, lane, block=b))
                for lane in range(0, BLOCK, self.lanes)
            ])
            for p, interval in enumerate(pattern)
        ]  # fmt: skip

    def kernel_rows(self, sums, place, columns, start_at, weights_at, groups):
        block, y, first_row, last_row, _ = place
        g = self.geometry

        def kernel_row(r):
            r = first_row + r
            slot = tirx.floormod(y * g.strides[0] - g.before[0] + r * g.dilations[0], T.i64(self.reach))
            data_at, bind_data = T.bind("data", start_at + slot * (g.width * self.groups))
            row_at, bind_row = T.bind("row", weights_at + r * (g.kernel[1] * self.groups))
            runs = [self.segment(sums, block, columns_, data_at, row_at, groups) for columns_ in columns]
            return [bind_data, bind_row, runs, sums.flush() if self._flushes(sums) == "row" else []]

        last = sums.flush() if self._flushes(sums) == "end" else []
        return [T.for_("r", last_row - first_row, kernel_row), last]

    def run(self, sums, block, pixels, length, at, weights_at, groups):
        """Add ``length`` consecutive steps of every pixel in ``pixels``; what lies between two times of emptying is unrolled."""

        def steps(first, count):
            together = self._unrolled(count, len(pixels)) if isinstance(count, int) else 1
            return T.for_("k", count // together, lambda k: [
                self.words(sums, block, pixels, at + step, weights_at + step, groups)
                for step in (first + k * together + j for j in range(together))
            ])  # fmt: skip

        if self._flushes(sums) != "run":
            return steps(0, length)
        every = sums.flush_every
        whole = length // every
        rest = T.static(length - whole * every)
        chunks = T.for_("chunk", whole, lambda c: [steps(c * every, every), sums.flush()])
        return [chunks, steps(whole * every, length - whole * every if rest is None else rest), sums.flush()]

    def _unrolled(self, count, pixels):
        """Steps that are unrolled: a loop of a few ends with a branch that is not foreseen."""
        most = MOST_UNROLLED // (pixels * self.vectors)
        return max((n for n in range(1, min(count, most) + 1) if count % n == 0), default=1)

    def words(self, sums, block, pixels, at, weights_at, groups, count=None):
        """One step for every pixel and vector."""
        body, weights = [neon.rolled()] if neon.is_neon(self.isa) else [], []
        for v in range(self.vectors):
            index = (weights_at + v * (len(self.coefficients) * self.padded_steps)) * self.bytes
            w, bind = T.bind("w", T.load_vector(self.indices, [index], self.bytes))
            weights.append(w)
            body.append(bind)
        for p in pixels:
            place = (at + p * self.geometry.strides[1] * self.groups) * self.entries
            row, bind = T.bind("row", T.load_vector(self.tables, [place], self.entries))
            body += [bind, sums.look_up(p, row, weights)]
        return body


class Sums:
    """Byte counters of a tile, and 16-bit totals of them in memory: of even and odd bytes together, and of odd bytes."""

    words = 1
    copies = False

    def __init__(self, kernel, pixels):
        self.kernel, self.pixels, self.vectors = kernel, pixels, kernel.vectors
        self.flush_every = lookup.flush_every(kernel.planes, kernel.isa)
        self.counts = T.Registers("counts", pixels * kernel.vectors, "uint8", kernel.bytes)
        self.allocations = self.counts.allocate
        self.half = kernel.bytes // 2

    def _at(self, cell, odd):
        return [(2 * cell + odd) * self.half]

    def start(self):
        zero = T.splat(0, "uint16", self.half)
        clear = [T.store_vector(self.kernel.totals, self._at(c, odd), zero) for c in range(len(self.counts.arrays)) for odd in (0, 1)]
        return [self.counts.fill(T.splat(0, "uint8", self.kernel.bytes)), clear]

    def look_up(self, p, row, weights):
        """Statements that add the entries of a pixel's table at the indices ``weights``.

        The sums do not saturate, but LLVM would regroup plain ones, in more registers than there are.
        """
        statements = []
        for v, indices in enumerate(weights):
            if neon.is_neon(self.kernel.isa):
                found = neon.look_up(row, indices, self.kernel.isa)
            elif self.kernel.bits == 6:
                found = T.intrinsic("llvm.x86.avx512.permvar.qi.512", row, indices)
            elif self.kernel.bytes == 64:
                found = T.intrinsic("llvm.x86.avx512.pshuf.b.512", T.shuffle([row] * 4, range(64)), indices)
            else:
                found = T.intrinsic("llvm.x86.avx2.pshuf.b", T.shuffle([row] * 2, range(32)), indices)
            cell = p * self.vectors + v
            statements.append(self.counts.set(cell, T.intrinsic("llvm.uadd.sat", self.counts.get(cell), found)))
        return statements

    def flush(self):
        statements, totals = [], self.kernel.totals
        for cell in range(len(self.counts.arrays)):
            pairs, bind = T.bind("pairs", T.tirx.reinterpret(T.vector_type("uint16", self.half), self.counts.get(cell)))
            both = T.load_vector(totals, self._at(cell, 0), self.half) + pairs
            odd = T.load_vector(totals, self._at(cell, 1), self.half) + (pairs >> T.splat(8, "uint16", self.half))
            statements += [bind, T.store_vector(totals, self._at(cell, 0), both), T.store_vector(totals, self._at(cell, 1), odd),
                           self.counts.set(cell, T.splat(0, "uint8", self.kernel.bytes))]  # fmt: skip
        return statements

    def add_to_results(self, factor):
        """Statements that add the totals times ``factor`` to the results, channels in order."""
        kernel = self.kernel
        lanes, totals, results = kernel.lanes, kernel.totals, kernel.results
        factor, bind = T.bind("factor", T.broadcast(tirx.Cast("int32", factor), lanes))
        wide, low = T.vector_type("uint32", lanes), T.splat(0xFFFF, "uint32", lanes)

        def cell(number):
            odd, bind_odd = T.bind("odd", T.load_vector(totals, self._at(number, 1), self.half))
            both = T.load_vector(totals, self._at(number, 0), self.half)
            even, bind_even = T.bind("even", both - (odd << T.splat(8, "uint16", self.half)))
            pairs = [T.tirx.reinterpret(wide, even), T.tirx.reinterpret(wide, odd)]
            values = [pairs[j % 2] >> T.splat(16, "uint32", lanes) if j >= 2 else pairs[j % 2] & low for j in range(4)]
            statements = [bind_odd, bind_even]
            for j, value in enumerate(values):
                at = [number * kernel.bytes + j * lanes]
                total = T.load_vector(results, at, lanes) + T.reinterpret("int32", value) * factor
                statements.append(T.store_vector(results, at, total))
            return statements

        return [bind, T.for_("cell", len(self.counts.arrays), cell)]
