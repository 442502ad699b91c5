"""The walk over an ONNX graph."""

from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
import tvm
from onnx import TensorProto, helper
from tvm import relax, tirx

from ..errors import BnnError, ModelError, UnsupportedError
from . import dims, fold, registry, source
from .model import Imported, LayerInfo, TensorInfo
from .values import Dims, Expanded, broadcast_shape, dtype_of, is_constant, same_dim, shape_of

#: The layers that the report lists; folded ones too.
LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"}
#: Operators whose value at an index depends on their inputs at the index that broadcasting gives: they commute with broadcasting.
_ELEMENTWISE = set(
    "Abs Add And Cast CastLike Ceil Clip Cos Div Equal Erf Exp Floor Greater GreaterOrEqual Identity Less LessOrEqual Log Max Min Mod Mul Neg"
    " Not Or Pow Reciprocal Relu Round Sigmoid Sign Sin Sqrt Sub Sum Tanh Where Xor".split()
)
#: Converters that take constants too: they know 4-bit types, which numpy lacks.
_FOLDS_ITSELF = {"QuantizeLinear", "DequantizeLinear"}
_CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap"}


@dataclass
class Node:
    """An ONNX node with its attributes as Python values.

    Attributes
    ----------
    proto : onnx.NodeProto
    name : str
        Never empty.
    domain, op_type : str
    opset : int
        Version of the node's domain in this model.
    attrs : dict
        Tensors as numpy arrays, strings decoded, the rest as onnx.helper gives it.
    inputs, outputs : list of str
    used : list of bool
        Which outputs something reads.
    """

    proto: object
    name: str
    domain: str
    op_type: str
    opset: int
    attrs: dict
    inputs: list
    outputs: list
    used: list

    @property
    def where(self):
        return f"node '{self.name}' ({self.domain + '::' if self.domain else ''}{self.op_type})"


