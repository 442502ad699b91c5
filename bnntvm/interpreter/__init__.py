"""A numpy interpreter of Relax functions, slow and plain: what a module means, without TVM's code generation.

>>> outputs = run(mod, {"x": images})        # or a list of arrays in the order of the parameters

It knows the operators that the importer emits, in both layouts of ``bnn.conv``; packed.py adds those that the passes make::

    @implements("bnn.pack")
    def pack(attrs, x): ...

An implementation gets the call's attributes as a dict and the evaluated arguments: arrays, tuples of arrays, tuples of ints for shapes.
All arithmetic is in the operands' own precision, one operator at a time, except that the sums of layers are kept in float64 and rounded
once: they do not depend on the order of the operands then, which layouts change.
"""

import math
import operator

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.ir.expr import GenericConst

OPERATORS = {}
#: Arithmetic in symbolic dimensions, by the name of the TIR node.
_ARITHMETIC = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "FloorMod": operator.mod,
    "Max": max,
    "Min": min,
}


def implements(*names):
    """Register the decorated function as the meaning of the operators ``names``."""

    def register(function):
        for name in names:
            OPERATORS[name] = function
        return function

    return register


def run(mod, feed, function="main"):
    """Results of ``mod[function]`` as a list of arrays.

    Parameters
    ----------
    mod : tvm.IRModule
    feed : dict of str to array, or list of array
        A dict is by parameter name; names that Relax cannot hold are looked up with their odd characters as underscores.
    """
    main = mod[function]
    if isinstance(feed, dict):
        by_name = {_identifier(name): array for name, array in feed.items()}
        feed = [by_name[param.name] for param in main.params]
    with np.errstate(all="ignore"):
        result = Interpreter(mod).call(main, [np.asarray(a) for a in feed])
    return list(result) if isinstance(result, tuple) else [result]


def _identifier(name):
    return "".join(c if c.isalnum() else "_" for c in name)


