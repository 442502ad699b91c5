"""QONNX's operators against arithmetic on one number at a time, and its channels-last operators against ONNX Runtime's."""

import math

import numpy as np
import pytest
from onnx import helper
from tvm import relax

from bnntvm.errors import UnsupportedError
from bnntvm.importer import import_model
from bnntvm.interpreter import run
from bnntvm.levels import Step
from bnntvm.passes.infer_levels import infer_levels

from .helpers import calls, constants, model, one, reference

GENERAL = "qonnx.custom_op.general"
LAST = "qonnx.custom_op.channels_last"
RNG = np.random.default_rng(5)
f32 = np.float32
#: Ties, zeros of both signs, denormals, and numbers beyond every range.
X = np.array([0, -0.0, 1e-45, -1e-45, *np.arange(-9, 9.25, 0.25), 100, -100, 0.3, -0.3, 1e8, -1e8], f32).reshape(1, -1)

MODES = {
    "ROUND": round,
    "half_even": round,
    "FLOOR": math.floor,
    "ceil": math.ceil,
    "UP": lambda v: math.ceil(v) if v > 0 else math.floor(v),
    "DOWN": math.trunc,
    "ROUND_TO_ZERO": math.trunc,
    "half_up": lambda v: math.floor(v + 0.5) if v > 0 else math.ceil(v - 0.5),
    "HALF_DOWN": lambda v: math.ceil(v - 0.5) if v > 0 else math.floor(v + 0.5),
}


def result(proto, feed):
    return run(import_model(proto).mod, feed)[0]


def quantised(value, scale, zero, bits, signed, narrow, mode):
    """Quant of one number."""
    level = f32(f32(value) / f32(scale)) + f32(zero)
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1 - narrow
    low = -(2 ** (bits - 1)) + narrow if signed else 0
    return f32(f32(MODES[mode](float(min(max(level, low), high)))) - f32(zero)) * f32(scale)


def parameters(scale=1.0, zero=0.0, bits=2.0):
    return {"scale": np.asarray(scale, f32), "zero": np.asarray(zero, f32), "bits": np.asarray(bits, f32)}


# ---- BipolarQuant


@pytest.mark.parametrize("domain", [GENERAL, "onnx.brevitas", "finn.custom_op.general"])
def test_bipolar_takes_both_zeros_up(domain):
    got = result(one("BipolarQuant", {"x": X}, {"scale": np.array([0.5], f32)}, domain=domain), {"x": X})
    np.testing.assert_array_equal(got, [[0.5 if v >= 0 else -0.5 for v in X[0]]])
    assert got.dtype == np.float32


def test_bipolar_weights_fold_with_a_scale_for_each_filter():
    w, scale = RNG.normal(size=(4, 3, 3, 3)).astype(f32), RNG.uniform(0.1, 1, (4, 1, 1, 1)).astype(f32)
    w[0, 0, 0, 0] = -0.0
    nodes = [
        helper.make_node("BipolarQuant", ["w", "s"], ["wq"], domain=GENERAL),
        helper.make_node("Conv", ["x", "wq"], ["y"]),
    ]
    imported = import_model(model(nodes, {"x": ((2, 3, 5, 5), "float32")}, ["y"], {"w": w, "s": scale}, domains=[GENERAL]))
    assert calls(imported) == ["bnn.conv"]
    (weight,) = constants(imported)
    assert weight.dtype == f32 and weight[0, 0, 0, 0] == scale[0]
    np.testing.assert_array_equal(np.abs(weight), np.broadcast_to(scale, w.shape))
    np.testing.assert_array_equal(weight < 0, w < 0)


# ---- Quant


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("signed, narrow, bits", [(1, 0, 2), (1, 1, 2), (1, 0, 4), (0, 0, 1), (0, 0, 2), (0, 1, 3), (1, 1, 8)])
def test_quant(mode, signed, narrow, bits):
    scale = 0.75
    proto = one("Quant", {"x": X}, parameters(scale, 0, bits), domain=GENERAL, signed=signed, narrow=narrow, rounding_mode=mode)
    want = [[quantised(v, scale, 0, bits, signed, narrow, mode) for v in X[0]]]
    np.testing.assert_array_equal(result(proto, {"x": X}), want)


@pytest.mark.parametrize("zero", [1.0, -2.0])
def test_quant_with_a_zero_point(zero):
    proto = one("IntQuant", {"x": X}, parameters(0.3, zero, 3), domain=GENERAL, signed=0, narrow=0)
    np.testing.assert_array_equal(result(proto, {"x": X}), [[quantised(v, 0.3, zero, 3, 0, 0, "ROUND") for v in X[0]]])


def test_quant_of_one_signed_bit_is_bipolar():
    proto = one("Quant", {"x": X}, parameters(0.5, 0, 1), domain=GENERAL, signed=1, narrow=0)
    np.testing.assert_array_equal(result(proto, {"x": X}), np.where(X >= 0, f32(0.5), f32(-0.5)))


def test_quant_defaults_are_signed_and_narrow():
    np.testing.assert_array_equal(np.unique(result(one("Quant", {"x": X}, parameters(), domain=GENERAL), {"x": X})), [-1, 0, 1])


