"""Small tools to read and rebuild the one dataflow block that a bnntvm function is made of."""

from __future__ import annotations

import re

import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from tvm.ir.expr import GenericConst


def bindings(func):
    """All variable bindings of ``func`` in order."""
    return [binding for block in func.body.blocks for binding in block.bindings]


def constant(expr):
    """The numpy array of a Relax constant, else None."""
    return expr.value.numpy() if isinstance(expr, GenericConst) else None


def dims(expr_or_type):
    """Shape as a tuple: ints where static, TIR expressions where dynamic."""
    ty = expr_or_type if isinstance(expr_or_type, relax.TensorType) else expr_or_type.ty
    return tuple(int(d) if isinstance(d, (int, tvm.tirx.IntImm)) else d for d in ty.shape)


def same_dims(a, b):
    """Whether two shapes are equal, dynamic dimensions compared structurally."""
    return len(a) == len(b) and all(same_dim(p, q) for p, q in zip(a, b))


def same_dim(p, q):
    """Whether two dimensions are provably equal."""
    if isinstance(p, int) or isinstance(q, int):
        return isinstance(p, int) and isinstance(q, int) and p == q
    return p is q or bool(tvm_ffi.structural_equal(p, q))


def dtype(expr):
    """dtype of a tensor expression, as a string."""
    return str(expr.ty.dtype)


def op_name(expr):
    """Name of the operator that ``expr`` calls, else None."""
    if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op):
        return expr.op.name
    return None


def uses(func):
    """Variable -> number of uses in ``func`` (uses by the result included)."""
    count = {}
    for binding in bindings(func):
        for var in operands(binding.value):
            count[var] = count.get(var, 0) + 1
    for var in operands(func.body.body):
        count[var] = count.get(var, 0) + 1
    return count


def operands(expr):
    """Variables that ``expr`` reads, in order, with repetitions."""
    if isinstance(expr, relax.Var):
        return [expr]
    if isinstance(expr, relax.Call):
        return [var for arg in expr.args for var in operands(arg)]
    if isinstance(expr, relax.Tuple):
        return [var for arg in expr.fields for var in operands(arg)]
    if isinstance(expr, relax.TupleGetItem):
        return operands(expr.tuple_value)
    return []


def layer_hint(output):
    """A name for variables that a layer's kernels make: passes keep names, so what a call computes is known behind all of them.

    Parameters
    ----------
    output : str or None
        Name of the ONNX node's first output, or several joined.
    """
    return f"layer_{output.encode().hex()}_" if output else ""


def layer_of(var):
    """The layer, or several joined, that a name of :func:`layer_hint` stands for; or None."""
    found = re.match("layer_((?:[0-9a-f]{2})+)_", var.name)
    return bytes.fromhex(found[1]).decode() if found else None


class Rewriter:
    """Rebuilds a function binding by binding.

    Subclasses override :meth:`rewrite`; ``self.env`` maps the old variables to the new expressions, ``self.emit`` adds a binding.
    """

    def run(self, mod, name="main"):
        """A new module in which function ``name`` is rebuilt."""
        func = mod[name]
        self.mod, self.func = mod, func
        self.builder = relax.BlockBuilder(tvm.IRModule({gv: f for gv, f in mod.functions_items() if gv.name_hint != name}, attrs=mod.attrs))
        self.env = {param: param for param in func.params}
        self.begin()
        with self.builder.function(name, list(func.params), attrs=dict(func.attrs) if func.attrs else {}):
            with self.builder.dataflow():
                self.walk()
                result = self.builder.emit_output(self.finish(func.body.body))
            self.builder.emit_func_output(result)
        out = self.builder.finalize()
        return relax.transform.DeadCodeElimination()(out)

    def begin(self):
        """Hook before the first binding."""

    def walk(self):
        """Visit every binding in order."""
        for binding in bindings(self.func):
            self.env[binding.var] = self.rewrite(binding.var, binding.value)

    def rewrite(self, var, value):
        """The new expression for ``var``; the default re-emits ``value`` on the new operands."""
        return self.emit(self.substitute(value), var.name)

    def finish(self, body):
        """The function's result on the new variables."""
        return self.substitute(body)

    def emit(self, value, name=""):
        """Bind ``value`` unless it is already a variable or a constant."""
        return value if isinstance(value, (relax.Var, GenericConst)) else self.builder.emit(value, name_hint=name)

    def substitute(self, expr):
        """``expr`` on the new operands."""
        if isinstance(expr, relax.Var):
            return self.env[expr]
        if isinstance(expr, relax.Call):
            return relax.Call(expr.op, [self.substitute(arg) for arg in expr.args], expr.attrs, expr.ty_args)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.substitute(arg) for arg in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self.substitute(expr.tuple_value), expr.index)
        return expr


def const(array, kind=None):
    """A Relax constant from anything numpy takes; float64 becomes float32."""
    array = np.asarray(array, kind)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    return relax.const(np.ascontiguousarray(array) if array.ndim else array, str(array.dtype))
