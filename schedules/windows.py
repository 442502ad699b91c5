"""How a sliding window meets a register tile: which taps of the kernel hit which pixels of the tile.

Zero padding costs nothing at run time: taps that fall outside the image are left out. Rows of taps are bounded by expressions of the output
row; columns are known when the code is written, so the few tiles at the left and right edge get code of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from . import tir


@dataclass(frozen=True)
class Taps:
    """Taps ``first <= s < stop`` of a kernel row, which hit the pixels ``low <= p < high`` of a tile and no others."""

    first: int
    stop: int
    low: int
    high: int


@dataclass(frozen=True)
class Run:
    """``count`` tiles of equal shape, at output columns ``start``, ``start + step``, ..."""

    start: int
    step: int
    count: int
    taps: tuple[Taps, ...]

    def first_pixel(self, number):
        """Output column of the first pixel of tile ``number`` (an expression)."""
        return tir.i64(self.start) + number * self.step


def even_tile(width, most):
    """Pixels of a tile, at most ``most``, so that as few tiles as possible cover ``width`` and overlap least."""
    tiles = -(-width // most)
    return -(-width // tiles)


def tile_starts(width, pixels):
    """First columns of tiles that cover ``width`` columns; the last one overlaps its neighbour if ``pixels`` does not divide ``width``."""
    starts = list(range(0, width - pixels + 1, pixels))
    return starts if starts[-1] + pixels == width else [*starts, width - pixels]


def column_taps(window, start, pixels):
    """The taps of a tile of ``pixels`` output columns from ``start`` on, as a tuple of :class:`Taps`; taps that hit nothing are absent."""
    found = []
    for s in range(window.kernel[1]):
        offset = start * window.strides[1] - window.pads[1] + s * window.dilations[1]
        hit = [p for p in range(pixels) if 0 <= offset + p * window.strides[1] < window.in_width]
        if not hit:
            continue
        low, high = hit[0], hit[-1] + 1
        if found and (found[-1].stop, found[-1].low, found[-1].high) == (s, low, high):
            found[-1] = Taps(found[-1].first, s + 1, low, high)
        else:
            found.append(Taps(s, s + 1, low, high))
    return tuple(found)


def column_runs(window, pixels):
    """Tiles that cover an output row, as a list of :class:`Run`."""
    runs = []
    for start in tile_starts(window.out_width, pixels):
        taps = column_taps(window, start, pixels)
        last = runs[-1] if runs else None
        if last and last.taps == taps and last.count == 1:
            runs[-1] = Run(last.start, start - last.start, 2, taps)
        elif last and last.taps == taps and start == last.start + last.count * last.step:
            runs[-1] = Run(last.start, last.step, last.count + 1, taps)
        else:
            runs.append(Run(start, 0, 1, taps))
    return runs


def column_uses(window, taps):
    """Which input columns a tile needs and what for: ``{column: [(p, s), ...]}``, columns counted from the first pixel's first tap."""
    uses = {}
    for group in taps:
        for s in range(group.first, group.stop):
            for p in range(group.low, group.high):
                uses.setdefault(p * window.strides[1] + s * window.dilations[1], []).append((p, s))
    return dict(sorted(uses.items()))


def row_taps(window, y):
    """``(first, count)`` of the rows of taps that lie inside the image at output row ``y``; ints where they are the same for every row."""
    top, step, kernel = window.pads[0], window.dilations[0], window.kernel[0]
    bottom = (window.out_height - 1) * window.strides[0] - top + (kernel - 1) * step
    if top == 0 and bottom < window.in_height:
        return 0, kernel
    origin = tir.i64(top) - y * window.strides[0]  # first r with r * step >= origin, first r with r * step >= origin + in_height
    first = tirx.max(tir.i64(0), tirx.floordiv(origin + (step - 1), tir.i64(step)))
    stop = tirx.min(tir.i64(kernel), tirx.floordiv(origin + (window.in_height + step - 1), tir.i64(step)))
    return first, tirx.max(stop - first, tir.i64(0))


def has_bits(epilogue):
    """Whether an epilogue packs bits, so that it needs whole 32-bit words of channels at a time."""
    return any(output.kind == "bits" for output in epilogue.outputs)
