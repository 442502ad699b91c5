"""k-bit weights times m-bit activations: DoReFa-Net (Zhou et al. 2016), QNN (Hubara et al. 2016), PACT (Choi et al. 2018), LSQ (Esser et
al. 2020).

Scales are powers of two here, so that ONNX Runtime's sums are exact and have to be met bit for bit; levels lie next to ties of rounding.
"""

import numpy as np
import pytest
from onnx import helper

from tests.families.helpers import built, eighths
from tests.importer.helpers import model

node = helper.make_node
F32 = np.float32


def lsq(name, out, low, high, tag):
    """round(clip(v / s)) * s with s = 1/2."""
    return [
        node("Div", [name, "half"], [f"d{tag}"]),
        node("Max", [f"d{tag}", f"low{tag}"], [f"l{tag}"]),
        node("Min", [f"l{tag}", f"high{tag}"], [f"h{tag}"]),
        node("Round", [f"h{tag}"], [f"r{tag}"]),
        node("Mul", [f"r{tag}", "half"], [out]),
    ], {f"low{tag}": F32(low), f"high{tag}": F32(high)}


@pytest.mark.parametrize("bits", [(1, 2), (2, 1), (2, 2), (3, 2), (4, 4)], ids=lambda b: f"W{b[0]}A{b[1]}")
def test_two_layers_of_learned_step_sizes(bits):
    """The quantiser between the layers becomes thresholds on the integer sums of the first."""
    rng = np.random.default_rng(3)
    k, m = bits
    made, constants = [], {"half": F32(0.5)}
    for i in (1, 2):
        low, high = (-(2 ** (k - 1)), 2 ** (k - 1) - 1) if k > 1 else (0, 1)
        for nodes, more in (lsq(f"w{i}", f"wq{i}", low, high, f"w{i}"), lsq("x" if i == 1 else "b", f"q{i}", 0, 2**m - 1, f"a{i}")):
            made, constants = made + nodes, constants | more
        made.append(node("Conv", [f"q{i}", f"wq{i}"], [f"y{i}"], pads=[1, 1, 1, 1]))
        if i == 1:
            made += [node("Mul", ["y1", "gain"], ["g"]), node("Add", ["g", "shift"], ["b"])]
    constants |= {"w1": eighths(rng, 40, 33, 3, 3), "w2": eighths(rng, 9, 40, 3, 3)}
    constants |= {"gain": rng.choice([-0.125, 0.0625, 0.25], (40, 1, 1)).astype(F32), "shift": eighths(rng, 40, 1, 1)}
    feed = {"x": eighths(rng, 1, 33, 6, 6)}
    order = sorted(made, key=lambda n: n.op_type == "Conv" and n.input[0] == "q2")
    kinds, _ = built(model(order, feed, ["y2"], constants), feed)
    assert set(kinds.values()) <= {"binary", "bitserial", "int8"}


@pytest.mark.parametrize("low, high", [(0, 31), (0, 255), (-128, 127), (-20, 43)])
@pytest.mark.parametrize("levels, bits", [((-1, 1), 1), ((-1, 0, 1), 2), ((-3, -1, 1, 3), 2), ((-2, -1, 0, 1), 2)], ids=str)
def test_activations_of_up_to_eight_bits(levels, bits, low, high):
    """More levels than planes pay for are bytes, the weights keep their bits; strides and odd channels on the way."""
    rng = np.random.default_rng(5)
    nodes, constants = [], {"half": F32(0.5)}
    for i, data in (1, "x"), (2, "b"):
        made, more = lsq(data, f"q{i}", low, high, f"a{i}")
        nodes, constants = nodes + made, constants | more
        nodes.append(node("Conv", [f"q{i}", f"w{i}"], [f"y{i}"], pads=[1, 0, 1, 1], strides=[1, i]))
        nodes += [node("Mul", ["y1", "gain"], ["g"]), node("Add", ["g", "shift"], ["b"])] if i == 1 else []
    constants |= {"w1": rng.choice(F32(levels), (40, 33, 3, 3)) / 4, "w2": rng.choice(F32(levels), (9, 40, 3, 3)) * F32(2)}
    constants |= {"gain": rng.choice([-0.125, 0.0625, 0.25], (40, 1, 1)).astype(F32), "shift": eighths(rng, 40, 1, 1)}
    feed = {"x": eighths(rng, 2, 33, 6, 6, bound=40)}
    kinds, module = built(model(nodes, feed, ["y2"], constants), feed, verify=True)
    assert set(kinds.values()) == {"int8"}
    for layer, (outputs, inputs) in zip(module.report.layers, ((40, 33), (9, 40))):
        padded = -(-outputs // 32) * 32 * -(-inputs // 4) * 4 * 9
        assert layer.weight_bytes == padded * bits // 8 and layer.planes == f"int8 x {bits}"


@pytest.mark.parametrize("zero", [128, 0, 100])
def test_linear_quantisation_to_bytes(zero):
    """QuantizeLinear, ternary weights; zero padding is the zero point. -100 to 155 become bytes when they are moved."""
    rng = np.random.default_rng(6)
    nodes = [
        node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "step", "zero"], ["d"]),
        node("Conv", ["d", "w"], ["y"], pads=[1, 1, 1, 1]),
    ]
    constants = {"step": F32(0.25), "zero": np.uint8(zero), "w": rng.choice(F32([-0.5, 0, 0.5]), (20, 33, 3, 3))}
    feed = {"x": eighths(rng, 1, 33, 6, 6, bound=60)}
    kinds, _ = built(model(nodes, feed, ["y"], constants), feed)
    assert kinds["y"] == "int8"


def test_pact_and_codes_of_dorefa():
    """PACT's clip written with absolute values; DoReFa's levels k/3 in the weights, whose scale is applied to integer sums."""
    rng = np.random.default_rng(4)
    nodes = [
        node("Abs", ["x"], ["a"]),
        node("Sub", ["x", "alpha"], ["b"]),
        node("Abs", ["b"], ["c"]),
        node("Sub", ["a", "c"], ["d"]),
        node("Add", ["d", "alpha"], ["e"]),
        node("Mul", ["e", "half"], ["f"]),
        node("Round", ["f"], ["q"]),
        node("Tanh", ["w"], ["t"]),
        node("Div", ["t", "top"], ["u"]),
        node("Add", ["u", "half"], ["v"]),
        node("Mul", ["v", "alpha"], ["n"]),
        node("Round", ["n"], ["r"]),
        node("Div", ["r", "alpha"], ["s"]),
        node("Mul", ["s", "two"], ["z"]),
        node("Sub", ["z", "one"], ["wq"]),
        node("Conv", ["q", "wq"], ["y"], pads=[1, 1, 1, 1]),
    ]
    w = rng.normal(size=(20, 33, 3, 3)).astype(F32)
    constants = {"w": w, "alpha": F32(3), "half": F32(0.5), "two": F32(2), "one": F32(1), "top": F32(2 * np.tanh(np.abs(w).max()))}
    feed = {"x": eighths(rng, 1, 33, 6, 6)}
    kinds, _ = built(model(nodes, feed, ["y"], constants), feed, exact=False)
    assert kinds["y"] in ("bitserial", "int8")
