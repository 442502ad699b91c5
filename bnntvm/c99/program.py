"""What is written as C: steps in order, and the tensors between them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from tvm import tirx


@dataclass(eq=False)
class Buffer:
    """A tensor.

    Attributes
    ----------
    shape : tuple of int
    dtype : str
    role : str
        ``input``, ``output``, ``constant`` or ``workspace``.
    data : ndarray, optional
        Of constants.
    """

    shape: tuple
    dtype: str
    role: str = "workspace"
    data: np.ndarray | None = None

    @property
    def bytes(self):
        """Size in memory; a bool takes one byte."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Loose:
    """An operator that no kernel family takes: name and TensorIR function of TVM's legalisation."""

    name: str
    function: tirx.PrimFunc = field(compare=False)


@dataclass(eq=False)
class Step:
    """One call: ``what`` is a specification, a :class:`Loose` operator, or ``copy``; ``origin`` names the operator for messages."""

    what: object
    reads: list
    writes: list
    origin: str = ""
    scratch: list = field(default_factory=list)


@dataclass
class Program:
    """Inputs and outputs in the order of the model, steps in the order in which they run."""

    inputs: list = field(default_factory=list)
    outputs: list = field(default_factory=list)
    steps: list = field(default_factory=list)
