"""Padding of packed images (:class:`bnntvm.spec.BitPad`) on a GPU: a thread for each word of the result."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.bit_pad import reference
from bnntvm.schedules.cuda import simt

__all__ = ["Schedule", "build", "default_schedule", "reference", "space"]


@dataclass(frozen=True)
class Schedule:
    """``threads``: threads of a block."""

    threads: int


def default_schedule(spec, isa):
    """256 threads."""
    return Schedule(256)


def space(spec, isa):
    """Sizes of blocks."""
    return [Schedule(threads) for threads in (256, 128)]


def build(spec, schedule, isa):
    """The kernel: data ``uint32[N, H, W, words]``, output ``uint32[N, top + H + bottom, left + W + right, words]``; N is dynamic."""
    (height, width), (top, left, bottom, right) = spec.spatial, spec.pads
    rows, columns, batch = height + top + bottom, width + left + right, tirx.Var("n", "int64")
    data = tir.buffer("x", (batch, height, width, spec.words), "uint32")
    out = tir.buffer("y", (batch, rows, columns, spec.words), "uint32")
    total = simt.i32(batch) * (rows * columns * spec.words)
    (x, declare_x), (y, declare_y) = simt.flat(data), simt.flat(out)

    def body(block, thread):
        number, named = simt.bind("number", block * schedule.threads + thread)
        pixel, word = simt.div(number, spec.words), simt.mod(number, spec.words)
        line, column = simt.div(pixel, columns), simt.mod(pixel, columns) - left
        image, line = simt.div(line, rows), simt.mod(line, rows) - top
        inside = tirx.And(tirx.And(line >= simt.i32(0), line < simt.i32(height)),
                          tirx.And(column >= simt.i32(0), column < simt.i32(width)))  # fmt: skip
        where = simt.wide((image * height + line) * width + column) * spec.words + simt.wide(word)
        value = tirx.if_then_else(inside, simt.at(x, where), simt.u32(spec.value))
        store = simt.put(y, simt.wide(number), value)
        return [declare_x, declare_y, named, tirx.IfThenElse(number < total, store, None)]

    return simt.kernel("bit_pad", [data, out], simt.ceil_div(total, schedule.threads), schedule.threads, body)