class Context:
    """What converters build with: the Relax bindings made so far and the constants.

    Every tensor in half precision has become float32 before a converter sees it.

    Attributes
    ----------
    batch : tirx.Var
        The dynamic batch.
    element_types : dict of str to int
        ONNX element type of each initializer, as the file has it.
    bindings : list of relax.VarBinding
    layers : list of LayerInfo
    node : Node
        The one being converted.
    args : list
        Its inputs' values.
    """

    def __init__(self, batch, element_types=()):
        self.batch, self.element_types = batch, dict(element_types)
        self.bindings, self.layers = [], []
        self.node, self.args = None, []
        self._builder = relax.BlockBuilder()
        self._constants = {}
        self._names = set()

    # ---- building

    def emit(self, expr, hint=None):
        """Bind ``expr``, whose arguments are variables and constants, to a new variable and return that."""
        expr = self._builder.normalize(expr)
        if isinstance(expr.ty, relax.TensorType):
            if not isinstance(expr.ty.shape, relax.ShapeExpr):
                raise self.unsupported("the shape of a result depends on the batch in a way that cannot be followed")
            if any(isinstance(d, int) and d == 0 for d in shape_of(expr)):
                raise self.unsupported("a tensor has no elements", why=f"its shape is {list(shape_of(expr))}")
        var = relax.DataflowVar(self._fresh(hint or (self.node.outputs[0] if self.node else "value")), expr.ty)
        self.bindings.append(relax.VarBinding(var, expr))
        return var

    def _fresh(self, hint):
        stem = "".join(c if c.isalnum() else "_" for c in hint) or "value"
        stem = stem if not stem[0].isdigit() else f"v{stem}"
        name, i = stem, 0
        while name in self._names:
            i += 1
            name = f"{stem}_{i}"
        self._names.add(name)
        return name

    def const(self, array):
        """A Relax constant; one object for one array, so that shared weights stay shared."""
        found = self._constants.get(id(array))
        if found is None:
            kept = array  # the dictionary holds the array too: its id stays its own
            found = self._constants[id(array)] = (relax.const(np.ascontiguousarray(kept).reshape(kept.shape), str(kept.dtype)), kept)
        return found[0]

    def tensor(self, value):
        """A value as a Relax expression of its full shape."""
        if isinstance(value, relax.Expr):
            return value
        if isinstance(value, Expanded):
            return self.emit(relax.op.broadcast_to(self.const(value.array), value.shape))
        if isinstance(value, Dims):
            raise self.unsupported("a shape that depends on the batch is used as a tensor", hint="export the model with a static batch")
        return self.const(value)

    def operands(self, *values):
        """Values for an elementwise operator as Relax expressions.

        Constants become the smallest that broadcast to the same result: an axis along which the data repeat and which a run-time operand
        has too is shrunk to 1, single numbers to rank 0, all others are reshaped to the rank of the result.
        """
        runtime = [shape_of(v) for v in values if isinstance(v, relax.Expr)]
        if not runtime:
            return [self.tensor(v) for v in values]
        full = broadcast_shape(*map(shape_of, values))
        covered = [any(len(s) >= i and same_dim(s[-i], full[-i]) for s in runtime) for i in range(len(full), 0, -1)]
        results = []
        for value in values:
            if isinstance(value, Expanded) and all(covered):
                value = value.array
            results.append(self.const(self._shrunk(value, covered)) if is_constant(value) else self.tensor(value))
        return results

    def _shrunk(self, array, covered):
        offset = len(covered) - array.ndim
        small = array
        for axis in range(array.ndim):
            if covered[offset + axis] and array.shape[axis] > 1:
                first = np.ascontiguousarray(small.take([0], axis))
                if np.ascontiguousarray(np.broadcast_to(first, small.shape)).tobytes() == np.ascontiguousarray(small).tobytes():
                    small = first
        if array.ndim == 0 or small.size == 1 and all(covered):
            return small.reshape(())
        if small is array and offset == 0:
            return array
        return small.reshape((1,) * offset + small.shape)

    # ---- reading

    def array(self, value, what):
        """``value`` as a numpy array; an error naming ``what`` where it is not constant."""
        if is_constant(value):
            return value
        raise self.unsupported(f"{what} must be constant", why="it is computed at run time")

    def ints(self, value, what):
        """``value`` as a list of ints."""
        return [int(v) for v in self.array(value, what).reshape(-1)]

    def dims(self, value, what):
        """``value`` as a tuple of ints and TIR expressions."""
        return tuple(value.array.reshape(-1)) if isinstance(value, Dims) else tuple(self.ints(value, what))

    def static(self, value, what="the shape"):
        """Shape of ``value`` behind the first axis as ints."""
        shape = shape_of(value)
        if any(not isinstance(d, int) for d in shape[1:]):
            raise self.unsupported(f"{what} must be static behind its first axis", why=f"it is {shape}")
        return shape

    def unsupported(self, what, why=None, hint=None):
        """An UnsupportedError at the node in work."""
        return UnsupportedError(what, where=self.node.where, why=why, hint=hint)

    def add_layer(self, output_shape, reduction, weight, folded=False, batch_first=True):
        """Report the node in work as a layer with ``reduction`` multiply-accumulates for each output element."""
        node = self.node
        sizes = [d if isinstance(d, int) else 1 for d in output_shape]
        if batch_first and sizes:
            sizes[0] = 1
        if weight is not None and weight.dtype.kind == "f" and not np.isfinite(weight).all():
            name = next((name for name, arg in zip(node.inputs, self.args) if arg is weight), node.inputs[-1])
            raise ModelError(
                "the weights of a layer hold NaN or infinity",
                where=node.where,
                why=f"'{name}' is not finite",
                hint="train or export the model again",
            )
        size = 0 if weight is None else weight.size
        shape = None if weight is None else tuple(weight.shape)
        self.layers.append(LayerInfo(node.name, node.outputs[0], node.op_type, prod(sizes) * reduction, shape, 4 * size, folded))


def import_model(model_source):
    """Turn an ONNX model into a Relax module.

    Parameters
    ----------
    model_source : str, os.PathLike, bytes or onnx.ModelProto

    Returns
    -------
    Imported

    Raises
    ------
    ModelError
        The model is not readable or not valid.
    UnsupportedError
        The model is valid and uses what bnntvm does not compile.
    """
    model = source.load(model_source)
    graph = model.graph
    declared = {initializer.name for initializer in graph.initializer}
    real_inputs = [value for value in graph.input if value.name not in declared]
    batch = tirx.Var("n", "int64")
    inputs = [_input_info(value) for value in real_inputs]
    half = {value.name for value in real_inputs if value.type.tensor_type.elem_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16)}
    output_types = {value.name: _type_name(value.type.tensor_type.elem_type) for value in graph.output}
    model = _expanded(source.without_half(model))
    graph = model.graph
    nodes = _nodes(model)
    _check_operators(nodes)
    initializers = {tensor.name: _initializer(tensor) for tensor in graph.initializer}

    ctx = Context(batch, {tensor.name: tensor.data_type for tensor in graph.initializer})
    parameters = [_parameter(info, batch, info.name in half) for info in inputs]
    values = {**initializers, **{info.name: parameter for info, parameter in zip(inputs, parameters)}}
    for node in nodes:
        _convert(ctx, node, values)

    results = [ctx.tensor(_lookup(values, output.name)) for output in graph.output]
    outputs = [
        TensorInfo(value.name, _declared_shape(result, batch, inputs), output_types[value.name] or dtype_of(result))
        for value, result in zip(graph.output, results)
    ]
    overridable = {value.name: initializers[value.name] for value in graph.input if value.name in declared}
    return Imported(_module(ctx, parameters, results), inputs, outputs, ctx.layers, overridable)


