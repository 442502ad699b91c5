"""Compute on the parts of a concatenation what does not mix channels, so that only small results are joined.

``pack(f(concat(a, b)))`` becomes ``concat(pack(f(a)), pack(f(b)))`` for an elementwise ``f`` (with its per-channel constants cut to match):
the producer of each part then compares and packs while it has the values in registers, and the concatenation joins words of 32 channels. A
dense block, in which every layer compares all tensors before it with thresholds of its own, reads none of them again.

Likewise a pool that shrinks the image moves before the concatenation, with the elementwise operators between them.

Words are joined only where parts are whole words (the last one excepted), pooled images where parts fill vectors, at least. Ordering
contract: after FoldThresholds, before FuseEpilogues.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from bnntvm import ops
from bnntvm.bits import WORD_BITS
from bnntvm.graph import Rewriter, bindings, const, constant, dims, op_name, uses

from .fuse_epilogues import ELEMENTWISE, POOLS

#: Parts of fewer channels, or of no multiple of these, are not pooled by themselves.
_POOLED_CHANNELS = 16


class _Split(Rewriter):
    def begin(self):
        self.producer = {binding.var: binding.value for binding in bindings(self.func)}
        self.uses = uses(self.func)
        self.done, self.known = {}, {}
        for var in self.producer:  # in order, so that no question goes deep
            self.sizes(var)
            self.sizes(var, alone=True)

    def rewrite(self, var, value):
        name = op_name(value)
        made = None
        if name == "bnn.pack" and int(value.attrs["groups"]) == 1:
            made = self.pack(value)
        elif name in POOLS and str(value.attrs["layout"]) == "NHWC":
            made = self.pool(var, value)
        return made if made is not None else super().rewrite(var, value)

    def pack(self, call):
        """Packed parts, joined; None if they are not whole words."""
        sizes = self.sizes(call.args[0])
        if sizes is None or any(size % WORD_BITS for size in sizes[:-1]):
            return None
        parts, flips = self.parts(call.args[0], sizes), [[] for _ in sizes]
        if len(call.args) > 1:
            words = constant(call.args[1])
            flips = [[const(w)] if w.any() else [] for w in np.split(words, np.cumsum(sizes[:-1]) // WORD_BITS)]
        packed = [self.emit(ops.call(ops.PACK, [part, *flip], groups=1)) for part, flip in zip(parts, flips)]
        return self.emit(relax.op.concat(packed, len(dims(call.args[0])) - 1))

    def pool(self, var, call):
        """Pooled parts, joined; None if the pool does not shrink the image, or something else reads what it would be computed from."""
        source = call.args[0]
        small, large = dims(var)[1:3], dims(source)[1:3]
        shrinks = all(isinstance(d, int) for d in small + large) and 2 * int(np.prod(small)) <= int(np.prod(large))
        sizes = self.sizes(source, alone=True)
        if not shrinks or sizes is None or any(size % _POOLED_CHANNELS for size in sizes):
            return None
        pooled = [self.emit(relax.Call(call.op, [part, *call.args[1:]], call.attrs, call.ty_args)) for part in self.parts(source, sizes)]
        return self.emit(relax.op.concat(pooled, 3))

    def sizes(self, var, alone=False):
        """Channels of the parts that ``var`` is an elementwise function of, None if it is no such function of a concatenation.

        ``alone``: nothing but that function reads what lies on the way.
        """
        if (var, alone) not in self.known:
            self.known[var, alone] = self.find_sizes(var, alone)
        return self.known[var, alone]

    def find_sizes(self, var, alone):
        if not isinstance(var.ty, relax.TensorType):
            return None
        value, rank = self.producer.get(var), len(dims(var))
        name = op_name(value)
        if alone and self.uses.get(var, 0) > 1 or rank < 2 or not isinstance(dims(var)[-1], int):
            return None
        if name == "relax.concat" and int(value.attrs["axis"]) % rank == rank - 1:
            fields = list(value.args[0].fields)
            return tuple(dims(f)[-1] for f in fields) if len(fields) > 1 and all(isinstance(f, relax.Var) for f in fields) else None
        if name not in ELEMENTWISE:
            return None
        if any(constant(arg) is not None and not per_channel(constant(arg), dims(var)[-1]) for arg in value.args):
            return None
        found = {self.sizes(arg, alone) for arg in value.args if isinstance(arg, relax.Var)}
        return found.pop() if len(found) == 1 else None

    def parts(self, var, sizes):
        """The parts of ``var``; :meth:`sizes` has said that it has them."""
        if var not in self.done:
            value = self.producer[var]
            if op_name(value) == "relax.concat":
                self.done[var] = [self.env[field] for field in value.args[0].fields]
            else:
                columns = zip(*(self.argument(arg, sizes) for arg in value.args))
                self.done[var] = [self.emit(relax.Call(value.op, list(args), value.attrs, value.ty_args)) for args in columns]
        return self.done[var]

    def argument(self, arg, sizes):
        """One operand of an elementwise operator, for each part."""
        if isinstance(arg, relax.Var):
            return self.parts(arg, sizes)
        array = constant(arg)
        if array is None or array.ndim == 0 or array.shape[-1] == 1:
            return [arg] * len(sizes)
        return [const(piece) for piece in np.split(array, np.cumsum(sizes[:-1]), axis=-1)]


def per_channel(array, channels):
    """Whether a constant is one value, or one for each channel."""
    return array.size == 1 or array.shape[-1] == channels == array.size


@tvm.transform.module_pass(opt_level=0, name="bnn.SplitConcats")
class SplitConcats:
    """See the module's documentation."""

    def transform_module(self, mod, _context):
        return _Split().run(mod)
