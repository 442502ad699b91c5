"""Reductions and what is made of them: softmax, arg max, normalisations."""

import numpy as np
from tvm import relax

from ... import ops
from ...errors import ModelError
from ..registry import converts
from ..values import is_constant, shape_of
from .elementwise import Arithmetic
from .layers import product
from .shape import axes_of, part, product_of, reshaped

_REDUCTIONS = {
    "ReduceMean": relax.op.mean,
    "ReduceSum": relax.op.sum,
    "ReduceMax": relax.op.max,
    "ReduceMin": relax.op.min,
    "ReduceProd": relax.op.prod,
}


@converts(*_REDUCTIONS, "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp")
def reduce(ctx, node, x, axes=None):
    rank, keep = len(shape_of(x)), bool(node.attrs.get("keepdims", 1))
    axes = axes_of(ctx, node, axes, rank)
    if not axes and node.attrs.get("noop_with_empty_axes", 0):
        return x
    axes = sorted(axes or range(rank))
    m = Arithmetic(ctx, x)

    def total(value, op=relax.op.sum):
        return ctx.emit(op(ctx.tensor(value), axes, keepdims=keep)) if axes else value

    kind = node.op_type
    if kind in _REDUCTIONS:
        return total(x, _REDUCTIONS[kind])
    if kind == "ReduceL1":
        return total(m.abs(x))
    if kind in ("ReduceL2", "ReduceSumSquare"):
        result = total(m.multiply(x, x))
        return m.sqrt(result) if kind == "ReduceL2" else result
    if kind == "ReduceLogSum":
        return m.log(total(x))
    top = ctx.emit(relax.op.max(ctx.tensor(x), axes, keepdims=True))
    result = m.log(total(m.exp(m.subtract(x, top))))
    return m.add(result, top if keep else reshaped(ctx, top, shape_of(result)))


@converts("Softmax", "LogSoftmax")
def softmax(ctx, node, x):
    op = relax.op.nn.softmax if node.op_type == "Softmax" else relax.op.nn.log_softmax
    shape = shape_of(x)
    if node.opset >= 13:
        return ctx.emit(op(ctx.tensor(x), node.attrs.get("axis", -1) % len(shape)))
    axis = node.attrs.get("axis", 1) % len(shape)
    if all(isinstance(d, int) and d == 1 for d in shape[axis + 1 :]):
        return ctx.emit(op(ctx.tensor(x), axis))
    # Before opset 13 everything from the axis on was one axis.
    flat = reshaped(ctx, x, [product_of(shape[:axis]), product_of(shape[axis:])])
    return reshaped(ctx, ctx.emit(op(ctx.tensor(flat), 1)), shape)


@converts("ArgMax", "ArgMin")
def arg(ctx, node, x):
    shape = shape_of(x)
    axis = node.attrs.get("axis", 0) % len(shape)
    op = relax.op.argmax if node.op_type == "ArgMax" else relax.op.argmin
    last = node.attrs.get("select_last_index", 0)
    if last:
        x = part(ctx, x, axis, shape[axis] - 1, -1, -1)
    result = ctx.emit(op(ctx.tensor(x), axis, bool(node.attrs.get("keepdims", 1))))
    return Arithmetic(ctx, result).subtract(shape[axis] - 1, result) if last else result


@converts("TopK")
def top_k(ctx, node, x, k=None):
    rank, size = len(shape_of(x)), shape_of(x)[node.attrs.get("axis", -1)]
    count = node.attrs["k"] if k is None else ctx.ints(k, "k")[0]
    if not isinstance(size, int) or not 1 <= count <= size:
        raise ModelError("TopK asks for more elements than there are", where=node.where, why=f"k is {count}, the axis has {size} elements")
    axes = list(range(rank))
    axis = axes.pop(node.attrs.get("axis", -1))
    to_last, back = [*axes, axis], [*axes[:axis], rank - 1, *[a - 1 for a in axes[axis:]]]
    data = ctx.tensor(x) if axis == rank - 1 else ctx.emit(relax.op.permute_dims(ctx.tensor(x), to_last))
    both = ctx.emit(relax.op.topk(data, count, rank - 1, "both", bool(node.attrs.get("largest", 1)), "int64"))
    parts = [ctx.emit(relax.TupleGetItem(both, i), node.outputs[i] if axis == rank - 1 else "") for i in range(2)]
    return parts if axis == rank - 1 else [ctx.emit(relax.op.permute_dims(p, back), node.outputs[i]) for i, p in enumerate(parts)]


