"""Whether an array holds neither NaN nor infinity: the check of a network's inputs, at the speed of one read.

``x - x`` is 0 for a finite x and NaN for any other: the bits of all differences, joined by "or", are 0 exactly for finite arrays.
"""

from __future__ import annotations

import numpy as np
from tvm import tirx

from bnntvm.schedules import tir

#: Name of the function in a compiled network; bnntvm/runtime.py looks for it.
NAME = "bnn_is_finite"
#: Vectors in one step of the loop: independent chains, which hide the latency of a subtraction.
_CHAINS = 4


def reference(array):
    """1 if all elements are finite, else 0."""
    return int(np.isfinite(array).all())


def build(isa):
    """The function: float32 ``[n]``, aligned to an element, to an integer, 1 for finite and 0 otherwise."""
    size, lanes = tirx.Var("n", "int64"), isa.lanes
    data = tir.buffer("x", (size,), "float32")
    found = tir.Registers("found", _CHAINS, "uint32", lanes)
    step = _CHAINS * lanes

    def join(i, vector):
        return found.set(i, found.get(i) | tir.reinterpret("uint32", tir.zero_if_finite(vector)))

    def vector(at, count):
        return join(0, tir.load_masked(data, [at], tir.prefix_mask(tirx.min(count, tir.i64(lanes)), lanes)))

    # Loads that straddle two cache lines take twice as long: up to the first line that is whole comes a vector of its own.
    head = tirx.bitwise_and(lanes - tir.misaligned_by(data, lanes), tir.i64(lanes - 1))
    head, named_head = tir.bind("head", tirx.min(head, size))
    whole, named = tir.bind("whole", tirx.floordiv(size - head, tir.i64(step)))
    done, named_done = tir.bind("done", head + whole * step)
    rest = tirx.floordiv(size - done + (lanes - 1), tir.i64(lanes))
    total = found.get(0)
    for i in range(1, _CHAINS):
        total = total | found.get(i)
    bits = tir.mask_word([tirx.NE(total, tir.splat(0, "uint32", lanes))] * max(1, 8 // lanes))
    body = [
        [named_head, named, named_done, *found.allocate, *found.fill(tir.splat(0, "uint32", lanes))],
        vector(tir.i64(0), head),
        tir.for_("i", whole, lambda i: [join(c, tir.load_vector(data, [head + i * step + c * lanes], lanes)) for c in range(_CHAINS)]),
        tir.for_("i", rest, lambda i: vector(done + i * lanes, size - done - i * lanes)),
        tirx.Return(tirx.Cast("int64", tirx.EQ(tirx.Cast("int32", bits), tir.constant(0, "int32")))),
    ]
    return tir.function(NAME, [data], body)
