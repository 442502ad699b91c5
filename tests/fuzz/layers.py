"""Convolutions and dense layers, with weights of every kind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.fuzz.graphs import MAX_ELEMENTS, Tensor, layer
from tests.fuzz.quantisers import quantise


def _signs(g, shape):
    return np.where(g.rng.random(shape) < 0.5, np.float32(-1), np.float32(1))


def draw_weights(g, shape):
    """Weights [O, ...], largest magnitude, grain, and whether they are two-level."""
    signs = _signs(g, shape)
    per_filter = (shape[0], *[1] * (len(shape) - 1))
    kind = g.pick(*["one"] * 9, *["alpha"] * 5, "dead", "dead", "input", "ternary", "flip", "real", "scalar", "pair")
    if kind == "alpha":
        return signs * 2.0 ** g.rng.integers(-2, 3, per_filter).astype(np.float32), 4.0, -2, True
    if kind == "dead":
        return signs * g.rng.integers(0, 2, per_filter).astype(np.float32), 1.0, 0, True
    if kind == "scalar":
        return signs * np.float32(0.25), 0.25, -2, True
    if kind == "input" and shape[1] > 1:
        alpha = 2.0 ** (np.arange(shape[1]) % 2).reshape(1, -1, *[1] * (len(shape) - 2))
        return (signs * alpha).astype(np.float32), 2.0, 0, False
    if kind == "ternary" and signs.size > 2:
        mask = g.rng.random(shape) < 0.8
        mask.reshape(-1)[:2] = True, False
        return np.where(mask, signs, np.float32(0)), 1.0, 0, False
    if kind == "flip" and signs[0].size > 1:
        signs.reshape(-1)[0] *= np.float32(1.5)
        return signs, 1.5, -1, False
    if kind == "real":
        return (g.rng.integers(-3, 4, shape)).astype(np.float32), 3.0, 0, False
    if kind == "pair":
        return np.where(signs > 0, np.float32(0.5), np.float32(-0.25)), 0.5, -2, False
    return signs, 1.0, 0, True


def _low_bit(levels):
    """Whether a tensor with these levels has to be packed."""
    if levels is None or levels == {0.0}:
        return False
    largest = max(abs(v) for v in levels)
    return levels <= {-largest, 0.0, largest}


def product(g, x, name, shape, weights, count):
    """The result of a layer with ``count`` terms in each sum."""
    _, largest, grain, two_level = weights
    if two_level and _low_bit(x.levels):
        g.binary.add(name)
    return Tensor(name, shape, x.bound * largest * count, x.grain + grain)


def _biased(g, x, bias):
    return replace(x, bound=x.bound + float(np.abs(bias).max()), grain=min(x.grain, -1))


def out_length(size, kernel, stride, begin, end, dilation):
    return (size + begin + end - dilation * (kernel - 1) - 1) // stride + 1


def draw_window(g, x, largest=4):
    """Kernel, strides, pads, dilations that fit ``x``, and the output size; None if none was found."""
    spatial = x.rank - 2
    if spatial < 1:
        return None
    kernel = [int(g.rng.integers(1, largest)) for _ in range(spatial)]
    strides = [int(g.rng.integers(1, 3)) for _ in range(spatial)]
    dilations = [int(g.rng.integers(1, 3)) if g.chance(0.2) else 1 for _ in range(spatial)]
    pads = [0] * 2 * spatial
    if g.chance(0.6):
        pads = [int(g.rng.integers(0, kernel[i % spatial])) for i in range(2 * spatial)] if g.chance(0.4) else [k // 2 for k in kernel] * 2
    out = [out_length(*args) for args in zip(x.shape[2:], kernel, strides, pads[:spatial], pads[spatial:], dilations)]
    return (kernel, strides, pads, dilations, out) if min(out) > 0 else None


@layer(5)
def convolution(g, x):
    window = draw_window(g, x)
    if window is None:
        return None
    kernel, strides, pads, dilations, out = window
    divisors = [d for d in range(1, x.channels + 1) if x.channels % d == 0]
    groups = g.pick(*divisors) if g.chance(0.25) else 1
    outputs = groups * int(g.rng.integers(1, max(2, (72 if g.chance(0.9) else 300) // groups)))
    if outputs * int(np.prod(out)) > MAX_ELEMENTS:
        return None
    weights = draw_weights(g, (outputs, x.channels // groups, *kernel))
    attributes = dict(kernel_shape=kernel, strides=strides, dilations=dilations, group=groups)
    if g.chance(0.1) and max(dilations) == 1:
        attributes["auto_pad"] = g.pick("SAME_UPPER", "SAME_LOWER")
        out = [-(-s // t) for s, t in zip(x.shape[2:], strides)]
    else:
        attributes["pads"] = pads
    inputs, bias = [x, weights[0]], None
    if g.chance(0.3):
        bias = (g.rng.integers(-8, 9, outputs) / 2).astype(np.float32) * g.pick(0, 1, 1)
        inputs.append(bias)
    name = g.op("Conv", inputs, **attributes)
    made = product(g, x, name, (x.shape[0], outputs, *out), weights, x.channels // groups * int(np.prod(kernel)))
    return made if bias is None else _biased(g, made, bias)


@layer(20)
def binary_convolution(g, x):
    """A quantiser and a convolution, so that deep nets have many layers on bits."""
    return convolution(g, quantise(g, x))


@layer(2)
def depthwise(g, x):
    if x.rank != 4 or min(x.shape[2:]) < 2:
        return None
    x = quantise(g, x) if g.chance(0.7) else x
    weights = draw_weights(g, (x.channels, 1, 2, 2))
    name = g.op("Conv", [x, weights[0]], kernel_shape=[2, 2], group=x.channels, pads=[1, 0, 0, 1])
    return product(g, x, name, x.shape, weights, 4)


@layer(5)
def dense(g, x):
    if x.rank != 2:
        return None
    outputs = int(g.rng.integers(1, 70))
    x = quantise(g, x) if g.chance(0.7) else x
    weights = draw_weights(g, (outputs, x.channels))
    kind, shape = g.pick("MatMul", "Gemm", "Gemm", "scaled"), (x.shape[0], outputs)
    if kind == "MatMul":
        return product(g, x, g.op("MatMul", [x, np.ascontiguousarray(weights[0].T)]), shape, weights, x.channels)
    transposed = int(g.chance(0.5))
    weight = weights[0] if transposed else np.ascontiguousarray(weights[0].T)
    if kind == "Gemm" and g.chance(0.5):
        return product(g, x, g.op("Gemm", [x, weight], transB=transposed), shape, weights, x.channels)
    bias = (g.rng.integers(-8, 9, outputs) / 2).astype(np.float32)
    alpha, beta = (0.5, 2.0) if kind == "scaled" else (1.0, 1.0)
    name = g.op("Gemm", [x, weight, bias], transB=transposed, alpha=alpha, beta=beta)
    made = product(g, x, name, shape, weights, x.channels)
    return _biased(g, replace(made, grain=made.grain - 1), 2 * bias)


@layer(2)
def transposed_convolution(g, x):
    if x.rank != 4 or x.channels * int(np.prod(x.shape[2:])) > MAX_ELEMENTS // 4:
        return None
    x = quantise(g, x) if g.chance(0.5) else x
    strides, kernel, dilations = ([g.pick(1, 2, 3) for _ in range(2)] for _ in range(3))
    pads, extra = [int(g.rng.integers(0, 2)) for _ in range(4)], [g.pick(0, s - 1) for s in strides]
    groups = 2 if x.channels % 2 == 0 and g.chance(0.3) else 1
    outputs = int(g.rng.integers(1, 9))
    out = [
        (size - 1) * s + d * (k - 1) + 1 + more - pads[i] - pads[2 + i]
        for i, (size, s, d, k, more) in enumerate(zip(x.shape[2:], strides, dilations, kernel, extra))
    ]
    if min(out) < 1 or x.shape[0] * outputs * groups * int(np.prod(out)) > MAX_ELEMENTS:
        return None
    geometry = dict(kernel_shape=kernel, strides=strides, dilations=dilations, pads=pads, output_padding=extra, group=groups)
    name = g.op("ConvTranspose", [x, _signs(g, (x.channels, outputs, *kernel))], **geometry)
    return Tensor(name, (x.shape[0], outputs * groups, *out), x.bound * x.channels * int(np.prod(kernel)), x.grain)


@layer(1)
def resize(g, x):
    """Twice as large, by repetition."""
    if x.rank != 4 or int(np.prod(x.shape[1:])) > MAX_ELEMENTS // 4:
        return None
    mode = dict(mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    out = g.op("Resize", [x, "", np.array([1, 1, 2, 2], np.float32)], **mode)
    return replace(x, name=out, shape=(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]))


@layer(2)
def head(g, x):
    """Global pooling, then a vector."""
    if x.rank != 4:
        return None
    count = int(np.prod(x.shape[2:]))
    if g.chance(0.5) or count & (count - 1):
        out = replace(x, name=g.op("GlobalMaxPool", [x]))
    else:
        out = Tensor(g.op("GlobalAveragePool", [x]), x.shape, x.bound, x.grain - (count.bit_length() - 1))
    return replace(out, name=g.op("Flatten", [out], axis=1), shape=x.shape[:2])


@layer(2)
def flatten(g, x):
    if x.rank == 2 or int(np.prod(x.shape[1:])) > 2048:
        return None
    size = int(np.prod(x.shape[1:]))
    out = g.op("Flatten", [x], axis=1) if g.chance(0.5) else g.op("Reshape", [x, np.array([g.pick(-1, 0), size], np.int64)])
    return replace(x, name=out, shape=(x.shape[0], size))


@layer(3)
def image(g, x):
    """A vector seen as an image."""
    if x.rank != 2 or x.channels % 4:
        return None
    shape = [x.channels // 4, 2, 2]
    return replace(x, name=g.op("Reshape", [x, np.array([-1, *shape], np.int64)]), shape=(x.shape[0], *shape))
