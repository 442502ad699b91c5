"""Pooling of packed bits (:class:`bnntvm.spec.BitPool`) on a GPU: a thread for each word of the result.

Padded taps are left out, which is what the identity does. Neighbouring threads have neighbouring words, so their reads are one run.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from bnntvm import spec as specs
from bnntvm.schedules import tir
from bnntvm.schedules.bit_pool import reference
from bnntvm.schedules.cuda import simt

__all__ = ["Schedule", "build", "default_schedule", "reference", "space"]


@dataclass(frozen=True)
class Schedule:
    """``threads``: threads of a block."""

    threads: int


def default_schedule(spec, isa):
    """128 threads."""
    return Schedule(128)


def space(spec, isa):
    """Sizes of blocks."""
    return [Schedule(threads) for threads in (128, 64, 256)]


def build(spec, schedule, isa):
    """The kernel: data ``uint32[n, H, W, words(C)]``, output ``uint32[n, OH, OW, words(C)]``."""
    if spec.op not in ("and", "or"):
        raise ValueError(f"no bit pool {spec.op!r}")
    window, count, batch = spec.window, specs.words(spec.channels), tirx.Var("n", "int64")
    data = tir.buffer("data", (batch, window.in_height, window.in_width, count), "uint32")
    result = tir.buffer("result", (batch, window.out_height, window.out_width, count), "uint32")
    total = simt.i32(batch) * (window.out_height * window.out_width * count)
    (x, declare_x), (y, declare_y) = simt.flat(data), simt.flat(result)
    found, allocate = simt.registers("found", 1, "uint32")

    def body(block, thread):
        number, named = simt.bind("number", block * schedule.threads + thread)
        pixel, word = simt.div(number, count), simt.mod(number, count)
        row, column = simt.div(pixel, window.out_width), simt.mod(pixel, window.out_width)
        image, line = simt.div(row, window.out_height), simt.mod(row, window.out_height)
        values = [("image", image), ("word", word), ("top", line * window.strides[0] - window.pads[0])]
        values.append(("left", column * window.strides[1] - window.pads[1]))
        (image, word, top, left), statements = zip(*(simt.bind(*one) for one in values))

        def tap(r, s):
            i, j = top + r * window.dilations[0], left + s * window.dilations[1]
            inside = tirx.And(tirx.And(i >= simt.i32(0), i < simt.i32(window.in_height)),
                              tirx.And(j >= simt.i32(0), j < simt.i32(window.in_width)))  # fmt: skip
            where = (simt.wide((image * window.in_height + i) * window.in_width + j)) * count + simt.wide(word)
            one = simt.at(x, where)
            both = simt.at(found, 0) & one if spec.op == "and" else simt.at(found, 0) | one
            return tirx.IfThenElse(inside, simt.put(found, 0, both), None)

        loops = simt.loop("r", window.kernel[0], lambda r: simt.loop("s", window.kernel[1], lambda s: tap(r, s)))
        work = [*statements, simt.put(found, 0, _identity(spec, word)), loops, simt.put(y, simt.wide(number), simt.at(found, 0))]
        return [declare_x, declare_y, named, allocate, tirx.IfThenElse(number < total, tir.seq(work), None)]

    return simt.kernel("bit_pool", [data, result], simt.ceil_div(total, schedule.threads), schedule.threads, body)


def _identity(spec, word):
    """The identity in a word of a pixel: tail bits are 0 whatever the window holds."""
    if spec.op == "or":
        return simt.u32(0)
    left = spec.channels % specs.WORD_BITS
    if not left:
        return simt.u32(0xFFFFFFFF)
    last = tirx.EQ(word, simt.i32(specs.words(spec.channels) - 1))
    return tirx.Select(last, simt.u32((1 << left) - 1), simt.u32(0xFFFFFFFF))