def _expanded(model):
    """The model with operators that have no converter replaced by the function that ONNX defines them by, where it does."""
    domains = {o.domain: o.version for o in model.opset_import if o.domain in ("", "ai.onnx")}
    names = set()
    for node in model.graph.node:
        if node.domain not in domains or registry.lookup(node.domain, node.op_type) or node.op_type in FOLD_ONLY | _CONTROL_FLOW:
            continue
        schema = onnx.defs.get_schema(node.op_type, domains[node.domain], "")
        if schema.has_function or schema.has_context_dependent_function:
            names.add((node.domain, node.op_type))
    if not names:
        return model
    typed = onnx.shape_inference.infer_shapes(model)  # bodies may depend on the types of their inputs
    return onnx.inliner.inline_selected_functions(typed, sorted(names), inline_schema_functions=True)


def _nodes(model):
    versions = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in model.opset_import}
    read = {name for node in model.graph.node for name in node.input} | {output.name for output in model.graph.output}
    result = []
    for index, proto in enumerate(model.graph.node):
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        attrs = {a.name: _attribute(a) for a in proto.attribute}
        name = proto.name or f"{proto.op_type}_{index}"
        outputs = list(proto.output)
        used = [name in read for name in outputs]
        result.append(Node(proto, name, domain, proto.op_type, versions.get(domain, 1), attrs, list(proto.input), outputs, used))
    return result


def _attribute(attribute):
    value = helper.get_attribute_value(attribute)
    if isinstance(value, TensorProto):
        return fold.to_array(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (list, tuple)):
        return [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in value]
    return list(value) if type(value).__name__.startswith("Repeated") else value


def _check_operators(nodes):
    """Refuse unknown operators before any work is done, all at once."""
    unknown = {}
    for node in nodes:
        if not _known(node):
            unknown.setdefault(f"{node.domain}::{node.op_type}" if node.domain else node.op_type, node)
    if not unknown:
        return
    name, node = next(iter(unknown.items()))
    more = f"; also not supported here: {', '.join(list(unknown)[1:])}" if len(unknown) > 1 else ""
    if node.op_type in _CONTROL_FLOW:
        why = "control flow is not compiled: the network must be one graph without branches or loops"
        hint = "export the model with constant conditions and unrolled loops, or simplify it (onnxsim, onnxslim)"
    else:
        why, hint = f"operator {name} of domain '{node.domain or 'ai.onnx'}' has no converter", _supported_hint()
    raise UnsupportedError(f"operator {name} is not supported", where=f"node '{node.name}'", why=why + more, hint=hint)


def _supported_hint():
    lines, line = [], "supported are"
    for name in registry.supported():
        if len(line) + len(name) > 110:
            lines, line = [*lines, line], "   "
        line += f" {name}"
    return "\n  ".join([*lines, line, "others can be added with an entry point of the group 'bnntvm.importer'"])


def _known(node):
    foldable = node.domain == "" and node.op_type not in _CONTROL_FLOW and not _produces_unsupported(node)
    return registry.lookup(node.domain, node.op_type) is not None or (foldable and node.op_type in FOLD_ONLY)


#: Operators without a converter that may appear where everything is constant.
FOLD_ONLY = set("Compress Det EyeLike GatherND Hardmax NonZero OneHot ReverseSequence Scatter ScatterElements ScatterND Unique".split())


def _produces_unsupported(node):
    return node.op_type.startswith(("Sequence", "String", "Optional"))


def _convert(ctx, node, values):
    """Give each output of ``node`` its value."""
    ctx.node = node
    args = [_lookup(values, name) if name else None for name in node.inputs]
    ctx.args = args
    try:
        results = _results(ctx, node, args)
    except BnnError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
        shapes = ", ".join("-" if a is None else f"{dtype_of(a)}{list(shape_of(a))}" for a in args)
        raise UnsupportedError("a node cannot be converted", where=f"{node.where}, inputs {shapes}", why=why) from error
    for name, used, result in zip(node.outputs, node.used, [*results, *[None] * len(node.outputs)]):
        if name and result is None and used:
            raise ctx.unsupported(f"output '{name}' of this operator is not supported", hint="export the model for inference")
        if name:
            values[name] = result


