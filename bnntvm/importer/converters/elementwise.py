"""Operators that work on each element by itself, with numpy's broadcasting."""

import math

import numpy as np
from onnx import helper
from tvm import relax

from ..registry import converts
from ..values import Expanded, dtype_of, is_constant, shape_of

_UNARY = {
    "Abs": relax.op.abs,
    "Acos": relax.op.acos,
    "Acosh": relax.op.acosh,
    "Asin": relax.op.asin,
    "Asinh": relax.op.asinh,
    "Atan": relax.op.atan,
    "Atanh": relax.op.atanh,
    "BitwiseNot": relax.op.bitwise_not,
    "Ceil": relax.op.ceil,
    "Cos": relax.op.cos,
    "Cosh": relax.op.cosh,
    "Erf": relax.op.erf,
    "Exp": relax.op.exp,
    "Floor": relax.op.floor,
    "Log": relax.op.log,
    "Neg": relax.op.negative,
    "Not": relax.op.logical_not,
    "Round": relax.op.round,
    "Sigmoid": relax.op.sigmoid,
    "Sign": relax.op.sign,
    "Sin": relax.op.sin,
    "Sinh": relax.op.sinh,
    "Sqrt": relax.op.sqrt,
    "Tan": relax.op.tan,
    "Tanh": relax.op.tanh,
}
_BINARY = {
    "Add": relax.op.add,
    "And": relax.op.logical_and,
    "BitwiseAnd": relax.op.bitwise_and,
    "BitwiseOr": relax.op.bitwise_or,
    "BitwiseXor": relax.op.bitwise_xor,
    "Div": relax.op.divide,
    "Equal": relax.op.equal,
    "Greater": relax.op.greater,
    "GreaterOrEqual": relax.op.greater_equal,
    "Less": relax.op.less,
    "LessOrEqual": relax.op.less_equal,
    "Mul": relax.op.multiply,
    "Or": relax.op.logical_or,
    "Sub": relax.op.subtract,
    "Xor": relax.op.logical_xor,
}


#: Operators of Relax that numpy evaluates alike on floats, by their name there where it is another one.
_FOLDED = {
    **{name: getattr(np, name) for name in "abs add ceil divide floor greater greater_equal less less_equal log2 maximum minimum".split()},
    **{name: getattr(np, name) for name in "multiply negative power round sqrt subtract trunc where".split()},
}


class Arithmetic:
    """Expressions of one node: each method is an operator of Relax by its name there; numbers become constants of the operand's type.

    An operator is bound in the module, or evaluated with numpy where all its operands are constant floats. So a converter that is
    written with this class takes constants too, with the same roundings.
    """

    def __init__(self, ctx, like):
        self.ctx, self.dtype = ctx, dtype_of(like)

    def __getattr__(self, name):
        return lambda *args: self._apply(name, *args)

    def _apply(self, name, *args):
        args = [np.array(a, dtype=self.dtype) if isinstance(a, (int, float)) else a for a in args]
        if name in _FOLDED and all(is_constant(a) and a.dtype.kind in "fb" for a in args):
            with np.errstate(all="ignore"):
                return np.asarray(_FOLDED[name](*args))
        return self.ctx.emit(getattr(relax.op, name)(*self.ctx.operands(*args)))


def _simple(op):
    return lambda ctx, node, *args: ctx.emit(op(*ctx.operands(*args)))


for _name, _op in {**_UNARY, **_BINARY}.items():
    converts(_name)(_simple(_op))


@converts("Identity")
def identity(ctx, node, x):
    return x


@converts("Dropout")
def dropout(ctx, node, x, ratio=None, training=None):
    if training is not None and ctx.array(training, "training_mode").any():
        raise ctx.unsupported("Dropout in training mode is not supported", hint="export the model in evaluation mode")
    return x


@converts("Where")
def where(ctx, node, condition, a, b):
    return ctx.emit(relax.op.where(*ctx.operands(condition, a, b)))


@converts("Cast")
def cast(ctx, node, x):
    return to_type(ctx, x, str(np.dtype(helper.tensor_dtype_to_np_dtype(node.attrs["to"]))))


@converts("CastLike")
def cast_like(ctx, node, x, like):
    return to_type(ctx, x, dtype_of(like))


def to_type(ctx, x, dtype):
    """``x`` converted as ONNX converts: floats to integers towards zero, everything but zero to true."""
    if dtype == dtype_of(x):
        return x
    if is_constant(x):
        return x.astype(dtype)
    if isinstance(x, Expanded):
        return Expanded(x.array.astype(dtype), x.shape)
    if dtype == "float64":
        raise ctx.unsupported("float64 is not supported at run time", hint="export the model in float32")
    if dtype == "bool":
        return Arithmetic(ctx, x).not_equal(x, 0)
    return ctx.emit(relax.op.astype(ctx.tensor(x), dtype))


@converts("Clip")
def clip(ctx, node, x, low=None, high=None):
    dtype = dtype_of(x)
    low = np.array(node.attrs["min"], dtype=dtype) if "min" in node.attrs else low
    high = np.array(node.attrs["max"], dtype=dtype) if "max" in node.attrs else high
    if low is not None and not (is_constant(low) and low.dtype.kind == "f" and low == -np.inf):
        x = ctx.emit(relax.op.maximum(*ctx.operands(x, low)))
    if high is not None and not (is_constant(high) and high.dtype.kind == "f" and high == np.inf):
        x = ctx.emit(relax.op.minimum(*ctx.operands(x, high)))
    return x


@converts("Relu")
def relu(ctx, node, x):
    return ctx.emit(relax.op.nn.relu(ctx.tensor(x)))


