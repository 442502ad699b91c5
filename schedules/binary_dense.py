"""Dense layers of bit planes (:class:`bnntvm.spec.BinaryDense`): xor or and, population count, add.

    bipolar x bipolar            dot = K - 2 popc(a ^ w)
    unipolar x bipolar           dot = popc(a) - 2 popc(a & w)
    bipolar with zeros (mask m)  dot = K - popc(m) - 2 popc((a ^ w) & ~m)      tail bits of a, w and m are 0

The product is a register tile: some rows of the data (broadcast words) by one or more words of output channels (vectors of 32-bit lanes).
A row count that is not a multiple of the tile is covered by a last tile that overlaps its neighbour; row counts below one tile take
smaller tiles. Weights stream through once for each row tile, in the order in which they lie in memory.

With a vector popcount instruction, words of bipolar data are counted in pairs by the full adder of
:class:`.binary_conv2d_adders.CarrySave`: five operations for two words instead of six. One row has nothing to reuse, its time is that of
reading the weights: they are asked for some way ahead, because the processor's own look-ahead ends at the end of each page.

Without a vector popcount instruction, bits are counted per byte (LLVM's nibble tables) and bytes are widened every 31 words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx

from bnntvm import spec as specs
from bnntvm.schedules import epilogue as tail
from bnntvm.schedules import neon, tir
from bnntvm.schedules.binary_conv2d_adders import CarrySave

#: How far ahead of their use weights are fetched for a single row, in bytes.
AHEAD = 4096
#: A byte holds the counts of so many words: 31 * 8 <= 255.
BYTE_STEPS = 31


@dataclass(frozen=True)
class Schedule:
    """Register tile.

    Attributes
    ----------
    rows : int
        Rows of the data in a full tile.
    words : int
        32-channel words of output channels in a tile.
    unroll : int
        Words of K in one step of the inner loop.
    adder : str
        ``plain`` or ``carry_save``; ``tiles``: the latter for few rows, see :mod:`.binary_dense_tiles` for more.
    """

    rows: int
    words: int
    unroll: int
    adder: str = "plain"


def default_schedule(spec, isa):
    """The tile that fills the registers: accumulators, one row's broadcast, the weights, and the tables of the popcount."""
    if _on_neon(spec, isa):
        return _neon().default_schedule(spec, isa)
    if _in_pairs(spec, isa):
        return Schedule(6, 1, 4, "tiles" if _tiles().claims(spec, isa) else "carry_save")
    rows = {16: 7, 8: 2, 4: 1}[isa.lanes]
    return Schedule(rows, 1, 2 if isa.popcount == "vector" else 1)


def space(spec, isa):
    """Tiles whose accumulators fit into the registers."""
    if _on_neon(spec, isa):
        return _neon().space(spec, isa)
    per_word, spare = specs.WORD_BITS // isa.lanes, 4 if isa.popcount == "vector" else 6
    fits = [(r, w) for w in (1, 2) for r in (1, 2, 3, 4, 5, 6, 7, 8, 12) if (r + 1) * w * per_word + spare <= isa.registers]
    adders = ["carry_save"] * _in_pairs(spec, isa) + ["tiles"] * _tiles().claims(spec, isa)
    pairs = [Schedule(r, 1, u, adder) for adder in adders for r in (4, 5, 6, 7) for u in (2, 4)]
    return [Schedule(r, w, u) for r, w in fits or [(1, 1)] for u in (1, 2, 4)] + pairs


def _in_pairs(spec, isa):
    """Whether words can be counted in pairs, and that is faster."""
    plain = isinstance(spec, specs.BinaryDense) and not spec.unipolar and not spec.zeros
    return plain and isa.popcount == "vector" and isa.lanes == 16 and specs.words(spec.in_features) % 2 == 0


