"""Convolution of packed bit planes (:class:`bnntvm.spec.BinaryConv2d`) on a GPU, see :mod:`.layers`."""

from __future__ import annotations

from bnntvm.schedules.binary_conv2d import reference
from bnntvm.schedules.cuda import layers
from bnntvm.schedules.cuda.layers import Schedule, default_schedule, space

__all__ = ["Schedule", "build", "default_schedule", "pack_weights", "reference", "space"]


def pads_with_ones(spec, isa):
    """Padding with +1 costs nothing: the words outside the image are 0 all the same, and only the constants differ."""
    return spec.groups == 1 and not (spec.zeros or spec.unipolar)


def stores_planar(spec, isa):
    """Whether the kernel can store its one result in channel order (output kind ``planar``)."""
    return [o.kind for o in spec.epilogue.outputs] == ["tensor"]


def pack_weights(spec, schedule, isa, weights):
    """Weights in the kernel's layout.

    Parameters
    ----------
    weights : uint32[O, kh, kw, words(in_channels / groups)]

    Returns
    -------
    uint32[elements]
    """
    return layers.pack_weights(spec, schedule, isa, weights[None])


def build(spec, schedule, isa):
    """The kernel; parameters as of its namesake for processors."""
    return layers.build(spec, schedule, isa, "binary_conv2d")
