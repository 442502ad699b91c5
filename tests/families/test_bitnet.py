"""BitNet b1.58 (Ma et al. 2024): ternary weights, activations of 8 bits with a scale for each token."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.families.helpers import built
from tests.importer.helpers import model

node = helper.make_node
F32 = np.float32


def per_token(x, out):
    """127 / max|x| of each row; round, clip; the scale is divided out again (training form)."""
    return [
        node("Abs", [x], ["abs"]),
        node("ReduceMax", ["abs"], ["top"], axes=[-1], keepdims=1),
        node("Clip", ["top", "least"], ["bounded"]),
        node("Reciprocal", ["bounded"], ["inverse"]),
        node("Mul", ["inverse", "c127"], ["scale"]),
        node("Mul", [x, "scale"], ["scaled"]),
        node("Round", ["scaled"], ["rounded"]),
        node("Clip", ["rounded", "low", "c127"], ["codes"]),
        node("Div", ["codes", "scale"], [out]),
    ]


CONSTANTS = {"least": F32(1e-5), "c127": F32(127), "low": F32(-128)}


@pytest.mark.parametrize("tokens", [1, 9])
def test_training_form(tokens):
    rng = np.random.default_rng(7)
    w = rng.normal(size=(96, 80)).astype(F32)
    scale = np.abs(w).mean()
    weight = (np.clip(np.rint(w / scale), -1, 1) * scale).astype(F32)
    feed = {"x": rng.normal(size=(2, tokens, 96)).astype(F32)}
    nodes = [*per_token("x", "q"), node("MatMul", ["q", "w"], ["y"])]
    kinds, module = built(model(nodes, feed, ["y"], {"w": weight, **CONSTANTS}), feed, exact=False)
    assert kinds["y"] in ("weight-only", "int8")
    assert module.report.layers[0].weight_bytes <= weight.nbytes / 8


def test_weights_of_two_bits_unpacked_in_the_graph():
    """Four codes 0, 1, 2 in a byte, shifted out, minus 1."""
    rng = np.random.default_rng(8)
    codes = rng.integers(0, 3, (64, 128))
    packed = sum(codes[:, i * 32 : (i + 1) * 32].astype(np.uint8) << (2 * i) for i in range(4)).astype(np.uint8)
    nodes, parts = per_token("x", "q"), []
    constants = {"packed": packed, "three": np.uint8(3), "one": F32(1), **CONSTANTS}
    for i in range(4):
        constants[f"s{i}"] = np.uint8(2 * i)
        nodes += [
            node("BitShift", ["packed", f"s{i}"], [f"b{i}"], direction="RIGHT"),
            node("BitwiseAnd", [f"b{i}", "three"], [f"m{i}"]),
            node("Cast", [f"m{i}"], [f"f{i}"], to=TensorProto.FLOAT),
            node("Sub", [f"f{i}", "one"], [f"p{i}"]),
        ]
        parts.append(f"p{i}")
    nodes += [node("Concat", parts, ["w"], axis=1), node("Transpose", ["w"], ["t"], perm=[1, 0]), node("MatMul", ["q", "t"], ["y"])]
    feed = {"x": rng.normal(size=(3, 128)).astype(F32)}
    nodes[1] = node("ReduceMax", ["abs", "last"], ["top"], keepdims=1)
    proto = model(nodes, feed, ["y"], {**constants, "last": np.array([-1])}, opset=18)
    kinds, _ = built(proto, feed, exact=False)
    assert kinds["y"] in ("weight-only", "int8")
