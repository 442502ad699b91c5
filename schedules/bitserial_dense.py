"""Dense layers of sums of bit planes: the family of :class:`bnntvm.spec.PlanesDense`.

The register tile of :mod:`.binary_dense`, computed for one pair of a data plane and a weight plane after the other; the sum of all pairs
starts with the constants that the weights contribute (:mod:`.bitserial_adders`) and stays in registers. The weights of a block of channels
are in the first-level cache when the second data plane meets them.

Unipolar data with bipolar weights need no constants of the weights here: popc(a) - 2 popc(a & w), the first term the same for a whole row.
"""

from __future__ import annotations

import numpy as np
from tvm import tirx

from bnntvm import spec as specs
from bnntvm.schedules import binary_dense, tir
from bnntvm.schedules import bitserial_adders as adders
from bnntvm.schedules import epilogue as tail
from bnntvm.schedules.binary_conv2d_adders import ternary_logic
from bnntvm.schedules.bitserial_conv2d import total, weight_values
from bnntvm.schedules.bitserial_conv2d_kernel import choose

Schedule = binary_dense.Schedule


def default_schedule(spec, isa):
    """The tile of binary layers."""
    return binary_dense.default_schedule(spec, isa)


def space(spec, isa):
    """Tiles whose accumulators fit into the registers."""
    per_word, halves = specs.WORD_BITS // isa.lanes, spec.planes.words_per_weight
    spare = 4 if isa.popcount == "vector" else 6
    fits = [(r, w) for w in (1, 2) for r in (1, 2, 3, 4, 5, 6, 7, 8, 12) if (r + halves) * w * per_word + spare <= isa.registers]
    return [Schedule(r, w, u) for r, w in fits or [(1, 1)] for u in (1, 2, 4)]


def _corrected(planes):
    """Rows of corrections of a block: one, one for each weight plane if those are scaled, none if no weights have to be counted."""
    if planes.weight_kind == "bipolar" or planes.data_kind == planes.weight_kind:
        return 0
    return len(planes.weights) if planes.scaled else 1


def pack_weights(spec, schedule, isa, weights):
    """Weights in the order in which the kernel reads them.

    Parameters
    ----------
    weights : ndarray uint32[Q', N, words(K)]
        Planes of words, tail bits 0.

    Returns
    -------
    ndarray uint32[blocks, elements]
        Of a block of ``schedule.words * 32`` channels: for each weight plane and word of K the words of all channels (of a ternary plane
        signs, then mask), then the corrections int32[planes or 1, channels], where there are any.
    """
    planes, width, count = spec.planes, schedule.words * specs.WORD_BITS, binary_dense.blocks(spec, schedule)
    padded = np.zeros((len(weights), count * width, weights.shape[2]), np.uint32)
    padded[:, : spec.out_features] = weights
    counts = np.bitwise_count(padded).sum(-1, dtype=np.int64)
    shares = adders.shares(planes, spec.in_features)[: _corrected(planes)]
    constants = np.array([share.of(counts) for share in shares], np.int64).reshape(_corrected(planes), count, width).transpose(1, 0, 2)
    parts = padded.reshape(-1, planes.words_per_weight, count, width, weights.shape[2]).transpose(2, 0, 4, 1, 3)
    stored = np.ascontiguousarray(constants.astype(np.int32)).view(np.uint32)
    return np.concatenate([parts.reshape(count, -1), stored.reshape(count, stored.shape[1] * width)], axis=1)


def reference(spec, operands, epilogue_inputs):
    """The layer in numpy, from unpacked values; operands as of :func:`.bitserial_conv2d.reference`."""
    count, bits = len(spec.planes.data), spec.in_features
    rest = list(operands[count:])
    weights, mask = rest.pop(0), rest.pop(0) if spec.zeros else None
    values = [tail.unpack(plane, bits).astype(np.int64) for plane in operands[:count]]
    if spec.planes.data_kind == "bipolar":
        values = [1 - 2 * plane for plane in values]
    if mask is not None:
        values = [plane * ~tail.unpack(mask, bits) for plane in values]
    kernels = [weight_values(spec.planes, weights, q, bits) for q in range(len(spec.planes.weights))]
    dots = [(plane @ kernel.T).astype(np.int32) for plane in values for kernel in kernels]
    return tail.reference(spec.epilogue, total(spec.planes, dots, rest), epilogue_inputs)


def build(spec, schedule, isa):
    """The kernel: parameters the data planes ``uint32[m, words(K)]``, packed weights, the mask plane for ``zeros``, the scales for scaled
    planes, then the epilogue's."""
    return _Kernel(spec, schedule, isa).function()


