"""Layers of bits on CUDA cores, for any shape and any architecture: a logic operation, a population count, an addition a word.

A warp computes some pixels of 32 output channels: lane i has channel i of a word, so the words of data are the same in all lanes (of a
group) and weights lie lane by lane. Sums of all planes go to one register a pixel, each popcount times its factor.
"""

from __future__ import annotations

import numpy as np
from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import simt
from bnntvm.schedules.cuda.epilogue import Ballot, Emitter, Pixel, Value
from bnntvm.spec import WORD_BITS, words

#: Warps of a block.
WARPS = 4


def pack_weights(layer, weights):
    """uint32: weights ``[words(O), taps * words, Q', 32]``, one channel a lane, then :meth:`.layer.Layer.tail`.

    Parameters
    ----------
    weights : uint32[Q', O, kh, kw, words]
    """
    blocks = words(layer.channels)
    flat = np.zeros((len(weights), blocks * WORD_BITS, layer.taps * layer.group_words), np.uint32)
    flat[:, : layer.channels] = weights.reshape(*weights.shape[:2], -1)
    if layer.dense_groups:  # to the place that the channel's group has in its word
        groups = np.arange(flat.shape[1], dtype=np.uint32) // layer.outputs
        flat <<= (groups * layer.bits % WORD_BITS)[:, None]
    lanes = flat.reshape(len(weights), blocks, WORD_BITS, -1).transpose(1, 3, 0, 2)
    return np.concatenate([lanes.reshape(-1), layer.tail(weights, layer.by_xor)])


def weight_size(layer):
    """Elements of the weights in the packed operand."""
    return words(layer.channels) * layer.taps * layer.group_words * layer.weight_planes * WORD_BITS


