"""CumSum of whole networks beside ONNX Runtime: every axis, direction and type, static and dynamic shapes; on a GPU emulated."""

import itertools

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import bnntvm
from tests.cuda.network import Network

TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int64": TensorProto.INT64}
SHAPE = (3, 5, 4)


def model(shape, axis, dtype="float32", **attrs):
    """CumSum behind and in front of something else, so that neither an input nor a result is at hand."""
    kind = TYPES[dtype]
    nodes = [
        helper.make_node("Add", ["x", "one"], ["more"]), helper.make_node("CumSum", ["more", "axis"], ["sums"], **attrs),
        helper.make_node("Sub", ["sums", "one"], ["y"]),
    ]  # fmt: skip
    values = [helper.make_tensor_value_info(name, kind, shape) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(np.array(1, dtype), "one"), numpy_helper.from_array(np.array(axis, np.int64), "axis")]
    graph = helper.make_graph(nodes, "sums", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def expected(onnx_model, x):
    session = onnxruntime.InferenceSession(onnx_model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def values(dtype, shape=SHAPE):
    return np.random.default_rng(len(dtype)).normal(0, 30, shape).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_on_a_processor(dtype, dynamic):
    """Bit by bit, the dynamic batch being an axis like any other."""
    for axis, exclusive, reverse in itertools.product((0, 1, -1), (0, 1), (0, 1)):
        shape = ["n", *SHAPE[1:]] if dynamic else SHAPE
        onnx_model, x = model(shape, axis, dtype, exclusive=exclusive, reverse=reverse), values(dtype)
        np.testing.assert_array_equal(bnntvm.build(onnx_model, tuning=False).run({"x": x})["y"], expected(onnx_model, x))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_on_a_gpu(dtype, dynamic):
    for axis, exclusive, reverse in ((0, 0, 0), (1, 1, 0), (-1, 0, 1), (0, 1, 1)):
        onnx_model, x = model(["n", *SHAPE[1:]] if dynamic else SHAPE, axis, dtype, exclusive=exclusive, reverse=reverse), values(dtype)
        network = Network(onnx_model, "sm_80")
        np.testing.assert_array_equal(network.run({"x": x})["y"], expected(onnx_model, x))
        assert any(name.startswith("cum_sum") and emulated for name, _, emulated in network.calls)


def test_verified():
    """The interpreter means the same: every pass is compared with it."""
    module = bnntvm.build(model(SHAPE, 1, exclusive=1, reverse=1), tuning=False, verify=True)
    assert module.run({"x": values("float32")})["y"].shape == SHAPE
