"""Products of 8-bit integers on NEON: the inner loops of :mod:`.int8_kernel` for ARM.

Facts: Arm Architecture Reference Manual, chapter C7: ``sdot`` (by element) adds to each 32-bit lane the products of its four bytes with the
four bytes of one lane of another register; ``smull``, ``smlal`` multiply eight bytes, ``sadalp`` adds neighbours into lanes of twice the
width. All bytes are signed: data from 0 to 255 are stored with an ``offset`` of -128, see :mod:`.int8_engines`.

``Dot`` (dotprod)
    Sixteen bytes of a pixel are four steps, one lane each, so that a tile of p pixels and v vectors takes p + 4 v loads for 4 p v products.
``Matrix`` (i8mm)
    ``smmla`` multiplies eight bytes of two pixels with those of two outputs, twice the work of sdot; for runs of whole eights.
``Long``
    The products of two quads have 16 bits together where they fit, and go to sums of 32 bits, two for each vector of outputs. Where many
    products fit 16 bits, as those of a few bit planes do, sums of 16 bits are emptied now and then only.
"""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import neon
from bnntvm.schedules import tir as T
from bnntvm.schedules.int8_engines import Vnni, data_range, weight_range
from bnntvm.schedules.int8_layout import BLOCK, QUAD

#: Bytes of a vector, and quads of it.
_SIZE, _QUADS = 16, 4


def of(kernel):
    """The engine of a kernel."""
    if kernel.isa.products == "matrix" and kernel.layout.quads % 2 == 0:
        return Matrix(kernel)
    return Long(kernel) if kernel.isa.products == "long" else Dot(kernel)


