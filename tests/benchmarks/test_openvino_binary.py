"""The rewritten OpenVINO networks are the networks they claim to be: a slow or wrong peer would prove nothing."""

import numpy as np
import onnx
import onnxruntime  # noqa: F401
import openvino  # noqa: F401
import pytest

from benchmarks import openvino_binary, zoo  # noqa: E402
from benchmarks.layers import Layer  # noqa: E402
from benchmarks.netbuilder import NetBuilder  # noqa: E402
from benchmarks.peers import prepare_openvino, prepare_ort  # noqa: E402
from benchmarks.run import network_input  # noqa: E402


def kinds_run(compiled):
    """Layer types in the graph that the plug-in really executes."""
    return [op.get_rt_info()["layerType"].astype(str) for op in compiled.get_runtime_model().get_ordered_ops()]


def both(model, x):
    feed = {"input": x}
    return prepare_ort(model, feed, 1).outputs[0], prepare_openvino(model, feed, 1).outputs[0]


LAYERS = [Layer(64, 10), Layer(40, 9), Layer(96, 5, kernel=1), Layer(256, 0, kernel=1, rows=1), Layer(192, 0, kernel=1, rows=12)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
@pytest.mark.parametrize("length", [1, 3])
def test_chain_is_exact_and_stays_packed(layer, length):
    model, x = layer.chain(length), layer.input()
    expected, actual = both(model, x)
    np.testing.assert_array_equal(actual, expected)
    kinds = kinds_run(openvino_binary.compile_model(model, x.shape))
    assert kinds.count("BinaryConvolution") == length
    assert kinds.count("FakeQuantize") == 1


@pytest.mark.parametrize("sign", ["larq", "where", "torch"])
@pytest.mark.parametrize("options", [{}, {"pad_one": True}, {"scaled": True}, {"stride": 2}], ids=str)
def test_every_spelling_and_padding(sign, options):
    net = NetBuilder("net", (24, 8, 8), sign=sign, samples=4)
    model = net.model(net.binary_conv(net.batchnorm(net.input), 40, 3, **options))
    expected, actual = both(model, net.input.data)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 if "scaled" in options else 0)
    assert "BinaryConvolution" in kinds_run(openvino_binary.compile_model(model, net.input.data.shape))


@pytest.mark.parametrize("sign, expected", [("larq", 1.0), ("where", 1.0)])
def test_zero_becomes_plus_one(sign, expected):
    net = NetBuilder("net", (32, 4, 4), sign=sign)
    model = net.model(net.binary_conv(net.input, 32, 3))
    want, got = both(model, np.zeros((1, 32, 4, 4), np.float32))
    np.testing.assert_array_equal(got, want)


def test_float_layers_are_left_alone():
    net = NetBuilder("net", (8, 6, 6))
    model = net.model(net.conv(net.sign(net.input), 8, 3, bn=False))
    assert openvino_binary.compile_model(model, (1, 8, 6, 6)).binary_layers == 0


@pytest.mark.parametrize("name", ["quicknet_small", "binarynet_vgg", "birealnet18"])
def test_network_runs_all_its_binary_layers_on_bits(name):
    model = zoo.build(name)
    x = network_input(model)
    expected, actual = both(model, x)
    # A rounding error may flip one sign in the middle of a network, so values are compared loosely and layer counts exactly.
    assert np.abs(actual - expected).max() < 0.5 * np.abs(expected).max()
    signs = sum(n.op_type == "Sign" for n in model.graph.node) // (1 if name == "birealnet18" else 2)
    assert kinds_run(openvino_binary.compile_model(model, x.shape)).count("BinaryConvolution") == signs
    assert isinstance(model, onnx.ModelProto)


def test_binarisation_between_transpositions():
    net = NetBuilder("net", (32, 6, 6), samples=2)
    rows = net.sign(net.node("Transpose", [net.batchnorm(net.input)], perm=[0, 2, 3, 1]))
    pads = net.constant(np.array([0, 0, 1, 0, 0, 1, 1, 0], np.int64), "pads")
    padded = net.node("Pad", [rows, pads, net.constant(np.float32(1), "one")], mode="constant")
    model = net.model(net.conv_of_bits(net.node("Transpose", [padded], perm=[0, 3, 1, 2]), 16, 3, pads=0))
    expected, actual = both(model, net.input.data)
    np.testing.assert_array_equal(actual, expected)
    assert "BinaryConvolution" in kinds_run(openvino_binary.compile_model(model, net.input.data.shape))
