"""Depthwise float32 convolution, NHWC, on a GPU: :class:`bnntvm.spec.FloatConv2d` with one input channel per group. See :mod:`.cells`."""

from __future__ import annotations

import numpy as np
from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import cells, functions, simt
from bnntvm.schedules.cuda import epilogue as tail
from bnntvm.schedules.cuda.cells import Schedule
from bnntvm.schedules.float_conv2d import reference

__all__ = ["Schedule", "build", "default_schedule", "pack_weights", "reference", "space"]

assert functions.SIDE  # bnn_fma is defined there


def default_schedule(spec, isa):
    """One cell."""
    return Schedule(1)


def space(spec, isa):
    """Counts of cells."""
    return [Schedule(1), Schedule(2), Schedule(4)]


def pack_weights(spec, schedule, isa, weights):
    """Weights with channels last: float32 ``[kh, kw, O]`` from ``[O, kh, kw, 1]``."""
    return np.ascontiguousarray(weights[..., 0].transpose(1, 2, 0))


def build(spec, schedule, isa):
    """The kernel: data ``float32[N, H, W, I]``, packed weights, the epilogue's inputs and outputs. N is dynamic."""
    weights = tir.buffer("w", (*spec.window.kernel, spec.out_channels), "float32")
    array, declared = simt.flat(weights)

    def weight(cell, tap):
        return [], cells.guarded(cell.exists, array, tap * spec.out_channels + cell.channel)

    return depthwise("depthwise_conv2d", spec, schedule, [weights], [declared], weight)


def depthwise(name, spec, schedule, operands, declarations, weight):
    """A depthwise convolution whose weights ``weight(cell, tap)`` finds: ``(statements, value)``."""
    window, batch = spec.window, tirx.Var("n", "int64")
    dims, multiplier = (batch, window.out_height, window.out_width), spec.out_channels // spec.in_channels
    data = tir.buffer("x", (batch, window.in_height, window.in_width, spec.in_channels), "float32")
    source, declared = simt.flat(data)
    emitter = tail.Emitter(spec.epilogue, spec.out_channels, dims, "float32")
    emitter.declarations[:0] = [declared, *declarations]

    def value(cell):
        statements, loads = [], []
        channel = simt.div(cell.channel, multiplier)
        for tap in range(window.kernel[0] * window.kernel[1]):
            r, s = divmod(tap, window.kernel[1])
            y = cell.y * window.strides[0] + (r * window.dilations[0] - window.pads[0])
            x = cell.x * window.strides[1] + (s * window.dilations[1] - window.pads[1])
            exists = tirx.And(cell.exists, cells.within(y, window.in_height, x, window.in_width))
            row = (cell.image * window.in_height + y) * window.in_width + x
            load, named = simt.bind("tap", cells.guarded(exists, source, simt.wide(row) * spec.in_channels + simt.wide(channel)))
            made, factor = weight(cell, tap)
            factor, named_factor = simt.bind("factor", factor)
            statements += [named, *made, named_factor]
            loads.append((load, factor))
        total = tir.constant(0.0, "float32")
        for load, factor in loads:
            total, named = simt.bind("sum", simt.call("bnn_fma", load, factor, total, dtype="float32"))
            statements.append(named)
        return statements, total

    return cells.build(name, [data, *operands], emitter, dims, value, schedule.cells)