class Dot(Vnni):
    """A register tile of sums, ``cover`` pixels by ``most_vectors`` vectors. Weights: ``[runs, quads, vectors, 16]``."""

    most_vectors = 4
    most_pixels = 5

    def __init__(self, kernel):
        super().__init__(kernel)
        self.isa = kernel.isa
        self.offset, self.data_type = 0 if data_range(kernel.spec)[1] <= 127 else -128, "int8"
        self.group = min(self.most_vectors, self.vectors)

    def dot(self, sums, data, weights, ones=False):  # noqa: ARG002
        kind = f"int8x{_SIZE}"
        return neon.dot_bytes(sums, tirx.reinterpret(kind, weights), tirx.reinterpret(kind, data), self.isa)

    def products(self, first):
        at, bind = T.bind("at", first * self.layout.pixel)
        return [bind, T.for_("part", self.vectors // self.group, lambda part: self.part(at, part))]

    def part(self, at, part):
        """The tile of the pixels from byte ``at`` on and the vectors of ``part``."""
        kernel, layout, pixels, group = self.kernel, self.layout, self.layout.cover, self.group
        sums, zero = T.Registers("sums", pixels * group, "int32", self.lanes), T.splat(0, "int32", self.lanes)
        start = [T.load_vector(self.bias, [(part * group + v) * self.lanes], self.lanes) if self.offset else zero for v in range(group)]
        whole, rest = divmod(layout.quads, _QUADS)

        def run(number):
            data, bind = T.bind("data", at + T.load(self.data_at, number))
            base = number * layout.quads
            vectors = T.for_("q", neon.hidden(whole), lambda q: self.four_quads(sums, part, base + q * _QUADS, data + q * _SIZE))
            last = [self.quad(sums, part, base + q, data + q * QUAD) for q in range(whole * _QUADS, whole * _QUADS + rest)]
            return [bind, vectors if whole else [], last]

        keep = [T.store_vector(kernel.results, [p * BLOCK + (part * group + v) * self.lanes], sums.get(p * group + v))
                for p in range(pixels) for v in range(group)]  # fmt: skip
        begin = [sums.set(p * group + v, start[v]) for p in range(pixels) for v in range(group)]
        return [sums.allocate, begin, T.for_("run", len(layout.runs), run), keep]

    def four_quads(self, sums, part, quad, data):
        """Sixteen bytes of every pixel from byte ``data`` on."""
        body, values = [neon.rolled()], []
        for p in range(self.layout.cover):
            x, bind = T.bind("x", T.load_vector(self.kernel.scratch, [data + p * self.layout.pixel], _SIZE))
            values.append(x)
            body.append(bind)
        for lane in range(_QUADS):
            for v in range(self.group):
                w, bind = T.bind("w", self.bytes_of(part, quad + lane, v))
                body.append(bind)
                for p, x in enumerate(values):
                    index = p * self.group + v
                    body.append(sums.set(index, neon.dot_lane(sums.get(index), w, x, lane)))
        return body

    def quad(self, sums, part, quad, data):
        """Four bytes of every pixel."""
        body = []
        for v in range(self.group):
            w, bind = T.bind("w", self.bytes_of(part, quad, v))
            body.append(bind)
            for p in range(self.layout.cover):
                index = p * self.group + v
                body.append(sums.set(index, neon.dot_lane(sums.get(index), w, self.four_times(data + p * self.layout.pixel), 0)))
        return body

    def bytes_of(self, part, quad, v):
        """Vector ``v`` of a part's weights, as bytes."""
        return T.load_vector(self.bytes, [*self.row, (quad * self.vectors + part * self.group + v) * self.size], self.size)

    def four_times(self, at):
        """Four bytes of the data, in every 32-bit lane."""
        four = tirx.reinterpret("int32", T.load_vector(self.kernel.scratch, [at], QUAD))
        return tirx.reinterpret(f"int8x{_SIZE}", T.broadcast(four, self.lanes))


class Matrix(Dot):
    """Sums of two pixels and two outputs in a register.

    Weights: ``[runs, quads / 2, vectors, 2 pairs of outputs, 2 outputs, 8 channels]``.
    """

    def order(self, quads):
        """Vectors ``[blocks, runs, quads, vectors, 16]`` in the order of the kernel, ``[blocks, vectors, 16]``."""
        blocks, runs, count, vectors = quads.shape[:4]
        parts = quads.reshape(blocks, runs, count // 2, 2, vectors, 2, 2, QUAD)  # ..., quad of two, vector, pair, output, channel
        return parts.transpose(0, 1, 2, 4, 5, 6, 3, 7).reshape(blocks, -1, _SIZE)

    pad = order

    def sum_weights(self):
        """Statements that sum up the weights of every output, times minus the offset."""
        if not self.offset:
            return []
        self.bias, allocate = T.scratch("bias", (BLOCK,), "int32")
        sums, ones = T.Registers("sums", 2 * self.vectors, "int32", self.lanes), T.splat(1, "int8", _SIZE)
        pairs = self.weight_bytes // _SIZE // (2 * self.vectors)

        def pair(k):
            vectors = range(2 * self.vectors)
            return [sums.set(i, neon.multiply_matrix(sums.get(i), ones, self.bytes_at(k * 2 * self.vectors + i))) for i in vectors]

        factor = T.splat(-self.offset, "int32", self.lanes)
        store = [T.store_vector(self.bias, [v * self.lanes], T.shuffle([sums.get(2 * v), sums.get(2 * v + 1)], (0, 1, 4, 5)) * factor)
                 for v in range(self.vectors)]  # fmt: skip
        return [allocate, *sums.allocate, *sums.fill(T.splat(0, "int32", self.lanes)), T.for_("k", pairs, pair), *store]

    def bytes_at(self, number):
        """Vector ``number`` of a block's weights."""
        return T.load_vector(self.bytes, [*self.row, number * self.size], self.size)

    def part(self, at, part):
        layout, group, rows = self.layout, self.group, -(-self.layout.cover // 2)
        sums = T.Registers("sums", rows * 2 * group, "int32", self.lanes)
        whole, rest = divmod(layout.quads, _QUADS)

        def run(number):
            data, bind = T.bind("data", at + T.load(self.data_at, number))
            base = number * (layout.quads // 2)
            loop = T.for_("q", neon.hidden(whole), lambda q: [neon.rolled(), self.steps(sums, part, base + q * 2, data + q * _SIZE, 2)])
            return [bind, loop if whole else [], self.steps(sums, part, base + whole * 2, data + whole * _SIZE, 1) if rest else []]

        clear = sums.fill(T.splat(0, "int32", self.lanes))
        return [sums.allocate, clear, T.for_("run", len(layout.runs), run), self.keep(sums, part)]

    def keep(self, sums, part):
        """Store rows of sums, pixel by pixel."""
        stores = []
        for p in range(self.layout.cover):
            for v in range(self.group):
                first, channel = (p // 2 * self.group + v) * 2, (part * self.group + v) * self.lanes
                value = T.shuffle([sums.get(first), sums.get(first + 1)], (2, 3, 6, 7) if p % 2 else (0, 1, 4, 5))
                value = value + T.load_vector(self.bias, [channel], self.lanes) if self.offset else value
                stores.append(T.store_vector(self.kernel.results, [p * BLOCK + channel], value))
        return stores

    def steps(self, sums, part, pair, data, count):
        """``count`` pairs of quads (one or two) from ``pair`` on."""
        body, rows, last = [], [], self.layout.cover - 1
        for p in range(0, self.layout.cover, 2):
            loaded = []
            for pixel in (p, min(p + 1, last)):
                x, bind = T.bind("x", T.load_vector(self.kernel.scratch, [data + pixel * self.layout.pixel], 8 * count))
                loaded.append(x)
                body.append(bind)
            joined = [T.shuffle(loaded, [*range(8 * k, 8 * k + 8), *range(8 * (count + k), 8 * (count + k) + 8)]) for k in range(count)]
            named = [T.bind("x", x) for x in joined]
            rows.append([x for x, _ in named])
            body += [bind for _, bind in named]
        for k in range(count):
            for v in range(2 * self.group):
                w, bind = T.bind("w", self.bytes_at((pair + k) * (2 * self.vectors) + part * (2 * self.group) + v))
                body.append(bind)
                for r, row in enumerate(rows):
                    index = r * 2 * self.group + v
                    body.append(sums.set(index, neon.multiply_matrix(sums.get(index), row[k], w)))
        return body


class Long(Dot):
    """The same with sums of 16 bits (of pairs of quads, or of many), two for each vector of outputs: low half and high half."""

    most_vectors = 2

    def __init__(self, kernel):
        super().__init__(kernel)
        low, high = data_range(kernel.spec)
        most = max(high + self.offset, -(low + self.offset)) * max(weight_range(kernel.spec)[1], -weight_range(kernel.spec)[0])
        #: Quads whose products 16 bits hold.
        self.fits = max(1, (2**15 - 1) // max(1, most))
        self.most_pixels = 4 if kernel.isa.registers == 32 else 2

    def part(self, at, part):
        kernel, pixels, group = self.kernel, self.layout.cover, self.group
        cells, many = pixels * group, self.fits >= 8
        totals, zero = T.Registers("totals", 2 * cells, "int32", self.lanes), T.splat(0, "int32", self.lanes)
        runs = self.many(totals, at, part) if many else self.pairs(totals, at, part)
        keep = []
        for p in range(pixels):
            for v in range(group):
                cell, channel = p * group + v, (part * group + v) * self.lanes
                value = neon.pairs_of(totals.get(2 * cell), totals.get(2 * cell + 1))
                value = value + T.load_vector(self.bias, [channel], self.lanes) if self.offset else value
                keep.append(T.store_vector(kernel.results, [p * BLOCK + channel], value))
        return [totals.allocate, totals.fill(zero), runs, keep]

    def runs(self, at, body):
        """``body(weights' first quad, data)`` for every run."""

        def run(number):
            data, bind = T.bind("data", at + T.load(self.data_at, number))
            return [bind, body(number * self.layout.quads, data)]

        return T.for_("run", len(self.layout.runs), run)

    def pairs(self, totals, at, part):
        """One or two quads at a time, straight to the totals."""
        step = min(2, self.fits)
        whole, rest = divmod(self.layout.quads, step)

        def add(base, data, q, count):
            return self.added(totals, part, base + q * step, data + q * (step * QUAD), count)

        def run(base, data):
            loop = T.for_("q", neon.hidden(whole), lambda q: [neon.rolled(), add(base, data, q, step)])
            return [loop if whole else [], add(base, data, whole, 1) if rest else []]

        return self.runs(at, run)

    def added(self, totals, part, quad, data, count):
        """``count`` quads from ``quad`` on."""
        body, weights = [], {}
        for q in range(count):
            for v in range(self.group):
                weights[q, v], bind = T.bind("w", self.bytes_of(part, quad + q, v))
                body.append(bind)
        for p in range(self.layout.cover):
            values = []
            for q in range(count):
                x, bind = T.bind("x", self.four_times(data + (p * self.layout.pixel + q * QUAD)))
                values.append(x)
                body.append(bind)
            for v in range(self.group):
                for half in range(2):
                    index = 2 * (p * self.group + v) + half
                    short = None
                    for q in range(count):
                        short = neon.multiply_long(short, weights[q, v], values[q], half)
                    body.append(totals.set(index, neon.add_pairs(totals.get(index), short, self.isa)))
        return body

    def many(self, totals, at, part):
        """Sums of 16 bits, emptied after as many quads as they hold, or at the end."""
        shorts = T.Registers("shorts", len(totals.arrays), "int16", 2 * self.lanes)
        clear = shorts.fill(T.splat(0, "int16", 2 * self.lanes))
        empty = [totals.set(i, neon.add_pairs(totals.get(i), shorts.get(i), self.isa)) for i in range(len(totals.arrays))]
        quads, once = self.layout.quads, self.layout.quads * len(self.layout.runs) <= self.fits

        def count(base, data, length):
            whole = length // _QUADS
            loop = T.for_("q", neon.hidden(whole), lambda q: self.four_counted(shorts, part, base + q * _QUADS, data + q * _SIZE))
            last = [self.counted(shorts, part, base + q, self.quads(data + q * QUAD)) for q in range(whole * _QUADS, length)]
            return [loop if whole else [], last]

        def run(base, data):
            if once:
                return count(base, data, quads)
            whole, rest = divmod(quads, self.fits)
            chunks = T.for_("chunk", whole, lambda c: [clear, count(base + c * self.fits, data + c * (self.fits * QUAD), self.fits), empty])
            last = [clear, count(base + whole * self.fits, data + whole * self.fits * QUAD, rest), empty] if rest else []
            return [chunks if whole else [], last]

        return [shorts.allocate, clear if once else [], self.runs(at, run), empty if once else []]

    def quads(self, data):
        """``quad(p)``: four bytes of pixel p from byte ``data`` on."""
        return lambda p: self.four_times(data + p * self.layout.pixel)

    def four_counted(self, shorts, part, quad, data):
        """Four quads, whose data are loaded together."""
        body, loaded = [neon.rolled()], []
        for p in range(self.layout.cover):
            x, bind = T.bind("x", tirx.reinterpret("int32x4", T.load_vector(self.kernel.scratch, [data + p * self.layout.pixel], _SIZE)))
            loaded.append(x)
            body.append(bind)
        for lane in range(_QUADS):

            def four_bytes(p, lane=lane):
                return tirx.reinterpret(f"int8x{_SIZE}", T.shuffle([loaded[p]], [lane] * _QUADS))

            body.append(self.counted(shorts, part, quad + lane, four_bytes))
        return body

    def counted(self, shorts, part, quad, four_bytes):
        """One quad, into sums of 16 bits; ``four_bytes(p)`` is that of a pixel, repeated."""
        body, weights = [], []
        for v in range(self.group):
            w, bind = T.bind("w", self.bytes_of(part, quad, v))
            weights.append(w)
            body.append(bind)
        for p in range(self.layout.cover):
            x, bind = T.bind("x", four_bytes(p))
            body.append(bind)
            for v, w in enumerate(weights):
                for half in range(2):
                    index = 2 * (p * self.group + v) + half
                    body.append(shorts.set(index, neon.multiply_long(shorts.get(index), w, x, half)))
        return body
