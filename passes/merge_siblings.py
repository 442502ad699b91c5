"""Layers that read the same bits, and whose results are joined, become one layer of all their channels.

``concat(f(conv(x, v)), g(conv(x, w)))`` becomes ``h(conv(x, [v; w]))`` where the elementwise ``f`` and ``g`` differ in their constants
only: ``h`` has both, one behind the other. A tensor that both read, such as the residual that ReActNet adds to either half, is read twice
by the one kernel: it stands there as ``tile(x, 2)`` along the channels, which FuseEpilogues makes an operand of the kernel and nobody
computes.

What follows the concatenation then belongs to that kernel too, and the halves are not stored and read again.

Ordering contract: after FoldThresholds and Canonicalise, before SplitConcats and FuseEpilogues.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm_ffi import structural_equal

from bnntvm import ops
from bnntvm.bits import WORD_BITS
from bnntvm.graph import Rewriter, bindings, const, constant, dims, dtype, op_name, uses
from bnntvm.spec import join_layers

from .fuse_epilogues import ELEMENTWISE
from .split_concats import per_channel

#: Steps from a concatenation up to its layers that are followed.
_MOST_STEPS = 32


class _Merge(Rewriter):
    def begin(self):
        self.producer = {binding.var: binding.value for binding in bindings(self.func)}
        self.uses = uses(self.func)

    def rewrite(self, var, value):
        if op_name(value) == "relax.concat" and int(value.attrs["axis"]) % len(dims(var)) == len(dims(var)) - 1:
            siblings = _Siblings(self, list(value.args[0].fields))
            if siblings.merge():
                return siblings.merged(siblings.parts)
        return super().rewrite(var, value)


class _Siblings:
    """The parts of one concatenation.

    A *row* is a tuple of expressions, one for each part, that stand at the same place in the parts' functions.
    """

    def __init__(self, rewriter, parts):
        self.rewriter, self.parts = rewriter, tuple(parts)
        self.seen, self.made, self.layers = {}, {}, 0  # row of variables with producers of their own -> times it is read; -> merged

    def merge(self):
        """Whether the parts are the same function of layers of the same data but for constants, and nothing else reads what is within."""
        if len(self.parts) < 2 or not all(isinstance(p, relax.Var) for p in self.parts):
            return False
        self.sizes = [dims(part)[-1] for part in self.parts]
        if not all(isinstance(s, int) and s % WORD_BITS == 0 for s in self.sizes) or not self.alike(self.parts):
            return False
        return self.layers > 0 and all(self.rewriter.uses[var] == count for row, count in self.seen.items() for var in row)

    def alike(self, row, depth=0):
        if all(constant(one) is not None for one in row):
            return all(per_channel(constant(one), size) for one, size in zip(row, self.sizes))
        if not all(isinstance(one, relax.Var) for one in row):
            return all(not isinstance(one, relax.Var) and structural_equal(one, row[0]) for one in row)
        if all(one.same_as(row[0]) for one in row):
            return self.sizes == [dims(row[0])[-1]] * len(row) and dtype(row[0]) == "float32"
        self.seen[row] = self.seen.get(row, 0) + 1
        return self.seen[row] > 1 or depth < _MOST_STEPS and [dims(one)[-1] for one in row] == self.sizes and self.same_call(row, depth)

    def same_call(self, row, depth):
        calls = [self.rewriter.producer.get(one) for one in row]
        first = calls[0]
        if first is None or any(op_name(call) != op_name(first) or len(call.args) != len(first.args) for call in calls):
            return False
        if op_name(first) == "bnn.conv2d_bits":
            self.layers += 1
            return int(first.attrs["groups"]) == 1 and all(_same_layer(call, first) for call in calls)
        equal = op_name(first) in ELEMENTWISE and all(structural_equal(call.attrs, first.attrs) for call in calls)
        return equal and all(self.alike(args, depth + 1) for args in zip(*(call.args for call in calls)))

    def merged(self, row):
        """The joined value of a row that :meth:`alike` has accepted."""
        if row not in self.made:
            self.made[row] = self.join(row)
        return self.made[row]

    def join(self, row):
        first, rewriter = row[0], self.rewriter
        if constant(first) is not None:
            return _joined([constant(one) for one in row], self.sizes)
        if not isinstance(first, relax.Var):
            return first
        if all(one.same_as(first) for one in row):
            return rewriter.emit(relax.op.tile(rewriter.env[first], [1] * (len(dims(first)) - 1) + [len(row)]))
        calls = [rewriter.producer[one] for one in row]
        if op_name(calls[0]) == "bnn.conv2d_bits":
            return self.layer(calls)
        args = [self.merged(args) for args in zip(*(call.args for call in calls))]
        return rewriter.emit(relax.Call(calls[0].op, args, calls[0].attrs, calls[0].ty_args))

    def layer(self, calls):
        weights = const(np.concatenate([constant(call.args[-1]) for call in calls]))
        data = [self.rewriter.substitute(arg) for arg in calls[0].args[:-1]]
        attrs = dict(calls[0].attrs) | {"layer": join_layers(str(call.attrs["layer"]) for call in calls)}
        return self.rewriter.emit(ops.call(ops.CONV_BITS, [*data, weights], **attrs))


def _joined(arrays, sizes):
    """Constants of the parts as one of all channels; what is one and the same value stays that."""
    if all(array.size == 1 and array.tobytes() == arrays[0].tobytes() for array in arrays):
        return const(arrays[0])
    return const(np.concatenate([np.broadcast_to(array.reshape(-1), (size,)) for array, size in zip(arrays, sizes)]))


def _same_layer(call, other):
    """Whether two layers differ only in their weights, and in the number of their channels."""
    weights, others = constant(call.args[-1]), constant(other.args[-1])
    if weights is None or others is None or weights.shape[1:] != others.shape[1:] or weights.dtype != others.dtype:
        return False
    own, its = ({k: str(v) for k, v in dict(c.attrs).items() if k != "layer"} for c in (call, other))
    return own == its and all(a.same_as(b) for a, b in zip(call.args[:-1], other.args[:-1]))


@tvm.transform.module_pass(opt_level=0, name="bnn.MergeSiblings")
class MergeSiblings:
    """See the module's documentation."""

    def transform_module(self, mod, _context):
        return _Merge().run(mod)
