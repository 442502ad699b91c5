"""Dense layer of float32 data and packed weights: the family of :class:`bnntvm.spec.WeightDense`.

With vectors of 16 lanes sums are looked up. Four weights of a plane are a number from 0 to 15, and sixteen floats are one register: for
each four features of a row a table of the sixteen sums ``+-x0 +-x1 +-x2 +-x3`` (or of the chosen ones of the four) is computed once, and
serves all output channels; one permutation and one addition then do the work of 64 multiplications (Park et al., LUT-GEMM, 2022; Wei et
al., T-MAC, 2024, whose tables are quantised: these are not). With 8 lanes it is three features, eight sums, and 30 bits of a word.

With shorter vectors the weights of a step are decoded to +-1, 0 or levels once for the rows of a tile, and multiplied.

Few rows share the tasks by blocks of output channels, and the tables of all rows are made first. With many rows a task is a few rows:
their tables, then all the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx

from bnntvm import spec as specs
from bnntvm.bits import pack_bits, unpack_bits

from . import epilogue as epilogues
from . import packed_weights, tir, windows

#: Lanes -> the instruction that permutes a vector of floats by the low bits of indices: a table lookup.
_PERMUTE = {16: "llvm.x86.avx512.permvar.sf.512", 8: "llvm.x86.avx2.permps"}


@dataclass(frozen=True)
class Schedule:
    """What may be tuned.

    Attributes
    ----------
    rows : int
        Rows of the data in a register tile.
    vectors : int
        Vectors of output channels in a register tile; whole 32-bit words of channels if the epilogue packs bits.
    tables : bool
        Look up sums.
    """

    rows: int
    vectors: int
    tables: bool


def default_schedule(spec, isa):
    """A schedule that is fast without tuning."""
    return space(spec, isa)[0]


def space(spec, isa):
    """Valid schedules, the default one first."""
    sums, tables = sums_per_output(spec.coding), isa.lanes in _PERMUTE
    least = max(1, specs.WORD_BITS // isa.lanes) if windows.has_bits(spec.epilogue) else 1
    most = max(least, -(-spec.out_features // isa.lanes))
    if isa.registers == 32:
        # Words of both planes take registers of their own.
        shapes = [(4 if spec.coding.planes == 1 else 3, 4), (2, 8), (1, 8), (4, 2)] if tables else [(8, 2), (4, 4)]
    else:
        shapes = [(2, 4), (1, 8), (4, 2)] if tables else [(4, 2), (2, 2), (6, 1)]
    found = []
    for rows, vectors in shapes:
        vectors = max(least, min(most, vectors // sums if vectors >= sums else 1) // least * least)
        found.append(Schedule(max(1, min(rows, (isa.registers - 6) // (vectors * (sums if tables else 1)))), vectors, tables))
    return list(dict.fromkeys(found))


def table_features(lanes):
    """Features of a table: their sums with all choices of signs fill one vector."""
    return lanes.bit_length() - 1


def word_features(schedule, isa):
    """Features whose bits lie in one word."""
    features = table_features(isa.lanes) if schedule.tables else 1
    return specs.WORD_BITS // features * features


def sums_per_output(coding):
    """Sums that are kept for an output until its levels multiply them."""
    return coding.planes if coding.kind == "levels" else 1


def pack_weights(spec, schedule, isa, weights):
    """Weights in the order in which the kernel reads them.

    Parameters
    ----------
    weights : ndarray
        uint32 ``[planes, N, words(K)]``.

    Returns
    -------
    ndarray
        uint32 ``[blocks, words, planes, block]``, see :mod:`.packed_weights`; output channels padded to whole blocks. A word has the bits
        of :func:`word_features` features, from the lowest bit on.
    """
    size, features = schedule.vectors * isa.lanes, word_features(schedule, isa)
    if features != specs.WORD_BITS:
        planes = unpack_bits(weights, spec.in_features)
        planes = np.pad(planes, ((0, 0), (0, 0), (0, -spec.in_features % features)))
        weights = pack_bits(planes.reshape(*planes.shape[:2], -1, features))[..., 0]
    padded = np.pad(weights, ((0, 0), (0, -weights.shape[1] % size), (0, 0)))
    return np.ascontiguousarray(padded.reshape(len(weights), -1, size, weights.shape[2]).transpose(1, 3, 0, 2))


def build(spec, schedule, isa):
    """The kernel: data ``float32[M, K]``, packed weights, levels if any, the epilogue's inputs and outputs. M is dynamic.

    Returns
    -------
    tirx.PrimFunc
    """
    return (_Lookup if schedule.tables else _Multiply)(spec, schedule, isa).function()


class _Kernel:
    """What both kinds of kernel share: parameters, tasks, tiles, and the way from sums to results."""

    def __init__(self, spec, schedule, isa):
        self.spec, self.coding, self.lanes, self.vectors = spec, spec.coding, isa.lanes, schedule.vectors
        self.size, self.height = schedule.vectors * isa.lanes, schedule.rows
        self.blocks, self.words = -(-spec.out_features // self.size), -(-spec.in_features // word_features(schedule, isa))
        self.rows = tirx.Var("m", "int64")
        self.data = tir.buffer("x", (self.rows, spec.in_features), "float32")
        self.weights = tir.buffer("w", (self.blocks, self.words, spec.coding.planes, self.size), "uint32")
        self.operands = [self.data, self.weights]
        if spec.coding.kind == "levels":
            self.levels = tir.buffer("l", (spec.coding.planes + 1, specs.words(spec.out_features) * specs.WORD_BITS), "float32")
            self.operands.append(self.levels)
        self.sums = sums_per_output(spec.coding)
        self.emitter = epilogues.Emitter(spec.epilogue, spec.out_features, isa, (self.rows,), "float32")

    def function(self):
        many = tir.i64(8 * self.height)
        body = tir.when(self.rows < many, self._by_blocks(), self._by_rows())
        return tir.function("weight_dense", [*self.operands, *self.emitter.inputs, *self.emitter.outputs], body)

    # Loops

    def _by_blocks(self):
        """Threads share the blocks of output channels."""

        def block(number):
            def tiles(height):
                return self._tiles(height, self.rows, lambda first: self._tile(height, number, first, first))

            return tiles(1) if self.height == 1 else tir.when(self.rows < self.height, tiles(1), tiles(self.height))

        return [*self.prepare_all(), tir.parallel("block", self.blocks, block)]

    def _by_rows(self):
        """Threads share the tiles of rows."""
        height = self.height

        def task(number):
            first, bound = tir.bind("first", tirx.min(number * height, self.rows - height))
            prepared = self.prepare(first, height)
            return [bound, prepared, tir.for_("block", self.blocks, lambda block: self._tile(height, block, first, tir.i64(0)))]

        return tir.parallel("task", tirx.floordiv(self.rows + (height - 1), tir.i64(height)), task)

    def _tiles(self, height, rows, body):
        """``body(first row)`` for tiles of ``height`` rows; the last one overlaps its neighbour."""

        def tile(number):
            first, bound = tir.bind("first", tirx.min(number * height, rows - height))
            return [bound, body(first)]

        return tir.for_("tile", tirx.floordiv(rows + (height - 1), tir.i64(height)), tile)

    # What subclasses define

    def prepare_all(self):
        """Statements before the tasks, where those are blocks."""
        return []

    def prepare(self, first, height):
        """Statements at the start of a task of ``height`` rows."""
        return []

    def reduce(self, acc, height, block, first, prepared):
        """Statements that add up a tile's sums: ``acc`` holds ``height x vectors x sums`` vectors."""
        raise NotImplementedError

    def result(self, acc, index, row, levels):
        """The anchor's vector from the sums from ``index`` on; ``levels`` are vectors of levels."""
        return acc.get(index)

    # One tile

    def _tile(self, height, block, first, prepared):
        """Rows ``first ...`` by a block of output channels; what was prepared for them begins at row ``prepared``."""
        acc = tir.Registers("acc", height * self.vectors * self.sums, "float32", self.lanes)
        body = [*acc.allocate, *acc.fill(tir.splat(0.0, "float32", self.lanes)), self.reduce(acc, height, block, first, prepared)]
        whole = self.spec.out_features % self.size == 0
        chunk = self.vectors if whole else max(1, specs.WORD_BITS // self.lanes)
        for begin in range(0, self.vectors, chunk):
            columns, scope, rows = block * self.size + begin * self.lanes, {}, []
            part = range(begin, min(begin + chunk, self.vectors))
            levels = {v: self._levels(rows, block * self.size + v * self.lanes) for v in part}
            for r in range(height):
                values = [self.result(acc, (r * self.vectors + v) * self.sums, prepared + r, levels[v]) for v in part]
                rows += self.emitter.emit(values, (first + r,), columns, scope)
            body.append(tir.when(columns < self.spec.out_features, rows) if begin else rows)
        return body

    def _levels(self, body, channel):
        if self.coding.kind != "levels":
            return []
        found = [tir.bind("l", tir.load_vector(self.levels, [p, channel], self.lanes)) for p in range(self.coding.planes + 1)]
        body.extend(statement for _, statement in found)
        return [variable for variable, _ in found]


class _Multiply(_Kernel):
    """Decoded weights times broadcast data. With levels, there is one sum, of products by levels."""

    def __init__(self, spec, schedule, isa):
        super().__init__(spec, schedule, isa)
        self.sums = 1

    def reduce(self, acc, height, block, first, prepared):
        body, whole, rest = [], *divmod(self.spec.in_features, 8)
        levels = [self._levels(body, block * self.size + v * self.lanes) for v in range(self.vectors)]

        def steps(begin, bits):
            return self._steps(acc, height, block, first, begin, bits, levels)

        if whole:
            body.append(tir.for_("octet", whole, lambda octet: steps(octet * 8, 8)))
        return body + ([tir.for_("k", rest, lambda k: steps(k + 8 * whole, 1))] if rest else [])

    def _steps(self, acc, height, block, first, begin, bits, levels):
        """Steps ``begin ... begin + bits - 1`` of the reduction, bits of one word: their last one is shifted to the word's top."""
        body = []

        def name(value):
            variable, statement = tir.bind("w", value)
            body.append(statement)
            return variable

        shift = tirx.Cast("uint32", (specs.WORD_BITS - bits) - tirx.floormod(begin, specs.WORD_BITS))
        shift = name(tir.broadcast(shift, self.lanes))
        decoders = []
        for v in range(self.vectors):
            index = [[block, tirx.floordiv(begin, specs.WORD_BITS), p, v * self.lanes] for p in range(self.coding.planes)]
            words = [name(tir.load_vector(self.weights, one, self.lanes) << shift) for one in index]
            decoders.append(packed_weights.Decoder(self.coding, self.lanes, words, levels[v]))
        for j in range(bits):
            weights = [name(decoder.weight(specs.WORD_BITS - bits + j)) for decoder in decoders]
            for r in range(height):
                x = name(tir.broadcast(tir.load(self.data, first + r, begin + j), self.lanes))
                for v, weight in enumerate(weights):
                    i = r * self.vectors + v
                    body.append(acc.set(i, acc.get(i) + x * weight))
        return body


class _Lookup(_Kernel):
    """Tables of sums, ``float32[rows, tables, lanes]``: one vector each. For levels, also the sum of each row."""

    def __init__(self, spec, schedule, isa):
        super().__init__(spec, schedule, isa)
        self.features, self.permute = table_features(isa.lanes), _PERMUTE[isa.lanes]
        self.per_word = specs.WORD_BITS // self.features
        self.count = self.words * self.per_word

    def prepare_all(self):
        return self._prepare(self.rows, tir.i64(0))

    def prepare(self, first, height):
        return self._prepare(tir.i64(height), first)

    def _prepare(self, count, first):
        """The tables of ``count`` rows from ``first`` on."""
        self.tables, allocate = tir.scratch("tables", (count, self.count, self.lanes), "float32")
        self.totals, allocate_totals = tir.scratch("totals", (count,), "float32")
        fill = tir.for_("row", count, lambda row: self._fill(first + row, row))
        return [allocate, *([allocate_totals] if self.coding.offset else []), fill]

    def _fill(self, row, where):
        """The tables of one row. Entry e of a table is the sum of its features, those with a 1 bit in e times -1 (sign), or of those."""
        whole, rest = divmod(self.spec.in_features, self.features)

        def table(number, features):
            entries = None
            for i in range(features):
                x = tir.broadcast(tir.load(self.data, row, number * self.features + i), self.lanes)
                term = x * _pattern(self.coding, i, self.lanes)
                entries = term if entries is None else entries + term
            return tir.store_vector(self.tables, [where, number, 0], entries)

        body = [tir.for_("table", whole, lambda number: table(number, self.features))] if whole else []
        body += [table(tir.i64(whole), rest)] if rest else []
        zero = tir.splat(0.0, "float32", self.lanes)
        body += [tir.store_vector(self.tables, [where, number, 0], zero) for number in range(whole + bool(rest), self.count)]
        return [*body, self._total(where)] if self.coding.offset else body

    def _total(self, where):
        """Note the sum of a row: of the tables' last entries, which are the sums of all their features."""
        total = tir.Registers("total", 1, "float32", self.lanes)

        def add(number):
            return total.set(0, total.get(0) + tir.load_vector(self.tables, [where, number, 0], self.lanes))

        last = tir.shuffle([total.get(0)], [self.lanes - 1])
        zero = tir.splat(0.0, "float32", self.lanes)
        return [*total.allocate, total.set(0, zero), tir.for_("table", self.count, add), tir.store(self.totals, last, where)]

    def reduce(self, acc, height, block, first, prepared):
        return tir.for_("k", self.words, lambda k: self._word(acc, height, block, prepared, k))

    def _word(self, acc, height, block, prepared, k):
        body = []

        def name(value):
            variable, statement = tir.bind("w", value)
            body.append(statement)
            return variable

        places = [(v, p) for v in range(self.vectors) for p in range(self.coding.planes)]
        words = {(v, p): name(tir.load_vector(self.weights, [block, k, p, v * self.lanes], self.lanes)) for v, p in places}
        for j in range(self.per_word):
            tables = [name(tir.load_vector(self.tables, [prepared + r, k * self.per_word + j, 0], self.lanes)) for r in range(height)]
            for v, p in places:
                index = words[v, p] >> tir.splat(self.features * j, "uint32", self.lanes) if j else words[v, p]
                index = name(tir.reinterpret("int32", index))
                for r, table in enumerate(tables):
                    i = (r * self.vectors + v) * self.sums + (p if self.sums > 1 else 0)
                    looked_up = tir.intrinsic(self.permute, table, index)
                    minus = self.coding.kind == "ternary" and p == 1
                    body.append(acc.set(i, acc.get(i) - looked_up if minus else acc.get(i) + looked_up))
        return body

    def result(self, acc, index, row, levels):
        if self.coding.kind != "levels":
            return acc.get(index)
        value = None
        for p in range(self.coding.planes):
            rise = levels[p + 1] - levels[0] if self.coding.offset else levels[p + 1]
            value = acc.get(index + p) * rise if value is None else value + acc.get(index + p) * rise
        return value + tir.broadcast(tir.load(self.totals, row), self.lanes) * levels[0] if self.coding.offset else value


def _pattern(coding, i, lanes):
    """float32 vector over the entries of a table: what feature ``i`` of the table is multiplied by."""
    bits = (tir.lane_numbers(lanes) >> tir.splat(i, "int32", lanes)) & tir.splat(1, "int32", lanes)
    ones = tirx.Cast(f"float32x{lanes}", bits)
    one, two = (tir.splat(v, "float32", lanes) for v in (1.0, 2.0))
    return one - two * ones if coding.kind == "sign" else ones


def reference(spec, operands, epilogue_inputs):
    """The layer in numpy.

    Parameters
    ----------
    operands : list
        data float32 ``[M, K]``, weights uint32 ``[planes, N, words(K)]``, levels float32 ``[planes + 1, N or more]`` if any.
    epilogue_inputs : list of ndarray

    Returns
    -------
    list of ndarray
        One for each output of the epilogue.
    """
    data, words, *levels = operands
    weights = packed_weights.values(unpack_bits(words, spec.in_features), spec.coding, *levels)
    return epilogues.reference(spec.epilogue, (data.astype(np.float64) @ weights.astype(np.float64).T).astype(np.float32), epilogue_inputs)
