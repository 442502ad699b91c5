"""A compiled network, walked through kernel by kernel: what a virtual machine does, in a few lines of Python."""

import numpy as np
import tvm
from tvm import relax

from bnntvm.graph import bindings, op_name
from bnntvm.importer import import_model
from bnntvm.lower import Lower
from bnntvm.passes.float_layers import FloatLayers
from bnntvm.pipeline import optimise
from bnntvm.targets import registry


class Walk:
    """A network up to its kernels.

    Parameters
    ----------
    model : str, path, bytes or onnx.ModelProto
    target : str

    Subclasses say what is left to do with the lowered module (:meth:`legalised`), and run kernels (:meth:`call`).

    Attributes
    ----------
    isa : Isa
    mod : tvm.IRModule
        Kernels are called by ``call_tir``.
    kernels : dict of str to tirx.PrimFunc
    inputs, outputs : list of str
    """

    def __init__(self, model, target):
        self.isa = registry.resolve(target)
        imported = import_model(model)
        self.inputs, self.outputs = [i.name for i in imported.inputs], [o.name for o in imported.outputs]
        self.lower = Lower(self.isa)
        self.mod = self.legalised(FloatLayers()(self.lower.run(optimise(imported.mod, {}))))
        self.kernels = {gvar.name_hint: f for gvar, f in self.mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}

    def legalised(self, mod):
        """The module with kernels for what no family takes."""
        raise NotImplementedError

    def call(self, name, arrays, outputs):
        """Results of a kernel, whose operands are arrays and, of some, integers; ``outputs`` are full of garbage, and may be written."""
        raise NotImplementedError

    def run(self, feed):
        """Outputs by name."""
        sizes = {}
        for param, name in zip(self.mod["main"].params, self.inputs):
            sizes |= {d.name: s for d, s in zip(param.ty.shape, feed[name].shape) if isinstance(d, tvm.tirx.Var)}
        main = relax.transform.BindSymbolicVars(sizes, "main")(self.mod)["main"] if sizes else self.mod["main"]
        self.values = {p: np.ascontiguousarray(np.asarray(feed[n]).astype(str(p.ty.dtype))) for p, n in zip(main.params, self.inputs)}
        for binding in bindings(main):
            self.values[binding.var] = self._evaluate(binding.value)
        results = self._evaluate(main.body.body)
        return dict(zip(self.outputs, results if isinstance(results, list) else [results]))

    def _evaluate(self, expr):
        if isinstance(expr, relax.Var):
            return self.values[expr]
        if isinstance(expr, relax.Tuple):
            return [self._evaluate(field) for field in expr.fields]
        if isinstance(expr, relax.TupleGetItem):
            return self._evaluate(expr.tuple_value)[expr.index]
        if op_name(expr) == "relax.reshape":
            return np.ascontiguousarray(self._evaluate(expr.args[0])).reshape(_shape(expr.ty))
        if op_name(expr) == "relax.call_tir":
            types = list(expr.ty.fields) if isinstance(expr.ty, relax.TupleType) else [expr.ty]
            outputs = [np.full(_shape(ty), 77, str(ty.dtype)) for ty in types]
            results = self.call(expr.args[0].name_hint, self._evaluate(expr.args[1]), outputs)
            return results if len(types) > 1 else results[0]
        if isinstance(expr, tvm.tirx.IntImm):  # a size that a kernel cannot read off its arrays
            return int(expr)
        return np.ascontiguousarray(expr.value.numpy())


def _shape(ty):
    return tuple(int(d) for d in ty.shape)
