"""Pools, pads, concatenations, slices, transposes: what moves values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.fuzz.graphs import MAX_ELEMENTS, Tensor, layer
from tests.fuzz.layers import draw_window, out_length
from tests.fuzz.quantisers import larq, plain_sign, selected, tanh_sign


@layer(5)
def max_pool(g, x):
    window = draw_window(g, x) if x.rank in (3, 4) else None
    if window is None:
        return None
    kernel, strides, pads, dilations, out = window
    for size, k, stride, begin, dilation, count in zip(x.shape[2:], kernel, strides, pads, dilations, out):
        taps = np.arange(count)[:, None] * stride - begin + np.arange(k) * dilation
        if not np.any((taps >= 0) & (taps < size), axis=1).all():
            return None  # a window that sees nothing but padding has no maximum
    out_name = g.op("MaxPool", [x], kernel_shape=kernel, strides=strides, pads=pads, dilations=dilations)
    return replace(x, name=out_name, shape=(*x.shape[:2], *out))


@layer(2)
def average_pool(g, x):
    if x.rank != 4 or min(x.shape[2:]) < 2:
        return None
    out = [out_length(s, 2, 2, 0, 0, 1) for s in x.shape[2:]]
    return Tensor(g.op("AveragePool", [x], kernel_shape=[2, 2], strides=[2, 2]), (*x.shape[:2], *out), x.bound, x.grain - 2)


@layer(4)
def pad(g, x):
    if x.rank == 2:
        return None
    spatial = x.rank - 2
    widths = [int(g.rng.integers(0, 3)) for _ in range(2 * spatial)]
    mode = g.pick("constant", "constant", "constant", "constant", "reflect", "edge")
    if mode == "reflect" and max(widths) >= min(x.shape[2:]):
        return None
    pads = np.array([0, 0, *widths[:spatial], 0, 0, *widths[spatial:]], np.int64)
    shape = (*x.shape[:2], *[s + a + b for s, a, b in zip(x.shape[2:], widths[:spatial], widths[spatial:])])
    if int(np.prod(shape[1:])) > MAX_ELEMENTS:
        return None
    if mode != "constant":
        return replace(x, name=g.op("Pad", [x, pads], mode=mode), shape=shape)
    value = float(g.pick(0, 1, -1, 1, -1))
    levels = None if x.levels is None else x.levels | ({value} if sum(widths) else set())
    return Tensor(g.op("Pad", [x, pads, g.f(value)]), shape, max(x.bound, abs(value)), min(x.grain, 0), levels)


@layer(5)
def concat(g, x):
    others = [t for t in g.history if t.shape[2:] == x.shape[2:] and t.rank == x.rank]
    fields = [x, *[g.pick(*others) for _ in range(int(g.rng.integers(1, 3)))]]
    if g.chance(0.5):
        fields = fields[::-1]
    channels = sum(t.channels for t in fields)
    if channels > 160:
        return None
    levels = None
    if all(t.levels is not None for t in fields):
        levels = frozenset().union(*[t.levels for t in fields])
    out = g.op("Concat", fields, axis=g.pick(1, 1 - x.rank))
    return Tensor(out, (x.shape[0], channels, *x.shape[2:]), max(t.bound for t in fields), min(t.grain for t in fields), levels)


@layer(2)
def crop(g, x):
    axis = int(g.rng.integers(1, x.rank))
    size = x.shape[axis]
    if size < 2:
        return None
    begin, end = sorted(int(v) for v in g.rng.choice(size + 1, 2, replace=False))
    out = g.op("Slice", [x, *[np.array([v], np.int64) for v in (begin, end, axis)]])
    return replace(x, name=out, shape=(*x.shape[:axis], end - begin, *x.shape[axis + 1 :]))


@layer(2)
def split(g, x):
    """Two halves of the channels, put together the other way round or added."""
    if x.channels % 2:
        return None
    a, b = g.op("Split", [x], count=2, axis=1)
    if g.chance(0.5):
        return replace(x, name=g.op("Concat", [b, a], axis=1))
    return Tensor(g.op("Add", [a, b]), (x.shape[0], x.channels // 2, *x.shape[2:]), 2 * x.bound, x.grain)


@layer(2)
def shuffle(g, x):
    """Channel shuffle by reshape and transpose."""
    if x.rank != 4 or x.channels % 2:
        return None
    n, c, h, w = x.shape
    folded = g.op("Reshape", [x, np.array([-1, 2, c // 2, h, w], np.int64)])
    turned = g.op("Transpose", [folded], perm=[0, 2, 1, 3, 4])
    return replace(x, name=g.op("Reshape", [turned, np.array([-1, c, h, w], np.int64)]))


@layer(2)
def transposed(g, x):
    """The quantiser or pool in channels-last order, as tf2onnx leaves it."""
    if x.rank != 4:
        return None
    there = replace(x, name=g.op("Transpose", [x], perm=[0, 2, 3, 1]), shape=(x.shape[0], *x.shape[2:], x.shape[1]))
    inner = g.pick(plain_sign, larq, selected, tanh_sign)(g, there) if g.chance(0.7) else there
    return replace(inner, name=g.op("Transpose", [inner], perm=[0, 3, 1, 2]), shape=x.shape)


@layer(1)
def turned(g, x):
    """Height and width exchanged."""
    if x.rank != 4:
        return None
    return replace(x, name=g.op("Transpose", [x], perm=[0, 1, 3, 2]), shape=(*x.shape[:2], x.shape[3], x.shape[2]))