class Interpreter:
    """Evaluates functions of one module; ``observe(var, value)`` sees every binding."""

    def __init__(self, mod, observe=None):
        self.mod, self.observe = mod, observe

    def call(self, function, args):
        """The result of a Relax function on evaluated arguments."""
        values, sizes = {}, {}
        for param, arg in zip(function.params, args):
            if isinstance(param.ty, relax.TensorType):
                self._bind_sizes(param, arg, sizes)
            values[param] = arg
        body = function.body
        if not isinstance(body, relax.SeqExpr):
            return self._value(body, values, sizes)
        for block in body.blocks:
            for binding in block.bindings:
                values[binding.var] = self._value(binding.value, values, sizes)
                if self.observe:
                    self.observe(binding.var, values[binding.var])
        return self._value(body.body, values, sizes)

    def _bind_sizes(self, param, arg, sizes):
        dims = list(param.ty.shape)
        if len(dims) != arg.ndim:
            raise ValueError(f"{param.name} has rank {len(dims)}, got an array of shape {arg.shape}")
        for dim, size in zip(dims, arg.shape):
            if isinstance(dim, tirx.Var):
                sizes.setdefault(dim, size)
            elif isinstance(dim, tirx.Mul) and isinstance(dim.a, tirx.Var) and isinstance(dim.b, tirx.IntImm):
                sizes.setdefault(dim.a, size // int(dim.b))  # images of several rows each; compared below
            if self._size(dim, sizes) != size:
                raise ValueError(f"{param.name} has shape {dims}, got an array of shape {arg.shape}")
        if str(param.ty.dtype) != str(arg.dtype):
            raise ValueError(f"{param.name} is {param.ty.dtype}, got an array of {arg.dtype}")

    def _size(self, dim, sizes):
        if isinstance(dim, (int, tirx.IntImm)):
            return int(dim)
        if dim in sizes:
            return sizes[dim]
        return _ARITHMETIC[type(dim).__name__](self._size(dim.a, sizes), self._size(dim.b, sizes))

    def _value(self, expr, values, sizes):
        if isinstance(expr, GenericConst):
            return expr.value.numpy()
        if isinstance(expr, relax.Tuple):
            return tuple(self._value(field, values, sizes) for field in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            return self._value(expr.tuple_value, values, sizes)[expr.index]
        if isinstance(expr, relax.ShapeExpr):
            return tuple(self._size(dim, sizes) for dim in expr.values)
        if isinstance(expr, (tirx.IntImm, tirx.FloatImm)):
            return expr.value
        if isinstance(expr, relax.Call):
            return self._call(expr, values, sizes)
        if isinstance(expr, relax.Function):
            return expr
        if isinstance(expr, relax.GlobalVar):
            return self.mod[expr]
        if expr in values:
            return values[expr]
        return self._size(expr, sizes)

    def _call(self, call, values, sizes):
        args = [self._value(arg, values, sizes) for arg in call.args]
        if not isinstance(call.op, tvm.ir.Op):
            return self.call(self._value(call.op, values, sizes), args)
        name = call.op.name
        if name not in OPERATORS:
            raise NotImplementedError(f"the interpreter has no operator {name}")
        result = OPERATORS[name](attributes(call), *args)
        self._check(call, result, sizes, name)
        return result

    def _check(self, call, result, sizes, name):
        """The type that TVM inferred is what was computed."""
        if not isinstance(call.ty, relax.TensorType) or not isinstance(result, np.ndarray) or call.ty.shape is None:
            return
        shape = tuple(self._size(dim, sizes) for dim in call.ty.shape)
        if shape != result.shape or str(call.ty.dtype) != str(result.dtype):
            raise AssertionError(f"{name}: Relax says {call.ty.dtype}{list(shape)}, numpy gives {result.dtype}{list(result.shape)}")


def attributes(call):
    """Attributes of a call as Python values."""
    attrs = call.attrs
    if attrs is None:
        return {}
    return {name: _plain(attrs[name] if isinstance(attrs, tvm.ir.attrs.DictAttrs) else getattr(attrs, name)) for name in _names(attrs)}


def _names(attrs):
    if isinstance(attrs, tvm.ir.attrs.DictAttrs):
        return list(attrs.keys())
    return [field.name for field in type(attrs).__tvm_ffi_type_info__.fields]


def _plain(value):
    if isinstance(value, (bool, int, float)) or value is None:
        return value
    if isinstance(value, (tirx.IntImm, tirx.FloatImm)):
        return value.value
    if isinstance(value, (list, tuple)) or type(value).__name__ in ("Array", "List"):
        return [_plain(v) for v in value]
    return str(value)


# ---- elementwise


def _unary(function):
    return lambda attrs, x: np.asarray(function(x)).astype(x.dtype)


def _binary(function):
    return lambda attrs, a, b: np.asarray(function(a, b))


def _divide(a, b):
    if a.dtype.kind not in "iu":
        return np.divide(a, b)
    quotient = np.floor_divide(a, b)
    return (quotient + ((a - quotient * b != 0) & ((a < 0) != (b < 0)))).astype(a.dtype)


def _erf(x):
    return np.array([math.erf(v) for v in x.reshape(-1).tolist()]).reshape(x.shape)


for _name in "abs negative sign sqrt exp log tanh floor ceil sin cos tan sinh cosh".split():
    OPERATORS[f"relax.{_name}"] = _unary(getattr(np, _name))
for _name in "asin acos atan asinh acosh atanh".split():
    OPERATORS[f"relax.{_name}"] = _unary(getattr(np, "arc" + _name[1:]))
for _name in "add subtract multiply maximum minimum power equal not_equal less less_equal greater greater_equal".split():
    OPERATORS[f"relax.{_name}"] = _binary(getattr(np, _name))
for _name in "logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor left_shift right_shift".split():
    OPERATORS[f"relax.{_name}"] = _binary(getattr(np, _name))
OPERATORS["relax.round"] = _unary(np.round)
OPERATORS["relax.trunc"] = _unary(np.trunc)
OPERATORS["relax.square"] = _unary(np.square)
OPERATORS["relax.rsqrt"] = _unary(lambda x: 1 / np.sqrt(x))
OPERATORS["relax.erf"] = _unary(_erf)
OPERATORS["relax.sigmoid"] = _unary(lambda x: 1 / (1 + np.exp(-x)))
OPERATORS["relax.nn.relu"] = _unary(lambda x: np.maximum(x, 0))
OPERATORS["relax.logical_not"] = _unary(np.logical_not)
OPERATORS["relax.bitwise_not"] = _unary(np.invert)
OPERATORS["relax.divide"] = _binary(_divide)
OPERATORS["relax.floor_divide"] = _binary(np.floor_divide)
OPERATORS["relax.floor_mod"] = _binary(np.mod)
OPERATORS["relax.where"] = lambda attrs, c, a, b: np.where(c, a, b)
OPERATORS["relax.isinf"] = lambda attrs, x: np.isinf(x)
OPERATORS["relax.isnan"] = lambda attrs, x: np.isnan(x)


@implements("relax.astype")
def astype(attrs, x):
    return x.astype(attrs["dtype"])


@implements("relax.clip")
def clip(attrs, x, low, high):
    return np.clip(x, x.dtype.type(low), x.dtype.type(high))


# ---- layers


def im2col(x, kernel, strides, pads, dilations):
    """Windows of ``x`` [N, C, *spatial]: an array [N, C, *out, *kernel], zeros outside."""
    spatial = len(kernel)
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:spatial], pads[spatial:])])
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel)]
    view = np.lib.stride_tricks.sliding_window_view(x, reach, axis=tuple(range(2, 2 + spatial)))
    picks = (slice(None), slice(None), *[slice(None, None, s) for s in strides], *[slice(None, None, d) for d in dilations])
    return view[picks]


