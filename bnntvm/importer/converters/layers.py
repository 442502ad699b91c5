"""Convolutions and matrix products."""

from math import prod

import numpy as np
from tvm import relax

from ... import ops
from ...errors import ModelError
from ..registry import converts
from ..values import Unfolded, is_constant, shape_of


@converts("Conv")
def conv(ctx, node, x, weight, bias=None):
    result = convolution(ctx, node, x, weight)
    return add_bias(ctx, result, bias)


def convolution(ctx, node, x, weight):
    """``bnn.conv`` without bias of ``x`` [N, C, *spatial] with ``weight`` [O, C/groups, *kernel]; reported as a layer."""
    shape, kernel = ctx.static(x, "the data of a convolution"), ctx.static(weight, "the weight of a convolution")
    spatial = len(kernel) - 2
    strides, dilations = window(node, "strides", spatial), window(node, "dilations", spatial)
    pads = explicit_pads(node, shape[2:], kernel[2:], strides, dilations)
    check_window(node, shape[2:], kernel[2:], strides, dilations, pads)
    call = ops.call(
        ops.CONV,
        [ctx.tensor(x), ctx.tensor(weight)],
        layer=node.outputs[0],
        layout="NCHW",
        strides=strides,
        pads=pads,
        dilations=dilations,
        groups=int(node.attrs.get("group", 1)),
    )
    check_groups(node, shape[1], kernel[1], kernel[0])
    result = ctx.emit(call)
    ctx.add_layer(shape_of(result), prod(kernel[1:]), weight if is_constant(weight) else None)
    return result


def check_groups(node, channels, per_group, outputs):
    """Raise ModelError where the channels of data and weight do not fit the number of groups."""
    groups = int(node.attrs.get("group", 1))
    if groups < 1 or channels != per_group * groups or outputs % groups:
        raise ModelError(
            "channels of data and weight do not fit together", where=node.where,
            why=f"the data has {channels} channels, the weight takes {per_group} in each of {groups} groups and makes {outputs}",
            hint="export the model again",
        )  # fmt: skip


def window(node, name, spatial):
    """An attribute with one int per spatial axis, 1 by default."""
    return [int(v) for v in node.attrs.get(name) or [1] * spatial]


def check_window(node, sizes, kernel, strides, dilations, pads):
    """Raise ModelError for strides and dilations that are none, and where the window does not fit even once."""
    for name, values in (("strides", strides), ("dilations", dilations)):
        if min(values, default=1) < 1:
            raise ModelError(f"{name} must be positive", where=node.where, why=f"{name} are {values}", hint="export the model again")
    for axis, (size, k, dilation) in enumerate(zip(sizes, kernel, dilations)):
        padded, reach = size + pads[axis] + pads[axis + len(kernel)], dilation * (k - 1) + 1
        if reach > padded:
            raise ModelError(
                "the kernel is larger than the image",
                where=node.where,
                why=f"along spatial axis {axis} it reaches over {reach}, the padded image has {padded}",
                hint="give the network a larger input, or pad more",
            )


