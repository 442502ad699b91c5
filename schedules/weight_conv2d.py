"""float32 convolution with packed weights, NHWC: the family of :class:`bnntvm.spec.WeightConv2d` except its depthwise case.

Each task decodes the weights of its block of output channels to float once, into memory of its own, and then is the convolution of
:mod:`.float_conv2d`: sums of products by +-1, 0 or levels. The weights stay packed in memory; what decoding costs is shared by all the
tiles of a task, which is why tasks are larger here.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tvm import tirx

from bnntvm import spec as specs
from bnntvm.bits import unpack_bits

from . import float_conv2d, packed_weights, tir
from .float_conv2d import GRAIN, Schedule

__all__ = ["GRAIN", "Schedule", "build", "default_schedule", "pack_weights", "reference", "space"]

#: Tiles that share a decoded block of weights, at least where the image has so many.
_TILES = 16


def default_schedule(spec, isa):
    """A schedule that is fast without tuning."""
    return space(spec, isa)[0]


def space(spec, isa):
    """Valid schedules, the default one first."""
    found = []
    for one in float_conv2d.of_length(spec, isa):
        if one.ahead or one.paired:  # its weights are a thirtieth, and packed in another way
            continue
        window = float_conv2d.flattened(spec.window, float_conv2d.most_pixels(one.vectors, isa))
        per_row = -(-window.out_width // one.pixels)
        found.append(replace(one, rows=min(window.out_height, max(one.rows, -(-_TILES // per_row)))))
    return list(dict.fromkeys(found))


def pack_weights(spec, schedule, isa, weights):
    """Weights in the order in which the kernel reads them.

    Parameters
    ----------
    weights : ndarray
        uint32 ``[planes, O, kh, kw, words(I / groups)]``.

    Returns
    -------
    ndarray
        uint32 ``[blocks, words(kh * kw * I / groups), planes, block]``, see :mod:`.packed_weights`.
    """
    size, outputs = schedule.vectors * isa.lanes, spec.out_channels
    planes = unpack_bits(weights, spec.in_channels // spec.groups).reshape(len(weights), outputs, -1)
    planes = np.pad(planes, ((0, 0), (0, -outputs % size), (0, 0)))
    return packed_weights.pack(planes.reshape(len(weights), -1, size, planes.shape[-1]).transpose(0, 1, 3, 2))


def build(spec, schedule, isa):
    """The kernel: data as in :func:`.float_conv2d.build`, packed weights, levels if any, the epilogue's inputs and outputs.

    Returns
    -------
    tirx.PrimFunc
    """
    return _Kernel(spec, schedule, isa).function()


class _Kernel(float_conv2d.Kernel):
    """Writes one convolution."""

    name = "weight_conv2d"

    def __init__(self, spec, schedule, isa):
        super().__init__(spec, schedule, isa)
        blocks, (height, width), planes = self.blocks, spec.window.kernel, spec.coding.planes
        self.own = spec.in_channels // spec.groups  # input channels that an output channel reads
        self.steps = height * width * self.own
        self.packed = tir.buffer("w", (blocks.count, specs.words(self.steps), planes, blocks.size), "uint32")
        self.operands = [self.data, self.packed]
        if spec.coding.kind == "levels":
            self.levels = tir.buffer("l", (planes + 1, specs.words(spec.out_channels) * specs.WORD_BITS), "float32")
            self.operands.append(self.levels)
        self.weights, self.allocate = tir.scratch("weights", (height * width * blocks.depth, blocks.size), "float32")

    def _weight(self, at, r, s, c, v):
        step = (tir.i64(r) * self.window.kernel[1] + s) * self.blocks.depth + c
        return tir.load_vector(self.weights, [step, v * self.lanes], self.lanes)

    def _task(self, image, block, first_row, count):
        return [self.allocate, self._decode(block), super()._task(image, block, first_row, count)]

    def _decode(self, block):
        """Write the block's weights as float32 ``[kh * kw * depth, block]``, zeros between groups that have nothing in common."""
        if self.blocks.depth == self.own:
            return self._decode_words(block, lambda step: step, None)
        first, bind_first = self._first_channel(block)

        def group(number):
            def place(step):
                return tirx.floordiv(step, self.own) * self.blocks.depth + (number * self.own + tirx.floormod(step, self.own))

            return self._decode_words(block, place, first + number * self.own)

        return [bind_first, tir.for_("group", self.blocks.depth // self.own, group)]

    def _decode_words(self, block, place, channel):
        """Write the weights of step k at row ``place(k)``; those of output channels that do not read input channel ``channel`` as 0."""
        whole, rest = divmod(self.steps, specs.WORD_BITS)
        body = [tir.for_("word", whole, lambda i: self._decode_word(block, i, specs.WORD_BITS, place, channel))] if whole else []
        return body + ([self._decode_word(block, tir.i64(whole), rest, place, channel)] if rest else [])

    def _decode_word(self, block, i, bits, place, channel):
        body = []

        def name(value):
            variable, statement = tir.bind("p", value)
            body.append(statement)
            return variable

        for v in range(self.schedule.vectors):
            first = block * self.blocks.size + v * self.lanes
            words = [name(tir.load_vector(self.packed, [block, i, p, v * self.lanes], self.lanes)) for p in range(self.spec.coding.planes)]
            decoder = packed_weights.Decoder(self.spec.coding, self.lanes, words, self._levels(name, first))
            keep = None if channel is None else name(self._reads(first, channel))
            for j in range(bits):
                weight = decoder.weight(j)
                if keep is not None:
                    weight = tir.reinterpret("float32", tir.reinterpret("uint32", weight) & keep)
                body.append(tir.store_vector(self.weights, [place(i * specs.WORD_BITS + j), v * self.lanes], weight))
        return body

    def _reads(self, first, channel):
        """uint32 vector, all ones for the output channels ``first ...`` whose group begins at input channel ``channel``."""
        lanes, per_out = self.lanes, self.spec.out_channels // self.spec.groups
        outputs = tirx.Broadcast(tirx.Cast("int32", first), lanes) + tir.lane_numbers(lanes)
        begins = tirx.floordiv(outputs, tir.splat(per_out, "int32", lanes)) * tir.splat(self.own, "int32", lanes)
        same = tirx.EQ(begins, tirx.Broadcast(tirx.Cast("int32", channel), lanes))
        return tirx.Select(same, tir.splat(0xFFFFFFFF, "uint32", lanes), tir.splat(0, "uint32", lanes))

    def _levels(self, name, channel):
        if self.spec.coding.kind != "levels":
            return []
        return [name(tir.load_vector(self.levels, [p, channel], self.lanes)) for p in range(self.spec.coding.planes + 1)]


def reference(spec, operands, epilogue_inputs):
    """The layer in numpy.

    Parameters
    ----------
    operands : list
        data float32 ``[N, H, W, I]``, weights uint32 ``[planes, O, kh, kw, words(I / groups)]``, levels if any.
    epilogue_inputs : list of ndarray

    Returns
    -------
    list of ndarray
        One for each output of the epilogue.
    """
    data, words, *levels = operands
    weights = packed_weights.values(unpack_bits(words, spec.in_channels // spec.groups), spec.coding, *levels)
    return float_conv2d.reference(spec, [data, weights], epilogue_inputs)
