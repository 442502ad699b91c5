"""Float dense layers on tensor cores, three products of tf32 for each of float32 as in :mod:`.tf32`, of more than a few rows.

A block computes 64 rows by one word of 32 output channels. Its warps share the features, 16 at a time, and add up what they found in
shared memory: results are few and sums long, so a layer keeps many warps busy. Operands come from memory right into registers, where both
are split: of 16 features lane 4 g + t takes four, 4 t to 4 t + 3, of the rows g, g + 8, ..., the first two for one product and the others
for the next (the order along K is free, as long as both operands agree).

Weights lie as for :mod:`.rows`, whose kernel is started where there are only a few rows: a tile would be empty but for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import epilogue as tail
from bnntvm.schedules.cuda import functions, simt

ROWS, WORD, FEATURES = 64, 32, 16
#: Most rows that are few.
FEW = 16
assert functions.TOGETHER  # the products are defined there


@dataclass(frozen=True)
class Schedule:
    """``slices``: warps of a block, among which features are shared out; ``few``: rows of a block where there are few at all."""

    slices: int
    few: int = 8


def pays(spec, isa):
    """Whether tensor cores are the default: as in :func:`.tf32.pays`; and there is a share of the features for every warp."""
    padded = -(-spec.in_features // FEATURES) * FEATURES
    return spec.in_features % 4 == 0 and spec.in_features >= 8 * FEATURES and 3 * padded < isa.tf32_rate * spec.in_features


def schedules(spec, isa):
    """Valid schedules, a good one first."""
    if not isa.tf32 or spec.in_features % 4:
        return []
    return [Schedule(slices) for slices in (8, 4) if spec.in_features >= slices * FEATURES]


def function(name, spec, schedule, operands, few):
    """A kernel for any number of rows.

    Parameters
    ----------
    operands : rows.Operands
    few : PrimFunc
        The kernel for few rows, of the same operands.
    """
    writer = _Writer(spec, schedule, operands)
    blocks = simt.i32(simt.ceil_div(simt.wide(operands.rows), ROWS) * operands.emitter.words)
    many = simt.kernel(name, operands.params, blocks, simt.WARP * schedule.slices, writer.body, 1)
    return simt.either(operands.rows <= tir.i64(FEW), few, many)


class _Writer:
    def __init__(self, spec, schedule, operands):
        self.features, self.slices, self.operands = spec.in_features, schedule.slices, operands
        self.channels = -(-spec.out_features // WORD) * WORD
        self.emitter, self.source, self.weights = operands.emitter, operands.source, operands.arrays[0]

    def body(self, block, thread):
        body = []
        named = simt.namer(body)
        self.lane, self.warp = named("lane", simt.mod(thread, 32)), named("warp", simt.div(thread, 32))
        self.group, self.quad = named("group", simt.div(self.lane, 4)), named("quad", simt.mod(self.lane, 4))
        self.total = named("rows", simt.i32(self.operands.rows))
        self.word = named("word", simt.mod(block, self.emitter.words))
        self.first = named("first", simt.div(block, self.emitter.words) * ROWS)
        kinds = (("sums", 64, "float32"), ("raw", 32, "float32"), ("a", 8, "uint32"), ("b", 16, "uint32"))
        arrays = [simt.registers(*kind) for kind in kinds]
        (self.sums, self.raw, self.a, self.b), allocations = zip(*arrays)
        self.partial, allocate = simt.shared(self.slices * ROWS * WORD)
        body += [allocate, *allocations, *self.emitter.declarations]
        body += [simt.put(self.sums, i, tir.constant(0.0, "float32")) for i in range(64)]
        steps = -(-self.features // FEATURES)
        body.append(simt.loop("step", -(-steps // self.slices), self._step))
        body += [*self._leave(), simt.sync()]
        return [*body, simt.loop("turn", ROWS // self.slices, self._finish)]

    def _step(self, turn):
        """16 features, if the warp has any left."""
        body = []
        named = simt.namer(body)
        begin = named("begin", (turn * self.slices + self.warp) * FEATURES)
        feature, inner = begin + self.quad * 4, []
        here = simt.namer(inner)
        feature = here("feature", feature)
        inner += self._data(here, feature)
        for h in (0, 1):
            inner += self._weights(here, feature + 2 * h)
            for i in range(4):
                for e in (0, 1):
                    for half in (0, 1):
                        value = simt.at(self.raw, 4 * (2 * i + half) + 2 * h + e)
                        inner.append(simt.put(self.a, 2 * e + half, tirx.reinterpret("uint32", value)))
                inner.append(simt.do("bnn_split_tf32", simt.pointer(self.a, 0)))
                for j in range(4):
                    sums = simt.pointer(self.sums, 16 * i + 4 * j)
                    inner.append(simt.do("bnn_mma_tf32", sums, simt.pointer(self.a, 0), simt.pointer(self.b, 4 * j)))
        return [*body, tirx.IfThenElse(begin < self.features, tir.seq(inner), None)]

    def _data(self, named, feature):
        """Four features of the lane's eight rows; 0 where there is no such row or feature."""
        body = [simt.put(self.raw, i, tir.constant(0.0, "float32")) for i in range(32)]
        for j in range(8):
            row = named("row", self.first + self.group + 8 * j)
            where = simt.wide(row) * self.features + simt.wide(feature)
            load = simt.do("bnn_load16_float32", simt.pointer(self.raw, 4 * j), simt.pointer(self.source, where))
            body.append(tirx.IfThenElse(tirx.And(row < self.total, feature < self.features), load, None))
        return body

    def _weights(self, named, feature):
        """Two features of the word's channels, split; 0 where there is no such feature."""
        body = []
        where = named("where", simt.wide(feature) * self.channels + simt.wide(self.word * WORD + self.group))
        exists = named("exists", feature < self.features)
        for j in range(4):
            for e in (0, 1):
                value = simt.at(self.weights, where + (8 * j + e * self.channels))
                value = tirx.if_then_else(exists, value, tir.constant(0.0, "float32"))
                body.append(simt.put(self.b, 4 * j + e, tirx.reinterpret("uint32", value)))
            body.append(simt.do("bnn_split_pair_tf32", simt.pointer(self.b, 4 * j)))
        return body

    def _leave(self):
        """The warp's sums to shared memory: ``[warps, rows, channels]``."""
        body = []
        for i in range(4):
            for half in (0, 1):
                row = self.warp * ROWS + self.group + (16 * i + 8 * half)
                for j in range(4):
                    for e in (0, 1):
                        value = tirx.reinterpret("uint32", simt.at(self.sums, 16 * i + 4 * j + 2 * half + e))
                        body.append(simt.put(self.partial, row * WORD + self.quad * 2 + (8 * j + e), value))
        return body

    def _finish(self, turn):
        """A row of each warp."""
        body, value = [], None
        named = simt.namer(body)
        inside = named("inside", turn * self.slices + self.warp)
        row = named("row", self.first + inside)
        for w in range(self.slices):
            part = tirx.reinterpret("float32", simt.at(self.partial, (inside + w * ROWS) * WORD + self.lane))
            value = part if value is None else simt.call("bnn_add", value, part, dtype="float32")
            value = named("sum", value)
        result, allocate = simt.registers("result", 1, "float32")
        body += [allocate, simt.put(result, 0, value), self._again(result, row)]
        pixel = tail.Pixel(simt.wide(row), exists=row < self.total)
        return [*body, *self.emitter.emit([tail.Value(simt.at(result, 0), self.lane)], pixel, self.word, tail.Ballot(self.lane))]

    def _again(self, result, row):
        """A sum that is not finite, computed once more as CUDA cores do."""
        channel = self.word * WORD + self.lane

        def step(feature):
            value = simt.at(self.source, simt.wide(row) * self.features + simt.wide(feature))
            weight = simt.at(self.weights, simt.wide(feature) * self.channels + simt.wide(channel))
            return simt.put(result, 0, simt.call("bnn_fma", value, weight, simt.at(result, 0), dtype="float32"))

        walk = [simt.put(result, 0, tir.constant(0.0, "float32")), simt.loop("feature", self.features, step, rolled=True)]
        finite = simt.call("bnn_all_finite1", simt.pointer(result, 0), dtype="bool")
        return tirx.IfThenElse(tirx.And(row < self.total, tirx.Not(finite)), tir.seq(walk), None)

