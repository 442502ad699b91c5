"""Dense layers of bit planes (:class:`bnntvm.spec.BinaryDense`): xor or and, population count, add.

    bipolar x bipolar            dot = K - 2 popc(a ^ w)
    unipolar x bipolar           dot = popc(a) - 2 popc(a & w)
    bipolar with zeros (mask m)  dot = K - popc(m) - 2 popc((a ^ w) & ~m)      tail bits of a, w and m are 0

The product is a register tile: some rows of the data (broadcast words) by one or more words of output channels (vectors of 32-bit lanes).
A row count that is not a multiple of the tile is covered by a last tile that overlaps its neighbour; row counts below one tile take
smaller tiles. Weights stream through once for each row tile, in the order in which they lie in memory.

Without a vector popcount instruction, bits are counted per byte (LLVM's nibble tables) and bytes are widened every 31 words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx

from bnntvm import spec as specs
from bnntvm.schedules import epilogue as tail
from bnntvm.schedules import tir

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
    """

    rows: int
    words: int
    unroll: int


def default_schedule(spec, isa):
    """The tile that fills the registers: accumulators, one row's broadcast, the weights, and the tables of the popcount."""
    rows = {16: 7, 8: 2, 4: 1}[isa.lanes]
    return Schedule(rows, 1, 2 if isa.popcount == "vector" else 1)


def space(spec, isa):
    """Tiles whose accumulators fit into the registers."""
    per_word, spare = specs.WORD_BITS // isa.lanes, 4 if isa.popcount == "vector" else 6
    fits = [(r, w) for w in (1, 2) for r in (1, 2, 3, 4, 5, 6, 7, 8, 12) if (r + 1) * w * per_word + spare <= isa.registers]
    return [Schedule(r, w, u) for r, w in fits or [(1, 1)] for u in (1, 2, 4)]


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
        Word k of channel ``block * width + lane``; channels past N are 0.
    """
    width = schedule.words * specs.WORD_BITS
    padded = np.zeros((blocks(spec, schedule) * width, weights.shape[1]), np.uint32)
    padded[: spec.out_features] = weights
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
    return _Kernel(spec, schedule, isa).function()


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
        body = [self.allocate, self._count_rows()] if self.base is not None else []
        body.append(self._by_columns() if self.blocks >= 8 else self._by_rows())
        return tir.function("binary_dense", [*params, *self.emitter.inputs, *self.emitter.outputs], body)

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
            body.append(named)
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
