"""FINN's operators against loops over single numbers."""

import itertools

import numpy as np
import pytest
from onnx import helper

from bnntvm.errors import UnsupportedError
from bnntvm.importer import import_model
from bnntvm.interpreter import run
from bnntvm.pipeline import optimise

from .helpers import calls, constants, model, one

DOMAIN = "finn.custom_op.general"
RNG = np.random.default_rng(3)
f32 = np.float32


def result(proto, feed):
    return run(import_model(proto).mod, feed)[0]


def node(op_type, inputs, outputs, domain=DOMAIN, **attributes):
    return helper.make_node(op_type, inputs.split(), outputs.split(), domain=domain, **attributes)


def bits(*shape):
    return RNG.integers(0, 2, shape).astype(f32)


# ---- MultiThreshold


@pytest.mark.parametrize("domain", ["qonnx.custom_op.general", "finn.custom_op.general"])
@pytest.mark.parametrize(
    "layout, shape, axis", [(None, (2, 3, 4, 5), 1), ("NCHW", (2, 3), 1), ("NHWC", (2, 4, 5, 3), 3), ("NC", (2, 3), 1)]
)
def test_multi_threshold(domain, layout, shape, axis):
    x = RNG.integers(-4, 5, shape).astype(f32)  # often exactly at a threshold
    thresholds = np.sort(RNG.integers(-4, 5, (3, 4)), 1).astype(f32)
    attributes = dict(out_scale=0.5, out_bias=-1.0, out_dtype="INT4", **({"data_layout": layout} if layout else {}))
    got = result(one("MultiThreshold", {"x": x}, {"t": thresholds}, domain=domain, **attributes), {"x": x})
    for index in np.ndindex(*shape):
        assert got[index] == 0.5 * sum(x[index] >= t for t in thresholds[index[axis]]) - 1


def test_multi_threshold_for_all_channels():
    x = RNG.normal(size=(2, 3, 4, 4)).astype(f32)
    imported = import_model(one("MultiThreshold", {"x": x}, {"t": np.zeros((1, 1), f32)}, domain=DOMAIN, out_scale=2.0, out_bias=-1.0))
    np.testing.assert_array_equal(run(imported.mod, {"x": x})[0], np.where(x >= 0, 1, -1))
    assert constants(imported)[0].shape == ()


def test_multi_threshold_of_weights_folds():
    w = RNG.normal(size=(3, 4)).astype(f32)
    nodes = [node("MultiThreshold", "w t", "q"), node("MatMul", "x q", "y", "")]
    imported = import_model(model(nodes, {"x": ((2, 3), "float32")}, ["y"], {"w": w, "t": np.array([[0.0]], f32)}, domains=[DOMAIN]))
    assert calls(imported) == ["bnn.matmul"]
    np.testing.assert_array_equal(constants(imported)[0], w >= 0)


def test_thresholds_that_do_not_fit():
    x = RNG.normal(size=(2, 3, 4)).astype(f32)
    with pytest.raises(UnsupportedError, match="do not fit the channels"):
        import_model(one("MultiThreshold", {"x": x}, {"t": np.zeros((4, 2), f32)}, domain=DOMAIN))


# ---- XnorPopcountMatMul


def test_xnor_popcount_counts_equal_bits():
    a, b = bits(2, 3, 11), bits(11, 5)
    imported = import_model(one("XnorPopcountMatMul", {"a": a}, {"b": b}, domain=DOMAIN))
    want = [[[np.sum(row == column) for column in b.T] for row in rows] for rows in a]
    np.testing.assert_array_equal(run(imported.mod, {"a": a})[0], want)
    (layer,) = imported.layers
    assert (layer.output, layer.op_type, layer.macs, layer.weight_shape) == ("y0", "XnorPopcountMatMul", 3 * 11 * 5, (11, 5))


def test_xnor_popcount_of_two_activations():
    a, b = bits(4, 7), bits(7, 3)
    got = result(one("XnorPopcountMatMul", {"a": a, "b": b}, domain=DOMAIN), {"a": a, "b": b})
    np.testing.assert_array_equal(got, [[np.sum(row == column) for column in b.T] for row in a])


# ---- Im2Col

WINDOWS = dict(kernel_size=[3, 2], stride=[2, 1], pad_amount=[1, 0, 0, 1], dilations=[1, 2], input_shape="(2,7,6,3)")


def windows(x, kernel_size, stride, pad_amount, dilations, fill=0, **_):
    """Rows of an image [N, H, W, C], one element at a time."""
    (top, left, bottom, right), (n, h, w, c) = pad_amount, x.shape
    wide = np.full((n, h + top + bottom, w + left + right, c), fill, f32)
    wide[:, top : top + h, left : left + w] = x
    spans = [(k - 1) * d for k, d in zip(kernel_size, dilations)]
    rows = range(0, wide.shape[1] - spans[0], stride[0]), range(0, wide.shape[2] - spans[1], stride[1])
    out = np.zeros((n, len(rows[0]), len(rows[1]), kernel_size[0] * kernel_size[1] * c), f32)
    for (i, y), (j, z) in itertools.product(enumerate(rows[0]), enumerate(rows[1])):
        taps = [wide[:, y + dilations[0] * p, z + dilations[1] * q] for p in range(kernel_size[0]) for q in range(kernel_size[1])]
        out[:, i, j] = np.concatenate(taps, -1)
    return out


