"""Relax operators of bnntvm, registered from Python.

High-level operators (what the importer emits)
    ``bnn.conv``, ``bnn.conv_transpose``, ``bnn.matmul``: the layers the report speaks of. Each carries ``layer``, the name of the first
    output of its ONNX node, so that a layer can be followed through every pass. ``bnn.cum_sum``, which TVM has no kernels for.

Packed operators (what the passes make of them)
    ``bnn.encode``: "the packed plane of this float tensor"; ``bnn.pack``, ``bnn.conv2d_bits``, ``bnn.dense_bits``, ``bnn.pool_bits``;
    ``bnn.conv2d_planes``, ``bnn.dense_planes``: several planes at once;
    ``bnn.conv2d_weight``, ``bnn.dense_weight``: float data, packed weights;
    ``bnn.conv2d_int8``: data of 8 bits, weights of few levels.
    Words are ``uint32`` with channel c at bit c % 32 of word c // 32.

A layer's attributes are a ``DictAttrs``: ``call.attrs["strides"]`` and so on.
"""

import tvm
from tvm import relax
from tvm.ir import Op, _ffi_api
from tvm.ir.op import register_op_attr


def define(name, infer):
    """Register the pure Relax operator ``name``; ``infer(call) -> relax.Type`` computes its result type."""
    try:
        return Op.get(name)
    except Exception:  # noqa: BLE001  (TVM raises its own error class for an unknown operator)
        pass
    _ffi_api.RegisterOp(name, name)
    register_op_attr(name, "FInferType", lambda call, _builder: infer(call))
    register_op_attr(name, "FPurity", True)
    return Op.get(name)


def call(op, args, **attrs):
    """A call of one of bnntvm's operators; attributes may be ints, strings, bools and (nested) lists of them."""
    return relax.Call(op, list(args), tvm.ir.make_node("ir.DictAttrs", **attrs))


def is_op(expr, name):
    """Whether ``expr`` is a call of the operator ``name``."""
    return isinstance(expr, relax.Call) and isinstance(expr.op, Op) and expr.op.name == name


def shape_of(expr):
    """Dimensions of a tensor expression, ints where static."""
    return tuple(int(d) if isinstance(d, (int, tvm.tirx.IntImm)) else d for d in expr.ty.shape)


def conv_out_dim(size, kernel, stride, pad_begin, pad_end, dilation):
    """Output length of a convolution along one axis (ONNX Conv)."""
    return (size + pad_begin + pad_end - dilation * (kernel - 1) - 1) // stride + 1


def _ints(attr):
    return [int(v) for v in attr]


def _infer_conv(call_):
    data, weight, attrs = call_.args[0], call_.args[1], call_.attrs
    shape, kernel = list(data.ty.shape), _ints(weight.ty.shape)
    spatial = len(kernel) - 2
    strides, pads, dilations = _ints(attrs["strides"]), _ints(attrs["pads"]), _ints(attrs["dilations"])
    channels_last = str(attrs["layout"]) == "NHWC"
    first, kfirst = (1, 1) if channels_last else (2, 2)
    out = [
        conv_out_dim(shape[first + i], kernel[kfirst + i], strides[i], pads[i], pads[spatial + i], dilations[i]) for i in range(spatial)
    ]
    dims = [shape[0], *out, kernel[0]] if channels_last else [shape[0], kernel[0], *out]
    return relax.TensorType(dims, data.ty.dtype)


def _infer_conv_transpose(call_):
    data, weight, attrs = call_.args[0], call_.args[1], call_.attrs
    shape, kernel = list(data.ty.shape), _ints(weight.ty.shape)
    spatial = len(kernel) - 2
    strides, pads, dilations = _ints(attrs["strides"]), _ints(attrs["pads"]), _ints(attrs["dilations"])
    extra, groups = _ints(attrs["output_padding"]), int(attrs["groups"])
    out = [
        (shape[2 + i] - 1) * strides[i] + extra[i] + (kernel[2 + i] - 1) * dilations[i] + 1 - pads[i] - pads[spatial + i]
        for i in range(spatial)
    ]
    return relax.TensorType([shape[0], kernel[1] * groups, *out], data.ty.dtype)



def _matmul_type(lhs, rhs):
    a, b = list(lhs.shape), list(rhs.shape)
    squeeze_a, squeeze_b = len(a) == 1, len(b) == 1
    a, b = [1, *a] if squeeze_a else a, [*b, 1] if squeeze_b else b
    batch_a, batch_b = a[:-2], b[:-2]
    rank = max(len(batch_a), len(batch_b))
    batch_a, batch_b = [1] * (rank - len(batch_a)) + batch_a, [1] * (rank - len(batch_b)) + batch_b
    batch = [q if _is_one(p) else p for p, q in zip(batch_a, batch_b)]
    dims = batch + ([] if squeeze_a else [a[-2]]) + ([] if squeeze_b else [b[-1]])
    return relax.TensorType(dims, lhs.dtype)


