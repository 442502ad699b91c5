"""Batch normalisation, scales, activations, sums, gates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.fuzz.graphs import Tensor, layer
from tests.fuzz.layers import draw_weights, product
from tests.fuzz.quantisers import arithmetic_select, larq, plain_sign, quantise, selected, zero_fix


def _powers(g, low=-1, high=2):
    return lambda shape: 2.0 ** g.rng.integers(low, high, shape) * np.where(g.rng.random(shape) < 0.3, -1, 1)


@layer(8)
def batch_norm(g, x):
    eps = 2.0**-6
    deviation = 2.0 ** g.rng.integers(-1, 2, x.channels)
    gamma = _powers(g)((x.channels,)) * deviation
    mean, beta = g.rng.integers(-6, 7, x.channels) / g.pick(1, 1, 2), g.rng.integers(-4, 5, x.channels) / 2
    if g.chance(0.2):
        gamma = np.where(g.rng.random(x.channels) < 0.3, 0, gamma)
    if g.chance(0.4):
        beta = beta * 0
    if g.chance(0.2):
        beta = np.where(gamma == 0, 0, beta)
    operands = [v.astype(np.float32) for v in (gamma, beta, mean, deviation**2 - eps)]
    out = g.op("BatchNormalization", [x, *operands], epsilon=eps)
    return Tensor(out, x.shape, (x.bound + 6) * 2 + 2, min(x.grain, -1) - 1)


@layer(3)
def tied_batch_norm(g, x):
    """BatchNormalization with any gain, a mean on the grid of ``x`` and no shift, then a quantiser: the sign of +-(x - mean)."""
    gamma = (g.rng.normal(size=x.channels) + 0.01).astype(np.float32)
    mean = (g.rng.integers(-5, 6, x.channels) * 2.0 ** max(x.grain, -2)).astype(np.float32)
    variance = g.rng.uniform(0.1, 3, x.channels).astype(np.float32)
    out = g.op("BatchNormalization", [x, gamma, np.zeros(x.channels, np.float32), mean, variance], epsilon=1e-5)
    return g.pick(plain_sign, larq, zero_fix, selected, arithmetic_select)(g, replace(x, name=out, levels=None))


@layer(3)
def scale(g, x):
    factor = g.per_channel(x, _powers(g))
    return g.after(g.op("Mul", g.pick([x, factor], [factor, x])), x, x.bound * 2, x.grain - 1, lambda v: v * factor.reshape(-1))


@layer(3)
def shift(g, x):
    kind, offset = g.pick("Add", "Sub"), g.per_channel(x, lambda s: g.rng.integers(-6, 7, s) / 2)
    function = (lambda v: v + offset.reshape(-1)) if kind == "Add" else (lambda v: v - offset.reshape(-1))
    return g.after(g.op(kind, [x, offset]), x, x.bound + 3, min(x.grain, -1), function)


@layer(3)
def prelu(g, x):
    if g.chance(0.3):
        alpha = float(g.pick(0.5, 0.25, -0.5))
        out = g.op("LeakyRelu", [x], alpha=alpha)
        return Tensor(out, x.shape, x.bound, x.grain - 2)
    slope = g.rng.choice([0.0, 0.25, 0.5, 1.0, 2.0] + ([-0.5, -1.0] if g.chance(0.4) else []), (x.channels, *[1] * (x.rank - 2)))
    return Tensor(g.op("PRelu", [x, slope.astype(np.float32)]), x.shape, x.bound * 2, x.grain - 2)


@layer(3)
def activation(g, x):
    kind = g.pick("Relu", "Clip", "Neg", "Abs", "Max", "Min", "Identity", "hinge")
    if kind == "Clip":
        return g.after(g.op("Clip", [x, g.f(-1), g.f(2)]), x, min(x.bound, 2), min(x.grain, 0), lambda v: np.clip(v, -1, 2))
    if kind in ("Max", "Min"):
        t = g.f(g.pick(-0.5, 0, 1))
        return g.after(g.op(kind, [x, t]), x, max(x.bound, 1), min(x.grain, -1), lambda v: getattr(np, f"{kind.lower()}imum")(v, t))
    if kind == "hinge":  # 1 - x, swapped operands
        return g.after(g.op("Sub", [g.f(1), x]), x, x.bound + 1, min(x.grain, 0), lambda v: 1 - v)
    function = {"Relu": lambda v: np.maximum(v, 0), "Neg": np.negative, "Abs": np.abs, "Identity": lambda v: v}[kind]
    return g.after(g.op(kind, [x]), x, x.bound, x.grain, function)


@layer(6)
def residual(g, x):
    others = [t for t in g.history if t.shape == x.shape and t.name != x.name]
    if not others:
        return None
    other = g.pick(*others)
    kind = g.pick("Add", "Add", "Add", "Sub", "Mul", "Max")
    a, b = g.pick((x, other), (other, x))
    if kind == "Mul":
        return Tensor(g.op(kind, [a, b]), x.shape, x.bound * other.bound, x.grain + other.grain)
    bound = max(x.bound, other.bound) if kind == "Max" else x.bound + other.bound
    return Tensor(g.op(kind, [a, b]), x.shape, bound, min(x.grain, other.grain))


@layer(2)
def mixed(g, x):
    """One of two tensors, or a number, element by element."""
    others = [t for t in g.history if t.shape == x.shape]
    other = g.pick(*others) if others else x
    bit = g.op(g.pick("Greater", "LessOrEqual"), [g.pick(x, other), g.f(g.pick(0, 0.5, -1))])
    second = g.pick(other.name, g.f(0), g.f(1))
    levels = None
    if isinstance(second, np.ndarray) and x.levels is not None:
        levels = x.levels | {float(second)}
    out = g.op("Where", g.pick([bit, x, second], [bit, second, x]))
    return Tensor(out, x.shape, max(x.bound, other.bound, 1), min(x.grain, other.grain, 0), levels)


@layer(3)
def back(g, x):
    """Go on from an earlier tensor: fan-out. What was computed since then stays as another output."""
    other = g.pick(*g.history)
    if other.name == x.name or x.name == "x":
        return None
    if x.name not in g.outputs:
        g.outputs.append(x.name)
    return other


@layer(2)
def block(g, x):
    """Quantise once, convolve twice, add: a shared sign, kept shape."""
    if x.rank != 4:
        return None
    q, parts = quantise(g, x), []
    for _ in range(2):
        weights = draw_weights(g, (x.channels, x.channels, 3, 3))
        out = g.op("Conv", [q, weights[0]], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        made = product(g, q, out, x.shape, weights, x.channels * 9)
        parts.append(batch_norm(g, made) if g.chance(0.5) else made)
    parts.append(g.pick(x, q))
    out = parts[0]
    for other in parts[1:]:
        out = Tensor(g.op("Add", [out, other]), x.shape, out.bound + other.bound, min(out.grain, other.grain))
    return out


@layer(2)
def gate(g, x):
    """A factor per pixel or per image and channel, of powers of two many terms so that the mean is exact."""
    if x.rank != 4:
        return None
    others = [t for t in g.history if t.shape == x.shape and t.bound / 2.0**t.grain < 2**8]
    other = g.pick(*others) if others else x
    count = x.channels if g.chance(0.5) else int(np.prod(x.shape[2:]))
    if count & (count - 1):
        return None
    if count == x.channels:
        factor = g.op("ReduceMean", [g.op("Abs", [other])], axes=[1], keepdims=1)
    else:
        factor = g.op("GlobalAveragePool", [other])
    out = g.op("Mul", g.pick([x, factor], [factor, x]))
    return Tensor(out, x.shape, x.bound * other.bound, x.grain + other.grain - (count.bit_length() - 1))
