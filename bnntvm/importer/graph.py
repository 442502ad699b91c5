"""The walk over an ONNX graph."""

import re
from dataclasses import replace

import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
from onnx import SparseTensorProto, TensorProto, helper
from tvm import relax, tirx

from ..errors import BnnError, ModelError, UnsupportedError
from . import dims, fold, registry, source
from .context import Context, Node
from .model import Imported, TensorInfo
from .values import Expanded, Unfolded, broadcast_shape, dtype_of, is_constant, same_dim, shape_of

#: The layers that the report lists; folded ones too.
LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"}
#: Operators whose value at an index depends on their inputs at the index that broadcasting gives: they commute with broadcasting.
_ELEMENTWISE = set(
    "Abs Add And Cast CastLike Ceil Clip Cos Div Equal Erf Exp Floor Greater GreaterOrEqual Identity Less LessOrEqual Log Max Min Mod Mul"
    " Neg Not Or Pow Reciprocal Relu Round Sigmoid Sign Sin Sqrt Sub Sum Tanh Where Xor".split()
)
#: Converters that take constants too: they know 4-bit types, which numpy lacks.
_FOLDS_ITSELF = {"QuantizeLinear", "DequantizeLinear"}
_CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap"}


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
    model = valid = source.load(model_source)
    graph = model.graph
    declared = {initializer.name for initializer in graph.initializer}
    real_inputs = [value for value in graph.input if value.name not in declared]
    batch = tirx.Var("n", "int64")
    inputs = _one_batch([_input_info(value) for value in real_inputs])
    output_types = {value.name: _type_name(value) for value in graph.output}
    model = _expanded(source.without_half(model))
    graph = model.graph
    nodes = _nodes(model)
    _check_operators(nodes)
    initializers = {tensor.name: _initializer(tensor) for tensor in graph.initializer}
    for tensor in graph.sparse_initializer:
        name = tensor.values.name
        initializers[name] = _checked(_stored(fold.sparse_to_array, tensor, name), name)

    ctx = Context(batch, {tensor.name: tensor.data_type for tensor in graph.initializer})
    parameters = [_parameter(info, batch) for info in inputs]
    values = {**initializers, **{info.name: parameter for info, parameter in zip(inputs, parameters)}}
    try:
        for node in nodes:
            _convert(ctx, node, values)
    except UnsupportedError:
        source.check_shapes(valid)  # no converter is missing where the graph contradicts itself
        raise
    source.check_shapes(valid)

    results = [ctx.tensor(_lookup(values, output.name)) for output in graph.output]
    outputs = [
        TensorInfo(value.name, _declared_shape(result, batch, inputs), output_types[value.name] or dtype_of(result))
        for value, result in zip(graph.output, results)
    ]
    overridable = {value.name: initializers[value.name] for value in graph.input if value.name in declared}
    return Imported(ctx.module(parameters, results), inputs, outputs, ctx.layers, overridable)


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
    if isinstance(value, SparseTensorProto):
        return _stored(fold.sparse_to_array, value, attribute.name)
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
    if converter not in registry.TAKES_WINDOWS:
        args = [ctx.unfolded(a) if isinstance(a, Unfolded) else a for a in args]
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
    if not isinstance(value, np.ndarray):
        raise ctx.unsupported(f"a Constant with the attribute {kind} is not supported", hint="strings are not")
    return _checked(value, node.outputs[0])


def _initializer(tensor):
    return _checked(_stored(fold.to_array, tensor, tensor.name), tensor.name)


def _stored(read, tensor, name):
    try:
        return read(tensor)
    except Exception as error:
        raise ModelError("an initializer cannot be read", where=f"'{name}'", why=str(error)) from error


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


def _type_name(value):
    """numpy's name of the element type of a graph input or output, "" where it is not set."""
    elem_type = value.type.tensor_type.elem_type
    try:
        return str(np.dtype(helper.tensor_dtype_to_np_dtype(elem_type))) if elem_type else ""
    except KeyError:
        raise ModelError("an element type does not exist", where=f"'{value.name}'", why=f"number {elem_type}") from None


def _input_info(value):
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        raise UnsupportedError("only tensors can be inputs", where=f"input '{value.name}'", why=f"it is a {kind or 'value of no type'}")
    tensor = value.type.tensor_type
    if tensor.elem_type == TensorProto.STRING:
        raise UnsupportedError("string tensors are not supported", where=f"input '{value.name}'")
    dtype = _type_name(value)
    if dtype in ("float64", "complex64", "complex128"):
        raise UnsupportedError(f"{dtype} inputs are not supported", where=f"input '{value.name}'", hint="export the model in float32")
    if not tensor.HasField("shape"):
        raise UnsupportedError(
            "an input without a shape is not supported",
            where=f"input '{value.name}'",
            hint="set its shape with onnx.tools.update_model_dims",
        )
    return TensorInfo(value.name, tuple(_input_dim(value.name, i, dim) for i, dim in enumerate(tensor.shape.dim)), dtype)


def _input_dim(name, axis, dim):
    if dim.HasField("dim_value") and dim.dim_value > 0:
        return dim.dim_value
    if axis == 0 and dim.dim_value == 0 or axis == 0 and dim.dim_value == -1:
        # protobuf gives bytes where a name is not UTF-8
        return dim.dim_param if dim.dim_param and isinstance(dim.dim_param, str) else "n"
    if dim.HasField("dim_value") and dim.dim_value == 0:
        raise UnsupportedError("an input has no elements", where=f"input '{name}'", why=f"dimension {axis} is 0")
    raise UnsupportedError(
        "only the first dimension may be dynamic",
        where=f"input '{name}'",
        why=f"dimension {axis} is {dim.dim_param or 'not set'}",
        hint="fix it: python -m onnxruntime.tools.make_dynamic_shape_fixed, or onnx.tools.update_model_dims",
    )


def _one_batch(inputs):
    """All dynamic dimensions are one batch, so they get one name: that of the first."""
    name = next((dim for info in inputs for dim in info.shape if isinstance(dim, str)), "")
    return [replace(info, shape=tuple(name if isinstance(dim, str) else dim for dim in info.shape)) for info in inputs]


def _parameter(info, batch):
    """The Relax parameter of an input; half precision is held in float32."""
    shape = [batch if isinstance(d, str) else d for d in info.shape]
    dtype = "float32" if info.dtype in ("float16", "bfloat16") else info.dtype
    return relax.Var("".join(c if c.isalnum() else "_" for c in info.name), relax.TensorType(shape, dtype))


def _declared_shape(result, batch, inputs):
    """Shape of an output; the batch by its name in the file, what is computed from it as arithmetic on ``n``: "n * 4"."""
    name = next((d for info in inputs for d in info.shape if isinstance(d, str)), "n")
    texts = [d if isinstance(d, int) else name if same_dim(d, batch) else str(d) for d in shape_of(result)]
    return tuple(re.sub(r"T\.int64\((-?\d+)\)", r"\1", d) if isinstance(d, str) else d for d in texts)
