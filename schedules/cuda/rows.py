"""Dense layers on a GPU: what the float and the packed-weight families have in common.

A block computes a few rows by one word of 32 output channels, a lane a channel; its warps share the features, and what they found is added
up in shared memory. So a single row, the batch of one, keeps many threads busy, and weights are read in whole lines.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import epilogue as tail
from bnntvm.schedules.cuda import simt

WORD = 32


@dataclass(frozen=True)
class Schedule:
    """What may be tuned.

    Attributes
    ----------
    rows : int
        Rows of a block.
    warps : int
        Warps of a block.
    """

    rows: int
    warps: int


def default_schedule(spec, isa):
    """Eight rows and warps."""
    return Schedule(8, 8)


def space(spec, isa):
    """Rows and warps."""
    return [Schedule(8, 8), Schedule(4, 8), Schedule(16, 8), Schedule(8, 16), Schedule(8, 4)]


def build(name, spec, schedule, operands, declarations, weight, dtype="float32", read=None):
    """A dense kernel: data ``float32[M, K]``, ``operands``, the epilogue's inputs and outputs. M is dynamic.

    Parameters
    ----------
    weight : callable
        ``weight(feature, channel)``: ``(statements, value)`` of type ``dtype``; the channel may be one past the last of its word.
    dtype : str
        Of the sums: float32 (products contract with additions), or int32.
    read : callable, optional
        What becomes of a value of the data.
    """
    return function(name, spec, schedule, Operands(spec, operands, declarations, dtype), weight, dtype, read)


class Operands:
    """What kernels of one layer share: buffers, and how they are named in a kernel.

    Attributes
    ----------
    rows : int64 expression
    params : list of Buffer
    source : Buffer
        The data as one run.
    arrays : list of Buffer
        The other operands as such, if they were declared here.
    """

    def __init__(self, spec, operands, declarations, dtype="float32", arrays=()):
        self.rows, self.arrays = tirx.Var("m", "int64"), list(arrays)
        data = tir.buffer("x", (self.rows, spec.in_features), "float32")
        self.source, declared = simt.flat(data)
        self.emitter = tail.Emitter(spec.epilogue, spec.out_features, (self.rows,), dtype)
        self.emitter.declarations[:0] = [declared, *declarations]
        self.params = [data, *operands, *self.emitter.inputs, *self.emitter.outputs]


def function(name, spec, schedule, operands, weight, dtype="float32", read=None):
    """A kernel of :class:`Operands`; see :func:`build`."""
    writer = _Writer(spec, schedule, operands.emitter, operands.rows, operands.source, weight, dtype, read or (lambda value: value))
    blocks = simt.i32(simt.ceil_div(simt.wide(operands.rows), schedule.rows) * operands.emitter.words)
    return simt.kernel(name, operands.params, blocks, 32 * schedule.warps, writer.body)


class _Writer:
    def __init__(self, spec, schedule, emitter, rows, source, weight, dtype, read):
        self.features, self.schedule, self.emitter, self.rows = spec.in_features, schedule, emitter, rows
        self.source, self.weight, self.dtype, self.read = source, weight, dtype, read

    def body(self, block, thread):
        named, count, warps = [], self.schedule.rows, self.schedule.warps

        def bind(name, value):
            variable, statement = simt.bind(name, value)
            named.append(statement)
            return variable

        lane, warp = bind("lane", tirx.bitwise_and(thread, simt.i32(31))), bind("warp", simt.div(thread, 32))
        total = bind("rows", simt.i32(self.rows))
        word, first = bind("word", simt.mod(block, self.emitter.words)), bind("first", simt.div(block, self.emitter.words) * count)
        channel = bind("channel", word * WORD + lane)
        partial, allocate = simt.shared(count * warps * WORD)
        sums, allocate_sums = simt.registers("sums", count, self.dtype)
        clear = [simt.put(sums, i, tir.constant(0, self.dtype)) for i in range(count)]

        def step(i):
            feature, named_feature = simt.bind("feature", i * warps + warp)
            statements, factor = self.weight(feature, channel)
            factor, named_factor = simt.bind("factor", factor)
            adds = [self._add(sums, r, feature, factor, first + r, total) for r in range(count)]
            inside = [*statements, named_factor, *adds]
            if self.features % warps:
                inside = [tirx.IfThenElse(feature < self.features, tir.seq(inside), None)]
            return [named_feature, *inside]

        walk = simt.loop("step", -(-self.features // warps), step)
        store = [simt.put(partial, (warp * count + r) * WORD + lane, tirx.reinterpret("uint32", simt.at(sums, r))) for r in range(count)]
        finish = [self._finish(r, partial, first, total, word, warp, lane) for r in range(count)]
        return [allocate, allocate_sums, *self.emitter.declarations, *named, *clear, walk, *store, simt.sync(), *finish]

    def _add(self, sums, r, feature, factor, row, total):
        place = simt.wide(row) * self.features + simt.wide(feature)
        value = self.read(tirx.if_then_else(row < total, simt.at(self.source, place), tir.constant(0.0, "float32")))
        if self.dtype == "float32":
            return simt.put(sums, r, simt.call("bnn_fma", value, factor, simt.at(sums, r), dtype="float32"))
        return simt.put(sums, r, simt.at(sums, r) + value * factor)

    def _finish(self, r, partial, first, total, word, warp, lane):
        """Row ``r`` of the block, by one of its warps."""
        body, value = [], None
        for w in range(self.schedule.warps):
            part = tirx.reinterpret(self.dtype, simt.at(partial, (w * self.schedule.rows + r) * WORD + lane))
            if value is not None:
                part = simt.call("bnn_add", value, part, dtype="float32") if self.dtype == "float32" else value + part
            value, named = simt.bind("sum", part)
            body.append(named)
        row, named = simt.bind("row", first + r)
        pixel = tail.Pixel(simt.wide(row), exists=row < total)
        body += [named, *self.emitter.emit([tail.Value(value, lane)], pixel, word, tail.Ballot(lane))]
        return tirx.IfThenElse(tirx.EQ(warp, simt.i32(r % self.schedule.warps)), tir.seq(body), None)