@pytest.mark.parametrize("fill", [0, 1, -1])
def test_windows_as_a_tensor(fill):
    x = RNG.normal(size=(2, 7, 6, 3)).astype(f32)
    got = result(one("Im2Col", {"x": x}, domain=DOMAIN, pad_value=fill, **WINDOWS), {"x": x})
    np.testing.assert_array_equal(got, windows(x, fill=fill, **WINDOWS))


@pytest.mark.parametrize("fill", [0, -1])
def test_windows_by_a_matrix_are_a_convolution(fill):
    x, w = RNG.integers(-3, 4, (2, 7, 6, 3)).astype(f32), RNG.integers(-3, 4, (18, 5)).astype(f32)
    nodes = [node("Im2Col", "x", "rows", pad_value=fill, **WINDOWS), node("MatMul", "rows w", "y", "")]
    imported = import_model(model(nodes, {"x": x}, ["y"], {"w": w}, domains=[DOMAIN]))
    got = run(imported.mod, {"x": x})[0]
    np.testing.assert_array_equal(got, windows(x, fill=fill, **WINDOWS) @ w)
    assert [name for name in calls(imported) if name.startswith("bnn")] == ["bnn.conv"]
    assert "relax.concat" not in calls(imported)
    (layer,) = imported.layers
    assert (layer.output, layer.op_type, layer.macs, layer.weight_shape) == ("y", "MatMul", got[0].size * 18, (18, 5))


def test_windows_by_a_matrix_that_keeps_channels_apart_are_a_depthwise_convolution():
    x, kernel = RNG.integers(-3, 4, (2, 7, 6, 3)).astype(f32), RNG.integers(1, 4, (6, 3)).astype(f32)
    w = np.zeros((6, 3, 3), f32)
    w[:, range(3), range(3)] = kernel
    w = w.reshape(18, 3)
    nodes = [node("Im2Col", "x", "rows", depthwise=1, **WINDOWS), node("MatMul", "rows w", "y", "")]
    imported = import_model(model(nodes, {"x": x}, ["y"], {"w": w}, domains=[DOMAIN]))
    np.testing.assert_array_equal(run(imported.mod, {"x": x})[0], windows(x, **WINDOWS) @ w)
    assert [c.shape for c in constants(imported)] == [(3, 1, 3, 2)]


def test_windows_are_made_once_for_readers_that_need_them():
    x, w = RNG.normal(size=(2, 7, 6, 3)).astype(f32), RNG.integers(-3, 4, (18, 5)).astype(f32)
    nodes = [
        node("Im2Col", "x", "rows", **WINDOWS),
        node("MatMul", "rows w", "y", ""),
        node("Relu", "rows", "r", ""),
        node("Mul", "rows r", "z", ""),
        node("MatMul", "rows v", "u", ""),
    ]
    v = RNG.normal(size=(18, 2)).astype(f32)
    imported = import_model(model(nodes, {"x": x, "v": v}, ["y", "z", "u"], {"w": w}, domains=[DOMAIN]))
    rows = windows(x, **WINDOWS)
    got = run(imported.mod, {"x": x, "v": v})
    for a, b in zip(got, [rows @ w, rows * np.maximum(rows, 0), rows @ v]):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert calls(imported).count("relax.concat") == 1


@pytest.mark.parametrize("fill", [0, 1])
def test_bits_of_windows_stay_bits(fill):
    """A streamlined convolution: the layer computes on bits, whatever the value around the image."""
    x, w = RNG.normal(size=(2, 8, 8, 16)).astype(f32), bits(9 * 16, 8)
    shape = dict(kernel_size=[3, 3], stride=[1, 1], pad_amount=[1, 1, 1, 1])
    nodes = [
        node("MultiThreshold", "x t", "bits", data_layout="NHWC"),
        node("Im2Col", "bits", "rows", pad_value=fill, **shape),
        node("XnorPopcountMatMul", "rows w", "y"),
    ]
    constants_ = {"t": RNG.normal(size=(16, 1)).astype(f32), "w": w}
    imported = import_model(model(nodes, {"x": x}, ["y"], constants_, domains=[DOMAIN]))
    rows = windows((x >= constants_["t"].reshape(-1)).astype(f32), dilations=[1, 1], fill=fill, **shape)
    want = np.sum(rows[..., None] == w, -2)
    np.testing.assert_array_equal(run(imported.mod, {"x": x})[0], want)
    decisions = {}
    optimise(imported.mod, decisions)
    assert decisions["y"].kind == "binary"


# ---- pooling


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_quantised_average_pool(layout):
    x = RNG.integers(0, 16, (2, 3, 6, 7)).astype(f32)
    given = x if layout == "NCHW" else np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    proto = one("QuantAvgPool2d", {"x": given}, domain=DOMAIN, kernel=3, stride=2, ibits=4, obits=4, signed=0, data_layout=layout)
    got = result(proto, {"x": given})
    got = got if layout == "NCHW" else got.transpose(0, 3, 1, 2)
    assert got.shape == (2, 3, 2, 3)
    for n, c, i, j in np.ndindex(got.shape):  # sums up to 135 have 8 bits, 4 of them are kept
        assert got[n, c, i, j] == int(x[n, c, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].sum()) >> 4
