"""float32 pooling, NHWC, on a GPU: :class:`bnntvm.spec.Pool2d`. See :mod:`.cells`.

Averages are sums divided by the number of values (or multiplied by its reciprocal, where that is exact).
"""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import cells, simt
from bnntvm.schedules.cuda import epilogue as tail
from bnntvm.schedules.cuda.cells import Schedule
from bnntvm.schedules.pool2d import reference

__all__ = ["Schedule", "build", "default_schedule", "reference", "space"]


def default_schedule(spec, isa):
    """One cell: a window's values are under way together."""
    return Schedule(1)


def space(spec, isa):
    """Counts of cells."""
    return [Schedule(1), Schedule(2), Schedule(4)]


def build(spec, schedule, isa):
    """The kernel: data ``float32[N, H, W, C]``, the epilogue's inputs and outputs. N is dynamic."""
    window, batch = spec.window, tirx.Var("n", "int64")
    dims = (batch, window.out_height, window.out_width)
    data = tir.buffer("x", (batch, window.in_height, window.in_width, spec.channels), "float32")
    source, declared = simt.flat(data)
    emitter = tail.Emitter(spec.epilogue, spec.channels, dims, "float32")
    emitter.declarations.insert(0, declared)

    def value(cell):
        if spec.op == "max":
            found = [load for _, load in taps(window, cell, source, spec.channels, float("-inf"))]
            return _fold(lambda a, b: simt.call("bnn_max", a, b, dtype="float32"), found)
        pairs = list(taps(window, cell, source, spec.channels, 0.0))
        statements, total = _fold(lambda a, b: simt.call("bnn_add", a, b, dtype="float32"), [load for _, load in pairs])
        count = tir.constant(len(pairs), "float32")
        if spec.op == "avg" and any(window.pads):
            count = tir.constant(0, "int32")
            for inside, _ in pairs:
                count = count + tirx.Cast("int32", inside)
            count = tirx.Cast("float32", count)
        return statements, divide(total, count, len(pairs) if not (spec.op == "avg" and any(window.pads)) else None)

    return cells.build("pool2d", [data], emitter, dims, value, schedule.cells)


def taps(window, cell, source, channels, outside):
    """``(whether it lies in the image, its value)`` of every tap of the cell's window."""
    for r in range(window.kernel[0]):
        for s in range(window.kernel[1]):
            y = cell.y * window.strides[0] + (r * window.dilations[0] - window.pads[0])
            x = cell.x * window.strides[1] + (s * window.dilations[1] - window.pads[1])
            inside = cells.within(y, window.in_height, x, window.in_width)
            exists = tirx.And(cell.exists, inside)
            row = (cell.image * window.in_height + y) * window.in_width + x
            yield inside, cells.guarded(exists, source, simt.wide(row) * channels + simt.wide(cell.channel), outside)


def _fold(combine, values):
    """``(statements, value)``: all loads first, then combined one after the other."""
    named = [simt.bind("tap", value) for value in values]
    statements, total = [statement for _, statement in named], named[0][0]
    for variable, _ in named[1:]:
        total, statement = simt.bind("sum", combine(total, variable))
        statements.append(statement)
    return statements, total


def divide(total, count, exact):
    """``total / count``, rounded once; ``exact`` is the count as a Python int, where it is one."""
    if exact and exact & (exact - 1) == 0:
        return simt.call("bnn_mul", total, tir.constant(1.0 / exact, "float32"), dtype="float32")
    return simt.call("bnn_div", total, count, dtype="float32")
