"""Channels last: rewrite a graph in ONNX layouts so that every image tensor is stored NHWC.

Instead of inserting transposes around convolutions, each value carries the permutation between its logical (ONNX) axes and the axes it
is stored with. Transposes in the graph only change that permutation; operators that need a certain order convert where they must. A
flattened image remembers the order of its features, so that the dense layer behind it permutes its constant weights at compile time.

After this pass every ``bnn.conv`` is two-dimensional with layout NHWC, and pools are NHWC; one- and two-dimensional transposed convolutions
have become ordinary ones (see transposed.py). Ordering contract: first pass after import.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from bnntvm import ops
from bnntvm.graph import Rewriter, bindings, const, constant, dims, op_name, operands, same_dims

from .transposed import correlation_weights, split_axis

NHWC = (0, 2, 3, 1)

ELEMENTWISE = {
    "add", "subtract", "multiply", "divide", "power", "maximum", "minimum", "negative", "abs", "sign", "sqrt", "rsqrt", "exp", "log",
    "tanh", "sigmoid", "erf", "floor", "ceil", "round", "equal", "not_equal", "less", "less_equal", "greater", "greater_equal",
    "logical_and", "logical_or", "logical_not", "logical_xor", "where", "astype", "clip", "nn.relu", "nn.leakyrelu", "nn.silu", "nn.gelu",
    "square", "sin", "cos", "mod", "floor_mod", "floor_divide", "bitwise_and", "bitwise_or", "bitwise_xor", "isnan", "isinf", "trunc",
}  # fmt: skip
REDUCTIONS = {"mean", "sum", "max", "min", "prod"}


@dataclass(frozen=True)
class Stored:
    """How a logical value is stored.

    Attributes
    ----------
    expr : relax.Expr
        The stored tensor.
    perm : tuple of int
        Stored axis j is logical axis perm[j].
    order : np.ndarray or None
        Stored feature j of the last axis is logical feature order[j] (flattened images only).
    """

    expr: relax.Expr
    perm: tuple
    order: object = None

    @property
    def plain(self):
        return self.order is None and self.perm == tuple(range(len(self.perm)))


class _ChannelsLast(Rewriter):
    def begin(self):
        self.env = {p: Stored(p, tuple(range(len(dims(p))))) for p in self.func.params}

    def walk(self):
        # An image that meets a convolution in the file's NCHW order is turned once, at the door, not behind elementwise operators.
        for param in images_in_channel_order(self.func):
            self.env[param] = Stored(self.emit(relax.op.permute_dims(param, list(NHWC))), NHWC)
        super().walk()

    def rewrite(self, var, value):
        name = op_name(value)
        short = name.removeprefix("relax.") if name else ""
        handler = getattr(self, "on_" + short.replace(".", "_"), None)
        if short in ELEMENTWISE:
            return self.elementwise(var, value)
        if short in REDUCTIONS:
            return self.reduction(value)
        if handler is not None:
            out = handler(var, value)
            if out is not None:
                return out
        return self.default(value)

    def finish(self, body):
        return self.substitute(body)

    # A variable read by generic code is read in its logical layout.
    def substitute(self, expr):
        if isinstance(expr, relax.Var):
            stored = self.env[expr]
            return self.plain(stored) if isinstance(stored, Stored) else stored
        return super().substitute(expr)

    def default(self, value):
        out = self.emit(self.substitute(value))
        return Stored(out, tuple(range(len(dims(out))))) if isinstance(out.ty, relax.TensorType) else out

    def stored(self, expr):
        """Storage of an operand; constants are stored as they are."""
        if isinstance(expr, relax.Var):
            return self.env[expr]
        return Stored(expr, tuple(range(len(dims(expr)))))

    def plain(self, stored):
        expr = stored.expr
        if stored.order is not None:
            natural = const(np.argsort(stored.order).astype(np.int64))
            expr = self.emit(relax.op.take(expr, natural, axis=len(stored.perm) - 1, mode="clip"))
        return self.permuted(expr, stored.perm, tuple(range(len(stored.perm))))

    def permuted(self, expr, have, want):
        """``expr`` stored with permutation ``have``, stored with ``want`` instead."""
        axes = [have.index(axis) for axis in want]
        if axes == list(range(len(axes))):
            return expr
        array = constant(expr)
        if array is not None:
            return const(np.transpose(array, axes))
        if _moves_only_unit_axes(dims(expr), axes):
            return self.emit(relax.op.reshape(expr, [dims(expr)[a] for a in axes]))
        return self.emit(relax.op.permute_dims(expr, axes))

    def convert(self, expr, want):
        """Operand ``expr`` stored with permutation ``want``."""
        stored = self.stored(expr)
        if stored.order is not None:
            return self.permuted(self.plain(stored), tuple(range(len(stored.perm))), want)
        return self.permuted(stored.expr, stored.perm, want)

    def on_bnn_conv(self, _var, call):
        data, weight = call.args[0], constant(call.args[1])
        rank = len(dims(data))
        if rank not in (3, 4) or weight is None:
            return None
        attrs = {key: call.attrs[key] for key in ("strides", "pads", "dilations")}
        strides, pads, dilations = ([int(v) for v in attrs[key]] for key in ("strides", "pads", "dilations"))
        groups, layer = int(call.attrs["groups"]), str(call.attrs["layer"])
        if rank == 3:
            weight, strides, pads, dilations = weight[:, :, None], [1, *strides], [0, pads[0], 0, pads[1]], [1, *dilations]
        weight = weight.transpose(0, 2, 3, 1)
        out = self.convolve(self.image(data), weight, layer=layer, strides=strides, pads=pads, dilations=dilations, groups=groups)
        return self.from_image(out, rank)

    def image(self, data):
        """``data`` as NHWC. A 1-D image is a 2-D one of height 1: [N, C, L] is stored [N, L, C] and read as [N, 1, L, C]."""
        if len(dims(data)) == 4:
            return self.convert(data, NHWC)
        stored = self.convert(data, (0, 2, 1))
        n, length, channels = dims(stored)
        return self.emit(relax.op.reshape(stored, [n, 1, length, channels]))

    def from_image(self, out, rank):
        """The inverse of ``image``."""
        if rank == 4:
            return Stored(out, NHWC)
        n, _, length, channels = dims(out)
        return Stored(self.emit(relax.op.reshape(out, [n, length, channels])), (0, 2, 1))

    def convolve(self, image, weight, **attrs):
        """A convolution of NHWC ``image`` with weights [O, kh, kw, C/groups]; negative pads drop rows or columns."""
        pads = attrs.pop("pads")
        if min(pads) < 0:
            cut, sizes = [max(-p, 0) for p in pads], dims(image)[1:3]
            ends = [size - cut[2 + i] for i, size in enumerate(sizes)]
            image = self.emit(relax.op.strided_slice(image, [1, 2], cut[:2], ends))
        return self.emit(ops.call(ops.CONV, [image, const(weight)], layout="NHWC", pads=[max(p, 0) for p in pads], **attrs))

    def on_bnn_conv_transpose(self, _var, call):
        data, weight, attrs = call.args[0], constant(call.args[1]), call.attrs
        rank, spatial = len(dims(data)), len(dims(data)) - 2
        if rank not in (3, 4) or weight is None or not all(isinstance(d, int) for d in dims(data)[2:]):
            return None
        strides, dilations, extra, pads = ([int(v) for v in attrs[k]] for k in ("strides", "dilations", "output_padding", "pads"))
        sizes, pairs = list(dims(data)[2:]), list(zip(pads[:spatial], pads[spatial:]))
        if rank == 3:
            weight, sizes, strides, dilations, extra, pairs = (
                weight[:, :, None], [1, *sizes], [1, *strides], [1, *dilations], [0, *extra], [(0, 0), *pairs],
            )  # fmt: skip
        axes = [split_axis(*each) for each in zip(sizes, weight.shape[2:], strides, dilations, pairs, extra)]
        weight = correlation_weights(weight, int(attrs["groups"]))
        image = self.image(data)
        parts = self.phases(image, weight, axes, dict(layer=str(attrs["layer"]), groups=int(attrs["groups"])))
        return self.from_image(self.interleave(parts, axes, len(weight)), rank)

    def phases(self, image, weight, axes, attrs):
        """The results of all phases, [N, T, U, phases * O] in one tensor or in several; equal windows are one convolution."""
        rows, columns = (axis.phases for axis in axes)
        grid = [(row, column) for row in rows for column in columns]
        window = {(len(r.taps), r.dilation, r.pads, len(c.taps), c.dilation, c.pads) for r, c in grid}
        chosen = [weight[:, list(r.taps)][:, :, list(c.taps)] for r, c in grid]
        if attrs["groups"] == 1 and len(window) == 1:
            grid, chosen = grid[:1], [np.concatenate(chosen)]
        out = []
        for (row, column), taps in zip(grid, chosen):
            if not taps.size:  # nothing meets these pixels: the kernel is smaller than the stride
                shape = [dims(image)[0], axes[0].length, axes[1].length, len(taps)]
                out.append(self.emit(relax.op.broadcast_to(const(np.zeros((1, 1, 1, 1), np.float32)), shape)))
                continue
            pads = [row.pads[0], column.pads[0], row.pads[1], column.pads[1]]
            out.append(self.convolve(image, taps, strides=[1, 1], pads=pads, dilations=[row.dilation, column.dilation], **attrs))
        return out

    def interleave(self, parts, axes, channels):
        """[N, T, U, sh * sw * O] -> [N, T * sh, U * sw, O], cut to the result's size."""
        out = parts[0] if len(parts) == 1 else self.emit(relax.op.concat(parts, 3))
        lead, (rows, columns) = dims(out)[0], axes
        sh, sw = len(rows.phases), len(columns.phases)
        if sh * sw > 1:
            out = self.emit(relax.op.reshape(out, [lead, rows.length, columns.length, sh, sw, channels]))
            out = self.emit(relax.op.permute_dims(out, [0, 1, 3, 2, 4, 5]))
            out = self.emit(relax.op.reshape(out, [lead, rows.length * sh, columns.length * sw, channels]))
        wanted = [(axis.first, axis.first + axis.size) for axis in axes]
        if wanted != [(0, d) for d in dims(out)[1:3]]:
            out = self.emit(relax.op.strided_slice(out, [1, 2], [w[0] for w in wanted], [w[1] for w in wanted]))
        return out

    def on_bnn_matmul(self, _var, call):
        lhs, rhs = self.stored(call.args[0]), call.args[1]
        weight = constant(rhs)
        if lhs.order is None or weight is None or weight.ndim != 2:
            return None
        out = self.emit(ops.call(ops.MATMUL, [lhs.expr, const(weight[lhs.order])], layer=str(call.attrs["layer"])))
        return Stored(out, tuple(range(len(dims(out)))))

    def _pool(self, call, make):
        attrs = call.attrs
        if str(attrs["layout"]) != "NCHW":
            return None
        out = make(
            self.convert(call.args[0], NHWC),
            [int(v) for v in attrs["pool_size"]],
            [int(v) for v in attrs["strides"]],
            [int(v) for v in attrs["padding"]],
            [int(v) for v in attrs["dilation"]],
            bool(attrs["ceil_mode"]),
            bool(attrs["count_include_pad"]),
            "NHWC",
        )
        return Stored(self.emit(out), NHWC)

    def on_nn_max_pool2d(self, _var, call):
        return self._pool(call, relax.op.nn.max_pool2d)

    def on_nn_avg_pool2d(self, _var, call):
        return self._pool(call, relax.op.nn.avg_pool2d)

    def elementwise(self, var, call):
        rank = len(dims(var))
        stores = [self.stored(arg) for arg in call.args]
        full = [s for arg, s in zip(call.args, stores) if isinstance(arg, relax.Var) and len(s.perm) == rank]
        lead = next((s for s in full if not s.plain), None)
        if lead is None:
            return self.default(call)
        if lead.order is not None and not self._order_fits(lead, call.args, stores):
            return self.default(call)
        args = [self._operand(arg, s, lead, rank) for arg, s in zip(call.args, stores)]
        out = self.emit(relax.Call(call.op, args, call.attrs, call.ty_args))
        return Stored(out, lead.perm, lead.order)

    def _order_fits(self, lead, args, stores):
        """Whether every operand is constant or stored in the same feature order."""
        return all(constant(a) is not None or s.order is lead.order or dims(s.expr)[-1:] in ((), (1,)) for a, s in zip(args, stores))

    def _operand(self, arg, stored, lead, rank):
        shape = dims(stored.expr)
        if len(shape) == 0 or all(d == 1 for d in shape) and constant(arg) is not None:
            return stored.expr
        if lead.order is not None:
            array = constant(arg)
            return const(np.take(array, lead.order, axis=-1)) if array is not None and array.shape[-1] != 1 else stored.expr
        if len(shape) == rank:
            return self.convert(arg, lead.perm)
        expr = self.plain(stored)
        array = constant(expr)
        padded = [1] * (rank - len(shape)) + list(shape)
        expr = const(array.reshape(padded)) if array is not None else self.emit(relax.op.reshape(expr, padded))
        return self.permuted(expr, tuple(range(rank)), lead.perm)

    def reduction(self, call):
        stored = self.stored(call.args[0])
        if stored.order is not None:
            return self.default(call)
        rank = len(stored.perm)
        axes = range(rank) if call.attrs["axis"] is None else [int(a) % rank for a in call.attrs["axis"]]
        keepdims = bool(call.attrs["keepdims"])
        where = sorted(stored.perm.index(a) for a in axes)
        make = getattr(relax.op, op_name(call).removeprefix("relax."))
        out = self.emit(make(stored.expr, where, keepdims))
        if keepdims:
            return Stored(out, stored.perm)
        left = [a for a in stored.perm if a not in set(axes)]
        ranked = sorted(left)
        return Stored(out, tuple(ranked.index(a) for a in left))

    def on_permute_dims(self, var, call):
        stored = self.stored(call.args[0])
        if stored.order is not None:
            return None
        rank = len(stored.perm)
        axes = [int(a) for a in call.attrs["axes"]] if call.attrs["axes"] is not None else list(range(rank))[::-1]
        return Stored(stored.expr, tuple(axes.index(a) for a in stored.perm))

    def on_concat(self, _var, call):
        fields = list(call.args[0].fields)
        stores = [self.stored(f) for f in fields]
        lead = next((s for s in stores if not s.plain), None)
        if lead is None or any(s.order is not None for s in stores):
            return None
        axis = int(call.attrs["axis"]) % len(lead.perm)
        return Stored(self.emit(relax.op.concat([self.convert(f, lead.perm) for f in fields], lead.perm.index(axis))), lead.perm)

    def on_split(self, _var, call):
        stored = self.stored(call.args[0])
        if stored.plain or stored.order is not None:
            return None
        axis = stored.perm.index(int(call.attrs["axis"]) % len(stored.perm))
        sections = call.attrs["indices_or_sections"]
        sections = [int(v) for v in sections] if not isinstance(sections, (int, tvm.tirx.IntImm)) else int(sections)
        return _Split(self.emit(relax.op.split(stored.expr, sections, axis)), stored.perm)

    def on_strided_slice(self, _var, call):
        stored = self.stored(call.args[0])
        if stored.plain or stored.order is not None:
            return None
        axes, begin, end = ([_value(v) for v in call.args[i].fields] for i in (1, 2, 3))
        strides = [_value(v) for v in call.args[4].fields] if len(call.args) > 4 else None
        axes = [stored.perm.index(a % len(stored.perm)) for a in axes]
        return Stored(self.emit(relax.op.strided_slice(stored.expr, axes, begin, end, strides)), stored.perm)

    def on_take(self, _var, call):
        """Rows, columns or channels by a list of indices, as of ``Resize`` to the nearest pixel: along the axis where they are stored."""
        stored = self.stored(call.args[0])
        if stored.plain or stored.order is not None or call.attrs["axis"] is None or len(dims(call.args[1])) != 1:
            return None
        axis = stored.perm.index(int(call.attrs["axis"]) % len(stored.perm))
        out = relax.op.take(stored.expr, self.substitute(call.args[1]), axis=axis, mode=str(call.attrs["mode"]))
        return Stored(self.emit(out), stored.perm)

    def on_nn_pad(self, _var, call):
        stored = self.stored(call.args[0])
        if stored.plain or stored.order is not None:
            return None
        width = [int(v) for v in call.attrs["pad_width"]]
        pairs = [width[2 * a : 2 * a + 2] for a in stored.perm]
        mode, value = str(call.attrs["pad_mode"]), float(call.attrs["pad_value"])
        return Stored(self.emit(relax.op.nn.pad(stored.expr, sum(pairs, []), mode, value)), stored.perm)

    def on_expand_dims(self, _var, call):
        stored = self.stored(call.args[0])
        if stored.plain or stored.order is not None:
            return None
        rank = len(stored.perm) + len(call.attrs["axis"])
        new = sorted(int(a) % rank for a in call.attrs["axis"])
        old = [a for a in range(rank) if a not in new]
        shape = [1] * len(new) + list(dims(stored.expr))
        return Stored(self.emit(relax.op.reshape(stored.expr, shape)), (*new, *(old[a] for a in stored.perm)))

    def on_squeeze(self, _var, call):
        stored = self.stored(call.args[0])
        if stored.plain or stored.order is not None or call.attrs["axis"] is None:
            return None
        gone = {int(a) % len(stored.perm) for a in call.attrs["axis"]}
        left = [a for a in range(len(stored.perm)) if a not in gone]
        kept = [(d, left.index(a)) for d, a in zip(dims(stored.expr), stored.perm) if a not in gone]
        return Stored(self.emit(relax.op.reshape(stored.expr, [d for d, _ in kept])), tuple(a for _, a in kept))

    def on_reshape(self, var, call):
        stored = self.stored(call.args[0])
        if stored.plain or stored.order is not None:
            return None
        old, new = dims(call.args[0]), dims(var)
        if not _flattens_image(old, new):
            return None
        stored_shape = dims(stored.expr)
        if stored.perm[0] != 0:
            return None
        flat = self.emit(relax.op.reshape(stored.expr, list(new)))
        size = int(np.prod(old[1:]))
        order = np.arange(size).reshape(old[1:]).transpose([a - 1 for a in stored.perm[1:]]).reshape(-1)
        del stored_shape
        return Stored(flat, (0, 1), None if np.array_equal(order, np.arange(size)) else order)

    on_flatten = on_reshape

    def on_image_resize2d(self, _var, call):
        if str(call.attrs["layout"]) != "NCHW":
            return None
        attrs = call.attrs
        out = relax.op.image.resize2d(
            self.convert(call.args[0], NHWC), call.args[1],
            roi=[float(v) for v in attrs["roi"]] if len(attrs["roi"]) else None, layout="NHWC", method=str(attrs["method"]),
            coordinate_transformation_mode=str(attrs["coordinate_transformation_mode"]), rounding_method=str(attrs["rounding_method"]),
            cubic_alpha=float(attrs["cubic_alpha"]), cubic_exclude=int(attrs["cubic_exclude"]),
            extrapolation_value=float(attrs["extrapolation_value"]),
        )  # fmt: skip
        return Stored(self.emit(out), NHWC)

    def rewrite_item(self, var, value):
        split = self.env[value.tuple_value]
        if isinstance(split, _Split):
            return Stored(self.emit(relax.TupleGetItem(split.expr, value.index)), split.perm)
        out = self.emit(relax.TupleGetItem(split, value.index))
        return Stored(out, tuple(range(len(dims(out)))))


