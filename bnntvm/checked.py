"""Entry points that check their inputs for NaN and infinity on the way.

A kernel that packs or converts an input reads all of it anyway. ``main_checked`` is ``main`` with such kernels replaced by ones that raise
an error where an element is not finite (:class:`bnntvm.schedules.finite.Watch`), so that the input is read once. Where there is one result
it is not wrapped in a tuple. :mod:`bnntvm.runtime` runs this entry point where the check is wanted; who does not want it runs ``main``.
"""

from __future__ import annotations

import tvm
from tvm import relax

from bnntvm import spec as sp
from bnntvm.graph import Rewriter, bindings, dtype, op_name
from bnntvm.schedules import families

NAME = "main_checked"


def add_checked(mod, kernels, isa):
    """Add ``main_checked`` to a module of kernels, if it would check anything.

    Parameters
    ----------
    mod : IRModule
    kernels : dict
        Name of a kernel to :class:`bnntvm.lower.Kernel`.
    isa : Isa

    Returns
    -------
    (IRModule, list of bool)
        Which inputs of ``main`` the entry point checks.
    """
    rewriter = _Checked(kernels, isa)
    changed = rewriter.run(mod)
    inputs = [p in rewriter.checked for p in mod["main"].params]
    if not any(inputs):
        return mod, inputs
    out = tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)
    for gvar in rewriter.replaced.values():
        out[gvar] = changed[gvar]
    out[tvm.ir.GlobalVar(NAME)] = relax.utils.copy_with_new_vars(changed["main"].with_attr("global_symbol", NAME))
    return out, inputs


class _Checked(Rewriter):
    def __init__(self, kernels, isa):
        self.kernels, self.isa = kernels, isa
        self.checked, self.replaced, self.origin = set(), {}, {}

    def begin(self):
        self.origin = {p: p for p in self.func.params}

    def rewrite(self, var, value):
        if op_name(value) == "relax.reshape" and value.args[0] in self.origin:
            self.origin[var] = self.origin[value.args[0]]
        if op_name(value) != "relax.call_tir":
            return super().rewrite(var, value)
        kernel, operands = self.kernels.get(value.args[0].name_hint), list(value.args[1])
        data = self.origin.get(operands[0]) if operands and isinstance(operands[0], relax.Var) else None
        if kernel is None or data is None or data in self.checked or dtype(data) != "float32" or not _watches(kernel.spec):
            return super().rewrite(var, value)
        self.checked.add(data)
        call = self.substitute(value)
        return self.emit(relax.Call(call.op, [self.watching(kernel, value.args[0]), *call.args[1:]], call.attrs, call.ty_args))

    def watching(self, kernel, gvar):
        """The kernel that does the same and raises."""
        if gvar not in self.replaced:
            name = f"{gvar.name_hint}_checked"
            prim = families.of(kernel.spec).build(kernel.spec, kernel.schedule, self.isa, finite=True)
            self.replaced[gvar] = self.builder.add_func(prim.with_attr("bnn.kernel", name).without_attr("global_symbol"), name)
        return self.replaced[gvar]

    def finish(self, body):
        values = {binding.var: binding.value for binding in bindings(self.func)}
        while isinstance(values.get(body), (relax.Var, relax.Tuple)):
            body = values[body]
        single = isinstance(body, relax.Tuple) and len(body.fields) == 1
        return self.substitute(body.fields[0] if single else body)


def _watches(spec):
    """Whether the family of a specification builds kernels that check their data."""
    return isinstance(spec, sp.PlanarPack) or isinstance(spec, sp.Map) and spec.dtype == "float32"
