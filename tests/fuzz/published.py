"""Layers of papers: XNOR-Net's spatial scale, weights quantised by programs in the graph, strided, grouped, depthwise, transposed ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import TensorProto

from tests.fuzz.families import (
    FAMILY_QUANTISERS,
    SURE_PAIRS,
    activation_planes,
    expect,
    few_levels,
)
from tests.fuzz.graphs import MAX_ELEMENTS, QONNX, Tensor, layer
from tests.fuzz.layers import draw_weights, draw_window, product
from tests.fuzz.quantisers import larq, plain_sign, quantise, selected


def any_quantiser(g, x):
    """A quantiser of whatever kind; None where the drawn one does not suit ``x``."""
    return g.pick(*FAMILY_QUANTISERS)(g, x) if g.chance(0.6) else quantise(g, x)


# ---- weights that the graph computes


def _casted(g, kind, latent, threshold):
    return g.op("Cast", [g.op(kind, [latent, g.f(threshold)])], to=TensorProto.FLOAT)


def two_levels(g, weights, low, high):
    """A program over latent weights whose result is ``weights``, which holds ``low`` and ``high``."""
    latent = np.where(weights == high, 1, -1).astype(np.float32) * g.rng.uniform(0.1, 1, weights.shape).astype(np.float32)
    if low == -high == -1 and g.chance(0.6):
        if g.chance(0.3):
            return g.op("Sign", [g.op("Add", [g.op("Sign", [latent]), g.f(0.1)])])
        return g.op("Sign", [g.op("Tanh", [latent])])
    return g.op("Where", [g.op(g.pick("GreaterOrEqual", "Greater"), [latent, g.f(0)]), g.f(high), g.f(low)])


def three_levels(g, weights):
    """TWN and TTQ: masks of latent weights above and below a threshold, times their scales."""
    low, high = float(weights.min()), float(weights.max())
    latent = (np.sign(weights) * g.rng.uniform(0.6, 1, weights.shape)).astype(np.float32)
    latent += np.where(weights == 0, g.rng.uniform(-0.4, 0.4, weights.shape), 0).astype(np.float32)
    above, below = _casted(g, "Greater", latent, 0.5), _casted(g, "Less", latent, -0.5)
    if low == -high:
        sign = g.op("Sub", [above, below])
        if g.chance(0.3):
            sign = g.op("Mul", [g.op("Sign", [latent]), _casted(g, "Greater", g.op("Abs", [latent]), 0.5)])
        return g.op("Mul", [sign, g.f(high)])
    return g.op("Add", [g.op("Mul", [above, g.f(high)]), g.op("Mul", [below, g.f(low)])])


def grid(g, weights, step):
    """Round(Clip(w / s)) * s, QONNX's Quant, or QuantizeLinear, Clip, DequantizeLinear in the graph."""
    noise = g.rng.uniform(-0.4, 0.4, weights.shape)
    latent, s = (weights + noise * step).astype(np.float32), g.f(step)
    low, high = (int(v / step) for v in (weights.min(), weights.max()))
    low, high = min(low, 0), max(high, 0)
    kind = g.pick("clip", "qcdq", "quant")
    if kind == "qcdq" and low >= -128 and high < 128:
        zero = np.array(0, np.int8)
        q = g.op("QuantizeLinear", [latent, s, zero])
        q = g.op("Clip", [q, np.array(low, np.int8), np.array(high, np.int8)])
        return g.op("DequantizeLinear", [q, s, zero])
    bits = max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0) + (low < 0)
    if kind == "quant" and bits > 1:
        signed = low < 0
        least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        form = dict(domain=QONNX, signed=int(signed), narrow=0, rounding_mode="ROUND")

        def meaning():
            return g.op("Mul", [g.op("Round", [g.op("Clip", [g.op("Div", [latent, s]), g.f(least), g.f(most)])]), s])

        return g.either(lambda: g.op("Quant", [latent, s, g.f(0), g.f(bits)], **form), meaning)
    return g.op("Mul", [g.op("Round", [g.op("Clip", [g.op("Div", [latent, s]), g.f(low), g.f(high)])]), s])


def two_bit_codes(g, weights):
    """Four ternary weights in a byte, shifted and masked out in the graph (transformers' BitNet)."""
    codes = (weights.astype(int) + 1).reshape(4, -1)
    packed = sum(codes[i] << (2 * i) for i in range(4)).astype(np.uint8)
    parts = []
    for i in range(4):
        bits = g.op("BitShift", [packed, np.array(2 * i, np.uint8)], direction="RIGHT") if i else packed
        if g.opset >= 18:
            bits = g.op("BitwiseAnd", [bits, np.array(3, np.uint8)])
        else:
            bits = g.op("Mod", [bits, np.array(4, np.uint8)])
        parts.append(g.op("Sub", [g.op("Cast", [bits], to=TensorProto.FLOAT), g.f(1)]))
    return g.op("Reshape", [g.op("Concat", parts, axis=0), np.array(weights.shape, np.int64)])


