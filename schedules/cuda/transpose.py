"""Exchange of two axes on a GPU (:class:`bnntvm.spec.Transpose`): squares of 32 x 32 through shared memory."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import simt
from bnntvm.schedules.transpose import reference

__all__ = ["Schedule", "build", "default_schedule", "reference", "space"]

SIDE, _WARPS = 32, 8


@dataclass(frozen=True)
class Schedule:
    """Nothing to choose."""


def default_schedule(spec, isa):
    """The only one."""
    return Schedule()


def space(spec, isa):
    """The only one."""
    return [Schedule()]


def build(spec, schedule, isa):
    """The kernel: data float32 ``[N, *shapes[0]]``, output ``[N, *shapes[1]]``; N is dynamic.

    Lines of a square are an odd number of words apart in shared memory, so that columns lie in different banks, too.
    """
    rows, columns, batch = spec.rows, spec.columns, tirx.Var("n", "int64")
    data, output = tir.buffer("x", (batch, *spec.shapes[0]), "float32"), tir.buffer("y", (batch, *spec.shapes[1]), "float32")
    (read, declared), (written, declared_too) = simt.flat(data), simt.flat(output)
    down, across = -(-rows // SIDE), -(-columns // SIDE)

    def body(block, thread):
        square, allocate = simt.shared(SIDE * (SIDE + 1))
        lane, named_lane = simt.bind("lane", tirx.bitwise_and(thread, simt.i32(31)))
        warp, named_warp = simt.bind("warp", simt.div(thread, 32))
        image, named_image = simt.bind("image", simt.div(block, down * across))
        place, named_place = simt.bind("place", simt.mod(block, down * across))
        top, named_top = simt.bind("top", simt.div(place, across) * SIDE)
        left, named_left = simt.bind("left", simt.mod(place, across) * SIDE)
        base = simt.wide(image) * (rows * columns)
        brings, stores = [], []
        for i in range(SIDE // _WARPS):
            line = warp + i * _WARPS
            inside = tirx.And(top + line < rows, left + lane < columns)
            value = tirx.reinterpret("uint32", simt.at(read, base + simt.wide(top + line) * columns + simt.wide(left + lane)))
            brings.append(tirx.IfThenElse(inside, simt.put(square, line * (SIDE + 1) + lane, value), None))
            inside = tirx.And(left + line < columns, top + lane < rows)
            value = tirx.reinterpret("float32", simt.at(square, lane * (SIDE + 1) + line))
            put = simt.put(written, base + simt.wide(left + line) * rows + simt.wide(top + lane), value)
            stores.append(tirx.IfThenElse(inside, put, None))
        named = [named_lane, named_warp, named_image, named_place, named_top, named_left]
        return [allocate, declared, declared_too, *named, *brings, simt.sync(), *stores]

    return simt.kernel("transpose", [data, output], simt.i32(batch * (down * across)), 32 * _WARPS, body)
