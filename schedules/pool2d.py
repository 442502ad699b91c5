"""float32 pooling, NHWC: the family of :class:`bnntvm.spec.Pool2d`. Vectorised over channels; see :mod:`.sliding`.

Averages are sums divided by the number of values (or multiplied by its reciprocal, where that is exact).
"""

from __future__ import annotations

import numpy as np
from tvm import tirx

from . import epilogue as epilogues
from . import sliding, tir, windows
from .sliding import Schedule

__all__ = ["Schedule", "build", "default_schedule", "reference", "space"]


def default_schedule(spec, isa):
    """A schedule that is fast without tuning."""
    return space(spec, isa)[0]


def space(spec, isa):
    """Valid schedules, the default one first.

    Pools of large images are bound by memory. Where the processor has prefetchers to spare for it, a narrow tile, which reads a few
    lines of each row, and asks for the next one's, comes first. AMD's Zen 4 follows single pixels best by itself: 10 to 30 % faster.
    """
    found = sliding.space(spec.window, spec.channels, spec.epilogue, isa, extra=2)
    vectors = max((s.vectors for s in found if s.vectors <= 2), default=found[0].vectors)
    pixels, ahead = (1, 0) if isa.vendor == "AMD" else (windows.even_tile(spec.window.out_width, 3), 1)
    narrow = Schedule(pixels, vectors, ahead)
    return list(dict.fromkeys([narrow, *found])) if isa.machine == "x86_64" and narrow in found else found


def build(spec, schedule, isa):
    """The kernel: data ``float32[N, H, W, C]``, the epilogue's inputs and outputs. N is dynamic.

    Returns
    -------
    tirx.PrimFunc
    """
    return (_Max if spec.op == "max" else _Average)(spec, schedule, isa).function()


class _Max(sliding.Kernel):
    identity = float("-inf")

    def __init__(self, spec, schedule, isa):
        super().__init__("pool2d", spec.window, spec.channels, spec.channels, spec.epilogue, schedule, isa)

    def combine(self, total, value, weight):
        return tirx.Max(total, value)


class _Average(sliding.Kernel):
    def __init__(self, spec, schedule, isa):
        super().__init__("pool2d", spec.window, spec.channels, spec.channels, spec.epilogue, schedule, isa)
        self.count_pads = spec.op == "avg_pad"

    def combine(self, total, value, weight):
        return total + value

    def result(self, at, pixel, total):
        rows, columns = self.window.kernel
        if not self.count_pads:
            rows, columns = at.count, sum(t.stop - t.first for t in at.taps if t.low <= pixel < t.high)
        return divide(total, rows * columns, self.lanes)


def divide(total, count, lanes):
    """A float32 vector divided by an int or int64 expression; exactly rounded."""
    number = tir.static(count)
    if number is None:
        return tirx.Div(total, tir.broadcast(tirx.Cast("float32", count), lanes))
    if number & (number - 1) == 0 and number:
        return total * tir.splat(1.0 / number, "float32", lanes)
    return tirx.Div(total, tir.splat(float(number), "float32", lanes))


def reference(spec, operands, epilogue_inputs):
    """The pool in numpy.

    Parameters
    ----------
    operands : list
        data float32 ``[N, H, W, C]``.
    epilogue_inputs : list of ndarray

    Returns
    -------
    list of ndarray
        One for each output of the epilogue.
    """
    window, data = spec.window, operands[0]
    top, left, bottom, right = window.pads
    margin = ((0, 0), (top, bottom), (left, right), (0, 0))
    fill = -np.inf if spec.op == "max" else 0
    padded = np.pad(data.astype(np.float64), margin, constant_values=fill)
    inside = np.pad(np.ones_like(data, np.float64), margin)
    taps, counts = [], []
    for r in range(window.kernel[0]):
        for s in range(window.kernel[1]):
            y, x = r * window.dilations[0], s * window.dilations[1]
            rows = slice(y, y + (window.out_height - 1) * window.strides[0] + 1, window.strides[0])
            columns = slice(x, x + (window.out_width - 1) * window.strides[1] + 1, window.strides[1])
            taps.append(padded[:, rows, columns])
            counts.append(inside[:, rows, columns])
    if spec.op == "max":
        result = np.max(taps, axis=0)
    else:
        number = np.float64(len(taps)) if spec.op == "avg_pad" else np.sum(counts, axis=0)
        with np.errstate(invalid="ignore"):
            result = np.sum(taps, axis=0) / number
    return epilogues.reference(spec.epilogue, result.astype(np.float32), epilogue_inputs)
