"""Weights that are binary but for their last bits: float, with the deviation in the report, unless the user allows it."""

import numpy as np
from onnx import helper

from tests.families.helpers import built, eighths
from tests.importer.helpers import model

node = helper.make_node


def network():
    """ReActNet's weights as they are trained: alpha * sign(w) - clip(w) + clip(w), in the graph."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(16, 40, 3, 3)).astype(np.float32)
    alpha = np.abs(w).mean((1, 2, 3), keepdims=True)
    nodes = [
        node("Sign", ["x"], ["q"]),
        node("Sign", ["w"], ["s"]),
        node("Mul", ["s", "alpha"], ["a"]),
        node("Clip", ["w", "minus", "one"], ["c"]),
        node("Sub", ["a", "c"], ["d"]),
        node("Add", ["d", "c"], ["weight"]),
        node("Conv", ["q", "weight"], ["y"]),
    ]
    feed = {"x": eighths(rng, 1, 40, 6, 6)}
    constants = {"w": w, "alpha": alpha, "minus": np.float32(-1), "one": np.float32(1)}
    return model(nodes, feed, ["y"], constants), feed


def test_float_by_default_and_the_report_says_by_how_much():
    kinds, module = built(*network(), exact=False)
    (layer,) = module.report.layers
    assert kinds == {"y": "float"}
    assert "relative deviation of" in layer.reason and "weight_tolerance=" in layer.reason


def test_binary_on_request():
    kinds, module = built(*network(), exact=False, weight_tolerance=1e-5)
    assert kinds == {"y": "binary"} and "weight_tolerance" in str(module.report)
    assert module.report.layers[0].weight_bytes < 16 * 40 * 9 / 8 * 4


def test_an_exact_ternary_weight_is_no_rounded_binary_one():
    """Zeros are far from any magnitude: no tolerance below one takes them for signs."""
    rng = np.random.default_rng(1)
    feed = {"x": eighths(rng, 4, 70)}
    weight = rng.choice([-0.5, 0.0, 0.5], (70, 9)).astype(np.float32)
    proto = model([node("Sign", ["x"], ["q"]), node("MatMul", ["q", "w"], ["y"])], feed, ["y"], {"w": weight})
    kinds, module = built(proto, feed, weight_tolerance=0.5)
    assert kinds["y"] in ("binary", "bitserial") and module.report.layers[0].planes in ("2x2", "2x1", "1x2")
