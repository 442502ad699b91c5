"""The kernel of a convolution on several planes: loops, addresses and sums of :mod:`.binary_conv2d_kernel`, once for each pair of planes.

A register tile is computed for one pair of a data plane and a weight plane after the other, by the same code; the sum of all pairs times
their coefficients is kept in memory (it fits in the first-level cache) and starts with the constants that the weights contribute.
"""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import bitserial_adders as adders
from bnntvm.schedules import tir as T
from bnntvm.schedules.binary_conv2d_adders import memory, popcount
from bnntvm.schedules.binary_conv2d_kernel import BLOCK, Kernel
from bnntvm.schedules.binary_conv2d_tiles import always_inside, segments
from bnntvm.schedules.epilogue import Emitter
from bnntvm.spec import words


def choose(coefficients, index):
    """Element ``index`` of a few constants, an int64 expression."""
    value = T.i64(coefficients[0])
    for i, other in enumerate(coefficients[1:], 1):
        value = tirx.Select(tirx.GE(index, T.i64(i)), T.i64(other), value)
    return value


class PlanesKernel(Kernel):
    """Builds one PrimFunc."""

    unipolar = False

    def __init__(self, spec, schedule, isa):
        super().__init__(spec, schedule, isa)
        self.planes, self.pairs = spec.planes, len(spec.planes.data) * len(spec.planes.weights)
        self.words_per_weight = spec.planes.words_per_weight
        self.word_step = self.step * self.words_per_weight
        self.kind = adders.logic(spec.planes)
        self.corrections = Corrections(self, adders.shares(spec.planes, spec.in_channels // spec.groups))
        # Words of one weight plane of a block.
        self.plane_step = self.kernel_words * BLOCK * self.words_per_weight

    def build(self):
        spec, g = self.spec, self.geometry
        batch = tirx.Var("n", "int64")
        shape = (batch, spec.window.in_height, spec.window.in_width, g.pixel_words)
        self.sources = [T.buffer(f"data{p}", shape, "uint32") for p in range(len(self.planes.data))]
        self.data = self.sources[0]
        self.weights = T.buffer("weights", (self.blocks, len(self.planes.weights) * self.plane_step), "uint32")
        params = [*self.sources, self.weights]
        if spec.zeros:
            self.mask = T.buffer("zeros", shape, "uint32")
            params.append(self.mask)
        if self.planes.scaled:
            self.scales = T.buffer("scales", (self.pairs, words(spec.out_channels) * BLOCK), "float32")
            params.append(self.scales)
        dims = (batch, spec.window.out_height, spec.window.out_width)
        self.result_type = "float32" if self.planes.scaled else "int32"
        self.emitter = Emitter(spec.epilogue, spec.out_channels, self.isa, dims, self.result_type)
        params += self.emitter.inputs + self.emitter.outputs
        return T.function("bitserial_conv2d", params, [self.corrections.prepare(), self.tasks(batch)])

    @property
    def fast_adder(self):
        bases = {"plain": (adders.Plain, adders.PlainBytes), "pairs": (adders.Pairs, adders.PairsBytes)}[self.schedule.adder]
        return adders.adder(bases[self.isa.popcount != "vector"], self.kind)

    @property
    def slow_adder(self):
        return adders.adder(adders.Masked, self.kind)

    # The data of several planes, side by side ------------------------------------------------------------------------------------------

    def source(self, row, rows):
        """Statements that copy the rows that a task needs from all planes into one array; one plane is read where it is."""
        self.origin, self.copied = T.i64(0), None
        if len(self.sources) == 1:
            return []
        g = self.geometry
        row_words = g.width * g.pixel_words
        top, count = self._input_rows(row, rows)
        most = min(g.height, (self.schedule.task_rows - 1) * g.strides[0] + (g.kernel[0] - 1) * g.dilations[0] + 1)
        self.copy_step = most * row_words
        self.copied, allocation = memory("planes", self.copy_step * len(self.sources), "uint32")
        self.origin, bind_first = T.bind("first", top * row_words)
        length, bind_length = T.bind("length", count * row_words)

        def copy(p, at, lanes):
            loaded = T.load_vector(self.sources[p], [self.image, 0, 0, self.origin + at], lanes)
            return T.store_vector(self.copied, [at + p * self.copy_step], loaded)

        whole = length // self.lanes
        copies = [[T.for_("i", whole, lambda i, p=p: copy(p, i * self.lanes, self.lanes)),
                   T.for_("i", length - whole * self.lanes, lambda i, p=p: copy(p, whole * self.lanes + i, 1))]
                  for p in range(len(self.sources))]  # fmt: skip
        return [bind_first, bind_length, allocation, copies]

    def _word(self, at, group):
        """One word of the data, for the lanes that need it."""
        if self.copied is None:
            return self._activation(self.data, at, group)
        return self._word_of_groups(lambda index: tirx.BufferLoad(self.copied, [index]), at, group)

    # Corrections: base class hooks -----------------------------------------------------------------------------------------------------

    def count_weights(self, adder, block):
        self.block_number = block
        return self.corrections.allocation()

    def correct_row(self, first_row, last_row):
        return self.corrections.row(self.block_number, first_row, last_row)

    def correct_point(self, first_row, last_row, first, last):
        return self.corrections.point(self.block_number, first_row, last_row, first, last)

    def count_taps(self, corrections):
        """Statements that write what the weights of every tap contribute."""
        lanes, words_ = range(0, BLOCK, self.lanes), self.kernel_words // corrections.taps

        def tap(block, q, number):
            sums = T.Registers("share", len(lanes), "int32", self.lanes)
            share, step = corrections.shares[q], number * (words_ * self.word_step)

            def word(plane, factor, c):
                found = [self._bits(block, plane, step + c * self.word_step, lane) for lane in lanes]
                return [sums.set(v, sums.get(v) + count * T.splat(factor, "int32", self.lanes)) for v, count in enumerate(found)]

            counted = [T.for_("c", words_, lambda c, p=p, f=f: word(p, f, c)) for p, f in share.factors]
            places = [corrections.tap_at(block, q, number, lane) for lane in lanes]
            stores = [T.store_vector(corrections.counts, place, sums.get(v)) for v, place in enumerate(places)]
            return [*sums.allocate, *sums.fill(T.splat(corrections.constant(q), "int32", self.lanes)), counted, stores]

        return T.for_("block", self.blocks, lambda block: [
            T.for_("tap", corrections.taps, lambda number, q=q: tap(block, q, number)) for q in range(corrections.count)
        ])  # fmt: skip

    def _bits(self, block, plane, at, lane):
        """The number of bits of a word of the weights ``plane``, int32, for the lanes from ``lane`` on."""
        (number, half), (part, v) = divmod(plane, self.words_per_weight), divmod(lane, self.step)
        index = at + (number * self.plane_step + half * self.step + part * (self.kernel_words * self.word_step) + v)
        count = popcount(T.load_vector(self.weights, [block, index], self.lanes))
        return tirx.Cast(T.vector_type("int32", self.lanes), count)

    def halves(self, adder):
        return False

    # Sums ------------------------------------------------------------------------------------------------------------------------------

    def reduce(self, adder, place, x, pattern, part, columns=None):
        """Compute the tile at ``x`` for vectors ``part`` of the block, into ``results``: one pair of planes after the other."""
        block, _, _, _, start = place
        g = self.geometry
        origin = 0 if self.copied is None else self.origin
        start_at, bind_start = T.bind("at", start + x * (g.strides[1] * g.pixel_words) - origin)
        groups, bind_groups = self._groups(block, part)
        columns = columns if columns is not None else segments(pattern)

        def pair(number):
            sums = adder(len(pattern), self.vectors, self.lanes)
            count = len(self.planes.weights)
            p, q = number // count, number % count
            at = start_at if self.copied is None else start_at + p * self.copy_step
            at, bind_at = T.bind("at", at)
            weights_at, bind_weights = T.bind("weights", q * self.plane_step + part * (self.kernel_words * self.word_step))
            return [
                sums.allocations, bind_at, bind_weights, sums.start(),
                self.kernel_rows(sums, place, columns, at, weights_at, groups),
                self.keep_pair(sums, pattern, part, number, p, q, block),
            ]  # fmt: skip

        first = [] if self.planes.scaled else self._begin(pattern, part)
        return [bind_start, bind_groups, first, T.for_("pair", self.pairs, pair)]

    def _slots(self, pattern, part):
        """Where the tile's results are: (pixel, column interval, lane of the block, index of the results)."""
        for p, interval in enumerate(pattern):
            for v in range(self.vectors):
                lane = part * self.step + v * self.lanes
                yield p, v, interval, lane, [p * BLOCK + lane]

    def _begin(self, pattern, part):
        """Results start at the corrections."""
        return [
            T.store_vector(self.results, at, self.corrections.load(interval, lane))
            for _, _, interval, lane, at in self._slots(pattern, part)
        ]

    def keep_pair(self, sums, pattern, part, number, p, q, block):
        """Add a pair's sums times its coefficient to the results."""
        if self.planes.scaled:
            return self._keep_scaled(sums, pattern, part, number, q, block)
        scale = -1 if issubclass(type(sums), adders.Masked) else adders.factor(self.planes)
        coefficient = -scale * choose(self.planes.data, p) * choose(self.planes.weights, q)
        fixed = T.static(coefficient)
        factor, bind = (None, []) if fixed == 1 else T.bind("factor", T.broadcast(tirx.Cast("int32", coefficient), self.lanes))
        statements = [bind]
        for pixel, v, _, _, at in self._slots(pattern, part):
            value = sums.value(pixel, v)
            value = value if factor is None else value * factor
            statements.append(T.store_vector(self.results, at, T.load_vector(self.results, at, self.lanes) + value))
        return statements

    def _keep_scaled(self, sums, pattern, part, number, q, block):
        """Add a pair's product times its scales, in float32 and in order."""
        statements, scales = [], []
        factor = T.splat(-adders.factor(self.planes), "int32", self.lanes)
        for v in range(self.vectors):
            scale, bind = T.bind(
                "scale", T.load_vector(self.scales, [number, block * BLOCK + part * self.step + v * self.lanes], self.lanes)
            )
            scales.append(scale)
            statements.append(bind)
        first = number == T.i64(0)
        for pixel, v, interval, lane, at in self._slots(pattern, part):
            dot = self.corrections.load(interval, lane, q) + sums.value(pixel, v) * factor
            value = T.fence(T.opaque(tirx.Cast(T.vector_type("float32", self.lanes), dot)) * scales[v])
            old = T.reinterpret("float32", T.load_vector(self.results, at, self.lanes))
            total, bind = T.bind("total", tirx.Select(T.broadcast(first, self.lanes), value, old + value))
            statements += [bind, T.store_vector(self.results, at, T.reinterpret("int32", total))]
        return statements

    def result(self, at):
        value = super().result(at)
        return T.reinterpret("float32", value) if self.planes.scaled else value

    # The inner loop --------------------------------------------------------------------------------------------------------------------

    def words(self, sums, block, pixels, at, weights_at, groups, count=None):
        """One step of the adder for every pixel and vector; ``count`` is 1 for a word that is left over."""
        add = sums.step if count is None else sums.single
        count = sums.words if count is None else count
        binds, weights, statements = [], [], []
        for v in range(self.vectors):
            loaded = []
            for word in range(count):
                parts = []
                for half in range(self.words_per_weight):
                    index = weights_at + word * self.word_step + half * self.step + v * self.lanes
                    vector, bind = T.bind("w", T.load_vector(self.weights, [block, index], self.lanes))
                    parts.append(vector)
                    binds.append(bind)
                loaded.append(parts)
            weights.append(loaded)
        for p in pixels:
            place = at + p * self.geometry.strides[1] * self.geometry.pixel_words
            for v in range(self.vectors):
                statements += add(p, v, self.activations(sums, place, v, groups, count), weights[v])
        return [binds, statements]

    def activations(self, sums, at, v, groups, count):
        data = [self._word(at + word, groups[v]) for word in range(count)]
        return [*data, self._activation(self.mask, at, groups[v])] if isinstance(sums, adders.Masked) else data


class Corrections:
    """What the weights alone contribute, int32 for the 32 channels of a block, for taps and for sums of taps.

    It is counted once in a call, which costs about as much as one pixel; stored beside the weights it would be an eighth of what few
    channels take.

    Parameters
    ----------
    kernel : Kernel
        With a method ``count_taps(corrections)``.
    shares : list of bitserial_adders.Share
        Separate ones, one for each weight plane (scaled planes), or one.
    blocks : int
        Blocks that are prepared at a time.
    """

    def __init__(self, kernel, shares, blocks=1):
        self.kernel, self.shares, self.count, self.blocks = kernel, shares, len(shares), blocks
        self.zero = not any(share.constant or share.factors for share in shares)
        self.counted = any(share.factors for share in shares)
        g = kernel.geometry
        self.summed = always_inside(g)
        self.area = g.kernel[0] * g.kernel[1]
        self.width = 1 if self.summed else g.kernel[1]
        # What is counted separately: taps, or their sum if none is ever outside the image.
        self.taps = 1 if self.summed else self.area
        intervals = {interval for pattern in kernel.plan.patterns for interval in pattern}
        self.slots = {interval: i for i, interval in enumerate(sorted(intervals))}
        self.size = len(self.slots) + 1

    def constant(self, q):
        """What each of the ``taps`` of share ``q`` contributes without looking at weights."""
        return self.shares[q].constant * (self.area // self.taps)

    def prepare(self):
        """Statements at the start of a call."""
        if not self.counted:
            return []
        self.counts, statements = memory("shares", self.kernel.blocks * self.blocks * self.count * self.taps * BLOCK, "int32")
        return [statements, self.kernel.count_taps(self)]

    def tap_at(self, block, q, tap, lane):
        """Where a tap's share for the lanes from ``lane`` of a block of 32 channels on is."""
        return [((block * self.count + q) * self.taps + tap) * BLOCK + lane]

    def allocation(self):
        if self.zero:
            return []
        self.array, statements = memory("corrections", self.blocks * self.count * self.size * BLOCK, "int32")
        return statements

    def row(self, block, first_row, last_row):
        """Statements that sum up taps ``first_row`` <= r < ``last_row`` for every kind of pixel that tiles have."""
        return [] if self.zero else [self._sum(block, slot, first_row, last_row, *interval) for interval, slot in self.slots.items()]

    def point(self, block, first_row, last_row, first, last):
        """The same for a pixel whose columns are known at run time only."""
        return [] if self.zero else self._sum(block, self.size - 1, first_row, last_row, first, last)

    def _at(self, slot, lane, q, block):
        return [((block * self.count + q) * self.size + slot) * BLOCK + lane]

    def _sum(self, block, slot, first_row, last_row, first, last):
        if self.summed:
            first_row, last_row, first, last = 0, 1, 0, 1
        size = self.kernel.lanes
        lanes = range(0, BLOCK, size)

        def one(b, q):
            if not self.counted:
                value = T.bind("share", tirx.Cast("int32", (last_row - first_row) * (last - first) * self.constant(q)))
                return [value[1], [T.store_vector(self.array, self._at(slot, lane, q, b), T.broadcast(value[0], size)) for lane in lanes]]
            sums = T.Registers("sum", len(lanes), "int32", size)

            def add(r, s):
                tap = (first_row + r) * self.width + first + s
                found = [T.load_vector(self.counts, self.tap_at(block + b, q, tap, lane), size) for lane in lanes]
                return [sums.set(v, sums.get(v) + value) for v, value in enumerate(found)]

            return [
                *sums.allocate,
                *sums.fill(T.splat(0, "int32", size)),
                T.for_("r", last_row - first_row, lambda r: T.for_("s", last - first, lambda s: add(r, s))),
                [T.store_vector(self.array, self._at(slot, lane, q, b), sums.get(v)) for v, lane in enumerate(lanes)],
            ]

        return T.for_("b", self.blocks, lambda b: [one(b, q) for q in range(self.count)])

    def load(self, interval, lane, q=0, block=0):
        """The sum for a pixel with the columns ``interval``, for the lanes from ``lane`` of a block on."""
        if self.zero:
            return T.splat(0, "int32", self.kernel.lanes)
        return T.load_vector(self.array, self._at(self.slots.get(interval, self.size - 1), lane, q, block), self.kernel.lanes)
