"""Every spelling of an activation quantiser that exporters write: sign functions, {0, 1} codes, ternary and two-bit ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import TensorProto

from tests.fuzz.graphs import EXACT_BITS, Tensor, layer


def _two(x, name, low=-1.0, high=1.0, zero=False):
    levels = {low, high} | ({0.0} if zero else set())
    whole = float(low).is_integer() and float(high).is_integer()
    return Tensor(name, x.shape, max(abs(low), abs(high)), 0 if whole else -2, frozenset(levels))


def _as_signs(g, bit):
    """2 * float(bit) - 1 in one of its forms."""
    value = g.op("Cast", [bit], to=TensorProto.FLOAT)
    if g.chance(0.3):
        return g.op("Mul", [g.op("Sub", [value, g.f(0.5)]), g.f(2)])
    return g.op("Sub", [g.op("Mul", [value, g.f(2)]), g.f(1)])


def plain_sign(g, x):
    return _two(x, g.op("Sign", [x]), zero=True)


def clipped_sign(g, x):
    return _two(x, g.op("Sign", [g.op("Clip", [x, g.f(-1), g.f(1)])]), zero=True)


def tanh_sign(g, x):
    return _two(x, g.op("Sign", [g.op("Tanh", [x])]), zero=True)


def scaled_sign(g, x):
    scale = g.pick(1.0, 0.5, 2.0, -1.0)
    return _two(x, g.op("Sign", [g.op(g.pick("Mul", "Div"), [x, g.f(scale)])]), zero=True)


def straight_through(g, x):
    """(sign(x) - x) + x: ternary; not on bits unless |x| is known to be small."""
    sign, kind = g.op("Sign", [x]), g.pick("sub", "neg", "minus", "clip")
    if kind == "clip":
        inner = g.op("Clip", [x, g.f(-1), g.f(1)])
        out = g.op("Add", [g.op("Sub", [sign, inner]), inner])
        return _two(x, out, zero=True)
    if kind == "sub":
        out = g.op("Add", [g.op("Sub", [sign, x]), x])
    elif kind == "neg":
        out = g.op("Add", [x, g.op("Add", [g.op("Neg", [x]), sign])])
    else:
        out = g.op("Sub", [x, g.op("Sub", [x, sign])])
    return replace(_two(x, out, zero=True), levels=None)


def qkeras(g, x):
    sign = g.op("Sign", [x])
    code = g.op("Add", [sign, g.op("Sub", [g.f(1), g.op("Abs", [sign])])])
    inner = g.op("Clip", [x, g.f(-1), g.f(1)]) if g.chance(0.5) else x
    out = g.op("Add", [inner, g.op("Add", [g.op("Neg", [inner]), g.op("Mul", [g.f(1), code])])])
    made = _two(x, out)
    return made if inner is not x else replace(made, levels=None)


def polynomial(g, x):
    """Bi-Real net's approximation of sign, cancelled."""
    if x.bound**2 + 2 * x.bound > 2.0 ** (2 * x.grain + EXACT_BITS):
        return plain_sign(g, x)
    sign = g.op("Sign", [x])
    masks = [g.op("Cast", [g.op("Less", [x, g.f(t)])], to=TensorProto.FLOAT) for t in (-1, 0, 1)]

    def select(mask, yes, no):
        rest = g.op("Sub", [g.f(1), mask])
        return g.op("Add", [g.op("Mul", [yes, mask]), g.op("Mul", [no, rest])])

    square, double = g.op("Mul", [x, x]), g.op("Mul", [x, g.f(2)])
    rising = g.op("Add", [square, double])
    falling = g.op("Add", [g.op("Mul", [square, g.f(-1)]), double])
    out = select(masks[0], g.f(-1), rising)
    out = select(masks[1], out, falling)
    out = select(masks[2], out, g.f(1))
    return replace(_two(x, g.op("Add", [g.op("Sub", [sign, out]), out]), zero=True), levels=None)


def compared(g, x):
    kind, t = g.pick("GreaterOrEqual", "Greater", "Less", "LessOrEqual"), g.f(g.pick(0, 0, 0.5, -1))
    operands = [t, x] if g.chance(0.3) else [x, t]
    bit = g.op(kind, operands)
    if g.chance(0.3):
        bit = g.op("Not", [bit])
    return _two(x, _as_signs(g, bit))


def compared_per_channel(g, x):
    t = g.per_channel(x, lambda s: g.rng.integers(-4, 5, s) / 4)
    return _two(x, _as_signs(g, g.op(g.pick("GreaterOrEqual", "Greater", "Less"), [x, t])))


