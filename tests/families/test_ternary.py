"""Ternary weights: TernaryConnect (Lin et al. 2016), TWN (Li et al. 2016), TTQ (Zhu et al. 2017), on float and on low-bit activations.

"Neural Networks with Few Multiplications" (Lin et al. 2016) quantises what the multiplications are left with to powers of two.
"""

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.families.helpers import built, eighths
from tests.importer.helpers import model

node = helper.make_node
F32 = np.float32


def ternary(kind):
    """Nodes and constants that make the weights ``t`` from ``w``."""
    if kind == "connect":  # round(clip(w)) of weights in [-1, 1]
        return [node("Clip", ["w", "minus", "one"], ["c"]), node("Round", ["c"], ["t"])], {}
    if kind == "twn":  # a * sign(w) where |w| > delta, a power of two here
        nodes = [
            node("Abs", ["w"], ["a"]),
            node("Greater", ["a", "delta"], ["g"]),
            node("Cast", ["g"], ["m"], to=TensorProto.FLOAT),
            node("Sign", ["w"], ["s"]),
            node("Mul", ["s", "m"], ["u"]),
            node("Mul", ["u", "half"], ["t"]),
        ]
        return nodes, {}
    nodes = [  # TTQ: Wp where w > delta, -Wn where w < -delta
        node("Greater", ["w", "delta"], ["g"]),
        node("Less", ["w", "under"], ["l"]),
        node("Where", ["g", "wp", "zero"], ["p"]),
        node("Where", ["l", "wn", "p"], ["t"]),
    ]
    return nodes, {"under": F32(-0.7), "wp": F32(0.75), "wn": F32(-0.5)}


ACTIVATIONS = {
    "float": ([node("Identity", ["x"], ["q"])], {"weight-only"}),
    "sign": ([node("Sign", ["x"], ["q"])], {"binary", "bitserial", "int8"}),
    "two bits": ([node("Clip", ["x", "zero", "three"], ["k"]), node("Round", ["k"], ["q"])], {"bitserial", "int8"}),
    "powers of two": (
        [
            node("Greater", ["x", "half"], ["g1"]),
            node("Greater", ["x", "one"], ["g2"]),
            node("Greater", ["x", "three"], ["g3"]),
            node("Where", ["g1", "quarter", "zero"], ["p1"]),
            node("Where", ["g2", "half", "p1"], ["p2"]),
            node("Where", ["g3", "one", "p2"], ["q"]),
        ],
        {"bitserial", "int8"},
    ),
}


@pytest.mark.parametrize("weights", ["connect", "twn", "ttq"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ternary_weights(weights, activation):
    rng = np.random.default_rng(2)
    made, more = ternary(weights)
    chain, kinds = ACTIVATIONS[activation]
    numbers = {"zero": 0, "one": 1, "minus": -1, "half": 0.5, "quarter": 0.25, "three": 3, "delta": 0.7}
    constants = {"w": rng.normal(size=(40, 36, 3, 3)).astype(F32), **{k: F32(v) for k, v in numbers.items()}, **more}
    nodes = [*made, *chain, node("Conv", ["q", "t"], ["y"], pads=[1, 1, 1, 1])]
    feed = {"x": eighths(rng, 1, 36, 6, 6)}
    found, module = built(model(nodes, feed, ["y"], constants), feed)
    assert found["y"] in kinds
    assert module.report.layers[0].weight_bytes < constants["w"].nbytes / 3
