"""ABC-Net (Lin et al., Towards Accurate Binary Convolutional Neural Network, 2017): sums of scaled binary convolutions."""

import numpy as np
from onnx import helper

from tests.families.helpers import built, eighths
from tests.importer.helpers import model

node = helper.make_node
F32 = np.float32


def test_shifted_signs_times_weight_bases():
    """Equation 8: sum over n and m of beta_n * alpha_m * conv(sign(clip(x + v_n) - 1/2), B_m), as it is exported, nothing folded."""
    rng = np.random.default_rng(5)
    w, nodes, constants, parts = rng.normal(size=(24, 33, 3, 3)).astype(F32), [], {"half": F32(0.5), "one": F32(1), "minus": F32(-1)}, []
    for n, (shift, beta) in enumerate(((-0.5, 0.5), (0.0, 1.0), (0.5, 0.25))):
        constants |= {f"v{n}": F32(shift), f"beta{n}": F32(beta)}
        nodes += [
            node("Add", ["x", f"v{n}"], [f"s{n}"]),
            node("GreaterOrEqual", [f"s{n}", "half"], [f"g{n}"]),
            node("Where", [f"g{n}", "one", "minus"], [f"h{n}"]),
        ]
        for m, (u, alpha) in enumerate(((-1.0, 0.5), (1.0, 0.25))):
            constants |= {f"B{m}": np.where(w + u * w.std() >= 0, F32(1), F32(-1)), f"alpha{m}": F32(alpha)}
            key = f"{n}{m}"
            nodes += [
                node("Conv", [f"h{n}", f"B{m}"], [f"c{key}"]),
                node("Mul", [f"c{key}", f"alpha{m}"], [f"a{key}"]),
                node("Mul", [f"a{key}", f"beta{n}"], [f"p{key}"]),
            ]
            parts.append(f"p{key}")
    nodes.append(node("Sum", parts, ["y"]))
    feed = {"x": eighths(rng, 1, 33, 6, 6, bound=1)}
    kinds, _ = built(model(nodes, feed, ["y"], constants), feed)
    assert len(kinds) == 6 and set(kinds.values()) == {"binary"}


def test_folded_bases():
    """onnxsim leaves one weight tensor of 2**M levels and one activation of N + 1."""
    rng = np.random.default_rng(6)
    weight = sum(a * rng.choice([-1, 1], (24, 40, 3, 3)) for a in (0.5, 0.1875)).astype(F32)
    constants = {"w": weight, "half": F32(0.5), "minus": F32(-0.5), "one": F32(1), "other": F32(-1), "a": F32(0.75), "b": F32(0.25)}
    nodes = [
        node("Greater", ["x", "half"], ["g"]),
        node("Where", ["g", "one", "other"], ["s"]),
        node("Mul", ["s", "a"], ["sa"]),
        node("Greater", ["x", "minus"], ["k"]),
        node("Where", ["k", "one", "other"], ["t"]),
        node("Mul", ["t", "b"], ["tb"]),
        node("Add", ["sa", "tb"], ["q"]),
        node("Conv", ["q", "w"], ["y"], pads=[1, 1, 1, 1]),
    ]
    feed = {"x": eighths(rng, 1, 40, 6, 6, bound=1)}
    kinds, module = built(model(nodes, feed, ["y"], constants), feed)
    assert kinds["y"] in ("bitserial", "int8") and module.report.layers[0].planes == "2x2"
