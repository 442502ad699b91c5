"""The kernel of a packed binary convolution: loops, addresses and what surrounds the inner loop.

Loop order, outermost first: tasks (image, rows, blocks of output channels; parallel), blocks of 32 output channels, rows, tiles of pixels,
vectors of channels, kernel rows, kernel columns and input words. The weights of a block stay in the first-level cache while all rows of the
task use them. There is no im2col buffer and no padded copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tvm import tirx

from bnntvm.schedules import tir as T
from bnntvm.schedules.binary_conv2d_adders import Adder, Bytes, CarrySave, CarrySaveBytes, CarrySaveOdd, EncodedZeros, Tables, Zeros, memory
from bnntvm.schedules.binary_conv2d_tiles import Geometry, Segment, plan_row, segments
from bnntvm.schedules.binary_conv2d_unipolar import WeightCounts
from bnntvm.schedules.epilogue import Emitter
from bnntvm.schedules.strips import Strips
from bnntvm.spec import WORD_BITS, EpilogueInput, words

BLOCK = WORD_BITS
_LINE_BYTES = 64


#: Groups in a vector up to which their words are broadcast and merged by masks; from more they are gathered, one load for each lane, and so
#: they are where vectors are not counted by one instruction: for AVX-512 without it LLVM 22 never finishes some of such kernels.
MOST_MERGED = 4


@dataclass(frozen=True)
class Merged:
    """Where the words of the few groups of a vector are: ``first`` for its first lanes, ``others[i]`` from a lane on, set in
    ``from_lanes[i]``."""

    first: object
    others: tuple
    from_lanes: tuple


class Kernel:
    """Builds one PrimFunc. The methods that return statements follow the loop nest from outside in."""

    def __init__(self, spec, schedule, isa):
        self.spec, self.schedule, self.isa = spec, schedule, isa
        self.geometry = Geometry.of(spec)
        self.plan = plan_row(self.geometry, schedule.pixels)
        self.lanes, self.vectors = isa.lanes, schedule.vectors
        self.step = self.lanes * self.vectors
        self.word_step = self.step  # elements of the packed weights that belong to one word of the data
        self.parts = BLOCK // self.step
        self.blocks = words(spec.out_channels)
        self.group_channels = spec.out_channels // spec.groups
        g = self.geometry
        self.kernel_words = g.kernel[0] * g.kernel[1] * g.group_words

    # Parameters and tasks -------------------------------------------------------------------------------------------------------------

    def build(self):
        g, spec = self.geometry, self.spec
        batch = tirx.Var("n", "int64")
        shape = (batch, spec.window.in_height, spec.window.in_width, g.pixel_words)
        self.data = T.buffer("data", shape, "uint32")
        self.weights = T.buffer("weights", (self.blocks, self.kernel_words * BLOCK), "uint32")
        params = [self.data, self.weights]
        if spec.zeros:
            self.mask = T.buffer("zeros", shape, "uint32")
            params.append(self.mask)
        dims = (batch, spec.window.out_height, spec.window.out_width)
        self.emitter = Emitter(spec.epilogue, spec.out_channels, self.isa, dims, "int32")
        params += self.emitter.inputs + self.emitter.outputs
        return T.function("binary_conv2d", params, self.tasks(batch))

    def tasks(self, batch):
        rows, blocks = self.schedule.task_rows, self.schedule.task_blocks
        row_tasks, block_tasks = -(-self.geometry.out_height // rows), -(-self.blocks // blocks)

        def task(number):
            image, bind_image = T.bind("image", number // (row_tasks * block_tasks))
            row, bind_row = T.bind("row", number // block_tasks % row_tasks * rows)
            block, bind_block = T.bind("block", number % block_tasks * blocks)
            return [bind_image, bind_row, bind_block, self.task(image, row, block)]

        return T.parallel("task", batch * (row_tasks * block_tasks), task)

    def task(self, image, row, block):
        """The output rows from ``row`` on and the blocks of channels from ``block`` on that belong to one task."""
        rows = self._count(self.geometry.out_height, self.schedule.task_rows, row)
        blocks = self._count(self.blocks, self.schedule.task_blocks, block)
        self.image = image
        self.results, results = T.local("results", self.plan.pixels * BLOCK, "int32")

        def nest(adder):
            return T.for_("block", blocks, lambda b: self.block(adder, block + b, row, rows))

        if not self.spec.zeros or self.unipolar:  # a unipolar 0 is a value like any other
            return [results, self.strips.allocation, self.source(row, rows), nest(self.fast_adder)]
        found, scan = self.scan_zeros(row, rows)
        fast = [self.source(row, rows), nest(self.fast_adder)]
        return [results, self.strips.allocation, scan, T.when(found == T.constant(0, "int32"), fast, nest(self.slow_adder))]

    @property
    def unipolar(self):
        """Whether weight bits are counted to correct the sums, see :mod:`.binary_conv2d_unipolar`."""
        return self.spec.unipolar

    @property
    def plus_one(self):
        """Whether the padding holds +1: a tap in it adds the sum of its weights, C - 2 popc(w)."""
        return getattr(self.spec, "plus_one", False)

    @property
    def counts_weights(self):
        """Whether weight bits are counted."""
        return self.unipolar or self.plus_one

    @property
    def slow_adder(self):
        """The adder for rows that hold zeros."""
        return EncodedZeros if issubclass(self.fast_adder, CarrySave) else Zeros

    @cached_property
    def strips(self):
        """Where results in channel order are collected."""
        rows, per_task = self.geometry.out_height, self.schedule.task_rows
        return Strips(self.emitter, self.geometry.out_width, [per_task, rows % per_task] if rows % per_task else [per_task])

    @property
    def tail(self):
        """Output channels of the last block."""
        return self.spec.out_channels - (self.blocks - 1) * BLOCK

    def live_parts(self, block):
        """How many of a block's parts hold channels that exist: in the last block there may be fewer, which are all that is computed."""
        last = min(self.parts, -(-self.tail // self.step))
        if self.blocks == 1 or last == self.parts:
            return last
        if T.static(block) is not None:
            return last if T.static(block) == self.blocks - 1 else self.parts
        return tirx.Select(block == T.i64(self.blocks - 1), T.i64(last), T.i64(self.parts))

    @staticmethod
    def _count(total, per_task, first):
        return per_task if total % per_task == 0 else tirx.min(T.i64(per_task), total - first)

    @property
    def fast_adder(self):
        plain, carry_save = Bytes, CarrySaveBytes
        if self.isa.popcount == "vector":
            plain, carry_save = Adder, CarrySaveOdd if self.geometry.group_words % 2 else CarrySave
        return {"plain": plain, "carry_save": carry_save, "tables": Tables}[self.schedule.adder]

    def _input_rows(self, row, rows):
        """First input row and number of input rows that the task needs."""
        g = self.geometry
        top = row * g.strides[0] - g.before[0]
        bottom = top + (rows - 1) * g.strides[0] + (g.kernel[0] - 1) * g.dilations[0] + 1
        top = tirx.max(T.i64(0), top)
        return top, tirx.max(T.i64(0), tirx.min(T.i64(g.height), bottom) - top)

    def scan_zeros(self, row, rows):
        """``(word, statements)``: the word is not 0 where the task's input rows have a zero."""
        row_words = self.geometry.width * self.geometry.pixel_words
        top, count = self._input_rows(row, rows)
        wide, narrow = T.local("any", self.lanes, "uint32"), T.local("any", 1, "uint32")
        words_, bind = T.bind("words", count * row_words)
        first, bind_first = T.bind("first", top * row_words)
        lanes = self.lanes
        vectors = words_ // lanes

        def either(array, at, size):
            index = [self.image, 0, 0, first + at]
            return T.store_vector(array[0], [0], T.load_vector(array[0], [0], size) | T.load_vector(self.mask, index, size))

        body = [
            bind, bind_first, wide[1], narrow[1],
            T.store_vector(wide[0], [0], T.splat(0, "uint32", lanes)), T.store(narrow[0], T.constant(0, "uint32"), 0),
            T.for_("i", vectors, lambda i: either(wide, i * lanes, lanes)),
            T.for_("i", words_ - vectors * lanes, lambda i: either(narrow, vectors * lanes + i, 1)),
        ]  # fmt: skip
        gathered = T.load(narrow[0], 0)
        for lane in range(lanes):
            gathered = gathered | T.load(wide[0], lane)
        found, bind_found = T.bind("found", tirx.Cast("int32", gathered))  # the simplifier cannot compare unsigned with 0
        return found, [body, bind_found]

    def source(self, row, rows):
        """Statements that make the words that the inner loop broadcasts; sets ``self.words`` to their buffer."""
        self.origin = T.i64(0)
        if not self.fast_adder.copies:
            return []
        g = self.geometry
        row_words = g.width * g.pixel_words
        top, count = self._input_rows(row, rows)
        most = min(g.height, (self.schedule.task_rows - 1) * g.strides[0] + (g.kernel[0] - 1) * g.dilations[0] + 1)
        first, bind_first = T.bind("first", top * row_words)
        length, bind_length = T.bind("length", count * row_words)
        self.origin = first
        copy = self._table_rows if self.fast_adder is Tables else self._encode
        return [bind_first, bind_length, copy(first, length, most * row_words)]

    def _table_rows(self, first, length, most):
        """Statements that write the table, and for every nibble of ``length`` words where its row is; low and high nibbles apart."""
        low, allocate_low = memory("low", most * 4, "uint8")
        high, allocate_high = memory("high", most * 4, "uint8")
        self.table, allocate_table = memory("table", Tables.table_bytes, "uint8")
        self.nibbles = (low, high)

        def copy(at, lanes):
            mask = T.splat(0xF0F0F0F0, "uint32", lanes)
            loaded, bind = T.bind("a", T.load_vector(self.data, [self.image, 0, 0, first + at], lanes))
            octets = T.vector_type("uint8", 4 * lanes)
            return [bind, T.store_vector(low, [at * 4], tirx.reinterpret(octets, (loaded << T.splat(4, "uint32", lanes)) & mask)),
                    T.store_vector(high, [at * 4], tirx.reinterpret(octets, loaded & mask))]  # fmt: skip

        lanes = self.lanes
        vectors = length // lanes
        return [allocate_low, allocate_high, allocate_table, Tables.table(self.table),
                T.for_("i", vectors, lambda i: copy(i * lanes, lanes)),
                T.for_("i", length - vectors * lanes, lambda i: copy(vectors * lanes + i, 1))]  # fmt: skip

    def _encode(self, first, length, most):
        """Statements that copy ``length`` words from word ``first`` of the image on, the second of each pair xored with the first."""
        size, lanes = self.geometry.pixel_words, self.lanes
        self.encoded, allocation = memory("encoded", most, "uint32")

        def pairs(at, count):
            wide = T.vector_type("uint64", count // 2)
            loaded = tirx.reinterpret(wide, T.load_vector(self.data, [self.image, 0, 0, first + at], count))
            loaded = loaded ^ (loaded << T.splat(32, "uint64", count // 2))
            return T.store_vector(self.encoded, [at], tirx.reinterpret(T.vector_type("uint32", count), loaded))

        def pixel(i):
            last = i * size + size - 1
            return [T.for_("j", size // 2, lambda j: pairs(i * size + j * 2, 2)),
                    T.store(self.encoded, T.load(self.data, self.image, 0, 0, first + last), last)]  # fmt: skip

        if size % 2:
            return [allocation, T.for_("pixel", length // size, pixel)]
        vectors = length // lanes
        return [allocation, T.for_("i", vectors, lambda i: pairs(i * lanes, lanes)),
                T.for_("i", (length - vectors * lanes) // 2, lambda i: pairs(vectors * lanes + i * 2, 2))]  # fmt: skip

    # Rows and tiles -------------------------------------------------------------------------------------------------------------------

    def block(self, adder, block, row, rows):
        number, bind = T.bind("block", block)
        count = self.count_weights(adder, number)  # first: rows refer to it
        return [bind, count, self.strips.walk(rows, lambda y: self.task_row(adder, number, row, y), self.image, number, row)]

    def task_row(self, adder, block, first_row, y):
        """Row ``y`` of a task."""
        self.row_of_task = y
        return self.row(adder, block, first_row + y)

    def count_weights(self, adder, block):
        """Statements that prepare the corrections of a block."""
        if not self.counts_weights:
            return []
        self.weight_counts = WeightCounts(self, issubclass(adder, CarrySave))
        total = self.weight_counts.total() if self.plus_one else []
        return [self.weight_counts.allocation, self.weight_counts.count(block), total]

    def correct_row(self, first_row, last_row):
        """Statements that prepare the corrections of a row."""
        return self.weight_counts.row(first_row, last_row) if self.counts_weights else []

    def correct_point(self, first_row, last_row, first, last):
        """Statements that prepare the corrections of a pixel whose kernel columns are known at run time only."""
        return self.weight_counts.point(first_row, last_row, first, last) if self.counts_weights else []

    def row(self, adder, block, y):
        g, plan = self.geometry, self.plan
        y, bind_y = T.bind("y", y)
        first, last, bind_taps = self._taps(0, y)
        start, bind_start = T.bind("start", ((y * g.strides[0] - g.before[0]) * g.width - g.before[1]) * g.pixel_words)
        place = (block, y, first, last, start)
        body = [bind_y, bind_taps, bind_start, self.correct_row(first, last)]
        simple = issubclass(adder, Zeros)  # rare: one variant of code is enough
        if plan.tiles and not simple:
            body.append(T.for_("tile", plan.tiles, lambda tile: self.tile(adder, place, tile)))
        begin, end = (0, 0) if simple else (plan.begin, plan.end)
        for low, high in ((0, begin), (end, g.out_width)):
            if high > low:
                body.append(T.for_("x", high - low, lambda x, low=low: self.point(adder, place, x + low)))
        return body

    def _taps(self, axis, position):
        """First tap inside the image, last + 1, and the statements that bind them: constants where no position leaves the image."""
        g = self.geometry
        size, kernel, dilation = (g.height, g.width)[axis], g.kernel[axis], g.dilations[axis]
        outputs = (g.out_height, g.out_width)[axis]
        if all(g.taps(axis, p) == (0, kernel) for p in (0, outputs - 1)):
            return T.i64(0), T.i64(kernel), []
        origin = position * g.strides[axis] - g.before[axis]
        first = tirx.max(T.i64(0), (dilation - 1 - origin) // dilation)
        last = tirx.min(T.i64(kernel), (size - 1 - origin) // dilation + 1)
        first, bind_first = T.bind("first", first)
        last, bind_last = T.bind("last", tirx.max(first, last))
        return first, last, [bind_first, bind_last]

    def tile(self, adder, place, tile):
        plan = self.plan
        x = plan.begin + tile * plan.pixels
        if (plan.end - plan.begin) % plan.pixels:
            x = tirx.min(x, T.i64(plan.end - plan.pixels))
        x, bind = T.bind("x", x)
        *rare, common = sorted(plan.patterns.items(), key=lambda item: len(item[1]))

        def part(number):
            statement = self.reduce(adder, place, x, common[0], number)
            for pattern, tiles in rare:
                condition = tile == T.i64(tiles[0])
                for other in tiles[1:]:
                    condition = tirx.Or(condition, tile == T.i64(other))
                statement = T.when(condition, self.reduce(adder, place, x, pattern, number), statement)
            return [self.fetch_weights(place[0], tile, number), statement]

        return [bind, self.prefetch(place, x), T.for_("part", self.live_parts(place[0]), part), self.epilogue(adder, place, x, plan.pixels)]

    def fetch_weights(self, block, tile, part):
        """Statements that ask for some lines of the next block's weights, evenly over the tiles of a task.

        The processor fetches ahead within a page of memory only, and a network's weights are read once in a run: from far away.
        """
        if self.blocks == 1 or not getattr(self.schedule, "fetch", False):
            return []
        lines = self.kernel_words * BLOCK * 4 // _LINE_BYTES
        each = -(-lines // (self.schedule.task_rows * self.plan.tiles * self.parts))
        first = ((self.row_of_task * self.plan.tiles + tile) * self.parts + part) * each
        return T.for_("line", each, lambda i: T.prefetch(self.weights, [block + 1, (first + i) * (_LINE_BYTES // 4)]))

    def prefetch(self, place, x):
        """Statements that ask for the lines of a tile's results and of what is added to them, while its products are computed."""
        if not getattr(self.schedule, "prefetch", False):
            return []
        block, y = place[:2]
        pixels = [(self.image, *self._position(y, x + p)) for p in range(self.plan.pixels)]
        return [self.emitter.prefetch(pixel, block * BLOCK, BLOCK) for pixel in pixels]

    def _position(self, y, x):
        """Row and column of a pixel in the buffers. Rows may be joined rows of the image: addresses count, not coordinates."""
        g = self.geometry
        return (y, x) if g.out_width == self.spec.window.out_width else (T.i64(0), y * g.out_width + x)

    def point(self, adder, place, x):
        """One pixel, whose kernel columns are known at run time only."""
        x, bind = T.bind("x", x)
        first, last, bind_taps = self._taps(1, x)
        columns = (Segment(first, last, (0,)),)
        count = self.correct_point(*place[2:4], first, last)
        live = self.live_parts(place[0])
        parts = T.for_("part", live, lambda part: self.reduce(adder, place, x, ((first, last),), part, columns))
        return [bind, bind_taps, count, parts, self.epilogue(adder, place, x, 1)]

    def epilogue(self, adder, place, x, pixels):
        """Statements that finish a tile. The last block has code of its own where it is not full: it computes no vector that is not there,
        and no other block masks any."""
        if self.tail == BLOCK:
            return self._finish(adder, place, x, pixels, place[0] * BLOCK, BLOCK)
        last = self._finish(adder, place, x, pixels, T.i64((self.blocks - 1) * BLOCK), self.tail)
        if self.blocks == 1:
            return last
        return T.when(place[0] == T.i64(self.blocks - 1), last, self._finish(adder, place, x, pixels, place[0] * BLOCK, BLOCK))

    def _finish(self, adder, place, x, pixels, first_channel, channels):
        """The epilogue of a tile for the ``channels`` channels from ``first_channel`` on, all of which exist."""
        block, y = place[:2]
        g = self.geometry

        def pixel(p):
            values = [self.result(p * BLOCK + lane) for lane in range(0, channels, self.lanes)]
            place = self._position(y, x + p)
            scope = self._half_thresholds(first_channel) if self.halves(adder) else {}
            strip = self.strips.place(y * g.out_width + (x + p))
            fetch = self.strips.fetch(self.image, block, y * g.out_width + (x + p))
            whole = channels == BLOCK or None
            return [fetch, self.emitter.emit(values, (self.image, *place), first_channel, scope, whole, strip=strip)]

        return T.for_("p", pixels, pixel)

    def result(self, at):
        """What the epilogue gets, a vector from element ``at`` of the results on."""
        return T.load_vector(self.results, [at], self.lanes)

    # The inner loop -------------------------------------------------------------------------------------------------------------------

    def reduce(self, adder, place, x, pattern, part, columns=None):
        """Compute the tile at ``x`` for vectors ``part`` of the block, into ``results``."""
        block, _, first_row, last_row, start = place
        g = self.geometry
        sums = adder(len(pattern), self.vectors, self.lanes)
        origin = self.origin if adder.copies else 0
        start_at, bind_start = T.bind("at", start + x * (g.strides[1] * g.pixel_words) - origin)
        weights_at, bind_weights = T.bind("weights", part * (self.kernel_words * self.step))
        groups, bind_groups = self._groups(block, part)
        columns = columns if columns is not None else segments(pattern)
        initial = self._shares(pattern, last_row - first_row, adder.scale * adder.weight) if self._preloads(adder) else None
        return [
            sums.allocations, bind_start, bind_weights, bind_groups, sums.start(initial),
            self.kernel_rows(sums, place, columns, start_at, weights_at, groups),
            self.keep(sums, pattern, last_row - first_row, part),
        ]  # fmt: skip

    def kernel_rows(self, sums, place, columns, start_at, weights_at, groups):
        """Add all taps of a tile: its pixels from word ``start_at`` on, weights from element ``weights_at`` of the block on."""
        block, _, first_row, last_row, _ = place
        g = self.geometry

        def kernel_row(r):
            r = first_row + r
            data_at, bind_data = T.bind("data", start_at + r * (g.dilations[0] * g.width * g.pixel_words))
            row_at, bind_row = T.bind("row", weights_at + r * (g.kernel[1] * g.group_words * self.word_step))
            runs = [self.segment(sums, block, columns_, data_at, row_at, groups) for columns_ in columns]
            return [bind_data, bind_row, runs, sums.flush() if self._flushes(sums) == "row" else []]

        return [T.for_("r", last_row - first_row, kernel_row), sums.flush()]

    def segment(self, sums, block, columns, data_at, weights_at, groups):
        g = self.geometry
        at = data_at + columns.first * (g.dilations[1] * g.pixel_words)
        w_at = weights_at + columns.first * (g.group_words * self.word_step)
        count = columns.last - columns.first
        if g.contiguous and g.group_words % sums.words == 0:
            return self.run(sums, block, columns.pixels, count * g.group_words, at, w_at, groups)

        def column(s):
            return self.run(sums, block, columns.pixels, g.group_words, at + s * (g.dilations[1] * g.pixel_words),
                            w_at + s * (g.group_words * self.word_step), groups)  # fmt: skip

        return T.for_("s", count, column)

    def _flushes(self, sums):
        """When an adder with small counters empties them: after a kernel ``row``, within a ``run``, or only at the end."""
        g, every = self.geometry, sums.flush_every
        row = g.kernel[1] * -(-g.group_words // sums.words)
        if every is None or row * g.kernel[0] <= every:
            return "end"
        return "row" if row <= every else "run"

    def run(self, sums, block, pixels, length, at, weights_at, groups):
        """Add ``length`` consecutive words of every pixel in ``pixels``."""
        steps = length // sums.words
        rest = 0 if T.static(length) is None else T.static(length) % sums.words

        def step(k):
            return self.words(sums, block, pixels, at + k * sums.words, weights_at + k * (sums.words * self.word_step), groups)

        def steps_from(first, count):
            return T.for_("k", count, lambda k: step(first + k))

        done = steps * sums.words
        single = self.words(sums, block, pixels, at + done, weights_at + done * self.word_step, groups, 1) if rest else []
        if self._flushes(sums) != "run":
            return [steps_from(0, steps), single]
        every = sums.flush_every
        whole = steps // every
        chunks = T.for_("chunk", whole, lambda c: [steps_from(c * every, every), sums.flush()])
        return [chunks, steps_from(whole * every, steps - whole * every), single, sums.flush()]

    def words(self, sums, block, pixels, at, weights_at, groups, count=None):
        """One step of the adder for every pixel and vector; ``count`` is 1 for a word that is left over."""
        if isinstance(sums, Tables):
            return self.table_word(sums, block, pixels, at, weights_at)
        g = self.geometry
        add = sums.step if count is None else sums.single
        count = sums.words if count is None else count
        binds, weights, statements = [], [], []
        for v in range(self.vectors):
            loaded = []
            for word in range(count):
                index = [block, weights_at + word * self.step + v * self.lanes]
                vector, bind = T.bind("w", T.load_vector(self.weights, index, self.lanes))
                loaded.append(vector)
                binds.append(bind)
            weights.append(loaded)
        for p in pixels:
            place = at + p * g.strides[1] * g.pixel_words
            for v in range(self.vectors):
                statements += add(p, v, self.activations(sums, place, v, groups, count), weights[v])
        return [binds, statements]

    def table_word(self, sums, block, pixels, at, weights_at):
        """One word of every pixel through the table."""
        g, statements = self.geometry, []
        for byte in range(4):
            weights, bind = T.bind("w", T.load_vector(self.weights, [block, weights_at + byte * self.lanes], self.lanes))
            statements.append(bind)
            for nibbles, indices in zip(self.nibbles, sums.nibbles(weights)):
                indices, bind = T.bind("indices", indices)
                statements.append(bind)
                for p in pixels:
                    place = tirx.Cast("int64", T.load(nibbles, (at + p * g.strides[1] * g.pixel_words) * 4 + byte))
                    statements += sums.look_up(p, T.load_vector(self.table, [place], 16), indices)
        return statements

    def activations(self, sums, at, v, groups, count):
        """The vectors of ``count`` of activation words at ``at``, as the lanes of vector ``v`` need them."""
        if isinstance(sums, CarrySave):
            return [T.broadcast(T.load(self.encoded, at + groups[v][0] + word), self.lanes) for word in range(count)]
        planes = [self.data, self.mask] if isinstance(sums, Zeros) else [self.data]
        return [self._activation(plane, at + word, groups[v]) for word in range(count) for plane in planes]

    def _activation(self, plane, at, group):
        return self._word_of_groups(lambda index: tirx.BufferLoad(plane, [self.image, T.i64(0), T.i64(0), index]), at, group)

    def _word_of_groups(self, load, at, group):
        """A word for every lane, from ``load(index)`` of an index or a vector of them."""
        offset, mask = group
        if isinstance(offset, Merged):
            value = T.broadcast(load(at + offset.first), self.lanes)
            for other, from_lane in zip(offset.others, offset.from_lanes):
                value = T.select(from_lane, T.broadcast(load(at + other), self.lanes), value)
        elif T.lanes_of(offset) == 1:
            value = T.broadcast(load(at + offset), self.lanes)
        else:
            value = load(offset + T.broadcast(at, self.lanes))
        return value if mask is None else value & mask

    def _groups(self, block, part):
        """Per vector, where its group's bits are in a pixel: ``(offset, mask)``.

        The offset of its words is a scalar where all lanes have the same, :class:`Merged` where they have a few, else one per lane. The
        mask is None but where groups share words.
        """
        g = self.geometry
        outputs, size, last = self.group_channels, g.group_words, g.groups - 1
        if self.spec.dense_groups:  # words take the place of groups
            outputs, last = outputs * (BLOCK // self._group_bits), g.pixel_words - 1
        offsets, binds = [], []
        for v in range(self.vectors):
            first = block * BLOCK + part * self.step + v * self.lanes
            if g.groups == 1:
                offset = T.i64(0)
            elif outputs % BLOCK == 0:
                offset = block // (outputs // BLOCK) * size
            elif outputs % self.lanes == 0:
                offset = tirx.min(first // outputs, T.i64(last)) * size
            elif self.isa.popcount == "vector" and self._most_groups(outputs) <= MOST_MERGED:
                offset, bind = self._merged(first, outputs, size, last)
                binds.append(bind)
            else:
                channels = tirx.Ramp(first, T.i64(1), self.lanes)
                channels = tirx.min(channels, T.broadcast(T.i64(self.spec.out_channels - 1), self.lanes))
                offset = channels // T.broadcast(T.i64(outputs), self.lanes) * T.broadcast(T.i64(size), self.lanes)
            if not isinstance(offset, Merged) and T.static(offset) is None:
                offset, bind = T.bind("group", offset)
                binds.append(bind)
            offsets.append(offset)
        masks = [None] * self.vectors
        if self.spec.dense_groups:
            masks, bind_masks = zip(*(self._group_mask(block * BLOCK + part * self.step + v * self.lanes) for v in range(self.vectors)))
            binds += bind_masks
        return list(zip(offsets, masks)), binds

    def _most_groups(self, outputs):
        """Groups of ``outputs`` channels that a vector touches at most."""
        firsts = range(0, self.spec.out_channels, self.lanes)
        return max((min(first + self.lanes, self.spec.out_channels) - 1) // outputs - first // outputs + 1 for first in firsts)

    def _merged(self, first, outputs, size, last):
        """:class:`Merged` offsets for the channels from ``first`` on, and the statements that bind them."""
        group, bind_group = T.bind("group", first // outputs)
        binds, offsets, masks = [bind_group], [], []
        for i in range(self._most_groups(outputs)):
            offset, bind = T.bind("offset", tirx.min(group + i, T.i64(last)) * size)
            offsets.append(offset)
            binds.append(bind)
            if i:
                lane = T.broadcast(tirx.Cast("int32", (group + i) * outputs - first), self.lanes)
                mask, bind = T.bind("from", T.lane_numbers(self.lanes) >= lane)
                masks.append(mask)
                binds.append(bind)
        return Merged(offsets[0], tuple(offsets[1:]), tuple(masks)), binds

    def _group_mask(self, first):
        """The bits of a lane's group in its word, for the channels from ``first`` on."""
        bits, lanes = self._group_bits, self.lanes
        channels = tirx.Ramp(tirx.Cast("int32", first), T.constant(1, "int32"), lanes)
        group = channels // T.splat(self.group_channels, "int32", lanes) % T.splat(BLOCK // bits, "int32", lanes)
        shift = T.reinterpret("uint32", group * T.splat(bits, "int32", lanes))  # a cast would make a Ramp of uint32: not allowed
        return T.bind("mask", T.splat((1 << bits) - 1, "uint32", lanes) << shift)

    @property
    def _group_bits(self):
        return self.spec.in_channels // self.spec.groups

    def _preloads(self, adder):
        """Whether counters start at their share of K: it must be a whole number for every number of taps."""
        return not self.unipolar and self._group_bits % (adder.scale * adder.weight) == 0

    def _shares(self, pattern, rows, divisor=1):
        """K / divisor of every pixel of a tile, as int32 vectors."""
        if self.plus_one:  # every tap counts
            height, width = self.geometry.kernel
            return [T.splat(height * width * self._group_bits // divisor, "int32", self.lanes)] * len(pattern)
        shares = [tirx.Cast("int32", rows * (last - first) * self._group_bits // divisor) for first, last in pattern]
        return [T.broadcast(share, self.lanes) for share in shares]

    def keep(self, sums, pattern, rows, part):
        """Statements that put what the epilogue wants into ``results``: dot products, or half dot products where they are compared only."""
        statements = []
        added = None if self._preloads(sums) or self.unipolar else self._shares(pattern, rows)
        for p, interval in enumerate(pattern):
            for v in range(self.vectors):
                value, lane = sums.value(p, v), part * self.step + v * self.lanes
                if self.unipolar:
                    value = self.weight_counts.load(interval, lane) - value
                else:
                    if self.plus_one:
                        value = value + self.weight_counts.skipped(interval, lane)
                    if sums.scale == 2 and not self.halves(sums):
                        value = value + value
                if added:
                    value = value + added[p]
                statements.append(T.store_vector(self.results, [p * BLOCK + lane], value))
        return statements

    # Comparisons ----------------------------------------------------------------------------------------------------------------------

    def halves(self, adder):
        """Whether the epilogue gets half dot products: it compares them with per-channel integers and does nothing else with them."""
        return adder.scale == 2 and self._preloads(adder) and bool(self._compared)

    @cached_property
    def _compared(self):
        """Number of a ``channel`` input to whether it is rounded up when it is halved; None if dot products are needed.

        The dot product is even: 2 h >= t is h >= ceil(t / 2) and 2 h > t is h > floor(t / 2).
        """
        epilogue, found, elsewhere = self.spec.epilogue, {}, {output.value for output in self.spec.epilogue.outputs}
        for step in epilogue.steps:
            used = [arg for arg in step.args if isinstance(arg, int)]
            if step.op in _ROUNDS_UP and used[0] == 0 and len(used) == 2 and step.args[0] is used[0]:
                if found.setdefault(used[1], _ROUNDS_UP[step.op]) != _ROUNDS_UP[step.op]:
                    return None
            else:
                elsewhere.update(used)
        integers = EpilogueInput("channel", "int32")
        compared = all(1 <= i <= len(epilogue.inputs) and epilogue.inputs[i - 1] == integers for i in found)
        return found if compared and not elsewhere & {0, *found} else None

    def _half_thresholds(self, first_channel):
        """What the emitter is to use in place of the thresholds that it would load."""
        scope, one = {}, T.splat(1, "int32", self.lanes)
        for number, up in self._compared.items():
            for v in range(BLOCK // self.lanes):
                threshold = T.load_vector(self.emitter.inputs[number - 1], [first_channel + v * self.lanes], self.lanes)
                scope[number - 1, v] = (threshold >> one) + (threshold & one) if up else threshold >> one
        return scope


#: Comparisons with the dot product on the left, and whether a halved threshold rounds up.
_ROUNDS_UP = {"greater_equal": True, "less": True, "greater": False, "less_equal": False}
