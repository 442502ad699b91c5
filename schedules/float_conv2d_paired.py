"""Grouped float convolutions whose groups have half a vector of outputs: input channels in pairs.

Where a vector of results holds two groups, its lanes need input channels of both, and merging them costs an instruction of the units that
multiply. Here a vector of sums has one group instead, for each output the sum over even channels in one lane and that over odd channels in
the next: a pair of neighbouring channels is one value of 64 bits, which a load broadcasts. In the end neighbouring lanes are added::

    a[2 o + t] = sum_c x[2 c + t] w[o, 2 c + t]        y[o] = a[2 o] + a[2 o + 1]
"""

from __future__ import annotations

import numpy as np
from tvm import tirx

from . import float_conv2d, tir, windows


def fits(spec, isa):
    """Whether two groups fill a vector, and their input channels are pairs that lie side by side."""
    per_out, per_in = spec.out_channels // spec.groups, spec.in_channels // spec.groups
    return spec.groups > 1 and 2 * per_out == isa.lanes and per_in % 2 == 0 and not spec.planar


def schedules(spec, window, vectors, isa):
    """Schedules whose sums, weights of a kernel row and values fit in the registers, the default first."""
    most = min(16, (isa.registers - 2) // (2 * vectors) - window.kernel[1] - 1)
    if most < 1:
        return []
    # Half of the registers for sums: what is left lets loads run ahead.
    pixels = dict.fromkeys(windows.even_tile(window.out_width, count) for count in [min(8, most), *range(1, most + 1)])
    rows = dict.fromkeys([1, min(4, window.out_height), window.out_height])
    return [float_conv2d.Schedule(count, vectors, r, True, paired=True) for r in rows for count in pixels]


def pack_weights(spec, schedule, isa, weights):
    """Weights in the order in which the kernel reads them.

    Parameters
    ----------
    weights : ndarray
        float32 ``[O, kh, kw, I / groups]``.

    Returns
    -------
    ndarray
        float32 ``[blocks, kh, kw, I / groups / 2, groups of a block * lanes]``; lane ``2 o + t`` of group g has the weight of its
        output o and input ``2 c + t``.
    """
    per_out, size = isa.lanes // 2, schedule.vectors * isa.lanes
    outputs, height, width, depth = weights.shape
    padded = np.zeros((-(-outputs // size) * size, height, width, depth), weights.dtype)
    padded[:outputs] = weights
    parts = padded.reshape(-1, 2 * schedule.vectors, per_out, height, width, depth // 2, 2)
    return np.ascontiguousarray(parts.transpose(0, 3, 4, 5, 1, 2, 6)).reshape(len(parts), height, width, depth // 2, 2 * size)


class Kernel(float_conv2d.Kernel):
    """Writes one convolution; every vector of results has two vectors of sums."""

    name = "float_conv2d_paired"

    def __init__(self, spec, schedule, isa):
        super().__init__(spec, schedule, isa)
        self.per_in, self.count = spec.in_channels // spec.groups, 2 * schedule.vectors
        shape = (self.blocks.count, *spec.window.kernel, self.per_in // 2, self.count * isa.lanes)
        self.weights = tir.buffer("w", shape, "float32")
        self.operands = [self.data, self.weights]

    def _tile(self, at, x, taps):
        pixels, lanes = self.schedule.pixels, self.lanes
        sums = tir.Registers("sum", pixels * self.count, "float32", lanes)
        clear = sums.fill(tir.splat(0.0, "float32", lanes))
        reduce = tir.for_("r", at.count, lambda r: self._row_of_taps(at, x, at.first + r, taps, sums)) if taps else []
        scope, finish = {}, []
        for p in range(pixels):
            values = []
            for v in range(self.schedule.vectors):
                pair = [tir.bind("half", sums.get(p * self.count + 2 * v + half)) for half in range(2)]
                finish += [statement for _, statement in pair]
                even, odd = (tir.shuffle([name for name, _ in pair], range(first, 2 * lanes, 2)) for first in (0, 1))
                values.append(even + odd)
            finish.append(self.emitter.emit(values, (at.image, *self._pixel(at.row, x + p)), at.block * self.blocks.size, scope))
        return [sums.allocate, clear, reduce, finish]

    def _row_of_taps(self, at, x, r, taps, sums):
        return tir.for_("c", self.per_in // 2, lambda c: self._shared_columns(at, x, r, c, taps, sums))

    def _shared_columns(self, at, x, r, c, taps, sums):
        body, weights = [], {}
        for s in sorted({s for group in taps for s in range(group.first, group.stop)}):
            for g in range(self.count):
                weights[s, g], statement = tir.bind("w", self._weight(at, r, s, c, g))
                body.append(statement)
        for column, uses in windows.column_uses(self.window, taps).items():
            for g in range(self.count):
                value, statement = tir.bind("x", self._pair(at, x, r, column, c, g))
                body.append(statement)
                for p, s in uses:
                    index = p * self.count + g
                    body.append(sums.set(index, sums.get(index) + value * weights[s, g]))
        return body

    def _pair(self, at, x, r, column, c, g):
        """Input channels ``2 c`` and ``2 c + 1`` of group ``g`` of the block, over and over."""
        window, lanes = self.window, self.lanes
        y = at.row * window.strides[0] - window.pads[0] + r * window.dilations[0]
        pixel = self._pixel(y, x * window.strides[1] - window.pads[1] + column)
        channel = at.channel + (g * self.per_in + 2 * c)
        if self.spec.out_channels % self.blocks.size:  # the last block has groups that do not exist
            channel = tirx.min(channel, tir.i64(self.spec.in_channels - 2))
        pair = tirx.reinterpret("float64", tir.load_vector(self.data, [at.image, *pixel, channel], 2))
        return tirx.reinterpret(tir.vector_type("float32", lanes), tir.broadcast(pair, lanes // 2))