def _is_one(dim):
    return isinstance(dim, (int, tvm.tirx.IntImm)) and int(dim) == 1


#: ONNX Conv without bias. Arguments: data [N, C, *spatial], weight [O, C/groups, *kernel] (layout "NCHW"), or
#: data [N, *spatial, C], weight [O, *kernel, C/groups] (layout "NHWC"). Attributes: layer, layout, strides[spatial],
#: pads[2*spatial] (begins, then ends; zeros), dilations[spatial], groups.
CONV = define("bnn.conv", _infer_conv)
#: ONNX ConvTranspose without bias; weight [C, O/groups, *kernel]. Attributes as CONV (layout "NCHW" only) and output_padding[spatial].
CONV_TRANSPOSE = define("bnn.conv_transpose", _infer_conv_transpose)
#: ONNX CumSum. Attributes: axis, exclusive, reverse.
CUM_SUM = define("bnn.cum_sum", lambda call_: call_.args[0].ty)
#: numpy.matmul. Attributes: layer.
MATMUL = define("bnn.matmul", lambda call_: _matmul_type(call_.args[0].ty, call_.args[1].ty))


def _words(channels):
    return -(-int(channels) // 32)


def _infer_packed(call_):
    shape, groups = list(call_.args[0].ty.shape), int(call_.attrs["groups"])
    return relax.TensorType([*shape[:-1], groups * _words(int(shape[-1]) // groups)], "uint32")


def _infer_conv_bits(call_):
    data, weight, attrs = call_.args[0], call_.args[-1], call_.attrs
    shape, kernel = list(data.ty.shape), _ints(weight.ty.shape)
    strides, pads, dilations = _ints(attrs["strides"]), _ints(attrs["pads"]), _ints(attrs["dilations"])
    out = [conv_out_dim(shape[1 + i], kernel[1 + i], strides[i], pads[i], pads[2 + i], dilations[i]) for i in range(2)]
    return relax.TensorType([shape[0], *out, kernel[0]], "int32")


def _infer_dense_bits(call_):
    return relax.TensorType([*list(call_.args[0].ty.shape)[:-1], int(call_.args[-1].ty.shape[0])], "int32")


def _infer_conv_weight(call_):
    data, weight, attrs = call_.args[0], call_.args[1], call_.attrs
    shape, kernel = list(data.ty.shape), _ints(weight.ty.shape)[1:]
    strides, pads, dilations = _ints(attrs["strides"]), _ints(attrs["pads"]), _ints(attrs["dilations"])
    out = [conv_out_dim(shape[1 + i], kernel[1 + i], strides[i], pads[i], pads[2 + i], dilations[i]) for i in range(2)]
    return relax.TensorType([shape[0], *out, kernel[0]], "float32")


def _infer_conv_int8(call_):
    data, weight, attrs = call_.args[0], call_.args[1], call_.attrs
    shape, kernel = list(data.ty.shape), _ints(weight.ty.shape)
    strides, pads, dilations = _ints(attrs["strides"]), _ints(attrs["pads"]), _ints(attrs["dilations"])
    out = [conv_out_dim(shape[1 + i], kernel[1 + i], strides[i], pads[i], pads[2 + i], dilations[i]) for i in range(2)]
    return relax.TensorType([shape[0], *out, kernel[0]], "int32")


def _infer_dense_weight(call_):
    kind = "int32" if bool(call_.attrs["integer"]) else "float32"
    return relax.TensorType([call_.args[0].ty.shape[0], int(call_.args[1].ty.shape[1])], kind)


def _planes_dtype(attrs):
    return "float32" if bool(attrs["scaled"]) else "int32"


def _infer_conv_planes(call_):
    attrs = call_.attrs
    shape, weight = list(call_.args[0].ty.shape), _ints(call_.args[len(attrs["data"])].ty.shape)
    strides, pads, dilations = _ints(attrs["strides"]), _ints(attrs["pads"]), _ints(attrs["dilations"])
    out = [conv_out_dim(shape[1 + i], weight[2 + i], strides[i], pads[i], pads[2 + i], dilations[i]) for i in range(2)]
    return relax.TensorType([shape[0], *out, weight[1]], _planes_dtype(attrs))


def _infer_dense_planes(call_):
    weight = call_.args[len(call_.attrs["data"])]
    return relax.TensorType([*list(call_.args[0].ty.shape)[:-1], int(weight.ty.shape[1])], _planes_dtype(call_.attrs))


def _infer_matmul_bits(call_):
    left, right = call_.args[0].ty.shape, call_.args[-1].ty.shape
    return relax.TensorType([left[0], left[1], right[2]], "float32" if len(call_.attrs["scale"]) else "int32")


def _infer_pool_bits(call_):
    shape, attrs = list(call_.args[0].ty.shape), call_.attrs
    kernel, strides, pads, dilations = (_ints(attrs[key]) for key in ("kernel", "strides", "pads", "dilations"))
    out = [conv_out_dim(shape[1 + i], kernel[i], strides[i], pads[i], pads[2 + i], dilations[i]) for i in range(2)]
    return relax.TensorType([shape[0], *out, shape[3]], "uint32")


#: Plane of a float tensor [..., C] that holds few levels: bit 1 where the value is one of ``levels``. Attributes: levels, groups (each
#: group of channels starts at a word). Result uint32[..., groups * ceil(C / groups / 32)].
ENCODE = define("bnn.encode", _infer_packed)
#: Plane of a bool tensor [..., C], xored with the optional second argument, constant uint32 words. Attributes: groups.
PACK = define("bnn.pack", _infer_packed)
#: Packed convolution. Arguments: data words [N, H, W, G * Cw] (or packed without regard to groups, see bits.dense_groups), the mask plane
#: of zeros (only if attribute zeros), weight words
#: [O, kh, kw, Cw] (bit 1 <-> -1). Attributes: layer, strides, pads, dilations, groups, channels, unipolar, zeros, and reachable =
#: [low, high, stride], the values that the int32 result can take.
CONV_BITS = define("bnn.conv2d_bits", _infer_conv_bits)
#: Packed dense layer: data words [M, Kw], mask plane (if zeros), weight words [N, Kw]. Attributes: layer, channels, unipolar, zeros,
#: reachable.
DENSE_BITS = define("bnn.dense_bits", _infer_dense_bits)
#: Packed convolution of several planes, see spec.PlaneSum and spec.PlanesConv2d. Arguments: data words [N, H, W, G * Cw] of every plane,
#: weight words [Q', O, kh, kw, Cw], the mask plane of zeros (only if attribute zeros), scales float32 [P * Q, O] (only if scaled).
#: Attributes: data, weights (coefficients), data_kind, weight_kind, scaled, and of CONV_BITS all but unipolar (reachable unless scaled).
CONV_PLANES = define("bnn.conv2d_planes", _infer_conv_planes)
#: The same for a dense layer: data words [M, Kw], weight words [Q', N, Kw].
DENSE_PLANES = define("bnn.dense_planes", _infer_dense_planes)


#: Product of two packed run-time tensors: the left one's words [B, M, Kw] (signs, then zeros if its kind is "ternary"), the right one's
#: [B or 1, Kw, N] likewise. Attributes: layer, features (K), left, right (kinds of bnntvm.spec.BinaryMatmul), reachable,
#: scale: none, or one number that the result is multiplied with, which is float32 then.
MATMUL_BITS = define("bnn.matmul_bits", _infer_matmul_bits)
#: Packed pooling of words [N, H, W, Cw]. Attributes: kind ("and" or "or"), kernel, strides, pads, dilations, channels.
POOL_BITS = define("bnn.pool_bits", _infer_pool_bits)
#: Convolution of float data [N, H, W, C] with packed weights uint32 [planes, O, kh, kw, ceil(C / groups / 32)] and, for coding "levels",
#: their levels float32 [planes + 1, O]: see bnntvm.spec.WeightCoding. Attributes: layer, strides, pads, dilations, groups, channels,
#: coding.
CONV_WEIGHT = define("bnn.conv2d_weight", _infer_conv_weight)
#: Dense layer of float data [M, K] with packed weights uint32 [planes, N, ceil(K / 32)], levels as above. Attributes: layer, channels,
#: coding, integer: the data hold integers from -128 to 127 and the result, exact, is int32, one of reachable = [low, high, stride].
DENSE_WEIGHT = define("bnn.dense_weight", _infer_dense_weight)
#: Convolution of float32 data [N, H, W, C] that hold integers of type ``data`` ("int8" or "uint8") with weights int8 [O, kh, kw, C] that
#: are ``base + sum(coefficients[j] * bit_j)``; the exact sums, int32. Attributes: layer, strides, pads, dilations, data, base,
#: coefficients, reachable.
CONV_INT8 = define("bnn.conv2d_int8", _infer_conv_int8)
