"""Where the operands of an 8-bit kernel lie in memory.

The image is copied into scratch memory, zero padding included, where every tap of the kernel is a constant distance away for every output
pixel: output row y and column x is *flat pixel* ``f = y * pitch + x``, and tap t of it is the pixel ``f + shift[t]``.
Neighbouring rows share the padding between them. Strides take the image apart into phases, one image for each remainder of the row and
column numbers, so that they too are walked pixel by pixel. The flat pixels between the rows are computed and not used.

A *run* is a stretch of the reduction that is contiguous in scratch memory: the taps of a kernel row side by side, else one tap. Its length
is counted in quads, four input channels, the unit that every instruction for 8-bit products shares, and rounded up to what the kernel reads
at a time; the weights are zero there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from bnntvm.spec import WORD_BITS, Window

QUAD = 4
BLOCK = WORD_BITS


def round_up(value, unit):
    """The least multiple of ``unit`` that is not below ``value``."""
    return -(-value // unit) * unit


@dataclass(frozen=True)
class Run:
    """``shift`` pixels from a flat pixel in phase ``phase`` the run of a kernel row (or of one tap) begins."""

    phase: int
    shift: int


@dataclass(frozen=True)
class Layout:
    """Scratch memory of an image.

    Attributes
    ----------
    window : Window
    channels : int
        Input channels.
    step : int
        Bytes of a run that are read at a time: 4, or 64 for tiles.
    cover : int
        Flat pixels that are computed together.
    """

    window: Window
    channels: int
    step: int
    cover: int

    @property
    def dilations(self):
        return tuple(1 if k == 1 else d for k, d in zip(self.window.kernel, self.window.dilations))

    @cached_property
    def contiguous(self):
        """Whether the taps of a kernel row are one run."""
        kernel, depth = self.window.kernel[1], round_up(self.channels, QUAD)
        if self.window.strides[1] != 1 or self.dilations[1] != 1 or kernel == 1:
            return False
        saved = kernel * round_up(depth, self.step) - round_up(kernel * depth, self.step)
        return saved > 0 or self.step == QUAD  # pixels that are read one by one may lie at any distance

    @cached_property
    def pixel(self):
        """Bytes from one pixel to the next. A large power of two would put the pixels of a tile into the same few sets of the cache."""
        if self.contiguous:
            return round_up(self.channels, QUAD)
        depth = round_up(self.channels, self.step)
        return depth + self.step if self.step == 64 and depth % 256 == 0 else depth

    @cached_property
    def quads(self):
        """Quads of a run that hold channels."""
        return round_up(self.channels, QUAD) // QUAD * (self.window.kernel[1] if self.contiguous else 1)

    @property
    def steps(self):
        """Steps of a run."""
        return -(-self.quads * QUAD // self.step)

    def _tap(self, axis, tap):
        """(phase, shift) of a tap along an axis."""
        return (tap * self.dilations[axis]) % self.window.strides[axis], (tap * self.dilations[axis]) // self.window.strides[axis]

    @cached_property
    def phases(self):
        """Phases that some tap reads, as (row, column) remainders."""
        return tuple(
            sorted({(self._tap(0, r)[0], self._tap(1, s)[0]) for r in range(self.window.kernel[0]) for s in range(self.window.kernel[1])})
        )

    @cached_property
    def pitch(self):
        """Flat pixels from one row to the next."""
        w, (_, left, _, _) = self.window, self.window.pads
        reach = (w.kernel[1] - 1) * self.dilations[1]
        if w.strides[1] > 1:
            return w.out_width + reach // w.strides[1]
        right = max(0, w.out_width + reach - left - w.in_width)
        return max(w.in_width + max(left, right) if left or right else w.in_width, w.out_width)

    @cached_property
    def lines(self):
        """Rows of a phase."""
        return self.rows + (self.window.kernel[0] - 1) * self.dilations[0] // self.window.strides[0]

    @property
    def rows(self):
        """Output rows."""
        return self.window.out_height

    @property
    def tiles(self):
        """Tiles of flat pixels."""
        return -(-self.flat // self.cover)

    @property
    def flat(self):
        """Flat pixels."""
        return (self.rows - 1) * self.pitch + self.window.out_width

    @cached_property
    def phase_bytes(self):
        """Bytes of a phase, with room for what is read past its end."""
        most = max(run.shift for run in self._runs())
        pixels = max(self.flat + self.cover + most, self.lines * self.pitch + self.window.pads[1] + self.pitch)
        return round_up((pixels + 1) * self.pixel + self.steps * self.step, 64)

    @property
    def bytes(self):
        return self.phase_bytes * len(self.phases)

    def _runs(self):
        height, width = self.window.kernel
        for r in range(height):
            row_phase, row_shift = self._tap(0, r)
            for s in range(1 if self.contiguous else width):
                phase, shift = self._tap(1, s)
                yield Run(self.phases.index((row_phase, phase)), row_shift * self.pitch + shift)

    @cached_property
    def runs(self):
        """The runs in the order of the weights, kernel rows before columns."""
        return tuple(self._runs())

    @cached_property
    def offsets(self):
        """Bytes from a flat pixel to each of its runs."""
        return tuple(run.phase * self.phase_bytes + run.shift * self.pixel for run in self.runs)


def weight_quads(layout, weights, lanes):
    """Weights in the order in which kernels read them.

    Parameters
    ----------
    layout : Layout
    weights : int8[O, kh, kw, I]
    lanes : int
        32-bit lanes of a vector.

    Returns
    -------
    int8[blocks, runs, quads, 32 / lanes, lanes * 4]
        A vector holds four input channels of ``lanes`` output channels side by side; channels that do not exist are 0.
    """
    import numpy as np

    outputs, height, width, channels = weights.shape
    blocks, depth = -(-outputs // BLOCK), round_up(channels, QUAD)
    padded = np.zeros((blocks * BLOCK, height, width, depth), np.int8)
    padded[:outputs, ..., :channels] = weights
    runs = padded.reshape(blocks, BLOCK // lanes, lanes, len(layout.runs), layout.quads, QUAD)
    return np.ascontiguousarray(runs.transpose(0, 3, 4, 1, 2, 5)).reshape(
        blocks, len(layout.runs), layout.quads, BLOCK // lanes, lanes * QUAD
    )
