"""What there is to tune in a network: its distinct kernels, with real weights and constants to check candidates against."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from tvm import relax

from bnntvm.graph import bindings, constant, dims, dtype, op_name
from bnntvm.importer import import_model
from bnntvm.lower import Lower
from bnntvm.pipeline import optimise
from bnntvm.schedules import families
from bnntvm.tuning.records import task_id
from bnntvm.tuning.workload import family_name, key_of, rows_of


@dataclass(frozen=True)
class Operand:
    """An operand of a kernel: a constant of the network, or an activation of which only the shape is known (dynamic dimensions are 1).

    ``array`` is None for activations; ``weights`` marks the operand that the family packs, its array is the canonical one.
    """

    shape: tuple
    dtype: str
    array: np.ndarray | None = None
    weights: bool = False


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
        return families.of(self.spec)

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


class _Collector(Lower):
    """Lowers a network and notes what every kernel was called with."""

    def __init__(self, isa):
        super().__init__(isa)
        self.tasks, self.names = {}, {}  # by id; id of every kernel, by its name

    def call(self, spec, operands, types, weights, layer=None):
        family = families.of(spec)
        shape = dims(operands[0])
        key = key_of(family, spec, rows_of(shape))
        name = task_id(key)
        if name not in self.tasks:
            seen = tuple(_operand(o, weights) for o in operands)
            outputs = tuple(Operand(_static(t.shape), str(t.dtype)) for t in types)
            self.tasks[name] = Task(name, key, family_name(family), spec, self.isa, seen, outputs)
        out = super().call(spec, operands, types, weights, layer)
        self.tasks[name].layers.append(layer or f"{family_name(family)} {len(self.tasks[name].layers)}")
        self.names[self.cache[spec, self.choose(family, spec, self.isa, shape)][1].name] = name
        return out


def _static(shape):
    return tuple(rows_of((extent,)) for extent in shape)


def _operand(arg, weights):
    if arg is None:
        return Operand(weights.shape, str(weights.dtype), weights, True)
    array = None if isinstance(arg, relax.Var) else constant(arg)
    return Operand(_static(dims(arg)), dtype(arg), array)


def extract(model, isa, *, assume_nonzero=False, weight_tolerance=0.0):
    """The distinct kernels of a network.

    Parameters
    ----------
    model : str, path, bytes or onnx.ModelProto
    isa : Isa

    Returns
    -------
    list of Task
        In the order of the network.
    """
    imported = import_model(model)
    mod = optimise(imported.mod, {}, assume_nonzero=assume_nonzero, weight_tolerance=weight_tolerance)
    collector = _Collector(isa)
    # What a kernel reads in another order than it was made in leaves a transpose that nothing reads.
    main = relax.transform.DeadCodeElimination()(collector.run(mod))["main"]
    live = {collector.names.get(b.value.args[0].name_hint) for b in bindings(main) if op_name(b.value) == "relax.call_tir"}
    return [task for name, task in collector.tasks.items() if name in live]
