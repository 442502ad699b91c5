"""Integer arithmetic on shapes that depend on the batch.

Exporters compute the arguments of Reshape, Expand and the like from Shape with ordinary nodes. Those nodes are followed here on arrays of
ints and TIR expressions and leave no trace in the module.
"""

import numpy as np
from onnx import TensorProto

from .values import Dims, dims_value, is_constant, objects, shape_of, simplify, vector

_INTEGERS = {TensorProto.INT32, TensorProto.INT64}
_RULES = {}


def _rule(*op_types):
    def register(function):
        for op_type in op_types:
            _RULES[op_type] = function
        return function

    return register


def evaluate(ctx, node, args):
    """The value of a node that computes with shapes, or None where it is no such node."""
    if node.op_type in ("Shape", "Size"):
        dims = shape_of(args[0])
        dims = dims[node.attrs.get("start", 0) : node.attrs.get("end", None)] if node.op_type == "Shape" else dims
        return vector(dims) if node.op_type == "Shape" else dims_value(np.prod(objects(vector(dims)), keepdims=True).reshape(()))
    rule = _RULES.get(node.op_type)
    if rule is None or not any(isinstance(a, Dims) for a in args):
        return None
    if not all(a is None or isinstance(a, Dims) or is_constant(a) for a in args):
        return None
    result = rule(ctx, node, *args)
    return dims_value(result) if isinstance(result, np.ndarray) and result.dtype == object else result


@_rule("Identity")
def _identity(ctx, node, x):
    return x


@_rule("Cast")
def _cast(ctx, node, x):
    return x if node.attrs["to"] in _INTEGERS else None


@_rule("CastLike")
def _cast_like(ctx, node, x, like):
    return x if isinstance(like, Dims) or like.dtype.kind in "iu" else None


@_rule("Gather")
def _gather(ctx, node, x, indices):
    return np.asarray(np.take(objects(x), indices, axis=node.attrs.get("axis", 0)), dtype=object) if is_constant(indices) else None


@_rule("Slice")
def _slice(ctx, node, x, starts=None, ends=None, axes=None, steps=None):
    if starts is None:
        start, end, step = node.attrs["starts"][0], node.attrs["ends"][0], 1
    else:
        start, end = ctx.ints(starts, "starts")[0], ctx.ints(ends, "ends")[0]
        step = 1 if steps is None else ctx.ints(steps, "steps")[0]
    length = x.array.shape[0]
    # The smallest end of a backward slice means "past the first entry"; Python says None.
    return x.array[slice(start, None if step < 0 and end < -length else end, step)]


@_rule("Concat")
def _concat(ctx, node, *xs):
    return np.concatenate([objects(x) for x in xs], axis=node.attrs["axis"])


@_rule("Unsqueeze")
def _unsqueeze(ctx, node, x, axes=None):
    axes = node.attrs["axes"] if axes is None else ctx.ints(axes, "axes")
    return np.expand_dims(x.array, tuple(axes))


@_rule("Squeeze")
def _squeeze(ctx, node, x, axes=None):
    axes = node.attrs.get("axes") if axes is None else ctx.ints(axes, "axes")
    return _as_objects(np.squeeze(x.array, None if axes is None else tuple(axes)))


@_rule("Reshape")
def _reshape(ctx, node, x, shape):
    return x.array.reshape(ctx.ints(shape, "the shape")) if isinstance(x, Dims) else None


@_rule("Add", "Sub", "Mul", "Div", "Mod")
def _arithmetic(ctx, node, a, b):
    a, b = objects(a), objects(b)
    functions = {
        "Add": lambda p, q: p + q,
        "Sub": lambda p, q: p - q,
        "Mul": lambda p, q: p * q,
        "Div": lambda p, q: p // q,  # sizes are not negative, so that rounding down is rounding towards zero
        "Mod": lambda p, q: p % q,
    }
    return _elementwise(functions[node.op_type], a, b)


@_rule("Equal")
def _equal(ctx, node, a, b):
    """A symbolic size is positive, so it differs from every number below 1; other comparisons are not decided."""
    a, b = objects(a), objects(b)
    results = _elementwise(_is_equal, a, b)
    return None if any(r is None for r in results.reshape(-1)) else results.astype(bool)


def _is_equal(left, right):
    difference = simplify(left - right)
    if isinstance(difference, int):
        return difference == 0
    if isinstance(left, int) and left < 1 or isinstance(right, int) and right < 1:
        return False
    return None


@_rule("Where")
def _where(ctx, node, condition, a, b):
    if not is_constant(condition):
        return None
    a, b = objects(a), objects(b)
    return _elementwise(lambda c, p, q: p if c else q, condition, a, b)


@_rule("ReduceProd")
def _reduce_prod(ctx, node, x, axes=None):
    result = 1
    for entry in x.array.reshape(-1):
        result = result * entry
    return vector([result]) if node.attrs.get("keepdims", 1) else dims_value(_as_objects(result))


@_rule("Shape")
def _shape(ctx, node, x):
    return np.array(x.array.shape, dtype=np.int64)


def _as_objects(value):
    if isinstance(value, np.ndarray):
        return value
    array = np.empty((), dtype=object)
    array[()] = value
    return array


def _elementwise(function, *arrays):
    arrays = np.broadcast_arrays(*arrays)
    result = np.empty(arrays[0].shape, dtype=object)
    for index in np.ndindex(result.shape):
        result[index] = function(*[a[index] for a in arrays])
    return result