def blocks(spec, schedule):
    """Number of column blocks."""
    return -(-specs.words(spec.out_features) // schedule.words)


def pack_weights(spec, schedule, isa, weights):
    """Weights in the order in which the kernel reads them.

    Parameters
    ----------
    weights : ndarray uint32[N, words(K)]
        Bit 1 <-> -1, tail bits 0.

    Returns
    -------
    ndarray uint32[blocks, words(K), schedule.words * 32]
        Word k of channel ``block * width + lane``; channels past N are 0. Not ``plain``: the second word of each pair is xored with the
        first.
    """
    if _on_neon(spec, isa):
        return _neon().pack_weights(weights)
    width = schedule.words * specs.WORD_BITS
    padded = np.zeros((blocks(spec, schedule) * width, weights.shape[1]), np.uint32)
    padded[: spec.out_features] = weights
    if schedule.adder != "plain":
        padded[:, 1::2] ^= padded[:, ::2]
    return np.ascontiguousarray(padded.reshape(-1, width, weights.shape[1]).transpose(0, 2, 1))


def reference(spec, operands, epilogue_inputs):
    """The layer in numpy, from unpacked values.

    Parameters
    ----------
    operands : list of ndarray
        data ``uint32[M, words(K)]``, weights ``uint32[N, words(K)]`` (not packed for the kernel) and, for ``zeros``, the mask plane.
    """
    bits = tail.unpack(operands[0], spec.in_features).astype(np.int32)
    values = bits if spec.unipolar else 1 - 2 * bits
    if spec.zeros:
        values = values * ~tail.unpack(operands[2], spec.in_features)
    weights = 1 - 2 * tail.unpack(operands[1], spec.in_features).astype(np.int32)
    return tail.reference(spec.epilogue, (values @ weights.T).astype(np.int32), epilogue_inputs)


def build(spec, schedule, isa):
    """The kernel: parameters data ``uint32[m, words(K)]``, packed weights, the mask plane for ``zeros``, then the epilogue's."""
    if _on_neon(spec, isa):
        return _neon().Kernel(spec, schedule, isa).function()
    if schedule.adder == "tiles":
        return _tiles().TileKernel(spec, schedule, isa).function()
    return (Pairs if schedule.adder == "carry_save" else _Kernel)(spec, schedule, isa).function()


def _on_neon(spec, isa):
    return neon.is_neon(isa) and isinstance(spec, specs.BinaryDense)


def _tiles():
    """The kernel on tile registers, which builds on this one."""
    from bnntvm.schedules import binary_dense_tiles

    return binary_dense_tiles


def _neon():
    """The kernel for NEON, which builds on this one."""
    from bnntvm.schedules import binary_dense_neon

    return binary_dense_neon


class _Kernel:
    def __init__(self, spec, schedule, isa):
        if spec.unipolar and spec.zeros:
            raise ValueError("a unipolar plane has no zeros plane: its bit is the value")
        self.spec, self.schedule, self.isa, self.lanes = spec, schedule, isa, isa.lanes
        self.depth, self.blocks = specs.words(spec.in_features), blocks(spec, schedule)
        self.vectors, self.width = schedule.words * specs.WORD_BITS // isa.lanes, schedule.words * specs.WORD_BITS
        self.rows = tirx.Var("m", "int64")
        self.data = tir.buffer("data", (self.rows, self.depth), "uint32")
        self.weights = tir.buffer("weights", (self.blocks, self.depth, self.width), "uint32")
        self.mask = tir.buffer("mask", (self.rows, self.depth), "uint32") if spec.zeros else None
        self.emitter = tail.Emitter(spec.epilogue, spec.out_features, isa, (self.rows,), "int32")
        # One number per row that the formulas need: popc(a) for unipolar data, K - popc(m) for data with zeros.
        self.base, self.allocate = tir.scratch("base", (self.rows,), "int32") if spec.unipolar or spec.zeros else (None, None)

    def function(self):
        params = [self.data, self.weights, *([self.mask] if self.mask is not None else [])]
        return tir.function("binary_dense", [*params, *self.emitter.inputs, *self.emitter.outputs], self.body())

    def body(self):
        """The statements of the function."""
        return [self._prepare(), self._by_columns() if self.blocks >= 8 else self._by_rows()]

    def _prepare(self):
        """Statements before all tiles."""
        return [self.allocate, self._count_rows()] if self.base is not None else []

    # Loops over tiles

    def _by_columns(self):
        """Threads share the column blocks: right for any number of rows, and each weight is read by one thread."""
        return tir.parallel("block", self.blocks, lambda block: self._row_counts(lambda loop: loop(tir.for_, block)))

    def _by_rows(self):
        """Few column blocks: threads share the row tiles."""

        def columns(loop):
            if self.blocks == 1:
                return loop(tir.parallel, 0)
            return tir.for_("block", self.blocks, lambda block: loop(tir.parallel, block))

        return self._row_counts(columns)

    def _row_counts(self, columns):
        """One branch for each height of tile; ``columns(loop)`` places ``loop(for, block)``, the loop over row tiles."""
        heights = _heights(self.schedule.rows)
        result = None
        for height in reversed(heights):
            branch = columns(lambda loop, block, height=height: self._row_tiles(loop, block, height))
            result = branch if result is None else tir.when(self.rows >= tir.i64(height), branch, result)
        return result

    def _row_tiles(self, loop, block, height):
        def tile(number):
            first, named = tir.bind("row", tirx.min(number * height, self.rows - height) if height > 1 else number)
            return [named, self._tile(height, block, first)]

        return loop("tile", tirx.floordiv(self.rows + (height - 1), tir.i64(height)), tile)

    # One tile

    def _tile(self, height, block, first):
        """Rows ``first ... first + height - 1`` by column block ``block``."""
        if not self.spec.zeros:
            return self._product(height, block, first, masked=False)
        counts = [tir.load(self.base, first + r) for r in range(height)]
        total = counts[0]
        for count in counts[1:]:
            total = total + count
        slow = tir.for_("r", height, lambda r: self._product(1, block, first + r, masked=True))
        return tir.when(total == height * self.spec.in_features, self._product(height, block, first, masked=False), slow)

    def _product(self, height, block, first, masked):
        acc = tir.Registers("acc", height * self.vectors, "int32", self.lanes)
        body = [*acc.allocate, *acc.fill(tir.splat(0, "int32", self.lanes))]
        count = self._count_words if self.isa.popcount == "vector" else self._count_bytes
        body += count(acc, lambda k, add: self._step(height, block, first, k, masked, add))
        return [*body, *self._stores(acc, height, block, first, masked)]

    def _stores(self, acc, height, block, first, masked):
        """The epilogue of a tile, for all words of its columns that exist."""
        body, values, popcounts_of = [], acc.get, self.spec.in_features
        if self.spec.unipolar or masked:
            bases = []
            for r in range(height):
                base, named = tir.bind("base", tir.broadcast(tir.load(self.base, first + r), self.lanes))
                bases.append(base)
                body.append(named)
            values, popcounts_of = lambda i: bases[i // self.vectors] - (acc.get(i) + acc.get(i)), None
        per_word = self.emitter.vectors_per_word
        whole = self.spec.out_features % self.width == 0
        for begin in range(0, self.vectors, self.vectors if whole else per_word):
            columns, scope, rows = block * self.width + begin * self.lanes, {}, []
            for r in range(height):
                vectors = [values(r * self.vectors + v) for v in range(begin, self.vectors if whole else begin + per_word)]
                rows += self.emitter.emit(vectors, (first + r,), columns, scope, popcounts_of=popcounts_of)
            body.append(tir.when(columns < self.spec.out_features, rows) if begin else rows)
        return body

    def _step(self, height, block, first, k, masked, add):
        """Word ``k`` of every row and channel of the tile: ``add(index, bits)`` counts bits into an accumulator."""
        body, weights = [], []
        for v in range(self.vectors):
            w, named = tir.bind("w", tir.load_vector(self.weights, [block, k, v * self.lanes], self.lanes))
            weights.append(w)
            body += [named, self._fetch(height, block, k, v)]
        for r in range(height):
            a, named = tir.bind("a", tir.broadcast(tir.load(self.data, first + r, k), self.lanes))
            body.append(named)
            keep = None
            if masked:
                keep, named = tir.bind("keep", tir.broadcast(~tir.load(self.mask, first + r, k), self.lanes))
                body.append(named)
            for v, w in enumerate(weights):
                bits = a & w if self.spec.unipolar else a ^ w
                body.append(add(r * self.vectors + v, bits if keep is None else bits & keep))
        return body

    def _fetch(self, height, block, k, v):
        """Ask for the weights of a later step."""
        return [tir.prefetch(self.weights, [block, k + AHEAD // (4 * self.width), v * self.lanes])] if height == 1 else []

    def _words(self, begin, end, step):
        """``step(k)`` for k in [begin, end), unrolled by the schedule's factor."""
        unroll = min(self.schedule.unroll, end - begin)
        whole = (end - begin) // unroll
        body = [tir.for_("k", whole, lambda i: tir.unrolled(unroll, lambda u: step(i * unroll + (begin + u))))]
        return body + [step(tir.i64(k)) for k in range(begin + whole * unroll, end)]

    def _count_words(self, acc, step):
        """Add up popcounts of 32-bit lanes; ``step(k, add)`` gives the statements for word k of K."""

        def add(index, bits):
            return acc.set(index, acc.get(index) + tir.reinterpret("int32", tirx.popcount(bits)))

        return self._words(0, self.depth, lambda k: step(k, add))

    def _count_bytes(self, acc, step):
        """The same without a vector popcount instruction: byte counters, widened before they can overflow."""
        octets = tir.Registers("octets", len(acc.arrays), "uint8", 4 * self.lanes)

        def add(index, bits):
            return octets.set(index, octets.get(index) + tirx.popcount(tirx.reinterpret(f"uint8x{4 * self.lanes}", bits)))

        def chunk(begin, steps):
            body = octets.fill(tir.splat(0, "uint8", 4 * self.lanes))
            body += self._words(0, steps, lambda k: step(k + begin, add))
            return body + [acc.set(i, acc.get(i) + _sum_bytes(octets.get(i), self.lanes)) for i in range(len(acc.arrays))]

        whole, rest = divmod(self.depth, BYTE_STEPS)
        body = [*octets.allocate]
        if whole:
            body.append(tir.for_("chunk", whole, lambda i: chunk(i * BYTE_STEPS, BYTE_STEPS)))
        return body + (chunk(tir.i64(whole * BYTE_STEPS), rest) if rest else [])

    # Per-row numbers

    def _count_rows(self):
        """Fill ``base``: one pass over the data or the mask plane, small beside the product."""
        unipolar = self.mask is None
        source, total = (self.data, 0) if unipolar else (self.mask, self.spec.in_features)
        sign = 1 if unipolar else -1
        lanes = self.lanes
        whole, rest = divmod(self.depth, lanes)

        def count(row):
            acc = tir.Registers("sum", 1, "int32", lanes)

            def add(word):
                return acc.set(0, acc.get(0) + tir.reinterpret("int32", tirx.popcount(word)))

            body = [*acc.allocate, *acc.fill(tir.splat(0, "int32", lanes))]
            if whole:
                body.append(tir.for_("k", whole, lambda k: add(tir.load_vector(source, [row, k * lanes], lanes))))
            if rest:
                body.append(add(tir.load_masked(source, [row, whole * lanes], tir.prefix_mask(rest, lanes))))
            result = tir.constant(total, "int32") + tir.constant(sign, "int32") * tir.sum_lanes(acc.get(0))
            return [*body, tir.store(self.base, result, row)]

        return tir.for_("row", self.rows, count)


class Pairs(_Kernel):
    """Two words of K at a time. A register tile holds the counters of one vector of channels; a word of channels takes two of them."""

    def __init__(self, spec, schedule, isa):
        super().__init__(spec, schedule, isa)
        self.encoded, self.allocate = tir.scratch("encoded", (self.rows, self.depth), "uint32")

    def _prepare(self):
        """The data with the second word of each pair xored with the first."""
        lanes = self.lanes
        size = self.rows * self.depth
        vectors = size // lanes

        def pairs(at, count):
            wide = tir.vector_type("uint64", count // 2)
            loaded = tirx.reinterpret(wide, tir.load_vector(self.data, [0, at], count))
            loaded = loaded ^ (loaded << tir.splat(32, "uint64", count // 2))
            return tir.store_vector(self.encoded, [0, at], tirx.reinterpret(tir.vector_type("uint32", count), loaded))

        return [self.allocate, tir.for_("i", vectors, lambda i: pairs(i * lanes, lanes)),
                tir.for_("i", (size - vectors * lanes) // 2, lambda i: pairs(vectors * lanes + i * 2, 2))]  # fmt: skip

    def _product(self, height, block, first, masked):
        if height <= 2:  # registers for all vectors of a word, so that whole cache lines are read in order
            counts = tir.Registers("count", height * self.vectors, "int32", self.lanes)
            body = self._count(height, self.vectors, block, first, 0, lambda r, v, count: counts.set(r * self.vectors + v, count))
            return [*counts.allocate, *body, *self._stores(counts, height, block, first, masked)]
        # Counts wait in memory: in registers they would be in the way of the next vector's.
        counts, allocate = tir.local("counts", height * self.width, "int32")
        body = [allocate]
        for begin in range(self.vectors):

            def keep(r, v, count, begin=begin):
                return tir.store_vector(counts, [r * self.width + (begin + v) * self.lanes], count)

            body += self._count(height, 1, block, first, begin, keep)

        def row(r):
            values = [tir.load_vector(counts, [r * self.width + v * self.lanes], self.lanes) for v in range(self.vectors)]
            return self.emitter.emit(values, (first + r,), block * self.width, {}, popcounts_of=self.spec.in_features)

        return [*body, tir.for_("r", height, row)]

    def _count(self, height, together, block, first, begin, keep):
        """``keep(row, vector, count)`` for the popcounts of ``together`` vectors of channels from vector ``begin`` of the block on."""
        sums = CarrySave(height, together, self.lanes)
        zero = tir.splat(0, "int32", self.lanes)
        body = [*sums.allocations, *sums.start(), *self._sum(sums, height, together, block, first, begin)]
        return body + [keep(r, v, zero - sums.value(r, v)) for r in range(height) for v in range(together)]

    def _sum(self, sums, height, together, block, first, begin):
        unroll = max(1, self.schedule.unroll // 2)

        def step(pair):
            words = (pair * 2, pair * 2 + 1)
            body, weights = [], []
            for v in range(begin, begin + together):
                loaded = [tir.bind("w", tir.load_vector(self.weights, [block, k, v * self.lanes], self.lanes)) for k in words]
                weights.append([vector for vector, _ in loaded])
                body += [[named, self._fetch(height, block, k, v)] for (_, named), k in zip(loaded, words)]
            for r in range(height):
                data = [tir.broadcast(tir.load(self.encoded, first + r, k), self.lanes) for k in words]
                body += [sums.step(r, v, data, weights[v]) for v in range(together)]
            return body

        whole, rest = divmod(self.depth // 2, unroll)
        loop = tir.for_("k", whole, lambda i: tir.unrolled(unroll, lambda u: step(i * unroll + u)))
        return [loop, [step(tir.i64(whole * unroll + u)) for u in range(rest)]]


def _heights(rows):
    """Heights of the tiles that are built: the full one and powers of two below it."""
    return [rows, *(h for h in (8, 4, 2, 1) if h < rows)]


def _sum_bytes(octets, lanes):
    """int32 lanes of the sums of four bytes each."""

    def number(value):
        return tir.splat(value, "uint32", lanes)

    x = tirx.reinterpret(f"uint32x{lanes}", octets)
    pairs = (x & number(0x00FF00FF)) + ((x >> number(8)) & number(0x00FF00FF))
    return tir.reinterpret("int32", (pairs & number(0xFFFF)) + (pairs >> number(16)))
