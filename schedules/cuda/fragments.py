"""Results of tensor cores: what a thread does with its accumulators.

``mma`` and ``wgmma`` give lane ``4 g + t`` of a warp the columns ``2 t`` and ``2 t + 1`` of every eight, of the rows g, g + 8, ... of every
instruction: eight channels of each 32-bit word of the result, the other 24 in three neighbours.
"""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import simt
from bnntvm.schedules.cuda.cores import Place
from bnntvm.schedules.cuda.epilogue import Quad, Value
from bnntvm.schedules.cuda.tiles import TileKernel
from bnntvm.spec import WORD_BITS, words


class FragmentKernel(TileKernel):
    """Accumulators, totals of several passes, and their way to memory.

    Subclasses set ``memory`` (shared), ``lane``, ``warp_row`` and ``warp_column`` (where the warp's tile begins in the block's), and
    ``sums_begin`` (where the sums of rows begin in shared memory).
    """

    def pieces(self, row_pieces, column_pieces, rows):
        """Instructions along the rows and columns of a warp's tile; ``rows`` of one instruction."""
        self.row_pieces, self.column_pieces, self.piece_rows = row_pieces, column_pieces, rows
        self.sums_of_thread = row_pieces * column_pieces * rows // 4

    def number(self, i, j, e):
        """Number of accumulator ``e`` of an instruction."""
        return (i * self.column_pieces + j) * (self.piece_rows // 4) + e

    def group_offset(self, column_tile):
        """Where the tile's group begins in a pixel, int32."""
        return simt.i32(0) if self.layer.groups == 1 else simt.div(column_tile, self.shape.column_tiles) * self.layer.group_words

    def weight_base(self, column_tile):
        """Where the tile's weights begin, int64; slabs follow ``packed_slab_words`` apart."""
        shape = self.shape
        if shape.packed_columns == shape.columns:
            return simt.wide(column_tile) * shape.packed_tile_words
        parts, tiles = shape.packed_columns // shape.columns, -(-self.layer.outputs // shape.packed_columns)
        group, inside = simt.div(column_tile, shape.column_tiles), simt.mod(column_tile, shape.column_tiles)
        packed_tile, part = group * tiles + simt.div(inside, parts), simt.mod(inside, parts)
        return simt.wide(packed_tile) * shape.packed_tile_words + simt.wide(part * shape.slab_weight_words)

    def tile_results(self, named, row_tile, column_tile):
        """Which words of channels the warp makes."""
        shape, self.row_tile = self.shape, row_tile
        group, inside = simt.div(column_tile, shape.column_tiles), simt.mod(column_tile, shape.column_tiles)
        first = group * words(self.layer.outputs) + simt.div(inside * shape.columns + self.warp_column, 32)
        self.first_word, self.word_limit = named("first_word", first), named("word_limit", (group + 1) * words(self.layer.outputs))

    def allocate_sums(self):
        """Registers."""
        kinds = [
            ("sums", "int32", True),
            ("totals", "int32", len(self.passes) > 1),
            ("results", "float32", self.layer.scaled and self.emits),
        ]
        body = []
        for name, dtype, wanted in kinds:
            if wanted:
                array, allocate = simt.registers(name, self.sums_of_thread, dtype)
                setattr(self, name, array)
                body.append(allocate)
        return body

    def fold(self, one, first):
        """Add a pass to the totals, where there are several."""
        if len(self.passes) == 1:
            return []
        body = []
        for i in range(self.sums_of_thread):
            value = simt.at(self.sums, i) * one.factor
            body.append(simt.put(self.totals, i, value if first else simt.at(self.totals, i) + value))
        return body

    @property
    def _integers(self):
        """``(array, what its elements count)``."""
        return (self.totals, 1) if len(self.passes) > 1 else (self.sums, self.passes[0].factor)

    def _cells(self):
        """``(row piece, half, row in the block)`` of the rows of a thread."""
        quad = simt.div(self.lane, 4)
        for i in range(self.row_pieces):
            for half in range(self.piece_rows // 8):
                yield i, half, self.warp_row + (i * self.piece_rows + half * 8) + quad

    def _bit(self):
        """The first of a thread's channels in each word; the others are :meth:`_place` further on."""
        return tirx.bitwise_and(self.lane, simt.i32(3)) * 2

    @staticmethod
    def _place(j, e):
        """Of accumulator ``e`` of a row in column piece ``j``."""
        return 8 * (j % 4) + e

    def _row(self, row):
        """``(place, sum of the data's popcounts, statements)`` of a row of the block."""
        body = []
        named = simt.namer(body)
        place = Place(self.layer, named, self.row_tile * self.shape.rows + row, self.total_rows)
        counted = named("counted", tirx.reinterpret("int32", simt.at(self.memory, row + self.sums_begin))) if self.counts_rows else None
        return place, counted, body

    def read_rows(self):
        """The rows of a thread, and statements that look them up."""
        found, body = [], []
        for i, half, row in self._cells():
            place, counted, statements = self._row(row)
            body += statements
            found.append((i, half, place, counted))
        return found, body

    def _constants(self, named, product, place, word):
        """Where the constants of a thread's channels of a word begin, for a pixel: int64."""
        last = simt.i32(words(self.layer.channels) - 1)
        word = tirx.min(word, last) if self.layer.outputs % self.shape.columns else word
        return named("constants", simt.wide(self.tables.row(product, place)) + simt.wide(word * WORD_BITS + self._bit()))

    def constant_at(self, index):
        """What the products of a channel do not count, int32; ``index`` from :meth:`_constants`."""
        return self.tables.at(index)

    def _anchor(self, begin, counted, value, scope, offset):
        """The dot product from an accumulator; ``begin`` of :meth:`_constants`, ``scope`` keeps constants of all pixels."""
        if self.layer.class_count > 1:
            constant = self.constant_at(begin + offset)
        else:
            if offset not in scope:
                scope[offset], bind = simt.bind("constant", self.constant_at(begin + offset))
                scope["named"].append(bind)
            constant = scope[offset]
        return value + constant if counted is None else value + (constant + counted)

    def emit(self, rows=None):
        """Epilogues of all words of a thread; ``rows`` of :meth:`read_rows`, otherwise they are looked up for each word."""
        body, (sums, factor) = [], (self.results, None) if self.layer.scaled else self._integers
        for w in range(self.column_pieces // 4):
            word, bind = simt.bind("word", self.first_word + w)
            inner, scope = [bind], {}
            named = simt.namer(inner)
            constants = {"named": named}
            exists = word < self.word_limit if self.layer.outputs % self.shape.columns else None
            for cell in rows if rows is not None else self._cells():
                i, half, place, counted = cell if rows is not None else (*cell[:2], None, None)
                if rows is None:
                    place, counted, statements = self._row(cell[2])
                    inner += statements
                begin = self._constants(named, 0, place, word) if factor is not None else None
                values = []
                for j in range(4 * w, 4 * w + 4):
                    for e in range(2):
                        value, offset = simt.at(sums, self.number(i, j, 2 * half + e)), self._place(j, e)
                        if factor is not None:
                            value = self._anchor(begin, counted, value * factor, constants, offset)
                        values.append(Value(value, self._bit(), offset))
                inner += self.emitter.emit(values, place.pixel, word, Quad(self.lane), scope, exists)
            body.append(simt.apart(inner) if rows is None and self._words_apart else tir.seq(inner))
        return body

    @property
    def _words_apart(self):
        """Whether the compiler is kept from preparing all words at once, while sums fill most registers.

        Bits need all channels of a word together; of images it would have to find the pixels again.
        """
        bits = any(output.kind == "bits" for output in self.emitter.epilogue.outputs)
        return bits and self.layer.is_dense and self.column_pieces > 4

    def scale(self, product):
        """Add a product of planes, scaled, to the float results."""
        body, padded = [], words(self.layer.channels) * WORD_BITS
        named, (sums, factor) = simt.namer(body), self._integers
        for i, half, row in self._cells():
            place, counted, statements = self._row(row)
            body += statements
            for j in range(self.column_pieces):
                word = tirx.min(self.first_word + j // 4, simt.i32(words(self.layer.channels) - 1))
                begin = self._constants(named, product, place, word)
                for e in range(2):
                    k, offset = self.number(i, j, 2 * half + e), self._place(j, e)
                    value = self._anchor(begin, counted, simt.at(sums, k) * factor, {"named": named}, offset)
                    scale = simt.at(self._scales[0], word * WORD_BITS + self._bit() + (offset + product * padded))
                    value = simt.call("bnn_mul", tirx.Cast("float32", value), scale)
                    value = value if product == 0 else simt.call("bnn_add", simt.at(self.results, k), value)
                    body.append(simt.put(self.results, k, value))
        return body
