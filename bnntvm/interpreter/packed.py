"""The packed operators in numpy, for the interpreter: what bits mean, by unpacking them."""

import numpy as np

from bnntvm.bits import dense_groups, pack_bits, unpack_bits
from bnntvm.interpreter import convolve, implements


def _grouped(plane, groups):
    """bool [..., C] -> words with each group at a word's start."""
    parts = np.split(np.asarray(plane), groups, axis=-1)
    return np.concatenate([pack_bits(part) for part in parts], -1)


def _ungrouped(words, channels, groups):
    """The inverse of :func:`_grouped`."""
    parts = np.split(np.asarray(words), groups, axis=-1)
    return np.concatenate([unpack_bits(part, channels // groups) for part in parts], -1)


@implements("bnn.encode")
def encode(attrs, x):
    return _grouped(np.isin(x, np.float32(attrs["levels"])), attrs["groups"])


@implements("bnn.pack")
def pack(attrs, plane, flip=None):
    words = _grouped(plane, attrs["groups"])
    return words if flip is None else words ^ flip


def _values(attrs, words, mask, groups):
    bits = _ungrouped(words, attrs["channels"], groups)
    values = bits.astype(np.float32) if attrs["unipolar"] else np.where(bits, np.float32(-1), np.float32(1))
    return values if mask is None else np.where(_ungrouped(mask, attrs["channels"], groups), np.float32(0), values)


def _reachable(attrs, out):
    """``out``, after a check that it holds only values that the analysis promised."""
    low, high, stride = attrs["reachable"]
    inside = out.size == 0 or (out.min() >= low and out.max() <= high and not np.any((out - low) % stride))
    assert inside, "the analysis promised other values"
    return out


@implements("bnn.conv2d_bits")
def conv2d_bits(attrs, words, *rest):
    mask, weight = (rest[0] if len(rest) > 1 else None), rest[-1]
    groups = attrs["groups"]
    values = _values(attrs, words, mask, 1 if dense_groups(attrs["channels"], groups) else groups)
    signs = np.where(unpack_bits(weight, attrs["channels"] // groups), np.float32(-1), np.float32(1))
    out = convolve(values.transpose(0, 3, 1, 2), signs.transpose(0, 3, 1, 2), attrs["strides"], attrs["pads"], attrs["dilations"], groups)
    out = np.ascontiguousarray(out.transpose(0, 2, 3, 1)).astype(np.int32)
    return _reachable(attrs, out)


@implements("bnn.dense_bits")
def dense_bits(attrs, words, *rest):
    mask, weight = (rest[0] if len(rest) > 1 else None), rest[-1]
    values = _values(attrs, words, mask, 1)
    signs = np.where(unpack_bits(weight, attrs["channels"]), np.float32(-1), np.float32(1))
    return (values @ signs.T).astype(np.int32)


def _planes(attrs, args):
    """Values of the data planes, values of the weight planes, scales or None."""
    count = len(attrs["data"])
    data, weights, more = args[:count], args[count], list(args[count + 1 :])
    mask = more.pop(0) if attrs["zeros"] else None
    groups = attrs.get("groups", 1)
    words = 1 if dense_groups(attrs["channels"], groups) else groups
    plain = {"channels": attrs["channels"], "unipolar": attrs["data_kind"] == "unipolar"}
    values = [_values(plain, plane, mask, words) for plane in data]
    bits = unpack_bits(weights, attrs["channels"] // groups).astype(np.float32)
    if attrs["weight_kind"] == "ternary":
        assert not np.any(bits[0::2] > bits[1::2]), "a sign where the mask is 0"
        kernels = (1 - 2 * bits[0::2]) * bits[1::2]
    else:
        kernels = bits if attrs["weight_kind"] == "unipolar" else 1 - 2 * bits
    return values, kernels, more[0] if attrs["scaled"] else None


def _plane_sum(attrs, args, product):
    values, kernels, scales = _planes(attrs, args)
    pairs = [(a, w) for a in range(len(values)) for w in range(len(kernels))]
    dots = [product(values[a], kernels[w]).astype(np.int32) for a, w in pairs]
    if scales is not None:
        out = dots[0].astype(np.float32) * scales[0]
        for dot, scale in zip(dots[1:], scales[1:]):
            out = out + dot.astype(np.float32) * scale
        return out
    out = sum(np.int32(attrs["data"][a] * attrs["weights"][w]) * dot for (a, w), dot in zip(pairs, dots))
    return _reachable(attrs, out)


def _operand(words, kind):
    """float32 [..., 32 * words]: values of one operand; ``words`` is one plane or, for ternary, signs and zeros."""
    bits = [unpack_bits(w, 32 * w.shape[-1]) for w in words]
    if kind == "unipolar":
        return bits[0].astype(np.float32)
    signs = np.where(bits[0], np.float32(-1), np.float32(1))
    return np.where(bits[1], np.float32(0), signs) if kind == "ternary" else signs


@implements("bnn.matmul_bits")
def matmul_bits(attrs, *words):
    count = 2 if attrs["left"] == "ternary" else 1
    left = _operand(words[:count], attrs["left"])
    right = _operand([np.swapaxes(w, 1, 2) for w in words[count:]], attrs["right"])
    unused = 0 if "unipolar" in (attrs["left"], attrs["right"]) else left.shape[-1] - attrs["features"]  # 0 on both sides: +1 times +1
    out = _reachable(attrs, (np.matmul(left, np.swapaxes(right, 1, 2)) - unused).astype(np.int32))
    return out.astype(np.float32) * np.float32(attrs["scale"][0]) if attrs["scale"] else out


@implements("bnn.conv2d_planes")
def conv2d_planes(attrs, *args):
    def product(values, kernel):
        geometry = attrs["strides"], attrs["pads"], attrs["dilations"], attrs["groups"]
        out = convolve(values.transpose(0, 3, 1, 2), kernel.transpose(0, 3, 1, 2), *geometry)
        return np.ascontiguousarray(out.transpose(0, 2, 3, 1))

    return _plane_sum(attrs, args, product)


@implements("bnn.dense_planes")
def dense_planes(attrs, *args):
    return _plane_sum(attrs, args, lambda values, kernel: values @ kernel.T)


@implements("bnn.pool_bits")
def pool_bits(attrs, words):
    n, height, width, count = words.shape
    top, left, bottom, right = attrs["pads"]
    conjunction = attrs["kind"] == "and"
    fill = np.uint32(0xFFFFFFFF if conjunction else 0)
    padded = np.pad(words, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=fill)
    (kh, kw), (sh, sw), (dh, dw) = attrs["kernel"], attrs["strides"], attrs["dilations"]
    out_h, out_w = (padded.shape[1] - dh * (kh - 1) - 1) // sh + 1, (padded.shape[2] - dw * (kw - 1) - 1) // sw + 1
    out = np.full((n, out_h, out_w, count), fill)
    for r in range(kh):
        for s in range(kw):
            window = padded[:, r * dh : r * dh + sh * (out_h - 1) + 1 : sh, s * dw : s * dw + sw * (out_w - 1) + 1 : sw]
            out = out & window if conjunction else out | window
    return out


def _packed_weights(attrs, words, levels, channels):
    planes = unpack_bits(words, channels)
    if attrs["coding"] == "sign":
        return np.where(planes[0], np.float32(-1), np.float32(1))
    if attrs["coding"] == "ternary":
        assert not np.any(planes[0] & planes[1])
        return planes[0].astype(np.float32) - planes[1].astype(np.float32)
    which = planes[0] + 2 * planes[1] if len(planes) > 1 else planes[0].astype(int)
    return np.choose(which, levels.reshape(len(levels), -1, *(1 for _ in planes.shape[2:])))


@implements("bnn.conv2d_weight")
def conv2d_weight(attrs, x, words, levels=None):
    weights = _packed_weights(attrs, words, levels, attrs["channels"] // attrs["groups"])
    moved = x.transpose(0, 3, 1, 2), weights.transpose(0, 3, 1, 2)
    out = convolve(*moved, attrs["strides"], attrs["pads"], attrs["dilations"], attrs["groups"])
    return np.ascontiguousarray(out.transpose(0, 2, 3, 1)).astype(np.float32)


@implements("bnn.dense_weight")
def dense_weight(attrs, x, words, levels=None):
    out = x @ _packed_weights(attrs, words, levels, attrs["channels"]).T
    if not attrs["integer"]:
        return out.astype(np.float32)
    low, high, _ = attrs["reachable"]
    assert np.all(x == np.rint(x)) and x.min(initial=0) >= -128 and x.max(initial=0) <= 127, "the analysis promised bytes"
    assert low <= out.min(initial=0) and out.max(initial=0) <= high, "the analysis promised other values"
    return out.astype(np.int32)


@implements("bnn.conv2d_int8")
def conv2d_int8(attrs, x, weights):
    info, values = np.iinfo(attrs["data"]), np.float64(x)
    assert np.all(values == np.rint(values)) and values.min(initial=0) >= info.min and values.max(initial=0) <= info.max, "no such bytes"
    moved = values.transpose(0, 3, 1, 2), weights.astype(np.float64).transpose(0, 3, 1, 2)
    out = convolve(*moved, attrs["strides"], attrs["pads"], attrs["dilations"], 1)
    return _reachable(attrs, np.ascontiguousarray(out.transpose(0, 2, 3, 1)).astype(np.int32))