def convolve(x, weight, strides, pads, dilations, groups):
    """Convolution of ``x`` [N, C, *spatial] with ``weight`` [O, C/groups, *kernel]."""
    n, spatial, outputs = x.shape[0], weight.ndim - 2, weight.shape[0]
    columns = im2col(x, weight.shape[2:], strides, pads, dilations)
    out = columns.shape[2 : 2 + spatial]
    columns = np.moveaxis(columns, 1, 1 + spatial).reshape(n, *out, groups, -1)  # [N, *out, G, C/G * kernel]
    columns = np.moveaxis(columns, 1 + spatial, 0).reshape(groups, n * math.prod(out), -1)
    kernels = weight.reshape(groups, outputs // groups, -1).transpose(0, 2, 1)
    result = _product(np.ascontiguousarray(columns), kernels)  # [G, N*out, O/G]
    return np.moveaxis(result.transpose(1, 0, 2).reshape(n, *out, outputs), -1, 1)


@implements("bnn.conv")
def conv(attrs, x, weight):
    last = attrs["layout"] == "NHWC"
    if last:
        x, weight = np.moveaxis(x, -1, 1), np.moveaxis(weight, -1, 1)
    result = convolve(x, weight, attrs["strides"], attrs["pads"], attrs["dilations"], attrs["groups"])
    return np.ascontiguousarray(np.moveaxis(result, 1, -1) if last else result)


@implements("bnn.conv_transpose")
def conv_transpose(attrs, x, weight):
    strides, pads, dilations, groups = attrs["strides"], attrs["pads"], attrs["dilations"], attrs["groups"]
    spatial, (channels, per_group, *kernel) = len(strides), weight.shape
    full = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(x.shape[2:], strides, dilations, kernel)]
    result = np.zeros((x.shape[0], per_group * groups, *[f + e for f, e in zip(full, attrs["output_padding"])]))
    kind, x = x.dtype, x.astype(np.float64)
    for g in range(groups):
        ins, outs = slice(g * channels // groups, (g + 1) * channels // groups), slice(g * per_group, (g + 1) * per_group)
        for tap in np.ndindex(*kernel):
            part = np.einsum("nc...,co->no...", x[:, ins], weight[(ins, slice(None), *tap)])
            place = [slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in zip(tap, dilations, x.shape[2:], strides)]
            result[(slice(None), outs, *place)] += part
    crop = [slice(b, size - e) for b, e, size in zip(pads[:spatial], pads[spatial:], result.shape[2:])]
    return np.ascontiguousarray(result[(slice(None), slice(None), *crop)]).astype(kind)


@implements("bnn.matmul", "relax.matmul")
def matmul(attrs, a, b):
    return _product(a, b)


def _product(a, b):
    if a.dtype != np.float32:
        return np.matmul(a, b)
    return np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.float32)


