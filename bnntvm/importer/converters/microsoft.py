"""Operators of ONNX Runtime's domain, as its offline optimiser and its quantisers write them."""

import numpy as np
from tvm import relax

from ..registry import converts
from ..values import dtype_of, is_constant, shape_of
from .elementwise import Arithmetic, gelu, hard_sigmoid_of, leaky_relu, to_type
from .layers import add_bias, convolution, gemm, product
from .quantise import dequantize, quantize, shifted
from .reduce import layer_normalisation, rms_normalisation
from .shape import padded, part, reshaped

DOMAIN = ("com.microsoft",)
# Spelled as in ONNX, for the types that ONNX did not allow at the time.
converts("Gelu", domains=DOMAIN)(gelu)
converts("QuantizeLinear", domains=DOMAIN)(quantize)
converts("DequantizeLinear", domains=DOMAIN)(dequantize)


@converts("FusedConv", domains=DOMAIN)
def fused_conv(ctx, node, x, weight, bias=None, summand=None):
    """Convolution, bias, another tensor to add, activation, in this order."""
    result = add_bias(ctx, convolution(ctx, node, x, weight), bias)
    if summand is not None:
        result = ctx.emit(relax.op.add(*ctx.operands(result, summand)))
    return _activated(ctx, node, result)


def _activated(ctx, node, x):
    kind, parameters = node.attrs.get("activation", ""), [float(p) for p in node.attrs.get("activation_params", [])]
    m = Arithmetic(ctx, x)
    if kind == "":
        return x
    if kind == "Relu":
        return ctx.emit(relax.op.nn.relu(x))
    if kind == "Clip":
        low, high = (np.array(p, dtype=dtype_of(x)) for p in parameters)
        return m.minimum(m.maximum(x, low), high)
    if kind in ("Sigmoid", "Tanh"):
        return m.sigmoid(x) if kind == "Sigmoid" else m.tanh(x)
    if kind == "HardSigmoid":
        return hard_sigmoid_of(ctx, x, *parameters)
    if kind == "LeakyRelu":
        return leaky_relu(ctx, node, x, parameters[0])
    raise ctx.unsupported(f"{node.op_type} with the activation {kind} is not supported")


@converts("FusedGemm", domains=DOMAIN)
def fused_gemm(ctx, node, a, b, c=None):
    for name in ("activation_alpha", "activation_beta"):  # one attribute each here, a list in FusedConv
        if name in node.attrs:
            node.attrs.setdefault("activation_params", []).append(node.attrs[name])
    return _activated(ctx, node, gemm(ctx, node, a, b, c))


@converts("FusedMatMul", domains=DOMAIN)
def fused_matmul(ctx, node, a, b):
    """``alpha`` times the product of two tensors whose last two axes may be exchanged."""
    if node.attrs.get("transBatchA") or node.attrs.get("transBatchB"):
        raise ctx.unsupported("FusedMatMul with transposed batches is not supported")
    weight = b if is_constant(b) else None
    a, b = (_swapped(ctx, x) if node.attrs.get(key) else x for x, key in ((a, "transA"), (b, "transB")))
    result, alpha = product(ctx, node, a, b, weight), float(node.attrs.get("alpha", 1.0))
    return result if alpha == 1 else Arithmetic(ctx, result).multiply(result, alpha)


def _swapped(ctx, x):
    if is_constant(x):
        return np.ascontiguousarray(x.swapaxes(-1, -2))
    rank = len(shape_of(x))
    return ctx.emit(relax.op.permute_dims(ctx.tensor(x), [*range(rank - 2), rank - 1, rank - 2]))


# ---- what the optimiser makes of transformers


@converts("SkipLayerNormalization", domains=DOMAIN)
def skip_layer_normalisation(ctx, node, x, skip, scale, shift=None, bias=None):
    """Layer normalisation of a sum, which is the fourth result."""
    total = _sum(ctx, x, skip, bias)
    node.attrs.setdefault("epsilon", 1e-12)
    return *layer_normalisation(ctx, node, total, scale, shift), total


converts("SimplifiedLayerNormalization", domains=DOMAIN)(rms_normalisation)


@converts("SkipSimplifiedLayerNormalization", domains=DOMAIN)
def skip_rms_normalisation(ctx, node, x, skip, scale, bias=None):
    total = _sum(ctx, x, skip, bias)
    node.attrs.setdefault("epsilon", 1e-12)
    if any(node.used[1:3]):
        raise ctx.unsupported("the statistics of SkipSimplifiedLayerNormalization are not supported as results")
    return rms_normalisation(ctx, node, total, scale), None, None, total


def _sum(ctx, x, skip, bias):
    m = Arithmetic(ctx, x)
    total = m.add(x, skip)
    return total if bias is None else m.add(total, bias)


