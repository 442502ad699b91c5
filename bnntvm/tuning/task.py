"""A kernel to tune. Imports no compiler: processes that only measure read these, too."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from bnntvm.schedules import families


@dataclass(frozen=True)
class Operand:
    """An operand of a kernel: a constant of the network, or an activation of which only the shape is known (dynamic dimensions are 1).

    ``array`` is None for activations; ``weights`` marks the operand that the family packs, its array is the canonical one. ``growth``: what
    every image behind the first adds to the extents; empty where the batch has a size.
    """

    shape: tuple
    dtype: str
    array: np.ndarray | None = None
    weights: bool = False
    growth: tuple = ()

    def at(self, images):
        """Shape for so many images."""
        return tuple(extent + more * (images - 1) for extent, more in zip(self.shape, self.growth or (0,) * len(self.shape)))

    @property
    def batched(self):
        """Whether another image is more of the leading dimension."""
        return any(self.growth)


@dataclass(frozen=True, eq=False)
class Task:
    """A kernel to tune.

    Attributes
    ----------
    id, key : str
        See :mod:`.workload`.
    family : str
        Name of the kernel family.
    spec : dataclass
    isa : Isa
    operands : tuple of Operand
        Operands of the anchor, then inputs of the epilogue.
    outputs : tuple of Operand
    layers : list of str
        Where it occurs in the network; layers without a name of their own are named by the kernel.
    """

    id: str
    key: str
    family: str
    spec: object
    isa: object
    operands: tuple
    outputs: tuple
    layers: list = field(default_factory=list)

    @property
    def module(self):
        """The kernel family."""
        return families.of(self.spec, self.isa)

    @property
    def batched(self):
        """Whether the kernel takes batches of any size, image after image along the leading dimension of whatever has more of them."""
        growing = [one for one in (*self.operands, *self.outputs) if one.batched]
        return bool(growing) and all(one.growth == (one.shape[0], *[0] * (len(one.shape) - 1)) for one in growing)

    @property
    def weights_at(self):
        """Number of the operand that the family packs; -1 if there is none."""
        return next((i for i, operand in enumerate(self.operands) if operand.weights), -1)

    @property
    def name(self):
        """A short name, unique in a network."""
        return f"{self.family} {self.describe()} {self.id[:4]}"

    def describe(self):
        """Sizes that a user recognises."""
        return describe(self.spec, self.operands[0].shape[0])


def describe(spec, rows=1):
    """Sizes of a specification in a few characters."""
    window = getattr(spec, "window", None)
    channels = getattr(spec, "in_channels", getattr(spec, "in_features", getattr(spec, "channels", None)))
    out = getattr(spec, "out_channels", getattr(spec, "out_features", None))
    size = f"{window.kernel[0]}x{window.kernel[1]} {window.in_height}x{window.in_width} " if window else f"{rows} " if rows > 1 else ""
    if hasattr(spec, "spatial") and len(spec.spatial) == 2 and spec.spatial != (1, 1):
        size += "x".join(str(s) for s in spec.spatial) + " "
    if hasattr(spec, "rows"):
        size += f"{spec.rows}x{spec.columns} "
    stride = f" /{window.strides[0]}" if window and window.strides != (1, 1) else ""
    many = isinstance(channels, tuple)
    ends = "+".join(map(str, channels)) if many else "" if channels is None else f"{channels}" + (f"-{out}" if out else "")
    return (size + ends + stride).strip()
