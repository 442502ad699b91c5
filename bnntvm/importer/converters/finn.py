"""FINN: what is left of a network after its quantisers have become thresholds and its signs have become {0, 1}.

The operators are in the domain of QONNX's quantisers, whose names :data:`bnntvm.importer.converters.qonnx.GENERAL` lists.
"""

from dataclasses import replace

import numpy as np
from tvm import relax

from ... import ops
from ..registry import converts
from ..values import Unfolded, is_constant, shape_of
from .elementwise import Arithmetic, to_type
from .layers import product
from .qonnx import GENERAL, channels_first, channels_last


@converts("MultiThreshold", domains=GENERAL)
def multi_threshold(ctx, node, x, thresholds):
    """How many thresholds each element reaches, times ``out_scale``, plus ``out_bias``.

    ``thresholds`` [C or 1, L] are per channel: axis 1 of ``x``, or its last where ``data_layout`` ends in C.
    """
    m, thresholds = Arithmetic(ctx, x), ctx.array(thresholds, "the thresholds of a quantiser").astype(np.float32)
    rank = len(shape_of(x))
    axis = rank - 1 if node.attrs.get("data_layout", "NCHW").endswith("C") else 1
    channels = shape_of(x)[axis]
    if thresholds.ndim != 2 or thresholds.shape[0] not in (1, channels):
        raise ctx.unsupported(
            "the thresholds do not fit the channels", why=f"thresholds {list(thresholds.shape)}, {channels} channels on axis {axis}"
        )
    count = None
    for column in thresholds.T:
        reached = to_type(ctx, m.greater_equal(x, column.reshape([-1 if i == axis else 1 for i in range(rank)])), "float32")
        count = reached if count is None else m.add(count, reached)
    scale, bias = float(node.attrs.get("out_scale", 1.0)), float(node.attrs.get("out_bias", 0.0))
    count = m.multiply(count, scale) if scale != 1 else count
    return m.add(count, bias) if bias else count


@converts("XnorPopcountMatMul", domains=GENERAL, windows=True)
def xnor_popcount(ctx, node, a, b):
    """How many bits of a row of ``a`` [..., K] and of a column of ``b`` [K, N] are equal: ``(K + (2a - 1)(2b - 1)) / 2``."""
    depth = shape_of(a)[-1]
    dot = product(ctx, node, _bipolar(ctx, a), _bipolar(ctx, b), b if is_constant(b) else None)
    m = Arithmetic(ctx, dot)
    return m.multiply(m.add(dot, float(depth)), 0.5)


def _bipolar(ctx, bits):
    """{0, 1} as {-1, +1}."""
    if isinstance(bits, Unfolded):
        return replace(bits, image=_bipolar(ctx, bits.image), fill=2.0 * bits.fill - 1.0)
    m = Arithmetic(ctx, bits)
    return m.subtract(m.multiply(bits, 2.0), 1.0)


@converts("Im2Col", domains=GENERAL)
def im2col(ctx, node, x):
    """The windows of ``x`` [N, H, W, C] as rows [N, H', W', kh * kw * C]."""
    shape = ctx.static(x, "the image")
    if len(shape) != 4:
        raise ctx.unsupported("Im2Col takes an image [N, H, W, C]", why=f"got {list(shape)}")
    kernel, strides = (tuple(int(v) for v in node.attrs[key]) for key in ("kernel_size", "stride"))
    pads, dilations = tuple(node.attrs.get("pad_amount") or (0, 0, 0, 0)), tuple(node.attrs.get("dilations") or (1, 1))
    out = [ops.conv_out_dim(shape[1 + i], kernel[i], strides[i], pads[i], pads[2 + i], dilations[i]) for i in range(2)]
    fill, rows = float(node.attrs.get("pad_value", 0)), (shape[0], *out, kernel[0] * kernel[1] * shape[3])
    return Unfolded(ctx.tensor(x), kernel, strides, dilations, pads, fill, rows)


@converts("QuantAvgPool2d", domains=GENERAL)
def quant_average_pool(ctx, node, x):
    """Sums over ``kernel`` x ``kernel`` windows of integers, shifted right until ``obits`` bits hold them."""
    size, stride, bits, left = (int(node.attrs.get(key, 1)) for key in ("kernel", "stride", "ibits", "obits"))
    shift = max(((2**bits - 1) * size * size).bit_length() - left, 0)
    last = node.attrs.get("data_layout", "NCHW") == "NHWC"
    image = channels_first(ctx, x) if last else x
    mean = ctx.emit(relax.op.nn.avg_pool2d(ctx.tensor(image), (size, size), (stride, stride)))
    m = Arithmetic(ctx, mean)
    total = m.round(m.multiply(mean, float(size * size)))
    result = m.floor(m.multiply(total, 2.0**-shift)) if shift else total
    return channels_last(ctx, result) if last else result