def test_quant_with_a_scale_and_a_width_for_each_channel():
    scale, bits = np.array([[0.5], [0.25], [1.0]], f32), np.array([[2], [4], [8]], f32)
    x = np.repeat(X, 3, 0)
    got = result(one("Quant", {"x": x}, parameters(scale, 0, bits), domain=GENERAL, signed=1, narrow=0), {"x": x})
    want = [[quantised(v, s[0], 0, int(b[0]), 1, 0, "ROUND") for v in X[0]] for s, b in zip(scale, bits)]
    np.testing.assert_array_equal(got, want)
    mixed = one("Quant", {"x": x}, parameters(scale, 0, bits - 1), domain=GENERAL, signed=1, narrow=0)
    with pytest.raises(UnsupportedError, match="one bit in some channels"):
        import_model(mixed)


@pytest.mark.parametrize("mode", MODES)
def test_quant_of_constants_is_the_same_constant(mode):
    quant = helper.make_node("Quant", ["w", "scale", "zero", "bits"], ["q"], domain=GENERAL, signed=1, narrow=0, rounding_mode=mode)
    add = helper.make_node("Add", ["x", "q"], ["y"])
    proto = model([quant, add], {"x": X}, ["y"], {**parameters(0.3, 1, 3), "w": X}, domains=[GENERAL])
    imported = import_model(proto)
    assert calls(imported) == ["relax.add"]
    np.testing.assert_array_equal(constants(imported)[0], [[quantised(v, 0.3, 1, 3, 1, 0, mode) for v in X[0]]])


@pytest.mark.parametrize("mode", MODES)
def test_levels_of_a_quantiser_are_inferred(mode):
    proto = one("Quant", {"x": X}, parameters(0.5, 0, 2), domain=GENERAL, signed=0, narrow=0, rounding_mode=mode)
    function = import_model(proto).mod["main"]
    quantiser = [b.var for b in function.body.blocks[0].bindings if isinstance(b.value, relax.Call)][-1]
    fact = infer_levels(function).facts[quantiser]
    assert isinstance(fact, Step)
    np.testing.assert_array_equal(fact.levels(), [0, 0.5, 1, 1.5])


def test_quant_with_an_unknown_rounding_mode():
    with pytest.raises(UnsupportedError, match="rounding mode 'STOCHASTIC'") as caught:
        import_model(one("Quant", {"x": X}, parameters(), domain=GENERAL, rounding_mode="STOCHASTIC"))
    assert "HALF_EVEN" in str(caught.value) and "qonnx.custom_op.general::Quant" in str(caught.value)


# ---- Trunc


@pytest.mark.parametrize("mode", ["FLOOR", "round", "CEIL"])
def test_trunc_version_1_drops_the_lowest_bits(mode):
    scale, zero = f32(0.25), f32(4)
    extra = {**parameters(scale, zero, 8), "left": np.asarray(6.0, f32)}
    got = result(one("Trunc", {"x": X}, extra, domain=GENERAL, rounding_mode=mode), {"x": X})
    pick = {"FLOOR": math.floor, "round": round, "CEIL": math.ceil}[mode]
    levels = [f32(round(float(f32(v / scale) + zero))) for v in X[0]]
    np.testing.assert_array_equal(got, [[(f32(pick(float(v / f32(4)))) - zero) * scale for v in levels]])


def test_trunc_version_2_clips_and_changes_the_scale():
    scale, new = f32(0.25), f32(0.5)
    extra = {**parameters(scale, 0, 8), "new": np.asarray(new, f32), "left": np.asarray(4.0, f32)}
    got = result(one("Trunc", {"x": X}, extra, domain=GENERAL, rounding_mode="floor", signed=1, narrow=0), {"x": X})
    levels = [min(max(round(float(f32(v / scale))) / 2, -8), 7) for v in X[0]]
    np.testing.assert_array_equal(got, [[f32(math.floor(v)) * new for v in levels]])
    assert {-4.0, 3.5} < set(got[0].tolist())


# ---- channels last


def last(x):
    return np.ascontiguousarray(np.moveaxis(x, 1, -1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group", [1, 2])
def test_channels_last_convolution(group, bias):
    x, w = RNG.normal(size=(2, 4, 7, 6)).astype(f32), RNG.normal(size=(6, 4 // group, 3, 2)).astype(f32)
    attributes = dict(kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 0, 1], dilations=[1, 2], group=group)
    more = {"b": RNG.normal(size=6).astype(f32)} if bias else {}
    (want,) = reference(one("Conv", {"x": x}, {"w": w, **more}, **attributes), {"x": x})
    imported = import_model(one("Conv", {"x": last(x)}, {"w": last(w), **more}, domain=LAST, **attributes))
    np.testing.assert_allclose(run(imported.mod, {"x": last(x)})[0], last(want), atol=1e-5)
    (layer,) = imported.layers
    assert (layer.output, layer.macs) == ("y0", want[0].size * w[0].size)


def test_channels_last_normalisation_and_pool():
    x = RNG.normal(size=(2, 3, 8, 6)).astype(f32)
    four = {name: RNG.uniform(0.5, 2, 3).astype(f32) for name in ("gamma", "beta", "mean", "variance")}
    (want,) = reference(one("BatchNormalization", {"x": x}, four, epsilon=1e-3), {"x": x})
    got = result(one("BatchNormalization", {"x": last(x)}, four, domain=LAST, epsilon=1e-3), {"x": last(x)})
    np.testing.assert_allclose(got, last(want), atol=1e-5)
    attributes = dict(kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 0])
    (want,) = reference(one("MaxPool", {"x": x}, **attributes), {"x": x})
    for op_type, domain in (("MaxPool", LAST), ("MaxPoolNHWC", GENERAL)):
        np.testing.assert_array_equal(result(one(op_type, {"x": last(x)}, domain=domain, **attributes), {"x": last(x)}), last(want))
