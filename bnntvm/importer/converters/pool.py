"""Pooling."""

import numpy as np
from tvm import relax

from ..registry import converts
from ..values import shape_of
from .layers import check_window, explicit_pads, window
from .shape import padded, reshaped

_POOLS = {
    ("MaxPool", 2): relax.op.nn.max_pool2d,
    ("MaxPool", 3): relax.op.nn.max_pool3d,
    ("AveragePool", 2): relax.op.nn.avg_pool2d,
    ("AveragePool", 3): relax.op.nn.avg_pool3d,
}


@converts("MaxPool", "AveragePool")
def pool(ctx, node, x):
    """Pools in 2-D and 3-D; 1-D ones get an axis of length 1."""
    shape, kernel = ctx.static(x), [int(k) for k in node.attrs["kernel_shape"]]
    spatial = len(kernel)
    if spatial not in (1, 2, 3) or len(shape) != spatial + 2:
        raise ctx.unsupported(f"{spatial}-D pooling of a tensor of rank {len(shape)} is not supported")
    strides, dilations = window(node, "strides", spatial), window(node, "dilations", spatial)
    pads = explicit_pads(node, shape[2:], kernel, strides, dilations)
    if not node.attrs.get("ceil_mode", 0):
        check_window(node, shape[2:], kernel, strides, dilations, pads)
    lengths = _lengths(node, shape[2:], kernel, strides, dilations, pads)
    reach = [(out - 1) * s + d * (k - 1) + 1 for out, s, d, k in zip(lengths, strides, dilations, kernel)]
    # The end pads that make every window fit: windows of ceil_mode may hang over the declared pads.
    ends = [max(r - n - b, e) for r, n, b, e in zip(reach, shape[2:], pads[:spatial], pads[spatial:])]
    counts = node.op_type == "AveragePool" and bool(node.attrs.get("count_include_pad", 0))
    if counts and ends != pads[spatial:]:  # declared pads count, what lies beyond them does not
        x = padded(ctx, x, [0, 0, *pads[:spatial]], [0, 0, *pads[spatial:]], 0.0)
        ends, pads, counts = [e - p for e, p in zip(ends, pads[spatial:])], [0] * (2 * spatial), False
    geometry = (kernel, strides, pads[:spatial] + ends, dilations)
    return _pooled(ctx, node.op_type, x, *geometry, counts)


def _pooled(ctx, kind, x, kernel, strides, pads, dilations, counts):
    flat = len(kernel) == 1
    shape = shape_of(x)
    if flat:
        x = reshaped(ctx, x, [shape[0], shape[1], 1, shape[2]])
        kernel, strides, pads, dilations = [1, *kernel], [1, *strides], [0, pads[0], 0, pads[1]], [1, *dilations]
    op = _POOLS[kind, len(kernel)]
    options = {"count_include_pad": counts} if kind == "AveragePool" else {}
    result = ctx.emit(op(ctx.tensor(x), tuple(kernel), tuple(strides), tuple(pads), tuple(dilations), **options))
    out = shape_of(result)
    return reshaped(ctx, result, [out[0], out[1], out[3]]) if flat else result


def _lengths(node, sizes, kernel, strides, dilations, pads):
    """Output lengths as ONNX Runtime has them: in ceil_mode a window that would start behind the input and its begin pad is dropped."""
    mode, spatial, results = node.attrs.get("auto_pad", "NOTSET"), len(kernel), []
    for size, k, stride, dilation, begin, end in zip(sizes, kernel, strides, dilations, pads[:spatial], pads[spatial:]):
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            results.append(-(-size // stride))
            continue
        room = size + begin + end - dilation * (k - 1) - 1
        if not node.attrs.get("ceil_mode", 0):
            results.append(room // stride + 1)
            continue
        out = -(-room // stride) + 1
        results.append(out - 1 if (out - 1) * stride >= size + begin else out)
    return results


@converts("GlobalAveragePool", "GlobalMaxPool")
def global_pool(ctx, node, x):
    op = relax.op.mean if node.op_type == "GlobalAveragePool" else relax.op.max
    return ctx.emit(op(ctx.tensor(x), list(range(2, len(shape_of(x)))), keepdims=True))


@converts("LRN")
def local_response_normalisation(ctx, node, x):
    from .elementwise import Arithmetic

    m, channels, size = Arithmetic(ctx, x), ctx.static(x)[1], int(node.attrs["size"])
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2
    rank = len(shape_of(x))
    squares = padded(ctx, m.multiply(x, x), [0, before] + [0] * (rank - 2), [0, after] + [0] * (rank - 2), 0.0)
    total = None
    for i in range(size):
        window_ = ctx.emit(relax.op.strided_slice(squares, [1], [i], [i + channels]))
        total = window_ if total is None else m.add(total, window_)
    alpha, beta, bias = (float(node.attrs.get(k, d)) for k, d in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
    scale = m.add(m.multiply(total, float(np.float32(alpha / size))), bias)
    return m.divide(x, m.power(scale, beta))
