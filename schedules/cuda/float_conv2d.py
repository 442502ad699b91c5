"""float32 convolution on a GPU, NHWC or planar data: :class:`bnntvm.spec.FloatConv2d` except its depthwise case.

Tiles in shared memory: on tensor cores, three products of tf32 for one of float32 (:mod:`.tf32`), where those are faster, else on CUDA
cores (:mod:`.patches`), where products contract with additions (one rounding), in the reduction only. Grouped convolutions, and windows too
large for shared memory, are computed one output after the other (:mod:`.cells`).
"""

from __future__ import annotations

import numpy as np
from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import cells, patches, simt, tf32, tf32_groups
from bnntvm.schedules.cuda import epilogue as tail
from bnntvm.schedules.float_conv2d import reference

__all__ = ["build", "default_schedule", "pack_weights", "reference", "space"]


def problem_of(spec):
    """The convolution as :mod:`.patches` sees it."""
    return patches.Problem(spec.window, spec.in_channels, spec.out_channels, not spec.planar)


def default_schedule(spec, isa):
    """A schedule that is fast without tuning."""
    return space(spec, isa)[0]


def space(spec, isa):
    """Valid schedules, the default one first."""
    if spec.groups > 1:
        return on_cores(spec)
    problem = problem_of(spec)
    found = tf32.schedules(problem, isa)
    return [*found, *on_cores(spec)] if tf32.pays(problem, isa) else [*on_cores(spec), *found]


def on_cores(spec):
    """Schedules for CUDA cores, a good one first."""
    found = patches.schedules(problem_of(spec)) if spec.groups == 1 else []
    return [*found, cells.Schedule(1), cells.Schedule(2)]


def pack_weights(spec, schedule, isa, weights):
    """Weights in the order in which the kernel reads them.

    Parameters
    ----------
    weights : ndarray
        float32 ``[O, kh, kw, I / groups]``.

    Returns
    -------
    ndarray
        float32 ``[kh * kw, I', O']``, padded with zeros to whole chunks and blocks; for tensor cores see :func:`.tf32.pack_weights`.
    """
    if isinstance(schedule, tf32.Schedule):
        return tf32.pack_weights(problem_of(spec), schedule, weights.reshape(weights.shape[0], -1, weights.shape[3]))
    taps = weights.reshape(weights.shape[0], -1, weights.shape[3]).transpose(1, 2, 0)
    units, channels = sizes(spec, schedule)
    packed = np.zeros((taps.shape[0], units, channels), weights.dtype)
    packed[:, : taps.shape[1], : taps.shape[2]] = taps
    return packed


def sizes(spec, schedule):
    """Input channels (of a group) and output channels of the weights' array."""
    if isinstance(schedule, cells.Schedule):
        return spec.in_channels // spec.groups, spec.out_channels
    return patches.padded(problem_of(spec), schedule)


def build(spec, schedule, isa):
    """The kernel: data ``float32[N, H, W, I]`` (``[N, I, H, W]`` if planar), packed weights, the epilogue's inputs and outputs."""
    if isinstance(schedule, tf32.Schedule):
        return _on_tensor_cores(spec, schedule, isa)
    shape = (spec.window.kernel[0] * spec.window.kernel[1], *sizes(spec, schedule))
    weights = tir.buffer("w", shape, "float32")
    array, declared = simt.flat(weights)

    def weight(tap, unit, channel):
        return [], tirx.reinterpret("uint32", simt.at(array, (tap * shape[1] + unit) * shape[2] + channel))

    return convolution("float_conv2d", spec, schedule, [weights], [declared], weight)


def convolution(name, spec, schedule, operands, declarations, weight):
    """A convolution of float data.

    Parameters
    ----------
    operands : list of Buffer
        What ``weight`` reads.
    declarations : list of statements
    weight : callable
        ``weight(tap, unit, channel)``: ``(statements, bits of the float)``; for groups the unit counts within the group.
    """
    batch = tirx.Var("n", "int64")
    data, place, dims = _data(spec, batch)
    source, declared = simt.flat(data)
    emitter = tail.Emitter(spec.epilogue, spec.out_channels, dims, "float32")
    emitter.declarations[:0] = [declared, *declarations]

    def unit(n, y, x, channel, exists):
        return [], tirx.reinterpret("uint32", cells.guarded(exists, source, place(n, y, x, channel)))

    if isinstance(schedule, cells.Schedule):
        value = _one_by_one(spec, source, place, weight)
        return cells.build(name, [data, *operands], emitter, dims, value, schedule.cells)
    return patches.Kernel(name, problem_of(spec), schedule, emitter, [data, *operands], batch, unit, weight).function()


def _data(spec, batch):
    """``(buffer, place, dims)``: the data, where ``place(image, y, x, channel)`` of them lies, and the result's dimensions but channels."""
    window, channels = spec.window, spec.in_channels
    image = (window.in_height, window.in_width)
    data = tir.buffer("x", (batch, channels, *image) if spec.planar else (batch, *image, channels), "float32")

    def place(n, y, x, channel):
        if spec.planar:
            return (simt.wide(n * channels + channel) * window.in_height + simt.wide(y)) * window.in_width + simt.wide(x)
        return simt.wide((n * window.in_height + y) * window.in_width + x) * channels + simt.wide(channel)

    return data, place, (batch, window.out_height, window.out_width)


def _on_tensor_cores(spec, schedule, isa):
    problem, batch = problem_of(spec), tirx.Var("n", "int64")
    data, place, dims = _data(spec, batch)
    weights = tir.buffer("w", (tf32.Layout(problem, schedule).weight_words,), "uint32")
    emitter = tail.Emitter(spec.epilogue, spec.out_channels, dims, "float32")
    kernel = tf32_groups.GroupKernel if schedule.grouped else tf32.Kernel
    return kernel("float_conv2d", problem, schedule, emitter, data, weights, batch, place, isa).function()


def _one_by_one(spec, source, place, weight):
    """The value of a cell: a loop over taps and the input channels of its group."""
    window, per_in, per_out = spec.window, spec.in_channels // spec.groups, spec.out_channels // spec.groups

    def value(cell):
        total, allocate = simt.registers(f"total_{cell.row.name}", 1, "float32")
        group = simt.div(cell.channel, per_out)

        def step(r, s, c):
            y = cell.y * window.strides[0] - window.pads[0] + r * window.dilations[0]
            x = cell.x * window.strides[1] - window.pads[1] + s * window.dilations[1]
            inside = cells.within(y, window.in_height, x, window.in_width)
            load = simt.at(source, place(cell.image, y, x, group * per_in + c))
            statements, factor = weight(r * window.kernel[1] + s, c, cell.channel)
            product = simt.call("bnn_fma", load, tirx.reinterpret("float32", factor), simt.at(total, 0), dtype="float32")
            return tirx.IfThenElse(tirx.And(cell.exists, inside), tir.seq([*statements, simt.put(total, 0, product)]), None)

        rows, columns = window.kernel
        walk = simt.loop("r", rows, lambda r: simt.loop("s", columns, lambda s: simt.loop("c", per_in, lambda c: step(r, s, c))))
        return [allocate, simt.put(total, 0, tir.constant(0.0, "float32")), walk], simt.at(total, 0)

    return value
