"""Random binarised networks as ONNX, in arithmetic that is exact.

Every number in such a network is a small multiple of a power of two, so that no operation rounds, whatever the order of summation, and
ONNX Runtime's result has to be met bit for bit. The generator follows every tensor with a bound, a grain (all values are multiples of
``2**grain``) and, where they are few, the values that it can hold; a layer that would leave the exact range is not added.

A network is told by a seed and the numbers of its layers: layer ``i`` draws its kind and parameters from ``default_rng([seed, i])`` and
fits itself to the tensor it is put on. So any subset of the layers is a network too, which is what makes minimising a failure simple.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
#: A float32 holds every multiple of 2**grain up to 2**(grain + 24); one bit is left for intermediate sums.
EXACT_BITS = 22
#: Tensors larger than this many elements per image are pooled, not convolved further.
MAX_ELEMENTS = 1 << 13

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
    binary : set of str
        Outputs of the layers that have to be computed on bits.
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
    log: list = field(default_factory=list)

    def op(self, kind, inputs, count=1, **attributes):
        """Add a node; inputs are Tensors, names or arrays. Returns its output's name (a list of names if ``count`` is not 1)."""
        names = [self.const(v) if isinstance(v, np.ndarray) else getattr(v, "name", v) for v in inputs]
        outputs = [f"v{len(self.nodes)}" + (f"_{i}" if count > 1 else "") for i in range(count)]
        self.nodes.append(helper.make_node(kind, names, outputs, name=f"{kind}_{len(self.nodes)}", **attributes))
        return outputs[0] if count == 1 else outputs

    def const(self, array):
        for name, known in self.constants.items():  # exporters share equal constants
            if known.dtype == array.dtype and known.shape == array.shape and np.array_equal(known, array) and not np.signbit(array).any():
                return name
        name = f"c{len(self.constants)}"
        self.constants[name] = array
        return name

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
            levels = made if len(made) <= 4 else None
        return Tensor(name, x.shape, bound, grain, levels)


@dataclass(frozen=True)
class Network:
    """A finished network: the model, inputs for it, and what must hold."""

    model: onnx.ModelProto
    feed: dict
    binary: frozenset
    layers: tuple
    log: tuple


def generate(seed, layers=None):
    """The network of ``seed``; ``layers``: the numbers of the layers to keep (default: all)."""
    start = np.random.default_rng([seed, 1 << 20])
    batch = int(start.integers(1, 4))
    dynamic = bool(start.random() < 0.5)
    graph = Graph(start, "N" if dynamic else batch)
    rank = int(start.choice([2, 3, 4], p=[0.15, 0.1, 0.75]))
    channels = int(start.choice([1, 2, 3, 5, 8, 16, 31, 32, 33, 40, 64, 70, 128, 200]))
    size = [int(start.integers(1, 10 if start.random() < 0.8 or channels > 70 else 24)) for _ in range(rank - 2)]
    x = Tensor("x", (batch, channels, *size), 4.0, -2)
    graph.history.append(x)
    kinds, weights = list(LAYERS), np.array([w for _, w in LAYERS.values()], float)
    drawn = range(int(start.integers(4, 32)))
    layers = tuple(drawn if layers is None else layers)
    for number in layers:
        graph.rng = np.random.default_rng([seed, number])
        kind = kinds[int(graph.rng.choice(len(kinds), p=weights / weights.sum()))]
        made = add(graph, LAYERS[kind][0], x)
        if made is not None:
            graph.log.append(f"{number}: {kind} {list(x.shape)} -> {list(made.shape)} as {made.name}")
            x = made
            graph.history.append(x)
            if graph.chance(0.08) and x.name not in [*graph.outputs, "x"]:
                graph.outputs.append(x.name)
    graph.rng = start
    if x.name == "x":
        x = replace(x, name=graph.op("Identity", [x]))
    outputs = [*[o for o in graph.outputs if o != x.name], x.name]
    feed = {"x": _images(start, batch, channels, size)}
    return Network(_model(graph, dynamic, batch, outputs), feed, frozenset(graph.binary), layers, tuple(graph.log))


def add(graph, function, x):
    """Add a layer unless it does not fit or leaves the exact range (then the graph is as before)."""
    nodes, outputs = len(graph.nodes), len(graph.outputs)
    constants, binary = dict(graph.constants), set(graph.binary)
    made = function(graph, x)
    if made is not None and made.exact and all(d > 0 for d in made.shape):
        return made
    del graph.nodes[nodes:], graph.outputs[outputs:]
    graph.constants, graph.binary = constants, binary
    return None


