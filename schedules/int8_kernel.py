"""The kernel of convolutions and dense layers of 8-bit integers: loops, addresses, and what surrounds the products.

A task copies its input to scratch memory as bytes (see :mod:`.int8_layout`), from bytes or from packed planes of bits. For each block of
32 output channels it makes bytes of the weights' bits and runs over its flat pixels, some at a time: products and sums by the engine of the
instruction set (:mod:`.int8_engines`) into ``results``, from there the epilogue. Unpacking costs a few percent of the products, and memory
outside the second-level cache only ever sees the packed form.
"""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import int8_engines
from bnntvm.schedules import tir as T
from bnntvm.schedules.epilogue import Emitter
from bnntvm.schedules.int8_layout import BLOCK, QUAD, round_up
from bnntvm.schedules.strips import Strips
from bnntvm.spec import WORD_BITS, Digits, words


class Kernel:
    """What convolution and dense layers share. Methods that return statements follow the loop nest from outside in.

    Parameters
    ----------
    spec : Int8Conv2d or Int8Dense
    schedule : int8_conv2d.Schedule or int8_dense.Schedule
    isa : Isa
    layout : Layout
    outputs : int
        Output channels.
    """

    def __init__(self, spec, schedule, isa, layout, outputs):
        self.spec, self.schedule, self.isa, self.layout, self.outputs = spec, schedule, isa, layout, outputs
        self.blocks, self.channels = words(outputs), layout.channels
        self.lanes, self.vectors = isa.lanes, BLOCK // isa.lanes
        self.engine = int8_engines.of(isa)(self)

    # Parameters -----------------------------------------------------------------------------------------------------------------------

    def parameters(self, dims, out_dims):
        """Buffers of the data (``dims`` and channels), of the weights, and of the epilogue."""
        planes = isinstance(self.spec.data, Digits)
        count = len(self.spec.data.coefficients) if planes else 1
        shape, kind = ((*dims, words(self.channels)), "uint32") if planes else ((*dims, self.channels), self.spec.data)
        self.data = [T.buffer(f"data{i or ''}", shape, kind) for i in range(count)]
        self.weights = T.buffer("weights", self.weight_shape(), "int8" if self.spec.weights == "int8" else "uint8")
        self.emitter = Emitter(self.spec.epilogue, self.outputs, self.isa, out_dims, "int32")
        before = count - 1 if self.spec.mask_last else count
        return [*self.data[:before], self.weights, *self.data[before:], *self.emitter.inputs, *self.emitter.outputs]

    def weight_shape(self):
        """Shape of the packed weights: bytes as the engine reads them, or the bits of every vector in the same order, without its zeros."""
        if self.spec.weights == "int8":
            return (self.blocks, self.engine.weight_bytes)
        vectors = len(self.layout.runs) * self.layout.quads * self.vectors
        return (self.blocks, vectors * len(self.spec.weights.coefficients) * self.lanes * QUAD // 8)

    # Input ----------------------------------------------------------------------------------------------------------------------------

    def pixel(self, place, to):
        """Statements that write the input pixel at ``place`` to byte ``to`` of the scratch image, up to a whole quad of channels."""
        return self._pixel_of_planes(place, to) if isinstance(self.spec.data, Digits) else self._pixel_of_bytes(place, to)

    def _pixel_of_planes(self, place, to):
        total, digits, offset = words(self.channels), self.spec.data, self.engine.offset
        unit = 2 if total % 2 == 0 and self.isa.lanes == 16 else 1
        lanes = unit * WORD_BITS

        def convert(word, valid=lanes):
            planes = [tirx.reinterpret(f"uint{lanes}", T.load_vector(p, [*self.index(place), word], unit)) for p in self.data]
            short = None if valid == lanes else valid
            value = T.digits(planes, digits.base + offset, digits.coefficients, self.engine.data_type, short, offset)
            size = round_up(valid, QUAD)
            if size < lanes:
                name, bind = T.bind("tail", value)
                return [bind, T.store_vector(self.scratch, [to + word * WORD_BITS], T.shuffle([name], range(size)))]
            return T.store_vector(self.scratch, [to + word * WORD_BITS], value)

        whole, tail = divmod(self.channels, lanes)
        body = [T.for_("word", whole, lambda i: convert(i * unit))] if whole > 4 else [convert(i * unit) for i in range(whole)]
        return [*body, convert(whole * unit, tail)] if tail else body

    def _pixel_of_bytes(self, place, to):
        source, offset = self.data[0], self.engine.offset

        def copy(at, size):
            value = T.load_vector(source, [*self.index(place), at], size)
            if self.engine.data_type != self.spec.data:
                value = T.byte_cast(value, self.engine.data_type, offset)
            return T.store_vector(self.scratch, [to + at], value)

        widest = self.isa.lanes * QUAD
        whole = self.channels // widest
        body = [T.for_("c", whole, lambda i: copy(i * widest, widest))] if whole > 4 else [copy(i * widest, widest) for i in range(whole)]
        at, size = whole * widest, widest // 2
        while at < self.channels:
            if self.channels - at >= size:
                body.append(copy(at, size))
                at += size
            size //= 2 if size > 1 else 1
        while at % QUAD:
            body.append(T.store(self.scratch, T.constant(offset, self.engine.data_type), to + at))
            at += 1
        return body

    def fill(self, at, count):
        """Statements that write zeros (as the engine has them) to ``count`` pixels (an int) from byte ``at`` on."""
        widest = QUAD * self.lanes
        vectors, rest = divmod(count * self.layout.pixel, widest)

        def zeros(i, size, start=0):
            return T.store_vector(self.scratch, [at + (start + i * size)], T.splat(self.engine.offset, self.engine.data_type, size))

        wide = T.for_("zero", vectors, lambda i: zeros(i, widest)) if vectors else []
        return [wide, T.for_("zero", rest // QUAD, lambda i: zeros(i, QUAD, vectors * widest)) if rest else []]

    # Weights and tiles ----------------------------------------------------------------------------------------------------------------

    def block(self, block, tiles, flat, place):
        """One block of output channels for the tiles of flat pixels ``tiles`` = (first, number).

        There are ``flat`` flat pixels; ``place(y, x)`` is the position of the pixel at row y and column x.
        """
        number, bind = T.bind("block", block)
        self.results, results = T.memory("results", self.layout.cover * BLOCK, "int32")
        self.strips = Strips.of_pixels(self.emitter, self.layout.cover)
        expand = self.engine.expand(number)
        each = T.for_("tile", tiles[1], lambda tile: self.tile(number, (tiles[0] + tile) * self.layout.cover, flat, place))
        return [bind, *results, self.strips.allocation, expand, each]

    def tile(self, block, first, flat, place):
        """Sums and epilogue of the flat pixels from ``first`` on: stretches of pixels between which there are pixels of no use."""
        layout = self.layout
        first, bind_first = T.bind("first", first)
        end, bind_end = T.bind("end", tirx.min(first + layout.cover, T.i64(flat)))
        body = [bind_first, bind_end, self.engine.products(first)]
        image = place(T.i64(0), T.i64(0))[0]
        if layout.pitch == layout.window.out_width or layout.rows == 1:

            def every():
                return T.for_("p", end - first, lambda p: self.pixel_out(block, p, place(T.i64(0), first + p)))

            return [*body, self.strips.collect(first, end - first, image, block, every)]
        top, bind_top = T.bind("top", first // layout.pitch)
        bottom, bind_bottom = T.bind("bottom", (end - 1) // layout.pitch)

        def stretch(number):
            y, bind_y = T.bind("y", top + number)
            start, bind_start = T.bind("start", y * layout.pitch)
            low, bind_low = T.bind("low", tirx.max(first, start))
            high, bind_high = T.bind("high", tirx.min(end, start + layout.window.out_width))
            each = T.for_("p", high - low, lambda p: self.pixel_out(block, low - first + p, place(y, low - start + p)))
            return [bind_y, bind_start, bind_low, bind_high, each]

        # The outputs of a tile are pixels of the image one after the other, whatever lies between them here.
        width = layout.window.out_width
        begin, bind_begin = T.bind("begin", top * width + tirx.min(first - top * layout.pitch, T.i64(width)))
        count, bind_count = T.bind("count", bottom * width + tirx.min(end - bottom * layout.pitch, T.i64(width)) - begin)
        rows = self.strips.collect(begin, count, image, block, lambda: T.for_("stretch", bottom - top + 1, stretch))
        return [*body, bind_top, bind_bottom, bind_begin, bind_count, rows]

    def pixel_out(self, block, p, position):
        """The epilogue of pixel ``p`` of ``results``."""
        values = [T.load_vector(self.results, [p * BLOCK + v * self.lanes], self.lanes) for v in range(self.vectors)]
        return self.emitter.emit(values, position, block * BLOCK, {}, strip=self.strips.place(position[-1]))

    @property
    def mask_bytes(self):
        """Bytes that hold one bit for each byte of a vector."""
        return self.lanes * QUAD // 8

    def unpacked(self, block, at):
        """The vector of weights whose bits begin at byte ``at`` of a block, one plane after the other."""
        digits, size = self.spec.weights, self.mask_bytes
        planes = [tirx.reinterpret(f"uint{8 * size}", T.load_vector(self.weights, [block, at + j * size], size))
                  for j in range(len(digits.coefficients))]  # fmt: skip
        return T.digits(planes, digits.base, digits.coefficients)
