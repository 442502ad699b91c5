"""From fused groups to kernels: every ``fused_*`` function becomes a specification, and the kernel family that owns it a TensorIR function.

Equal specifications share one kernel; weights and per-channel constants are arguments, packed here into the layout that the schedule wants.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, field, replace

import numpy as np
import tvm
from tvm import relax

from bnntvm import spec as sp
from bnntvm.bits import dense_groups
from bnntvm.graph import Rewriter, bindings, const, constant, dims, dtype, layer_hint, op_name, same_dim, uses
from bnntvm.passes.fuse_epilogues import operand_kind
from bnntvm.schedules import families

#: NHWC to NCHW.
TO_CHANNEL_ORDER = (0, 3, 1, 2)
#: Permutations that exchange two runs of axes behind the batch -> length of the first run.
EXCHANGES = {(0, 2, 3, 1): 1, (0, 3, 1, 2): 2, (0, 2, 1): 1}


@dataclass
class Kernel:
    """A generated kernel: its name in the module, its specification, how it was scheduled, and elements of memory for itself (int32)."""

    name: str
    spec: object
    schedule: object
    workspace: int = 0


@dataclass
class Lowered:
    """What lowering tells the report: layer name -> (kernel name, bytes of its packed weights)."""

    kernels: dict = field(default_factory=dict)
    layers: dict = field(default_factory=dict)


class EpilogueBuilder:
    """Numbers the values of a group and collects its epilogue.

    Parameters
    ----------
    anchor : relax.Var
        The variable that is value 0.
    shape : tuple
        Shape of the group.
    """

    def __init__(self, anchor, shape):
        self.shape, self.numbers = shape, {anchor: 0}
        self.inputs, self.arguments, self.steps, self.outputs = [], [], [], []
        self.recorded = []  # (var, op, args as ("input", i) | ("var", v) | float, dtype)
        self.tiled = {}  # member that is an operand several times side by side -> the operand, how often

    def input(self, arg, times=1):
        """Reference to an operand that is not a member of the group, and stands ``times`` times side by side."""
        kind = operand_kind(arg, self.shape) if times == 1 else "tensor"
        array = constant(arg)
        if kind == "scalar":
            return float(array.reshape(-1)[0])
        for i, known in enumerate(self.arguments):
            if known.same_as(arg) and self.inputs[i].times == times:
                return ("input", i)
        if kind == "channel":
            arg = _padded_channels(array, self.shape[-1])
        self.inputs.append(sp.EpilogueInput(kind, dtype(arg), times))
        self.arguments.append(arg)
        return ("input", len(self.inputs) - 1)

    def reference(self, arg):
        """Reference to any operand of a member."""
        if arg in self.tiled:
            return self.input(*self.tiled[arg])
        return ("var", arg) if arg in self.numbers else self.input(arg)

    def member(self, var, call):
        """Record an elementwise member."""
        name = op_name(call).removeprefix("relax.").removeprefix("nn.")
        if name == "tile":
            self.tiled[var] = call.args[0], int(call.attrs["repeats"][-1])
            return
        args = [self.reference(arg) for arg in call.args] if name != "clip" else self.clip_args(call)
        self.recorded.append((var, "cast" if name == "astype" else name, tuple(args), dtype(var)))
        self.numbers[var] = None  # known in finish(), when all inputs are

    def clip_args(self, call):
        return [self.reference(call.args[0]), *(float(getattr(a, "value", a)) for a in call.args[1:3])]

    def pack(self, call):
        """Record a packed output."""
        flip = None
        if len(call.args) > 1:
            self.inputs.append(sp.EpilogueInput("words", "uint32"))
            self.arguments.append(call.args[1])
            flip = ("input", len(self.inputs) - 1)
        return ("bits", call.args[0], flip)

    def finish(self, results):
        """The Epilogue that stores ``results``: relax.Var for tensors, or what :meth:`pack` returned."""
        base = 1 + len(self.inputs)
        for i, (var, *_rest) in enumerate(self.recorded):
            self.numbers[var] = base + i

        def number(ref):
            if isinstance(ref, float):
                return ref
            return 1 + ref[1] if ref[0] == "input" else self.numbers[ref[1]]

        steps = tuple(sp.Step(op, tuple(number(a) for a in args), kind) for _, op, args, kind in self.recorded)
        outputs = []
        for result in results:
            if isinstance(result, tuple):
                _, plane, flip = result
                outputs.append(sp.Output("bits", self.numbers[plane], "uint32", number(flip) if flip else None))
            else:
                outputs.append(sp.Output("tensor", self.numbers[result], dtype(result)))
        return simplify(sp.Epilogue(tuple(self.inputs), steps, tuple(outputs)))


def simplify(epilogue):
    """Recognise prelu (where(x < 0, x * s, x)) and drop steps that nothing reads."""
    base = 1 + len(epilogue.inputs)
    steps = list(epilogue.steps)

    def step(number):
        return steps[number - base] if isinstance(number, int) and number >= base else None

    for i, one in enumerate(steps):
        if one.op != "where":
            continue
        test, yes, x = step(one.args[0]), step(one.args[1]), one.args[2]
        if test and yes and test.op == "less" and test.args == (x, 0.0) and yes.op == "multiply" and x in yes.args:
            slope = yes.args[1] if yes.args[0] == x else yes.args[0]
            steps[i] = sp.Step("prelu", (x, slope), one.dtype)
    return _drop_dead(sp.Epilogue(epilogue.inputs, tuple(steps), epilogue.outputs))


def _drop_dead(epilogue):
    base, live = 1 + len(epilogue.inputs), set()
    todo = [o.value for o in epilogue.outputs]
    while todo:
        number = todo.pop()
        if isinstance(number, int) and number >= base and number not in live:
            live.add(number)
            todo.extend(a for a in epilogue.steps[number - base].args if isinstance(a, int))
    keep = [base + i for i in range(len(epilogue.steps)) if base + i in live]
    renumber = {**{i: i for i in range(base)}, **{old: base + new for new, old in enumerate(keep)}}

    def args(step):
        return tuple(renumber[a] if isinstance(a, int) else a for a in step.args)

    steps = tuple(sp.Step(epilogue.steps[n - base].op, args(epilogue.steps[n - base]), epilogue.steps[n - base].dtype) for n in keep)
    outputs = tuple(sp.Output(o.kind, renumber[o.value], o.dtype, o.flip) for o in epilogue.outputs)
    return sp.Epilogue(epilogue.inputs, steps, outputs)


def _padded_channels(array, channels):
    flat = np.broadcast_to(array.reshape(-1), (channels,))
    out = np.zeros(sp.words(channels) * sp.WORD_BITS, array.dtype)
    out[:channels] = flat
    return const(out)


def _pair(attr):
    return tuple(int(v) for v in attr)


def _window(data, kernel, attrs, names=("strides", "pads", "dilations")):
    _, height, width, _ = dims(data)
    return sp.Window(height, width, tuple(kernel), _pair(attrs[names[0]]), _pair(attrs[names[1]]), _pair(attrs[names[2]]))


def anchor_spec(call, epilogue, shape):
    """Specification of a group, without its weights' values.

    Returns
    -------
    (spec, operands, weights)
        Operand expressions before the epilogue's inputs, with ``None`` at the place of the packed weights.
    """
    name, attrs = op_name(call), call.attrs
    if name == "bnn.conv2d_bits":
        weights = constant(call.args[-1])
        groups, mask = int(attrs["groups"]), list(call.args[1:-1])
        channels = int(attrs["channels"])
        spec = sp.BinaryConv2d(
            _window(call.args[0], weights.shape[1:3], attrs), channels, weights.shape[0], groups,
            bool(attrs["unipolar"]), bool(attrs["zeros"]), epilogue, dense_groups(channels, groups),
        )  # fmt: skip
        return spec, [call.args[0], None, *mask], weights
    if name == "bnn.dense_bits":
        weights = constant(call.args[-1])
        spec = sp.BinaryDense(int(attrs["channels"]), weights.shape[0], bool(attrs["unipolar"]), bool(attrs["zeros"]), epilogue)
        return spec, [call.args[0], None, *call.args[1:-1]], weights
    if name in ("bnn.conv2d_weight", "bnn.dense_weight"):
        return _weight_spec(name, call, epilogue)
    if name in ("bnn.conv2d_planes", "bnn.dense_planes"):
        return planes_spec(call, epilogue)
    if name == "bnn.conv2d_int8":
        weights, digits = constant(call.args[1]), sp.Digits(int(attrs["base"]), _pair(attrs["coefficients"]))
        window = _window(call.args[0], weights.shape[1:3], attrs)
        spec = sp.Int8Conv2d(window, weights.shape[3], weights.shape[0], str(attrs["data"]), digits, epilogue, floats=True)
        return spec, [call.args[0], None], weights
    if name == "bnn.conv":
        weights = constant(call.args[1])
        spec = sp.FloatConv2d(
            _window(call.args[0], weights.shape[1:3], attrs), dims(call.args[0])[3], weights.shape[0], int(attrs["groups"]), epilogue
        )
        return spec, [call.args[0], None], weights
    if name == "bnn.matmul":
        weights = constant(call.args[1]).T
        return sp.FloatDense(weights.shape[1], weights.shape[0], epilogue), [call.args[0], None], weights
    if name in ("relax.nn.max_pool2d", "relax.nn.avg_pool2d"):
        window = _pool_window(call, shape)
        op = "max" if "max" in name else "avg_pad" if bool(attrs["count_include_pad"]) else "avg"
        return sp.Pool2d(window, shape[-1], op, epilogue), [call.args[0]], None
    if name == "relax.mean":
        _, height, width, channels = dims(call.args[0])
        return sp.GlobalPool("avg", (height, width), channels, epilogue), [call.args[0]], None
    if name == "relax.concat":
        parts = list(call.args[0].fields)
        spatial = tuple(shape[1:3]) if len(shape) == 4 else ()
        return sp.Concat(len(shape), spatial, tuple(dims(p)[-1] for p in parts), epilogue, dtype(parts[0])), parts, None
    if name == "relax.nn.softmax":
        return sp.Softmax(shape[-1], epilogue), [call.args[0]], None
    raise AssertionError(name)


def _weight_spec(name, call, epilogue):
    """:func:`anchor_spec` of a layer of float data with packed weights."""
    attrs, planes = call.attrs, constant(call.args[1])
    levels = [constant(arg) for arg in call.args[2:]]
    coding = sp.WeightCoding(str(attrs["coding"]), len(planes), any(one[0].any() for one in levels))
    operands = [call.args[0], None, *(const(_padded_rows(one)) for one in levels)]
    channels = int(attrs["channels"])
    if name == "bnn.dense_weight":
        kind = sp.WeightDenseInt8 if bool(attrs["integer"]) else sp.WeightDense
        return kind(channels, planes.shape[1], coding, epilogue), operands, planes
    window = _window(call.args[0], planes.shape[2:4], attrs)
    return sp.WeightConv2d(window, channels, planes.shape[1], int(attrs["groups"]), epilogue, coding=coding), operands, planes


def _padded_rows(array):
    """float32 [rows, C] with C padded with zeros to whole words."""
    return np.pad(array, ((0, 0), (0, -array.shape[1] % sp.WORD_BITS)))


def planes_spec(call, epilogue):
    """The same for layers on several planes."""
    attrs = call.attrs
    planes = sp.PlaneSum(
        _pair(attrs["data"]), _pair(attrs["weights"]), str(attrs["data_kind"]), str(attrs["weight_kind"]), bool(attrs["scaled"])
    )
    data, (weights, *more) = list(call.args[: len(planes.data)]), call.args[len(planes.data) :]
    weights, channels, zeros = constant(weights), int(attrs["channels"]), bool(attrs["zeros"])
    if planes.scaled:
        more[-1] = const(_padded_rows(constant(more[-1])))
    if op_name(call) == "bnn.dense_planes":
        return sp.PlanesDense(channels, weights.shape[1], planes, zeros, epilogue), [*data, None, *more], weights
    groups, window = int(attrs["groups"]), _window(data[0], weights.shape[2:4], attrs)
    dense = dense_groups(channels, groups)
    return sp.PlanesConv2d(window, channels, weights.shape[1], planes, groups, zeros, epilogue, dense), [*data, None, *more], weights


def _pool_window(call, shape):
    """The window of a pool; a ceiling is expressed by more padding at the end."""
    attrs = call.attrs
    window = _window(call.args[0], _pair(attrs["pool_size"]), attrs, ("strides", "padding", "dilation"))
    pads = list(window.pads)
    for axis, (have, want) in enumerate(((window.out_height, shape[1]), (window.out_width, shape[2]))):
        if want > have:
            pads[2 + axis] += window.strides[axis] * (want - have)
    return sp.Window(window.in_height, window.in_width, window.kernel, window.strides, tuple(pads), window.dilations)


class Lower(Rewriter):
    """Replaces calls of fused functions by calls of generated kernels.

    Parameters
    ----------
    isa : bnntvm.targets.x86.Isa
    choose : callable, optional
        (family, spec, isa, shape of the first operand) to the schedule; default: the family's default schedule.
    """

    def __init__(self, isa, choose=None):
        self.isa, self.lowered, self.cache = isa, Lowered(), {}
        self.choose = choose or (lambda family, spec, isa, _shape: family.default_schedule(spec, isa))
        self.constants, self.counted = {}, set()  # packed weights that are stored; by layer, those that its bytes include
        self.turned = {}  # channels-last copy of an image -> the image in channel order
        self.padded = {}  # packed image padded with bits 0 -> the image, its pads

    def begin(self):
        # Values that nothing reads but one transpose to the order of the ONNX file; those that kernels stored in that order at once.
        self.to_planes, self.planar = _read_in_channel_order(self.func), set()
        # The same for one pool of 2x2 pixels: value and number of the result to the kind of output; those that kernels pooled at once.
        self.to_pool, self.pooled = _read_by_pools(self.func, self.mod), set()

    def rewrite(self, var, value):
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
            func = self.mod[value.op]
            if func.attrs and "bnn.anchor" in func.attrs:
                if value.args[0] in self.pooled:
                    return self.env[value.args[0]]
                return self.group(func, [self.substitute(arg) for arg in value.args], var)
        name = op_name(value)
        if name == "bnn.pool_bits":
            return self.pool_bits(self.substitute(value), var.ty)
        if name == "bnn.matmul_bits":
            return self.matmul_bits(self.substitute(value), var.ty)
        if name == "relax.nn.pad" and dtype(var) == "uint32" and len(dims(var)) == 4:
            return self.pad_bits(self.substitute(value), var.ty)
        if name == "relax.permute_dims" and value.args[0] in self.planar:
            return self.env[value.args[0]]
        if name == "relax.permute_dims" and dtype(var) == "float32" and value.attrs["axes"] is not None:
            return self.permute(self.substitute(value), var.ty)
        if name == "relax.topk" and int(value.attrs["axis"]) in (-1, len(dims(value.args[0])) - 1):
            return self.top_k(self.substitute(value))
        if name == "bnn.cum_sum":
            return self.cum_sum(self.substitute(value))
        if name in ("relax.max", "relax.min") and _reduces_rows(value):
            return self.row_extreme(self.substitute(value), name.removeprefix("relax."))
        return super().rewrite(var, value)

    def row_extreme(self, call, op):
        """The largest or least value along the last axis."""
        *lead, size = dims(call.args[0])
        data = self.flat(call.args[0], "tensor")
        out = self.call(sp.RowExtreme(op, size), [data], [relax.TensorType([dims(data)[0], 1], "float32")], None)
        shape = [*lead, 1] if bool(call.attrs["keepdims"]) else lead
        return out if len(shape) == 2 else self.emit(relax.op.reshape(out, shape))

    def top_k(self, call):
        """Values and indices along the last axis."""
        *lead, size = dims(call.args[0])
        data, count = self.flat(call.args[0], "tensor"), int(call.attrs["k"])
        spec = sp.TopK(size, count, bool(call.attrs["largest"]), dtype(data))
        types = [relax.TensorType([dims(data)[0], count], kind) for kind in (spec.dtype, "int64")]
        both = self.call(spec, [data], types, None)
        parts = [self.emit(relax.TupleGetItem(both, i)) for i in range(2)]
        return self.emit(relax.Tuple([p if len(lead) == 1 else self.emit(relax.op.reshape(p, [*lead, count])) for p in parts]))

    def cum_sum(self, call):
        """Running sums along an axis."""
        (data,), attrs = call.args, call.attrs
        shape, axis = dims(data), int(attrs["axis"])
        before, behind = (functools.reduce(operator.mul, some, 1) for some in (shape[:axis], shape[axis + 1 :]))
        static = [d if isinstance(d, int) else None for d in (shape[axis], behind)]
        spec, three = sp.CumSum(*static, dtype(data), bool(attrs["exclusive"]), bool(attrs["reverse"])), [before, shape[axis], behind]
        out = self.call(spec, [self.emit(relax.op.reshape(data, three))], [relax.TensorType(three, spec.dtype)], None)
        return self.emit(relax.op.reshape(out, list(shape)))

    def permute(self, call, ty):
        axes, shape = tuple(int(a) for a in call.attrs["axes"]), dims(call.args[0])[1:]
        if axes not in EXCHANGES or not all(isinstance(d, int) for d in shape):
            return self.emit(call)
        rows = int(np.prod(shape[: EXCHANGES[axes]]))
        spec = sp.Transpose(rows, int(np.prod(shape)) // rows, (tuple(shape), tuple(shape[a - 1] for a in axes[1:])))
        out = self.call(spec, [call.args[0]], [ty], None)
        if axes == (0, 2, 3, 1):
            self.turned[out] = call.args[0]
        return out

    def pad_bits(self, call, ty):
        _, height, width, words = dims(call.args[0])
        _, _, top, bottom, left, right, _, _ = (int(v) for v in call.attrs["pad_width"])
        spec = sp.BitPad((height, width), words, (top, left, bottom, right), int(float(call.attrs["pad_value"])))
        out = self.call(spec, [call.args[0]], [ty], None)
        if spec.value == 0:
            self.padded[out] = call.args[0], spec.pads
        return out

    def unpadded(self, spec, operand):
        """A convolution of a padded image as one that pads, where its family does that better; the kernel that pads may then be dead."""
        if not isinstance(spec, sp.BinaryConv2d) or operand not in self.padded or any(spec.window.pads):
            return spec, operand
        image, pads = self.padded[operand]
        window = replace(spec.window, in_height=dims(image)[1], in_width=dims(image)[2], pads=pads)
        inside = replace(spec, window=window, plus_one=True)
        return (inside, image) if self.pads_with_ones(inside) else (spec, operand)

    def pads_with_ones(self, spec):
        """Whether the kernel for ``spec`` can do its own padding with +1."""
        return families.of(spec, self.isa).pads_with_ones(spec, self.isa)

    def stores_planar(self, spec):
        """Whether the kernel for ``spec`` can store float images in the order of an ONNX file."""
        return getattr(families.of(spec, self.isa), "stores_planar", lambda _spec, _isa: False)(spec, self.isa)

    def stores_pooled(self, spec):
        """Whether the kernel for ``spec`` can pool 2x2 pixels of its float results."""
        return getattr(families.of(spec, self.isa), "stores_pooled", lambda _spec, _isa: False)(spec, self.isa)

    def matmul_bits(self, call, ty):
        attrs, batch = call.attrs, dims(call.args[-1])[0]
        _, rows, columns = dims(ty)
        shared = isinstance(batch, int) and batch == 1 and not same_dim(dims(ty)[0], 1)
        words = dims(call.args[0])[-1]
        spec = sp.BinaryMatmul(rows, columns, int(attrs["features"]), words, str(attrs["left"]), str(attrs["right"]), shared)
        if len(attrs["scale"]):
            spec = replace(spec, scale=float(attrs["scale"][0]))
        spec, operands = self.turned_right(spec, list(call.args))
        out = self.call(spec, operands, [ty], None, str(attrs["layer"]))
        kernel = next(reversed(self.lowered.kernels))
        self.lowered.layers.setdefault(str(attrs["layer"]), (kernel, 0))
        return out

    def turned_right(self, spec, operands):
        """A product that reads its right operand as it was before its words were turned, where the family wants that."""
        takes_turned = getattr(families.of(spec, self.isa), "takes_turned", None)
        count = len(operands) - (2 if spec.right == "ternary" else 1)
        made = [self.builder.lookup_binding(one) for one in operands[count:] if isinstance(one, relax.Var)]
        if takes_turned is None or not takes_turned(spec, self.isa) or len(made) < len(operands) - count:
            return spec, operands
        turned = [op_name(one) == "relax.permute_dims" and [int(a) for a in one.attrs["axes"]] == [0, 2, 1] for one in made]
        return (replace(spec, turned=True), operands[:count] + [one.args[0] for one in made]) if all(turned) else (spec, operands)

    def pool_bits(self, call, ty):
        attrs = call.attrs
        spec = sp.BitPool(_window(call.args[0], _pair(attrs["kernel"]), attrs), int(attrs["channels"]), str(attrs["kind"]))
        return self.call(spec, [call.args[0]], [ty], None)

    def group(self, func, arguments, var):
        actual = dict(zip(func.params, arguments))
        members = [(b.var, b.value) for b in bindings(func) if op_name(b.value)]
        results = _results(func)
        if str(func.attrs["bnn.anchor"]) == "identity":
            return self.identity(members, results, actual)
        (anchor, call), *rest = members
        shape = dims(anchor)
        epilogue, inputs = self.epilogue(anchor, shape, rest, results)
        spec, operands, weights = anchor_spec(call, epilogue, shape)
        layer = str(call.attrs["layer"]) if op_name(call).startswith("bnn.") else None
        types = [r.ty for r in results]
        operands = [_actual(a, actual) for a in operands + inputs]
        if isinstance(spec, sp.FloatConv2d) and operands[0] in self.turned and spec.groups == 1:
            spec, operands[0] = replace(spec, planar=True), self.turned[operands[0]]
        spec, operands[0] = self.unpadded(spec, operands[0])
        types = _retyped(types, arguments, func)
        if var in self.to_planes and self.stores_planar(spec):
            spec, types = _planar(spec), [relax.TensorType([types[0].shape[a] for a in TO_CHANNEL_ORDER], types[0].dtype)]
            self.planar.add(var)
        spec, types = self.pool(var, spec, types)
        return self.call(spec, operands, types, weights, layer)

    def pool(self, var, spec, types):
        """``spec``, and the types of its results, with those pooled that only pools read, where the family can."""
        wanted = [i for value, i in self.to_pool if value.same_as(var)]
        if not wanted or not self.stores_pooled(spec):
            return spec, types
        outputs, types = list(spec.epilogue.outputs), list(types)
        for i in wanted:
            if outputs[i].kind == "tensor" and outputs[i].dtype == "float32":
                data, kind = self.to_pool[var, i]
                batch, height, width, channels = types[i].shape
                types[i] = relax.TensorType([batch, int(height) // 2, int(width) // 2, channels], "float32")
                outputs[i] = replace(outputs[i], kind=kind)
                self.pooled.add(data)
        return replace(spec, epilogue=replace(spec.epilogue, outputs=tuple(outputs))), types

    def epilogue(self, anchor, shape, members, results):
        builder, packs = EpilogueBuilder(anchor, shape), {}
        for var, call in members:
            if op_name(call) == "bnn.pack":
                packs[var] = builder.pack(call)
            else:
                builder.member(var, call)
        return builder.finish([packs.get(r, r) for r in results]), builder.arguments

    def identity(self, members, results, actual):
        shape = dims(members[0][0])
        data = next(a for a in members[0][1].args if isinstance(a, relax.Var) and operand_kind(a, shape) == "tensor" and dtype(a) != "bool")
        epilogue, inputs = self.epilogue(data, shape, members, results)
        operands = [_actual(a, actual) for a in [data, *inputs]]
        types = _retyped([r.ty for r in results], operands, None)
        if operands[0] in self.turned and dtype(data) == "float32" and packs_only(epilogue):
            spec = sp.PlanarPack((shape[1], shape[2]), shape[3], epilogue)
            return self.call(spec, [self.turned[operands[0]], *operands[1:]], types, None)
        if len(shape) == 4:
            return self.call(sp.Map(4, (shape[1], shape[2]), shape[3], dtype(data), epilogue), operands, types, None)
        flat = [self.flat(a, kind) for a, kind in zip(operands, ["tensor", *(i.kind for i in epilogue.inputs)])]
        spec = sp.Map(2, (1, 1), shape[-1], dtype(data), epilogue)
        if len(shape) == 2:
            return self.call(spec, flat, types, None)
        rows = dims(flat[0])[0]
        made = self.call(spec, flat, [relax.TensorType([rows, dims(t)[-1]], t.dtype) for t in types], None)
        made = [made] if len(types) == 1 else [self.emit(relax.TupleGetItem(made, i)) for i in range(len(types))]
        made = [self.emit(relax.op.reshape(m, list(t.shape))) for m, t in zip(made, types)]
        return made[0] if len(made) == 1 else self.emit(relax.Tuple(made))

    def flat(self, arg, kind):
        """A tensor or pixel operand as rows."""
        shape = dims(arg)
        if kind not in ("tensor", "pixel") or len(shape) == 2:
            return arg
        rows = 1
        for d in shape[:-1]:
            rows = rows * d
        return self.emit(relax.op.reshape(arg, [rows, shape[-1]]))

    def call(self, spec, operands, types, weights, layer=None):
        """Emit a call of the kernel for ``spec``, generated on first use."""
        family = families.of(spec, self.isa)
        schedule = self.choose(family, spec, self.isa, dims(operands[0]))
        if (spec, schedule) not in self.cache:
            prim = family.build(spec, schedule, self.isa)
            name = f"{prim.attrs['global_symbol']}_{len(self.cache)}"
            gvar = self.builder.add_func(prim.with_attr("bnn.kernel", name).without_attr("global_symbol"), name)
            self.cache[spec, schedule] = gvar, Kernel(name, spec, schedule, int(prim.attrs.get(sp.WORKSPACE, 0)))
            self.lowered.kernels[name] = self.cache[spec, schedule][1]
        gvar, kernel = self.cache[spec, schedule]
        if weights is not None:
            packed = family.pack_weights(spec, kernel.schedule, self.isa, weights)
            key = packed.shape, str(packed.dtype), packed.tobytes()
            known = self.constants.setdefault(key, const(packed))  # every activation plane meets the same weights
            operands = [known if a is None else a for a in operands]
            self.note(layer, kernel.name, packed.nbytes, key)
        types = [*types, *([relax.TensorType([kernel.workspace], "int32")] if kernel.workspace else [])]
        made = self.emit(relax.call_tir(gvar, relax.Tuple(operands), types if len(types) > 1 else types[0]), layer_hint(layer))
        # A workspace is one more result, so that memory is planned for it, which nobody reads.
        return self.emit(relax.TupleGetItem(made, 0)) if kernel.workspace and len(types) == 2 else made

    def note(self, layer, kernel, size, key):
        """Note what computes a layer, or several joined, and the bytes of its packed weights, known by ``key``."""
        fresh = (layer, key) not in self.counted
        self.counted.add((layer, key))
        names = sp.split_layers(layer) if layer else [layer]
        for name in names:
            first, bytes_ = self.lowered.layers.get(name, (kernel, 0))  # a layer may be computed by several kernels
            self.lowered.layers[name] = first, bytes_ + size * fresh // len(names)


def _read_in_channel_order(func):
    """float32 images of ``func`` whose only use is a transpose from NHWC to NCHW."""
    count, found = uses(func), set()
    for binding in bindings(func):
        value = binding.value
        if op_name(value) == "relax.permute_dims" and isinstance(value.args[0], relax.Var) and count[value.args[0]] == 1:
            axes = value.attrs["axes"]
            if axes is not None and tuple(int(a) for a in axes) == TO_CHANNEL_ORDER and dtype(value.args[0]) == "float32":
                found.add(value.args[0])
    return found


def _read_by_pools(func, mod):
    """Results of groups that nothing reads but one pool of 2x2 pixels: (value, number of the result) to (variable of it, output kind)."""
    count, found = uses(func), {}
    values = {binding.var: binding.value for binding in bindings(func)}
    for value in values.values():
        if not (isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar) and len(value.args) == 1):
            continue
        data, kind = value.args[0], _halving_pool(mod[value.op])
        if kind is None or not isinstance(data, relax.Var) or count[data] != 1:
            continue
        made = values.get(data)
        if isinstance(made, relax.TupleGetItem):
            found[made.tuple_value, made.index] = data, kind
        elif made is not None:
            found[data, 0] = data, kind
    return found


def _halving_pool(func):
    """The output kind that a group is, if it is nothing but a pool of 2x2 float32 pixels without padding."""
    members = [b.value for b in bindings(func) if op_name(b.value)]
    kind = {"relax.nn.max_pool2d": "max_pool", "relax.nn.avg_pool2d": "avg_pool"}.get(op_name(members[0])) if len(members) == 1 else None
    if kind is None or dtype(members[0].args[0]) != "float32" or any(not isinstance(d, int) for d in dims(members[0])[1:]):
        return None
    window = _pool_window(members[0], dims(members[0]))
    plain = (window.kernel, window.strides, window.pads, window.dilations) == ((2, 2), (2, 2), (0, 0, 0, 0), (1, 1))
    return kind if plain else None


def _planar(spec):
    """``spec`` with its one tensor stored in channel order."""
    (output,) = spec.epilogue.outputs
    return replace(spec, epilogue=replace(spec.epilogue, outputs=(replace(output, kind="planar"),)))


def _reduces_rows(call):
    """Whether a reduction runs along the last axis of a float32 tensor of at least two axes, the last of a known size."""
    shape, axes = dims(call.args[0]), call.attrs["axis"]
    last = axes is not None and [int(a) % len(shape) for a in axes] == [len(shape) - 1]
    return last and len(shape) > 1 and isinstance(shape[-1], int) and dtype(call.args[0]) == "float32"


def packs_only(epilogue):
    """Whether an epilogue only stores packed planes, made from the anchor and per-channel operands."""
    return all(o.kind == "bits" for o in epilogue.outputs) and all(i.kind in ("channel", "words") for i in epilogue.inputs)


def _actual(arg, actual):
    return actual[arg] if isinstance(arg, relax.Var) else arg


def _results(func):
    """The variables that a group returns."""
    result = func.body.body
    by_var = {b.var: b.value for b in bindings(func)}
    while isinstance(result, relax.Var) and isinstance(by_var.get(result), (relax.Var, relax.Tuple)):
        result = by_var[result]
    return list(result.fields) if isinstance(result, relax.Tuple) else [result]


def _retyped(types, arguments, _func):
    """Types of a group's results in terms of the caller's dynamic dimensions."""
    lead = {}
    for arg in arguments:
        if isinstance(arg, relax.Var) and isinstance(arg.ty, relax.TensorType) and dims(arg):
            lead.setdefault(len(dims(arg)), dims(arg)[0])
    fallback = next(iter(lead.values()), None)
    out = []
    for ty in types:
        shape = list(ty.shape)
        if shape and not isinstance(shape[0], (int, tvm.tirx.IntImm)):
            shape[0] = lead.get(len(shape), fallback)
        out.append(relax.TensorType(shape, ty.dtype))
    return out
