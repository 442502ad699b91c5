"""Products of two activations of bits on the tensor cores of single warps, in the tiles of :mod:`.mma`.

The right operand stands where a layer has its weights, its columns lying ``[B or 1, columns, words]`` as the rows of the left one do; both
come to shared memory in the same way, chunk by chunk. What a layer knows of its weights before is counted here of the columns while the
tensor cores work, as it is of the rows: with bits a and b, and ``features`` places that count,

    sum(d[i] * w[j] * popc(a[i] & b[j])) + sum(w0 * d[i] * popc(a[i])) + sum(d0 * w[j] * popc(b[j])) + d0 * w0 * features

(:mod:`.layer` has the same with xor). Tiles keep to one product of the batch, unless all share the right operand: then its rows follow one
another.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import simt
from bnntvm.schedules.cuda.epilogue import Emitter
from bnntvm.schedules.cuda.mma import MmaKernel
from bnntvm.schedules.cuda.tiles import Rows
from bnntvm.spec import Epilogue, Output, Step, store


def epilogue_of(spec):
    """What is done with the exact products."""
    if spec.scale is None:
        return store("int32", "int32")
    if spec.scale == 1:
        return store("float32", "int32")
    return Epilogue((), (Step("cast", (0,)), Step("multiply", (1, spec.scale))), (Output("tensor", 2),))


class ProductKernel(MmaKernel):
    """The kernel; parameters as of :class:`.mma.MmaKernel`, ``shape`` of the layer of a :class:`bnntvm.spec.BinaryMatmul`."""

    OPERANDS = "batch", "planes", "right", "emitter", "workspace"

    def declare(self):
        layer, spec = self.layer, self.layer.spec
        self.counts_columns = any(one.column_factor for one in self.passes)
        self.planes = [tir.buffer(f"x{i}", (self.batch, spec.rows, spec.words), "uint32") for i in range(layer.data_planes)]
        products = 1 if spec.shared else self.batch
        self.right = [tir.buffer(f"w{i}", (products, spec.columns, spec.words), "uint32") for i in range(layer.weight_planes)]
        self.scales = []
        self.emitter = Emitter(epilogue_of(spec), layer.channels, (self.batch, spec.rows), "int32")
        self.constant = layer.products[0].data_constant * layer.products[0].weight_constant * spec.features

    @property
    def params(self):
        return [*self.planes, *self.right, *self.written]

    def all_rows(self):
        return simt.i32(self.batch) * self.layer.spec.rows

    def constant_of(self, number, place, channel):
        return simt.i32(self.constant)

    @property
    def counts(self):
        return self.counts_rows or self.counts_columns

    @property
    def shared_words(self):
        """Words of shared memory: the ring, a sum for each row, one for each column."""
        return self._columns_begin + (self.shape.columns if self.counts_columns else 0)

    @property
    def _columns_begin(self):
        return super().shared_words

    # Tiles

    @property
    def _row_tiles_of_one(self):
        return -(-self.layer.spec.rows // self.shape.rows)

    def row_tiles(self, together=1):
        if self.layer.spec.shared:
            return simt.ceil_div(simt.i32(self.batch) * self.layer.spec.rows, self.shape.rows * together)
        return simt.i32(self.batch) * self._row_tiles_of_one

    def begin(self, named, body):
        super().begin(named, body)
        flats = [simt.flat(one) for one in self.right]
        self._right = [one for one, _ in flats]
        body += [statement for _, statement in flats]
        rows = self.layer.spec.rows
        self.total_rows = named("rows", simt.i32(self.batch) * rows) if self.layer.spec.shared else simt.i32(rows)

    def tile_of(self, named, block, together=1):
        if self.layer.spec.shared:
            self.image = None
            return super().tile_of(named, block, together)
        count = self._row_tiles_of_one
        self.image = named("image", simt.div(block, count * self.column_tiles))
        inside = named("inside", simt.mod(block, count * self.column_tiles))
        return named("row_tile", simt.mod(inside, count)), named("column_tile", simt.div(inside, count))

    def _first_word(self, rows):
        """Of a product's operand with so many rows, int64; None where there is one for all."""
        return None if self.image is None else simt.wide(self.image) * (rows * self.layer.spec.words)

    # Operands

    def _operands(self, named, row_tile, column_tile):
        shape, spec, self.offset, self.column_tile = self.shape, self.layer.spec, simt.i32(0), column_tile
        self.rows = self.rows_of_threads(named, self.thread, self.threads)
        self.columns = Rows(self, named, self.thread, self.threads, shape.columns, simt.i32(spec.columns), shape.rows * shape.row_words,
                            self.counts_columns, "column_")  # fmt: skip
        self.loaders = [self.rows, self.columns]
        for loader, tile, rows in ((self.rows, row_tile, spec.rows), (self.columns, column_tile, spec.columns)):
            for statement in loader.allocate + loader.begin(tile, self._first_word(rows)):
                named.append(statement)

    def _load_weights(self, body, one, slab, stage, function):
        self.columns.copy(simt.namer(body), self.memory, self._right[one.weights], self.offset, slab, stage, function)

    def _publish(self):
        return super()._publish() + self.columns.publish(self.memory, self._columns_begin)

    # Results

    def _row(self, row):
        place, counted, body = super()._row(row)
        if self.image is not None:
            number = simt.namer(body)("row", simt.wide(self.image) * self.layer.spec.rows + place.pixel.row)
            place.pixel = replace(place.pixel, row=number)
        return place, counted, body

    def _constants(self, named, product, place, word):
        """Where the sums of a thread's columns begin in shared memory, int32."""
        return named("constants", (word * 32 + self._bit()) - self.column_tile * self.shape.columns + self._columns_begin)

    def constant_at(self, index):
        return self.column_count(index) + self.constant if self.counts_columns else simt.i32(self.constant)

    def column_count(self, index):
        """What was counted of a column, int32."""
        return tirx.reinterpret("int32", simt.at(self.memory, index))