@converts("CumSum")
def cumulative_sum(ctx, node, x, axis):
    axis = ctx.ints(axis, "the axis")[0] % len(shape_of(x))
    attrs = {name: bool(node.attrs.get(name, 0)) for name in ("exclusive", "reverse")}
    return ctx.emit(ops.call(ops.CUM_SUM, [ctx.tensor(x)], axis=axis, **attrs))


@converts("Einsum")
def einsum(ctx, node, *xs):
    equation = node.attrs["equation"].replace(" ", "")
    if "..." in equation or "->" not in equation:
        raise ctx.unsupported("this Einsum is not supported", why=f"'{equation}' has an ellipsis or no result")
    as_product = _as_product(ctx, node, equation, *xs) if len(xs) == 2 else None
    return as_product if as_product is not None else ctx.emit(relax.op.einsum([ctx.tensor(x) for x in xs], equation))


def _as_product(ctx, node, equation, a, b):
    """A contraction of two operands as a matrix product, which is a layer; None where it is another sum of products."""
    (left, right), result = equation.split("->")[0].split(","), equation.split("->")[1]
    both = set(left) & set(right)
    if any(len(set(part)) < len(part) for part in (left, right, result)) or set(left) ^ set(right) != set(result) - both:
        return None
    if is_constant(a) and not is_constant(b):
        (left, a), (right, b) = (right, b), (left, a)
    batch, summed = ("".join(c for c in left if c in both and (c in result) == kept) for kept in (True, False))
    rows, columns = ("".join(c for c in part if c not in both) for part in (left, right))
    sizes = dict(zip(left, shape_of(a))) | dict(zip(right, shape_of(b)))
    rows_apart = [rows] if batch else [*rows]  # a matrix on the right takes any leading axes
    joined = [group for group in (*rows_apart, summed, columns) if len(group) != 1]
    if not summed or any(not isinstance(sizes[c], int) for group in joined for c in group):
        return None
    a = _arranged(ctx, a, left, [*batch, *rows_apart, summed], sizes)
    b = _arranged(ctx, b, right, [*batch, summed, columns], sizes)
    have = batch + rows + columns
    out = reshaped(ctx, product(ctx, node, a, b, b if is_constant(b) else None), [sizes[c] for c in have])
    axes = [have.index(c) for c in result]
    return out if axes == sorted(axes) else ctx.emit(relax.op.permute_dims(ctx.tensor(out), axes))


def _arranged(ctx, x, names, groups, sizes):
    """``x``, whose axes are called ``names``, with its axes in the order of ``groups``, those of each group as one."""
    axes = [names.index(c) for c in "".join(groups)]
    if axes != sorted(axes):
        x = np.ascontiguousarray(x.transpose(axes)) if is_constant(x) else ctx.emit(relax.op.permute_dims(x, axes))
    if all(len(group) == 1 for group in groups):
        return x
    shape = [sizes[group] if len(group) == 1 else int(np.prod([sizes[c] for c in group])) for group in groups]
    return x.reshape(shape) if is_constant(x) else reshaped(ctx, x, shape)


# ---- normalisations


