"""FINN's and QONNX's transformed graphs: thresholds, matches instead of products, windows as rows, channels last."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from onnx import TensorProto

from tests.fuzz.graphs import MAX_ELEMENTS, QONNX, Tensor, layer
from tests.fuzz.layers import draw_weights, draw_window, product
from tests.fuzz.quantisers import larq, plain_sign, quantise

LAST = "qonnx.custom_op.channels_last"


def _turn(g, name, rank):
    return g.op("Transpose", [name], perm=[0, *range(2, rank), 1])


def _turn_back(g, name, rank):
    return g.op("Transpose", [name], perm=[0, rank - 1, *range(1, rank - 1)])


def thresholds_of(g, x, name, axis, count, scale, bias, layout):
    """MultiThreshold on the values ``name``, whose channels are on ``axis``."""
    rows = x.channels if g.chance(0.7) else 1
    table = np.sort(g.rng.integers(-8, 9, (rows, count)) / 2, 1).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(x.rank)]

    def meaning():
        total = None
        for column in table.T:
            reached = g.op("Cast", [g.op("GreaterOrEqual", [name, column.reshape(shape)])], to=TensorProto.FLOAT)
            total = reached if total is None else g.op("Add", [total, reached])
        return g.op("Add", [g.op("Mul", [total, g.f(scale)]), g.f(bias)])

    attributes = dict(out_scale=float(scale), out_bias=float(bias), out_dtype="INT4", **({"data_layout": layout} if layout else {}))
    return g.either(lambda: g.op("MultiThreshold", [name, table], domain=QONNX, **attributes), meaning)


@layer(5)
def multi_threshold(g, x):
    """How many thresholds a value reaches: bipolar, or codes of 1 to 3 bits."""
    count = g.pick(1, 1, 1, 2, 3, 7)
    scale, bias = g.pick((2, -1), (1, 0)) if count == 1 else g.pick((1, 0), (0.5, 0), (1, -1))
    levels = frozenset(scale * k + bias + 0.0 for k in range(count + 1))
    made = replace(x, bound=max(map(abs, levels)), grain=int(math.log2(min(scale, 1))), levels=levels)
    if x.rank == 4 and g.chance(0.5):
        name = thresholds_of(g, x, _turn(g, x, 4), 3, count, scale, bias, "NHWC")
        return replace(made, name=_turn_back(g, name, 4))
    return replace(made, name=thresholds_of(g, x, x.name, 1, count, scale, bias, {2: "NC", 4: "NCHW"}.get(x.rank)))


def _bits(g, x, name, axis, layout):
    return thresholds_of(g, x, name, axis, 1, 1, 0, layout)


@layer(4)
def matches(g, x):
    """A streamlined layer: {0, 1} by {0, 1}, equal bits counted; convolutions as rows of windows."""
    outputs = int(g.rng.integers(1, 40))
    if x.rank == 2:
        a, bits = _bits(g, x, x.name, 1, "NC"), g.rng.integers(0, 2, (x.channels, outputs)).astype(np.float32)

        def meaning():
            dot = g.op("MatMul", [g.op("Sub", [g.op("Mul", [a, g.f(2)]), g.f(1)]), 2 * bits - 1])
            return g.op("Mul", [g.op("Add", [dot, g.f(x.channels)]), g.f(0.5)])

        name = g.either(lambda: g.op("XnorPopcountMatMul", [a, bits], domain=QONNX), meaning)
        g.binary.add(name)
        return Tensor(name, (x.shape[0], outputs), float(x.channels), 0)
    if x.rank != 4:
        return None
    kernel, stride, pad = g.pick((1, 1, 0), (2, 1, 0), (3, 1, 1), (3, 2, 1), (2, 2, 0))
    out = [(s + 2 * pad - kernel) // stride + 1 for s in x.shape[2:]]
    if min(out) < 1 or outputs * int(np.prod(out)) > MAX_ELEMENTS:
        return None
    xnor, count = g.chance(0.5), x.channels * kernel * kernel
    a = _bits(g, x, _turn(g, x, 4), 3, "NHWC")
    bits = g.rng.integers(0, 2, (outputs, x.channels, kernel, kernel)).astype(np.float32)
    if not xnor:
        bits = 2 * bits - 1
    form = dict(
        kernel_size=[kernel] * 2, stride=[stride] * 2, pad_amount=[pad] * 4, input_shape=f"(1,{x.shape[2]},{x.shape[3]},{x.channels})"
    )

    def spelled():
        rows = g.op("Im2Col", [a], domain=QONNX, **form)
        weight = np.ascontiguousarray(bits.transpose(2, 3, 1, 0).reshape(count, outputs))
        return g.op("XnorPopcountMatMul", [rows, weight], domain=QONNX) if xnor else g.op("MatMul", [rows, weight])

    def meaning():
        image = _turn_back(g, a, 4)
        if not xnor:
            return _turn(g, g.op("Conv", [image, bits], strides=[stride] * 2, pads=[pad] * 4), 4)
        image = g.op("Pad", [image, np.array([0, 0, pad, pad] * 2, np.int64), g.f(0)])
        dot = g.op("Conv", [g.op("Sub", [g.op("Mul", [image, g.f(2)]), g.f(1)]), 2 * bits - 1], strides=[stride] * 2)
        return _turn(g, g.op("Mul", [g.op("Add", [dot, g.f(count)]), g.f(0.5)]), 4)

    name = g.either(spelled, meaning)
    g.binary.add(name)
    made = Tensor(name, (x.shape[0], *out, outputs), float(count), 0)
    if min(out) > 1 and g.chance(0.3):
        made = pooled_last(g, made)
    n, h, w, c = made.shape
    return replace(made, name=_turn_back(g, made, 4), shape=(n, c, h, w))


def pooled_last(g, x):
    """MaxPoolNHWC of ``x`` [N, H, W, C]."""
    form = dict(kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 0, 0])
    domain = g.pick((QONNX, "MaxPoolNHWC"), (LAST, "MaxPool"))
    name = g.either(
        lambda: g.op(domain[1], [x], domain=domain[0], **form),
        lambda: _turn(g, g.op("MaxPool", [_turn_back(g, x, 4)], **form), 4),
    )
    n, h, w, c = x.shape
    return replace(x, name=name, shape=(n, h // 2, w // 2, c))


@layer(3)
def channels_last(g, x):
    """A convolution (NHWC, weights OHWI) and a normalisation of qonnx's channels-last domain."""
    window = draw_window(g, x) if x.rank == 4 else None
    if window is None:
        return None
    kernel, strides, pads, dilations, out = window
    x = g.pick(larq, plain_sign, quantise)(g, x)
    outputs = int(g.rng.integers(1, 40))
    if outputs * int(np.prod(out)) > MAX_ELEMENTS:
        return None
    weights = draw_weights(g, (outputs, x.channels, *kernel))
    form = dict(kernel_shape=kernel, strides=strides, pads=pads, dilations=dilations, group=1)
    there = _turn(g, x, 4)
    last = np.ascontiguousarray(weights[0].transpose(0, 2, 3, 1))
    name = g.either(
        lambda: g.op("Conv", [there, last], domain=LAST, **form),
        lambda: _turn(g, g.op("Conv", [_turn_back(g, there, 4), weights[0]], **form), 4),
    )
    made = product(g, x, name, (x.shape[0], outputs, *out), weights, x.channels * int(np.prod(kernel)))
    if g.chance(0.5):
        eps, name = 2.0**-6, made.name
        gamma, beta = 2.0 ** g.rng.integers(-1, 2, outputs) * g.rng.choice([-1, 1], outputs), g.rng.integers(-4, 5, outputs) / 2
        values = [v.astype(np.float32) for v in (gamma, beta, g.rng.integers(-6, 7, outputs) / 2, np.full(outputs, 1 - eps))]
        name = g.either(
            lambda: g.op("BatchNormalization", [name, *values], domain=LAST, epsilon=eps),
            lambda: _turn(g, g.op("BatchNormalization", [_turn_back(g, made, 4), *values], epsilon=eps), 4),
        )
        made = replace(made, name=name, bound=(made.bound + 3) * 2 + 2, grain=min(made.grain, -1) - 1)
    return replace(made, name=_turn_back(g, made, 4))
