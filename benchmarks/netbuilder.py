"""Builds an ONNX network node by node and runs it on sample images while it grows.

Random weights alone give dead networks: after a few layers most signs are constant. Every node is therefore evaluated (by ONNX Runtime)
as it is added, and each BatchNormalization gets the mean and variance that its input really has, so that about half of all signs are +1.
The statistics are rounded to eight bits of mantissa: the same seed then gives the same file on machines whose float32 sums differ in
the last bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8
EPSILON = 1e-5
# Below this many samples per channel the variance is taken over all channels together.
SAMPLES_PER_CHANNEL = 32


@dataclass(frozen=True)
class Value:
    """One tensor of the growing network.

    Attributes
    ----------
    name : str
        Its name in the graph.
    data : np.ndarray
        float32[S, ...], its value on the S sample images.
    """

    name: str
    data: np.ndarray = field(repr=False)

    @property
    def channels(self) -> int:
        return self.data.shape[1]


def coarse(x: np.ndarray) -> np.ndarray:
    """Round to eight bits of mantissa.

    Parameters
    ----------
    x : np.ndarray
        Finite numbers of any shape.

    Returns
    -------
    np.ndarray
        float32, same shape.
    """
    mantissa, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(np.round(mantissa * 256) / 256, exponent).astype(np.float32)


def same_pads(size: tuple[int, int], kernel: int, stride: int) -> list[int]:
    """Padding that TensorFlow calls SAME: the odd pixel goes to the bottom and to the right.

    Parameters
    ----------
    size : tuple of int
        Height and width of the input.
    kernel, stride : int
        Of both axes.

    Returns
    -------
    list of int
        ONNX pads: top, left, bottom, right.
    """
    total = [max((-(-s // stride) - 1) * stride + kernel - s, 0) for s in size]
    begin = [t // 2 for t in total]
    return begin + [t - b for t, b in zip(total, begin)]


class NetBuilder:
    """A growing ONNX graph in NCHW with a dynamic batch and its value on a few random images.

    Parameters
    ----------
    name : str
        Graph name.
    shape : tuple of int
        C, H, W of the input, which is called ``input``.
    seed : int
        Seeds weights and sample images.
    samples : int
        Number of sample images that batch statistics are taken from.
    sign : str
        How an activation is binarised: ``"larq"`` (Sign(Sign(x) + 0.1), as tf2onnx writes it), ``"where"`` (Where(x >= 0, 1, -1)) or
        ``"torch"`` (plain Sign).
    """

    def __init__(self, name: str, shape: tuple[int, ...], seed: int = 0, samples: int = 2, sign: str = "larq"):
        self.name = name
        self.rng = np.random.default_rng(seed)
        self.sign_style = sign
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._constants: dict[tuple, str] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self.input = Value("input", self.rng.standard_normal((samples, *shape)).astype(np.float32))

    # -- graph ------------------------------------------------------------------------------------------------------------------------

    def constant(self, array: np.ndarray, hint: str) -> str:
        """Add an initializer; equal scalars and shape vectors are shared, as exporters do. Returns its name."""
        array = np.asarray(array)
        key = (array.tobytes(), array.dtype.str, array.shape) if array.size <= 8 else None
        if key in self._constants:
            return self._constants[key]
        name = f"{hint}_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(array, name))
        self._arrays[name] = array
        if key is not None:
            self._constants[key] = name
        return name

    def node(self, op: str, inputs: list[Value | str], **attributes) -> Value:
        """Append a node with one output and evaluate it on the samples.

        Parameters
        ----------
        op : str
            ONNX operator.
        inputs : list of Value or str
            Values of the graph, or names of initializers.
        """
        names = [i if isinstance(i, str) else i.name for i in inputs]
        output = f"{op.lower()}_{len(self.nodes)}"
        node = helper.make_node(op, names, [output], name=output, **attributes)
        self.nodes.append(node)
        feed = {n: self._arrays[i] if isinstance(i, str) else i.data for n, i in zip(names, inputs)}
        return Value(output, _evaluate(node, feed))

    def model(self, output: Value) -> onnx.ModelProto:
        """The finished, checked model with one output called ``output``."""
        self.nodes[-1].output[0] = "output"
        assert output.name == self.nodes[-1].name, "the output must be the last node added"
        batch = ["N", *self.input.data.shape[1:]]
        graph = helper.make_graph(
            self.nodes,
            self.name,
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, batch)],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", *output.data.shape[1:]])],
            self.initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="bnntvm-zoo")
        onnx.checker.check_model(model)
        return model

    # -- activations and normalisation --------------------------------------------------------------------------------------------------

    def sign(self, x: Value) -> Value:
        """Binarise to -1 and +1 in the spelling of this network."""
        if self.sign_style == "torch":
            return self.node("Sign", [x])
        if self.sign_style == "where":
            one, zero = self.constant(np.float32(1), "one"), self.constant(np.float32(0), "zero")
            positive = self.node("GreaterOrEqual", [x, zero])
            return self.node("Where", [positive, one, self.constant(np.float32(-1), "minus_one")])
        first = self.node("Sign", [x])
        return self.node("Sign", [self.node("Add", [first, self.constant(np.float32(0.1), "tenth")])])

    def batchnorm(self, x: Value, shift: float = 0.0) -> Value:
        """BatchNormalization with the statistics of ``x`` and random gamma and beta (one gamma in twenty is negative).

        Parameters
        ----------
        shift : float
            Mean of the result, in its standard deviations.
        """
        gamma, beta, mean, var = self._normalisation(x, shift)
        names = [self.constant(a, h) for a, h in ((gamma, "gamma"), (beta, "beta"), (mean, "mean"), (var, "var"))]
        return self.node("BatchNormalization", [x, *names], epsilon=EPSILON)

    def _normalisation(self, x: Value, shift: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        channels = x.channels
        axes = (0, *range(2, x.data.ndim))
        data = x.data.astype(np.float64)
        mean, var = data.mean(axes), data.var(axes)
        if data.size // channels < SAMPLES_PER_CHANNEL:
            var = np.full(channels, data.var())
        magnitude = self.rng.uniform(0.5, 1.5, channels)
        gamma = np.where(self.rng.random(channels) < 0.05, -magnitude, magnitude)
        beta = magnitude * shift + self.rng.normal(0, 0.1, channels)
        return coarse(gamma), coarse(beta), coarse(mean), np.maximum(coarse(var), np.float32(1e-3))

    # -- layers -------------------------------------------------------------------------------------------------------------------------

    def conv(
        self,
        x: Value,
        filters: int,
        kernel: int,
        *,
        bn: bool = True,
        shift: float = 0.0,
        weights: np.ndarray | None = None,
        **geometry,
    ) -> Value:
        """Float convolution; its BatchNormalization is folded into weights and bias, as both PyTorch exporters and tf2onnx do.

        Parameters
        ----------
        bn : bool
            Whether a BatchNormalization follows.
        shift : float
            See `batchnorm`.
        weights : np.ndarray, optional
            float32[filters, Cin / groups, kernel, kernel] in place of random ones.
        **geometry
            ``stride``, ``pads`` ("same", an int, or four numbers) and ``groups``.
        """
        groups = geometry.pop("groups", 1)
        fan_in = x.channels // groups * kernel * kernel
        if weights is None:
            weights = self.rng.normal(0, (2 / fan_in) ** 0.5, (filters, x.channels // groups, kernel, kernel)).astype(np.float32)
        attributes = self._geometry(x, kernel, group=groups, **geometry)
        if not bn:
            return self.node("Conv", [x, self.constant(weights, "weight")], **attributes)
        plain = Value("plain", _evaluate(helper.make_node("Conv", ["x", "w"], ["y"], **attributes), {"x": x.data, "w": weights}))
        gamma, beta, mean, var = self._normalisation(plain, shift)
        scale = gamma / np.sqrt(var + np.float32(EPSILON))
        folded = weights * scale[:, None, None, None]
        return self.node("Conv", [x, self.constant(folded, "weight"), self.constant(beta - mean * scale, "bias")], **attributes)

    def binary_weights(self, shape: tuple[int, ...], scaled: bool = False) -> np.ndarray:
        """Random weights of two levels.

        Parameters
        ----------
        shape : tuple of int
            Filters first.
        scaled : bool
            Levels are +-alpha with an alpha per filter (XNOR-Net, Bi-Real Net) in place of +-1.

        Returns
        -------
        np.ndarray
            float32 of that shape.
        """
        signs = np.where(self.rng.random(shape) < 0.5, np.float32(-1), np.float32(1))
        if not scaled:
            return signs
        alpha = self.rng.uniform(0.02, 0.06, shape[0]).astype(np.float32)
        return signs * alpha.reshape(-1, *[1] * (len(shape) - 1))

    def binary_conv(self, x: Value, filters: int, kernel: int, **options) -> Value:
        """Sign, then `conv_of_bits`."""
        return self.conv_of_bits(self.sign(x), filters, kernel, **options)

    def conv_of_bits(self, bits: Value, filters: int, kernel: int, *, scaled: bool = False, pad_one: bool = False, **geometry) -> Value:
        """Convolution of a +-1 tensor with two-level weights.

        Parameters
        ----------
        scaled : bool
            See `binary_weights`.
        pad_one : bool
            Pad with +1 by a Pad node (Larq's ``pad_values=1``) in place of zeros.
        """
        channels = bits.channels
        attributes = self._geometry(bits, kernel, **geometry)
        if pad_one:
            top, left, bottom, right = attributes.pop("pads")
            pads = np.array([0, 0, top, left, 0, 0, bottom, right], np.int64)
            bits = self.node("Pad", [bits, self.constant(pads, "pads"), self.constant(np.float32(1), "one")], mode="constant")
        weights = self.binary_weights((filters, channels, kernel, kernel), scaled)
        return self.node("Conv", [bits, self.constant(weights, "weight")], **attributes)

    def binary_dense(self, x: Value, units: int) -> Value:
        """Sign, then a dense layer with weights +-1 of shape [K, units]."""
        bits = self.sign(x)
        return self.node("MatMul", [bits, self.constant(self.binary_weights((x.channels, units)), "weight")])

    def dense(self, x: Value, units: int, *, bias: bool = True, relu: bool = False) -> Value:
        """Float dense layer (Gemm), x of shape [N, K]."""
        weights = self.rng.normal(0, x.channels**-0.5, (units, x.channels)).astype(np.float32)
        operands = [x, self.constant(weights, "weight")]
        if bias:
            operands.append(self.constant(self.rng.normal(0, 0.1, units).astype(np.float32), "bias"))
        y = self.node("Gemm", operands, transB=1)
        return self.node("Relu", [y]) if relu else y

    def max_pool(self, x: Value, kernel: int, stride: int, pads: str | int | list[int] = 0) -> Value:
        return self.node("MaxPool", [x], **self._geometry(x, kernel, stride=stride, pads=pads, pooling=True))

    def average_pool(self, x: Value, kernel: int, stride: int) -> Value:
        return self.node("AveragePool", [x], kernel_shape=[kernel] * 2, strides=[stride] * 2)

    def classifier(self, x: Value, classes: int = 1000, *, softmax: bool = True) -> Value:
        """Global average pooling, a dense layer, softmax."""
        y = self.dense(self.node("Flatten", [self.node("GlobalAveragePool", [x])], axis=1), classes)
        return self.node("Softmax", [y], axis=-1) if softmax else y

    def prelu(self, x: Value) -> Value:
        """PReLU with a random slope per channel."""
        slope = self.rng.uniform(0.05, 0.4, (x.channels, 1, 1)).astype(np.float32)
        return self.node("PRelu", [x, self.constant(slope, "slope")])

    def channel_bias(self, x: Value, *, centre: bool = False) -> Value:
        """Add a bias per channel, [1, C, 1, 1]: random, or with ``centre`` one that moves the channel's mean to about 0."""
        bias = self.rng.normal(0, 0.1, x.channels)
        if centre:
            bias = bias - x.data.mean((0, 2, 3))
        return self.node("Add", [x, self.constant(coarse(bias).reshape(1, -1, 1, 1), "bias")])

    @staticmethod
    def _geometry(
        x: Value, kernel: int, *, stride: int = 1, pads: str | int | list[int] = "same", group: int = 1, pooling: bool = False
    ) -> dict:
        """ONNX attributes of a convolution or a pooling."""
        if pads == "same":
            pads = same_pads(x.data.shape[2:], kernel, stride)
        elif isinstance(pads, int):
            pads = [pads] * 4
        attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": list(pads)}
        return attributes if pooling else {**attributes, "dilations": [1, 1], "group": group}


def _evaluate(node: onnx.NodeProto, feed: dict[str, np.ndarray]) -> np.ndarray:
    """Run one node in ONNX Runtime.

    Parameters
    ----------
    node : onnx.NodeProto
        With one output.
    feed : dict
        Every input of the node by name.
    """
    import onnxruntime

    inputs = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feed.items()]
    output = helper.make_value_info(node.output[0], onnx.TypeProto())
    graph = helper.make_graph([node], "one", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feed)[0]
