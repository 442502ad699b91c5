"""Rewrites a network into OpenVINO's BinaryConvolution, as an expert who wants speed would.

OpenVINO never binarises by itself. Here every Conv (and MatMul) of a +-1 activation with two-level weights becomes

    FakeQuantize(levels=2, outputs 0 and 1) -> BinaryConvolution(xnor-popcount, u1 weights) -> Multiply(alpha)

* A BatchNormalization or a bias in front of the sign is folded into the thresholds of the FakeQuantize, per channel (a negative slope swaps
  its outputs). Where the FakeQuantize then follows a BinaryConvolution directly, the CPU plug-in fuses both and the bits stay packed.
* Zero padding is exact: with ``pad_value=0`` the kernel skips padded taps; a Pad with +1 or -1 becomes ``pad_value``.
* Weights are u1 constants, first element in the lowest bit, bit 1 for +alpha.
* Sign(0) is taken as -1 where the network uses a plain Sign: there is no third level.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx


@dataclass(frozen=True)
class Bits:
    """A +-1 tensor traced back to what is compared with zero.

    Attributes
    ----------
    source : ov.Output
        The tensor x with bit = (scale * x + offset compared with 0).
    scale, offset : np.ndarray
        float64[C].
    zero_is_one : bool
        Whether 0 becomes +1 (else -1).
    begin, end : tuple of int
        Padding of a Pad node on every axis.
    pad_value : float
        What that node pads with.
    name : str
        Of the node that made the sign.
    """

    source: object
    scale: np.ndarray
    offset: np.ndarray
    zero_is_one: bool
    begin: tuple[int, ...] = (0, 0, 0, 0)
    end: tuple[int, ...] = (0, 0, 0, 0)
    pad_value: float = 0.0
    name: str = ""


@dataclass
class State:
    """What the rewriting of one network collects.

    Attributes
    ----------
    buffers : list of np.ndarray
        Memory of the u1 constants, which OpenVINO does not own: it must outlive the network.
    quantised : dict
        The FakeQuantize made for a sign, by the name of that sign: several layers share it.
    images : dict
        Output of a rewritten dense layer as an image [1, N, height, width], by the name of the node that flattens it to [M, N].
    """

    buffers: list[np.ndarray] = field(default_factory=list)
    quantised: dict[str, object] = field(default_factory=dict)
    images: dict[str, object] = field(default_factory=dict)


class NotBinary(Exception):
    """This layer does not fit BinaryConvolution; the text says why."""


def read(model: onnx.ModelProto, shape: tuple[int, ...]):
    """Read an ONNX model for inputs of one shape and rewrite its binary layers.

    Parameters
    ----------
    model : onnx.ModelProto
        With one input.
    shape : tuple of int
        Of the input, batch included.

    Returns
    -------
    tuple of (ov.Model, int)
        The model and the number of layers rewritten.
    """
    import openvino

    network = openvino.Core().read_model(model.SerializeToString())
    network.reshape({network.inputs[0]: list(shape)})
    state = State()
    count = 0
    for node in network.get_ordered_ops():
        rewrite = {"Convolution": _rewrite_conv, "MatMul": _rewrite_matmul}.get(node.get_type_name())
        if rewrite is None:
            continue
        try:
            result = rewrite(node, state)
        except NotBinary:
            continue
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(result)
        count += 1
    network.validate_nodes_and_infer_types()
    network.packed_weights = state.buffers
    return network, count


def _rewrite_conv(node, state: State):
    """BinaryConvolution in place of a Convolution; returns its output."""
    from openvino import opset1

    weights = _constant(node.input_value(1))
    bits = _trace(node.input_value(0), weights.shape[1])
    alpha, signs = _levels(weights)
    attributes = node.get_attributes()
    if any((*bits.begin[:2], *bits.end[:2])):
        raise NotBinary("pads channels")
    if any((*bits.begin, *bits.end)) and any([*attributes["pads_begin"], *attributes["pads_end"]]):
        raise NotBinary("padded twice with different values")
    begin = np.add(attributes["pads_begin"], bits.begin[2:])
    end = np.add(attributes["pads_end"], bits.end[2:])
    quantised = _quantise(bits, state)
    filters = _u1(signs, state)
    strides, dilations = attributes["strides"], attributes["dilations"]
    result = opset1.binary_convolution(
        quantised, filters, list(strides), begin.tolist(), end.tolist(), list(dilations), "xnor-popcount", float(bits.pad_value)
    )
    return _scaled(result.output(0), alpha)


def _rewrite_matmul(node, state: State):
    """A 1x1 BinaryConvolution in place of a MatMul [M, K] x [K, N]; the rows become pixels of one image, its fastest form."""
    from openvino import opset1

    weights = _constant(node.input_value(1))
    if weights.ndim != 2 or node.get_attributes()["transpose_a"]:
        raise NotBinary("not a plain dense layer")
    if not node.get_attributes()["transpose_b"]:
        weights = weights.T
    units, width = weights.shape
    bits = _trace(node.input_value(0), width)
    alpha, signs = _levels(weights)
    rows = bits.source.get_shape()[0]
    image = state.images.get(bits.source.get_node().get_friendly_name())
    if image is None:
        height = max(d for d in range(1, int(rows**0.5) + 1) if rows % d == 0)
        pixels = opset1.reshape(bits.source, _i64([1, height, rows // height, width]), False)
        image = opset1.transpose(pixels, _i64([0, 3, 1, 2])).output(0)
    quantised = _quantise(replace(bits, source=image), state, per_channel=rows > 1)
    filters = _u1(signs[:, :, None, None], state)
    convolved = opset1.binary_convolution(quantised, filters, [1, 1], [0, 0], [0, 0], [1, 1], "xnor-popcount", 0.0)
    result = _scaled(convolved.output(0), alpha)
    flat = opset1.reshape(opset1.transpose(result, _i64([0, 2, 3, 1])), _i64([rows, units]), False)
    # A dense layer right behind this one takes the image as it is.
    state.images[flat.get_friendly_name()] = result
    return flat.output(0)


def _i64(values: list[int]):
    from openvino import opset1

    return opset1.constant(np.array(values, np.int64))


def _constant(output) -> np.ndarray:
    """Value of a constant, or `NotBinary`."""
    node = output.get_node()
    if node.get_type_name() != "Constant":
        raise NotBinary("operand is not constant")
    return node.data


def _levels(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split weights [filters, ...] into alpha float32[filters] and a bool array of signs, if every filter is +-alpha."""
    alpha = np.abs(weights).reshape(len(weights), -1).max(1)
    if not np.array_equal(np.abs(weights), np.broadcast_to(alpha.reshape(-1, *[1] * (weights.ndim - 1)), weights.shape)):
        raise NotBinary("weights have more than two levels")
    return alpha, weights > 0


