"""Resize and Upsample."""

import math

import numpy as np
from tvm import relax

from ..registry import converts
from ..values import shape_of
from .shape import reshaped, take


@converts("Upsample")
def upsample(ctx, node, x, scales=None):
    scales = node.attrs["scales"] if scales is None else ctx.array(scales, "scales").tolist()
    return _resized(ctx, x, [float(s) for s in scales], None, node.attrs.get("mode", "nearest"), "asymmetric", "floor")


@converts("Resize")
def resize(ctx, node, x, *rest):
    if node.opset < 11:
        return upsample(ctx, node, x, rest[0])
    _, scales, sizes = (*rest, None, None, None)[:3]
    if node.attrs.get("antialias", 0) or node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise ctx.unsupported("Resize with antialias or keep_aspect_ratio_policy is not supported")
    shape = shape_of(x)
    axes = [int(a) % len(shape) for a in node.attrs.get("axes") or range(len(shape))]
    scales = _spread(ctx.array(scales, "scales").tolist() if scales is not None else [], axes, [1.0] * len(shape))
    sizes = _spread(list(ctx.dims(sizes, "sizes")) if sizes is not None else [], axes, list(shape))
    return _resized(
        ctx,
        x,
        scales,
        sizes,
        node.attrs.get("mode", "nearest"),
        node.attrs.get("coordinate_transformation_mode", "half_pixel"),
        node.attrs.get("nearest_mode", "round_prefer_floor"),
    )


def _spread(given, axes, default):
    """``given``, one for each of ``axes``, as one for every axis; None where nothing is given."""
    if not given:
        return None
    result = list(default)
    for axis, value in zip(axes, given):
        result[axis] = value
    return result


def _resized(ctx, x, scales, sizes, mode, coordinates, rounding):
    shape = shape_of(x)
    changed = [i for i in range(len(shape)) if (scales[i] != 1 if sizes is None else not _same(sizes[i], shape[i]))]
    if any(not isinstance(shape[i], int) for i in changed):
        raise ctx.unsupported("Resize of the dynamic batch is not supported")
    lengths = {i: int(math.floor(np.float32(shape[i]) * np.float32(scales[i]))) if sizes is None else int(sizes[i]) for i in changed}
    factors = {i: np.float32(scales[i]) if sizes is None else np.float32(lengths[i]) / np.float32(shape[i]) for i in changed}
    if mode == "nearest":
        return _nearest(ctx, x, lengths, factors, coordinates, rounding)
    if mode != "linear":
        raise ctx.unsupported(f"Resize in mode {mode} is not supported", hint="nearest and linear are")
    return _linear(ctx, x, lengths, factors, coordinates)


def _same(size, dim):
    return isinstance(size, int) and isinstance(dim, int) and size == dim or not isinstance(size, int)


def _nearest(ctx, x, lengths, factors, coordinates, rounding):
    for axis, length in lengths.items():
        size = shape_of(x)[axis]
        position = _positions(ctx, size, length, factors[axis], coordinates)
        index = {
            "round_prefer_floor": lambda p: np.ceil(p - np.float32(0.5)),
            "round_prefer_ceil": lambda p: np.floor(p + np.float32(0.5)),
            "floor": np.floor,
            "ceil": np.ceil,
        }[rounding](position)
        x = take(ctx, x, np.clip(index, 0, size - 1).astype(np.int64), axis)
    return x


def _positions(ctx, size, length, factor, mode):
    """Where in the input each of ``length`` outputs lies, in float32 as ONNX Runtime computes it."""
    i, half = np.arange(length, dtype=np.float32), np.float32(0.5)
    if mode == "asymmetric":
        return i / factor
    if mode == "align_corners":
        return i * np.float32(size - 1) / np.float32(length - 1) if length > 1 else i
    if mode == "half_pixel" or mode == "pytorch_half_pixel" and length > 1:
        return (i + half) / factor - half
    if mode == "pytorch_half_pixel":
        return i * 0
    if mode == "tf_half_pixel_for_nn":
        return (i + half) / factor
    raise ctx.unsupported(f"Resize with the coordinates {mode} is not supported")


def _linear(ctx, x, lengths, factors, coordinates):
    shape = shape_of(x)
    if len(shape) not in (3, 4) or any(axis < 2 for axis in lengths):
        raise ctx.unsupported("linear Resize is supported along the spatial axes of 3-D and 4-D tensors", why=f"the shape is {list(shape)}")
    if any(lengths[i] != shape[i] * float(factors[i]) and coordinates != "align_corners" for i in lengths):
        raise ctx.unsupported(
            "linear Resize to a size that is not input size times scale", why=f"scales {[float(f) for f in factors.values()]}"
        )
    modes = {"half_pixel": "half_pixel", "asymmetric": "asymmetric", "align_corners": "align_corners"}
    if coordinates == "pytorch_half_pixel" and all(length > 1 for length in lengths.values()):
        coordinates = "half_pixel"
    if coordinates not in modes:
        raise ctx.unsupported(f"linear Resize with the coordinates {coordinates} is not supported")
    flat = len(shape) == 3
    if flat:
        x = reshaped(ctx, x, [shape[0], shape[1], 1, shape[2]])
    out = [lengths.get(i, shape[i]) for i in range(2, len(shape))]
    size = (1, *out) if flat else tuple(out)
    result = ctx.emit(relax.op.image.resize2d(ctx.tensor(x), size, method="linear", coordinate_transformation_mode=modes[coordinates]))
    return reshaped(ctx, result, [shape[0], shape[1], *out])
