"""Whole networks for GPUs, kernel by kernel in the emulator, beside this processor's and ONNX Runtime's golden results."""

import pathlib

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import bnntvm
from tests.cuda.network import Network, long_layers

DATA = pathlib.Path(__file__).with_name("data")
DIGITS = pathlib.Path(__file__).parents[2] / "tutorials" / "data" / "digits_bnn.onnx"
#: One for every way in which bits are multiplied: xor and and by warps, and by warpgroups, none.
TARGETS = ("sm_75", "sm_80", "sm_90a", "sm_120")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["exact_mlp", "exact_resnet"])
def test_exact_networks_give_the_same_bits(name, target):
    golden, network = np.load(DATA / f"{name}.npz"), Network(DATA / f"{name}.onnx", target)
    here = bnntvm.build(DATA / f"{name}.onnx", tuning=False)
    for kind in ("rand", "edge"):
        feed = {key.removeprefix(f"{kind}/in/"): golden[key] for key in golden if key.startswith(f"{kind}/in/")}
        got, expected = network.run(feed), here.run(feed)
        for output in expected:
            np.testing.assert_array_equal(got[output], expected[output])
            np.testing.assert_array_equal(got[output], golden[f"{kind}/out/{output}"])


def attention(heads, tokens, features):
    """Scores of binary queries and keys, times values of {0, 1}."""
    shape = [1, heads, tokens, features]
    signs = [("queries", "q", 1, -1), ("keys", "k", 1, -1), ("values", "v", 1, 0)]
    nodes, tensors = [], [numpy_helper.from_array(np.float32(0), "zero"), numpy_helper.from_array(np.float32(0.125), "scale")]
    for name, short, yes, no in signs:
        tensors += [numpy_helper.from_array(np.float32(v), f"{short}_{v}") for v in (yes, no)]
        nodes.append(helper.make_node("GreaterOrEqual", [name, "zero"], [f"{short}.positive"]))
        nodes.append(helper.make_node("Where", [f"{short}.positive", f"{short}_{yes}", f"{short}_{no}"], [short]))
    nodes += [
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]), helper.make_node("MatMul", ["q", "kt"], ["products"]),
        helper.make_node("Mul", ["products", "scale"], ["scores"]), helper.make_node("GreaterOrEqual", ["scores", "zero"], ["chosen"]),
        helper.make_node("Where", ["chosen", "v_1", "v_0"], ["mask"]), helper.make_node("MatMul", ["mask", "v"], ["mixed"]),
    ]  # fmt: skip
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, *_ in signs]
    sizes = {"scores": [1, heads, tokens, tokens], "mixed": shape}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in sizes.items()]
    graph = helper.make_graph(nodes, "attention", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("target", TARGETS)
def test_attention_on_bits(target):
    """Both products are of run-time bits; tensor cores read right operands as they were packed, and xor leaves out {0, 1} x {0, 1}."""
    model = attention(2, 40, 64)
    network, here = Network(model, target), bnntvm.build(model, tuning=False)
    feed = here.random_feed()
    for name, expected in here.run(feed).items():
        np.testing.assert_array_equal(network.run(feed)[name], expected)
    right = [types[1][0] for name, types, _ in network.calls if name.startswith("binary_matmul")]
    as_packed = {"and": 2, "xor": 1, "": 0}[network.isa.operation]
    assert right == [(2, 40, 2), (2, 64, 2)][:as_packed] + [(2, 2, 40), (2, 2, 64)][as_packed:]
    turned = [types for name, types, _ in network.calls if name.startswith("transpose") and types[0][1] == np.uint32]
    assert len(turned) == 2 - as_packed


@pytest.mark.parametrize("target", ["sm_75", "sm_80"])
def test_parts_that_meet_in_memory(target):
    """Their workspace is one more result, which nobody reads, behind two that the network has; a larger batch takes one kernel."""
    model = long_layers()
    network, here = Network(model, target), bnntvm.build(model, tuning=False)
    for batch, kernels in ((1, 2), (200, 1)):
        feed = here.random_feed(batch=batch)
        for name, expected in here.run(feed).items():
            np.testing.assert_array_equal(network.run(feed)[name], expected)
        name, shapes, _ = next(call for call in network.calls if call[0].startswith("binary_dense"))
        assert network.launches(name, shapes) == kernels and shapes[-1][1] == np.int32 and len(shapes) == 5


def test_a_float_network_within_rounding():
    network, here = Network(DIGITS, "sm_90a"), bnntvm.build(DIGITS, tuning=False)
    feed = here.random_feed(batch=2)
    for name, expected in here.run(feed).items():
        np.testing.assert_allclose(network.run(feed)[name], expected, atol=1e-4)