def _results(ctx, node, args):
    present = [a for a in args if a is not None]
    converter = registry.lookup(node.domain, node.op_type)
    if present and node.domain == "" and node.op_type not in _FOLDS_ITSELF and all(is_constant(a) for a in present):
        return _folded(ctx, node, args)
    if present and node.domain == "" and node.op_type in _ELEMENTWISE and all(is_constant(a) or isinstance(a, Expanded) for a in present):
        small = [a.array if isinstance(a, Expanded) else a for a in args]
        return [Expanded(fold.evaluate(node, small)[0], broadcast_shape(*[shape_of(a) for a in present]))]
    if node.domain == "":
        result = dims.evaluate(ctx, node, args)
        if result is not None:
            return [result]
    if converter is None:
        raise ctx.unsupported(f"{node.op_type} is supported on constants only", why="an input is computed at run time")
    result = converter(ctx, node, *args)
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _folded(ctx, node, args):
    results = fold.evaluate(node, args)
    if node.op_type in LAYERS:
        second = 3 if node.op_type.startswith("QLinear") else 1
        weight = args[second]
        ctx.add_layer(results[0].shape, 0, weight, folded=True)
    return results


@registry.converts("Constant")
def _constant(ctx, node):
    """Value of a Constant node, whichever attribute holds it."""
    (kind, value), *_ = node.attrs.items()
    types = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    if kind in types:
        return np.array(value, dtype=types[kind])
    if kind != "value" or not isinstance(value, np.ndarray):
        raise ctx.unsupported(f"a Constant with the attribute {kind} is not supported", hint="store it as a dense tensor")
    return _checked(value, node.outputs[0])


def _initializer(tensor):
    try:
        array = fold.to_array(tensor)
    except Exception as error:
        raise ModelError("an initializer cannot be read", where=f"'{tensor.name}'", why=str(error)) from error
    return _checked(array, tensor.name)


def _checked(array, name):
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise ModelError("a constant holds NaN", where=f"initializer '{name}'", hint="train or export the model again")
    if array.dtype.kind in "OSU":
        raise UnsupportedError("string tensors are not supported", where=f"initializer '{name}'")
    return array


def _lookup(values, name):
    try:
        return values[name]
    except KeyError:
        raise ModelError("the ONNX model is not valid", where=f"tensor '{name}'", why="it is read and nothing computes it") from None


# ---- inputs, outputs, module


def _type_name(elem_type):
    """numpy's name of an ONNX element type, "" where it is not set."""
    return str(np.dtype(helper.tensor_dtype_to_np_dtype(elem_type))) if elem_type else ""


def _input_info(value):
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise UnsupportedError("only tensors can be inputs", where=f"input '{value.name}'", why=f"it is a {kind or 'value of no type'}")
    tensor = value.type.tensor_type
    if tensor.elem_type == TensorProto.STRING:
        raise UnsupportedError("string tensors are not supported", where=f"input '{value.name}'")
    dtype = _type_name(tensor.elem_type)
    if dtype in ("float64", "complex64", "complex128"):
        raise UnsupportedError(f"{dtype} inputs are not supported", where=f"input '{value.name}'", hint="export the model in float32")
    if not tensor.HasField("shape"):
        raise UnsupportedError(
            "an input without a shape is not supported", where=f"input '{value.name}'", hint="set its shape with onnx.tools.update_model_dims"
        )
    return TensorInfo(value.name, tuple(_input_dim(value.name, i, dim) for i, dim in enumerate(tensor.shape.dim)), dtype)


def _input_dim(name, axis, dim):
    if dim.HasField("dim_value") and dim.dim_value > 0:
        return dim.dim_value
    if axis == 0 and dim.dim_value == 0 or axis == 0 and dim.dim_value == -1:
        return dim.dim_param or "n"
    if dim.HasField("dim_value") and dim.dim_value == 0:
        raise UnsupportedError("an input has no elements", where=f"input '{name}'", why=f"dimension {axis} is 0")
    raise UnsupportedError(
        "only the first dimension may be dynamic",
        where=f"input '{name}'",
        why=f"dimension {axis} is {dim.dim_param or 'not set'}",
        hint="fix it: python -m onnxruntime.tools.make_dynamic_shape_fixed, or onnx.tools.update_model_dims",
    )


def _parameter(info, batch, half):
    shape = [batch if isinstance(d, str) else d for d in info.shape]
    return relax.Var("".join(c if c.isalnum() else "_" for c in info.name), relax.TensorType(shape, "float32" if half else info.dtype))


def _declared_shape(result, batch, inputs):
    """Shape of an output; the batch by its name in the file."""
    name = next((d for info in inputs for d in info.shape if isinstance(d, str)), "n")
    return tuple(d if isinstance(d, int) else name if same_dim(d, batch) else str(d) for d in shape_of(result))


def _module(ctx, parameters, results):
    result = ctx._builder.normalize(relax.Tuple(results))
    output = relax.Var("outputs", result.ty)
    block = relax.DataflowBlock([*ctx.bindings, relax.VarBinding(output, result)])
    body = ctx._builder.normalize(relax.SeqExpr([block], output))
    function = relax.Function(parameters, body, output.ty, is_pure=True)
    function = function.with_attr("global_symbol", "main").with_attr("num_input", len(parameters))
    return tvm.IRModule({"main": function})


