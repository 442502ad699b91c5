"""Products of 8-bit integers and their sums, by instruction set: the inner loops of :mod:`.int8_kernel`.

All engines compute a tile of flat pixels times the 32 output channels of a block, int32, into ``kernel.results``, ``[pixels, 32]``.

``Tiles`` (AMX), see :mod:`.int8_tiles`
    TDPBSSD adds the products of 16 pixels x 64 channels with 64 channels x 16 outputs to 16 x 16 sums, in 16 cycles.
``Vnni`` (AVX-512 VNNI)
    VPDPBUSD adds four products of unsigned with signed bytes to each of 16 sums.
``Pairs`` (SSSE3, AVX2, AVX-512BW)
    PMADDUBSW adds two products of unsigned with signed bytes to 16 bits, saturated: where values are large enough for that, both are
    widened to 16 bits first and PMADDWD is used.

Vector instructions want unsigned data. Values that may be negative are stored with an ``offset`` that makes them so, zero padding included,
and the sums start at minus the offset times the sum of the weights:  sum (x + b) w - b sum w = sum x w.
"""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import tir as T
from bnntvm.schedules.int8_layout import BLOCK, QUAD
from bnntvm.schedules.int8_tiles import TILE_BYTES, Tiles
from bnntvm.spec import Digits


def of(kernel):
    """The engine of a kernel for its instruction-set level."""
    if kernel.isa.products == "tiles":
        return Tiles(kernel, "uint8" if data_range(kernel.spec)[1] > 127 else "int8")
    if kernel.isa.products in ("matrix", "dot", "long"):
        from bnntvm.schedules import int8_engines_neon

        return int8_engines_neon.of(kernel)
    return {"vnni": Vnni, "pairs": Pairs}[kernel.isa.products](kernel)


def step_bytes(isa):
    """Bytes of a run that the level's engine reads at a time."""
    return TILE_BYTES if isa.products == "tiles" else QUAD


def data_range(spec):
    """(least, greatest) value of the data."""
    if isinstance(spec.data, Digits):
        return spec.data.low, spec.data.high
    return (-128, 127) if spec.data == "int8" else (0, 255)


def weight_range(spec):
    """(least, greatest) value of the weights."""
    return (-128, 127) if spec.weights == "int8" else (spec.weights.low, spec.weights.high)


