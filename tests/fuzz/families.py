"""The families of low-bit networks: their quantisers, weights and layers, in numbers that are exact.

Scales are powers of two, as far as they are not powers of two in the paper: DoReFa's k / 3 is no dyadic number, so its codes are used.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from onnx import TensorProto

from tests.fuzz.graphs import MAX_ELEMENTS, QONNX, Tensor, layer

#: More pairs of planes than this may stay float.
SURE_PAIRS = 9


def _grid(x, name, low, high, step):
    """A tensor whose values are the multiples of ``step`` from ``low`` to ``high``."""
    levels = frozenset(float(v) * step + 0.0 for v in range(low, high + 1))
    return Tensor(name, x.shape, max(abs(low), abs(high)) * step, int(math.log2(step)), levels)


def _scale(g):
    return 2.0 ** int(g.rng.integers(-2, 2))


def clip(g, x, low, high):
    """min(max(x, low), high), in one of its forms."""
    kind = g.pick("Clip", "MinMax", "MaxMin")
    if kind == "Clip":
        return g.op("Clip", [x, g.f(low), g.f(high)])
    if kind == "MinMax":
        return g.op("Max", [g.op("Min", [x, g.f(high)]), g.f(low)])
    return g.op("Min", [g.op("Max", [x, g.f(low)]), g.f(high)])


def lsq(g, x):
    """Learned step size (Esser et al. 2020): round(clip(x / s, -n, p)) * s, with the residue of its gradient now and then."""
    bits, signed, s = int(g.rng.integers(2, 5)), g.chance(0.5), _scale(g)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    v = clip(g, g.op("Div", [x, g.f(s)]), low, high)
    q = g.op("Round", [v])
    if g.chance(0.4):
        q = g.op("Add", [g.op("Sub", [q, v]), v])
    return _grid(x, g.op("Mul", [q, g.f(s)]), low, high, s)


def pact(g, x):
    """0.5 * (|x| - |x - a| + a), then k bits (Choi et al. 2018)."""
    bits, step = int(g.rng.integers(1, 4)), _scale(g)
    top = 2**bits - 1
    alpha = g.f(top * step)
    if x.bound > 2.0**9:
        return None
    y = g.op("Sub", [g.op("Abs", [x]), g.op("Abs", [g.op("Sub", [x, alpha])])])
    y = g.op("Mul", [g.op("Add", [y, alpha]), g.f(0.5)])
    q = g.op("Mul", [g.op("Round", [g.op("Mul", [y, g.f(1 / step)])]), g.f(step)])
    return _grid(x, q, 0, top, step)


def dorefa(g, x):
    """Codes round(clip(x, 0, 1) * (2^k - 1)) (Zhou et al. 2016)."""
    top = 2 ** int(g.rng.integers(1, 4)) - 1
    return _grid(x, g.op("Round", [g.op("Mul", [clip(g, x, 0, 1), g.f(top)])]), 0, top, 1.0)


def power_of_two(g, x):
    """Levels 0, 1/4, 1/2, 1 of either sign or of one, chosen by thresholds (Miyashita et al. 2016)."""
    size, out = g.op("Abs", [x]), g.f(0)
    for level, threshold in ((0.25, 0.25), (0.5, 0.5), (1.0, 1.0)):
        out = g.op("Where", [g.op("GreaterOrEqual", [size, g.f(threshold)]), g.f(level), out])
    if g.chance(0.5):
        return Tensor(g.op("Mul", [g.op("Sign", [x]), out]), x.shape, 1.0, -2, frozenset({-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0}))
    return Tensor(out, x.shape, 1.0, -2, frozenset({0.0, 0.25, 0.5, 1.0}))


def integer_clip(g, x):
    """QuantizeLinear, Clip of integers, DequantizeLinear, as Brevitas exports 2 to 4 bits."""
    kind = g.pick(np.int8, np.uint8)
    bits, s = int(g.rng.integers(1, 5)), g.f(_scale(g))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind == np.int8 else (0, 2**bits - 1)
    q = g.op("QuantizeLinear", [x, s, np.array(0, kind)])
    q = g.op("Clip", [q, np.array(low, kind), np.array(high, kind)])
    return _grid(x, g.op("DequantizeLinear", [q, s, np.array(0, kind)]), low, high, float(s))


def int4(g, x):
    """QuantizeLinear to a type of four bits, where the opset has it."""
    if g.opset < 21:
        return integer_clip(g, x)
    kind, low, high = g.pick((TensorProto.INT4, -8, 7), (TensorProto.UINT4, 0, 15))
    zero, s = 0 if low else int(g.pick(0, 8)), g.f(_scale(g))
    point = g.small_const([zero], kind, ())
    q = g.op("QuantizeLinear", [x, s, point])
    return _grid(x, g.op("DequantizeLinear", [q, s, point]), low - zero, high - zero, float(s))


def qonnx_quant(g, x):
    """QONNX's Quant: the reference gets its definition."""
    bits, signed, s = int(g.rng.integers(2, 5)), g.chance(0.5), g.f(_scale(g))
    narrow = signed and g.chance(0.5)
    low, high = (-(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    form = dict(domain=QONNX, signed=int(signed), narrow=int(narrow), rounding_mode="ROUND")

    def meaning():
        return g.op("Mul", [g.op("Round", [g.op("Clip", [g.op("Div", [x, s]), g.f(low), g.f(high)])]), s])

    return _grid(x, g.either(lambda: g.op("Quant", [x, s, g.f(0), g.f(bits)], **form), meaning), low, high, float(s))


def bipolar_quant(g, x):
    s = g.f(_scale(g))
    meaning = lambda: g.op("Where", [g.op("GreaterOrEqual", [x, g.f(0)]), s, g.f(-s)])  # noqa: E731
    name = g.either(lambda: g.op("BipolarQuant", [x, s], domain=QONNX), meaning)
    return Tensor(name, x.shape, float(s), int(math.log2(s)), frozenset({-float(s), float(s)}))


def eight_bits(g, x):
    """An int8 grid: many levels; weights of few levels stay packed beside it."""
    q = g.op("Round", [g.op("Clip", [g.op("Mul", [x, g.f(8)]), g.f(-128), g.f(127)])])
    return Tensor(g.op("Mul", [q, g.f(0.125)]), x.shape, 16.0, -3)


FAMILY_QUANTISERS = (lsq, pact, dorefa, power_of_two, integer_clip, int4, qonnx_quant, bipolar_quant, eight_bits)


# ---- weights


def few_levels(g, shape):
    """Weights [O, ...] as (array, largest, grain, planes): ternary, TTQ, grids of 2 to 4 bits, nearly binary (0 planes: not low-bit)."""
    per_filter = (shape[0], *[1] * (len(shape) - 1))
    kind = g.pick("ternary", "ternary alpha", "ttq", "ttq", "grid", "grid", "unsigned", "nearly")
    alpha = 2.0 ** g.rng.integers(-1, 2, per_filter) if kind == "ternary alpha" else np.ones(per_filter)
    if kind.startswith("ternary"):
        return (g.rng.integers(-1, 2, shape) * alpha).astype(np.float32), 2.0, -1, 2
    if kind == "ttq":
        positive, negative = g.pick((1.5, -0.5), (0.5, -1.0), (2.0, -0.25))
        return g.rng.choice([negative, 0.0, positive], shape).astype(np.float32), 2.0, -2, 2
    if kind == "nearly":
        w = np.where(g.rng.random(shape) < 0.5, np.float32(-1), np.float32(1))
        w.reshape(-1)[0] *= np.float32(1 + 2.0**-9)
        return w, 2.0, -9, 0 if w[0].size > 1 else 1
    bits = int(g.rng.integers(2, 5))
    low = -(2 ** (bits - 1)) if kind == "grid" else 0
    return g.rng.integers(low, low + 2**bits, shape).astype(np.float32), 16.0, 0, bits


def as_written(g, weights):
    """Weights as an exporter leaves them: a constant, int8 or int4 with a scale, or a quantiser of latent weights in the graph."""
    kind = g.pick("constant", "constant", "int8", "int4", "sign")
    if kind == "sign" and np.all(np.abs(weights) == 1):
        return g.op("Sign", [(weights * g.rng.uniform(0.1, 1, weights.shape)).astype(np.float32)])
    quarters = weights * 4
    if kind == "int8" and np.all(quarters == np.rint(quarters)) and np.abs(quarters).max() < 128:
        return g.op("DequantizeLinear", [quarters.astype(np.int8), g.f(0.25), np.array(0, np.int8)])
    if kind == "int4" and g.opset >= 21 and np.all(weights == np.rint(weights)) and -8 <= weights.min() and weights.max() < 8:
        return g.op("DequantizeLinear", [g.small_const(weights.reshape(-1).astype(int).tolist(), TensorProto.INT4, weights.shape), g.f(1)])
    return weights


def activation_planes(levels):
    """Planes of a tensor that holds these levels, at most; 99 if it need not be taken apart."""
    largest = max(abs(v) for v in levels)
    if levels <= {-largest, 0.0, largest}:
        return 2 if 0.0 in levels and -largest in levels else 1
    step = min(b - a for a, b in zip(sorted(levels), sorted(levels)[1:]))
    if len(levels) > 16 or any(v % step for v in levels):
        return 99
    return int(max(levels) / step - min(min(levels), 0) / step).bit_length()


def expect(g, x, name, planes):
    """Note what must become of a layer with weights of that many planes on ``x``."""
    if not planes:
        return
    if x.levels is not None and x.levels != {0.0} and activation_planes(x.levels) * planes <= SURE_PAIRS:
        g.low.add(name)


@layer(12)
def family_layer(g, x):
    """A quantiser of one family and weights of one, convolved or multiplied."""
    q = g.pick(*FAMILY_QUANTISERS)(g, x) if g.chance(0.8) else x
    if q is None:
        return None
    outputs = int(g.rng.integers(1, 40))
    kernel = [int(g.rng.integers(1, 4)) for _ in x.shape[2:]]
    if any(k > s for k, s in zip(kernel, x.shape[2:])) or x.rank == 3 and g.chance(0.5):
        return None
    shape = (outputs, x.channels, *kernel)
    weights, largest, grain, planes = few_levels(g, shape)
    if x.rank == 2:
        written = as_written(g, np.ascontiguousarray(weights.T)) if g.chance(0.5) else np.ascontiguousarray(weights.T)
        name, out = g.op("MatMul", [q, written]), ()
    else:
        pads = [k // 2 for k in kernel] * 2 if g.chance(0.5) else [0] * (2 * len(kernel))
        out = [s + pads[i] * 2 - k + 1 for i, (s, k) in enumerate(zip(x.shape[2:], kernel))]
        if outputs * int(np.prod(out)) > MAX_ELEMENTS:
            return None
        name = g.op("Conv", [q, as_written(g, weights)], kernel_shape=kernel, pads=pads)
    expect(g, q, name, planes)
    count = x.channels * int(np.prod(kernel))
    return Tensor(name, (x.shape[0], outputs, *out), q.bound * largest * count, q.grain + grain)


@layer(3)
def abc_layer(g, x):
    """ABC-Net (Lin et al. 2017): N shifted signs of the activation times M weight bases, each with its scale."""
    if x.rank not in (2, 4):
        return None
    outputs, spatial, parts = int(g.rng.integers(1, 30)), x.rank - 2, []
    bases = [np.where(g.rng.random((outputs, x.channels, *[1] * spatial)) < 0.5, -1, 1).astype(np.float32) for _ in range(g.pick(1, 2, 3))]
    scales = [2.0 ** int(g.rng.integers(-2, 1)) for _ in bases]
    for shift in [float(v) / 2 for v in range(g.pick(1, 2, 3))]:
        bit = g.op("Greater", [g.op("Add", [x, g.f(shift)]), g.f(0.5)])
        q = g.op("Where", [bit, g.f(1), g.f(-1)])
        for base, scale in zip(bases, scales):
            name = g.op("Conv", [q, base]) if spatial else g.op("MatMul", [q, np.ascontiguousarray(base.T)])
            g.low.add(name)
            parts.append(g.op("Mul", [name, g.f(scale)]))
    out = parts[0]
    for part in parts[1:]:
        out = g.op("Add", [out, part])
    return Tensor(out, (x.shape[0], outputs, *x.shape[2:]), x.channels * len(parts), -2)


@layer(3)
def attention(g, x):
    """A product of two quantised views of one tensor, both packed at run time."""
    if x.rank != 4 or x.channels > 64:
        return None
    length = int(np.prod(x.shape[2:]))
    if length < 2 or x.channels * x.channels > MAX_ELEMENTS:
        return None
    rows = replace(x, name=g.op("Reshape", [x, np.array([0, x.channels, length], np.int64)]), shape=(x.shape[0], x.channels, length))
    choices = (bipolar_quant, lsq, dorefa, lambda g, t: Tensor(g.op("Sign", [t]), t.shape, 1.0, 0, frozenset({-1.0, 0.0, 1.0})))
    a, b = g.pick(*choices)(g, rows), g.pick(*choices)(g, rows)
    turned = g.op("Transpose", [b], perm=[0, 2, 1])
    name = g.op("MatMul", [a, turned])
    if activation_planes(a.levels) * activation_planes(b.levels) <= SURE_PAIRS:
        g.low.add(name)
    return Tensor(name, (x.shape[0], x.channels, x.channels), a.bound * b.bound * length, a.grain + b.grain)
