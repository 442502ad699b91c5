"""Networks of float data and two- or three-level weights beside ONNX Runtime; their artefacts hold no float copy of the weights."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import bnntvm

ort = pytest.importorskip("onnxruntime")


def levels(rng, shape, values, per_channel):
    """Weights [O, ...] whose every output channel draws from ``values``, times a number of its own if ``per_channel``."""
    weight = rng.choice(np.array(values, np.float32), shape)
    size = rng.uniform(0.5, 2, (shape[0], *(1 for _ in shape[1:]))).astype(np.float32)
    return weight * size if per_channel else weight


def network(seed, values, per_channel=True):
    """Two convolutions with batch normalisation and ReLU, a pool, and two dense layers, all of these weights; batch of any size."""
    rng, nodes, constants = np.random.default_rng(seed), [], []

    def constant(name, array):
        constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(op, inputs, output, **attributes):
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def norm(x, channels, name):
        parts = [rng.uniform(0.5, 2, channels), *rng.normal(size=(2, channels)), rng.uniform(1, 4, channels)]
        return node("BatchNormalization", [x, *(constant(f"{name}{i}", p.astype(np.float32)) for i, p in enumerate(parts))], name)

    x = node("Conv", ["x", constant("w1", levels(rng, (40, 3, 3, 3), values, per_channel))], "c1", pads=[1] * 4, strides=[2, 2])
    x = node("Relu", [norm(x, 40, "n1")], "r1")
    x = node("Conv", [x, constant("w2", levels(rng, (64, 40, 3, 3), values, per_channel))], "c2", pads=[1] * 4)
    x = node("GlobalAveragePool", [node("Relu", [norm(x, 64, "n2")], "r2")], "p")
    x = node("Flatten", [x], "f")
    x = node("Relu", [node("Gemm", [x, constant("w3", levels(rng, (500, 64), values, per_channel))], "g", transB=1)], "r3")
    node("MatMul", [x, constant("w4", levels(rng, (300, 500), values, per_channel).T)], "y")
    shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", ["n", 3, 16, 16]), ("y", ["n", 300]))]
    graph = helper.make_graph(nodes, "network", shapes[:1], shapes[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


NETWORKS = {
    "binaryconnect": ((-1, 1), False),
    "bwn": ((-1, 1), True),
    "twn": ((-1, 0, 1), True),
    "ttq": ((-0.5, 0, 1), True),
    "offset": ((0.25, 1), True),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, tmp_path):
    model = network(1, *NETWORKS[name])
    module = bnntvm.build(model)
    assert {layer.kind for layer in module.report.layers} == {"weight-only"}
    bits = 1 if len(NETWORKS[name][0]) == 2 else 2
    for layer in module.report.layers[1:]:
        assert layer.weight_bytes <= layer.float_bytes * bits / 32 * 1.2 + 256
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 9, 33):
        x = np.random.default_rng(batch).normal(size=(batch, 3, 16, 16)).astype(np.float32)
        want, got = session.run(None, {"x": x})[0], module.run({"x": x})["y"]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    again = bnntvm.load(module.export(tmp_path / "network.bnn") or tmp_path / "network.bnn")
    np.testing.assert_array_equal(again.run({"x": x})["y"], got)
    assert module.report.constants_bytes < sum(layer.float_bytes for layer in module.report.layers) * bits / 32 * 1.5


def test_exact_sums_are_bitwise_equal():
    model = network(2, (-1, 0, 1), per_channel=False)
    del model.graph.node[4:]  # all behind the second convolution
    model.graph.node[1].op_type = "Identity"  # instead of the normalisation between the two
    del model.graph.node[1].input[1:]
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("c2", TensorProto.FLOAT, ["n", 64, 8, 8]))
    onnx.checker.check_model(model)
    x = np.random.default_rng(3).integers(-64, 64, (2, 3, 16, 16)).astype(np.float32) / 8
    want = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    np.testing.assert_array_equal(bnntvm.build(model).run({"x": x})["c2"], want)
