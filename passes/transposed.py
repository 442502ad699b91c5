"""A transposed convolution as ordinary convolutions, one for each residue of the output position modulo the stride.

Along one axis, y[p] = sum over i, k with i * stride + k * dilation = p + pad of x[i] * w[k]. Write p + pad = stride * t + r with 0 <= r <
stride. Only the taps with k * dilation = r (mod stride) meet y[p], and for these y[p] = sum_k w[k] x[t - (k * dilation - r) / stride]: a
convolution of stride 1 with every (stride / gcd)-th tap, reversed. No zero is inserted into the image, so two-level activations stay
two-level, and no product with an inserted zero is computed (sub-pixel convolution: Shi et al. 2016, "Is the deconvolution layer the same
as a convolutional layer?").
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np


@dataclass(frozen=True)
class Phase:
    """The convolution of one residue along one axis.

    Attributes
    ----------
    taps : tuple of int
        Indices into the transposed kernel, in the order of a correlation; empty if none meets this residue inside the image.
    dilation : int
    pads : tuple of int
        Zeros before and after the axis; a negative number drops elements.
    """

    taps: tuple
    dilation: int
    pads: tuple


@dataclass(frozen=True)
class Axis:
    """All residues of one axis: interleaving their outputs and keeping ``size`` elements from ``first`` on gives the result."""

    phases: tuple
    first: int
    size: int

    @property
    def length(self):
        """Number of outputs of each phase."""
        return -(-(self.first + self.size) // len(self.phases))


def split_axis(size, kernel, stride, dilation, pads, output_padding):
    """Take one axis of a transposed convolution apart.

    Parameters
    ----------
    size, kernel, stride, dilation, output_padding : int
    pads : (int, int)
        As ONNX ConvTranspose has them: elements dropped from the full result at both ends.

    Returns
    -------
    Axis
    """
    begin, end = pads
    out = (size - 1) * stride + output_padding + (kernel - 1) * dilation + 1 - begin - end
    low, high = begin // stride, (begin + out - 1) // stride
    phases = []
    for residue in range(stride):
        taps = [k for k in range(kernel) if (k * dilation - residue) % stride == 0]
        nearest, farthest = ((k * dilation - residue) // stride for k in (taps[0], taps[-1])) if taps else (0, 0)
        before, after = farthest - low, high - nearest - (size - 1)
        if not taps or min(before, after) <= -size:  # windows that meet no tap, or lie beside the image
            phases.append(Phase((), 1, (0, 0)))
        else:
            phases.append(Phase(tuple(taps[::-1]), dilation // gcd(stride, dilation), (before, after)))
    return Axis(tuple(phases), begin - low * stride, out)


def correlation_weights(weight, groups):
    """Weights of ConvTranspose [C, O/groups, kh, kw] as [O, kh, kw, C/groups] (taps not yet chosen)."""
    channels, per_group, *kernel = weight.shape
    grouped = weight.reshape(groups, channels // groups, per_group, *kernel)
    return np.ascontiguousarray(grouped.transpose(0, 2, 3, 4, 1).reshape(groups * per_group, *kernel, channels // groups))
