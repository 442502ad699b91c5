"""Dense layer of 8-bit data and packed weights: the family of :class:`bnntvm.spec.WeightDenseInt8` (BitNet b1.58 and its kin).

A weight is stored as a code u of one bit (sign: w = 1 - 2 u) or two (ternary: w = u - 1), so that

    sign      sum(w x) = sum(x) - 2 sum(u x)
    ternary   sum(w x) = sum(u x) - sum(x)

and u is an unsigned byte once its neighbours are masked away: instructions that multiply four unsigned bytes by four signed ones and add
take it as it is. Each row of the data is converted to bytes once, and summed.

    uint32[blocks, steps, block]   code f of byte i of a lane is feature 4 * (fields * step + f) + i of that output channel;
                                   a byte has 8 (sign) or 4 (ternary) fields

A single row is bound by the arrival of the weights. It does not even shift: a masked field is a power of the code's base too large, its
products go to a sum of their own, and that is shifted once, at the end. Several rows share the decoding of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from tvm import tirx

from bnntvm import spec as specs
from bnntvm.bits import unpack_bits

from . import epilogue as epilogues
from . import neon, packed_weights, tir, windows

#: Features that one 32-bit lane multiplies at a time.
QUAD = 4


@dataclass(frozen=True)
class Schedule:
    """What may be tuned.

    Attributes
    ----------
    rows : int
        Rows of the data in a register tile.
    vectors : int
        Vectors of output channels in a register tile; whole 32-bit words of channels if the epilogue packs bits.
    tiles : int
        Tiles of rows that a task computes, if there are many rows: each block of weights is then read once for all of them.
    ahead : int
        Bytes of weights that are asked for ahead of their use, for a single row: without, loads wait at the edges of pages.
    """

    rows: int
    vectors: int
    tiles: int
    ahead: int


def default_schedule(spec, isa):
    """A schedule that is fast without tuning."""
    return space(spec, isa)[0]


def space(spec, isa):
    """Valid schedules, the default one first."""
    least = max(1, specs.WORD_BITS // isa.lanes) if windows.has_bits(spec.epilogue) else 1
    most = max(least, -(-spec.out_features // isa.lanes))
    found = []
    for vectors in (4, 2) if isa.registers == 32 else (2,):
        vectors = max(least, min(most, vectors) // least * least)
        rows = max(1, (isa.registers - 6) // vectors - 1)
        found += [Schedule(min(rows, limit), vectors, tiles, 8192) for limit, tiles in ((6, 4), (4, 8))]
    return list(dict.fromkeys([*found, replace(found[0], ahead=2048)]))


def fields(coding):
    """Codes in a byte."""
    return 8 // coding.planes


def steps(spec):
    """32-bit words of codes for each output channel."""
    return -(-spec.in_features // (QUAD * fields(spec.coding)))


def pack_weights(spec, schedule, isa, weights):
    """Weights in the order in which the kernel reads them.

    Parameters
    ----------
    weights : ndarray
        uint32 ``[planes, N, words(K)]``.

    Returns
    -------
    ndarray
        uint32 ``[blocks, steps, block]``; the codes of padding are 0.
    """
    planes = unpack_bits(weights, spec.in_features)
    codes = (planes[0] if spec.coding.kind == "sign" else 1 + planes[0] - planes[1]).astype(np.uint8)
    size, count = schedule.vectors * isa.lanes, fields(spec.coding)
    padded = np.zeros((-(-spec.out_features // size) * size, steps(spec) * count * QUAD), np.uint8)
    padded[: spec.out_features, : spec.in_features] = codes
    parts = padded.reshape(-1, size, steps(spec), count, QUAD).transpose(3, 0, 2, 1, 4)  # field, block, step, lane, byte
    octets = np.zeros(parts.shape[1:], np.uint8)
    for f, part in enumerate(parts):
        octets |= part << (spec.coding.planes * f)
    return np.ascontiguousarray(octets).view("<u4")[..., 0]


def build(spec, schedule, isa):
    """The kernel: data ``float32[M, K]``, packed weights, the epilogue's inputs and outputs. M is dynamic.

    Returns
    -------
    tirx.PrimFunc
    """
    from .weight_dense_int8_tiles import TileKernel

    return (TileKernel if isa.products == "tiles" else Kernel)(spec, schedule, isa).function()


class Kernel:
    """Builds one PrimFunc, from loops to instructions."""

    def __init__(self, spec, schedule, isa):
        self.spec, self.schedule, self.isa, self.lanes, self.vectors = spec, schedule, isa, isa.lanes, schedule.vectors
        self.size, self.fields, self.steps = schedule.vectors * isa.lanes, fields(spec.coding), steps(spec)
        self.blocks, self.depth = -(-spec.out_features // self.size), self.steps * self.fields * QUAD
        self.pitch = self.depth  # bytes from one row of the data to the next
        self.rows = tirx.Var("m", "int64")
        self.data = tir.buffer("x", (self.rows, spec.in_features), "float32")
        self.weights = tir.buffer("w", (self.blocks, self.steps, self.size), "uint32")
        self.emitter = epilogues.Emitter(spec.epilogue, spec.out_features, isa, (self.rows,), "int32")

    def function(self):
        return tir.function("weight_dense_int8", [self.data, self.weights, *self.emitter.inputs, *self.emitter.outputs], self.body())

    def body(self):
        """The statements of the kernel."""
        many = tir.i64(2 * self.schedule.tiles * self.schedule.rows)
        return tir.when(self.rows < many, self._by_blocks(), self._by_rows())

    # Loops

    def _by_blocks(self):
        """Threads share the blocks of output channels."""
        height = self.schedule.rows
        prepare = self._prepare(self.rows, tir.i64(0))

        def block(number):
            def tiles(height):
                return self._tiles(height, number, tir.i64(0), self.rows)

            return tiles(1) if height == 1 else tir.when(self.rows < height, tiles(1), tiles(height))

        return [prepare, tir.parallel("block", self.blocks, block)]

    def _by_rows(self):
        """Threads share the rows."""
        share = self.schedule.rows * self.schedule.tiles

        def task(number):
            begin, bound = tir.bind("begin", tirx.min(number * share, self.rows - share))
            prepare = self._prepare(tir.i64(share), begin)
            tiles = tir.for_("block", self.blocks, lambda block: self._tiles(self.schedule.rows, block, begin, tir.i64(share)))
            return [bound, prepare, tiles]

        return tir.parallel("task", tirx.floordiv(self.rows + (share - 1), tir.i64(share)), task)

    def _tiles(self, height, block, begin, count):
        """Tiles of ``height`` rows by a block, for ``count`` rows from ``begin`` on; the last tile overlaps its neighbour."""

        def tile(number):
            own, bound = tir.bind("own", tirx.min(number * height, count - height))
            return [bound, self._tile(height, block, begin, own)]

        return tir.for_("tile", tirx.floordiv(count + (height - 1), tir.i64(height)), tile)

    # Data

    def _prepare(self, count, begin):
        """Rows ``begin ... begin + count - 1`` as bytes ``int8[count * pitch]``, padded with zeros, and their sums."""
        self.bytes, allocate = tir.memory("bytes", count * self.pitch, "int8")
        self.totals, allocate_totals = tir.scratch("totals", (count,), "int32")
        whole, rest = divmod(self.spec.in_features, self.lanes)

        def row(own):
            total = tir.Registers("total", 1, "int32", self.lanes)

            def convert(k, mask=None):
                at = [begin + own, k]
                x = tir.load_vector(self.data, at, self.lanes) if mask is None else tir.load_masked(self.data, at, mask)
                number, bound = tir.bind("x", tirx.Cast(f"int32x{self.lanes}", x))
                octets = tirx.Cast(f"int8x{self.lanes}", number)
                return [bound, total.set(0, total.get(0) + number), tir.store_vector(self.bytes, [own * self.pitch + k], octets)]

            body = [*total.allocate, *total.fill(tir.splat(0, "int32", self.lanes))]
            body += [tir.for_("k", whole, lambda k: convert(k * self.lanes))] if whole else []
            body += [convert(tir.i64(whole * self.lanes), tir.prefix_mask(rest, self.lanes))] if rest else []
            zero = tir.splat(0, "int8", self.lanes)
            padding = range((whole + bool(rest)) * self.lanes, self.depth, self.lanes)
            body += [tir.store_vector(self.bytes, [own * self.pitch + k], zero) for k in padding]
            return [*body, tir.store(self.totals, tir.sum_lanes(total.get(0)), own)]

        return [allocate, allocate_totals, tir.for_("row", count, row)]

    def _quad(self, own, number):
        """Features ``4 * number ...`` of a row, in every 32-bit lane."""
        four = tir.load_vector(self.bytes, [own * self.pitch + number * QUAD], QUAD)
        return tir.broadcast(tirx.reinterpret("int32", four), self.lanes)

    # Tiles

    def _tile(self, height, block, begin, own):
        """Rows ``begin + own ...`` by a block of output channels."""
        scaled = height == 1 and self.fields * self.vectors + 6 <= self.isa.registers and self._fits()
        sums = self.fields if scaled else 1
        acc = tir.Registers("acc", height * self.vectors * sums, "int32", self.lanes)
        step = self._masked if scaled else self._shifted
        body = [*acc.allocate, *acc.fill(tir.splat(0, "int32", self.lanes))]
        body.append(tir.for_("k", self.steps, lambda k: step(acc, height, block, own, k)))
        totals = []
        for r in range(height):
            total, bound = tir.bind("total", tir.broadcast(tir.load(self.totals, own + r), self.lanes))
            totals.append(total)
            body.append(bound)

        def value(r, v):
            return self._result(acc, (r * self.vectors + v) * sums, sums, totals[r])

        return [*body, self._outputs(height, block, begin + own, value)]

    def _outputs(self, height, block, row, value):
        """The epilogue of ``height`` rows from ``row`` on, for a block; ``value(r, v)`` is vector ``v`` of row ``row + r``."""
        body, whole = [], self.spec.out_features % self.size == 0
        chunk = self.vectors if whole else max(1, specs.WORD_BITS // self.lanes)
        for first in range(0, self.vectors, chunk):
            columns, scope, rows = block * self.size + first * self.lanes, {}, []
            for r in range(height):
                values = [value(r, v) for v in range(first, min(first + chunk, self.vectors))]
                rows += self.emitter.emit(values, (row + r,), columns, scope)
            body.append(tir.when(columns < self.spec.out_features, rows) if first else rows)
        return body

    def _fits(self):
        """Whether sums of unshifted fields fit 32 bits: the codes of the last field, up to 2, are 4**3 times too large."""
        return self.spec.coding.kind == "ternary" and _fused(self.isa) and 2 * 4**3 * 128 * self.spec.in_features < 2**31

    def _result(self, acc, index, sums, total):
        """The dot products of a vector of output channels."""
        value = acc.get(index)
        for f in range(1, sums):
            value = value + (acc.get(index + f) >> tir.splat(self.spec.coding.planes * f, "int32", self.lanes))
        return self._dot_product(value, total)

    def _dot_product(self, value, total):
        """What is meant by ``value``, a sum of products with codes, for a row whose sum is ``total``."""
        return total - (value + value) if self.spec.coding.kind == "sign" else value - total

    def _mask(self, f=0):
        """All fields ``f`` of four bytes."""
        code = (1 << self.spec.coding.planes) - 1
        return tir.splat((code << (self.spec.coding.planes * f)) * 0x01010101, "uint32", self.lanes)

    def _masked(self, acc, _height, block, own, k):
        """One step of a single row, a sum for each field."""
        body, quads = [], []
        for f in range(self.fields):
            quad, bound = tir.bind("x", self._quad(own, k * self.fields + f))
            quads.append(quad)
            body.append(bound)
        for v in range(self.vectors):
            word, bound = tir.bind("w", tir.load_vector(self.weights, [block, k, v * self.lanes], self.lanes))
            body += [bound, tir.prefetch(self.weights, [block, k, v * self.lanes + self.schedule.ahead // 4])]
            for f in range(self.fields):
                i = v * self.fields + f
                body.append(acc.set(i, self._dot(acc.get(i), word & self._mask(f), quads[f])))
        return body

    def _shifted(self, acc, height, block, own, k):
        """One step of several rows."""
        body, words = [], []

        def name(value):
            variable, statement = tir.bind("w", value)
            body.append(statement)
            return variable

        words = [name(tir.load_vector(self.weights, [block, k, v * self.lanes], self.lanes)) for v in range(self.vectors)]
        for f in range(self.fields):
            shift = tir.splat(self.spec.coding.planes * f, "uint32", self.lanes)
            codes = [name((word >> shift if f else word) & self._mask()) for word in words]
            for r in range(height):
                quad = name(self._quad(own + r, k * self.fields + f))
                for v, code in enumerate(codes):
                    i = r * self.vectors + v
                    body.append(acc.set(i, self._dot(acc.get(i), code, quad)))
        return body

    def _dot(self, total, codes, data):
        """``total`` plus the products of four unsigned bytes with four signed ones, in every lane."""
        if not self.isa.products:
            return _dot_by_bytes(total, codes, data)
        octets, pairs = (tir.vector_type(*kind) for kind in (("int8", 4 * self.lanes), ("int16", 2 * self.lanes)))
        codes, data = tirx.reinterpret(octets, codes), tirx.reinterpret(octets, data)
        if _fused(self.isa):
            return tir.intrinsic("llvm.x86.avx512.vpdpbusd.512", total, codes, data)
        if neon.is_neon(self.isa):
            return neon.dot_bytes(total, codes, data, self.isa)
        narrow, wide = _PAIRS[self.lanes]  # no sum of two products exceeds 16 bits: codes are at most 2
        products = tirx.call_llvm_pure_intrin(pairs, narrow, codes, data)
        return total + tirx.call_llvm_pure_intrin(tir.dtype_of(total), wide, products, tir.splat(1, "int16", 2 * self.lanes))


def _dot_by_bytes(total, codes, data):
    """The same on any processor, one byte of the lanes after the other."""
    lanes = tir.lanes_of(total)
    for byte in range(4):
        code = (tir.reinterpret("int32", codes) >> tir.splat(8 * byte, "int32", lanes)) & tir.splat(255, "int32", lanes)
        value = (data << tir.splat(24 - 8 * byte, "int32", lanes)) >> tir.splat(24, "int32", lanes)
        total = total + code * value
    return total


#: Products of bytes added in pairs, and pairs of those, by lanes.
_PAIRS = {
    4: ("llvm.x86.ssse3.pmadd.ub.sw.128", "llvm.x86.sse2.pmadd.wd"),
    8: ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
    16: ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
}


def _fused(isa):
    """Whether four products are added by one instruction (AVX-512 VNNI)."""
    return isa.products in ("tiles", "vnni")


def reference(spec, operands, epilogue_inputs):
    """The layer in numpy.

    Parameters
    ----------
    operands : list
        data float32 ``[M, K]`` of integers, weights uint32 ``[planes, N, words(K)]``.
    epilogue_inputs : list of ndarray

    Returns
    -------
    list of ndarray
        One for each output of the epilogue.
    """
    data, words = operands
    weights = packed_weights.values(unpack_bits(words, spec.in_features), spec.coding)
    return epilogues.reference(spec.epilogue, data.astype(np.int32) @ weights.astype(np.int32).T, epilogue_inputs)
