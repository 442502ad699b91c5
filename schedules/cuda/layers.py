"""What the families of layers of bits share on a GPU: their schedules, and which kernel one means."""

from __future__ import annotations

from dataclasses import dataclass

from bnntvm.schedules.cuda import cores
from bnntvm.schedules.cuda.layer import Layer

CORES = "cores"


@dataclass(frozen=True)
class Schedule:
    """What may be tuned.

    Attributes
    ----------
    engine : str
        ``cores``: population counts, see :mod:`.cores`.
    pixels : int
        Pixels (rows of a dense layer) of a warp on CUDA cores.
    """

    engine: str
    pixels: int


def default_schedule(spec, isa):
    """A schedule that is fast without tuning."""
    return Schedule(CORES, _core_pixels(Layer.of(spec)))


def _core_pixels(layer):
    """Four pixels share each word of weights that is loaded; where there are few of them, a single one keeps more warps busy."""
    return 1 if layer.is_dense or layer.out_pixels < 64 else 4


def space(spec, isa):
    """Schedules worth trying, the default first."""
    return list(dict.fromkeys([default_schedule(spec, isa), *(Schedule(CORES, p) for p in (1, 2, 4, 8))]))


def pack_weights(spec, schedule, isa, weights):
    """Weights in the kernel's layout, with the constants that belong to them; ``weights`` is uint32[Q', O, kh, kw, words]."""
    return cores.pack_weights(Layer.of(spec), weights)


def build(spec, schedule, isa, name):
    """The kernel."""
    return cores.Kernel(Layer.of(spec), schedule.pixels, name).function()
