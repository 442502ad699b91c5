"""Evaluation of nodes whose inputs are constants."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

#: Element types that numpy lacks, and what holds their values.
_NARROW = {
    TensorProto.INT4: np.int8,
    TensorProto.UINT4: np.uint8,
    **({TensorProto.INT2: np.int8, TensorProto.UINT2: np.uint8} if hasattr(TensorProto, "INT2") else {}),
}


def to_array(tensor):
    """A TensorProto as numpy; 4-bit and 2-bit integers as 8-bit ones."""
    array = numpy_helper.to_array(tensor)
    narrow = _NARROW.get(tensor.data_type)
    return array.astype(narrow) if narrow else array


def sparse_to_array(tensor):
    """A SparseTensorProto as a dense array; its indices are flat numbers [n] or coordinates [n, rank]."""
    shape = tuple(tensor.dims)
    values, at = to_array(tensor.values), to_array(tensor.indices)
    result = np.zeros(shape, values.dtype)
    result.reshape(-1)[at if at.ndim == 1 else np.ravel_multi_index(tuple(at.T), shape)] = values
    return result


def _reshape(node, x, shape=None):
    shape = [int(d) for d in (node.attrs["shape"] if shape is None else shape)]
    if not node.attrs.get("allowzero", 0):
        shape = [x.shape[i] if d == 0 else d for i, d in enumerate(shape)]
    return x.reshape(shape)


def _cast(node, x, *_):
    to = node.attrs["to"]
    if to in _NARROW:
        return x.astype(_NARROW[to])
    return x.astype(helper.tensor_dtype_to_np_dtype(to))


def _divide(node, a, b):
    if a.dtype.kind in "iu":  # towards zero, as C does
        quotient = np.floor_divide(a, b)
        return (quotient + ((a % b != 0) & ((a < 0) != (b < 0)))).astype(a.dtype)
    return np.divide(a, b)


def _same(function):
    return lambda node, *args: function(*args)


#: The frequent ones, without the cost of a reference evaluator; each result is of its first operand's precision.
_DIRECT = {
    "Identity": _same(lambda x: x),
    "Abs": _same(np.abs),
    "Neg": _same(np.negative),
    "Sign": _same(np.sign),
    "Sqrt": _same(np.sqrt),
    "Round": _same(np.round),
    "Floor": _same(np.floor),
    "Add": _same(np.add),
    "Sub": _same(np.subtract),
    "Mul": _same(np.multiply),
    "Div": _divide,
    "Greater": _same(np.greater),
    "GreaterOrEqual": _same(np.greater_equal),
    "Less": _same(np.less),
    "LessOrEqual": _same(np.less_equal),
    "Equal": _same(np.equal),
    "Not": _same(np.logical_not),
    "Where": _same(np.where),
    "Cast": _cast,
    "CastLike": _same(lambda x, like: x.astype(like.dtype)),
    "Reshape": _reshape,
    "Transpose": lambda node, x: np.transpose(x, node.attrs.get("perm")),
    "Concat": lambda node, *xs: np.concatenate(xs, node.attrs["axis"]),
    "Expand": _same(lambda x, shape: np.ascontiguousarray(np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(int(d) for d in shape))))),
    "Gather": lambda node, x, i: np.take(x, i, axis=node.attrs.get("axis", 0)),
    "Shape": lambda node, x: np.array(x.shape[node.attrs.get("start", 0) : node.attrs.get("end", None)], dtype=np.int64),
}


def evaluate(node, args):
    """The outputs of ``node`` on constant inputs.

    Parameters
    ----------
    node : bnntvm.importer.graph.Node
    args : list of numpy.ndarray or None

    Returns
    -------
    list of numpy.ndarray
    """
    with np.errstate(all="ignore"):
        direct = _DIRECT.get(node.op_type) if node.domain == "" else None
        results = [direct(node, *args)] if direct and not any(a is None for a in args) else _reference(node, args)
    return [np.asarray(result) for result in results]


def _reference(node, args):
    from onnx.reference import ReferenceEvaluator  # slow to import and not always needed

    given = {name: arg for name, arg in zip(node.proto.input, args) if name}
    inputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for name, a in given.items()]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.proto.output if name]
    graph = helper.make_graph([node.proto], "node", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(node.domain, node.opset)])
    model.ir_version = 10
    results = iter(ReferenceEvaluator(model).run(None, given))
    return [next(results) if name else np.zeros(0) for name in node.proto.output]
