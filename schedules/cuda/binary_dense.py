"""Dense layers of bit planes (:class:`bnntvm.spec.BinaryDense`) on a GPU, see :mod:`.layers`."""

from __future__ import annotations

from bnntvm.schedules.binary_dense import reference
from bnntvm.schedules.cuda import layers
from bnntvm.schedules.cuda.layers import Schedule, default_schedule, space

__all__ = ["Schedule", "build", "default_schedule", "pack_weights", "reference", "space"]


def pack_weights(spec, schedule, isa, weights):
    """Weights in the kernel's layout.

    Parameters
    ----------
    weights : uint32[N, words(K)]

    Returns
    -------
    uint32[elements]
    """
    return layers.pack_weights(spec, schedule, isa, weights[None, :, None, None])


def build(spec, schedule, isa):
    """The kernel; parameters as of its namesake for processors."""
    return layers.build(spec, schedule, isa, "binary_dense")
