"""Bring equal things into one form before anything is inferred.

Dense layers on tensors of rank above two become two-dimensional; a concatenation of concatenations is one, and a slice of one that cuts
between its parts picks the parts (dense and improvement blocks then never copy what only passes through); multiplications and divisions by
one and additions of zero vanish; repeated expressions are computed once (two spellings of clip(x) must be one value for a straight-through
term to cancel).

Ordering contract: after ChannelsLast, before Binarise.
"""

import numpy as np
import tvm
from tvm import relax

from bnntvm import ops
from bnntvm.graph import Rewriter, const, constant, dims, dtype, op_name, same_dims

#: operator -> the constant on the right that makes it the identity
NEUTRAL = {"relax.multiply": 1, "relax.divide": 1, "relax.add": 0, "relax.subtract": 0}


class _Canonicalise(Rewriter):
    def begin(self):
        self.parts = {}

    def rewrite(self, var, value):
        name = op_name(value)
        if name in NEUTRAL:
            kept = self.neutral(var, value, NEUTRAL[name])
            if kept is not None:
                return kept
        if name == "relax.astype" and dtype(value.args[0]) == dtype(var):
            return self.env[value.args[0]] if isinstance(value.args[0], relax.Var) else self.emit(value.args[0])
        if name == "bnn.matmul":
            return self.dense(value)
        if name == "relax.concat":
            return self.concat(var, value)
        if name == "relax.strided_slice":
            picked = self.pick(var, value)
            if picked is not None:
                return picked
        return super().rewrite(var, value)

    def concat(self, var, call):
        """One flat concatenation; its parts are remembered for the slices and concatenations that follow."""
        axis = int(call.attrs["axis"]) % len(dims(var))
        fields = [self.substitute(f) for f in call.args[0].fields]
        parts = [p for f in fields for p in self.parts.get((f, axis), [f])] if all(isinstance(f, relax.Var) for f in fields) else fields
        out = self.emit(relax.op.concat(parts, axis))
        self.parts[out, axis] = parts
        return out

    def pick(self, var, call):
        """The parts that a slice along the axis of a concatenation selects, if it cuts between parts."""
        axes, begins, ends = ([_integer(v) for v in call.args[i]] for i in (1, 2, 3))
        strides = [_integer(v) for v in call.args[4]] if len(call.args) > 4 else [1]
        if len(axes) != 1 or None in (axes + begins + ends + strides) or strides[0] != 1:
            return None
        axis = axes[0] % len(dims(var))
        parts = self.parts.get((self.env[call.args[0]], axis)) if isinstance(call.args[0], relax.Var) else None
        if not parts or not all(isinstance(dims(part)[axis], int) for part in parts):
            return None
        begin, end, at, chosen = begins[0], min(ends[0], dims(call.args[0])[axis]), 0, []
        for part in parts:
            size = dims(part)[axis]
            if begin <= at and at + size <= end:
                chosen.append(part)
            elif at < end and at + size > begin:
                return None
            at += size
        if len(chosen) == 1:
            return chosen[0]
        if not chosen:
            return None
        out = self.emit(relax.op.concat(chosen, axis))
        self.parts[out, axis] = chosen
        return out

    def neutral(self, var, call, number):
        """The operand that an operation by a neutral constant leaves unchanged, or None. (x + 0 turns -0 to 0; nothing tells.)"""
        sides = [(call.args[0], call.args[1])]
        if op_name(call) in ("relax.multiply", "relax.add"):
            sides.append((call.args[1], call.args[0]))
        for kept, other in sides:
            array = constant(other)
            if array is not None and np.all(array == number) and isinstance(kept, relax.Var) and same_dims(dims(kept), dims(var)):
                return self.env[kept]
        return None

    def dense(self, call):
        """matmul of [..., K] by constant [K, N] on two-dimensional operands."""
        return self.flattened(self.substitute(call))

    def flattened(self, new):
        left = constant(new.args[0])
        if left is not None and left.ndim == 2 and constant(new.args[1]) is None and len(dims(new.args[1])) >= 2:
            return self.turned(new, left)
        data, weight = new.args[0], constant(new.args[1])
        shape = dims(data)
        if weight is None or weight.ndim != 2 or len(shape) < 3:
            return self.emit(new)
        rows = 1
        for d in shape[:-1]:
            rows = rows * d
        flat = self.emit(relax.op.reshape(data, [rows, shape[-1]]))
        out = self.emit(ops.call(ops.MATMUL, [flat, new.args[1]], layer=str(new.attrs["layer"])))
        return self.emit(relax.op.reshape(out, [*shape[:-1], weight.shape[1]]))


    def turned(self, call, left):
        """constant @ x as (x^T @ constant^T)^T: layers have their weights on the right."""
        rank = len(dims(call.args[1]))
        swap = [*range(rank - 2), rank - 1, rank - 2]
        data = self.emit(relax.op.permute_dims(call.args[1], swap))
        out = self.flattened(ops.call(ops.MATMUL, [data, const(np.ascontiguousarray(left.T))], layer=str(call.attrs["layer"])))
        return self.emit(relax.op.permute_dims(out, swap))


def _integer(prim):
    """The value of an integer operand, None if it is not a non-negative constant."""
    prim = getattr(prim, "value", prim)
    number = int(prim) if isinstance(prim, (int, tvm.tirx.IntImm)) else None
    return number if number is not None and number >= 0 else None


@tvm.transform.module_pass(opt_level=0, name="bnn.Canonicalise")
class Canonicalise:
    """See the module's documentation."""

    def transform_module(self, mod, _context):
        mod = relax.transform.EliminateCommonSubexpr()(mod)
        mod = _Canonicalise().run(mod)
        return relax.transform.EliminateCommonSubexpr()(mod)