class Vnni:
    """A register tile of sums, ``cover`` pixels by the vectors of a block or half of it. Weights: ``[runs, quads, vectors, lanes x 4]``."""

    #: Largest number of vectors in the register tile.
    most_vectors = 2

    def __init__(self, kernel):
        self.kernel, self.layout, self.lanes, self.vectors = kernel, kernel.layout, kernel.lanes, kernel.vectors
        self.offset = max(0, -data_range(kernel.spec)[0])
        self.data_type = "uint8"
        self.size = self.lanes * QUAD
        self.weight_bytes = len(self.layout.runs) * self.layout.quads * self.vectors * self.size

    def order(self, quads):
        """Vectors ``[blocks, runs, quads, vectors, bytes]`` in the order of the kernel, ``[blocks, vectors, bytes]``."""
        return quads.reshape(quads.shape[0], -1, quads.shape[-1])

    pad = order

    def expand(self, block):
        """Statements that make bytes of the bits of a block's weights, and sum them if the data have an offset."""
        kernel, digits = self.kernel, self.kernel.spec.weights
        if digits == "int8":
            self.bytes, self.row = kernel.weights, [block]
            return self.sum_weights()
        self.bytes, allocation = T.memory("bytes", self.weight_bytes, "int8")
        self.row, source = [], kernel.mask_bytes * len(digits.coefficients)

        def vector(i):
            return T.store_vector(self.bytes, [i * self.size], kernel.unpacked(block, i * source))

        return [*allocation, T.for_("w", self.weight_bytes // self.size, vector), self.sum_weights()]

    def sum_weights(self):
        """Statements that prepare the start of the sums."""
        if not self.offset:
            return []
        self.bias, allocate = T.scratch("bias", (BLOCK,), "int32")
        sums = T.Registers("sums", self.vectors, "int32", self.lanes)
        ones = tirx.reinterpret(T.vector_type("int32", self.lanes), T.splat(1, "uint8", self.size))

        def quad(i):
            return [sums.set(v, self.dot(sums.get(v), ones, self.weight(i * self.vectors + v), True)) for v in range(self.vectors)]

        store = [
            T.store_vector(self.bias, [v * self.lanes], sums.get(v) * T.splat(-self.offset, "int32", self.lanes))
            for v in range(self.vectors)
        ]
        zero = T.splat(0, "int32", self.lanes)
        return [allocate, *sums.allocate, *sums.fill(zero), T.for_("q", self.weight_bytes // self.size // self.vectors, quad), *store]

    def weight(self, number):
        """Vector ``number`` of a block's weights, as int32 lanes."""
        loaded = T.load_vector(self.bytes, [*self.row, number * self.size], self.size)
        return tirx.reinterpret(T.vector_type("int32", self.lanes), loaded)

    def tables(self):
        """Statements that note the distances of the runs from a flat pixel."""
        self.data_at, allocation = T.memory("data_at", len(self.layout.runs), "int64")
        return [allocation, [T.store(self.data_at, T.i64(value), i) for i, value in enumerate(self.layout.offsets)]]

    def products(self, first):
        kernel, layout, pixels = self.kernel, self.layout, self.layout.cover
        group = min(self.most_vectors, self.vectors)
        at, bind = T.bind("at", first * layout.pixel)

        def part(number):
            sums = T.Registers("sums", pixels * group, "int32", self.lanes)

            def start(v):
                if not self.offset:
                    return T.splat(0, "int32", self.lanes)
                return T.load_vector(self.bias, [(number * group + v) * self.lanes], self.lanes)

            def quad(run, data_at, k):
                body, weights = [], []
                for v in range(group):
                    value, bind_weight = T.bind("w", self.weight((run * layout.quads + k) * self.vectors + number * group + v))
                    weights.append(value)
                    body.append(bind_weight)
                for p in range(pixels):
                    where = data_at + p * layout.pixel + k * QUAD
                    data = tirx.reinterpret("int32", T.load_vector(kernel.scratch, [where], QUAD))
                    data, bind_data = T.bind("x", T.broadcast(data, self.lanes))
                    body += [
                        bind_data,
                        *(sums.set(p * group + v, self.dot(sums.get(p * group + v), data, weights[v])) for v in range(group)),
                    ]
                return body

            def one(run):
                data_at, bind_data = T.bind("data", at + T.load(self.data_at, run))
                return [bind_data, T.for_("q", layout.quads, lambda k: quad(run, data_at, k))]

            loops = T.for_("run", len(layout.runs), one)
            keep = [T.store_vector(kernel.results, [p * BLOCK + (number * group + v) * self.lanes], sums.get(p * group + v))
                    for p in range(pixels) for v in range(group)]  # fmt: skip
            return [sums.allocate, [sums.set(p * group + v, start(v)) for p in range(pixels) for v in range(group)], loops, keep]

        return [bind, T.for_("part", self.vectors // group, part)]

    def dot(self, sums, data, weights, ones=False):  # noqa: ARG002
        """``sums`` plus the products of four unsigned bytes of ``data`` with four signed of ``weights``, all int32 lanes."""
        kind = T.vector_type("int8", self.size)
        data, weights = tirx.reinterpret(kind, data), tirx.reinterpret(kind, weights)
        return T.intrinsic("llvm.x86.avx512.vpdpbusd.512", sums, data, weights)


class Pairs(Vnni):
    """The same with multiplications of pairs."""

    _NAMES = {
        4: ("llvm.x86.ssse3.pmadd.ub.sw.128", "llvm.x86.sse2.pmadd.wd"),
        8: ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
        16: ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
    }

    def __init__(self, kernel):
        super().__init__(kernel)
        low, high = data_range(kernel.spec)
        least, most = weight_range(kernel.spec)
        self.narrow = 2 * (high + self.offset) * max(most, -least) < 2**15

    def dot(self, sums, data, weights, ones=False):
        narrow, wide = self._NAMES[self.lanes]
        bytes_, shorts = T.vector_type("int8", self.size), T.vector_type("int16", 2 * self.lanes)

        def pair(a, b):
            return tirx.call_llvm_pure_intrin(T.dtype_of(sums), wide, a, b)

        if self.narrow or ones:
            products = tirx.call_llvm_pure_intrin(shorts, narrow, tirx.reinterpret(bytes_, data), tirx.reinterpret(bytes_, weights))
            return sums + pair(products, T.splat(1, "int16", 2 * self.lanes))
        eight = T.splat(8, "int16", 2 * self.lanes)
        data, weights = tirx.reinterpret(shorts, data), tirx.reinterpret(shorts, weights)
        even = pair(data & T.splat(255, "int16", 2 * self.lanes), (weights << eight) >> eight)
        unsigned = tirx.reinterpret(T.vector_type("uint16", 2 * self.lanes), data) >> T.splat(8, "uint16", 2 * self.lanes)
        return sums + even + pair(tirx.reinterpret(shorts, unsigned), weights >> eight)
