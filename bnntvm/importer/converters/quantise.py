"""Quantised operators: integers in the file, float32 arithmetic on small integers here, which is exact below 2**24."""

import numpy as np
from onnx import TensorProto, helper
from tvm import relax

from ..registry import converts
from ..values import dtype_of, is_constant, shape_of
from .elementwise import Arithmetic, to_type
from .layers import add_bias, convolution, product

#: Lowest and highest value, and the type that holds it here.
_RANGES = {
    TensorProto.INT8: (-128, 127, "int8"),
    TensorProto.UINT8: (0, 255, "uint8"),
    TensorProto.INT16: (-32768, 32767, "int16"),
    TensorProto.UINT16: (0, 65535, "uint16"),
}
for _name, _low, _high, _held in (("INT4", -8, 7, "int8"), ("UINT4", 0, 15, "uint8"), ("INT2", -2, 1, "int8"), ("UINT2", 0, 3, "uint8")):
    if hasattr(TensorProto, _name):
        _RANGES[getattr(TensorProto, _name)] = (_low, _high, _held)


def along_axis(ctx, node, parameter, x):
    """A scale or zero point as an operand for ``x``: per tensor, per entry of ``axis``, or per block of it."""
    shape, size = ctx.static(x), int(node.attrs.get("block_size", 0))
    rank = len(shape)
    axis = int(node.attrs.get("axis", 1))
    axis = axis % rank if rank else 0
    if len(shape_of(parameter)) == 0 or not is_constant(parameter):
        if len(shape_of(parameter)) > 1 or size:
            raise ctx.unsupported("scales computed at run time must be numbers or vectors")
        if len(shape_of(parameter)) == 0 or rank < 2:
            return parameter
        return ctx.emit(relax.op.reshape(parameter, [shape_of(parameter)[0] if i == axis else 1 for i in range(rank)]))
    if size:
        return np.repeat(parameter, size, axis=axis)[(slice(None),) * axis + (slice(shape[axis]),)]
    return parameter.reshape(()) if parameter.size == 1 else parameter.reshape([-1 if i == axis else 1 for i in range(rank)])


def _element_type(ctx, node, zero):
    """The ONNX type that QuantizeLinear yields."""
    named = int(node.attrs.get("output_dtype", 0))
    if named:
        return named
    if zero is None:
        return TensorProto.UINT8
    # 4-bit zero points were widened when they were read: their own type is in the file.
    return ctx.element_types.get(node.inputs[2]) or helper.np_dtype_to_tensor_dtype(np.dtype(dtype_of(zero)))


@converts("QuantizeLinear")
def quantize(ctx, node, x, scale, zero=None):
    kind = _element_type(ctx, node, zero)
    if kind not in _RANGES:
        raise ctx.unsupported("QuantizeLinear to this type is not supported", why=f"it yields {TensorProto.DataType.Name(kind)}")
    low, high, held = _RANGES[kind]
    if is_constant(x) and is_constant(scale) and (zero is None or is_constant(zero)):
        scale, zero = along_axis(ctx, node, scale, x), along_axis(ctx, node, np.zeros((), held) if zero is None else zero, x)
        with np.errstate(all="ignore"):  # clipped below
            levels = np.round(x.astype(np.float32) / scale).astype(np.float32) + zero.astype(np.float32)
        return np.clip(levels, low, high).astype(held)
    x = to_type(ctx, x, "float32")
    m = Arithmetic(ctx, x)
    levels = m.round(m.divide(x, along_axis(ctx, node, scale, x)))
    if zero is not None and not (is_constant(zero) and not zero.any()):
        levels = m.add(levels, along_axis(ctx, node, to_type(ctx, zero, "float32"), x))
    return to_type(ctx, m.minimum(m.maximum(levels, float(low)), float(high)), held)


@converts("DequantizeLinear")
def dequantize(ctx, node, x, scale, zero=None):
    levels = without_zero_point(ctx, node, x, zero)
    if is_constant(levels) and is_constant(scale):
        return (levels * along_axis(ctx, node, scale, x)).astype(np.float32)
    return Arithmetic(ctx, scale).multiply(levels, along_axis(ctx, node, scale, x))


