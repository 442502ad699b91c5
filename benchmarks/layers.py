"""Single layers and chains of layers as ONNX.

The shapes are those in which binary networks spend their time: the four 3x3 stages of a ResNet-18, two larger 3x3 layers, a 1x1 layer, and
a dense layer of 4096 x 4096 for one row and for 256.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from .netbuilder import NetBuilder


@dataclass(frozen=True)
class Layer:
    """One layer of as many outputs as inputs channels.

    Attributes
    ----------
    channels : int
        Input and output channels.
    size : int
        Height and width of the image; 0 for a dense layer.
    kernel : int
        1 or 3 (padded by one pixel); 1 for a dense layer.
    rows : int
        Batch: images, or rows of a dense layer.
    """

    channels: int
    size: int
    kernel: int = 3
    rows: int = 1

    @property
    def name(self) -> str:
        if not self.size:
            return f"dense {self.rows}x{self.channels}x{self.channels}"
        return f"{self.kernel}x{self.kernel} {self.size}x{self.size}x{self.channels}"

    @property
    def macs(self) -> int:
        """Multiply-accumulates, padded taps counted."""
        return self.rows * self.channels**2 * max(self.size, 1) ** 2 * self.kernel**2

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.rows, self.channels, self.size, self.size) if self.size else (self.rows, self.channels)

    def input(self, binary: bool = False) -> np.ndarray:
        """Random input, or random -1 and +1."""
        x = np.random.default_rng(7).standard_normal(self.input_shape).astype(np.float32)
        return np.where(x < 0, np.float32(-1), np.float32(1)) if binary else x

    def chain(self, length: int) -> onnx.ModelProto:
        """Float input, then ``length`` times sign and convolution (or dense layer) with BatchNormalization between them, float output."""
        net = self._builder()
        x = net.input
        for i in range(length):
            if i:
                x = net.batchnorm(x)
            x = net.binary_conv(x, self.channels, self.kernel) if self.size else net.binary_dense(x, self.channels)
        return net.model(x)

    def binary(self) -> onnx.ModelProto:
        """Float input, sign, one layer with weights +-1, float output."""
        return self.chain(1)

    def plain(self) -> onnx.ModelProto:
        """The same layer without the sign: what a runtime that knows no bits would be given."""
        net = self._builder()
        if self.size:
            weights = net.binary_weights((self.channels, self.channels, self.kernel, self.kernel))
            return net.model(net.conv(net.input, self.channels, self.kernel, bn=False, weights=weights))
        weights = net.constant(net.binary_weights((self.channels, self.channels)), "weight")
        return net.model(net.node("MatMul", [net.input, weights]))

    def _builder(self) -> NetBuilder:
        # The statistics of a BatchNormalization need spatial samples or many rows.
        return NetBuilder(self.name, self.input_shape[1:], seed=3, samples=1 if self.size else 32)


LAYERS = (
    Layer(64, 56),
    Layer(128, 28),
    Layer(256, 14),
    Layer(512, 7),
    Layer(512, 14),
    Layer(256, 56),
    Layer(512, 14, kernel=1),
    Layer(4096, 0, kernel=1, rows=1),
    Layer(4096, 0, kernel=1, rows=256),
)