# ---- pooling and reductions


def _pool(attrs, x, fill, reduce):
    layout = attrs.get("layout", "NCHW")
    last = layout.endswith("C")
    x = np.moveaxis(x, -1, 1) if last else x
    kernel, spatial = attrs["pool_size"], len(attrs["pool_size"])
    if attrs.get("ceil_mode"):
        raise NotImplementedError("pooling in ceil_mode")
    pads = attrs["padding"]
    pads = pads * 2 if len(pads) == spatial else pads
    wide = np.pad(x, [(0, 0), (0, 0), *zip(pads[:spatial], pads[spatial:])], constant_values=fill)
    windows = im2col(wide, kernel, attrs["strides"], [0] * (2 * spatial), attrs["dilation"])
    inside = np.pad(
        np.ones(x.shape[2:], x.dtype), [*zip(pads[:spatial], pads[spatial:])], constant_values=attrs.get("count_include_pad", 0)
    )
    counts = im2col(inside[None, None], kernel, attrs["strides"], [0] * (2 * spatial), attrs["dilation"])
    axes = tuple(range(-spatial, 0))
    result = reduce(windows, counts, axes).astype(x.dtype)
    return np.moveaxis(result, 1, -1) if last else result


@implements("relax.nn.max_pool2d", "relax.nn.max_pool3d")
def max_pool(attrs, x):
    lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    return _pool(attrs, x, lowest, lambda windows, counts, axes: windows.max(axes))


@implements("relax.nn.avg_pool2d", "relax.nn.avg_pool3d")
def avg_pool(attrs, x):
    return _pool(attrs, x, 0, lambda windows, counts, axes: windows.sum(axes) / np.maximum(counts.sum(axes), 1))


def _reduction(function):
    def reduce(attrs, x):
        axis = attrs["axis"]
        return np.asarray(function(x, axis=None if axis is None else tuple(axis), keepdims=bool(attrs["keepdims"]))).astype(x.dtype)

    return reduce


for _name in "mean sum max min prod".split():
    OPERATORS[f"relax.{_name}"] = _reduction(getattr(np, _name))


@implements("relax.argmax")
def argmax(attrs, x):
    return np.argmax(x, axis=attrs["axis"], keepdims=bool(attrs["keepdims"]))


@implements("relax.argmin")
def argmin(attrs, x):
    return np.argmin(x, axis=attrs["axis"], keepdims=bool(attrs["keepdims"]))


@implements("relax.nn.softmax")
def softmax(attrs, x):
    exponents = np.exp(x - x.max(attrs["axis"], keepdims=True))
    return exponents / exponents.sum(attrs["axis"], keepdims=True)


@implements("relax.nn.log_softmax")
def log_softmax(attrs, x):
    shifted = x - x.max(attrs["axis"], keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(attrs["axis"], keepdims=True))


