"""Products of 8-bit integers and their sums, by instruction set: the inner loops of :mod:`.int8_kernel`.

All engines compute a tile of flat pixels times the 32 output channels of a block, int32, into ``kernel.results``, ``[pixels, 32]``.

``Tiles`` (AMX)
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
from bnntvm.spec import Digits

TILE = 16  #: rows of a tile register
TILE_BYTES = 64  #: bytes of a row


def of(isa):
    """The engine of an instruction-set level."""
    if isa.products in ("dot", "long"):
        from bnntvm.schedules import int8_engines_neon

        return {"dot": int8_engines_neon.Dot, "long": int8_engines_neon.Long}[isa.products]
    return {"tiles": Tiles, "vnni": Vnni, "pairs": Pairs}[isa.products]


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


class Tiles:
    """Register tiles of AMX: four of sums, two of data in turn, one of weights.

    Weights: ``[runs, steps, 2, 16 quads, 16 outputs x 4 channels]``.
    """

    #: Whether tiles are multiplied beside what vectors do.
    overlaps = True

    def __init__(self, kernel):
        self.kernel, self.layout = kernel, kernel.layout
        self.offset = 0
        self.data_type = "uint8" if data_range(kernel.spec)[1] > 127 else "int8"
        self.weight_bytes = len(self.layout.runs) * self.layout.steps * 2 * TILE * TILE_BYTES

    def start(self):
        """Statements at the start of a task."""
        return tile("config")

    def finish(self):
        """Statements at the end of a task: the system saves less of a thread that holds no tiles."""
        return tile("release")

    def expand(self, block):
        """Statements that unpack the first weights of a block; the others are unpacked where they are used, beside the products."""
        self.block = block
        if self.kernel.spec.weights == "int8":
            return []
        return self.unpack(T.i64(0))

    @staticmethod
    def order(quads):
        """Vectors ``[blocks, runs, quads, 2, 64]`` in the order of the kernel, ``[blocks, vectors, 64]``."""
        import numpy as np

        blocks, runs, count = quads.shape[:3]
        full = count // TILE * TILE
        parts = [quads[:, :, :full].reshape(blocks, runs, -1, TILE, 2, TILE_BYTES).swapaxes(3, 4), quads[:, :, full:].swapaxes(2, 3)]
        return np.concatenate([p.reshape(blocks, runs, -1, TILE_BYTES) for p in parts], 2).reshape(blocks, -1, TILE_BYTES)

    def pad(self, quads):
        """The same with the zeros of the last step of every run."""
        import numpy as np

        missing = self.layout.steps * TILE - quads.shape[2]
        return self.order(np.pad(quads, ((0, 0), (0, 0), (0, missing), (0, 0), (0, 0))))

    def tables(self):
        """Statements that note, for every step, the distance of its data from a flat pixel, and where its bits begin in a block.

        The bits of the first half of a block's channels come first, then those of the second, then the first step once more: what is
        unpacked ahead of the last step of a tile of pixels belongs to the next.
        """
        layout, steps = self.layout, self.layout.steps
        self.data_at, data_at = T.memory("data_at", self.total, "int64")
        fill = [
            T.for_("k", T.runtime(steps), lambda k, r=run, o=offset: T.store(self.data_at, o + k * TILE_BYTES, r * steps + k))
            for run, offset in enumerate(layout.offsets)
        ]
        if self.kernel.spec.weights == "int8":
            return [data_at, fill]
        self.bits_at, bits_at = T.memory("bits_at", 2 * self.total + 1, "int64")
        full, rest = divmod(layout.quads, TILE)
        fill.append(T.store(self.bits_at, T.i64(0), 2 * self.total))
        for run in range(len(layout.runs)):
            first, begin = run * steps, run * layout.quads * 2
            for n in range(2):
                at, place = begin + n * TILE, first + n * self.total
                fill.append(
                    T.for_(
                        "k",
                        T.runtime(full),
                        lambda k, a=at, p=place: T.store(self.bits_at, (a + k * (2 * TILE)) * self.source_bytes, p + k),
                    )
                )
                if rest:
                    fill.append(T.store(self.bits_at, T.i64((begin + 2 * TILE * full + n * rest) * self.source_bytes), place + full))
        self.bytes, room = T.memory("bytes", 2 * TILE * TILE_BYTES, "int8")
        return [room, data_at, bits_at, fill]

    @property
    def total(self):
        """Steps of a block."""
        return len(self.layout.runs) * self.layout.steps

    @property
    def source_bytes(self):
        """Bytes of a vector of weights as stored."""
        digits = self.kernel.spec.weights
        return TILE_BYTES if digits == "int8" else self.kernel.mask_bytes * len(digits.coefficients)

    def products(self, first, results=0, beside=None):
        """The tile of flat pixels from ``first`` on, 16 output channels at a time, into ``kernel.results`` from ``results`` on.

        ``beside(number)`` gives statements that vector units execute beside step ``number`` of ``2 * total``.
        """
        kernel, count = self.kernel, self.layout.cover // TILE
        at, bind = T.bind("at", first * self.layout.pixel)

        def half(n):
            return [[tile("zero", m) for m in range(count)],
                    T.for_("step", T.runtime(self.total), lambda step: self.step(n, step, at, beside)),
                    [tile("store", m, kernel.results, [results + (m * BLOCK + n) * TILE], 4 * BLOCK) for m in range(count)]]  # fmt: skip

        return [bind, T.for_("n", T.runtime(2), half)]

    def step(self, n, step, at, beside):
        """One tile of weights times every tile of data. Bits are unpacked one step ahead: a tile is not loaded from stores under way."""
        layout = self.layout
        kind = "dot_usd" if self.data_type == "uint8" else "dot_ssd"
        data, bind = T.bind("data", at + T.load(self.data_at, step))
        if self.kernel.spec.weights == "int8":
            body, source = [bind], (self.kernel.weights, [self.block, (step * 2 + n) * (TILE * TILE_BYTES)])
        else:
            number, bind_number = T.bind("number", n * self.total + step)
            body = [bind, bind_number, self.unpack(number + 1)]
            source = (self.bytes, [number % 2 * (TILE * TILE_BYTES)])
        if beside is not None:
            body.append(beside(n * self.total + step))
        body.append(tile("load", 6, *source, TILE_BYTES))
        for m in range(layout.cover // TILE):
            place = data + m * TILE * layout.pixel
            body += [tile("load", 4 + m % 2, self.kernel.scratch, [place], layout.pixel), tile(kind, m, 4 + m % 2, 6)]
        return body

    def unpack(self, number):
        """Statements that write the weights of a step as bytes; the last step of a run may have fewer than 16 quads."""
        full, rest = divmod(self.layout.quads, TILE)
        at, bind = T.bind("bits", T.load(self.bits_at, number))
        to, bind_to = T.bind("to", number % 2 * (TILE * TILE_BYTES))

        def vectors(quads):
            zero, size = T.splat(0, "int8", TILE_BYTES), self.source_bytes
            made = [self.kernel.unpacked(self.block, at + i * size) for i in range(quads)] + [zero] * (TILE - quads)
            return [T.store_vector(self.bytes, [to + i * TILE_BYTES], one) for i, one in enumerate(made)]

        if not full or not rest:
            return [bind, bind_to, vectors(rest or TILE)]
        return [bind, bind_to, T.when(number % self.layout.steps == T.i64(full), vectors(rest), vectors(TILE))]


_TILE_TEXTS = {
    "zero": "call void @llvm.x86.tilezero(i8 {0})",
    "load": "call void @llvm.x86.tileloadd64(i8 {0}, ptr %p, i64 %stride)",
    "store": "call void @llvm.x86.tilestored64(i8 {0}, ptr %p, i64 %stride)",
    "dot_ssd": "call void @llvm.x86.tdpbssd(i8 {0}, i8 {1}, i8 {2})",
    "dot_usd": "call void @llvm.x86.tdpbusd(i8 {0}, i8 {1}, i8 {2})",
    "dot_sud": "call void @llvm.x86.tdpbsud(i8 {0}, i8 {1}, i8 {2})",
    "config": "call void @llvm.x86.ldtilecfg(ptr @bnn_tile_shapes)",
    "release": "call void @llvm.x86.tilerelease()",
}


def tile(action, *args):
    """A statement on tile registers.

    ``("zero", t)``, ``("load" or "store", t, array, indices, bytes from row to row)``, ``("dot_ssd", sums, data, weights)`` of signed and
    signed bytes, with ``u`` of unsigned ones, ``("config",)``: all eight of 16 rows and 64 bytes, ``("release",)``.
    """
    text = _TILE_TEXTS[action]
    memory_ = action in ("load", "store")
    numbers, rest = (args[:1], args[1:]) if memory_ else (args, ())
    name = "_".join(["bnn_tile", action, *map(str, numbers)])
    params, values = "", []
    if memory_:
        array, indices, stride = rest
        # Not a base and an offset: TVM may narrow an index to 32 bits, and the types would no longer match.
        values = [tirx.address_of(T.load(array, *indices)), T.i64(stride)]
        params = "ptr %p, i64 %stride"
    declare = {"zero": "tilezero(i8 immarg)", "load": "tileloadd64(i8 immarg, ptr, i64)", "store": "tilestored64(i8 immarg, ptr, i64)",
               "dot_ssd": "tdpbssd(i8 immarg, i8 immarg, i8 immarg)", "dot_usd": "tdpbusd(i8 immarg, i8 immarg, i8 immarg)",
               "dot_sud": "tdpbsud(i8 immarg, i8 immarg, i8 immarg)",
               "config": "ldtilecfg(ptr)", "release": "tilerelease()"}[action]  # fmt: skip
    body = f"i32 @{name}({params}) alwaysinline nounwind {{\n  {text.format(*numbers)}\n  ret i32 0\n}}\ndeclare void @llvm.x86.{declare}"
    if action == "config":
        shapes = [1] + [0] * 15 + [TILE_BYTES, 0] * 8 + [0] * 16 + [TILE] * 8 + [0] * 8
        body += f"\n@bnn_tile_shapes = weak_odr hidden constant [64 x i8] [{', '.join(f'i8 {b}' for b in shapes)}], align 64"
    return tirx.Evaluate(T.extern(name, body, "int32", *values))


class Vnni:
    """A register tile of sums, ``cover`` pixels by the vectors of a block or half of it. Weights: ``[runs, quads, vectors, lanes x 4]``."""

    overlaps = False
    #: Largest number of vectors in the register tile.
    most_vectors = 2

    def __init__(self, kernel):
        self.kernel, self.layout, self.lanes, self.vectors = kernel, kernel.layout, kernel.lanes, kernel.vectors
        self.offset = max(0, -data_range(kernel.spec)[0])
        self.data_type = "uint8"
        self.size = self.lanes * QUAD
        self.weight_bytes = len(self.layout.runs) * self.layout.quads * self.vectors * self.size

    def start(self):
        return []

    def finish(self):
        return []

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
