"""Packing of images in channel order (:class:`bnntvm.spec.PlanarPack`): a network's NCHW input goes to NHWC bits without a transpose.

Vectors run along the pixels of one channel plane. A lane collects the word of its pixel: for channel c, bit c is set in the lanes whose
comparison holds, one masked "or" for as many values as a vector has lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from bnntvm import spec as specs
from bnntvm.schedules import epilogue as tail
from bnntvm.schedules import tir
from bnntvm.schedules.finite import Watch

#: Fields of a schedule that cut the work into parallel tasks.
GRAIN = ("blocks",)


@dataclass(frozen=True)
class Schedule:
    """What may be tuned.

    Attributes
    ----------
    unroll : int
        Channels of a word that are written out; the rest is a loop. Divides 32.
    vectors : int
        Vectors of pixels that share the loop over channels.
    blocks : int
        Blocks of pixels that a thread takes at a time.
    """

    unroll: int
    vectors: int
    blocks: int


def default_schedule(spec, isa):
    """Whole planes where the registers suffice, so that the image is read from end to end; else two vectors, so that two chains of masked
    operations overlap."""
    whole = _vectors(spec, isa)
    if isa.registers == 32 and 2 < whole * len(spec.epilogue.outputs) <= 14:
        return Schedule(2, whole, 8)
    return Schedule(8, min(whole, 2), 8)


def space(spec, isa):
    """Valid schedules."""
    whole = _vectors(spec, isa)
    return [Schedule(u, v, b) for u in (2, 4, 8, 16, 32) for v in sorted({1, 2, 4, min(whole, 14)}) for b in (2, 8, 32) if v <= whole]


def _vectors(spec, isa):
    """Vectors that cover a plane."""
    return -(-spec.spatial[0] * spec.spatial[1] // isa.lanes)


def reference(spec, operands, epilogue_inputs):
    """The epilogue of the transposed data; ``operands`` is ``[data]``."""
    return tail.reference(spec.epilogue, operands[0].transpose(0, 2, 3, 1), epilogue_inputs)


def build(spec, schedule, isa, finite=False):
    """The kernel: data ``float32[N, C, H, W]``, the epilogue's inputs, ``uint32[N, H, W, words(C)]`` outputs; N is dynamic.

    ``finite``: NaN and infinity in the data are an error, see :class:`.finite.Watch`.
    """
    return _Kernel(spec, schedule, isa, finite).function()


class _Kernel:
    def __init__(self, spec, schedule, isa, finite):
        self.spec, self.schedule, self.lanes = spec, schedule, isa.lanes
        self.watch = Watch(self.lanes, finite)
        self.batch, (height, width) = tirx.Var("n", "int64"), spec.spatial
        self.pixels, self.words = height * width, specs.words(spec.channels)
        self.data = tir.buffer("x", (self.batch, spec.channels, height, width), "float32")
        self.emitter = tail.Emitter(spec.epilogue, spec.channels, isa, (self.batch, height, width), "float32", True)

    def function(self):
        size = self.schedule.vectors * self.lanes
        aligned = self._aligns()
        blocks = -(-(self.pixels + aligned * (self.lanes - 1)) // size)
        tasks = -(-blocks // self.schedule.blocks)

        def task(number):
            return self.watch.task(lambda: blocks_of(number))

        def blocks_of(number):
            image, part = tirx.floordiv(number, tir.i64(tasks)), tirx.floormod(number, tir.i64(tasks))
            first = part * self.schedule.blocks
            count = tirx.min(tir.i64(self.schedule.blocks), blocks - first)
            if not aligned:
                return tir.for_("block", count, lambda b: self._block(image, (first + b) * size))
            shift, named = tir.bind("shift", tir.misaligned_by(self.data, self.lanes))
            return [named, tir.for_("block", count, lambda b: self._block(image, tirx.max(tir.i64(0), (first + b) * size - shift)))]

        params = [self.data, *self.emitter.inputs, *self.emitter.outputs]
        return tir.function("planar_pack", params, self.watch.kernel(tir.parallel("task", self.batch * tasks, task)))

    def _aligns(self):
        """Whether blocks are shifted to begin where cache lines do: a load across two takes twice as long. Planes are whole lines."""
        return self.pixels % self.lanes == 0 and self.pixels >= 8 * self.schedule.vectors * self.lanes

    def _block(self, image, begin):
        """All words of ``vectors * lanes`` pixels from ``begin`` on; what goes past the end of an image starts earlier instead."""
        size = self.schedule.vectors * self.lanes
        if self.pixels < self.lanes:
            keep = tir.prefix_mask(self.pixels, self.lanes)
            return [self._word(image, tir.i64(0), w, 1, keep) for w in range(self.words)]
        first, named = tir.bind("pixel", tirx.min(begin, tir.i64(max(0, self.pixels - size))))
        whole, rest = divmod(self.spec.channels, specs.WORD_BITS)
        body = [named]
        if whole:
            body.append(tir.for_("word", whole, lambda w: self._word(image, first, w, self.schedule.vectors, None)))
        if rest:
            body.append(self._word(image, first, whole, self.schedule.vectors, None, rest))
        return body

    def _word(self, image, first, word, vectors, keep, rest=None):
        outputs = self.spec.epilogue.outputs
        if keep is not None and (word + 1) * specs.WORD_BITS > self.spec.channels:
            rest = self.spec.channels - word * specs.WORD_BITS
        channels = specs.WORD_BITS if rest is None else rest
        bits = tir.Registers("bits", vectors * len(outputs), "uint32", self.lanes)
        unroll = self.schedule.unroll if channels % self.schedule.unroll == 0 else channels if channels < 8 else 1
        zero = tir.splat(0, "uint32", self.lanes)

        def step(c):
            return [self._channel(image, first, word, c, v, bits, keep) for v in range(vectors)]

        loop = tir.for_("c", channels // unroll, lambda c: [step(c * unroll + i) for i in range(unroll)])
        stores = [self._store(o, image, first, word, v, bits, keep) for v in range(vectors) for o in range(len(outputs))]
        return [bits.allocate, bits.fill(zero), loop, stores]

    def _offset(self, v):
        """Pixels from the first of a block to vector ``v``: the last vector of a block that takes a whole plane begins earlier."""
        return min(v * self.lanes, max(0, self.pixels - self.lanes))

    def _channel(self, image, first, word, c, v, bits, keep):
        """Set bit ``c`` of the lanes of vector ``v`` in which an output's condition holds."""
        channel = word * specs.WORD_BITS + c
        where = [image, channel, 0, first + self._offset(v)]
        x = tir.load_vector(self.data, where, self.lanes) if keep is None else tir.load_masked(self.data, where, keep)
        x, named = tir.bind("x", x)
        values, body = {0: x}, [named, *self.watch.see(x)]
        inputs = self.spec.epilogue.inputs
        for i, one in enumerate(inputs):
            if one.kind == "channel":
                values[1 + i] = tir.broadcast(tir.load(self.emitter.inputs[i], channel), self.lanes)

        def bind(name, value):
            variable, statement = tir.bind(name, value)
            body.append(statement)
            return variable

        for i, one in enumerate(self.spec.epilogue.steps):
            # Named: TVM would otherwise look for repeated parts itself, and cannot name vectors of bool.
            operands = tail._operands(one, values, self.lanes)
            values[1 + len(inputs) + i] = bind("step", tail._apply(one, operands, bind, self.emitter.exact(i)))
        bit = tir.broadcast(tirx.shift_left(tirx.const(1, "uint32"), tirx.Cast("uint32", tir.i64(c))), self.lanes)
        zero = tir.splat(0, "uint32", self.lanes)
        for o, output in enumerate(self.spec.epilogue.outputs):
            number = v * len(self.spec.epilogue.outputs) + o
            body.append(bits.set(number, tirx.bitwise_or(bits.get(number), tirx.Select(values[output.value], bit, zero))))
        return body

    def _store(self, o, image, first, word, v, bits, keep):
        """Store the words that vector ``v`` has collected for output ``o``: one of each pixel's ``words``."""
        output, array = self.spec.epilogue.outputs[o], self.emitter.outputs[o]
        value = bits.get(v * len(self.spec.epilogue.outputs) + o)
        if output.flip is not None:
            flip = tir.load(self.emitter.inputs[output.flip - 1], word)
            value = tirx.bitwise_xor(value, tir.broadcast(flip, self.lanes))
        pixel = first + self._offset(v)
        if self.words == 1:
            where = [image, 0, pixel, 0]
            return tir.store_vector(array, where, value) if keep is None else tir.store_masked(array, where, value, keep)
        spill, allocate = tir.local("word", self.lanes, "uint32")
        count = self.lanes if keep is None else self.pixels
        scattered = [tir.store(array, tir.load(spill, i), image, 0, pixel + i, word) for i in range(count)]
        return [allocate, tir.store_vector(spill, [0], value), scattered]
