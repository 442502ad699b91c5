"""Where the tiles of a binary convolution lie and which kernel taps each of their pixels has.

All of this is known when a kernel is built (only the batch is dynamic), so padding costs nothing at run time: a tap that falls outside
the image is not computed. Along y the valid taps are an interval that depends on the row, along x an interval per pixel; tiles of pixels
with equal intervals share code.
"""

from __future__ import annotations

from dataclasses import dataclass

from bnntvm.spec import POOLED, words

#: A row whose tiles need more code variants than this uses tiles of one pixel with run-time bounds at its ends.
MAX_PATTERNS = 4


@dataclass(frozen=True)
class Geometry:
    """A convolution as the kernel walks over it: data ``[N, height, width, pixel_words]``.

    The rows of a 1x1 convolution without pads and strides are joined to longer ones, which tiles cover better, unless pixels of two of them
    are pooled.
    """

    height: int
    width: int
    out_height: int
    out_width: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    before: tuple[int, int]
    dilations: tuple[int, int]
    groups: int
    group_words: int
    pixel_words: int  # words of one input pixel

    @staticmethod
    def of(spec):
        w = spec.window
        group_words = words(spec.in_channels // spec.groups)
        pixel_words = words(spec.in_channels) if spec.dense_groups else spec.groups * group_words
        shape = (w.in_height, w.in_width, w.out_height, w.out_width)
        if w.kernel == (1, 1) and w.strides == (1, 1) and not any(w.pads) and not pools(spec.epilogue):
            shape = _joined_rows(w.in_height, w.in_width) * 2
        # One tap along an axis leaves the dilation without meaning.
        dilations = tuple(1 if k == 1 else d for k, d in zip(w.kernel, w.dilations))
        return Geometry(*shape, w.kernel, w.strides, w.pads[:2], dilations, spec.groups, group_words, pixel_words)

    @property
    def contiguous(self):
        """Whether the words of one kernel row at one pixel are one run of memory."""
        return (self.groups == 1 and self.dilations[1] == 1) or self.kernel[1] == 1

    def taps(self, axis, position):
        """The interval ``(first, last + 1)`` of kernel taps along ``axis`` that are inside the image for output ``position``."""
        size, kernel = (self.height, self.width)[axis], self.kernel[axis]
        origin, dilation = position * self.strides[axis] - self.before[axis], self.dilations[axis]
        valid = [k for k in range(kernel) if 0 <= origin + k * dilation < size]
        return (valid[0], valid[-1] + 1) if valid else (0, 0)


def pools(epilogue):
    """Whether a result is pooled."""
    return any(output.kind in POOLED for output in epilogue.outputs)


def _joined_rows(height, width):
    """Rows and width of an image of as many pixels with at most eight rows, none shorter than 28 pixels if that is possible."""
    rows = max([d for d in range(1, 9) if height % d == 0 and height // d * width >= 28], default=1)
    return rows, height // rows * width


def always_inside(geometry):
    """Whether no tap ever falls outside the image."""
    sizes = (geometry.out_height, geometry.out_width)
    return all(geometry.taps(axis, p) == (0, geometry.kernel[axis]) for axis in (0, 1) for p in (0, sizes[axis] - 1))


@dataclass(frozen=True)
class Segment:
    """Kernel columns ``first`` <= s < ``last`` for the tile's pixels ``pixels``."""

    first: int
    last: int
    pixels: tuple[int, ...]


def segments(pattern):
    """Cut a tile's pattern (the tap interval of every pixel) into segments within which the same pixels are active."""
    last = max(hi for _, hi in pattern)
    found = []
    for s in range(last):
        active = tuple(p for p, (lo, hi) in enumerate(pattern) if lo <= s < hi)
        if found and found[-1].pixels == active:
            found[-1] = Segment(found[-1].first, s + 1, active)
        elif active:
            found.append(Segment(s, s + 1, active))
    return found


@dataclass(frozen=True)
class RowPlan:
    """How one output row is covered: tiles of ``pixels`` pixels, then single pixels.

    Attributes
    ----------
    pixels : int
    begin, end : int
        Pixels covered by tiles; tile t starts at min(begin + t * pixels, end - pixels), so that the last one may overlap its neighbour
        (both store the same values).
    patterns : dict of pattern to list of tile numbers
    """

    pixels: int
    begin: int
    end: int
    patterns: dict

    @property
    def tiles(self):
        return -(-(self.end - self.begin) // self.pixels)


def plan_row(geometry, pixels):
    """Cover a row with as few patterns as possible."""
    width = geometry.out_width
    intervals = [geometry.taps(1, x) for x in range(width)]
    plan = _plan(intervals, min(pixels, width), 0, width)
    if len(plan.patterns) <= MAX_PATTERNS:
        return plan
    inside = [x for x, taps in enumerate(intervals) if taps == (0, geometry.kernel[1])]
    if not inside or inside[-1] - inside[0] + 1 != len(inside):
        return RowPlan(1, 0, 0, {})
    return _plan(intervals, min(pixels, len(inside)), inside[0], inside[-1] + 1)


def _plan(intervals, pixels, begin, end):
    patterns = {}
    for tile in range(-(-(end - begin) // pixels)):
        start = min(begin + tile * pixels, end - pixels)
        patterns.setdefault(tuple(intervals[start : start + pixels]), []).append(tile)
    return RowPlan(pixels, begin, end, patterns)
