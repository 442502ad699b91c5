"""Whole networks for a GPU on a CPU: every kernel by the emulator, in the order in which the network calls them.

Kernels that TVM's lowering left (:mod:`bnntvm.schedules.cuda.fallback` gives them threads) are not written for the emulator: they run as
code for the CPU.
"""

import pathlib

import numpy as np
import tvm
from tvm import relax

from bnntvm.cuda.backend import device_target, legalise, own_results
from bnntvm.graph import bindings, op_name
from bnntvm.importer import import_model
from bnntvm.lower import Lower
from bnntvm.passes.float_layers import FloatLayers
from bnntvm.pipeline import optimise
from bnntvm.schedules.cuda import emulate, finite
from bnntvm.targets import registry


class Network:
    """A network, compiled for a GPU up to its kernels.

    Parameters
    ----------
    model : str, path, bytes or onnx.ModelProto
    target : str
        Such as "sm_80".

    Attributes
    ----------
    calls : list of (str, list, bool)
        After a run: the kernels that were called, shapes and types of their parameters, whether the emulator ran them.
    """

    def __init__(self, model, target):
        self.isa = registry.resolve(target)
        imported = import_model(model)
        self.inputs, self.outputs = [i.name for i in imported.inputs], [o.name for o in imported.outputs]
        lower = Lower(self.isa)
        mod = FloatLayers()(lower.run(optimise(imported.mod, {})))
        with device_target(self.isa):
            self.mod = own_results(legalise(mod))
        self.kernels = {gvar.name_hint: f for gvar, f in self.mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}
        self.kernels[finite.NAME] = finite.build(self.isa)
        self.on_processor = {}

    def run(self, feed):
        """Outputs by name."""
        self.calls, sizes = [], {}
        for param, name in zip(self.mod["main"].params, self.inputs):
            sizes |= {d.name: s for d, s in zip(param.ty.shape, feed[name].shape) if isinstance(d, tvm.tirx.Var)}
        main = relax.transform.BindSymbolicVars(sizes, "main")(self.mod)["main"] if sizes else self.mod["main"]
        values = {p: np.ascontiguousarray(np.asarray(feed[n]).astype(str(p.ty.dtype))) for p, n in zip(main.params, self.inputs)}

        def evaluate(expr):
            if isinstance(expr, relax.Var):
                return values[expr]
            if isinstance(expr, relax.Tuple):
                return [evaluate(field) for field in expr.fields]
            if isinstance(expr, relax.TupleGetItem):
                return evaluate(expr.tuple_value)[expr.index]
            if op_name(expr) == "relax.reshape":
                return np.ascontiguousarray(evaluate(expr.args[0])).reshape(_shape(expr.ty))
            if op_name(expr) == "relax.call_tir":
                return self._call(expr, evaluate(expr.args[1]))
            return np.ascontiguousarray(expr.value.numpy())

        for binding in bindings(main):
            values[binding.var] = evaluate(binding.value)
        results = evaluate(main.body.body)
        return dict(zip(self.outputs, results if isinstance(results, list) else [results]))

    def _call(self, call, arrays):
        name = call.args[0].name_hint
        types = list(call.ty.fields) if isinstance(call.ty, relax.TupleType) else [call.ty]
        outputs = [np.full(_shape(ty), 77, str(ty.dtype)) for ty in types]
        params = [*arrays, *outputs]
        self.calls.append((name, [(a.shape, a.dtype) for a in params], self.emulated(name)))
        self.execute(name, params)
        return outputs if len(types) > 1 else outputs[0]

    def emulated(self, name):
        """Whether the emulator runs a kernel."""
        return "bnn.simt" in (self.kernels[name].attrs or {})

    def execute(self, name, params):
        """Run a kernel on arrays, which it writes in place."""
        if self.emulated(name):
            emulate.run(self.kernels[name], params)
            return
        if name not in self.on_processor:
            func = self.kernels[name].with_attr("global_symbol", name)
            self.on_processor[name] = tvm.compile(tvm.IRModule({name: func}), target=tvm.target.Target("llvm"))[name]
        tensors = [tvm.runtime.tensor(a) for a in params]
        self.on_processor[name](*tensors)
        for array, tensor in zip(params, tensors):
            array[...] = tensor.numpy()


def _shape(ty):
    return tuple(int(d) for d in ty.shape)


_HERE = pathlib.Path(__file__)
#: Small networks with tensors that share memory.
DIGITS_LIKE = [_HERE.parents[2] / "tutorials" / "data" / "digits_bnn.onnx", _HERE.with_name("data") / "exact_resnet.onnx"]