@converts("BiasGelu", domains=DOMAIN)
def bias_gelu(ctx, node, x, bias):
    return gelu(ctx, node, Arithmetic(ctx, x).add(x, bias))


@converts("FastGelu", domains=DOMAIN)
def fast_gelu(ctx, node, x, bias=None):
    node.attrs["approximate"] = "tanh"
    return gelu(ctx, node, x if bias is None else Arithmetic(ctx, x).add(x, bias))


@converts("QuickGelu", domains=DOMAIN)
def quick_gelu(ctx, node, x):
    m = Arithmetic(ctx, x)
    return m.multiply(x, m.sigmoid(m.multiply(x, float(node.attrs.get("alpha", 1.702)))))


# ---- weights in blocks of few bits


@converts("MatMulNBits", domains=DOMAIN)
def matmul_n_bits(ctx, node, x, codes, scales, zeros=None, groups=None, bias=None):
    """``x`` [..., K] times the transpose of weights [N, K] with one scale, and one zero point, for each ``block_size`` of a row.

    ``groups`` (g_idx) [K] says of each column whose block's scale and zero point it has, where that is not the block it lies in.

    With ``accuracy_level`` 4 ONNX Runtime rounds the activation to int8, block by block, where it has a kernel for that; so does this.
    """
    depth, rows, bits, block = (int(node.attrs[key]) for key in ("K", "N", "bits", "block_size"))
    if bits not in (2, 4, 8):
        raise ctx.unsupported(f"MatMulNBits with {bits} bits is not supported", hint="2, 4 and 8 are")
    blocks = -(-depth // block)
    codes = unpacked(ctx.array(codes, "the weights").reshape(rows, blocks, -1), bits).astype(np.float32)
    scales = ctx.array(scales, "the scales").astype(np.float32).reshape(rows, blocks, 1)
    kernel = (bits > 2 or block in (32, 64, 128)) and (zeros is None or dtype_of(zeros) == "uint8") and groups is None
    packed = zeros is not None and dtype_of(zeros) == "uint8"
    zeros = _zero_points(ctx, zeros, bits, rows, blocks)
    weight = codes[:, :, :block].reshape(rows, -1)[:, :depth]
    of = _blocks_of(ctx, groups, bits, zeros if packed else None, depth, block)
    weight = (weight - (zeros if zeros.ndim == 0 else zeros[:, of, 0])) * scales[:, of, 0]
    if int(node.attrs.get("accuracy_level", 0)) == 4 and kernel:
        x = _in_int8(ctx, x, blocks, block)
    result = product(ctx, node, x, np.ascontiguousarray(weight.T), weight)
    return result if bias is None else Arithmetic(ctx, result).add(result, bias)


def _blocks_of(ctx, groups, bits, packed_zeros, depth, block):
    """The block whose scale and zero point each column has, int64 [depth]."""
    plain = np.arange(depth) // block
    if groups is None:
        return plain
    groups = ctx.array(groups, "g_idx").astype(np.int64)[:depth]
    if len(groups) != depth or groups.min() < 0 or groups.max() > plain[-1]:
        raise ctx.unsupported("MatMulNBits with a g_idx that does not fit its blocks", why=f"{depth} columns lie in {plain[-1] + 1} blocks")
    if packed_zeros is not None and np.any(packed_zeros != 2 ** (bits - 1)):
        why = "ONNX Runtime leaves packed zero points out where there is a g_idx, the operator's definition does not"
        raise ctx.unsupported("MatMulNBits with both g_idx and packed zero points is not supported", why=why)
    if bits != 4 and not np.array_equal(groups, plain):
        raise ctx.unsupported(f"MatMulNBits with {bits} bits and weights in another order (g_idx) is not supported", hint="4 bits are")
    return groups


def _in_int8(ctx, x, blocks, block):
    """``x`` [..., K] rounded to multiples of a 127th of the largest magnitude in its block of ``block`` elements."""
    shape, m = ctx.static(x), Arithmetic(ctx, x)
    rank, rest = len(shape), blocks * block - shape[-1]
    wide = padded(ctx, x, [0] * rank, [0] * (rank - 1) + [rest], 0.0)
    parts = reshaped(ctx, wide, [*shape[:-1], blocks, block])
    step = m.divide(ctx.emit(relax.op.max(m.abs(parts), [rank], keepdims=True)), 127.0)
    inverse = m.where(m.equal(step, 0.0), 0.0, m.divide(1.0, step))
    levels = m.round(m.multiply(parts, inverse))
    result = reshaped(ctx, m.multiply(levels, step), [*shape[:-1], blocks * block])
    return part(ctx, result, rank - 1, 0, shape[-1]) if rest else result


def unpacked(packed, bits):
    """The numbers of ``bits`` bits in the last axis of uint8 ``packed``, the lowest bits first."""
    parts = [packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(*packed.shape[:-1], -1)


def _zero_points(ctx, zeros, bits, rows, blocks):
    """float32[rows, blocks, 1]; packed like the weights, or floats, or half of the range where there are none."""
    if zeros is None:
        return np.float32(2 ** (bits - 1))
    zeros = ctx.array(zeros, "the zero points").reshape(rows, -1)
    zeros = unpacked(zeros, bits) if zeros.dtype == np.uint8 else zeros
    return zeros[:, :blocks, None].astype(np.float32)


# ---- 8-bit levels


def _real(ctx, x, scale, zero):
    """What the levels ``x`` mean."""
    value = shifted(ctx, x, zero, None)
    return Arithmetic(ctx, np.zeros(0, np.float32)).multiply(value, scale)


def _levels(ctx, x, scale, zero, shift_first=False):
    """``x`` in levels of ``scale``, of the type of ``zero``; rounded before the zero point is added, or (``shift_first``) after."""
    zero = ctx.array(zero, "a zero point")
    m, limits, shift = Arithmetic(ctx, x), np.iinfo(zero.dtype), float(zero.reshape(()))
    levels = m.divide(x, scale)
    levels = m.round(m.add(levels, shift)) if shift_first else m.add(m.round(levels), shift)
    return to_type(ctx, m.minimum(m.maximum(levels, float(limits.min)), float(limits.max)), str(zero.dtype))


@converts("QLinearAdd", "QLinearMul", domains=DOMAIN)
def qlinear_arithmetic(ctx, node, a, a_scale, a_zero, b, b_scale, b_zero, scale, zero):
    a, b = _real(ctx, a, a_scale, a_zero), _real(ctx, b, b_scale, b_zero)
    m = Arithmetic(ctx, np.zeros(0, np.float32))
    return _levels(ctx, (m.add if node.op_type == "QLinearAdd" else m.multiply)(a, b), scale, zero, shift_first=True)


@converts("QLinearGlobalAveragePool", domains=DOMAIN)
def qlinear_global_average_pool(ctx, node, x, x_scale, x_zero, scale, zero):
    rank = len(shape_of(x))
    axes = list(range(1, rank - 1)) if node.attrs.get("channels_last") else list(range(2, rank))
    mean = ctx.emit(relax.op.mean(_real(ctx, x, x_scale, x_zero), axes, keepdims=True))
    return _levels(ctx, mean, scale, zero)


@converts("QLinearLeakyRelu", "QLinearSigmoid", domains=DOMAIN)
def qlinear_activation(ctx, node, x, x_scale, x_zero, scale, zero):
    value = _real(ctx, x, x_scale, x_zero)
    result = leaky_relu(ctx, node, value) if node.op_type == "QLinearLeakyRelu" else ctx.emit(relax.op.sigmoid(value))
    return _levels(ctx, result, scale, zero)


@converts("QLinearConcat", domains=DOMAIN)
def qlinear_concat(ctx, node, scale, zero, *parts):
    """Inputs come in threes: levels, their scale, their zero point."""
    reals = [_real(ctx, *parts[i : i + 3]) for i in range(0, len(parts), 3)]
    return _levels(ctx, ctx.emit(relax.op.concat([ctx.tensor(r) for r in reals], int(node.attrs["axis"]))), scale, zero)


@converts("MatMulIntegerToFloat", domains=DOMAIN)
def matmul_integer_to_float(ctx, node, a, b, a_scale, b_scale, a_zero=None, b_zero=None, bias=None):
    total = product(ctx, node, shifted(ctx, a, a_zero, None), shifted(ctx, b, b_zero, -1), b if is_constant(b) else None)
    m = Arithmetic(ctx, total)
    result = m.multiply(total, m.multiply(a_scale, b_scale))
    return result if bias is None else m.add(result, bias)


@converts("QGemm", domains=DOMAIN)
def qgemm(ctx, node, a, a_scale, a_zero, b, b_scale, b_zero, c=None, scale=None, zero=None):
    """Product of levels plus a bias in steps of ``a_scale * b_scale``; levels again where a scale for them is given."""
    weight = b if is_constant(b) else None
    a, b = shifted(ctx, a, a_zero, None), shifted(ctx, b, b_zero, 0 if node.attrs.get("transB") else -1)
    a, b = (_swapped(ctx, x) if node.attrs.get(key) else x for x, key in ((a, "transA"), (b, "transB")))
    total = product(ctx, node, a, b, weight)
    m = Arithmetic(ctx, total)
    total = total if c is None else m.add(total, to_type(ctx, c, "float32"))
    step = m.multiply(m.multiply(a_scale, b_scale), float(node.attrs.get("alpha", 1.0)))
    result = m.multiply(total, step)
    return result if scale is None else _levels(ctx, result, scale, zero)
