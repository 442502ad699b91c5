"""Product of two packed run-time tensors (:class:`bnntvm.spec.BinaryMatmul`): attention scores and values, weights that are an input.

Every operand is a plane of signs, a plane of presences (values {0, 1}), or both. With P the positions where neither factor is 0 and S those
where the signs differ,

    dot = |P| - 2 * |S & P|.

Vectors run along the columns of the right operand, whose words therefore lie ``[B, words, N]``; a tile of rows shares what it loads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx

from bnntvm.bits import unpack_bits
from bnntvm.schedules import tir


@dataclass(frozen=True)
class Schedule:
    """``rows``: rows of the left operand that are computed together."""

    rows: int


def default_schedule(spec, isa):
    """As many rows as there are, up to four: beyond, the loads of the right operand no longer count."""
    return Schedule(min(spec.rows, 4))


def space(spec, isa):
    """Tiles of one to eight rows."""
    return [Schedule(rows) for rows in (1, 2, 4, 6, 8) if rows <= spec.rows] or [Schedule(1)]


def values(words, kind):
    """int64 [..., 32 * words]: what the words of an operand mean; ``words`` is one plane or, for ternary, signs and zeros."""
    bits = 32 * words[0].shape[-1]
    first = unpack_bits(words[0], bits)
    if kind == "unipolar":
        return first.astype(np.int64)
    signs = np.where(first, -1, 1)
    return signs if kind == "bipolar" else np.where(unpack_bits(words[1], bits), 0, signs)


def reference(spec, operands, epilogue_inputs=()):
    """[B, M, N] in numpy; operands as in the specification."""
    count = planes(spec.left)
    left = values(operands[:count], spec.left)
    right = values([w if spec.turned else np.swapaxes(w, 1, 2) for w in operands[count:]], spec.right)
    unused = 0 if "unipolar" in (spec.left, spec.right) else left.shape[-1] - spec.features  # bits that are 0 on both sides: +1 times +1
    product = (np.matmul(left, np.swapaxes(right, 1, 2)) - unused).astype(np.int32)
    return [product if spec.scale is None else product.astype(np.float32) * np.float32(spec.scale)]


def planes(kind):
    """Number of word tensors of an operand."""
    return 2 if kind == "ternary" else 1


def build(spec, schedule, isa):
    """The kernel: left planes ``uint32[B, M, words]``, right planes ``uint32[B or 1, words, N]``, output ``int32[B, M, N]``, with a
    scale float32; B is dynamic."""
    batch, words, lanes = tirx.Var("b", "int64"), spec.words, isa.lanes
    left = [tir.buffer(f"x{i}", (batch, spec.rows, words), "uint32") for i in range(planes(spec.left))]
    right = [tir.buffer(f"w{i}", (1 if spec.shared else batch, words, spec.columns), "uint32") for i in range(planes(spec.right))]
    out = tir.buffer("y", (batch, spec.rows, spec.columns), "int32" if spec.scale is None else "float32")
    blocks = -(-spec.rows // schedule.rows)

    def tile(b, first, column, count, keep):
        sums = [tir.Registers("present", count, "uint32", lanes), tir.Registers("differ", count, "uint32", lanes)]
        used = [sums[i] for i in range(2) if _counts(spec)[i]]

        def step(k):
            from_right = [_load(w, [0 if spec.shared else b, k, column], lanes, keep) for w in right]
            body = []
            for i in range(count):
                from_left = [tir.broadcast(tir.load(x, b, first + i, k), lanes) for x in left]
                found = _masks(spec, from_left, from_right)
                body += [acc.set(i, acc.get(i) + tirx.popcount(mask)) for acc, mask in zip(used, [m for m in found if m is not None])]
            return body

        body = [s for acc in used for s in acc.allocate]
        body += [acc.set(i, tir.splat(0, "uint32", lanes)) for acc in used for i in range(count)]
        body.append(tir.for_("k", words, step))
        for i in range(count):
            value = _scaled(spec, _total(spec, [acc.get(i) for acc in used], lanes))
            where = [b, first + i, column]
            body.append(tir.store_vector(out, where, value) if keep is None else tir.store_masked(out, where, value, keep))
        return body

    def columns(b, first, count):
        whole, rest = divmod(spec.columns, lanes)
        body = [tir.for_("n", whole, lambda n: tile(b, first, n * lanes, count, None))] if whole else []
        return body + (tile(b, first, tir.i64(whole * lanes), count, tir.prefix_mask(rest, lanes)) if rest else [])

    def block(task):
        b, m = tirx.floordiv(task, tir.i64(blocks)), tirx.floormod(task, tir.i64(blocks))
        full, rest = divmod(spec.rows, schedule.rows)
        if not rest:
            return columns(b, m * schedule.rows, schedule.rows)
        last = columns(b, tir.i64(full * schedule.rows), rest)
        return tir.when(m < tir.i64(full), columns(b, m * schedule.rows, schedule.rows), last) if full else last

    return tir.function("binary_matmul", [*left, *right, out], tir.parallel("block", batch * blocks, block))


def _load(array, where, lanes, keep):
    return tir.load_vector(array, where, lanes) if keep is None else tir.load_masked(array, where, keep)


def _counts(spec):
    """Whether positions that are present, and signs that differ, have to be counted."""
    kinds = {spec.left, spec.right}
    return kinds != {"bipolar"}, kinds != {"unipolar"}


def _masks(spec, left, right):
    """Words to count: absent (or with unipolar operands: present) positions, and present ones with different signs; None if not counted."""
    operands = list(zip((spec.left, spec.right), (left, right)))
    zeros = [words[1] for kind, words in operands if kind == "ternary"]
    ones = [words[0] for kind, words in operands if kind == "unipolar"]
    signs = [words[0] for kind, words in operands if kind != "unipolar"]
    differ = (signs[0] ^ signs[1]) if len(signs) == 2 else signs[0] if signs else None
    absent = (zeros[0] | zeros[1]) if len(zeros) == 2 else zeros[0] if zeros else None
    if not ones:
        return absent, differ if absent is None else differ & _inverted(absent)
    present = (ones[0] & ones[1]) if len(ones) == 2 else ones[0] if absent is None else ones[0] & _inverted(absent)
    return present, None if differ is None else differ & present


def _inverted(vector):
    return vector ^ tir.splat(0xFFFFFFFF, "uint32", tir.lanes_of(vector))


def _scaled(spec, value):
    """A vector of the result."""
    if spec.scale is None:
        return value
    lanes = tir.lanes_of(value)
    value = tir.opaque(tirx.Cast(tir.vector_type("float32", lanes), value))
    return value if spec.scale == 1 else value * tir.splat(spec.scale, "float32", lanes)


def _total(spec, counts, lanes):
    """The dot product, int32, from what was counted."""
    counts = [tirx.Cast(tir.vector_type("int32", lanes), c) for c in counts]
    if "unipolar" in (spec.left, spec.right):
        return counts[0] if len(counts) == 1 else counts[0] - counts[1] - counts[1]
    present = tir.splat(spec.features, "int32", lanes)
    present = present - counts[0] if len(counts) == 2 else present
    return present - counts[-1] - counts[-1]
