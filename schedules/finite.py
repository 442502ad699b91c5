"""Whether an array holds neither NaN nor infinity: the check of a network's inputs, at the speed of one read.

``x - x`` is 0 for a finite x and NaN for any other: the bits of all differences, joined by "or", are 0 exactly for finite arrays. Kernels
that read an input anyway check it on the way (:class:`Watch`): ``0 * x`` is 0 or NaN likewise, and adding it up takes one instruction.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import tirx

from bnntvm.schedules import tir

#: Name of the function in a compiled network; bnntvm/runtime.py looks for it.
NAME = "bnn_is_finite"
#: Vectors in one step of the loop: independent chains, which hide the latency of a subtraction.
_CHAINS = 4

#: What kernels that check their data say; bnntvm/runtime.py looks for it (and may not import TVM).
MESSAGE = "an input is not finite"


class Watch:
    """Notices NaN and infinity among the vectors of a kernel's data.

    Parameters
    ----------
    lanes : int
    active : bool
        Otherwise nothing is added to the kernel.
    """

    def __init__(self, lanes, active=True):
        self.lanes, self.active, self.turn = lanes, active, 0
        self.found, self.allocate = tir.scratch("found", (1,), "uint32")

    def kernel(self, *body):
        """``body`` with all tasks in it, and behind it a ValueError with ``MESSAGE`` if one of them found NaN or infinity.

        (What a task raises is lost where TVM runs parallel loops on the calling thread.)
        """
        if not self.active:
            return [*body]
        none = tirx.EQ(tirx.Cast("int32", tir.load(self.found, 0)), tir.constant(0, "int32"))
        clear = tir.store(self.found, tir.constant(0, "uint32"), 0)
        raised = tirx.AssertStmt(none, tvm.ir.StringImm("ValueError"), [tvm.ir.StringImm(MESSAGE)])
        return [self.allocate, clear, *body, raised]

    def task(self, make):
        """The statements of a parallel task, which ``make()`` returns, with what they need to see vectors."""
        if not self.active:
            return make()
        self.sums = tir.Registers("finite", _CHAINS, "float32", self.lanes)
        body = make()
        bits = tir.reinterpret("uint32", self.sums.get(0))
        for i in range(1, _CHAINS):
            bits = bits | tir.reinterpret("uint32", self.sums.get(i))
        note = tir.when(tirx.Not(_is_zero(bits)), tir.store(self.found, tir.constant(1, "uint32"), 0))
        # Sums start at +0, to which zeros of either sign may be added.
        return [*self.sums.allocate, *self.sums.fill(tir.splat(0.0, "float32", self.lanes)), body, note]

    def see(self, vector):
        """Statements for a vector of float32; lanes that do not count are 0."""
        if not self.active:
            return []
        self.turn = (self.turn + 1) % _CHAINS
        return [self.sums.set(self.turn, tir.add_zero_if_finite(self.sums.get(self.turn), vector))]


def _is_zero(bits):
    """Whether all lanes of a vector of uint32 are 0."""
    lanes = tir.lanes_of(bits)
    some = tir.mask_word([tirx.NE(bits, tir.splat(0, "uint32", lanes))] * max(1, 8 // lanes))
    return tirx.EQ(tirx.Cast("int32", some), tir.constant(0, "int32"))


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
    body = [
        [named_head, named, named_done, *found.allocate, *found.fill(tir.splat(0, "uint32", lanes))],
        vector(tir.i64(0), head),
        tir.for_("i", whole, lambda i: [join(c, tir.load_vector(data, [head + i * step + c * lanes], lanes)) for c in range(_CHAINS)]),
        tir.for_("i", rest, lambda i: vector(done + i * lanes, size - done - i * lanes)),
        tirx.Return(tirx.Cast("int64", _is_zero(total))),
    ]
    return tir.function(NAME, [data], body)