def _images(rng, batch, channels, size):
    """Multiples of 1/4 in [-4, 4], many exact zeros of both signs."""
    x = rng.integers(-16, 17, (batch, channels, *size)) / 4
    x = np.where(rng.random(x.shape) < 0.15, 0.0, x)
    return np.where(rng.random(x.shape) < 0.05, -0.0, x).astype(np.float32)


def _model(graph, dynamic, batch, outputs):
    shapes = {t.name: t.shape for t in graph.history}
    shape = ["N" if dynamic else batch, *shapes["x"][1:]]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    results = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
    constants = [numpy_helper.from_array(array, name) for name, array in graph.constants.items()]
    made = helper.make_graph(graph.nodes, "fuzz", inputs, results, constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 8
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    for mine, found in zip(model.graph.output, inferred.graph.output):
        mine.CopyFrom(found)
    return model


# ---- quantisers


def _two(x, name, low=-1.0, high=1.0, zero=False):
    levels = {low, high} | ({0.0} if zero else set())
    whole = float(low).is_integer() and float(high).is_integer()
    return Tensor(name, x.shape, max(abs(low), abs(high)), 0 if whole else -2, frozenset(levels))


def _as_signs(g, bit):
    """2 * float(bit) - 1 in one of its forms."""
    value = g.op("Cast", [bit], to=TensorProto.FLOAT)
    if g.chance(0.3):
        return g.op("Mul", [g.op("Sub", [value, g.f(0.5)]), g.f(2)])
    return g.op("Sub", [g.op("Mul", [value, g.f(2)]), g.f(1)])


def plain_sign(g, x):
    return _two(x, g.op("Sign", [x]), zero=True)


def clipped_sign(g, x):
    return _two(x, g.op("Sign", [g.op("Clip", [x, g.f(-1), g.f(1)])]), zero=True)


def tanh_sign(g, x):
    return _two(x, g.op("Sign", [g.op("Tanh", [x])]), zero=True)


def scaled_sign(g, x):
    scale = g.pick(1.0, 0.5, 2.0, -1.0)
    return _two(x, g.op("Sign", [g.op(g.pick("Mul", "Div"), [x, g.f(scale)])]), zero=True)


def straight_through(g, x):
    """(sign(x) - x) + x: ternary; not on bits unless |x| is known to be small."""
    sign, kind = g.op("Sign", [x]), g.pick("sub", "neg", "minus", "clip")
    if kind == "clip":
        inner = g.op("Clip", [x, g.f(-1), g.f(1)])
        out = g.op("Add", [g.op("Sub", [sign, inner]), inner])
        return _two(x, out, zero=True)
    if kind == "sub":
        out = g.op("Add", [g.op("Sub", [sign, x]), x])
    elif kind == "neg":
        out = g.op("Add", [x, g.op("Add", [g.op("Neg", [x]), sign])])
    else:
        out = g.op("Sub", [x, g.op("Sub", [x, sign])])
    return replace(_two(x, out, zero=True), levels=None)


def qkeras(g, x):
    sign = g.op("Sign", [x])
    code = g.op("Add", [sign, g.op("Sub", [g.f(1), g.op("Abs", [sign])])])
    inner = g.op("Clip", [x, g.f(-1), g.f(1)]) if g.chance(0.5) else x
    out = g.op("Add", [inner, g.op("Add", [g.op("Neg", [inner]), g.op("Mul", [g.f(1), code])])])
    made = _two(x, out)
    return made if inner is not x else replace(made, levels=None)


def polynomial(g, x):
    """Bi-Real net's approximation of sign, cancelled."""
    if x.bound**2 + 2 * x.bound > 2.0 ** (2 * x.grain + EXACT_BITS):
        return plain_sign(g, x)
    sign = g.op("Sign", [x])
    masks = [g.op("Cast", [g.op("Less", [x, g.f(t)])], to=TensorProto.FLOAT) for t in (-1, 0, 1)]

    def select(mask, yes, no):
        rest = g.op("Sub", [g.f(1), mask])
        return g.op("Add", [g.op("Mul", [yes, mask]), g.op("Mul", [no, rest])])

    square, double = g.op("Mul", [x, x]), g.op("Mul", [x, g.f(2)])
    rising = g.op("Add", [square, double])
    falling = g.op("Add", [g.op("Mul", [square, g.f(-1)]), double])
    out = select(masks[0], g.f(-1), rising)
    out = select(masks[1], out, falling)
    out = select(masks[2], out, g.f(1))
    return replace(_two(x, g.op("Add", [g.op("Sub", [sign, out]), out]), zero=True), levels=None)


def compared(g, x):
    kind, t = g.pick("GreaterOrEqual", "Greater", "Less", "LessOrEqual"), g.f(g.pick(0, 0, 0.5, -1))
    operands = [t, x] if g.chance(0.3) else [x, t]
    bit = g.op(kind, operands)
    if g.chance(0.3):
        bit = g.op("Not", [bit])
    return _two(x, _as_signs(g, bit))


def compared_per_channel(g, x):
    t = g.per_channel(x, lambda s: g.rng.integers(-4, 5, s) / 4)
    return _two(x, _as_signs(g, g.op(g.pick("GreaterOrEqual", "Greater", "Less"), [x, t])))


def selected(g, x):
    kind, (a, b) = g.pick("GreaterOrEqual", "Greater", "Less", "LessOrEqual"), g.pick((1, -1), (-1, 1), (1, 0), (0, 1), (0.5, -0.5))
    bit = g.op(kind, [x, g.f(0)])
    yes, no = g.f(a), g.f(b)
    if g.chance(0.2):
        yes, no = np.full((1, *x.shape[1:]), a, np.float32), np.full((1, *x.shape[1:]), b, np.float32)
    return _two(x, g.op("Where", [bit, yes, no]), min(a, b), max(a, b))


def arithmetic_select(g, x):
    bit = g.op("GreaterOrEqual", [x, g.f(0)])
    yes, no = (g.op("Cast", [b], to=TensorProto.FLOAT) for b in (bit, g.op("Not", [bit])))
    return _two(x, g.op("Add", [g.op("Mul", [yes, g.f(1)]), g.op("Mul", [no, g.f(-1)])]))


def larq(g, x):
    return _two(x, g.op("Sign", [g.op("Add", [g.op("Sign", [x]), g.f(0.1)])]))


def zero_fix(g, x):
    sign = g.op("Sign", [x])
    return _two(x, g.op("Add", [sign, g.op("Cast", [g.op("Equal", [sign, g.f(0)])], to=TensorProto.FLOAT)]))


def heaviside(g, x):
    low = g.op("Where", [g.op("Less", [x, g.f(0)]), g.f(0), g.f(1)])
    fixed = g.op("Where", [g.op("Equal", [x, g.f(0)]), g.f(g.pick(0, 1)), low])
    return _two(x, g.op("Sub", [g.op("Mul", [fixed, g.f(2)]), g.f(1)]))


def hard_sigmoid_round(g, x):
    half = g.op("Div", [g.op("Add", [x, g.f(1)]), g.f(2)])
    return _two(x, g.op("Sub", [g.op("Mul", [g.op("Round", [g.op("Clip", [half, g.f(0), g.f(1)])]), g.f(2)]), g.f(1)]))


def unipolar(g, x):
    kind = g.pick("relu", "clip", "cast", "round")
    if kind == "relu":
        out = g.op("Sign", [g.op("Relu", [x])])
    elif kind == "clip":
        out = g.op("Sign", [g.op("Clip", [x, g.f(0), g.f(1)])])
    elif kind == "cast":
        out = g.op("Cast", [g.op("Greater", [x, g.f(0)])], to=TensorProto.FLOAT)
    else:
        out = g.op("Round", [g.op("Clip", [x, g.f(0), g.f(1)])])
    return _two(x, out, 0.0, 1.0)


def ternary(g, x):
    over = g.op(g.pick("GreaterOrEqual", "Greater"), [g.op("Abs", [x]), g.f(g.pick(0.5, 1, 3))])
    return _two(x, g.op("Mul", [g.op("Cast", [over], to=TensorProto.FLOAT), g.op("Sign", [x])]), zero=True)


def four_levels(g, x):
    out = g.op("Round", [g.op("Clip", [x, g.f(0), g.f(3)])])
    return Tensor(out, x.shape, 3.0, 0, frozenset({0.0, 1.0, 2.0, 3.0}))


def versus(g, x):
    """Compared with another activation, or with its own mean over a power of two many channels."""
    others = [t for t in g.history if t.shape == x.shape]
    if x.rank == 4 and x.channels & (x.channels - 1) == 0 and x.bound * x.channels < 2.0 ** (x.grain + EXACT_BITS) and g.chance(0.3):
        other = g.op("ReduceMean", [x], axes=[1], keepdims=1)
    elif others:
        other = g.pick(*others)
    else:
        return plain_sign(g, x)
    bit = g.op(g.pick("Greater", "GreaterOrEqual", "Less"), g.pick([x, other], [other, x]))
    return _two(x, _as_signs(g, bit) if g.chance(0.5) else g.op("Where", [bit, g.f(1), g.f(-1)]))


QUANTISERS = (
    plain_sign, plain_sign, plain_sign, clipped_sign, tanh_sign, scaled_sign, straight_through, qkeras, polynomial, compared,
    compared_per_channel, selected, selected, arithmetic_select, larq, larq, zero_fix, heaviside, hard_sigmoid_round, unipolar, ternary,
    four_levels, versus,
)  # fmt: skip


@layer(10)
def quantise(g, x):
    return g.pick(*QUANTISERS)(g, x)


# ---- layers


def _signs(g, shape):
    return np.where(g.rng.random(shape) < 0.5, np.float32(-1), np.float32(1))


def _weights(g, shape):
    """Weights [O, ...], largest magnitude, grain, and whether they are two-level."""
    signs = _signs(g, shape)
    per_filter = (shape[0], *[1] * (len(shape) - 1))
    kind = g.pick(*["one"] * 9, *["alpha"] * 5, "dead", "dead", "input", "ternary", "flip", "real", "scalar", "pair")
    if kind == "alpha":
        return signs * 2.0 ** g.rng.integers(-2, 3, per_filter).astype(np.float32), 4.0, -2, True
    if kind == "dead":
        return signs * g.rng.integers(0, 2, per_filter).astype(np.float32), 1.0, 0, True
    if kind == "scalar":
        return signs * np.float32(0.25), 0.25, -2, True
    if kind == "input" and shape[1] > 1:
        alpha = 2.0 ** (np.arange(shape[1]) % 2).reshape(1, -1, *[1] * (len(shape) - 2))
        return (signs * alpha).astype(np.float32), 2.0, 0, False
    if kind == "ternary" and signs.size > 2:
        mask = g.rng.random(shape) < 0.8
        mask.reshape(-1)[:2] = True, False
        return np.where(mask, signs, np.float32(0)), 1.0, 0, False
    if kind == "flip" and signs[0].size > 1:
        signs.reshape(-1)[0] *= np.float32(1.5)
        return signs, 1.5, -1, False
    if kind == "real":
        return (g.rng.integers(-3, 4, shape)).astype(np.float32), 3.0, 0, False
    if kind == "pair":
        return np.where(signs > 0, np.float32(0.5), np.float32(-0.25)), 0.5, -2, False
    return signs, 1.0, 0, True


def _low_bit(levels):
    """Whether a tensor with these levels has to be packed."""
    if levels is None or levels == {0.0}:
        return False
    largest = max(abs(v) for v in levels)
    return levels <= {-largest, 0.0, largest}


def _product(g, x, name, shape, weights, count):
    """The result of a layer with ``count`` terms in each sum."""
    _, largest, grain, two_level = weights
    if two_level and _low_bit(x.levels):
        g.binary.add(name)
    return Tensor(name, shape, x.bound * largest * count, x.grain + grain)


def _biased(g, x, bias):
    return replace(x, bound=x.bound + float(np.abs(bias).max()), grain=min(x.grain, -1))


def _out(size, kernel, stride, begin, end, dilation):
    return (size + begin + end - dilation * (kernel - 1) - 1) // stride + 1


def _window(g, x, largest=4):
    """Kernel, strides, pads, dilations that fit ``x``, and the output size; None if none was found."""
    spatial = x.rank - 2
    if spatial < 1:
        return None
    kernel = [int(g.rng.integers(1, largest)) for _ in range(spatial)]
    strides = [int(g.rng.integers(1, 3)) for _ in range(spatial)]
    dilations = [int(g.rng.integers(1, 3)) if g.chance(0.2) else 1 for _ in range(spatial)]
    pads = [0] * 2 * spatial
    if g.chance(0.6):
        pads = [int(g.rng.integers(0, kernel[i % spatial])) for i in range(2 * spatial)] if g.chance(0.4) else [k // 2 for k in kernel] * 2
    out = [_out(*args) for args in zip(x.shape[2:], kernel, strides, pads[:spatial], pads[spatial:], dilations)]
    return (kernel, strides, pads, dilations, out) if min(out) > 0 else None


@layer(5)
def convolution(g, x):
    window = _window(g, x)
    if window is None:
        return None
    kernel, strides, pads, dilations, out = window
    divisors = [d for d in range(1, x.channels + 1) if x.channels % d == 0]
    groups = g.pick(*divisors) if g.chance(0.25) else 1
    outputs = groups * int(g.rng.integers(1, max(2, (72 if g.chance(0.9) else 300) // groups)))
    if outputs * int(np.prod(out)) > MAX_ELEMENTS:
        return None
    weights = _weights(g, (outputs, x.channels // groups, *kernel))
    attributes = dict(kernel_shape=kernel, strides=strides, dilations=dilations, group=groups)
    if g.chance(0.1) and max(dilations) == 1:
        attributes["auto_pad"] = g.pick("SAME_UPPER", "SAME_LOWER")
        out = [-(-s // t) for s, t in zip(x.shape[2:], strides)]
    else:
        attributes["pads"] = pads
    inputs, bias = [x, weights[0]], None
    if g.chance(0.3):
        bias = (g.rng.integers(-8, 9, outputs) / 2).astype(np.float32) * g.pick(0, 1, 1)
        inputs.append(bias)
    name = g.op("Conv", inputs, **attributes)
    made = _product(g, x, name, (x.shape[0], outputs, *out), weights, x.channels // groups * int(np.prod(kernel)))
    return made if bias is None else _biased(g, made, bias)


@layer(20)
def binary_convolution(g, x):
    """A quantiser and a convolution, so that deep nets have many layers on bits."""
    return convolution(g, quantise(g, x))


@layer(2)
def depthwise(g, x):
    if x.rank != 4 or min(x.shape[2:]) < 2:
        return None
    x = quantise(g, x) if g.chance(0.7) else x
    weights = _weights(g, (x.channels, 1, 2, 2))
    name = g.op("Conv", [x, weights[0]], kernel_shape=[2, 2], group=x.channels, pads=[1, 0, 0, 1])
    return _product(g, x, name, x.shape, weights, 4)


@layer(5)
def dense(g, x):
    if x.rank != 2:
        return None
    outputs = int(g.rng.integers(1, 70))
    x = quantise(g, x) if g.chance(0.7) else x
    weights = _weights(g, (outputs, x.channels))
    kind, shape = g.pick("MatMul", "Gemm", "Gemm", "scaled"), (x.shape[0], outputs)
    if kind == "MatMul":
        return _product(g, x, g.op("MatMul", [x, np.ascontiguousarray(weights[0].T)]), shape, weights, x.channels)
    transposed = int(g.chance(0.5))
    weight = weights[0] if transposed else np.ascontiguousarray(weights[0].T)
    if kind == "Gemm" and g.chance(0.5):
        return _product(g, x, g.op("Gemm", [x, weight], transB=transposed), shape, weights, x.channels)
    bias = (g.rng.integers(-8, 9, outputs) / 2).astype(np.float32)
    alpha, beta = (0.5, 2.0) if kind == "scaled" else (1.0, 1.0)
    name = g.op("Gemm", [x, weight, bias], transB=transposed, alpha=alpha, beta=beta)
    made = _product(g, x, name, shape, weights, x.channels)
    return _biased(g, replace(made, grain=made.grain - 1), 2 * bias)


@layer(2)
def transposed_convolution(g, x):
    if x.rank != 4 or x.channels * int(np.prod(x.shape[2:])) > MAX_ELEMENTS // 4:
        return None
    x = quantise(g, x) if g.chance(0.5) else x
    stride, outputs = g.pick(1, 2), int(g.rng.integers(1, 9))
    weight = _signs(g, (x.channels, outputs, 2, 3))
    out = [(s - 1) * stride + k for s, k in zip(x.shape[2:], (2, 3))]
    name = g.op("ConvTranspose", [x, weight], kernel_shape=[2, 3], strides=[stride, stride])
    return Tensor(name, (x.shape[0], outputs, *out), x.bound * x.channels * 6, x.grain)


@layer(1)
def resize(g, x):
    """Twice as large, by repetition."""
    if x.rank != 4 or int(np.prod(x.shape[1:])) > MAX_ELEMENTS // 4:
        return None
    mode = dict(mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    out = g.op("Resize", [x, "", np.array([1, 1, 2, 2], np.float32)], **mode)
    return replace(x, name=out, shape=(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3]))


@layer(2)
def head(g, x):
    """Global pooling, then a vector."""
    if x.rank != 4:
        return None
    count = int(np.prod(x.shape[2:]))
    if g.chance(0.5) or count & (count - 1):
        out = replace(x, name=g.op("GlobalMaxPool", [x]))
    else:
        out = Tensor(g.op("GlobalAveragePool", [x]), x.shape, x.bound, x.grain - (count.bit_length() - 1))
    return replace(out, name=g.op("Flatten", [out], axis=1), shape=x.shape[:2])


@layer(2)
def flatten(g, x):
    if x.rank == 2 or int(np.prod(x.shape[1:])) > 2048:
        return None
    size = int(np.prod(x.shape[1:]))
    out = g.op("Flatten", [x], axis=1) if g.chance(0.5) else g.op("Reshape", [x, np.array([g.pick(-1, 0), size], np.int64)])
    return replace(x, name=out, shape=(x.shape[0], size))


@layer(3)
def image(g, x):
    """A vector seen as an image."""
    if x.rank != 2 or x.channels % 4:
        return None
    shape = [x.channels // 4, 2, 2]
    return replace(x, name=g.op("Reshape", [x, np.array([-1, *shape], np.int64)]), shape=(x.shape[0], *shape))


# ---- elementwise


def _powers(g, low=-1, high=2):
    return lambda shape: 2.0 ** g.rng.integers(low, high, shape) * np.where(g.rng.random(shape) < 0.3, -1, 1)


@layer(8)
def batch_norm(g, x):
    eps = 2.0**-6
    deviation = 2.0 ** g.rng.integers(-1, 2, x.channels)
    gamma = _powers(g)((x.channels,)) * deviation
    mean, beta = g.rng.integers(-6, 7, x.channels) / g.pick(1, 1, 2), g.rng.integers(-4, 5, x.channels) / 2
    if g.chance(0.2):
        gamma = np.where(g.rng.random(x.channels) < 0.3, 0, gamma)
    if g.chance(0.4):
        beta = beta * 0
    if g.chance(0.2):
        beta = np.where(gamma == 0, 0, beta)
    operands = [v.astype(np.float32) for v in (gamma, beta, mean, deviation**2 - eps)]
    out = g.op("BatchNormalization", [x, *operands], epsilon=eps)
    return Tensor(out, x.shape, (x.bound + 6) * 2 + 2, min(x.grain, -1) - 1)


@layer(3)
def tied_batch_norm(g, x):
    """BatchNormalization with any gain, a mean on the grid of ``x`` and no shift, then a quantiser: the sign of +-(x - mean)."""
    gamma = (g.rng.normal(size=x.channels) + 0.01).astype(np.float32)
    mean = (g.rng.integers(-5, 6, x.channels) * 2.0 ** max(x.grain, -2)).astype(np.float32)
    variance = g.rng.uniform(0.1, 3, x.channels).astype(np.float32)
    out = g.op("BatchNormalization", [x, gamma, np.zeros(x.channels, np.float32), mean, variance], epsilon=1e-5)
    return g.pick(plain_sign, larq, zero_fix, selected, arithmetic_select)(g, replace(x, name=out, levels=None))


@layer(3)
def scale(g, x):
    factor = g.per_channel(x, _powers(g))
    return g.after(g.op("Mul", g.pick([x, factor], [factor, x])), x, x.bound * 2, x.grain - 1, lambda v: v * factor.reshape(-1))


@layer(3)
def shift(g, x):
    kind, offset = g.pick("Add", "Sub"), g.per_channel(x, lambda s: g.rng.integers(-6, 7, s) / 2)
    function = (lambda v: v + offset.reshape(-1)) if kind == "Add" else (lambda v: v - offset.reshape(-1))
    return g.after(g.op(kind, [x, offset]), x, x.bound + 3, min(x.grain, -1), function)


@layer(3)
def prelu(g, x):
    if g.chance(0.3):
        alpha = float(g.pick(0.5, 0.25, -0.5))
        out = g.op("LeakyRelu", [x], alpha=alpha)
        return Tensor(out, x.shape, x.bound, x.grain - 2)
    slope = g.rng.choice([0.0, 0.25, 0.5, 1.0, 2.0] + ([-0.5, -1.0] if g.chance(0.4) else []), (x.channels, *[1] * (x.rank - 2)))
    return Tensor(g.op("PRelu", [x, slope.astype(np.float32)]), x.shape, x.bound * 2, x.grain - 2)


@layer(3)
def activation(g, x):
    kind = g.pick("Relu", "Clip", "Neg", "Abs", "Max", "Min", "Identity", "hinge")
    if kind == "Clip":
        return g.after(g.op("Clip", [x, g.f(-1), g.f(2)]), x, min(x.bound, 2), min(x.grain, 0), lambda v: np.clip(v, -1, 2))
    if kind in ("Max", "Min"):
        t = g.f(g.pick(-0.5, 0, 1))
        return g.after(g.op(kind, [x, t]), x, max(x.bound, 1), min(x.grain, -1), lambda v: getattr(np, f"{kind.lower()}imum")(v, t))
    if kind == "hinge":  # 1 - x, swapped operands
        return g.after(g.op("Sub", [g.f(1), x]), x, x.bound + 1, min(x.grain, 0), lambda v: 1 - v)
    function = {"Relu": lambda v: np.maximum(v, 0), "Neg": np.negative, "Abs": np.abs, "Identity": lambda v: v}[kind]
    return g.after(g.op(kind, [x]), x, x.bound, x.grain, function)


@layer(6)
def residual(g, x):
    others = [t for t in g.history if t.shape == x.shape and t.name != x.name]
    if not others:
        return None
    other = g.pick(*others)
    kind = g.pick("Add", "Add", "Add", "Sub", "Mul", "Max")
    a, b = g.pick((x, other), (other, x))
    if kind == "Mul":
        return Tensor(g.op(kind, [a, b]), x.shape, x.bound * other.bound, x.grain + other.grain)
    bound = max(x.bound, other.bound) if kind == "Max" else x.bound + other.bound
    return Tensor(g.op(kind, [a, b]), x.shape, bound, min(x.grain, other.grain))


@layer(2)
def mixed(g, x):
    """One of two tensors, or a number, element by element."""
    others = [t for t in g.history if t.shape == x.shape]
    other = g.pick(*others) if others else x
    bit = g.op(g.pick("Greater", "LessOrEqual"), [g.pick(x, other), g.f(g.pick(0, 0.5, -1))])
    second = g.pick(other.name, g.f(0), g.f(1))
    levels = None
    if isinstance(second, np.ndarray) and x.levels is not None:
        levels = x.levels | {float(second)}
    out = g.op("Where", g.pick([bit, x, second], [bit, second, x]))
    return Tensor(out, x.shape, max(x.bound, other.bound, 1), min(x.grain, other.grain, 0), levels)


@layer(3)
def back(g, x):
    """Go on from an earlier tensor: fan-out. What was computed since then stays as another output."""
    other = g.pick(*g.history)
    if other.name == x.name or x.name == "x":
        return None
    if x.name not in g.outputs:
        g.outputs.append(x.name)
    return other


@layer(2)
def block(g, x):
    """Quantise once, convolve twice, add: a shared sign, kept shape."""
    if x.rank != 4:
        return None
    q, parts = quantise(g, x), []
    for _ in range(2):
        weights = _weights(g, (x.channels, x.channels, 3, 3))
        out = g.op("Conv", [q, weights[0]], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        made = _product(g, q, out, x.shape, weights, x.channels * 9)
        parts.append(batch_norm(g, made) if g.chance(0.5) else made)
    parts.append(g.pick(x, q))
    out = parts[0]
    for other in parts[1:]:
        out = Tensor(g.op("Add", [out, other]), x.shape, out.bound + other.bound, min(out.grain, other.grain))
    return out


@layer(2)
def gate(g, x):
    """A factor per pixel or per image and channel, of powers of two many terms so that the mean is exact."""
    if x.rank != 4:
        return None
    others = [t for t in g.history if t.shape == x.shape and t.bound / 2.0**t.grain < 2**8]
    other = g.pick(*others) if others else x
    count = x.channels if g.chance(0.5) else int(np.prod(x.shape[2:]))
    if count & (count - 1):
        return None
    if count == x.channels:
        factor = g.op("ReduceMean", [g.op("Abs", [other])], axes=[1], keepdims=1)
    else:
        factor = g.op("GlobalAveragePool", [other])
    out = g.op("Mul", g.pick([x, factor], [factor, x]))
    return Tensor(out, x.shape, x.bound * other.bound, x.grain + other.grain - (count.bit_length() - 1))


# ---- what moves values


@layer(5)
def max_pool(g, x):
    window = _window(g, x) if x.rank in (3, 4) else None
    if window is None:
        return None
    kernel, strides, pads, dilations, out = window
    for size, k, stride, begin, dilation, count in zip(x.shape[2:], kernel, strides, pads, dilations, out):
        taps = np.arange(count)[:, None] * stride - begin + np.arange(k) * dilation
        if not np.any((taps >= 0) & (taps < size), axis=1).all():
            return None  # a window that sees nothing but padding has no maximum
    out_name = g.op("MaxPool", [x], kernel_shape=kernel, strides=strides, pads=pads, dilations=dilations)
    return replace(x, name=out_name, shape=(*x.shape[:2], *out))


@layer(2)
def average_pool(g, x):
    if x.rank != 4 or min(x.shape[2:]) < 2:
        return None
    out = [_out(s, 2, 2, 0, 0, 1) for s in x.shape[2:]]
    return Tensor(g.op("AveragePool", [x], kernel_shape=[2, 2], strides=[2, 2]), (*x.shape[:2], *out), x.bound, x.grain - 2)


@layer(4)
def pad(g, x):
    if x.rank == 2:
        return None
    spatial = x.rank - 2
    widths = [int(g.rng.integers(0, 3)) for _ in range(2 * spatial)]
    mode = g.pick("constant", "constant", "constant", "constant", "reflect", "edge")
    if mode == "reflect" and max(widths) >= min(x.shape[2:]):
        return None
    pads = np.array([0, 0, *widths[:spatial], 0, 0, *widths[spatial:]], np.int64)
    shape = (*x.shape[:2], *[s + a + b for s, a, b in zip(x.shape[2:], widths[:spatial], widths[spatial:])])
    if int(np.prod(shape[1:])) > MAX_ELEMENTS:
        return None
    if mode != "constant":
        return replace(x, name=g.op("Pad", [x, pads], mode=mode), shape=shape)
    value = float(g.pick(0, 1, -1, 1, -1))
    levels = None if x.levels is None else x.levels | ({value} if sum(widths) else set())
    return Tensor(g.op("Pad", [x, pads, g.f(value)]), shape, max(x.bound, abs(value)), min(x.grain, 0), levels)


@layer(5)
def concat(g, x):
    others = [t for t in g.history if t.shape[2:] == x.shape[2:] and t.rank == x.rank]
    fields = [x, *[g.pick(*others) for _ in range(int(g.rng.integers(1, 3)))]]
    if g.chance(0.5):
        fields = fields[::-1]
    channels = sum(t.channels for t in fields)
    if channels > 160:
        return None
    levels = None
    if all(t.levels is not None for t in fields):
        levels = frozenset().union(*[t.levels for t in fields])
    out = g.op("Concat", fields, axis=g.pick(1, 1 - x.rank))
    return Tensor(out, (x.shape[0], channels, *x.shape[2:]), max(t.bound for t in fields), min(t.grain for t in fields), levels)


@layer(2)
def crop(g, x):
    axis = int(g.rng.integers(1, x.rank))
    size = x.shape[axis]
    if size < 2:
        return None
    begin, end = sorted(int(v) for v in g.rng.choice(size + 1, 2, replace=False))
    out = g.op("Slice", [x, *[np.array([v], np.int64) for v in (begin, end, axis)]])
    return replace(x, name=out, shape=(*x.shape[:axis], end - begin, *x.shape[axis + 1 :]))


@layer(2)
def split(g, x):
    """Two halves of the channels, put together the other way round or added."""
    if x.channels % 2:
        return None
    a, b = g.op("Split", [x], count=2, axis=1)
    if g.chance(0.5):
        return replace(x, name=g.op("Concat", [b, a], axis=1))
    return Tensor(g.op("Add", [a, b]), (x.shape[0], x.channels // 2, *x.shape[2:]), 2 * x.bound, x.grain)


@layer(2)
def shuffle(g, x):
    """Channel shuffle by reshape and transpose."""
    if x.rank != 4 or x.channels % 2:
        return None
    n, c, h, w = x.shape
    folded = g.op("Reshape", [x, np.array([-1, 2, c // 2, h, w], np.int64)])
    turned = g.op("Transpose", [folded], perm=[0, 2, 1, 3, 4])
    return replace(x, name=g.op("Reshape", [turned, np.array([-1, c, h, w], np.int64)]))


@layer(2)
def transposed(g, x):
    """The quantiser or pool in channels-last order, as tf2onnx leaves it."""
    if x.rank != 4:
        return None
    there = replace(x, name=g.op("Transpose", [x], perm=[0, 2, 3, 1]), shape=(x.shape[0], *x.shape[2:], x.shape[1]))
    inner = g.pick(plain_sign, larq, selected, tanh_sign)(g, there) if g.chance(0.7) else there
    return replace(inner, name=g.op("Transpose", [inner], perm=[0, 3, 1, 2]), shape=x.shape)


@layer(1)
def turned(g, x):
    """Height and width exchanged."""
    if x.rank != 4:
        return None
    return replace(x, name=g.op("Transpose", [x], perm=[0, 1, 3, 2]), shape=(*x.shape[:2], x.shape[3], x.shape[2]))
