"""Convolutions of few-bit activations and weights: 3x3, 256 channels.

``W1A2`` has weights of one bit and activations of two, as DoReFa-Net quantises them (clip, scale, round); ``WtA1`` is ternary weights and
signs. Beside ONNX Runtime in 8 bits, which is given the bare layer and an input that holds the levels already, and beside the layer with
one bit each: what one more layer adds to a chain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


@dataclass(frozen=True)
class FewBits:
    """A padded 3x3 convolution with as many outputs as input channels.

    Attributes
    ----------
    weights : str
        ``1``, ``2`` (bits) or ``t`` (ternary).
    activations : int
        Bits; 1 is -1 and +1.
    size, channels : int
    """

    weights: str
    activations: int
    size: int
    channels: int = 256

    @property
    def name(self) -> str:
        return f"W{self.weights}A{self.activations} 3x3 {self.size}x{self.size}x{self.channels}"

    @property
    def macs(self) -> int:
        return self.channels**2 * 9 * self.size**2

    @property
    def binary(self) -> FewBits:
        """The same layer with one bit each."""
        return FewBits("1", 1, self.size, self.channels)

    def input(self, quantised: bool = False) -> np.ndarray:
        """Random numbers between 0 and 1 (around 0 for signs), or levels."""
        x = np.random.default_rng(7).random((1, self.channels, self.size, self.size), np.float32)
        if self.activations == 1:
            return np.where(x < 0.5, np.float32(-1), np.float32(1)) if quantised else x - np.float32(0.5)
        top = np.float32(2**self.activations - 1)
        return np.rint(x * top) / top if quantised else x

    def plain(self) -> onnx.ModelProto:
        """The convolution alone."""
        node = helper.make_node("Conv", ["input", "w0"], ["output"], pads=[1, 1, 1, 1])
        return self._model([node], {"w0": self._weights(0)})

    def chain(self, length: int) -> onnx.ModelProto:
        """Float input, ``length`` times quantiser, convolution and scale, float output."""
        nodes, constants, x = [], {"half": np.float32(0.5), "zero": np.float32(0), "one": np.float32(1), "minus": np.float32(-1)}, "input"
        constants["top"] = np.float32(2**self.activations - 1)
        for i in range(length):
            nodes += self._quantiser(x, f"q{i}")
            constants[f"w{i}"] = weights = self._weights(i)
            spread = np.sqrt(9 * self.channels * np.mean(weights**2))
            constants[f"s{i}"] = np.full((1, self.channels, 1, 1), 1 / spread, np.float32)
            constants[f"b{i}"] = np.linspace(0.3, 0.7, self.channels, dtype=np.float32).reshape(1, -1, 1, 1) * (self.activations > 1)
            out = "output" if i == length - 1 else f"x{i}"
            nodes.append(helper.make_node("Conv", [f"q{i}", f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]))
            nodes += [helper.make_node("Mul", [f"c{i}", f"s{i}"], [f"m{i}"]), helper.make_node("Add", [f"m{i}", f"b{i}"], [out])]
            x = out
        return self._model(nodes, constants)

    def _quantiser(self, x: str, out: str) -> list:
        if self.activations == 1:
            test = helper.make_node("GreaterOrEqual", [x, "zero"], [f"{out}.positive"])
            return [test, helper.make_node("Where", [f"{out}.positive", "one", "minus"], [out])]
        steps = [
            ("Clip", [x, "zero", "one"], "clipped"),
            ("Mul", [f"{out}.clipped", "top"], "scaled"),
            ("Round", [f"{out}.scaled"], "rounded"),
        ]
        nodes = [helper.make_node(op, inputs, [f"{out}.{result}"]) for op, inputs, result in steps]
        return [*nodes, helper.make_node("Div", [f"{out}.rounded", "top"], [out])]

    def _weights(self, number: int) -> np.ndarray:
        levels = {"1": (-1, 1), "t": (-1, 0, 1), "2": (-3, -1, 1, 3)}[self.weights]
        shape = (self.channels, self.channels, 3, 3)
        return np.random.default_rng(number).choice(np.float32(levels) * np.float32(0.25), shape)

    def _model(self, nodes: list, constants: dict) -> onnx.ModelProto:
        shape = [1, self.channels, self.size, self.size]
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("input", "output")]
        used = {name for node in nodes for name in node.input}
        tensors = [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in constants.items() if name in used]
        graph = helper.make_graph(nodes, self.name, infos[:1], infos[1:], tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


LAYERS = tuple(FewBits(w, a, size) for size in (14, 56) for w, a in (("1", 2), ("2", 2), ("t", 1)))
