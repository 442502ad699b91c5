"""From the passes' result to a list of steps in C's terms: kernels with their specifications, buffers, constants, all shapes known.

:class:`bnntvm.lower.Lower` finds the specifications. Here a group becomes a call of an external function with the canonical weights of its
specification; operators that no kernel family takes go through TVM's own legalisation and stay TensorIR, which :mod:`.tir` prints.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax, tirx

from bnntvm import spec as sp
from bnntvm.bits import pack_bits
from bnntvm.errors import UnsupportedError
from bnntvm.graph import bindings, const, constant, dims, dtype, op_name
from bnntvm.lower import Lower
from bnntvm.passes.float_layers import FloatLayers

from .program import Buffer, Loose, Program, Step
from .weights import bits_of_weights


class _Specify(Lower):
    """Calls of fused functions become calls of external functions, one for each call; ``specs``: their name -> the specification."""

    def __init__(self):
        super().__init__(None)
        self.specs = {}

    def pads_with_ones(self, spec):
        return spec.groups == 1 and spec.window.dilations == (1, 1)

    def stores_planar(self, spec):
        return all(o.kind == "tensor" and o.dtype == "float32" for o in spec.epilogue.outputs)

    def stores_pooled(self, spec):
        return False

    def call(self, spec, operands, types, weights, layer=None):
        name = f"bnn_{len(self.specs)}"
        self.specs[name] = spec
        self.lowered.kernels[name] = spec
        if isinstance(spec, sp.Int8Conv2d):
            weights = bits_of_weights(spec, weights)
        operands = _without_padding(spec, [const(weights) if a is None else a for a in operands])
        return self.emit(relax.op.call_dps_packed(name, relax.Tuple(operands), types if len(types) > 1 else types[0]))


def _without_padding(spec, operands):
    """``operands`` with the constants of channels cut to the channels there are, and tails of words cleared."""
    epilogue = getattr(spec, "epilogue", None)
    channels = next((getattr(spec, n) for n in ("out_channels", "out_features", "classes") if hasattr(spec, n)), None)
    if channels is None and epilogue is not None:
        channels = spec.channels if isinstance(spec.channels, int) else sum(spec.channels)
    first = len(operands) - len(epilogue.inputs if epilogue else ())
    out = list(operands)
    for i, operand in enumerate(operands):
        array, kind = constant(operand), epilogue.inputs[i - first].kind if i >= first else None
        if array is None:
            continue
        if kind == "channel":
            out[i] = const(array[:channels])
        elif kind == "words":
            out[i] = const(array & pack_bits(np.ones(channels, bool)))
        elif kind is None and array.dtype == np.float32 and (getattr(spec, "coding", None) or hasattr(spec, "planes")):
            out[i] = const(array[:, :channels])
    return out


def collect(mod, batch=1):
    """The program of an optimised module.

    Parameters
    ----------
    mod : tvm.IRModule
        What :func:`bnntvm.pipeline.optimise` returns.
    batch : int
        Size of every dynamic dimension.
    """
    specify = _Specify()
    mod = FloatLayers()(_fixed(specify.run(mod), batch))
    names = _origins(mod["main"])
    with tvm.target.Target("llvm"):
        mod = relax.transform.LegalizeOps(skip_ops=["relax.reshape"])(mod)
        mod = relax.transform.DeadCodeElimination()(mod)
    return _Builder(mod, specify.specs, names).program()


def _fixed(mod, batch):
    """``mod`` with every dynamic dimension of its inputs set to ``batch``."""
    free = {d.name for p in mod["main"].params for d in dims(p) if isinstance(d, tirx.Var)}
    if not free:
        return mod
    return relax.transform.BindSymbolicVars(dict.fromkeys(sorted(free), batch), "main")(mod)


def _origins(main):
    """Operators that no kernel family takes, by name of the function that legalisation will make of them."""
    return {(op_name(b.value) or "").rsplit(".", 1)[-1]: op_name(b.value) for b in bindings(main) if op_name(b.value)}


class _Builder:
    """Walks ``main`` once."""

    def __init__(self, mod, specs, names):
        self.mod, self.specs, self.names = mod, specs, names
        self.values, self.constants, self.out = {}, {}, Program()

    def program(self):
        main = self.mod["main"]
        for param in main.params:
            self.values[param] = Buffer(_static(param), dtype(param), "input")
            self.out.inputs.append(self.values[param])
        for binding in bindings(main):
            self.values[binding.var] = self.visit(binding.var, binding.value)
        result = self.value(main.body.body)
        self.out.outputs = [self.output(b) for b in (result if isinstance(result, tuple) else (result,))]
        return self.out

    def output(self, buffer):
        """``buffer`` as a result of the network: the caller's memory."""
        if buffer.role == "workspace":
            buffer.role = "output"
            return buffer
        made = Buffer(buffer.shape, buffer.dtype, "output")
        self.out.steps.append(Step("copy", [buffer], [made], "copy"))
        return made

    def value(self, expr):
        if isinstance(expr, relax.Var):
            return self.values[expr]
        if isinstance(expr, relax.Tuple):
            return tuple(self.value(f) for f in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            return self.value(expr.tuple_value)[expr.index]
        array = constant(expr)
        if array is None:
            raise UnsupportedError(f"standalone C knows no {type(expr).__name__}", hint="this is a gap in bnntvm: please report it")
        key = array.shape, str(array.dtype), array.tobytes()
        return self.constants.setdefault(key, Buffer(array.shape, str(array.dtype), "constant", array))

    def visit(self, var, value):
        name = op_name(value)
        if name is None:
            return self.value(value)
        if name == "relax.reshape":
            return self.value(value.args[0])  # the same memory; kernels know their shapes
        if name == "relax.call_dps_packed":
            spec = self.specs[str(value.args[0].global_symbol)]
            return self.step(spec, value, var, type(spec).__name__)
        if name == "relax.call_tir":
            name, prim = str(value.args[0].name_hint), self.mod[value.args[0]]
            plain = name.rstrip("0123456789").removeprefix("tir_")
            return self.step(Loose(name, prim), value, var, self.names.get(plain, plain))
        raise UnsupportedError(
            f"standalone C has no operator {name.removeprefix('relax.')}",
            where=str(getattr(var, "name_hint", "")),
            hint="bnntvm.build compiles it",
        )

    def step(self, what, call, var, origin):
        types = list(var.ty.fields) if isinstance(var.ty, relax.TupleType) else [var.ty]
        made = [Buffer(_static(t), str(t.dtype)) for t in types]
        reads = [self.value(a) for a in call.args[1].fields]
        self.out.steps.append(Step(what, reads, made, origin))
        return tuple(made) if len(made) > 1 or isinstance(var.ty, relax.TupleType) else made[0]


def _static(expr):
    shape = dims(expr)
    if not all(isinstance(d, int) for d in shape):
        raise UnsupportedError(f"a tensor of shape {list(map(str, shape))} is known at run time only", hint="standalone C needs every size")
    return shape
