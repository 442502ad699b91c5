"""Small ONNX models, and their comparison with ONNX Runtime."""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from bnntvm.importer import import_model
from bnntvm.interpreter import run


def typed(array):
    return helper.np_dtype_to_tensor_dtype(np.asarray(array).dtype)


def model(nodes, inputs, outputs, constants=None, opset=17, domains=(), functions=(), types=None):
    """A ModelProto.

    Parameters
    ----------
    nodes : list of onnx.NodeProto
    inputs : dict of str to (shape, dtype) or array
        An array stands for its shape and type.
    outputs : list of str
    constants : dict of str to array
    types : dict of str to int
        ONNX element types of outputs; the others are left open.
    """
    values = [
        helper.make_tensor_value_info(name, typed(v), v.shape)
        if isinstance(v, np.ndarray)
        else helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(v[1])), v[0])
        for name, v in inputs.items()
    ]
    results = [helper.make_tensor_value_info(name, (types or {}).get(name, TensorProto.UNDEFINED), None) for name in outputs]
    initializers = [numpy_helper.from_array(np.asarray(v), name) for name, v in (constants or {}).items()]
    graph = helper.make_graph(nodes, "graph", values, results, initializers)
    opsets = [helper.make_opsetid("", opset), *[helper.make_opsetid(d, 1) for d in domains]]
    proto = helper.make_model(graph, opset_imports=opsets, functions=list(functions))
    proto.ir_version = 10
    return infer(proto)


def infer(proto):
    """The model with the types of its outputs filled in: ONNX wants them. Where it cannot tell: float32 of the first input's rank."""
    try:
        inferred = onnx.shape_inference.infer_shapes(proto)
    except Exception:
        return proto
    for declared, found in zip(proto.graph.output, inferred.graph.output):
        if not declared.type.tensor_type.elem_type and found.type.tensor_type.elem_type:
            declared.type.CopyFrom(found.type)
        if not declared.type.tensor_type.HasField("shape"):
            rank = len(proto.graph.input[0].type.tensor_type.shape.dim)
            kind = declared.type.tensor_type.elem_type or TensorProto.FLOAT
            declared.CopyFrom(helper.make_tensor_value_info(declared.name, kind, [None] * rank))
    return proto


def one(op_type, inputs, constants=None, outputs=1, opset=17, order=None, domain="", **attributes):
    """A model of one node whose inputs are ``inputs`` then ``constants`` (or as ``order`` says)."""
    names = order or [*inputs, *(constants or {})]
    results = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op_type, names, results, name="node", domain=domain, **attributes)
    return model([node], inputs, results, constants, opset, [domain] if domain else ())


def reference(proto, feed):
    """Outputs of ONNX Runtime with its optimisations off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def check(proto, feed, tolerance=1e-5):
    """Import, interpret, and compare values, shapes and types with ONNX Runtime; the import is returned."""
    imported = import_model(proto)
    wanted = reference(proto, feed)
    got = run(imported.mod, {k: v.astype(np.float32) if v.dtype == np.float16 else v for k, v in feed.items()})
    for info, a, b in zip(imported.outputs, got, wanted):
        assert info.dtype == str(b.dtype), (info, b.dtype)
        assert a.shape == b.shape, (info.name, a.shape, b.shape)
        assert len(info.shape) == b.ndim and all(isinstance(d, str) or d == s for d, s in zip(info.shape, b.shape))
        if b.dtype.kind == "f":
            scale = max(float(np.abs(b[np.isfinite(b)]).max(initial=0.0)), 1e-30)
            np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol=0, atol=tolerance * scale)
        else:
            np.testing.assert_array_equal(a, b)
    return imported


def calls(imported):
    """Names of the operators that a module calls, in order."""
    from tvm import relax

    bindings = imported.mod["main"].body.blocks[0].bindings
    return [b.value.op.name for b in bindings if isinstance(b.value, relax.Call)]


def constants(imported):
    """The constants among the arguments of a module's calls, in order."""
    from tvm import relax
    from tvm.ir.expr import GenericConst

    bindings = imported.mod["main"].body.blocks[0].bindings
    return [a.value.numpy() for b in bindings if isinstance(b.value, relax.Call) for a in b.value.args if isinstance(a, GenericConst)]
