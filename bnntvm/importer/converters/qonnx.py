"""QONNX: the quantisers that Brevitas and qonnx write, and the operators of their channels-last graphs.

Each is lowered to ordinary operators in the order in which qonnx's executor evaluates it, every operation rounded to float32. A quantiser
of constants is a constant.
"""

from dataclasses import replace

import numpy as np
from tvm import relax

from ..registry import converts
from ..values import is_constant, shape_of
from .elementwise import Arithmetic, to_type
from .layers import add_bias, convolution
from .pool import pool
from .reduce import batch_normalisation

#: The same operators under the names that the domain has had.
GENERAL = ("qonnx.custom_op.general", "onnx.brevitas", "finn.custom_op.general")
CHANNELS_LAST = ("qonnx.custom_op.channels_last",)


@converts("BipolarQuant", domains=GENERAL)
def bipolar_quant(ctx, node, x, scale):
    """``scale`` where x >= 0 (both zeros), ``-scale`` elsewhere (NaN too)."""
    m = Arithmetic(ctx, x)
    return m.where(m.greater_equal(x, 0.0), scale, m.negative(scale))


@converts("Quant", "IntQuant", domains=GENERAL)
def quant(ctx, node, x, scale, zero, bits):
    """``(round(clip(x / scale + zero)) - zero) * scale``; one signed bit is bipolar."""
    m, bits = Arithmetic(ctx, x), ctx.array(bits, "the bit width").astype(np.float32)
    signed = bool(node.attrs.get("signed", 1))
    zero = to_type(ctx, zero, "float32")
    levels = _shifted(m.add, m.divide(x, scale), zero)
    if signed and (bits == 1).all():
        levels = m.where(m.greater_equal(levels, 0.0), 1.0, -1.0)
    elif signed and (bits == 1).any():
        raise ctx.unsupported("a signed quantiser with one bit in some channels and more in others is not supported")
    else:
        low, high = integer_range(bits, signed, bool(node.attrs.get("narrow", 1)))
        levels = rounded(ctx, m, m.maximum(m.minimum(levels, high), low))
    return m.multiply(_shifted(m.subtract, levels, zero), scale)


def _shifted(op, levels, zero):
    return levels if is_constant(zero) and not zero.any() else op(levels, zero)


def integer_range(bits, signed, narrow):
    """Lowest and highest level of integers with ``bits`` bits, both of the shape of ``bits``; a narrow range lacks one level."""
    if signed:
        half = np.exp2(bits - 1)
        return np.asarray(narrow - half, np.float32), np.asarray(half - 1, np.float32)
    return np.zeros_like(bits), np.asarray(np.exp2(bits) - 1 - narrow, np.float32)


#: How a rounding mode rounds numbers from 0 up, and below 0. None of them falls anywhere, so that a quantiser is a staircase.
_ROUNDING = {
    "ROUND": (lambda m, x: m.round(x),) * 2,
    "FLOOR": (lambda m, x: m.floor(x),) * 2,
    "CEIL": (lambda m, x: m.ceil(x),) * 2,
    "DOWN": (lambda m, x: m.trunc(x),) * 2,
    "UP": (lambda m, x: m.ceil(x), lambda m, x: m.floor(x)),
    "HALF_UP": (lambda m, x: m.floor(m.add(x, 0.5)), lambda m, x: m.ceil(m.subtract(x, 0.5))),
    "HALF_DOWN": (lambda m, x: m.ceil(m.subtract(x, 0.5)), lambda m, x: m.floor(m.add(x, 0.5))),
}
_ROUNDING |= {"HALF_EVEN": _ROUNDING["ROUND"], "ROUND_TO_ZERO": _ROUNDING["DOWN"]}


def rounded(ctx, m, x, default="ROUND"):
    """``x`` rounded to integers as the node's ``rounding_mode`` says; ROUND takes ties to even, UP and DOWN are away from and towards 0."""
    mode = ctx.node.attrs.get("rounding_mode", default)
    if mode.upper() not in _ROUNDING:
        raise ctx.unsupported(f"the rounding mode '{mode}' is not known", hint=f"known are {', '.join(_ROUNDING)}")
    positive, negative = _ROUNDING[mode.upper()]
    if positive is negative:
        return positive(m, x)
    return m.where(m.greater_equal(x, 0.0), positive(m, x), negative(m, x))


@converts("Trunc", domains=GENERAL)
def trunc(ctx, node, x, scale, zero, bits, *rest):
    """Levels of ``scale`` with their lowest bits taken away.

    Version 1 has the inputs (x, scale, zero point, bits, bits left); version 2 has (x, scale, zero point, bits, scale left, bits left),
    clips, and yields levels of the scale that is left.
    """
    m, zero = Arithmetic(ctx, x), ctx.array(zero, "the zero point").astype(np.float32)
    levels = m.round(_shifted(m.add, m.divide(x, scale), zero))
    *new_scale, left = (ctx.array(value, "a parameter of Trunc").astype(np.float32) for value in rest)
    if not new_scale:
        step = np.exp2(ctx.array(bits, "the bit width").astype(np.float32) - left)
        return m.multiply(_shifted(m.subtract, rounded(ctx, m, m.divide(levels, step), "FLOOR"), zero), scale)
    step = np.exp2(np.round(np.log2(new_scale[0] / ctx.array(scale, "the scale"))))
    low, high = integer_range(left, bool(node.attrs.get("signed", 1)), bool(node.attrs.get("narrow", 0)))
    levels = rounded(ctx, m, m.maximum(m.minimum(m.divide(levels, step), high), low), "FLOOR")
    return m.multiply(_shifted(m.subtract, levels, zero / step), new_scale[0])


@converts("DebugMarker", domains=GENERAL)
def debug_marker(ctx, node, x):
    return x


# ---- channels last: the operator types of ONNX on data [N, *spatial, C] with weights [O, *kernel, C/groups]


def channels_first(ctx, x):
    """``x`` [N, *spatial, C] as [N, C, *spatial]."""
    rank = len(shape_of(x))
    axes = [0, rank - 1, *range(1, rank - 1)]
    return np.ascontiguousarray(x.transpose(axes)) if is_constant(x) else ctx.emit(relax.op.permute_dims(ctx.tensor(x), axes))


def channels_last(ctx, x):
    """``x`` [N, C, *spatial] as [N, *spatial, C]."""
    return ctx.emit(relax.op.permute_dims(x, [0, *range(2, len(shape_of(x))), 1]))


@converts("Conv", domains=CHANNELS_LAST)
def conv(ctx, node, x, weight, bias=None):
    result = convolution(ctx, node, channels_first(ctx, x), channels_first(ctx, weight))
    return channels_last(ctx, add_bias(ctx, result, bias))


@converts("BatchNormalization", domains=CHANNELS_LAST)
def normalisation(ctx, node, x, *parameters):
    return channels_last(ctx, batch_normalisation(ctx, node, channels_first(ctx, x), *parameters))


@converts("MaxPool", domains=CHANNELS_LAST)
@converts("MaxPoolNHWC", domains=GENERAL)
def max_pool(ctx, node, x):
    return channels_last(ctx, pool(ctx, replace(node, op_type="MaxPool"), channels_first(ctx, x)))
