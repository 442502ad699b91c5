"""Dense layers of bit planes on NEON: the loops of :mod:`.binary_dense` around the product of :mod:`.neon_product`.

Rows of whole steps of 128 bits are read where they are; others are copied to scratch memory first, padded with 0 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bnntvm import spec as specs
from bnntvm.schedules import binary_dense, neon_product, tir


@dataclass(frozen=True)
class Schedule:
    """``rows``: rows of the register tile, times four channels. ``words``: words of channels in a tile's epilogue, 1."""

    rows: int
    words: int = 1


def default_schedule(spec, isa):
    """The tile that fills the registers."""
    return Schedule(6 if isa.registers == 32 else 2)


def space(spec, isa):
    """Tiles that fit."""
    return [Schedule(rows) for rows in ((6, 5, 4, 3) if isa.registers == 32 else (2, 1))]


def pack_weights(weights):
    """``uint32[blocks, steps * 128]`` of ``uint32[N, words(K)]``: see :func:`.neon_product.pack_rows`."""
    packed = neon_product.pack_rows(weights, specs.WORD_BITS)
    return np.ascontiguousarray(packed.reshape(len(packed), -1))


class _Results:
    """What stands in for accumulators: sums in memory, one row of a word after another."""

    def __init__(self, array, vectors):
        self.array, self.vectors = array, vectors

    def get(self, index):
        return tir.load_vector(self.array, [index * 4], 4)


class Kernel(binary_dense._Kernel):
    """One dense layer."""

    def __init__(self, spec, schedule, isa):
        super().__init__(spec, schedule, isa)
        self.steps = neon_product.steps(self.depth)
        self.row_words = self.steps * neon_product.STEP_WORDS
        self.weights = tir.buffer("weights", (self.blocks, self.steps * neon_product.STEP_BITS), "uint32")
        self.arrays, self.prepare = {}, []
        for array in (self.data, self.mask):
            if array is not None:
                self.arrays[array], statements = (array, []) if self.depth == self.row_words else self._padded(array)
                self.prepare += statements

    def function(self):
        params = [self.data, self.weights, *([self.mask] if self.mask is not None else [])]
        body = [*self.prepare, *([self.allocate, self._count_rows()] if self.base is not None else [])]
        body.append(self._by_columns() if self.blocks >= 8 else self._by_rows())
        return tir.function("binary_dense_neon", [*params, *self.emitter.inputs, *self.emitter.outputs], body)

    def _padded(self, array):
        """``(copy, statements)``: rows padded to whole steps."""
        copy, allocate = tir.scratch(f"{array.name}_rows", (self.rows, self.row_words), "uint32")

        def row(r):
            def move(k, lanes):
                return tir.store_vector(copy, [r, k], tir.load_vector(array, [r, k], lanes))

            whole, body = self.depth // 4, []
            if whole:
                body.append(tir.for_("k", whole, lambda k: move(k * 4, 4)))
            body += [move(k, 1) for k in range(whole * 4, self.depth)]
            zero = tir.constant(0, "uint32")
            return body + [tir.store(copy, zero, r, k) for k in range(self.depth, self.row_words)]

        return copy, [allocate, tir.for_("row", self.rows, row)]

    def _product(self, height, block, first, masked):
        results, allocate = tir.local("results", height * self.width, "int32")

        def read(array):
            return lambda r, k: (self.arrays[array], [first + r, k * 4])

        def part(number):
            base, bind = tir.bind("quad", number * (self.steps * 16))

            def weight(_quad, c, k):
                return self.weights, [block, base + (k * 16 + c * 4)]

            product = neon_product.product(
                self.isa, height, self.steps, read(self.data), weight, read(self.mask) if masked else None, self.spec.unipolar
            )
            stores = [tir.store_vector(results, [number * 4 + r * self.width], product.sums(r, 0)) for r in range(height)]
            return [bind, product.statements(), stores]

        parts = tir.for_("part", self.width // neon_product.QUAD, part)
        return [allocate, parts, *self._stores(_Results(results, self.vectors), height, block, first, masked)]
