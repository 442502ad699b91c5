"""Products of two tensors that are both made at run time: binary attention (Qin et al., BiBERT, 2022), weights that are an input."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.families.helpers import built, eighths
from tests.importer.helpers import model

node = helper.make_node


@pytest.mark.parametrize("batch, heads, tokens, width", [(2, 3, 17, 32), (1, 1, 5, 40)])
def test_attention_with_signs_and_a_mask(batch, heads, tokens, width):
    """Scores of signs, attention as 0 or 1, values as signs: a product of two ternary tensors and one of {0, 1} with ternary ones."""
    nodes = [
        node("Sign", ["q"], ["qs"]),
        node("Sign", ["k"], ["ks"]),
        node("Transpose", ["ks"], ["kt"], perm=[0, 1, 3, 2]),
        node("MatMul", ["qs", "kt"], ["scores"]),
        node("Greater", ["scores", "two"], ["on"]),
        node("Cast", ["on"], ["mask"], to=TensorProto.FLOAT),
        node("Sign", ["v"], ["vs"]),
        node("MatMul", ["mask", "vs"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    feed = {name: eighths(rng, batch, heads, tokens, width, bound=1) for name in "qkv"}
    kinds, module = built(model(nodes, feed, ["y"], {"two": np.float32(2)}), feed)
    assert kinds == {"scores": "binary", "y": "binary"}
    assert {layer.planes for layer in module.report.layers} == {"2x2", "1x2"}


def test_attention_of_two_bit_activations():
    nodes = [
        node("Clip", ["q", "zero", "three"], ["qc"]),
        node("Round", ["qc"], ["qr"]),
        node("Clip", ["k", "zero", "three"], ["kc"]),
        node("Round", ["kc"], ["kr"]),
        node("MatMul", ["qr", "kr"], ["y"]),
    ]
    rng = np.random.default_rng(1)
    feed = {"q": eighths(rng, 2, 6, 70), "k": eighths(rng, 2, 70, 20)}
    kinds, _ = built(model(nodes, feed, ["y"], {"zero": np.float32(0), "three": np.float32(3)}), feed)
    assert kinds == {"y": "bitserial"}


@pytest.mark.parametrize("attributes", [{}, {"pads": [1, 1, 1, 1]}, {"strides": [2, 1], "pads": [0, 1, 2, 0], "dilations": [1, 2]}])
@pytest.mark.parametrize("channels", [16, 40])
def test_a_convolution_whose_weights_are_an_input(attributes, channels):
    nodes = [
        node("GreaterOrEqual", ["x", "zero"], ["bit"]),
        node("Where", ["bit", "one", "minus"], ["xs"]),
        node("Sign", ["w"], ["ws"]),
        node("Conv", ["xs", "ws"], ["y"], kernel_shape=[3, 2], **attributes),
    ]
    rng = np.random.default_rng(2)
    feed = {"x": eighths(rng, 2, channels, 9, 8), "w": eighths(rng, 12, channels, 3, 2)}
    constants = {"zero": np.float32(0), "one": np.float32(1), "minus": np.float32(-1)}
    assert built(model(nodes, feed, ["y"], constants), feed)[0] == {"y": "binary"}


def test_weights_on_the_left():
    rng = np.random.default_rng(3)
    weight = np.where(rng.random((9, 33)) < 0.5, -1, 1).astype(np.float32)
    feed = {"x": eighths(rng, 2, 33, 5)}
    proto = model([node("Sign", ["x"], ["s"]), node("MatMul", ["w", "s"], ["y"])], feed, ["y"], {"w": weight})
    assert built(proto, feed)[0] == {"y": "binary"}


def test_one_real_factor_keeps_a_product_in_float():
    rng = np.random.default_rng(4)
    feed = {"a": eighths(rng, 4, 33), "b": eighths(rng, 33, 5)}
    kinds, module = built(model([node("Sign", ["a"], ["s"]), node("MatMul", ["s", "b"], ["y"])], feed, ["y"], {}), feed)
    assert kinds == {"y": "float"} and "real-valued" in module.report.layers[0].reason


def test_attention_of_any_batch():
    nodes = [node("Sign", ["q"], ["qs"]), node("Transpose", ["qs"], ["t"], perm=[0, 2, 1]), node("MatMul", ["qs", "t"], ["y"])]
    feed = {"q": eighths(np.random.default_rng(5), 3, 6, 40)}
    proto = model(nodes, {"q": (["N", 6, 40], np.float32)}, ["y"], {})
    kinds, module = built(proto, feed)
    assert kinds == {"y": "binary"}
    one = module.run({"q": feed["q"][:1]})["y"]
    np.testing.assert_array_equal(one, module.run(feed)["y"][:1])


def test_attention_as_einsum():
    """Heads and tokens as they come out of the projection: no transposed copies in the file."""
    nodes = [
        node("Sign", ["q"], ["qs"]),
        node("Sign", ["k"], ["ks"]),
        node("Einsum", ["qs", "ks"], ["scores"], equation="bqhd,bkhd->bhqk"),
        node("Greater", ["scores", "two"], ["on"]),
        node("Cast", ["on"], ["mask"], to=TensorProto.FLOAT),
        node("Einsum", ["mask", "ks"], ["mixed"], equation="bhqk,bkhd->bqhd"),
        node("Sign", ["mixed"], ["ms"]),
        node("Einsum", ["ms", "w"], ["y"], equation="bqhd,hdo->bqo"),
    ]
    rng = np.random.default_rng(6)
    feed = {name: eighths(rng, 2, 7, 3, 32, bound=1) for name in "qk"}
    weight = np.where(rng.random((3, 32, 20)) < 0.5, -1, 1).astype(np.float32)
    kinds, _ = built(model(nodes, feed, ["y"], {"two": np.float32(2), "w": weight}), feed)
    assert kinds == {"scores": "binary", "mixed": "binary", "y": "binary"}
