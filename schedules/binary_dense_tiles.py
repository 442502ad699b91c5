"""Dense layers of bit planes on tile registers (AMX), for 22 rows of every 32; fewer are counted (:mod:`.binary_dense`).

``int32[M, N] = data[M, K] x weights[N, K]``, as products of bytes. A group of 32 rows becomes bytes once, 64 bits of a row are a row of the
left operand. The weights, which stay in the order of the kernel that counts, become bytes again for every group: a nibble of 16 channels is
looked up in a register (VPERMD) and gives four features of each, a row of the right operand. Vector units do that some steps ahead, and
store the results of the block of channels before, while tiles are multiplied: two by two, each loaded once for two products.
"""

from __future__ import annotations

from tvm import tirx

from bnntvm import spec as specs
from bnntvm.schedules import tir
from bnntvm.schedules.binary_dense import Pairs
from bnntvm.schedules.int8_tiles import TILE, TILE_BYTES, configure, tile
from bnntvm.schedules.tile_product import LEAD, RING, nibble_bytes

#: ``Schedule.adder`` of this way to count.
ADDER = "tiles"
#: Rows of a group, and the number of them that takes as long when it is counted.
_ROWS, _WORTH = 2 * TILE, 22
_SIZE = TILE * TILE_BYTES
#: Parallel tasks.
_TASKS = 8


def claims(spec, isa):
    """Whether there is such a kernel: a block of channels is one word of them, a step 64 features."""
    plain = isinstance(spec, specs.BinaryDense) and not spec.unipolar and not spec.zeros
    return isa.products == "tiles" and plain and spec.in_features % TILE_BYTES == 0


def _shared(name, total, body):
    """``body(first, number)`` for some parallel tasks that share ``total`` steps."""
    each = -(-total // min(_TASKS, total))
    return tir.parallel(name, -(-total // each), lambda i: body(i * each, tirx.min(tir.i64(each), total - i * each)))


class TileKernel(Pairs):
    """Builds one PrimFunc."""

    def body(self):
        self.steps = self.depth // 2
        groups = tirx.floordiv(self.rows + (_ROWS - 1), tir.i64(_ROWS))
        tiles = tir.for_("group", groups, self._group)
        return tir.when(groups * _WORTH <= self.rows, tiles, super().body())

    def _group(self, number):
        """The bytes of a group of rows, then the blocks of channels, both shared among threads."""
        self.left, left = tir.memory("left", self.steps * 2 * _SIZE, "int8")
        first, named = tir.bind("first", number * _ROWS)

        def steps(begin, count):
            return tir.for_("step", count, lambda k: self._bytes(first, begin + k))

        return tir.seq(left, named, _shared("part", self.steps, steps),
                       _shared("task", self.blocks, lambda begin, count: self._task(first, begin, count)))  # fmt: skip

    def _bytes(self, first, step):
        """Statements that write 64 features of a group; behind the last row come copies of it."""

        def row(r):
            at = tirx.min(first + r, self.rows - 1)
            bits = tirx.reinterpret("uint64", tir.load_vector(self.data, [at, step * 2], 2))
            return tir.store_vector(self.left, [step * (2 * _SIZE) + r * TILE_BYTES], tir.digits([bits], 1, (-2,)))

        return tir.for_("row", _ROWS, row)

    def _task(self, first, begin, count):
        """``count`` blocks of channels from ``begin`` on."""
        self.right, right = tir.memory("right", RING * 2 * _SIZE, "int8")
        self.results, results = tir.memory("results", _ROWS * self.width, "int32")
        last, bind_last = tir.bind("last", begin + count - 1)
        ahead = [self._unpack(tirx.min(begin + k // self.steps, last), tir.i64(k % self.steps), tir.i64(k)) for k in range(LEAD)]
        drain = tir.for_("row", _ROWS, lambda row: self._result(first, row, last))
        jobs = tir.for_("job", count, lambda number: self._job(first, begin, number, last))
        return tir.seq(right, results, bind_last, configure(TILE), ahead, jobs, drain, tile("release"))

    def _job(self, first, begin, number, last):
        """A group of rows times a block of channels."""
        block, named = tir.bind("block", begin + number)
        done, bind_done = tir.bind("done", number * self.steps)
        share = -(-_ROWS // self.steps)

        def row(step, i):
            r = step * share + i
            result = self._result(first, r, block - 1)
            return tir.when(r < _ROWS, result) if share * self.steps != _ROWS else result

        def step(k):
            at, bind = tir.bind("right", tirx.floormod(done + k, tir.i64(RING)) * (2 * _SIZE))
            later, bind_later = tir.bind("later", k + LEAD)
            ahead = tirx.floordiv(later, tir.i64(self.steps))
            loads = [tile("load", 4 + i, self.left, [(k * 2 + i) * _SIZE], TILE_BYTES) for i in range(2)]
            loads += [tile("load", 6 + j, self.right, [at + j * _SIZE], TILE_BYTES) for j in range(2)]
            products = [tile("dot_ssd", i * 2 + j, 4 + i, 6 + j) for i in range(2) for j in range(2)]
            beside = tir.when(number > 0, tir.for_("row", share, lambda i: row(k, i)))
            unpack = self._unpack(tirx.min(block + ahead, last), later - ahead * self.steps, done + later)
            return [bind, bind_later, loads, products, beside, unpack]

        places = [i * TILE * self.width + j * TILE for i in range(2) for j in range(2)]
        keep = [tile("store", n, self.results, [place], 4 * self.width) for n, place in enumerate(places)]
        zero = [tile("zero", n) for n in range(4)]
        return [named, bind_done, zero, tir.for_("step", tir.runtime(self.steps), step), keep]

    def _unpack(self, block, step, number):
        """Statements that write the bytes of 64 features of a block, the task's ``number``-th; words come in pairs, see :class:`.Pairs`."""
        to, body = tir.bind("to", tirx.floormod(number, tir.i64(RING)) * (2 * _SIZE))
        body = [body]
        for half in range(2):
            low, bind_low = tir.bind("w", tir.load_vector(self.weights, [block, step * 2, half * TILE], TILE))
            high, bind_high = tir.bind("w", tir.load_vector(self.weights, [block, step * 2 + 1, half * TILE], TILE) ^ low)
            body += [bind_low, bind_high]
            for which, word in enumerate((low, high)):
                for quad in range(specs.WORD_BITS // 4):
                    value = nibble_bytes(word >> tir.splat(quad * 4, "uint32", TILE), 1, -1)
                    place = to + (half * _SIZE + (which * 8 + quad) * TILE_BYTES)
                    body.append(tir.store_vector(self.right, [place], tirx.reinterpret(tir.vector_type("int8", TILE_BYTES), value)))
        return body

    def _result(self, first, row, block):
        """The epilogue of a row, if there is one."""
        values = [tir.load_vector(self.results, [row * self.width + v * self.lanes], self.lanes) for v in range(self.vectors)]
        at, named = tir.bind("row", first + row)
        return [named, tir.when(at < self.rows, self.emitter.emit(values, (at,), block * self.width, {}))]