@implements("bnn.cum_sum")
def cum_sum(attrs, x):
    rows = np.moveaxis(x, attrs["axis"], 0)
    rows = rows[::-1] if attrs["reverse"] else rows
    sums = np.cumsum(rows, 0, dtype=x.dtype)
    if attrs["exclusive"]:
        sums = np.concatenate([np.zeros_like(sums[:1]), sums[:-1]])[: len(sums)]
    return np.moveaxis(sums[::-1] if attrs["reverse"] else sums, 0, attrs["axis"])


@implements("relax.topk")
def topk(attrs, x):
    order = np.argsort(-x if attrs["largest"] else x, axis=attrs["axis"], kind="stable")
    order = order.take(range(int(attrs["k"])), attrs["axis"])
    return np.take_along_axis(x, order, attrs["axis"]), order.astype(attrs["dtype"])


@implements("relax.einsum")
def einsum(attrs, operands):
    return np.einsum(attrs["subscripts"], *operands)


# ---- shapes


@implements("relax.reshape")
def reshape(attrs, x, shape):
    return x.reshape(shape)


@implements("relax.permute_dims")
def permute_dims(attrs, x):
    return np.transpose(x, attrs["axes"])


@implements("relax.expand_dims")
def expand_dims(attrs, x):
    return np.expand_dims(x, tuple(attrs["axis"]))


@implements("relax.squeeze")
def squeeze(attrs, x):
    return np.squeeze(x, None if attrs["axis"] is None else tuple(attrs["axis"]))


@implements("relax.flatten", "relax.nn.batch_flatten")
def flatten(attrs, x):
    return x.reshape(x.shape[0], -1)


@implements("relax.broadcast_to")
def broadcast_to(attrs, x, shape):
    return np.broadcast_to(x, shape)


@implements("relax.concat")
def concat(attrs, parts):
    return np.concatenate(parts, attrs["axis"])


@implements("relax.split")
def split(attrs, x):
    return tuple(np.split(x, attrs["indices_or_sections"], attrs["axis"]))


@implements("relax.strided_slice")
def strided_slice(attrs, x, axes, begins, ends, strides=None):
    picks = [slice(None)] * x.ndim
    for axis, begin, end, stride in zip(axes, begins, ends, strides or [1] * len(axes)):
        picks[axis] = slice(begin, end, stride)
    return x[tuple(picks)]


@implements("relax.take")
def take(attrs, x, indices):
    return np.take(x, indices, axis=attrs["axis"], mode="clip" if attrs["mode"] == "clip" else "raise")


@implements("relax.gather_elements")
def gather_elements(attrs, x, indices):
    return np.take_along_axis(x, indices, attrs["axis"])


@implements("relax.tile")
def tile(attrs, x):
    return np.tile(x, attrs["repeats"])


@implements("relax.flip")
def flip(attrs, x):
    return np.flip(x, attrs["axis"])


@implements("relax.nn.pad")
def pad(attrs, x):
    widths = np.asarray(attrs["pad_width"], dtype=int).reshape(-1, 2)
    if attrs["pad_mode"] != "constant":
        return np.pad(x, widths, mode={"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[attrs["pad_mode"]])
    return np.pad(x, widths, constant_values=attrs["pad_value"])


@implements("relax.image.resize2d")
def resize2d(attrs, x, size):
    if attrs["layout"] != "NCHW" or attrs["method"] != "linear":
        raise NotImplementedError(f"resize2d {attrs['layout']} {attrs['method']}")
    for axis, length in zip((2, 3), size):
        n, i = x.shape[axis], np.arange(length)
        position = {
            "half_pixel": (i + 0.5) * n / length - 0.5,
            "asymmetric": i * n / length,
            "align_corners": i * (n - 1) / max(length - 1, 1),
        }[attrs["coordinate_transformation_mode"]].clip(0, n - 1)
        low = np.floor(position).astype(int)
        part = (position - low).astype(x.dtype).reshape([-1 if a == axis else 1 for a in range(4)])
        x = x.take(low, axis) * (1 - part) + x.take(np.minimum(low + 1, n - 1), axis) * part
    return x