def _trace(output, channels: int) -> Bits:
    """Follow a +-1 tensor up through Pad, Transpose, sign and per-channel affine nodes."""
    from openvino import opset1

    node = output.get_node()
    if node.get_type_name() == "Pad":
        begin, end = (tuple(_constant(node.input_value(i)).ravel().tolist()) for i in (1, 2))
        inner = _trace(node.input_value(0), channels)
        return replace(inner, begin=begin, end=end, pad_value=float(_constant(node.input_value(3)).ravel()[0]))
    if node.get_type_name() == "Transpose":
        # Networks from TensorFlow binarise and pad in NHWC between two transpositions, which cancel once they are neighbours.
        order = _constant(node.input_value(1)).tolist()
        inner = _trace(node.input_value(0), channels)
        source = opset1.transpose(inner.source, _i64(order)).output(0)
        return replace(inner, source=source, begin=tuple(inner.begin[i] for i in order), end=tuple(inner.end[i] for i in order))
    if node.get_type_name() == "Sign":
        source, zero_is_one = _sign_of_sign(node)
    elif node.get_type_name() == "Select":
        source, zero_is_one = _select(node), True
    else:
        raise NotBinary("activation is not +-1")
    scale, offset = np.ones(channels), np.zeros(channels)
    while True:
        step = _affine(source, channels)
        if step is None:
            return Bits(source, scale, offset, zero_is_one, name=node.get_friendly_name())
        # scale * (s x + o) + offset
        source, s, o = step
        scale, offset = scale * s, scale * o + offset


def _sign_of_sign(node) -> tuple[object, bool]:
    """Sign(Sign(x) + c) with 0 < c < 1 is the sign of x with 0 going to +1; else Sign(x)."""
    add = node.input_value(0).get_node()
    if add.get_type_name() == "Add":
        for inner, other in ((0, 1), (1, 0)):
            first, constant = (add.input_value(i).get_node() for i in (inner, other))
            if first.get_type_name() == "Sign" and constant.get_type_name() == "Constant" and 0 < float(constant.data.ravel()[0]) < 1:
                return first.input_value(0), True
    return node.input_value(0), False


