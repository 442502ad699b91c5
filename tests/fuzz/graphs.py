"""The network under construction, and what is known about its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import helper

#: A float32 holds every multiple of 2**grain up to 2**(grain + 24); one bit is left for intermediate sums.
EXACT_BITS = 22
#: Tensors larger than this many elements per image are pooled, not convolved further.
MAX_ELEMENTS = 1 << 13

QONNX = "qonnx.custom_op.general"

LAYERS = {}


def layer(weight):
    """Register the decorated function ``f(graph, x) -> Tensor or None`` as a kind of layer that is drawn in proportion to ``weight``."""

    def register(function):
        LAYERS[function.__name__] = (function, weight)
        return function

    return register


@dataclass(frozen=True)
class Tensor:
    """A tensor of the network: its name, shape (batch first), and what is known about its values."""

    name: str
    shape: tuple
    bound: float
    grain: int
    levels: frozenset | None = None

    @property
    def rank(self):
        return len(self.shape)

    @property
    def channels(self):
        return self.shape[1]

    @property
    def exact(self):
        return self.bound <= 2.0 ** (self.grain + EXACT_BITS)


@dataclass
class Graph:
    """A network under construction.

    Attributes
    ----------
    opset : int
    side : dict
        Number of a node -> "model" or "reference" where only one of them has it: what ONNX Runtime lacks is spelled out for it.
    functions : list of onnx.FunctionProto
    binary : set of str
        Outputs of the layers that have to be binary: one plane times one plane.
    low : set of str
        Outputs of the layers that have to be computed on low bits in any way.
    packed : set of str
        Outputs of the layers whose weights, at least, have to be packed.
    log : list of str
        One line per layer, for people.
    """

    rng: np.random.Generator
    batch: object
    nodes: list = field(default_factory=list)
    constants: dict = field(default_factory=dict)
    history: list = field(default_factory=list)
    outputs: list = field(default_factory=list)
    binary: set = field(default_factory=set)
    low: set = field(default_factory=set)
    packed: set = field(default_factory=set)
    opset: int = 17
    numbered: int = 0
    side: dict = field(default_factory=dict)
    functions: list = field(default_factory=list)
    log: list = field(default_factory=list)

    def op(self, kind, inputs, count=1, **attributes):
        """Add a node; inputs are Tensors, names or arrays. Returns its output's name (a list of names if ``count`` is not 1)."""
        names = [self.const(v) if isinstance(v, np.ndarray) else getattr(v, "name", v) for v in inputs]
        if kind in ("ReduceMean", "ReduceMax") and self.opset >= 18:  # axes became an input
            names.append(self.const(np.array(attributes.pop("axes"), np.int64)))
        if kind == "Split" and self.opset >= 18:
            attributes["num_outputs"] = count
        outputs = [f"v{len(self.nodes)}" + (f"_{i}" if count > 1 else "") for i in range(count)]
        self.nodes.append(helper.make_node(kind, names, outputs, name=f"{kind}_{len(self.nodes)}", **attributes))
        return outputs[0] if count == 1 else outputs

    def either(self, model, reference):
        """The value that the model computes by the nodes that ``model()`` adds, and the reference by those of ``reference()``. Its name."""
        results = []
        for side, make in (("reference", reference), ("model", model)):
            at = len(self.nodes)
            results.append(make())
            self.side |= dict.fromkeys(range(at, len(self.nodes)), side)
        self.nodes[-1].output[0] = results[0]
        return results[0]

    def small_const(self, values, kind, shape):
        """Name of a constant of a type that numpy lacks."""
        name = self.constant_name()
        self.constants[name] = helper.make_tensor(name, kind, shape, values)
        return name

    def const(self, array):
        for name, known in self.constants.items():  # exporters share equal constants
            same = isinstance(known, np.ndarray) and known.dtype == array.dtype and known.shape == array.shape
            if same and np.array_equal(known, array) and not np.signbit(array).any():
                return name
        name = self.constant_name()
        self.constants[name] = array
        return name

    def constant_name(self):
        self.numbered += 1
        return f"c{self.numbered - 1}"

    def f(self, value):
        """A scalar constant."""
        return np.array(value, np.float32)

    def chance(self, p):
        return self.rng.random() < p

    def pick(self, *options):
        return options[int(self.rng.integers(len(options)))]

    def per_channel(self, x, draw):
        """float32 constant broadcast over the channels of ``x``: [1, C, 1, 1], [C, 1, 1] or a scalar; seldom one number per element."""
        if self.chance(0.07):
            return np.asarray(draw((1, *x.shape[1:])), np.float32)
        if self.chance(0.2):
            return np.array(draw(()), np.float32)
        lead = (1,) if self.chance(0.5) or x.rank == 2 else ()
        return np.asarray(draw((x.channels,)), np.float32).reshape(*lead, x.channels, *[1] * (x.rank - 2))

    def after(self, name, x, bound, grain, function=None):
        """A tensor of the shape of ``x``; its levels are ``function`` of those of ``x``."""
        levels = None
        if x.levels is not None and function is not None:
            made = frozenset(float(v) + 0.0 for level in x.levels for v in np.atleast_1d(function(np.float32(level))))
            levels = made if len(made) <= 16 else None
        return Tensor(name, x.shape, bound, grain, levels)
