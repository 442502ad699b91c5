"""Small networks that the fuzzer's findings were boiled down to, compiled and compared with ONNX Runtime bit for bit."""

import numpy as np
import pytest
from onnx import helper

import bnntvm
from tests.importer.helpers import model, reference

node = helper.make_node


def signs(*shape):
    return np.where(np.random.default_rng(0).random(shape) < 0.5, np.float32(-1), np.float32(1))


def quarters(*shape):
    x = np.random.default_rng(1).integers(-8, 9, shape) / 4
    return x.astype(np.float32)


def compiled_equals_runtime(nodes, x, constants):
    constants = {name: np.asarray(value, np.int64 if name == "pads" else np.float32) for name, value in constants.items()}
    proto = model(nodes, {"x": x}, ["y"], constants)
    module = bnntvm.build(proto, threads=1)
    np.testing.assert_array_equal(module.run({"x": x})["y"], reference(proto, {"x": x})[0])
    return {layer.output: layer.kind for layer in module.report.layers}


@pytest.mark.parametrize("width", [3, 40])
def test_a_long_chain_before_the_packing_of_an_image(width):
    """A comparison that is used twice inside one kernel."""
    nodes = [
        node("Greater", ["x", "zero"], ["bit"]),
        node("Cast", ["bit"], ["f"], to=1),
        node("Add", ["f", "x"], ["a"]),
        node("Mul", ["a", "gain"], ["m"]),
        node("Add", ["m", "half"], ["b"]),
        node("PRelu", ["b", "slope"], ["c"]),
        node("GreaterOrEqual", ["c", "zero"], ["positive"]),
        node("Cast", ["positive"], ["s"], to=1),
        node("Conv", ["s", "w"], ["y"]),
    ]
    slope = np.where(np.arange(31) % 2, -0.5, 0.25).reshape(31, 1, 1)
    constants = {"zero": 0, "half": quarters(31, 1, 1), "slope": slope, "gain": -2 * slope, "w": signs(5, 31, 1, 1)}
    assert compiled_equals_runtime(nodes, quarters(2, 31, 1, width), constants) == {"y": "binary"}


def test_channels_of_a_single_pixel():
    """A constant per channel has the shape of the whole tensor where there is one image of one pixel."""
    nodes = [
        node("MaxPool", ["x"], ["p"], kernel_shape=[2, 2]),
        node("Sub", ["p", "shift"], ["d"]),
        node("Where", ["bit", "one", "minus"], ["s"]),
        node("Conv", ["s", "w"], ["z"]),
        node("Add", ["z", "p"], ["y"]),
    ]
    nodes.insert(2, node("Less", ["d", "zero"], ["bit"]))
    constants = {"shift": quarters(64, 1, 1), "zero": 0, "one": 1, "minus": -1, "w": signs(64, 64, 1, 1)}
    assert compiled_equals_runtime(nodes, quarters(1, 64, 2, 2), constants) == {"z": "binary"}


def test_thresholds_that_differ_from_pixel_to_pixel():
    nodes = [
        node("Mul", ["x", "gain"], ["a"]),
        node("Add", ["a", "shift"], ["b"]),
        node("Sign", ["b"], ["s"]),
        node("Conv", ["s", "w"], ["y"]),
    ]
    gain = np.where(quarters(1, 40, 3, 5) < 0, -1, 2)
    constants = {"gain": gain, "shift": quarters(1, 40, 3, 5), "w": signs(6, 40, 3, 3)}
    assert compiled_equals_runtime(nodes, quarters(2, 40, 3, 5), constants) == {"y": "binary"}


def test_a_comparison_that_several_kernels_read():
    nodes = [
        node("Conv", ["x", "v"], ["a"]),
        node("Greater", ["a", "zero"], ["bit"]),
        node("Where", ["bit", "one", "minus"], ["s"]),
        node("Conv", ["s", "w"], ["b"], pads=[1, 1, 1, 1]),
        node("Where", ["bit", "b", "a"], ["y"]),
    ]
    constants = {"v": signs(8, 8, 1, 1) * 0.5, "zero": 0, "one": 1, "minus": -1, "w": signs(8, 8, 3, 3)}
    assert compiled_equals_runtime(nodes, quarters(2, 8, 4, 4), constants)["b"] == "binary"


def test_two_inputs_compared():
    nodes = [
        node("Abs", ["x"], ["a"]),
        node("ReduceMean", ["a"], ["m"], axes=[1], keepdims=1),
        node("GreaterOrEqual", ["x", "m"], ["bit"]),
        node("Cast", ["bit"], ["f"], to=1),
        node("Conv", ["f", "w"], ["y"]),
    ]
    assert compiled_equals_runtime(nodes, quarters(2, 32, 4, 4), {"w": signs(6, 32, 3, 3)}) == {"y": "binary"}


def test_padding_beyond_the_range_of_the_tensor():
    nodes = [
        node("Sign", ["x"], ["q"]),
        node("Conv", ["q", "v"], ["a"]),
        node("Min", ["a", "low"], ["b"]),
        node("Pad", ["b", "pads", "one"], ["c"]),
        node("GreaterOrEqual", ["c", "zero"], ["bit"]),
        node("Where", ["bit", "one", "minus"], ["s"]),
        node("Conv", ["s", "w"], ["y"]),
    ]
    constants = {"v": signs(32, 5, 1, 1), "low": -0.5, "pads": np.array([0, 0, 1, 1, 0, 0, 0, 1]), "one": 1, "zero": 0, "minus": -1}
    assert compiled_equals_runtime(nodes, quarters(2, 5, 4, 4), {**constants, "w": signs(6, 32, 3, 3)})["y"] == "binary"


def test_selections_that_are_nested_compile_in_linear_time():
    """Each step reads the step before several times; TVM's simplifier must not unfold them."""
    nodes = [node("LeakyRelu", ["x"], ["t0"], alpha=0.5)]
    for i in range(8):
        nodes += [
            node("Sign", [f"t{i}"], [f"s{i}"]),
            node("Sub", [f"t{i}", f"s{i}"], [f"d{i}"]),
            node("PRelu", [f"d{i}", "slope"], [f"p{i}"]),
            node("LessOrEqual", [f"p{i}", f"s{i}"], [f"c{i}"]),
            node("Where", [f"c{i}", f"p{i}", f"d{i}"], [f"t{i + 1}"]),
        ]
    nodes.append(node("Identity", ["t8"], ["y"]))
    assert compiled_equals_runtime(nodes, quarters(2, 40), {"slope": quarters(40)}) == {}


@pytest.mark.parametrize("kind", ["Greater", "LessOrEqual", "Equal"])
def test_a_tensor_compared_with_itself(kind):
    nodes = [
        node("MaxPool", ["x"], ["p"], kernel_shape=[2, 2]),
        node("Relu", ["p"], ["r"]),
        node(kind, ["r", "r"], ["bit"]),
        node("Cast", ["bit"], ["f"], to=1),
        node("Sub", ["f", "r"], ["y"]),
    ]
    compiled_equals_runtime(nodes, quarters(2, 40, 4, 4), {})
