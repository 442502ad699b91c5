"""Products of two tensors that are both made at run time: the scores of attention with binary queries and keys.

bnntvm gets floats and the graph that takes their signs; ONNX Runtime gets the bare MatMul and signs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


@dataclass(frozen=True)
class Attention:
    """Scores of ``tokens`` queries with as many keys, ``features`` numbers each, for ``heads`` heads."""

    heads: int
    tokens: int
    features: int

    @property
    def name(self) -> str:
        return f"binary attention scores, {self.heads} heads, {self.tokens}x{self.tokens}x{self.features}"

    @property
    def macs(self) -> int:
        return self.heads * self.tokens**2 * self.features

    def feed(self, signs: bool = False) -> dict[str, np.ndarray]:
        """Random numbers, or their signs."""
        rng = np.random.default_rng(5)
        arrays = {n: rng.standard_normal((1, self.heads, self.tokens, self.features)).astype(np.float32) for n in ("queries", "keys")}
        return {n: np.where(a < 0, np.float32(-1), np.float32(1)) for n, a in arrays.items()} if signs else arrays

    def model(self, signs: bool = True) -> onnx.ModelProto:
        """queries @ keys transposed, of their signs unless the inputs are signs already."""
        nodes, names = [], {"queries": "queries", "keys": "keys"}
        for name in names if signs else ():
            nodes.append(helper.make_node("GreaterOrEqual", [name, "zero"], [f"{name}.positive"]))
            nodes.append(helper.make_node("Where", [f"{name}.positive", "one", "minus"], [f"{name}.sign"]))
            names[name] = f"{name}.sign"
        nodes.append(helper.make_node("Transpose", [names["keys"]], ["turned"], perm=[0, 1, 3, 2]))
        nodes.append(helper.make_node("MatMul", [names["queries"], "turned"], ["scores"]))
        shapes = {n: [1, self.heads, self.tokens, self.features] for n in ("queries", "keys")}
        shapes["scores"] = [1, self.heads, self.tokens, self.tokens]
        infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
        constants = {"zero": 0, "one": 1, "minus": -1} if signs else {}
        tensors = [numpy_helper.from_array(np.float32(v), n) for n, v in constants.items()]
        graph = helper.make_graph(nodes, self.name, infos[:2], infos[2:], tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


LAYERS = (Attention(12, 197, 64), Attention(8, 512, 64), Attention(8, 512, 512))
