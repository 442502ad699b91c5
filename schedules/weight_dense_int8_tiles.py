"""Dense layers of 8-bit data and packed weights on tile registers (AMX), for sixteen rows and more.

TDPBSUD adds the products of 16 rows x 64 features, signed bytes, with 64 features x 16 output channels, unsigned bytes, to 16 x 16 sums.
A field of a vector of packed weights is a row of the second: 16 output channels, four neighbouring features each. The tile is unpacked one
step ahead, in vector registers beside the products, and multiplied with up to four tiles of data.

Products with what lies in the second tile behind the last feature are 0, because the data are.
"""

from __future__ import annotations

from . import tir
from .int8_tiles import TILE, TILE_BYTES, configure, tile
from .weight_dense_int8 import Kernel

#: Registers: sums, two of data in turn, weights.
_SUMS, _DATA, _WEIGHTS = 4, 4, 6
#: Rows of a task, where there are several tasks: the weights are unpacked once for them.
_TASK = _SUMS * TILE


class TileKernel(Kernel):
    """Builds one PrimFunc; fewer rows than a tile has are left to the vector instructions."""

    def body(self):
        few = super().body()
        whole = -(-self.depth // TILE_BYTES)
        self.pitch = (whole | 1) * TILE_BYTES  # an odd number of lines: the rows of a tile lie in sixteen sets of the cache
        self.depth = whole * TILE_BYTES
        blocks = tir.when(self.rows < 2 * _TASK, self._blocks(), self._groups())
        return tir.when(self.rows < TILE, few, blocks)

    def _blocks(self):
        """Threads share the blocks of output channels."""
        prepare = self._prepare(self.rows, tir.i64(0))

        def block(number):
            def groups(tiles):
                height = tiles * TILE

                def group(i):
                    own, bound = tir.bind("own", tir.tirx.min(i * height, self.rows - height))
                    return [bound, self._group(tiles, number, tir.i64(0), own)]

                return tir.for_("group", tir.tirx.floordiv(self.rows + (height - 1), tir.i64(height)), group)

            by_height = tir.when(self.rows < 2 * TILE, groups(1), tir.when(self.rows < _TASK, groups(2), groups(_SUMS)))
            return tir.seq(configure(TILE), by_height, tile("release"))

        return [prepare, tir.parallel("block", self.blocks, block)]

    def _groups(self):
        """Threads share the rows."""

        def task(number):
            begin, bound = tir.bind("begin", tir.tirx.min(number * _TASK, self.rows - _TASK))
            prepare = self._prepare(tir.i64(_TASK), begin)
            blocks = tir.for_("block", self.blocks, lambda block: self._group(_SUMS, block, begin, tir.i64(0)))
            return tir.seq(bound, prepare, configure(TILE), blocks, tile("release"))

        return tir.parallel("task", tir.tirx.floordiv(self.rows + (_TASK - 1), tir.i64(_TASK)), task)

    def _group(self, tiles, block, begin, own):
        """``tiles`` tiles of rows from ``begin + own`` on by a block of output channels."""
        self.unpacked, allocate = tir.memory("unpacked", 2 * TILE * TILE_BYTES, "uint8")
        results, allocate_results = tir.memory("results", tiles * TILE * self.size, "int32")

        def column(n):
            return [
                [tile("zero", m) for m in range(tiles)],
                self._unpack(block, n, tir.i64(0)),
                tir.for_("k", self.depth // TILE_BYTES, lambda k: self._step(tiles, block, n, own, k)),
                [tile("store", m, results, [m * TILE * self.size + n * TILE], 4 * self.size) for m in range(tiles)],
            ]

        def row(r):
            total, bound = tir.bind("total", tir.broadcast(tir.load(self.totals, own + r), self.lanes))

            def value(_, v):
                return self._dot_product(tir.load_vector(results, [r * self.size + v * self.lanes], self.lanes), total)

            return [bound, self._outputs(1, block, begin + own + r, value)]

        return tir.seq(allocate, allocate_results, tir.for_("n", self.size // TILE, column), tir.for_("row", tiles * TILE, row))

    def _step(self, tiles, block, n, own, k):
        """64 features of all rows."""
        # A tile is not loaded from stores that are under way. The last one is unpacked twice.
        ahead = self._unpack(block, n, k + 1)
        body = [ahead, tile("load", _WEIGHTS, self.unpacked, [k % 2 * (TILE * TILE_BYTES)], TILE_BYTES)]
        for m in range(tiles):
            data, at = _DATA + m % 2, (own + m * TILE) * self.pitch + k * TILE_BYTES
            body += [tile("load", data, self.bytes, [at], self.pitch), tile("dot_sud", m, data, _WEIGHTS)]
        return body

    def _unpack(self, block, n, k):
        """Statements that write the codes of 64 features and 16 output channels as bytes."""
        bits, words, body = self.spec.coding.planes, TILE // self.fields, []
        octets = tir.vector_type("uint8", TILE_BYTES)
        for word in range(words):
            step = tir.tirx.min(k * words + word, tir.i64(self.steps - 1))
            loaded, bound = tir.bind("w", tir.load_vector(self.weights, [block, step, n * TILE], self.lanes))
            body.append(bound)
            for f in range(self.fields):
                shifted = loaded >> tir.splat(bits * f, "uint32", self.lanes) if f else loaded
                to = k % 2 * (TILE * TILE_BYTES) + (word * self.fields + f) * TILE_BYTES
                body.append(tir.store_vector(self.unpacked, [to], tir.tirx.reinterpret(octets, shifted & self._mask())))
        return body
