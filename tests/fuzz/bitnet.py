"""BitNet b1.58 (Ma et al. 2024): ternary weights, activations of 8 bits with a scale for every token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.fuzz.graphs import Tensor, layer
from tests.fuzz.published import program
from tests.fuzz.quantisers import larq, plain_sign, selected


def _codes(g, x, top, reciprocal):
    """(integers from -128 to 127, the scale that they were multiplied by)."""
    bounded = g.op("Clip", [top, g.f(2.0**-20)]) if g.chance(0.5) else g.op("Max", [top, g.f(2.0**-20)])
    if reciprocal:
        scale = g.op("Mul", [g.op("Reciprocal", [bounded]), g.f(127)])
    else:
        scale = g.op("Div", [g.f(127), bounded])
    q = g.op("Round", [g.op("Mul", [x, scale])])
    return g.op("Clip", [q, g.f(-128), g.f(127)]), scale


def _tokens(g, x):
    """``x`` as rows [..., K] of tokens, and how to go back."""
    if x.rank == 2:
        return x, lambda name, outputs: (name, (x.shape[0], outputs))
    length = int(np.prod(x.shape[2:]))
    turned = g.op("Transpose", [g.op("Reshape", [x, np.array([-1, x.channels, length], np.int64)])], perm=[0, 2, 1])

    def back(name, outputs):
        shape = (x.shape[0], outputs, *x.shape[2:])
        return g.op("Reshape", [g.op("Transpose", [name], perm=[0, 2, 1]), np.array([-1, *shape[1:]], np.int64)]), shape

    return replace(x, name=turned, shape=(x.shape[0], length, x.channels)), back


@layer(4)
def per_token(g, x):
    """A linear layer of a BitNet. Where the scale is divided out before the product, the largest number of each row is made one whose
    scale is a power of two; where it is divided out behind it, any is exact, and a sign makes the result dyadic again."""
    if x.rank not in (2, 4) or x.rank == 4 and int(np.prod(x.shape[2:])) > 64 or x.bound > 2.0**12:
        return None
    rows, back = _tokens(g, x)
    outputs, training, axis = int(g.rng.integers(1, 50)), g.chance(0.5), len(rows.shape) - 1
    if training:
        power = 127 * 2.0 ** int(np.ceil(np.log2(max(x.bound, 1) / 127)) + 1)
        column = g.op("Add", [g.op("Mul", [g.op("Slice", [rows, *[np.array([v], np.int64) for v in (0, 1, axis)]]), g.f(0)]), g.f(power)])
        rows = replace(rows, name=g.op("Concat", [rows, column], axis=g.pick(axis, -1)), shape=(*rows.shape[:-1], rows.shape[-1] + 1))
    count = rows.shape[-1]
    top = g.op("ReduceMax", [g.op("Abs", [rows])], axes=[g.pick(axis, -1)], keepdims=1)
    q, scale = _codes(g, rows, top, not training and g.chance(0.6))
    w = g.rng.integers(-1, 2, (outputs, count)) if g.chance(0.8) else g.rng.integers(0, 2, (outputs, count)) * 2 - 1
    weights, levels = w.astype(np.float32), frozenset({-1.0, 1.0})
    alpha = 2.0 ** int(g.rng.integers(-2, 1))
    if training:
        name = g.op("MatMul", [g.op("Div", [q, scale]), program(g, np.ascontiguousarray((weights * np.float32(alpha)).T))])
        g.packed.add(name)
        out, shape = back(name, outputs)
        step = power / 127
        return Tensor(out, shape, 128 * step * count * alpha, int(np.log2(step * alpha)))
    name = g.op("MatMul", [q, program(g, np.ascontiguousarray(weights.T))])
    g.packed.add(name)
    out = g.op("Div", [name, g.op("Mul", [scale, g.f(alpha)])]) if g.chance(0.5) else g.op("Div", [name, scale])
    out, shape = back(out, outputs)
    made = g.pick(larq, plain_sign, selected)(g, Tensor(out, shape, 1.0, 0))
    return replace(made, levels=made.levels or levels)
