"""The kernel of convolutions of 8-bit integers: loops, addresses, and what surrounds the products.

A task copies its input to scratch memory as bytes (see :mod:`.int8_layout`), from bytes or from packed planes of bits. For each block of
32 output channels it makes bytes of the weights' bits and runs over its flat pixels, some at a time: products and sums by the engine of the
instruction set (:mod:`.int8_engines`) into ``results``, from there the epilogue. Unpacking costs a few percent of the products, and memory
outside the second-level cache only ever sees the packed form.
"""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import int8_engines, neon
from bnntvm.schedules import tir as T
from bnntvm.schedules.epilogue import Emitter
from bnntvm.schedules.int8_layout import BLOCK, QUAD, round_up
from bnntvm.schedules.int8_tile_walk import Walk
from bnntvm.schedules.strips import Strips
from bnntvm.spec import WORD_BITS, Digits, words


class Kernel:
    """A convolution. Methods that return statements follow the loop nest from outside in.

    Parameters
    ----------
    spec : Int8Conv2d
    schedule : int8_conv2d.Schedule
    isa : Isa
    layout : Layout
    outputs : int
        Output channels.
    """

    def __init__(self, spec, schedule, isa, layout, outputs):
        self.spec, self.schedule, self.isa, self.layout, self.outputs = spec, schedule, isa, layout, outputs
        self.blocks, self.channels = words(outputs), layout.channels
        self.lanes, self.vectors = isa.lanes, BLOCK // isa.lanes
        self.tiled = isa.products == "tiles"
        self.engine = int8_engines.of(self)
        self.digits = neon.digits if neon.is_neon(isa) else T.digits

    # Parameters -----------------------------------------------------------------------------------------------------------------------

    def parameters(self, dims, out_dims):
        """Buffers of the data (``dims`` and channels), of the weights, and of the epilogue."""
        planes = isinstance(self.spec.data, Digits)
        count = len(self.spec.data.coefficients) if planes else 1
        shape, kind = ((*dims, words(self.channels)), "uint32") if planes else ((*dims, self.channels), self.element)
        self.data = [T.buffer(f"data{i or ''}", shape, kind) for i in range(count)]
        self.weights = T.buffer("weights", self.weight_shape(), "int8" if self.spec.weights == "int8" else "uint8")
        self.emitter = Emitter(self.spec.epilogue, self.outputs, self.isa, out_dims, "int32")
        self.walk = Walk(self) if self.tiled else None
        before = count - 1 if self.spec.mask_last else count
        return [*self.data[:before], self.weights, *self.data[before:], *self.emitter.inputs, *self.emitter.outputs]

    @property
    def element(self):
        """The type of a data tensor's elements."""
        return "float32" if self.spec.floats else self.spec.data

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
            value = self.digits(planes, digits.base + offset, digits.coefficients, self.engine.data_type, short, offset)
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
            if self.spec.floats:
                value = tirx.Cast(T.vector_type(self.spec.data, size), tirx.Cast(T.vector_type("int32", size), value))
            if self.engine.data_type != self.spec.data:
                value = T.byte_cast(value, self.engine.data_type, offset)
            return T.store_vector(self.scratch, [to + at], value)

        widest = self.isa.lanes * (1 if self.spec.floats else QUAD)
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

    @property
    def units(self):
        """What tasks are cut into: groups of flat pixels that are computed together."""
        return self.walk.groups if self.tiled else self.layout.tiles

    def work(self, blocks, units, place):
        """The units and the blocks of output channels of a task, each (first, number).

        ``place(pixel)`` is the position of a pixel of the result, counted through the image.
        """
        self.place = place
        if self.tiled:
            return self.walk.work(blocks, units)
        self.strips = Strips.of_pixels(self.emitter, self.layout.cover)
        self.results, results = T.memory("results", self.layout.cover * BLOCK, "int32")
        return [self.engine.tables(), results, self.strips.allocation, self.in_turn(blocks, units)]

    def span(self, first):
        """(first pixel of the result, their number, statements) of the flat pixels from ``first`` on, whatever lies between them."""
        flat, width, pitch = self.layout.flat, self.layout.window.out_width, self.layout.pitch

        def before(at):
            """Pixels of the result before flat pixel ``at``."""
            row, bind_row = T.bind("row", at // pitch)
            return row * width + tirx.min(at - row * pitch, T.i64(width)), [bind_row]

        end = tirx.min(first + self.layout.cover, T.i64(flat))
        if pitch == width:
            return first, end - first, []
        (begin, row), (stop, last_row) = before(first), before(end)
        begin, bind_begin = T.bind("begin", begin)
        count, bind_count = T.bind("count", stop - begin)
        return begin, count, [row, last_row, bind_begin, bind_count]

    def in_turn(self, blocks, tiles):
        """Sums, then the epilogue, tile after tile."""

        def tile(block, number):
            first, bind_first = T.bind("first", (tiles[0] + number) * self.layout.cover)
            return [bind_first, self.engine.products(first), self.finish(block, first)]

        def one(number):
            block, bind = T.bind("block", blocks[0] + number)
            return [bind, self.engine.expand(block), T.for_("tile", tiles[1], lambda number: tile(block, number))]

        return T.for_("block", blocks[1], one)

    def finish(self, block, first):
        """The epilogue of the flat pixels from ``first`` on."""
        begin, count, binds = self.span(first)

        def pixels():
            return T.for_("p", self.layout.cover, lambda p: self.flat_pixel(block, first, p))

        return [binds, self.strips.collect(begin, count, self.image_number, block, pixels)]

    def flat_pixel(self, block, first, p):
        """The epilogue of pixel ``p`` behind flat pixel ``first``, if it is one of the result."""
        pixel, bind = T.bind("pixel", tirx.Cast("int64", T.load(self.pixels, first + p)))
        values = [T.load_vector(self.results, [p * BLOCK + v * self.lanes], self.lanes) for v in range(self.vectors)]
        emitted = self.emitter.emit(values, self.place(pixel), block * BLOCK, {}, strip=self.strips.place(pixel))
        emitted = [self.strips.fetch(self.image_number, block, pixel), emitted]
        return [bind, T.when(pixel >= T.i64(0), emitted)]

    def number_pixels(self):
        """Statements that note for every flat pixel which one of the result it is, -1 for none; sets ``pixels``."""
        if self.tiled and not self.walk.numbers_pixels:
            return []
        layout, width = self.layout, self.layout.window.out_width
        size = round_up(layout.flat + layout.cover, self.lanes)
        self.pixels, allocation = T.memory("pixels", size, "int32")
        none = T.splat(-1, "int32", self.lanes)

        def row(y):
            return T.for_("x", width, lambda x: T.store(self.pixels, tirx.Cast("int32", y * width + x), y * layout.pitch + x))

        return [allocation, T.for_("i", size // self.lanes, lambda i: T.store_vector(self.pixels, [i * self.lanes], none)),
                T.for_("y", layout.rows, row)]  # fmt: skip

    @property
    def mask_bytes(self):
        """Bytes that hold one bit for each byte of a vector."""
        return self.lanes * QUAD // 8

    def unpacked(self, block, at):
        """The vector of weights whose bits begin at byte ``at`` of a block, one plane after the other."""
        digits, size = self.spec.weights, self.mask_bytes
        planes = [tirx.reinterpret(f"uint{8 * size}", T.load_vector(self.weights, [block, at + j * size], size))
                  for j in range(len(digits.coefficients))]  # fmt: skip
        return self.digits(planes, digits.base, digits.coefficients)
