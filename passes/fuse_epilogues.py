"""Group every layer, pool and packing with the elementwise operators that follow it: one kernel, one trip through memory.

A group is an anchor (packed or float convolution or dense layer, pool, global pool, or none: the identity) and elementwise members on the
anchor's shape. Each becomes a private Relax function with the attribute ``bnn.anchor``; ``main`` calls it. A value that is read outside its
group is one of the function's results, so a residual sum and its packed signs come out of the same kernel.

Operators that fit nowhere stay in ``main`` for TVM's own lowering. Ordering contract: after FoldThresholds and CanonicaliseDense.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import tvm
from tvm import relax

from bnntvm.bits import WORD_BITS
from bnntvm.graph import Rewriter, bindings, constant, dims, dtype, op_name, operands, same_dim, same_dims, uses

#: Relax operators that an epilogue can contain.
ELEMENTWISE = {
    "relax." + name
    for name in (
        "add subtract multiply divide maximum minimum power greater greater_equal less less_equal equal not_equal logical_and logical_or "
        "logical_not logical_xor negative abs sign sqrt rsqrt exp log tanh sigmoid erf floor ceil round nn.relu astype where clip"
    ).split()
}
DTYPES = {"float32", "int32", "bool"}
#: "Anchor" of a group of one operator that no kernel family takes.
LOOSE = "loose"
ANCHORS = {
    "bnn.conv2d_bits", "bnn.dense_bits", "bnn.conv2d_planes", "bnn.dense_planes", "bnn.conv2d_weight", "bnn.dense_weight",
    "bnn.conv2d_int8", "bnn.conv", "bnn.matmul", "relax.nn.max_pool2d", "relax.nn.avg_pool2d", "relax.mean", "relax.concat",
    "relax.nn.softmax",
}  # fmt: skip


POOLS = ("relax.nn.max_pool2d", "relax.nn.avg_pool2d")
#: Anchors whose kernels read an operand several times side by side.
_READS_TILES = {"bnn.conv2d_bits", "bnn.conv2d_planes"}


@dataclass(eq=False)
class Group:
    """An anchor and its elementwise members, in order."""

    anchor: str
    shape: tuple
    members: list = field(default_factory=list)
    feeds: set = field(default_factory=set)  # groups whose results this one reads


def operand_kind(arg, shape):
    """How an operand of an elementwise operator on ``shape`` is read: scalar, channel, tensor, image, pixel, or None (not at all)."""
    own, rank = dims(arg), len(shape)
    array = constant(arg)
    if array is not None and array.size == 1:
        return "scalar"
    own = (1,) * (rank - len(own)) + tuple(own)
    if len(own) > rank:
        return None
    if array is not None and all(d == 1 for d in own[:-1]) and same_dim(own[-1], shape[-1]):
        return "channel"
    if same_dims(own, shape):
        return "tensor" if len(dims(arg)) == rank else None
    if array is None and same_dims(own[:-1], shape[:-1]) and own[-1] == 1:
        return "pixel"
    if array is None and rank == 4 and same_dim(own[0], shape[0]) and own[1] == own[2] == 1 and same_dim(own[3], shape[3]):
        return "image"
    return None


def is_anchor(var, value):
    """Whether a binding can head a group."""
    name = op_name(value)
    if name not in ANCHORS:
        return False
    if name == "bnn.conv":
        return str(value.attrs["layout"]) == "NHWC"
    if name == "bnn.matmul":
        weight = constant(value.args[1])
        return weight is not None and weight.ndim == 2 and len(dims(value.args[0])) == 2 and dtype(var) == "float32"
    if name in POOLS:
        return str(value.attrs["layout"]) == "NHWC" and dtype(var) == "float32" and not _ragged_average(value)
    if name == "relax.concat":
        rank = len(dims(var))
        along = int(value.attrs["axis"]) % rank == rank - 1
        return rank in (2, 4) and along and dtype(var) in ("float32", "uint32") and _all_variables(value)
    if name == "relax.nn.softmax":
        return len(dims(var)) == 2 and int(value.attrs["axis"]) % 2 == 1 and dtype(var) == "float32"
    if name == "relax.mean":
        axes = [int(a) for a in value.attrs["axis"]] if value.attrs["axis"] is not None else []
        return axes == [1, 2] and bool(value.attrs["keepdims"]) and len(dims(value.args[0])) == 4 and dtype(var) == "float32"
    return True


def _all_variables(call):
    return all(isinstance(field, relax.Var) for field in call.args[0].fields)


def _ragged_average(call):
    """Average pools with dilation or a ceiling are left to TVM."""
    return op_name(call) == "relax.nn.avg_pool2d" and (any(int(d) != 1 for d in call.attrs["dilation"]) or bool(call.attrs["ceil_mode"]))


def is_tile(value):
    """Whether a value is a float32 tensor of whole words of channels, several times side by side along the channels."""
    if op_name(value) != "relax.tile" or not isinstance(value.args[0], relax.Var) or dtype(value.args[0]) != "float32":
        return False
    repeats, shape = [int(n) for n in value.attrs["repeats"]], dims(value.args[0])
    whole = isinstance(shape[-1], int) and shape[-1] % WORD_BITS == 0
    return len(repeats) == len(shape) and repeats[-1] > 1 and set(repeats[:-1]) == {1} and whole


class Partition:
    """Assigns the bindings of a function to groups."""

    def __init__(self, func):
        self.group_of, self.groups, self.readers = {}, [], {}
        self.tiles, count = {}, uses(func)
        for binding in bindings(func):
            if is_tile(binding.value) and count.get(binding.var) == 1:
                self.tiles[binding.var] = binding.value
            else:
                self.settle_tiles(binding.var, binding.value)
                self.place(binding.var, binding.value)
        self.repeat_bits(func)

    def settle_tiles(self, var, value):
        """Operands that are tensors several times side by side: members of the layer whose kernel is to read them so, else loose."""
        for tile in [arg for arg in operands(value) if arg in self.tiles]:
            call = self.tiles.pop(tile)
            others = {self.group_of[a] for a in operands(value) if a in self.group_of}
            group, source = others.pop() if len(others) == 1 else None, self.group_of.get(call.args[0])
            layer = group is not None and group.anchor in _READS_TILES and same_dims(group.shape, dims(var))
            takes = layer and op_name(value) in ELEMENTWISE and self.fits(var, value) and not self.reads_bits(value, group)
            if takes and (source is None or not self.reaches(group, source)):
                self.add(group, tile, call)
            else:
                self.add(self.new_group(LOOSE, ()), tile, call)

    def place(self, var, value):
        tensor = isinstance(var.ty, relax.TensorType)
        if tensor and is_anchor(var, value):
            self.add(self.new_group(op_name(value), dims(var)), var, value)
        elif op_name(value) == "bnn.pack" and self.group_of[value.args[0]].anchor != LOOSE:
            self.add(self.group_of[value.args[0]], var, value)
        elif tensor and op_name(value) in ELEMENTWISE and self.fits(var, value):
            self.place_elementwise(var, value)
        else:
            self.add(self.new_group(LOOSE, ()), var, value)

    def fits(self, var, value):
        if len(dims(var)) < 1 or not isinstance(dims(var)[-1], int):
            return False
        kinds = [operand_kind(arg, dims(var)) for arg in value.args if not isinstance(arg, relax.ShapeExpr)]
        typed = all(dtype(arg) in DTYPES for arg in value.args) and dtype(var) in DTYPES
        return typed and None not in kinds and any(isinstance(a, relax.Var) and k == "tensor" for a, k in zip(value.args, kinds))

    def place_elementwise(self, var, value):
        """Into the last group that can take it. Pools come after layers: the layer before a pool may do a plain one on the way."""
        shape = dims(var)
        full = [a for a in operands(value) if same_dims(dims(a), shape)]
        candidates = [self.group_of[a] for a in full if a in self.group_of and same_dims(self.group_of[a].shape, shape)]  # loose: shape ()
        for group in sorted(set(candidates), key=lambda g: (g.anchor not in POOLS, self.groups.index(g)), reverse=True):
            others = {self.group_of[a] for a in operands(value) if a in self.group_of} - {group}
            if not self.reads_bits(value, group) and not any(self.reaches(group, other) for other in others):
                return self.add(group, var, value)
        if self.reads_bits(value, None):
            return self.add(self.new_group(LOOSE, ()), var, value)
        return self.add(self.identity_group(full, operands(value), shape), var, value)

    def reads_bits(self, value, group):
        """Whether a bool operand comes from outside ``group``: kernels do not load bool."""
        return any(dtype(a) == "bool" and (group is None or self.group_of.get(a) is not group) for a in operands(value))

    def identity_group(self, full, args, shape):
        """The group without an anchor that reads the same tensor already, so that it is read once; else a new one."""
        for data in full:
            group = self.readers.get(data)
            if group is not None and same_dims(group.shape, shape):
                others = {self.group_of[a] for a in args if a in self.group_of} - {group}
                if not any(self.reaches(group, other) for other in others):
                    return group
        group = self.new_group("identity", shape)
        self.readers.update((data, group) for data in full[:1])
        return group

    def new_group(self, anchor, shape):
        group = Group(anchor, tuple(shape))
        self.groups.append(group)
        return group

    def add(self, group, var, value):
        group.members.append((var, value))
        self.group_of[var] = group
        for arg in operands(value):
            other = self.group_of.get(arg)
            if other is not None and other is not group:
                group.feeds.add(other)

    def reaches(self, start, goal):
        """Whether ``goal`` needs a result of ``start``."""
        seen, todo = set(), [goal]
        while todo:
            group = todo.pop()
            if group is start:
                return True
            if group not in seen:
                seen.add(group)
                todo.extend(group.feeds)
        return False

    def repeat_bits(self, func):
        """A bool that is read outside its group is computed once more outside, by TVM's own lowering: kernels do not store bool.

        Then the variable is a member of its group, which reads its own, and of the loose group that ``group_of`` tells everyone else.
        """
        values, escaping = {binding.var: binding.value for binding in bindings(func)}, escapes(func, self.group_of)
        todo = [var for var in values if var in escaping and isinstance(var.ty, relax.TensorType) and dtype(var) == "bool"]
        while todo:
            var = todo.pop()
            group = self.group_of.get(var)
            if group is not None and group.anchor != LOOSE:
                self.add(self.new_group(LOOSE, ()), var, values[var])
                todo.extend(a for a in operands(values[var]) if dtype(a) == "bool")
        self.connect()

    def connect(self):
        """Recompute which groups read which."""
        for group in self.groups:
            own = {var for var, _ in group.members}
            reads = {self.group_of[a] for _, value in group.members for a in operands(value) if a in self.group_of and a not in own}
            group.feeds = reads - {group}

    def ordered(self):
        """Groups so that each comes after those it reads."""
        done, order = set(), []

        def visit(group):
            if group not in done:
                done.add(group)
                for other in sorted(group.feeds, key=self.position.get):
                    visit(other)
                order.append(group)

        self.position = {group: i for i, group in enumerate(self.groups)}
        for group in self.groups:
            visit(group)
        return order


def escapes(func, group_of):
    """Variables that are read outside their group or returned."""
    out = set(operands(func.body.body))
    for binding in bindings(func):
        here = group_of[binding.var]
        out.update(arg for arg in operands(binding.value) if group_of.get(arg) is not here)
    return out


class _Fuse(Rewriter):
    def walk(self):
        partition = Partition(self.func)
        self.escaping = escapes(self.func, partition.group_of)
        for group in partition.ordered():
            if group.anchor == LOOSE:
                (var, value), = group.members
                self.env[var] = self.rewrite(var, value)
            else:
                self.call_group(group)

    def call_group(self, group):
        inner = {var for var, _ in group.members}
        outputs = [var for var, _ in group.members if var in self.escaping and dtype(var) != "bool"]
        if not outputs:
            return
        inputs = list(dict.fromkeys(a for _, value in group.members for a in operands(value) if a not in inner))
        func = group_function(group, inputs, outputs)
        name = self.builder.add_func(func, "fused_" + group.anchor.rsplit(".", 1)[-1])
        result = self.builder.emit(relax.Call(name, [self.env[a] for a in inputs]))
        for i, var in enumerate(outputs):
            self.env[var] = self.builder.emit(relax.TupleGetItem(result, i)) if len(outputs) > 1 else result


def group_function(group, inputs, outputs):
    """The private Relax function of a group: parameters are ``inputs``, results ``outputs`` (a tuple if more than one)."""
    builder = relax.BlockBuilder()
    params = [relax.Var(f"p{i}", a.ty) for i, a in enumerate(inputs)]
    env = dict(zip(inputs, params))

    def substitute(expr):
        if isinstance(expr, relax.Var):
            return env[expr]
        if isinstance(expr, relax.Call):
            return relax.Call(expr.op, [substitute(arg) for arg in expr.args], expr.attrs, expr.ty_args)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([substitute(arg) for arg in expr.fields])
        return expr

    with builder.function("group", params, attrs={"bnn.anchor": group.anchor, "Primitive": True}, private=True):
        with builder.dataflow():
            for var, value in group.members:
                env[var] = builder.emit(substitute(value))
            made = [env[var] for var in outputs]
            result = builder.emit_output(made[0] if len(made) == 1 else relax.Tuple(made))
        builder.emit_func_output(result)
    return relax.utils.copy_with_new_vars(builder.finalize()["group"])


@tvm.transform.module_pass(opt_level=0, name="bnn.FuseEpilogues")
class FuseEpilogues:
    """See the module's documentation."""

    def transform_module(self, mod, _context):
        return _Fuse().run(mod)