def without_zero_point(ctx, node, x, zero):
    """``x - zero`` as float32."""
    value = to_type(ctx, x, "float32")
    if zero is None or is_constant(zero) and not zero.any():
        return value
    zero = along_axis(ctx, node, to_type(ctx, zero, "float32"), x)
    return value - zero if is_constant(value) and is_constant(zero) else Arithmetic(ctx, np.zeros(0, np.float32)).subtract(value, zero)


@converts("MatMulInteger")
def matmul_integer(ctx, node, a, b, a_zero=None, b_zero=None):
    # A vector of zero points is per row of the left operand and per column of the right one.
    left = shifted(ctx, a, a_zero, -2)
    right = shifted(ctx, b, b_zero, -1)
    return to_type(ctx, product(ctx, node, left, right, b if is_constant(b) else None), "int32")


@converts("ConvInteger")
def conv_integer(ctx, node, x, weight, x_zero=None, weight_zero=None):
    result = convolution(ctx, node, shifted(ctx, x, x_zero, None), shifted(ctx, weight, weight_zero, 0))
    return to_type(ctx, result, "int32")


def shifted(ctx, x, zero, axis):
    """``x - zero`` as float32; several zero points lie along ``axis``."""
    value = to_type(ctx, x, "float32")
    if zero is None or is_constant(zero) and not zero.any():
        return value
    zero, rank = to_type(ctx, zero, "float32"), len(shape_of(x))
    if len(shape_of(zero)) == 1 and axis is not None and is_constant(zero) and zero.size > 1:
        zero = zero.reshape([-1 if i == axis % rank else 1 for i in range(rank)])
    elif is_constant(zero) and zero.size == 1:
        zero = zero.reshape(())
    return value - zero if is_constant(value) and is_constant(zero) else Arithmetic(ctx, np.zeros(0, np.float32)).subtract(value, zero)


@converts("QLinearMatMul")
def qlinear_matmul(ctx, node, a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero):
    left, right = shifted(ctx, a, a_zero, -2), shifted(ctx, b, b_zero, -1)
    total = product(ctx, node, left, right, b if is_constant(b) else None)
    return _requantised(ctx, total, a_scale, b_scale, y_scale, y_zero)


@converts("QLinearConv")
def qlinear_conv(ctx, node, x, x_scale, x_zero, weight, w_scale, w_zero, y_scale, y_zero, bias=None):
    total = convolution(ctx, node, shifted(ctx, x, x_zero, None), shifted(ctx, weight, w_zero, 0))
    total = add_bias(ctx, total, None if bias is None else to_type(ctx, bias, "float32"))
    w_scale = ctx.array(w_scale, "the weight's scale")
    if w_scale.size > 1:  # one per filter
        w_scale = w_scale.reshape((1, -1) + (1,) * (len(shape_of(total)) - 2))
    return _requantised(ctx, total, x_scale, w_scale, y_scale, y_zero)


def _requantised(ctx, total, left_scale, right_scale, scale, zero):
    """``total`` in steps of ``left_scale * right_scale`` as integers in steps of ``scale``."""
    left_scale, right_scale, scale, zero = (ctx.array(a, "a scale or zero point") for a in (left_scale, right_scale, scale, zero))
    m, limits = Arithmetic(ctx, total), np.iinfo(zero.dtype)
    factor = (left_scale.reshape(()) if left_scale.size == 1 else left_scale) * right_scale / scale
    levels = m.round(m.multiply(total, factor.astype(np.float32)))
    if zero.any():
        levels = m.add(levels, zero.astype(np.float32).reshape(()))
    return to_type(ctx, m.minimum(m.maximum(levels, float(limits.min)), float(limits.max)), str(zero.dtype))


@converts("DynamicQuantizeLinear")
def dynamic_quantize(ctx, node, x):
    m, axes = Arithmetic(ctx, x), list(range(len(shape_of(x))))
    low = m.minimum(ctx.emit(relax.op.min(ctx.tensor(x), axes)), 0.0)
    high = m.maximum(ctx.emit(relax.op.max(ctx.tensor(x), axes)), 0.0)
    scale = m.divide(m.subtract(high, low), 255.0)
    zero = m.round(m.minimum(m.maximum(m.divide(m.subtract(0.0, low), scale), 0.0), 255.0))
    levels = m.add(m.round(m.divide(x, scale)), zero)
    quantised = to_type(ctx, m.minimum(m.maximum(levels, 0.0), 255.0), "uint8")
    return quantised, scale, to_type(ctx, zero, "uint8")
