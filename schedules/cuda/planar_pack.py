"""Packing of images in channel order (:class:`bnntvm.spec.PlanarPack`) on a GPU: NCHW floats to NHWC bits.

A thread makes the words of one pixel and 32 channels; neighbouring threads have neighbouring pixels, so every channel's row is read as one
run. The words of a pixel are written by threads that are far apart, but they are a thirty-second of what is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from bnntvm import spec as specs
from bnntvm.schedules import epilogue as cpu
from bnntvm.schedules import tir
from bnntvm.schedules.cuda import simt
from bnntvm.schedules.cuda.epilogue import Emitter, apply
from bnntvm.schedules.planar_pack import reference

__all__ = ["Schedule", "build", "default_schedule", "reference", "space"]


@dataclass(frozen=True)
class Schedule:
    """``threads``: threads of a block. ``unroll``: channels of a word whose loads are written out, a divisor of 32."""

    threads: int
    unroll: int


def default_schedule(spec, isa):
    """Eight loads under way in every thread."""
    return Schedule(128, 8)


def space(spec, isa):
    """Sizes of blocks and of steps."""
    return [Schedule(threads, unroll) for threads in (128, 64, 256) for unroll in (8, 4, 16, 32)]


def build(spec, schedule, isa):
    """The kernel: data ``float32[N, C, H, W]``, the epilogue's inputs, ``uint32[N, H, W, words(C)]`` outputs; N is dynamic."""
    return _Kernel(spec, schedule).function()


class _Kernel:
    def __init__(self, spec, schedule):
        self.spec, self.schedule, self.batch = spec, schedule, tirx.Var("n", "int64")
        self.pixels, self.words = spec.spatial[0] * spec.spatial[1], specs.words(spec.channels)
        self.data = tir.buffer("x", (self.batch, spec.channels, *spec.spatial), "float32")
        self.emitter = Emitter(spec.epilogue, spec.channels, (self.batch, *spec.spatial), "float32")

    def function(self):
        threads = self.schedule.threads
        chunks = simt.ceil_div(simt.i32(self.batch) * self.pixels, threads) * self.words
        params = [self.data, *self.emitter.inputs, *self.emitter.outputs]
        return simt.kernel("planar_pack", params, chunks, threads, self._body)

    def _body(self, block, thread):
        x, declare = simt.flat(self.data)
        word, bind_word = simt.bind("word", simt.mod(block, self.words))
        row, bind_row = simt.bind("row", simt.div(block, self.words) * self.schedule.threads + thread)
        image, pixel = simt.div(row, self.pixels), simt.mod(row, self.pixels)
        base = (simt.wide(image) * self.spec.channels + simt.wide(word * 32)) * self.pixels + simt.wide(pixel)
        base, bind_base = simt.bind("base", base)
        count = len(self.spec.epilogue.outputs)
        bits, allocate = simt.registers("bits", count, "uint32")
        step = self.schedule.unroll
        body = [allocate, bind_base, *(simt.put(bits, o, simt.u32(0)) for o in range(count))]
        body.append(simt.loop("c", 32 // step, lambda c: [self._channel(x, base, word, c * step + i, bits) for i in range(step)]))
        body += [self._store(o, bits, row, word) for o in range(count)]
        exists = row < simt.i32(self.batch) * self.pixels
        return [declare, *self.emitter.declarations, bind_word, bind_row, tirx.IfThenElse(exists, tir.seq(body), None)]

    def _channel(self, x, base, word, c, bits):
        """Set bit ``c`` of the outputs whose condition holds."""
        channel, spec = word * 32 + c, self.spec
        value = simt.at(x, base + simt.wide(c) * self.pixels)
        if spec.channels % specs.WORD_BITS:
            value = tirx.if_then_else(channel < simt.i32(spec.channels), value, tir.constant(0.0, "float32"))
        value, statement = simt.bind("x", value)
        body, values = [statement], [value]
        for array, one in zip(self.emitter._inputs, spec.epilogue.inputs):
            values.append(simt.at(array, channel) if one.kind == "channel" else None)
        for step in spec.epilogue.steps:
            result, statement = simt.bind("s", apply(step, cpu._operands(step, values, 1)))
            values.append(result)
            body.append(statement)
        for o, output in enumerate(spec.epilogue.outputs):
            bit = tirx.shift_left(tirx.Cast("uint32", values[output.value]), simt.u32(c))
            body.append(simt.put(bits, o, simt.at(bits, o) | bit))
        return body

    def _store(self, o, bits, row, word):
        output, value = self.spec.epilogue.outputs[o], simt.at(bits, o)
        if output.flip is not None:
            value = value ^ simt.at(self.emitter._inputs[output.flip - 1], word)
        left = self.spec.channels % specs.WORD_BITS
        if left:
            value = tirx.Select(tirx.EQ(word, simt.i32(self.words - 1)), value & simt.u32((1 << left) - 1), value)
        return simt.put(self.emitter._outputs[o], simt.wide(row) * self.words + simt.wide(word), value)
