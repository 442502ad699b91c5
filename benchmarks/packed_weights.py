"""Dense layers whose weights stay packed: those of one row are bound by the time in which the weights arrive, 64 rows by arithmetic.

``1-bit weights``: float activations, BinaryConnect. ``BitNet b1.58``: ternary weights, activations quantised to 8 bits by the largest
magnitude of the row, as training exports write it. ONNX Runtime gets the same graph in float32, and the layer as MatMulNBits of 2 bits with
8-bit activations, its packed form; what packed weights cost at least is reading them, once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

#: Weights that share a scale in MatMulNBits: its fastest choice.
BLOCK = 64


@dataclass(frozen=True)
class PackedLayer:
    """A dense layer of ``features`` inputs and ``outputs`` outputs; ``bits`` is 1 (BinaryConnect) or 2 (BitNet)."""

    bits: int
    features: int
    outputs: int
    rows: int = 1

    @property
    def name(self) -> str:
        return f"{'1-bit weights' if self.bits == 1 else 'BitNet b1.58'}, {self.rows}x{self.features}x{self.outputs}"

    @property
    def macs(self) -> int:
        return self.rows * self.features * self.outputs

    @property
    def packed_bytes(self) -> int:
        """What the weights take."""
        return self.features * self.outputs * self.bits // 8

    def input(self) -> np.ndarray:
        return np.random.default_rng(7).standard_normal((self.rows, self.features)).astype(np.float32)

    def weights(self) -> np.ndarray:
        """float32 [features, outputs] of two or three levels."""
        levels = (-1, 1) if self.bits == 1 else (-1, 0, 1)
        return np.random.default_rng(3).choice(np.float32(levels) * np.float32(0.02), (self.features, self.outputs))

    def model(self) -> onnx.ModelProto:
        """The layer as a framework exports it."""
        nodes, data, constants = [], "input", {"weight": self.weights()}
        if self.bits == 2:
            nodes, data, constants = _quantised_rows(constants)
        nodes.append(helper.make_node("MatMul", [data, "weight"], ["output"]))
        return self._model(nodes, constants)

    def two_bits(self) -> onnx.ModelProto:
        """ONNX Runtime's own form of weights of two bits, with products of 8-bit integers (accuracy level 4)."""
        blocks = self.features // BLOCK
        codes = np.random.default_rng(3).integers(0, 256, (self.outputs, blocks, BLOCK // 4), dtype=np.uint8)
        constants = {"codes": codes, "scales": np.full(self.outputs * blocks, 0.02, np.float32)}
        sizes = dict(K=self.features, N=self.outputs, bits=2, block_size=BLOCK, accuracy_level=4)
        return self._model([helper.make_node("MatMulNBits", ["input", *constants], ["output"], domain="com.microsoft", **sizes)], constants)

    def _model(self, nodes: list, constants: dict) -> onnx.ModelProto:
        sizes = {"input": self.features, "output": self.outputs}
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [self.rows, size]) for name, size in sizes.items()]
        tensors = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()]
        graph = helper.make_graph(nodes, self.name, infos[:1], infos[1:], tensors)
        domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=domains, ir_version=9)


def _quantised_rows(constants: dict) -> tuple[list, str, dict]:
    """Nodes that round rows to 8-bit integers and scale them back, the result's name, and the constants with theirs."""
    more = {"least": np.float32(1e-5), "low": np.float32(-128), "high": np.float32(127), "last": np.int64([-1])}
    steps = [
        ("Abs", ["input"], "magnitudes"), ("ReduceMax", ["magnitudes", "last"], "largest"), ("Clip", ["largest", "least"], "bounded"),
        ("Reciprocal", ["bounded"], "inverse"), ("Mul", ["inverse", "high"], "scale"), ("Mul", ["input", "scale"], "scaled"),
        ("Round", ["scaled"], "rounded"), ("Clip", ["rounded", "low", "high"], "integers"), ("Div", ["integers", "scale"], "quantised"),
    ]  # fmt: skip
    return [helper.make_node(op, inputs, [output]) for op, inputs, output in steps], "quantised", constants | more


LAYERS = (PackedLayer(1, 4096, 4096), PackedLayer(2, 4096, 4096), PackedLayer(2, 2560, 6912), PackedLayer(2, 2560, 6912, 64))