@dataclass(frozen=True)
class _Split:
    """The tuple that a split of a stored value makes."""

    expr: relax.Expr
    perm: tuple


def images_in_channel_order(func):
    """Rank-4 parameters that reach a convolution or a pool through elementwise operators and padding only."""
    origin, found = {p: p for p in func.params if isinstance(p.ty, relax.TensorType) and len(dims(p)) == 4}, []
    for binding in bindings(func):
        short = (op_name(binding.value) or "").removeprefix("relax.")
        sources = [origin[a] for a in operands(binding.value) if a in origin]
        if not sources:
            continue
        if short in ELEMENTWISE or short == "nn.pad":
            origin[binding.var] = sources[0]
        elif short in ("bnn.conv", "bnn.conv_transpose", "nn.max_pool2d", "nn.avg_pool2d") and sources[0] not in found:
            found.append(sources[0])
    return found


def _value(prim):
    """The integer of a PrimValue or IntImm operand, or the expression itself."""
    prim = getattr(prim, "value", prim)
    return int(prim) if isinstance(prim, (int, tvm.tirx.IntImm)) else prim


def _moves_only_unit_axes(shape, axes):
    """Whether a permutation keeps the order of all axes longer than one (then it is a reshape)."""
    real = [a for a in axes if shape[a] != 1]
    return real == sorted(real)


def _flattens_image(old, new):
    """Whether a reshape keeps axis 0 and merges all the static others into one."""
    return len(new) == 2 and len(old) > 2 and same_dims(old[:1], new[:1]) and all(isinstance(d, int) for d in old[1:])


class _Pass(_ChannelsLast):
    def rewrite(self, var, value):
        if isinstance(value, relax.TupleGetItem):
            return self.rewrite_item(var, value)
        return super().rewrite(var, value)


@tvm.transform.module_pass(opt_level=0, name="bnn.ChannelsLast")
class ChannelsLast:
    """See the module's documentation."""

    def transform_module(self, mod, _context):
        return _Pass().run(mod)