def explicit_pads(node, sizes, kernel, strides, dilations):
    """``auto_pad`` and ``pads`` as pads, begins then ends."""
    mode, spatial = node.attrs.get("auto_pad", "NOTSET"), len(kernel)
    if mode in ("NOTSET", ""):
        return [int(v) for v in node.attrs.get("pads") or [0] * (2 * spatial)]
    if mode == "VALID":
        return [0] * (2 * spatial)
    begins, ends = [], []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations):
        total = max((-(-size // stride) - 1) * stride + dilation * (k - 1) + 1 - size, 0)
        small, large = total // 2, total - total // 2
        begins.append(small if mode == "SAME_UPPER" else large)
        ends.append(large if mode == "SAME_UPPER" else small)
    return begins + ends


def add_bias(ctx, x, bias):
    """``x`` [N, O, *spatial] plus ``bias`` [O]; nothing where the bias is constant zero."""
    if bias is None or is_constant(bias) and not bias.any():
        return x
    shape = (1, -1) + (1,) * (len(shape_of(x)) - 2)
    if is_constant(bias):
        return ctx.emit(relax.op.add(*ctx.operands(x, bias.reshape(shape))))
    shaped = ctx.emit(relax.op.reshape(ctx.tensor(bias), (1, shape_of(bias)[0], *shape[2:])))
    return ctx.emit(relax.op.add(x, shaped))


@converts("ConvTranspose")
def conv_transpose(ctx, node, x, weight, bias=None):
    shape, kernel = ctx.static(x, "the data of a convolution"), ctx.static(weight, "the weight of a convolution")
    spatial = len(kernel) - 2
    strides, dilations = window(node, "strides", spatial), window(node, "dilations", spatial)
    extra = [int(v) for v in node.attrs.get("output_padding") or [0] * spatial]
    groups = int(node.attrs.get("group", 1))
    check_groups(node, shape[1], kernel[0] // max(groups, 1), groups)
    pads = _transposed_pads(node, shape[2:], kernel[2:], strides, dilations, extra)
    call = ops.call(
        ops.CONV_TRANSPOSE,
        [ctx.tensor(x), ctx.tensor(weight)],
        layer=node.outputs[0],
        layout="NCHW",
        strides=strides,
        pads=pads,
        dilations=dilations,
        groups=int(node.attrs.get("group", 1)),
        output_padding=extra,
    )
    result = ctx.emit(call)
    # Every input element meets the whole kernel of its group, whatever of that falls outside.
    ctx.add_layer(shape, prod(kernel[1:]), weight if is_constant(weight) else None)
    return add_bias(ctx, result, bias)


def _transposed_pads(node, sizes, kernel, strides, dilations, extra):
    """Pads, begins then ends, of a transposed convolution; from the output's shape where that is given."""
    mode, spatial = node.attrs.get("auto_pad", "NOTSET"), len(kernel)
    wanted = node.attrs.get("output_shape")
    if wanted is None and mode in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [size * stride for size, stride in zip(sizes, strides)]
    if wanted is None:
        given = node.attrs.get("pads") if mode in ("NOTSET", "") else None
        return [int(v) for v in given or [0] * (2 * spatial)]
    begins, ends = [], []
    for size, k, stride, dilation, more, out in zip(sizes, kernel, strides, dilations, extra, wanted[-spatial:]):
        total = max(stride * (size - 1) + more + dilation * (k - 1) + 1 - int(out), 0)
        small, large = total // 2, total - total // 2
        begins.append(small if mode == "SAME_UPPER" else large)
        ends.append(large if mode == "SAME_UPPER" else small)
    return begins + ends


@converts("Gemm")
def gemm(ctx, node, a, b, c=None):
    a = _transposed(ctx, a) if node.attrs.get("transA") else a
    weight, b = b, _transposed(ctx, b) if node.attrs.get("transB") else b
    result = product(ctx, node, a, b, weight if is_constant(weight) else None)
    alpha, beta = np.float32(node.attrs.get("alpha", 1.0)), np.float32(node.attrs.get("beta", 1.0))
    if alpha != 1:
        result = ctx.emit(relax.op.multiply(result, ctx.const(np.array(alpha))))
    if c is None or beta == 0 or is_constant(c) and not c.any():
        return result
    if beta != 1:
        c = c * beta if is_constant(c) else ctx.emit(relax.op.multiply(ctx.tensor(c), ctx.const(np.array(beta))))
    return ctx.emit(relax.op.add(*ctx.operands(result, c)))


@converts("MatMul", windows=True)
def matmul(ctx, node, a, b):
    return product(ctx, node, a, b, b if is_constant(b) else None)


def product(ctx, node, a, b, weight):
    """``bnn.matmul``, reported as a layer; ``weight`` is the constant operand as the file has it, or None.

    Windows of an image by a constant matrix are a convolution.
    """
    if isinstance(a, Unfolded) and is_constant(b) and b.ndim == 2 and b.shape[0] == a.shape[3]:
        return _window_product(ctx, node, a, b)
    if isinstance(a, Unfolded) or isinstance(b, Unfolded):
        a, b = ctx.tensor(a), ctx.tensor(b) if isinstance(b, Unfolded) else b
    depth, rows = shape_of(a)[-1], shape_of(b)[-2 if len(shape_of(b)) > 1 else 0]
    if depth != rows:
        raise ctx.unsupported("inner dimensions of a product differ", why=f"{list(shape_of(a))} by {list(shape_of(b))}")
    result = ctx.emit(ops.call(ops.MATMUL, [ctx.tensor(a), ctx.tensor(b)], layer=node.outputs[0]))
    if weight is None and is_constant(a):
        weight = a
    batch_first = not is_constant(a) or a.ndim < len(shape_of(b))
    ctx.add_layer(shape_of(result), depth, weight, batch_first=batch_first)
    return result


def _window_product(ctx, node, windows, matrix):
    """``bnn.conv`` of an image [N, H, W, C] by a ``matrix`` [kh * kw * C, O] that multiplies its windows; result [N, H', W', O].

    A matrix that is zero wherever an output meets another channel than its own is a depthwise convolution.
    """
    image, channels, outputs = windows.image, shape_of(windows.image)[3], matrix.shape[1]
    kernel = matrix.reshape(*windows.kernel, channels, outputs).transpose(3, 2, 0, 1)
    groups = 1
    if channels == outputs > 1 and not kernel[~np.eye(channels, dtype=bool)].any():
        kernel, groups = kernel[np.arange(channels), np.arange(channels)][:, None], channels
    image = ctx.emit(relax.op.permute_dims(image, [0, 3, 1, 2]))
    pads = windows.pads
    if any(pads) and windows.fill:
        image = ctx.emit(relax.op.nn.pad(image, [0, 0, 0, 0, pads[0], pads[2], pads[1], pads[3]], "constant", windows.fill))
        pads = (0, 0, 0, 0)
    call = ops.call(
        ops.CONV,
        [image, ctx.const(np.ascontiguousarray(kernel))],
        layer=node.outputs[0],
        layout="NCHW",
        strides=list(windows.strides),
        pads=list(pads),
        dilations=list(windows.dilations),
        groups=groups,
    )
    result = ctx.emit(call)
    ctx.add_layer(shape_of(result), prod(kernel.shape[1:]), matrix)
    return ctx.emit(relax.op.permute_dims(result, [0, 2, 3, 1]))


def _transposed(ctx, value):
    if is_constant(value):
        return np.ascontiguousarray(value.T)
    return ctx.emit(relax.op.permute_dims(ctx.tensor(value), [1, 0]))
