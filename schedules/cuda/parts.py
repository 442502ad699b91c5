"""Layers of bits with K in parts that meet in the device's memory: for few tiles and a long K, on any architecture.

Two kernels follow one another. The first is that of :mod:`.mma` (or :mod:`.products`), with ``split`` blocks for a tile, each of which
walks along its own slabs and leaves what it has counted, rows and columns included, in a *workspace*:

    int32[products, parts, rows, words(channels) * 32]

The second adds the parts up, warp by warp a word of channels of a pixel, and does the rest: constants, scales, the epilogue. Sums are
integers, so nothing depends on who comes first, and no word is written twice.

A last block that adds up what the others have left, as a counter tells it, would save the second launch. It would need a counter that is 0
before the first run, and after a run that did not end; and all that is behind the sums would be done by as few blocks as there are
tiles. The second kernel spreads it over the device, and a recorded graph of two kernels can be replayed as it stands.
"""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import cores, simt
from bnntvm.schedules.cuda.mma import MmaKernel
from bnntvm.schedules.cuda.products import ProductKernel
from bnntvm.spec import WORD_BITS, words


def padded(layer):
    """Columns of the workspace."""
    return words(layer.channels) * WORD_BITS


def workspace(layer, parts, rows):
    """The workspace, for ``rows`` rows at most: int32, one run of elements."""
    return tir.buffer("parts", (len(layer.products) * parts * rows * padded(layer),), "int32")


class _Leaves:
    """What :class:`.mma.MmaKernel` does otherwise where parts meet in memory. ``limit``: rows of the workspace."""

    emits = False

    def __init__(self, *args, limit=0):
        super().__init__(*args)
        self.limit, self.cluster = limit, 1

    def function(self):
        """Both kernels."""
        return simt.both(super().function(), _Sums(self).function())

    def _finish(self, number, sums):
        """Leave the sums of one product, and what was counted beside it."""
        body = []
        for i, half, row in self._cells():
            place, counted, statements = self._row(row)
            named, inner = simt.namer(statements), []
            first = named("first", self._place_of(number, self.rank, place.pixel.row))
            for w in range(self.column_pieces // 4):
                store = tir.seq(self._leave_word(number, i, half, w, place, counted, first))
                whole = self.layer.outputs % self.shape.columns == 0
                inner.append(store if whole else tirx.IfThenElse(self.first_word + w < self.word_limit, store, None))
            body += [*statements, tirx.IfThenElse(place.exists, tir.seq(inner), None)]
        return [self._where_first(tir.seq(body))]

    def _leave_word(self, number, i, half, w, place, counted, first):
        """The thread's eight sums of a word, pair by pair."""
        body, (array, factor) = [], self._integers
        named = simt.namer(body)
        word = named("word", self.first_word + w)
        begin = self._constants(named, number, place, word) if self.counts_columns else None
        for j in range(4 * w, 4 * w + 4):
            pair = []
            for e in range(2):
                value = simt.at(array, self.number(i, j, 2 * half + e)) * factor
                value = value if counted is None else value + counted
                pair.append(value if begin is None else value + self.column_count(begin + self._place(j, e)))
            where = first + simt.wide(word * WORD_BITS + self._bit() + self._place(j, 0))
            body.append(simt.do("bnn_store2_int32", simt.pointer(self.workspace, where), *pair))
        return body

    def _place_of(self, number, part, row):
        """Where a row of a part of a product begins in the workspace, int64."""
        return (simt.wide(part + number * self.split) * self.limit + row) * padded(self.layer)

    def _results(self):
        return []


class Parts(_Leaves, MmaKernel):
    """A layer: parameters as of :class:`.mma.MmaKernel`, and ``limit``."""


class ProductParts(_Leaves, ProductKernel):
    """A product of activations."""


class _Sums(cores.Kernel):
    """The second kernel, which reads what ``kernel`` leaves where that of CUDA cores counts."""

    def __init__(self, kernel):
        self.kernel, self.layer, self.pixels, self.name = kernel, kernel.layer, 1, kernel.name
        self.batch, self.planes, self.scales, self.emitter = kernel.batch, [], kernel.scales, kernel.emitter

    @property
    def params(self):
        return self.kernel.params

    def _rows(self):
        return self.kernel.all_rows()

    def _blocks(self):
        return simt.ceil_div(self._rows() * words(self.layer.channels), cores.WARPS)

    def _own(self, named, block, thread):
        number = named("number", block * cores.WARPS + simt.div(thread, simt.WARP))
        count = words(self.layer.channels)
        return named("word", simt.mod(number, count)), named("first", simt.div(number, count))

    def _group(self, named):
        return None, None

    def _taps(self, number, product, places):
        """All parts of the lane's channel."""
        body, kernel = [], self.kernel
        for p, place in enumerate(places):
            first = simt.namer(body)("first", kernel._place_of(number, simt.i32(0), place.pixel.row))
            first, total = first + simt.wide(self.word * WORD_BITS + self.lane), None
            for part in range(kernel.split):
                one = simt.at(kernel.workspace, first + part * (kernel.limit * padded(self.layer)))
                total = one if total is None else total + one
            body.append(simt.put(self.sums, p, total))
        return tir.seq(body)

    def _constant(self, number, place):
        return self.kernel.constant_of(number, place, self.word * WORD_BITS + self.lane)