class Kernel:
    """The kernel of a layer.

    Parameters
    ----------
    layer : Layer
    pixels : int
        Pixels of a warp.
    name : str
    """

    def __init__(self, layer, pixels, name):
        self.layer, self.pixels, self.name, window = layer, pixels, name, layer.window
        self.batch, self.xor = tirx.Var("n", "int64"), layer.by_xor
        dims = (self.batch,) if layer.is_dense else (self.batch, window.out_height, window.out_width)
        image = (self.batch,) if layer.is_dense else (self.batch, window.in_height, window.in_width)
        self.planes = [tir.buffer(f"x{i}", (*image, layer.pixel_words), "uint32") for i in range(layer.data_planes + layer.zeros)]
        self.weights = tir.buffer("w", (weight_size(layer) + layer.tail_size,), "uint32")
        self.scales = [tir.buffer("scales", (len(layer.products), words(layer.channels) * WORD_BITS), "float32")] * layer.scaled
        self.emitter = Emitter(layer.spec.epilogue, layer.channels, dims, "float32" if layer.scaled else "int32")

    @property
    def params(self):
        data, mask = self.planes[: self.layer.data_planes], self.planes[self.layer.data_planes :]
        return [*data, self.weights, *mask, *self.scales, *self.emitter.inputs, *self.emitter.outputs]

    def function(self):
        return simt.kernel(self.name, self.params, self._blocks(), WARPS * simt.WARP, self._body)

    def _rows(self):
        """Pixels of the batch."""
        return simt.i32(self.batch) * self.layer.out_pixels

    def _blocks(self):
        return simt.ceil_div(self._rows(), self.pixels * WARPS) * words(self.layer.channels)

    def _own(self, named, block, thread):
        """``(word of channels, first pixel)`` of a thread."""
        count = words(self.layer.channels)
        word = named("word", simt.mod(block, count))
        return word, named("first", (simt.div(block, count) * WARPS + simt.div(thread, 32)) * self.pixels)

    def _body(self, block, thread):
        layer, body = self.layer, []

        def named(name, value):
            variable, statement = simt.bind(name, value)
            body.append(statement)
            return variable

        for attribute, array in (("_planes", self.planes), ("_scales", self.scales)):
            pairs = [simt.flat(one) for one in array]
            setattr(self, attribute, [one for one, _ in pairs])
            body += [statement for _, statement in pairs]
        body += self.emitter.declarations
        self.lane = named("lane", simt.mod(thread, 32))
        self.word, first = self._own(named, block, thread)
        rows = named("rows", self._rows())
        self.channel = named("channel", tirx.min(self.word * 32 + self.lane, simt.i32(layer.channels - 1)))
        self.offset, self.mask = self._group(named)
        places = [self._place(named, first + p, rows) for p in range(self.pixels)]
        self.sums, allocate = simt.registers("sums", self.pixels, "int32")
        self.totals, allocate_totals = simt.registers("totals", self.pixels, "float32")
        body += [allocate, *([allocate_totals] if layer.scaled else [])]
        for number, product in enumerate(layer.products):
            body += [simt.put(self.sums, p, simt.i32(0)) for p in range(self.pixels)]
            body.append(self._taps(number, product, places))
            body += self._finish(number, places)
        scope = {}
        for p, place in enumerate(places):
            value = simt.at(self.totals if layer.scaled else self.sums, p)
            body += self.emitter.emit([Value(value, self.lane)], place.pixel, self.word, Ballot(self.lane), scope)
        return body

    def _group(self, named):
        """Where the words of the lane's group begin in a pixel, and which of their bits are its own (None: all)."""
        layer = self.layer
        if layer.groups == 1:
            return simt.i32(0), None
        group = named("group", simt.div(self.channel, layer.outputs))
        if not layer.dense_groups:
            return named("offset", group * layer.group_words), None
        bit = named("bit", group * layer.bits)
        ones = simt.u32((1 << layer.bits) - 1)
        return named("offset", simt.div(bit, 32)), named("mask", tirx.shift_left(ones, simt.u32(simt.mod(bit, 32))))

    def _place(self, named, row, rows):
        return Place(self.layer, named, row, rows)

    def _taps(self, number, product, places):
        """Loops over taps and words of product ``number``."""
        layer, (height, width) = self.layer, self.layer.window.kernel
        count = layer.group_words

        def words_of(r, s):
            body, offsets = [], []
            for place in places:
                inside, where = place.tap(r, s)
                inside, bind_inside = simt.bind("inside", inside)
                where, bind_where = simt.bind("where", simt.wide(where) * layer.pixel_words)
                body += [bind_inside, bind_where]
                offsets.append((inside, where))
            return [*body, simt.loop("k", count, lambda k: self._word(product, (r * width + s) * count + k, k, offsets))]

        return simt.loop("r", height, lambda r: simt.loop("s", width, lambda s: words_of(r, s)))

    def _word(self, product, number, k, offsets):
        layer, body = self.layer, []
        base = (simt.wide(self.word) * (layer.taps * layer.group_words) + simt.wide(number)) * (layer.weight_planes * 32)
        weights = {}
        for j in dict.fromkeys(j for j, _ in product.weights):
            weights[j], statement = simt.bind("w", simt.at(self.weights, base + simt.wide(self.lane + j * 32)))
            body.append(statement)
        for p, (inside, where) in enumerate(offsets):
            for i in dict.fromkeys(i for i, _ in product.data):
                data = simt.at(self._planes[i], where + simt.wide(self.offset + k))
                data = tirx.if_then_else(inside, data, simt.u32(0))
                data, statement = simt.bind("a", data if self.mask is None else data & self.mask)
                body.append(statement)
                for _, j, factor in [pair for pair in product.pairs if pair[0] == i]:
                    found = data ^ weights[j] if self.xor else data & weights[j]
                    count = tirx.Cast("int32", tirx.popcount(found)) * simt.i32(-factor // 2 if self.xor else factor)
                    body.append(simt.put(self.sums, p, simt.at(self.sums, p) + count))
                factor = dict(product.row_factors()).get(i, 0)
                if factor and not self.xor:
                    count = tirx.Cast("int32", tirx.popcount(data)) * simt.i32(factor)
                    body.append(simt.put(self.sums, p, simt.at(self.sums, p) + count))
        return body

    def _finish(self, number, places):
        """Add the constants; scale."""
        layer, body, padded = self.layer, [], words(self.layer.channels) * WORD_BITS
        for p, place in enumerate(places):
            body.append(simt.put(self.sums, p, simt.at(self.sums, p) + self._constant(number, place)))
            if layer.scaled:
                scale = simt.at(self._scales[0], self.word * 32 + self.lane + number * padded)
                value = simt.call("bnn_mul", tirx.Cast("float32", simt.at(self.sums, p)), scale)
                value = value if number == 0 else simt.call("bnn_add", simt.at(self.totals, p), value)
                body.append(simt.put(self.totals, p, value))
        return body

    def _constant(self, number, place):
        """What the popcounts of a product do not count, for the lane's channel of a pixel."""
        table = Tables(self.layer, self.weights, weight_size(self.layer))
        return table.at(table.row(number, place) + (self.word * 32 + self.lane))


class Tables:
    """Reads what :meth:`.layer.Layer.tail` wrote, from element ``begin`` of the packed weights on."""

    def __init__(self, layer, weights, begin):
        self.layer, self.weights, self.begin = layer, weights, begin
        self.padded = words(layer.channels) * WORD_BITS
        self.numbers = begin + len(layer.products) * layer.class_count * self.padded

    def class_of(self, place):
        """The class of a pixel, int32."""
        if self.layer.class_count == 1:
            return simt.i32(0)
        row = simt.at(self.weights, place.y + self.numbers)
        column = simt.at(self.weights, place.x + (self.numbers + self.layer.window.out_height))
        return tirx.Cast("int32", row) + tirx.Cast("int32", column)

    def row(self, product, place):
        """Where the constants of a product begin, for a pixel: int32."""
        return (self.class_of(place) + product * self.layer.class_count) * self.padded + self.begin

    def at(self, index):
        """A constant, int32."""
        return tirx.reinterpret("int32", simt.at(self.weights, index))


class Place:
    """A pixel of the result: where it is, and which pixels of the image its taps meet.

    Parameters
    ----------
    layer : Layer
    named : function of (name, value)
        Names a value in the statements before.
    row : int32 expression
        Number of the pixel in the batch; past the end it is that of the last one, and ``exists`` is false.
    rows : int32 expression
    """

    def __init__(self, layer, named, row, rows):
        self.layer, window = layer, layer.window
        self.exists = named("exists", row < rows)
        row = named("row", tirx.min(row, rows - 1))
        self.image = named("image", simt.div(row, layer.out_pixels))
        inside = named("pixel", simt.mod(row, layer.out_pixels))
        self.y, self.x = named("y", simt.div(inside, window.out_width)), named("x", simt.mod(inside, window.out_width))
        self.top = named("top", self.y * window.strides[0] - window.pads[0])
        self.left = named("left", self.x * window.strides[1] - window.pads[1])
        self.pixel = Pixel(named("row", simt.wide(row)), self.image, inside, self.exists)

    def tap(self, r, s):
        """``(whether it is inside the image, number of the pixel of the batch)`` of tap (r, s)."""
        window = self.layer.window
        y, x = self.top + r * window.dilations[0], self.left + s * window.dilations[1]
        where = (self.image * window.in_height + y) * window.in_width + x
        checks = []
        for low, position, size, axis in ((0, y, window.in_height, 0), (0, x, window.in_width, 1)):
            if not self.never_outside(axis):
                checks += [position >= simt.i32(low), position < simt.i32(size)]
        inside = tir.constant(True, "bool") if not checks else checks[0]
        for check in checks[1:]:
            inside = tirx.And(inside, check)
        return inside, where

    def never_outside(self, axis):
        """Whether no tap along an axis is outside the image."""
        window = self.layer.window
        size, out = ((window.in_height, window.out_height), (window.in_width, window.out_width))[axis]
        last = (out - 1) * window.strides[axis] - window.pads[axis] + (window.kernel[axis] - 1) * window.dilations[axis]
        return window.pads[axis] <= 0 and last < size
