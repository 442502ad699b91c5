"""Layers of bits as a product of matrices, tile by tile: what the kernels on tensor cores share.

Rows are pixels of the result (of the whole batch), columns output channels, and K runs over taps and the words of a tap. A block computes
``rows`` x ``columns``; slabs of K pass through shared memory in a ring of stages, the data gathered pixel by pixel (a word outside the
image is 0: implicit im2col), the weights as they lie in memory, where they were packed in the order of shared memory.

Shared memory holds rows of ``slab`` bytes; the 16-byte chunks of a row are exchanged by xor with the number of the row, so that eight rows
of the same chunk lie in different banks.

With and the popcounts of the data are needed too (:mod:`.layer`): every thread counts the bits of the chunks that it has copied, once they
have arrived, while the tensor cores work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import simt
from bnntvm.schedules.cuda.cores import Place, Tables
from bnntvm.schedules.cuda.epilogue import Emitter
from bnntvm.spec import WORD_BITS, words

#: Row tiles that follow one another with the same column tile: what they share stays in the second-level cache.
RASTER = 8


def swizzle(row, slab):
    """What the number of a 16-byte chunk is xored with in ``row``, an int, an array or an expression."""
    period, chunks = max(1, 128 // slab), slab // 16
    if isinstance(row, (int, np.ndarray)):
        return row // period % chunks
    return simt.mod(simt.div(row, period), chunks)


@dataclass(frozen=True)
class Shape:
    """How a layer is cut.

    Attributes
    ----------
    rows, columns : int
        Of a block's tile; columns a multiple of 32.
    slab : int
        Bytes of K of a stage: 32, 64 or 128.
    stages : int
    resident : bool
        Whether all weights of a column tile stay in shared memory: stages hold data only.
    packed : int
        Columns of the tile that the weights were packed for, if that is not this one: a multiple of ``columns``.
    """

    layer: object
    rows: int
    columns: int
    slab: int
    stages: int
    resident: bool = False
    packed: int = 0

    @property
    def packed_columns(self):
        """Columns that lie together in the packed weights."""
        return self.packed or self.columns

    @property
    def packed_slab_words(self):
        """Words from one slab to the next in the packed weights."""
        return self.packed_columns * self.row_words

    @property
    def packed_tile_words(self):
        """Words of the packed weights of ``packed_columns`` columns."""
        return self.layer.weight_planes * self.slabs * self.packed_slab_words

    @property
    def chunk_words(self):
        """Words that are copied at once: 4, 2 or 1, as the words of a group in a pixel allow."""
        count = self.layer.group_words
        return 4 if count % 4 == 0 else 2 if count % 2 == 0 else 1

    @property
    def chunks(self):
        """Chunks of one row of a slab."""
        return self.slab // (4 * self.chunk_words)

    @property
    def tap_chunks(self):
        """Chunks of one tap."""
        return self.layer.group_words // self.chunk_words

    @property
    def slabs(self):
        """Slabs of K."""
        return -(-self.layer.taps * self.tap_chunks // self.chunks)

    @property
    def column_tiles(self):
        """Column tiles of one group."""
        return -(-self.layer.outputs // self.columns)

    @property
    def row_words(self):
        """Words of a row of a slab."""
        return self.slab // 4

    @property
    def stage_words(self):
        """Words of a stage: data, then weights, unless those are resident."""
        return (self.rows + self.columns * (not self.resident)) * self.row_words

    @property
    def slab_weight_words(self):
        """Words of the weights of one slab of a column tile."""
        return self.columns * self.row_words

    @property
    def tile_weight_words(self):
        """Words of the weights of a column tile."""
        return self.layer.weight_planes * self.slabs * self.slab_weight_words

    @property
    def weight_words(self):
        """Words of all weights as they are packed."""
        return self.layer.groups * -(-self.layer.outputs // self.packed_columns) * self.packed_tile_words


def fits(layer):
    """Whether a layer can be computed in tiles: groups must begin at words, of data and of results."""
    sizes = (*layer.window.pads, layer.window.in_height, layer.window.in_width)
    if max(sizes) + max(d * k for d, k in zip(layer.window.dilations, layer.window.kernel)) >= 1 << 14:
        return False
    return layer.groups == 1 or (not layer.dense_groups and layer.outputs % WORD_BITS == 0)


def pack_weights(shape, weights, xor):
    """uint32: ``[groups, column tiles, Q', slabs, columns * slab / 4]`` in the order of shared memory, then :meth:`.layer.Layer.tail`.

    Parameters
    ----------
    weights : uint32[Q', O, kh, kw, words]
    """
    layer, row_words, slabs = shape.layer, shape.row_words, shape.slabs
    flat = np.zeros((len(weights), layer.groups, shape.column_tiles * shape.columns, slabs * row_words), np.uint32)
    flat[:, :, : layer.outputs, : layer.taps * layer.group_words] = weights.reshape(len(weights), layer.groups, layer.outputs, -1)
    tiles = flat.reshape(len(weights), layer.groups, shape.column_tiles, shape.columns, slabs, shape.slab // 16, 4)
    tiles = tiles.transpose(1, 2, 0, 4, 3, 5, 6)  # groups, tiles, planes, slabs, columns, chunks, words
    rows = np.arange(shape.columns)
    order = np.arange(shape.slab // 16)[None] ^ swizzle(rows, shape.slab)[:, None]  # chunk c of a row lies at place order[c]
    swizzled = np.empty_like(tiles)
    swizzled[..., rows[:, None], order, :] = tiles[..., rows[:, None], np.arange(shape.slab // 16)[None], :]
    return np.concatenate([swizzled.reshape(-1), layer.tail(weights, xor)])


@dataclass(frozen=True)
class Pass:
    """One walk along K: data plane ``data`` times weight plane ``weights``.

    ``row_factor``, ``column_factor``: what the popcounts of the data, and of weights that are made at run time, count in this pass.
    """

    product: int
    data: int
    weights: int
    factor: int
    row_factor: int
    column_factor: int = 0


def passes(layer, xor):
    """The passes of all products, in order."""
    found = []
    for number, product in enumerate(layer.products):
        rows, columns = dict(product.row_factors(xor)), dict(product.column_factors(xor)) if layer.at_run_time else {}
        for i, j, factor in product.pairs:
            found.append(Pass(number, i, j, -factor // 2 if xor else factor, rows.pop(i, 0), columns.pop(j, 0)))
    return found


class TileKernel:
    """Parameters, operands and the loader of a kernel in tiles; subclasses compute.

    Parameters
    ----------
    shape : Shape
    threads : int
        Of a block.
    isa : CudaIsa
    name : str

    Attributes
    ----------
    emits : bool
        Whether the kernel has results; else it leaves sums in the ``workspace``.
    """

    #: Attributes that parameters are made of.
    OPERANDS = "batch", "planes", "weights", "scales", "emitter", "tables", "workspace"
    emits, workspace = True, None

    def __init__(self, shape, threads, isa, name):
        self.shape, self.layer, self.threads, self.isa, self.name = shape, shape.layer, threads, isa, name
        self.xor, self.passes = isa.operation == "xor", passes(self.layer, isa.operation == "xor")
        self.batch = tirx.Var("n", "int64")
        self.counts_rows = any(one.row_factor for one in self.passes)
        self.declare()

    def declare(self):
        """Make the parameters."""
        layer, window, shape = self.layer, self.layer.window, self.shape
        dims = (self.batch,) if layer.is_dense else (self.batch, window.out_height, window.out_width)
        image = (self.batch,) if layer.is_dense else (self.batch, window.in_height, window.in_width)
        self.planes = [tir.buffer(f"x{i}", (*image, layer.pixel_words), "uint32") for i in range(layer.data_planes + layer.zeros)]
        self.weights = tir.buffer("w", (shape.weight_words + layer.tail_size,), "uint32")
        self.scales = [tir.buffer("scales", (len(layer.products), words(layer.channels) * WORD_BITS), "float32")] * layer.scaled
        self.emitter = Emitter(layer.spec.epilogue, layer.channels, dims, "float32" if layer.scaled else "int32")
        self.tables = Tables(layer, self.weights, shape.weight_words)

    @property
    def params(self):
        data, mask = self.planes[: self.layer.data_planes], self.planes[self.layer.data_planes :]
        return [*data, self.weights, *mask, *self.scales, *self.emitter.inputs, *self.written]

    @property
    def written(self):
        """The parameters that are written: results, then the workspace if there is one."""
        return [*self.emitter.outputs, *([] if self.workspace is None else [self.workspace])]

    def all_rows(self):
        """Rows of the batch, int32."""
        return simt.i32(self.batch) * self.layer.out_pixels

    @property
    def column_tiles(self):
        """Column tiles of all groups."""
        return self.shape.column_tiles * self.layer.groups

    def row_tiles(self, together=1):
        """Row tiles of the batch, or groups of so many of them; int32 expression."""
        return simt.ceil_div(simt.i32(self.batch) * self.layer.out_pixels, self.shape.rows * together)

    def begin(self, named, body):
        """Statements in front of everything."""
        for attribute, array in (("_planes", self.planes), ("_scales", self.scales if self.emits else [])):
            pairs = [simt.flat(one) for one in array]
            setattr(self, attribute, [one for one, _ in pairs])
            body += [statement for _, statement in pairs]
        body += self.emitter.declarations if self.emits else []
        self.total_rows = named("rows", self.all_rows())

    def tile_of(self, named, block, together=1):
        """``(row tile, column tile of all groups)`` of a block: some row tiles go through all columns before the next ones.

        ``together``: row tiles that count as one.
        """
        if self.column_tiles == 1:
            return block, simt.i32(0)
        strip = RASTER * self.column_tiles
        first = named("strip", simt.div(block, strip) * RASTER)
        height = named("height", tirx.min(self.row_tiles(together) - first, simt.i32(RASTER)))
        inside = named("inside", simt.mod(block, strip))
        return named("row_tile", first + tirx.truncmod(inside, height)), named("column_tile", tirx.truncdiv(inside, height))

    def share(self, other):
        """Take the parameters of another kernel of the same layer, whose packed weights this one reads."""
        for name in self.OPERANDS:
            setattr(self, name, getattr(other, name))

    def constant_of(self, number, place, channel):
        """What product ``number`` of a pixel and channel does not count, int32."""
        return self.tables.at(self.tables.row(number, place) + channel)

    # The loader

    def rows_of_threads(self, named, thread, threads):
        """What a thread copies of the data: the same chunk of some rows."""
        return Rows(self, named, thread, threads, self.shape.rows, self.total_rows, counted=self.counts_rows)


_NOWHERE = -(1 << 15)


def _linear(layer):
    """Whether the result's pixels are the image's pixels, one after the other."""
    window = layer.window
    return window.kernel == (1, 1) and window.strides == (1, 1) and not any(window.pads)


class Rows:
    """The rows that one thread copies, and what it counts of them.

    Parameters
    ----------
    kernel : TileKernel
    named, thread, threads
    rows : int
        Of the tile.
    total : int32 expression
        Where the rows end of which the tile has some.
    place : int
        Where they lie in a stage, in words.
    counted : bool
        Whether their bits are counted.
    name : str
        In front of the names of registers.

    Of a convolution a thread would have to know, for each of its rows, where the window begins in memory and in the image. The threads that
    copy other chunks of the same rows are its neighbours: thread ``j`` of them knows this of row ``j``, and tells the others.
    """

    def __init__(self, kernel, named, thread, threads, rows, total, place=0, counted=False, name=""):
        shape = kernel.shape
        self.kernel, self.shape, self.layer, self.threads = kernel, shape, shape.layer, threads
        self.rows, self.total, self.place, self.counted = rows, total, place, counted
        self.chunk = named("chunk", simt.mod(thread, shape.chunks))
        self.first = named("first", simt.div(thread, shape.chunks))
        self.holder = named("holder", simt.mod(thread, 32) - self.chunk)
        self.step = threads // shape.chunks
        self.count = -(-rows // self.step)
        self.partial = rows % self.step != 0  # the last rows of some threads are past the tile
        if self.count > shape.chunks and not _linear(self.layer):
            raise ValueError("a tile has more rows than threads copy")
        arrays = [simt.registers(f"{name}where", 1, "int64"), simt.registers(f"{name}corner", 1, "int32")]
        self.where, self.corner = (array for array, _ in arrays)
        self.counts, allocate = simt.registers(f"{name}row_counts", self.count, "int32")
        self.allocate = [*(statement for _, statement in arrays), *([allocate] if counted else [])]

    def begin(self, row_tile, base=None):
        """Statements for a new tile: where the thread's rows begin; ``base``: the first word of row 0, where rows follow one another.

        ``where``: first word of the window of one row (of the first one, where rows follow one another). ``corner``: 16 bits each of y and
        x of that window, far above the image if there is no such row; where rows follow one another the first one's number.
        """
        body = []
        named = simt.namer(body)
        first_row = named("first_row", row_tile * self.rows + self.first)
        if _linear(self.layer):
            where = simt.wide(first_row) * self.layer.pixel_words
            where = where if base is None else base + where
            return [*body, simt.put(self.where, 0, where), simt.put(self.corner, 0, first_row)]
        own = first_row + tirx.min(self.chunk, simt.i32(self.count - 1)) * self.step
        place = Place(self.layer, named, own, self.kernel.total_rows)
        top = tirx.shift_left(tirx.Select(place.exists, place.top, simt.i32(_NOWHERE)), simt.i32(16))
        corner = tirx.bitwise_or(top, tirx.bitwise_and(place.left, simt.i32(0xFFFF)))
        where = simt.wide(place.tap(0, 0)[1]) * self.layer.pixel_words
        return [*body, simt.put(self.where, 0, where), simt.put(self.corner, 0, corner)]

    def _window(self, named, i, r, s):
        """``(whether tap (r, s) of row i is inside the image, the window's first word)``."""
        window, lane = self.layer.window, self.holder + i
        base = named("base", simt.call("bnn_shuffle_int64", simt.at(self.where, 0), lane))
        corner = named("corner", simt.call("bnn_shuffle_int32", simt.at(self.corner, 0), lane))
        y = tirx.shift_right(corner, simt.i32(16)) + r * window.dilations[0]
        x = tirx.shift_right(tirx.shift_left(corner, simt.i32(16)), simt.i32(16)) + s * window.dilations[1]
        return tirx.And(simt.u32(y) < simt.u32(window.in_height), simt.u32(x) < simt.u32(window.in_width)), base

    def _row(self, i):
        return self.first + i * self.step

    def _guarded(self, i, statement):
        if not self.partial or i < self.count - 1:
            return statement
        return tirx.IfThenElse(self._row(i) < simt.i32(self.rows), tir.seq(statement), None)

    def _place_in_stage(self, i, stage):
        """Index of the thread's chunk of its row ``i`` in shared memory."""
        shape, row = self.shape, self._row(i)
        byte = self.chunk * (4 * shape.chunk_words)
        sixteen, rest = simt.div(byte, 16), simt.div(simt.mod(byte, 16), 4)
        place = tirx.bitwise_xor(sixteen, swizzle(row, shape.slab))
        return stage * shape.stage_words + self.place + row * shape.row_words + place * 4 + rest

    def copy(self, named, memory, plane, offset, slab, stage, function):
        """Copy the chunks of one slab; ``offset``: first word of the group in a pixel."""
        shape, layer, window = self.shape, self.layer, self.layer.window
        number = named("k", slab * shape.chunks + self.chunk)
        tap, part = simt.div(number, shape.tap_chunks), simt.mod(number, shape.tap_chunks)
        r, s = named("r", simt.div(tap, window.kernel[1])), named("s", simt.mod(tap, window.kernel[1]))
        chunks = layer.taps * shape.tap_chunks
        inside_k = None if chunks % shape.chunks == 0 else named("in_k", number < simt.i32(chunks))
        step = (r * (window.dilations[0] * window.in_width) + s * window.dilations[1]) * layer.pixel_words
        step = named("step", simt.wide(step + part * shape.chunk_words + offset))
        for i in range(self.count):
            if _linear(layer):
                valid = simt.at(self.corner, 0) + i * self.step < self.total
                base = simt.at(self.where, 0) + i * self.step * layer.pixel_words
            else:
                valid, base = self._window(named, i, r, s)
            valid = named("valid", valid if inside_k is None else tirx.And(inside_k, valid))
            where = tirx.Select(valid, base + step, tir.i64(0))
            target = simt.pointer(memory, self._place_in_stage(i, stage))
            copy = simt.do(f"{function}{shape.chunk_words}", target, simt.pointer(plane, where), valid)
            named.append(self._guarded(i, copy))

    # Popcounts

    def clear(self):
        """Before the first pass of a product."""
        return [simt.put(self.counts, i, simt.i32(0)) for i in range(self.count)] if self.counted else []

    def count_bits(self, memory, stage, factor):
        """Count what the thread has copied into a stage, times ``factor``."""
        body, name = [], f"bnn_popc{self.shape.chunk_words}"
        for i in range(self.count):
            found = simt.call(name, simt.pointer(memory, self._place_in_stage(i, stage)), dtype="int32")
            body.append(self._guarded(i, simt.put(self.counts, i, simt.at(self.counts, i) + found * factor)))
        return body

    def publish(self, memory, begin):
        """Statements that add up the counts of the threads of a row and store them at ``begin + row`` of shared memory."""
        if not self.counted:
            return []
        body = []
        for i in range(self.count):
            value = simt.at(self.counts, i)
            distance = 1
            while distance < self.shape.chunks:
                value, bind = simt.bind("total", simt.call("bnn_add_xor", value, simt.i32(distance), dtype="int32"))
                body.append(bind)
                distance *= 2
            store = simt.put(memory, begin + self._row(i), tirx.reinterpret("uint32", value))
            store = tirx.IfThenElse(tirx.EQ(self.chunk, simt.i32(0)), store, None)
            body.append(self._guarded(i, store))
        return body