def program(g, weights):
    """Weights (few levels, one set for the whole tensor) as a quantiser left them in the graph; sometimes just the array."""
    levels = np.unique(weights)
    if len(levels) == 2 and g.chance(0.5):
        return two_levels(g, weights, float(levels[0]), float(levels[1]))
    ternary = set(levels) <= {-1.0, 0.0, 1.0}
    if ternary and weights.size % 4 == 0 and g.chance(0.3):
        return two_bit_codes(g, weights)
    if len(levels) == 3 and levels[0] < 0 == levels[1] and g.chance(0.5):
        return three_levels(g, weights)
    if 1 < len(levels) <= 16 and np.all(weights * 4 == np.rint(weights * 4)) and g.chance(0.6):
        step = next(s for s in (1.0, 0.5, 0.25) if np.all(weights % s == 0))
        if np.abs(levels).max() / step < 32:
            return grid(g, weights, step)
    return weights


# ---- layers


@layer(10)
def low_bit_convolution(g, x):
    """A convolution of any stride, dilation, padding and grouping, depthwise ones too, on weights of few levels."""
    window = draw_window(g, x)
    if window is None:
        return None
    x = any_quantiser(g, x) if g.chance(0.85) else x
    if x is None:
        return None
    kernel, strides, pads, dilations, out = window
    divisors = [d for d in range(1, x.channels + 1) if x.channels % d == 0]
    groups = g.pick(1, 1, g.pick(*divisors), x.channels)
    outputs = groups * int(g.rng.integers(1, max(2, 48 // groups)))
    if outputs * int(np.prod(out)) > MAX_ELEMENTS:
        return None
    weights, largest, grain, planes = few_levels(g, (outputs, x.channels // groups, *kernel))
    count = x.channels // groups * int(np.prod(kernel))
    inputs, bias = [x, program(g, weights)], 0
    if g.chance(0.25):
        bias = 4
        inputs.append((g.rng.integers(-8, 9, outputs) / 2).astype(np.float32))
    name = g.op("Conv", inputs, kernel_shape=kernel, strides=strides, pads=pads, dilations=dilations, group=groups)
    expect(g, x, name, planes)
    return Tensor(name, (x.shape[0], outputs, *out), x.bound * largest * count + bias, min(x.grain + grain, -1))


@layer(2)
def low_bit_transposed(g, x):
    """A transposed convolution on weights of few levels."""
    if x.rank != 4 or x.channels * int(np.prod(x.shape[2:])) > MAX_ELEMENTS // 4:
        return None
    x = any_quantiser(g, x)
    if x is None:
        return None
    strides, kernel = [g.pick(1, 2) for _ in range(2)], [g.pick(1, 2, 3) for _ in range(2)]
    groups, outputs = g.pick(*(d for d in (1, 2, x.channels) if x.channels % d == 0)), int(g.rng.integers(1, 9))
    out = [(size - 1) * s + k for size, s, k in zip(x.shape[2:], strides, kernel)]
    if x.shape[0] * outputs * groups * int(np.prod(out)) > MAX_ELEMENTS:
        return None
    weights, largest, grain, _ = few_levels(g, (x.channels, outputs, *kernel))
    name = g.op("ConvTranspose", [x, program(g, weights)], kernel_shape=kernel, strides=strides, group=groups)
    bound = x.bound * largest * x.channels * int(np.prod(kernel))
    return Tensor(name, (x.shape[0], outputs * groups, *out), bound, x.grain + grain)


@layer(2)
def spatial_scale(g, x):
    """XNOR-Net (Rastegari et al. 2016, section 3.2): sign convolution times K, the box-filtered mean magnitude of the input."""
    if x.rank != 4 or x.channels & (x.channels - 1) or min(x.shape[2:]) < 2:
        return None
    outputs = int(g.rng.integers(1, 40))
    mean = g.op("ReduceMean", [g.op("Abs", [x])], axes=[1], keepdims=1)
    pads = [0, 0, 0, 0] if g.chance(0.5) else [1, 1, 0, 0]
    out = [s + pads[i] - 1 for i, s in enumerate(x.shape[2:])]
    factor = g.op("Conv", [mean, np.full((1, 1, 2, 2), 0.25, np.float32)], kernel_shape=[2, 2], pads=pads)
    q = g.pick(plain_sign, larq, selected)(g, x)
    weights = draw_weights(g, (outputs, x.channels, 2, 2))
    name = g.op("Conv", [q, weights[0]], kernel_shape=[2, 2], pads=pads)
    made = product(g, q, name, (x.shape[0], outputs, *out), weights, x.channels * 4)
    grain = made.grain + x.grain - 2 - (x.channels.bit_length() - 1)
    return replace(made, name=g.op("Mul", [name, factor]), bound=made.bound * x.bound, grain=grain)


@layer(2)
def siblings(g, x):
    """ReActNet (Liu et al. 2020): layers of the same signs, each with numbers of its own and the residual, side by side."""
    if x.rank != 4 or 64 * int(np.prod(x.shape[2:])) > MAX_ELEMENTS:
        return None
    weights = draw_weights(g, (32, x.channels, 1, 1))
    x = product(g, x, g.op("Conv", [x, weights[0]]), (x.shape[0], 32, *x.shape[2:]), weights, x.channels)
    q, parts = g.pick(plain_sign, larq, selected)(g, x), []
    size, functions, alike = g.pick(1, 3), g.pick([], ["Mul"], ["Mul", "Add"], ["Add", "Relu"]), g.chance(0.8)
    for number in range(g.pick(2, 2, 3)):
        weights = draw_weights(g, (32, 32, size, size))
        name = g.op("Conv", [q, weights[0]], pads=[size // 2] * 4)
        y = product(g, q, name, x.shape, weights, 32 * size * size)
        for kind in functions[number if number and not alike else 0 :]:
            numbers = g.rng.choice([-2.0, 0.5, 1.0, 2.0], (32, 1, 1)).astype(np.float32)
            made = g.op(kind, [y] if kind == "Relu" else [y, numbers])
            y = replace(y, name=made, bound=2 * y.bound + 2, grain=y.grain - 1)
        parts.append(replace(y, name=g.op("Add", [y, x]), bound=y.bound + x.bound, grain=min(y.grain, x.grain)))
    name = g.op("Concat", parts, axis=1)
    return Tensor(name, (x.shape[0], 32 * len(parts), *x.shape[2:]), max(y.bound for y in parts), min(y.grain for y in parts))


@layer(2)
def heads(g, x):
    """Scores of two binary views, compared with a threshold, times a third one: attention all in bits (BiT, BiBERT)."""
    if x.rank != 4 or x.channels % 4 or x.channels > 64 or int(np.prod(x.shape[2:])) not in range(2, 65):
        return None
    n, c, length = x.shape[0], x.channels, int(np.prod(x.shape[2:]))
    count = g.pick(1, 2, 4)
    folded = replace(
        x, name=g.op("Reshape", [x, np.array([-1, count, c // count, length], np.int64)]), shape=(n, count, c // count, length)
    )
    signs = lambda t: g.pick(larq, selected, plain_sign)(g, t)  # noqa: E731
    q, k, v = signs(folded), signs(folded), signs(folded)
    rows = replace(q, name=g.op("Transpose", [q], perm=[0, 1, 3, 2]))
    scores = g.op("MatMul", [rows, k])
    chosen = g.op("Cast", [g.op(g.pick("Greater", "GreaterOrEqual"), [scores, g.f(g.pick(0, 1, -1))])], to=TensorProto.FLOAT)
    turned = g.op("Transpose", [v], perm=[0, 1, 3, 2])
    name = g.op("MatMul", [chosen, turned])
    if activation_planes(q.levels) * activation_planes(k.levels) <= SURE_PAIRS:
        g.low.add(scores)
    if activation_planes(v.levels) <= SURE_PAIRS:
        g.low.add(name)
    back = g.op("Reshape", [g.op("Transpose", [name], perm=[0, 1, 3, 2]), np.array([-1, *x.shape[1:]], np.int64)])
    return Tensor(back, x.shape, v.bound * length, v.grain)


@layer(2)
def token_dense(g, x):
    """Every pixel a token: a product of a rank-3 tensor with a matrix of few levels, as linear layers of transformers and mixers are."""
    if x.rank != 4 or int(np.prod(x.shape[2:])) > 64:
        return None
    length = int(np.prod(x.shape[2:]))
    turned = g.op("Transpose", [g.op("Reshape", [x, np.array([-1, x.channels, length], np.int64)])], perm=[0, 2, 1])
    rows = replace(x, name=turned, shape=(x.shape[0], length, x.channels))
    q = any_quantiser(g, rows) if g.chance(0.85) else rows
    if q is None:
        return None
    weights, largest, grain, planes = few_levels(g, (x.channels, x.channels))
    name = g.op("MatMul", [q, program(g, np.ascontiguousarray(weights.T))])
    expect(g, q, name, planes)
    back = g.op("Reshape", [g.op("Transpose", [name], perm=[0, 2, 1]), np.array([-1, *x.shape[1:]], np.int64)])
    return Tensor(back, x.shape, q.bound * largest * x.channels, q.grain + grain)
