"""Global pooling and softmax on a GPU: in :class:`bnntvm.spec.GlobalPool` a lane takes a channel, in :class:`bnntvm.spec.Softmax` a warp
takes a row."""

from __future__ import annotations

from tvm import tirx

from bnntvm import spec as specs
from bnntvm.schedules import tir
from bnntvm.schedules.cuda import cells, simt, warps
from bnntvm.schedules.cuda import epilogue as tail
from bnntvm.schedules.cuda.cells import Schedule
from bnntvm.schedules.cuda.pool2d import divide
from bnntvm.schedules.reduce import reference

__all__ = ["Schedule", "build", "default_schedule", "reference", "space"]


def default_schedule(spec, isa):
    """One cell of a warp."""
    return Schedule(1)


def space(spec, isa):
    """The only one."""
    return [Schedule(1)]


def build(spec, schedule, isa):
    """The kernel: data ``float32[N, H, W, C]`` or ``float32[M, classes]``, the epilogue's inputs and outputs. N or M is dynamic."""
    return (_softmax if isinstance(spec, specs.Softmax) else _global_pool)(spec, schedule)


def _call(name, *args):
    return simt.call(name, *args, dtype="float32")


def _global_pool(spec, schedule):
    batch, pixels, channels = tirx.Var("n", "int64"), spec.spatial[0] * spec.spatial[1], spec.channels
    data = tir.buffer("x", (batch, *spec.spatial, channels), "float32")
    source, declared = simt.flat(data)
    dims = (batch, 1, 1)
    emitter = tail.Emitter(spec.epilogue, channels, dims, "float32")
    emitter.declarations.insert(0, declared)
    name, start = ("bnn_max", float("-inf")) if spec.op == "max" else ("bnn_add", 0.0)

    def value(cell):
        total, allocate = simt.registers(f"total_{cell.row.name}", 1, "float32")

        def step(pixel):
            place = (simt.wide(cell.row) * pixels + simt.wide(pixel)) * channels + simt.wide(cell.channel)
            return simt.put(total, 0, _call(name, simt.at(total, 0), cells.guarded(cell.exists, source, place)))

        body = [allocate, simt.put(total, 0, tir.constant(start, "float32")), simt.loop("pixel", pixels, step)]
        result = simt.at(total, 0)
        return body, result if spec.op == "max" else divide(result, tir.constant(pixels, "float32"), pixels)

    return cells.build("global_pool", [data], emitter, dims, value, schedule.cells)


def _softmax(spec, schedule):
    """The maximum; the sum of exp(x - maximum); exp(x - maximum) / sum, computed once more instead of kept."""
    rows, classes = tirx.Var("m", "int64"), spec.classes
    data = tir.buffer("x", (rows, classes), "float32")
    read, declared = simt.flat(data)
    emitter = tail.Emitter(spec.epilogue, classes, (rows,), "float32")

    def body(row, exists, lane):
        state, allocate = simt.registers("state", 2, "float32")

        def value(channel):
            there = tirx.And(exists, channel < classes)
            return cells.guarded(there, read, simt.wide(row) * classes + simt.wide(channel), float("-inf"))

        def maximum(channel):
            return simt.put(state, 0, _call("bnn_max", simt.at(state, 0), value(channel)))

        clear = [simt.put(state, 0, tir.constant(float("-inf"), "float32")), simt.put(state, 1, warps.zero())]
        of_lane, named = simt.bind("of_lane", simt.at(state, 0))
        joins, highest = warps.reduce(lambda a, b: _call("bnn_max", a, b), of_lane)

        def exponential(channel):
            return _call("bnn_exp", _call("bnn_sub", value(channel), highest))

        def add(channel):
            power = tirx.if_then_else(tirx.And(exists, channel < classes), exponential(channel), warps.zero())
            return simt.put(state, 1, _call("bnn_add", simt.at(state, 1), power))

        sum_of_lane, named_sum = simt.bind("sum_of_lane", simt.at(state, 1))
        adds, total = warps.reduce(lambda a, b: _call("bnn_add", a, b), sum_of_lane)
        scale, named_scale = simt.bind("scale", _call("bnn_div", tir.constant(1.0, "float32"), total))

        def finish(word):
            result, bound = simt.bind("result", _call("bnn_mul", exponential(word * 32 + lane), scale))
            pixel = tail.Pixel(simt.wide(row), exists=exists)
            return [bound, *emitter.emit([tail.Value(result, lane)], pixel, word, tail.Ballot(lane))]

        first = [allocate, *clear, warps.along(classes, lane, maximum), named, *joins]
        second = [warps.along(classes, lane, add), named_sum, *adds, named_scale]
        return [*first, *second, simt.loop("word", emitter.words, finish)]

    params = [data, *emitter.inputs, *emitter.outputs]
    return warps.build("softmax", params, rows, [declared, *emitter.declarations], body)