def _negative_part(ctx, x, negative):
    """``negative`` where ``x`` is below 0, else ``x``."""
    math_ = Arithmetic(ctx, x)
    return ctx.emit(relax.op.where(math_.less(x, 0.0), *ctx.operands(negative, x)))


@converts("LeakyRelu")
def leaky_relu(ctx, node, x, slope=None):
    slope = float(node.attrs.get("alpha", 0.01)) if slope is None else slope
    return _negative_part(ctx, x, Arithmetic(ctx, x).multiply(x, slope))


@converts("PRelu")
def prelu(ctx, node, x, slope):
    return _negative_part(ctx, x, Arithmetic(ctx, x).multiply(x, slope))


@converts("ThresholdedRelu")
def thresholded_relu(ctx, node, x):
    over = Arithmetic(ctx, x).greater(x, float(node.attrs.get("alpha", 1.0)))
    return ctx.emit(relax.op.where(over, *ctx.operands(x, np.array(0, dtype_of(x)))))


@converts("Elu", "Celu", "Selu")
def elu(ctx, node, x):
    m = Arithmetic(ctx, x)
    alpha = float(node.attrs.get("alpha", 1.6732632423543772 if node.op_type == "Selu" else 1.0))
    inner = m.divide(x, alpha) if node.op_type == "Celu" and alpha != 1 else x
    result = _negative_part(ctx, x, m.multiply(m.subtract(m.exp(inner), 1.0), alpha))
    return m.multiply(result, float(node.attrs.get("gamma", 1.0507009873554805))) if node.op_type == "Selu" else result


@converts("HardSigmoid")
def hard_sigmoid(ctx, node, x):
    return hard_sigmoid_of(ctx, x, float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5)))


def hard_sigmoid_of(ctx, x, alpha, beta):
    """``max(0, min(1, alpha * x + beta))``."""
    m = Arithmetic(ctx, x)
    return m.minimum(m.maximum(m.add(m.multiply(x, alpha), beta), 0.0), 1.0)


@converts("HardSwish")
def hard_swish(ctx, node, x):
    return Arithmetic(ctx, x).multiply(x, hard_sigmoid_of(ctx, x, 1 / 6, 0.5))


@converts("Swish")
def swish(ctx, node, x):
    m, alpha = Arithmetic(ctx, x), float(node.attrs.get("alpha", 1.0))
    return m.multiply(x, m.sigmoid(m.multiply(x, alpha) if alpha != 1 else x))


@converts("Gelu")
def gelu(ctx, node, x):
    m = Arithmetic(ctx, x)
    if node.attrs.get("approximate", "none") == "tanh":
        cube = m.multiply(m.multiply(x, x), x)
        inner = m.tanh(m.multiply(m.add(x, m.multiply(cube, 0.044715)), math.sqrt(2 / math.pi)))
    else:
        inner = m.erf(m.multiply(x, math.sqrt(0.5)))
    return m.multiply(m.multiply(x, 0.5), m.add(inner, 1.0))


@converts("Softplus")
def softplus(ctx, node, x):
    m = Arithmetic(ctx, x)
    return m.add(m.maximum(x, 0.0), m.log(m.add(m.exp(m.negative(m.abs(x))), 1.0)))


@converts("Mish")
def mish(ctx, node, x):
    m = Arithmetic(ctx, x)
    return m.multiply(x, m.tanh(softplus(ctx, node, x)))


@converts("Softsign")
def softsign(ctx, node, x):
    m = Arithmetic(ctx, x)
    return m.divide(x, m.add(m.abs(x), 1.0))


@converts("Shrink")
def shrink(ctx, node, x):
    m, bias, bound = Arithmetic(ctx, x), float(node.attrs.get("bias", 0.0)), float(node.attrs.get("lambd", 0.5))
    zero = np.array(0, dtype_of(x))
    low = ctx.emit(relax.op.where(m.less(x, -bound), *ctx.operands(m.add(x, bias), zero)))
    return ctx.emit(relax.op.where(m.greater(x, bound), *ctx.operands(m.subtract(x, bias), low)))


@converts("Reciprocal")
def reciprocal(ctx, node, x):
    return Arithmetic(ctx, x).divide(1.0, x)


@converts("Pow")
def power(ctx, node, x, exponent):
    m = Arithmetic(ctx, x)
    if is_constant(exponent) and exponent.size == 1 and not is_constant(x) and exponent.ndim <= len(shape_of(x)):
        # ONNX Runtime too multiplies for these two.
        if exponent.item() == 2:
            return m.multiply(x, x)
        if exponent.item() == 3:
            return m.multiply(m.multiply(x, x), x)
    return m.power(x, to_type(ctx, exponent, m.dtype))


@converts("Mod")
def mod(ctx, node, a, b):
    if node.attrs.get("fmod", 0):
        raise ctx.unsupported("Mod with fmod=1 is not supported")
    return ctx.emit(relax.op.floor_mod(*ctx.operands(a, b)))


@converts("BitShift")
def bit_shift(ctx, node, a, b):
    op = relax.op.left_shift if node.attrs["direction"] == "LEFT" else relax.op.right_shift
    return ctx.emit(op(*ctx.operands(a, b)))


@converts("Sum", "Mean", "Max", "Min")
def variadic(ctx, node, *xs):
    op = {"Sum": relax.op.add, "Mean": relax.op.add, "Max": relax.op.maximum, "Min": relax.op.minimum}[node.op_type]
    result, *rest = xs
    for x in rest:
        result = ctx.emit(op(*ctx.operands(result, x)))
    if node.op_type == "Mean" and rest:
        result = Arithmetic(ctx, result).divide(result, float(len(xs)))
    return result


@converts("IsInf", "IsNaN")
def is_special(ctx, node, x):
    return ctx.emit((relax.op.isinf if node.op_type == "IsInf" else relax.op.isnan)(ctx.tensor(x)))