def _select(node):
    """x of Select(x >= 0, 1, -1)."""
    condition = node.input_value(0).get_node()
    values = [_constant(node.input_value(i)).ravel().tolist() for i in (1, 2)]
    if condition.get_type_name() != "GreaterEqual" or values != [[1.0], [-1.0]] or _constant(condition.input_value(1)).any():
        raise NotBinary("unknown selection")
    return condition.input_value(0)


def _affine(output, channels: int):
    """(x, scale, offset) if ``output`` is scale * x + offset per channel and nothing else uses it; else None."""
    node = output.get_node()
    if len(output.get_target_inputs()) != 1 and node.get_type_name() != "Multiply":
        return None
    if node.get_type_name() == "BatchNormInference":
        order = {"data": 0, "gamma": 1, "beta": 2, "mean": 3, "var": 4}
        gamma, beta, mean, var = (np.asarray(_constant(node.input_value(order[k])), np.float64) for k in ("gamma", "beta", "mean", "var"))
        scale = gamma / np.sqrt(var + node.get_attributes()["epsilon"])
        return node.input_value(0), scale, beta - mean * scale
    if node.get_type_name() not in ("Add", "Multiply"):
        return None
    for data, other in ((0, 1), (1, 0)):
        constant = node.input_value(other).get_node()
        if constant.get_type_name() == "Constant" and node.input_value(data).get_shape() == output.get_shape():
            value = constant.data
            if value.size not in (1, channels) or (value.size == channels and value.ndim > 1 and value.shape[1] != channels):
                return None
            value = np.broadcast_to(value.ravel().astype(np.float64), (channels,))
            zero, one = np.zeros(channels), np.ones(channels)
            return (node.input_value(data), one, value) if node.get_type_name() == "Add" else (node.input_value(data), value, zero)
    return None


def _quantise(bits: Bits, state: State, per_channel: bool = False):
    """FakeQuantize of an image [N, C, H, W] with two levels, 0 and 1, and a threshold per channel.

    It gives the upper output where x > threshold. ``scale * x + offset >= 0`` is x >= t with t = -offset / scale for a positive scale,
    x <= t for a negative one. A single threshold is written as a scalar, unless ``per_channel``: OpenVINO moves a scalar FakeQuantize
    across reshapes, and its binary form then fails because it needs an image.
    """
    from openvino import opset1

    if bits.name in state.quantised:
        return state.quantised[bits.name]
    if not bits.scale.all():
        raise NotBinary("a channel that is constant")
    threshold = (-bits.offset / bits.scale).astype(np.float32)
    positive = bits.scale > 0
    below = np.nextafter(threshold, np.float32(-np.inf))
    threshold = np.where(positive == bits.zero_is_one, below, threshold)
    shape = [1, -1, 1, 1]
    if not per_channel and np.all(threshold == threshold[0]) and np.all(positive):
        threshold, positive = threshold[:1], positive[:1]

    def constant(values):
        return opset1.constant(np.asarray(values, np.float32).reshape(shape))

    # The plug-in fuses a FakeQuantize into the convolution before it only if each of the four constants has no other user.
    node = opset1.fake_quantize(bits.source, constant(threshold), constant(threshold), constant(~positive), constant(positive), 2)
    state.quantised[bits.name] = node.output(0)
    return state.quantised[bits.name]


def _u1(signs: np.ndarray, state: State):
    """A u1 constant of bool ``signs``; its buffer goes into the state."""
    import openvino

    packed = np.packbits(signs.reshape(-1), bitorder="little")
    state.buffers.append(packed)
    return openvino.op.Constant(openvino.Tensor(packed, openvino.Shape(list(signs.shape)), openvino.Type.u1))


def _scaled(output, alpha: np.ndarray):
    """Multiply by alpha per channel, unless it is 1."""
    from openvino import opset1

    if np.all(alpha == 1):
        return output
    return opset1.multiply(output, opset1.constant(alpha.reshape(1, -1, 1, 1).astype(np.float32))).output(0)


def compile_model(model: onnx.ModelProto, shape: tuple[int, ...], threads: int = 1):
    """Rewrite and compile for the CPU in float32 (newer processors would otherwise be given bfloat16).

    Parameters
    ----------
    model : onnx.ModelProto
        With one input.
    shape : tuple of int
        Of the input.
    threads : int
        Inference threads of the one stream.

    Returns
    -------
    ov.CompiledModel
        With the rewritten network as ``.source_network`` (it owns the packed weights).
    """
    import openvino

    network, count = read(model, shape)
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False}
    compiled = openvino.Core().compile_model(network, "CPU", options)
    compiled.source_network, compiled.binary_layers = network, count
    return compiled