class _Kernel(binary_dense._Kernel):
    def __init__(self, spec, schedule, isa):
        self.spec, self.schedule, self.isa, self.lanes, self.planes = spec, schedule, isa, isa.lanes, spec.planes
        self.depth, self.blocks = specs.words(spec.in_features), binary_dense.blocks(spec, schedule)
        self.vectors, self.width = schedule.words * specs.WORD_BITS // isa.lanes, schedule.words * specs.WORD_BITS
        self.of_rows = (spec.planes.data_kind, spec.planes.weight_kind) == ("unipolar", "bipolar")
        self.kind, self.factor = ("and", -2) if self.of_rows else (adders.logic(spec.planes), adders.factor(spec.planes))
        self.halves = spec.planes.words_per_weight
        # Elements of a word of K of all channels of a block, of a weight plane, and of the planes before the corrections.
        self.word_step = self.halves * self.width
        self.plane_step = self.depth * self.word_step
        self.corrections_at = len(spec.planes.weights) * self.plane_step
        self.rows = tirx.Var("m", "int64")
        self.sources = [tir.buffer(f"data{p}", (self.rows, self.depth), "uint32") for p in range(len(spec.planes.data))]
        self.weights = tir.buffer("weights", (self.blocks, self.corrections_at + _corrected(spec.planes) * self.width), "uint32")
        self.mask = tir.buffer("mask", (self.rows, self.depth), "uint32") if spec.zeros else None
        pairs = len(spec.planes.data) * len(spec.planes.weights)
        scales = (pairs, specs.words(spec.out_features) * specs.WORD_BITS)
        self.scales = tir.buffer("scales", scales, "float32") if spec.planes.scaled else None
        self.result_type = "float32" if spec.planes.scaled else "int32"
        self.emitter = tail.Emitter(spec.epilogue, spec.out_features, isa, (self.rows,), self.result_type)
        self.base, self.allocate = tir.scratch("base", (self.rows,), "int32") if spec.zeros else (None, None)
        # What the bits of a row contribute: one number, one for each data plane if those are scaled.
        self.ones, self.allocate_ones = (None, None)
        if self.of_rows:
            self.ones, self.allocate_ones = tir.scratch("ones", (len(spec.planes.data) if spec.planes.scaled else 1, self.rows), "int32")

    def function(self):
        more = [operand for operand in (self.mask, self.scales) if operand is not None]
        body = [self.allocate, self._count_rows()] if self.base is not None else []
        body += [self.allocate_ones, tir.for_("row", self.rows, self._count_ones)] if self.of_rows else []
        body.append(self._by_columns() if self.blocks >= 8 else self._by_rows())
        params = [*self.sources, self.weights, *more, *self.emitter.inputs, *self.emitter.outputs]
        return tir.function("bitserial_dense", params, body)

    # One tile

    def _product(self, height, block, first, masked):
        cells = height * self.vectors
        totals = tir.Registers("total", cells, self.result_type, self.lanes)
        body = [*totals.allocate, self._start(totals, height, block, first)]
        for p in range(len(self.planes.data)):
            body.append(tir.for_("q", len(self.planes.weights), lambda q, p=p: self._pair(totals, height, block, first, p, q, masked)))
        return [*body, *self._stores(totals, height, block, first)]

    def _count_ones(self, row):
        """Statements that write what the bits of a row contribute."""
        planes, acc = self.planes, tir.Registers("ones", 1, "int32", self.lanes)
        whole, rest = divmod(self.depth, self.lanes)

        def add(p, words):
            count, weight = tir.reinterpret("int32", tirx.popcount(words)), 1 if planes.scaled else planes.data[p] * sum(planes.weights)
            return acc.set(0, acc.get(0) + count * tir.splat(weight, "int32", self.lanes))

        def plane(p):
            body = [tir.for_("k", whole, lambda k: add(p, tir.load_vector(self.sources[p], [row, k * self.lanes], self.lanes)))]
            if rest:
                body.append(add(p, tir.load_masked(self.sources[p], [row, whole * self.lanes], tir.prefix_mask(rest, self.lanes))))
            return body

        body = [*acc.allocate]
        for p in range(len(planes.data)):
            first, last = planes.scaled or p == 0, planes.scaled or p == len(planes.data) - 1
            body += [acc.fill(tir.splat(0, "int32", self.lanes)) if first else [], plane(p)]
            body.append(tir.store(self.ones, tir.sum_lanes(acc.get(0)), p if planes.scaled else 0, row) if last else [])
        return body

    def _start(self, totals, height, block, first):
        """Totals begin with the corrections."""
        if self.planes.scaled:
            return totals.fill(tir.splat(0, self.result_type, self.lanes))
        body = []
        for i in range(height * self.vectors):
            r, v = divmod(i, self.vectors)
            body.append(totals.set(i, self._correction(block, v, 0, 0, first + r)))
        return body

    def _correction(self, block, v, p, q, row):
        """What the pair (p, q) of planes contributes besides counts, or all pairs if they are not scaled."""
        if self.of_rows:
            return tir.broadcast(tir.load(self.ones, p, row), self.lanes)
        if not _corrected(self.planes):  # the same for all weight planes
            return tir.splat(adders.shares(self.planes, self.spec.in_features)[0].constant, "int32", self.lanes)
        index = self.corrections_at + q * self.width + v * self.lanes
        return tir.reinterpret("int32", tir.load_vector(self.weights, [block, index], self.lanes))

    def _pair(self, totals, height, block, first, p, q, masked):
        """Count a pair of planes and add it to the totals. The counts of zeros under the weights follow those of the products."""
        cells = len(totals.arrays)
        acc = tir.Registers("acc", 2 * cells if masked else cells, "int32", self.lanes)
        body = [*acc.allocate, *acc.fill(tir.splat(0, "int32", self.lanes))]
        count = self._count_words if self.isa.popcount == "vector" else self._count_bytes
        body += count(acc, lambda k, add: self._step(height, block, first, k, masked, add, p, q))

        def dot(i):
            value = acc.get(i) * tir.splat(self.factor, "int32", self.lanes) if self.factor != 1 else acc.get(i)
            return value - acc.get(cells + i) if masked else value

        if self.planes.scaled:
            return [*body, self._add_scaled(totals, dot, (height, block, first), p, q)]
        coefficient = self.planes.data[p] * choose(self.planes.weights, q)
        if tir.static(coefficient) == 1:
            return [*body, *(totals.set(i, totals.get(i) + dot(i)) for i in range(cells))]
        weight, named = tir.bind("coefficient", tir.broadcast(tirx.Cast("int32", coefficient), self.lanes))
        return [*body, named, *(totals.set(i, totals.get(i) + dot(i) * weight) for i in range(cells))]

    def _add_scaled(self, totals, dot, tile, p, q):
        (height, block, first), body = tile, []
        for v in range(self.vectors):
            where = [p * len(self.planes.weights) + q, block * self.width + v * self.lanes]
            inside = tirx.min(where[1], tir.i64(int(self.scales.shape[1]) - self.lanes))  # a tile of two words may reach past the last one
            scale, loaded = tir.bind("scale", tir.load_vector(self.scales, [where[0], inside], self.lanes))
            body.append(loaded)
            for r in range(height):
                i, correction = r * self.vectors + v, self._correction(block, v, p, q, first + r)
                value = tir.opaque(tirx.Cast(tir.vector_type("float32", self.lanes), correction + dot(i)))
                body.append(totals.set(i, totals.get(i) + tir.fence(value * scale)))
        return body

    def _stores(self, totals, height, block, first):
        """The epilogue of a tile, for all words of its columns that exist."""
        body, per_word, whole = [], self.emitter.vectors_per_word, self.spec.out_features % self.width == 0
        for begin in range(0, self.vectors, self.vectors if whole else per_word):
            columns, scope, rows = block * self.width + begin * self.lanes, {}, []
            for r in range(height):
                vectors = [totals.get(r * self.vectors + v) for v in range(begin, self.vectors if whole else begin + per_word)]
                rows += self.emitter.emit(vectors, (first + r,), columns, scope)
            body.append(tir.when(columns < self.spec.out_features, rows) if begin else rows)
        return body

    def _step(self, height, block, first, k, masked, add, p, q):
        """Word ``k`` of every row and channel of the tile: ``add(index, bits)`` counts bits into an accumulator."""
        body, weights = [], []
        for v in range(self.vectors):
            parts = []
            for half in range(self.halves):
                index = q * self.plane_step + k * self.word_step + half * self.width + v * self.lanes
                w, named = tir.bind("w", tir.load_vector(self.weights, [block, index], self.lanes))
                parts.append(w)
                body.append(named)
            weights.append(parts)
        for r in range(height):
            a, named = tir.bind("a", tir.broadcast(tir.load(self.sources[p], first + r, k), self.lanes))
            body.append(named)
            zeros = None
            if masked:
                zeros, named = tir.bind("zeros", tir.broadcast(tir.load(self.mask, first + r, k), self.lanes))
                body.append(named)
            for v, parts in enumerate(weights):
                bits, cell = self._logic(a, parts), r * self.vectors + v
                body.append(add(cell, bits if zeros is None else bits & ~zeros))
                if masked:
                    body.append(add(height * self.vectors + cell, zeros if self.kind == "xor" else zeros & parts[-1]))
        return body

    def _logic(self, a, parts):
        if self.kind == "ternary":
            return ternary_logic(a, *parts, adders.TERNARY) if self.lanes == 16 else (a ^ parts[0]) & parts[1]
        return a & parts[0] if self.kind == "and" else a ^ parts[0]
