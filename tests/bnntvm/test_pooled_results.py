"""Pools of 2x2 pixels within the convolution before them: the results, and when it is not done."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import bnntvm

CHANNELS = 40


def _weights(seed):
    return np.where(np.random.default_rng(seed).random((CHANNELS, CHANNELS, 3, 3)) < 0.5, -1, 1).astype(np.float32)


def network(pool, size=(8, 12), also_read=False, output=False, **attributes):
    """A residual block whose sum is pooled, beside a second convolution; the sum is read once more, or an output, if that is wanted."""
    attributes = {"kernel_shape": [2, 2], "strides": [2, 2]} | attributes
    around = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Sign", ["x"], ["a"]), helper.make_node("Conv", ["a", "w"], ["b"], **around),
        helper.make_node("Add", ["b", "x"], ["c"]), helper.make_node("Greater", ["c", "t"], ["s"]),
        helper.make_node("Where", ["s", "one", "minus"], ["d"]), helper.make_node("Conv", ["d", "v"], ["e"], strides=[2, 2], **around),
        helper.make_node(pool, ["c"], ["p"], **attributes), helper.make_node("Add", ["e", "p"], ["y"]),
    ]  # fmt: skip
    outputs = {"y": None} | ({"c": None} if output else {})
    if also_read:
        nodes += [helper.make_node("GlobalAveragePool", ["c"], ["z"])]
        outputs |= {"z": None}
    constants = {"w": _weights(0), "v": _weights(1), "t": np.float32([0.5]), "one": np.float32([1]), "minus": np.float32([-1])}
    infos = [helper.make_tensor_value_info(name, 1, ["N", CHANNELS, "h", "w"]) for name in outputs]
    graph = helper.make_graph(nodes, "net", [helper.make_tensor_value_info("x", 1, ["N", CHANNELS, *size])], infos,
                              [numpy_helper.from_array(v, k) for k, v in constants.items()])  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def pools(module):
    """How many pools are kernels of their own."""
    return sum(call["kernel"].startswith("pool2d") for call in module._manifest["calls"])


def check(model, module, size):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, CHANNELS, *size)).astype(np.float32)
        for name, want in zip(module.run({"x": x}).items(), session.run(None, {"x": x})):
            np.testing.assert_allclose(name[1], want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("target", ["x86", "x86-64-v3"])
@pytest.mark.parametrize("pool", ["MaxPool", "AveragePool"])
def test_results(pool, target):
    model = network(pool)
    module = bnntvm.build(model, target, threads=2)
    assert pools(module) == 0
    check(model, module, (8, 12))


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (dict(also_read=True), (8, 12)),
        (dict(output=True), (8, 12)),
        (dict(kernel_shape=[3, 3], pads=[1, 1, 1, 1]), (8, 12)),
        (dict(kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 1, 1], size=(7, 11)), (7, 11)),
    ],
    ids=["read twice", "an output", "3x3", "odd"],
)
@pytest.mark.parametrize("pool", ["MaxPool", "AveragePool"])
def test_pools_that_stay_kernels(pool, options, size):
    model = network(pool, **options)
    module = bnntvm.build(model)
    assert pools(module) == 1
    check(model, module, size)