def selected(g, x):
    kind, (a, b) = g.pick("GreaterOrEqual", "Greater", "Less", "LessOrEqual"), g.pick((1, -1), (-1, 1), (1, 0), (0, 1), (0.5, -0.5))
    bit = g.op(kind, [x, g.f(0)])
    yes, no = g.f(a), g.f(b)
    if g.chance(0.2):
        yes, no = np.full((1, *x.shape[1:]), a, np.float32), np.full((1, *x.shape[1:]), b, np.float32)
    return _two(x, g.op("Where", [bit, yes, no]), min(a, b), max(a, b))


def arithmetic_select(g, x):
    bit = g.op("GreaterOrEqual", [x, g.f(0)])
    yes, no = (g.op("Cast", [b], to=TensorProto.FLOAT) for b in (bit, g.op("Not", [bit])))
    return _two(x, g.op("Add", [g.op("Mul", [yes, g.f(1)]), g.op("Mul", [no, g.f(-1)])]))


def larq(g, x):
    return _two(x, g.op("Sign", [g.op("Add", [g.op("Sign", [x]), g.f(0.1)])]))


def zero_fix(g, x):
    sign = g.op("Sign", [x])
    return _two(x, g.op("Add", [sign, g.op("Cast", [g.op("Equal", [sign, g.f(0)])], to=TensorProto.FLOAT)]))


def heaviside(g, x):
    low = g.op("Where", [g.op("Less", [x, g.f(0)]), g.f(0), g.f(1)])
    fixed = g.op("Where", [g.op("Equal", [x, g.f(0)]), g.f(g.pick(0, 1)), low])
    return _two(x, g.op("Sub", [g.op("Mul", [fixed, g.f(2)]), g.f(1)]))


def hard_sigmoid_round(g, x):
    half = g.op("Div", [g.op("Add", [x, g.f(1)]), g.f(2)])
    return _two(x, g.op("Sub", [g.op("Mul", [g.op("Round", [g.op("Clip", [half, g.f(0), g.f(1)])]), g.f(2)]), g.f(1)]))


def unipolar(g, x):
    kind = g.pick("relu", "clip", "cast", "round")
    if kind == "relu":
        out = g.op("Sign", [g.op("Relu", [x])])
    elif kind == "clip":
        out = g.op("Sign", [g.op("Clip", [x, g.f(0), g.f(1)])])
    elif kind == "cast":
        out = g.op("Cast", [g.op("Greater", [x, g.f(0)])], to=TensorProto.FLOAT)
    else:
        out = g.op("Round", [g.op("Clip", [x, g.f(0), g.f(1)])])
    return _two(x, out, 0.0, 1.0)


def ternary(g, x):
    over = g.op(g.pick("GreaterOrEqual", "Greater"), [g.op("Abs", [x]), g.f(g.pick(0.5, 1, 3))])
    return _two(x, g.op("Mul", [g.op("Cast", [over], to=TensorProto.FLOAT), g.op("Sign", [x])]), zero=True)


def four_levels(g, x):
    out = g.op("Round", [g.op("Clip", [x, g.f(0), g.f(3)])])
    return Tensor(out, x.shape, 3.0, 0, frozenset({0.0, 1.0, 2.0, 3.0}))


def versus(g, x):
    """Compared with another activation, or with its own mean over a power of two many channels."""
    others = [t for t in g.history if t.shape == x.shape]
    if x.rank == 4 and x.channels & (x.channels - 1) == 0 and x.bound * x.channels < 2.0 ** (x.grain + EXACT_BITS) and g.chance(0.3):
        other = g.op("ReduceMean", [x], axes=[1], keepdims=1)
    elif others:
        other = g.pick(*others)
    else:
        return plain_sign(g, x)
    bit = g.op(g.pick("Greater", "GreaterOrEqual", "Less"), g.pick([x, other], [other, x]))
    return _two(x, _as_signs(g, bit) if g.chance(0.5) else g.op("Where", [bit, g.f(1), g.f(-1)]))


QUANTISERS = (
    plain_sign, plain_sign, plain_sign, clipped_sign, tanh_sign, scaled_sign, straight_through, qkeras, polynomial, compared,
    compared_per_channel, selected, selected, arithmetic_select, larq, larq, zero_fix, heaviside, hard_sigmoid_round, unipolar, ternary,
    four_levels, versus,
)  # fmt: skip


@layer(10)
def quantise(g, x):
    return g.pick(*QUANTISERS)(g, x)