@converts("BatchNormalization")
def batch_normalisation(ctx, node, x, gamma, beta, mean, variance):
    """``x * s + (beta - mean * s)`` with ``s = gamma / sqrt(var + eps)``, each operation rounded to float32 as ONNX Runtime does."""
    if node.attrs.get("training_mode", 0):
        raise ctx.unsupported("BatchNormalization in training mode is not supported", hint="export the model in evaluation mode")
    if not node.attrs.get("spatial", 1):
        raise ctx.unsupported("BatchNormalization with spatial=0 is not supported", hint="export the model with opset 9 or later")
    eps = np.float32(node.attrs.get("epsilon", 1e-5))
    shape = (1, -1) + (1,) * (len(shape_of(x)) - 2)
    m = Arithmetic(ctx, x)
    if all(map(is_constant, (gamma, beta, mean, variance))):
        gamma, beta, mean, variance = (a.astype(np.float32) for a in (gamma, beta, mean, variance))
        if np.any(variance + eps < 0):
            raise ModelError(
                "a variance is negative",
                where=node.where,
                why=f"'{node.inputs[4]}' holds {variance.min():g}, whose square root is not a number",
                hint="train or export the model again",
            )
        with np.errstate(all="ignore"):
            scale = gamma / np.sqrt(variance + eps)
            shift = beta - mean * scale
        scale, shift = scale.reshape(shape), shift.reshape(shape)
    else:
        gamma, beta, mean, variance = (reshaped(ctx, a, [1, shape_of(a)[0], *shape[2:]]) for a in (gamma, beta, mean, variance))
        scale = m.divide(gamma, m.sqrt(m.add(variance, float(eps))))
        shift = m.subtract(beta, m.multiply(mean, scale))
    return m.add(m.multiply(x, scale), shift)


def _standardised(ctx, x, axes, eps):
    """``(x - mean) / sqrt(variance + eps)`` over ``axes``; also the mean and the reciprocal deviation."""
    m = Arithmetic(ctx, x)
    mean = ctx.emit(relax.op.mean(ctx.tensor(x), axes, keepdims=True))
    centred = m.subtract(x, mean)
    variance = ctx.emit(relax.op.mean(m.multiply(centred, centred), axes, keepdims=True))
    inverse = m.divide(1.0, m.sqrt(m.add(variance, eps)))
    return m.multiply(centred, inverse), mean, inverse


def _per_channel(ctx, value, rank):
    return (
        reshaped(ctx, value, [1, shape_of(value)[0]] + [1] * (rank - 2))
        if not is_constant(value)
        else value.reshape((1, -1) + (1,) * (rank - 2))
    )


@converts("InstanceNormalization")
def instance_normalisation(ctx, node, x, scale, bias):
    m, rank = Arithmetic(ctx, x), len(shape_of(x))
    result, *_ = _standardised(ctx, x, list(range(2, rank)), float(node.attrs.get("epsilon", 1e-5)))
    return m.add(m.multiply(result, _per_channel(ctx, scale, rank)), _per_channel(ctx, bias, rank))


@converts("GroupNormalization")
def group_normalisation(ctx, node, x, scale, bias):
    m, shape, groups = Arithmetic(ctx, x), ctx.static(x), int(node.attrs["num_groups"])
    parts = reshaped(ctx, x, [shape[0], groups, product_of(shape[1:]) // groups])
    result, *_ = _standardised(ctx, parts, [2], float(node.attrs.get("epsilon", 1e-5)))
    result = reshaped(ctx, result, shape)
    return m.add(m.multiply(result, _per_channel(ctx, scale, len(shape))), _per_channel(ctx, bias, len(shape)))


@converts("LayerNormalization")
def layer_normalisation(ctx, node, x, scale, bias=None):
    m, rank = Arithmetic(ctx, x), len(shape_of(x))
    axes = list(range(node.attrs.get("axis", -1) % rank, rank))
    result, mean, inverse = _standardised(ctx, x, axes, float(node.attrs.get("epsilon", 1e-5)))
    result = m.multiply(result, scale)
    return (result if bias is None else m.add(result, bias)), mean, inverse


@converts("RMSNormalization")
def rms_normalisation(ctx, node, x, scale):
    m, rank = Arithmetic(ctx, x), len(shape_of(x))
    axes = list(range(node.attrs.get("axis", -1) % rank, rank))
    mean = ctx.emit(relax.op.mean(m.multiply(x, x), axes, keepdims=True))
    return m.multiply(m.divide(x, m.sqrt(m.add(mean, float(node.attrs.get("epsilon", 1e-5))))), scale)


@converts("LpNormalization")
def lp_normalisation(ctx, node, x):
    m, axis, p = Arithmetic(ctx, x), node.attrs.get("axis", -1) % len(shape_of(x)), node.attrs.get("p", 2)
    total = ctx.emit(relax.op.sum(m.abs(x) if p == 1 else m.multiply(x, x), [axis], keepdims=True))
    return m.divide(x, total if p == 1 else m.sqrt(total))
