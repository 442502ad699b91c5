"""BinaryConnect (Courbariaux et al. 2015) and Binary Weight Networks (Rastegari et al. 2016, section 3.1): binary weights, float data."""

import numpy as np
import pytest
from onnx import helper

from tests.families.helpers import built, eighths
from tests.importer.helpers import model

node = helper.make_node


@pytest.mark.parametrize("scaled", [False, True])
def test_latent_weights_and_their_sign_in_the_graph(scaled):
    """BinaryConnect: Sign(w). BWN: times the mean magnitude of the filter."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(40, 33, 3, 3)).astype(np.float32)
    nodes = [node("Sign", ["w"], ["s"])]
    if scaled:
        nodes += [node("Abs", ["w"], ["a"]), node("ReduceMean", ["a"], ["m"], axes=[1, 2, 3], keepdims=1), node("Mul", ["s", "m"], ["b"])]
    nodes.append(node("Conv", ["x", "b" if scaled else "s"], ["y"], pads=[1, 1, 1, 1]))
    feed = {"x": eighths(rng, 2, 33, 7, 7)}
    kinds, module = built(model(nodes, feed, ["y"], {"w": w}), feed, exact=not scaled)
    assert kinds == {"y": "weight-only"}
    assert module.report.layers[0].weight_bytes < w.nbytes / 10


def test_a_deterministic_hard_sigmoid_as_binarisation():
    """BinaryConnect, eq. 2: +1 with probability hard_sigmoid(w), here rounded; one dense row."""
    rng = np.random.default_rng(1)
    w = rng.uniform(-1, 1, (256, 100)).astype(np.float32)
    nodes = [
        node("Add", ["w", "one"], ["a"]),
        node("Div", ["a", "two"], ["b"]),
        node("Round", ["b"], ["c"]),
        node("Mul", ["c", "two"], ["d"]),
        node("Sub", ["d", "one"], ["e"]),
        node("MatMul", ["x", "e"], ["y"]),
    ]
    feed = {"x": eighths(rng, 1, 256)}
    assert built(model(nodes, feed, ["y"], {"w": w, "one": np.float32(1), "two": np.float32(2)}), feed)[0] == {"y": "weight-only"}
