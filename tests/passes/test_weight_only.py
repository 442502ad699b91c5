"""Which layers keep packed weights, and that nothing changes by it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from bnntvm.graph import bindings, op_name
from bnntvm.interpreter import run
from bnntvm.ops import shape_of
from bnntvm.passes.weight_only import WeightOnly, decompose
from tests.passes.relax_nets import c, calls, conv, dense, module, quarters, same


@settings(max_examples=60, deadline=None)
@given(
    channels=st.lists(st.lists(st.sampled_from([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]), min_size=1, max_size=3), min_size=1, max_size=4),
    seed=st.integers(0, 999),
)
def test_planes_are_the_weights(channels, seed):
    rng = np.random.default_rng(seed)
    weight = np.stack([rng.choice(np.array(levels, np.float32), 24) for levels in channels]).reshape(-1, 2, 12)
    coding, planes, numbers = decompose(weight)
    if coding == "sign":
        again = np.where(planes[0], np.float32(-1), np.float32(1)) * numbers[:, None, None]
    elif coding == "ternary":
        again = (planes[0].astype(np.float32) - planes[1]) * numbers[:, None, None]
    else:
        assert planes.sum(0).max() <= 1
        again = np.select(list(planes), list(numbers[1:, :, None, None]), numbers[0][:, None, None])
    np.testing.assert_array_equal(again, weight)
    assert len(planes) <= 2 and planes.shape[1:] == weight.shape


def test_codings():
    assert decompose(np.float32([[1, -1], [-2, -2]]))[0] == "sign"
    assert decompose(np.float32([[1, -1], [0, -2]]))[0] == "ternary"
    coding, planes, levels = decompose(np.float32([[0.5, 0, -2, 0], [3, 3, 1, 1]]))
    assert coding == "levels" and levels.tolist() == [[0, 1], [0.5, 3], [-2, 3]]
    assert not planes[1][1].any()
    coding, planes, levels = decompose(np.float32([[0, 1], [-2, 0]]))
    assert coding == "levels" and levels.tolist() == [[0, 0], [1, -2]] and len(planes) == 1
    assert decompose(np.float32([[1, 2, 3, 4]])) is None


def optimised(net, *shapes):
    decisions = {}
    before = module(net, *shapes)
    after = WeightOnly(decisions)(before)
    return before, after, decisions


@pytest.mark.parametrize("levels", [(-0.5, 0.5), (-0.5, 0.0, 0.5), (-0.5, 0.0, 0.75), (0.25, 1.0)])
def test_layers_mean_the_same(levels):
    rng = np.random.default_rng(0)
    wide = rng.choice(np.float32(levels), (6, 3, 3, 4))
    before, after, decisions = optimised(lambda emit, x: emit(conv(x, wide, pads=[1, 1, 1, 1])), ("n", 5, 5, 4))
    assert calls(after)[0] == "bnn.conv2d_weight"
    same(before, after, quarters(2, 5, 5, 4))
    before, after, decisions = optimised(lambda emit, x: emit(dense(x, rng.choice(np.float32(levels), (40, 8)))), ("n", 40))
    assert calls(after)[0] == "bnn.dense_weight"
    (decision,) = decisions.values()
    assert decision.kind == "weight-only"
    same(before, after, quarters(3, 40))


def test_what_stays_float():
    real = np.linspace(-1, 1, 72, dtype=np.float32).reshape(2, 3, 3, 4)
    blur = np.tile(np.float32([1, 2, 1]), 24).reshape(4, 3, 6, 1)[:, :, :3]
    assert calls(optimised(lambda emit, x: emit(conv(x, real)), ("n", 5, 5, 4))[1]) == ["bnn.conv"]
    assert calls(optimised(lambda emit, x: emit(conv(x, blur, groups=4)), ("n", 5, 5, 4))[1]) == ["bnn.conv"]


@pytest.mark.parametrize("levels", [(-0.5, 0.5), (-0.5, 0.0, 0.5)])
def test_nearly_one_magnitude(levels):
    weight = np.random.default_rng(0).choice(np.float32(levels), (40, 8))
    weight[3, 2] = np.nextafter(np.float32(0.5), np.float32(1))
    net = module(lambda emit, x: emit(dense(x, weight)), ("n", 40))
    decisions = {}
    assert calls(WeightOnly(decisions)(net)) == ["bnn.matmul"]
    assert "deviation of 1.2e-07" in decisions["dense"].reason and decisions["dense"].kind == "float"
    after = WeightOnly(decisions, 1e-6)(net)
    assert calls(after)[0] == "bnn.dense_weight" and decisions["dense"].kind == "weight-only"
    x = np.random.default_rng(1).normal(size=(2, 40)).astype(np.float32)
    np.testing.assert_allclose(run(after, [x])[0], run(net, [x])[0], rtol=1e-5, atol=1e-5)


def test_a_quotient_that_means_sign_stays_float_and_says_so():
    def net(emit, x):
        size = emit(relax.op.maximum(emit(relax.op.abs(x)), c(np.float32(1e-12))))
        return emit(dense(emit(relax.op.divide(x, size)), np.ones((8, 4), np.float32)))

    _, after, decisions = optimised(net, ("n", 8))
    (decision,) = decisions.values()
    assert decision.kind == "float" and "sign" in decision.reason
    assert [op_name(b.value) for b in bindings(after["main"])][-1] != "bnn.dense_weight"


def quantised_rows(emit, x):
    """BitNet b1.58's activations: integers from -128 to 127, and what they are to be divided by."""
    largest = emit(relax.op.maximum(emit(relax.op.max(emit(relax.op.abs(x)), axis=[-1], keepdims=True)), c(np.float32(1e-5))))
    scale = emit(relax.op.divide(c(np.float32(127)), largest))
    q = emit(relax.op.round(emit(relax.op.multiply(x, scale))))
    return emit(relax.op.minimum(emit(relax.op.maximum(q, c(np.float32(-128)))), c(np.float32(127)))), scale


@pytest.mark.parametrize("shape", [("n", 40), (2, "n", 40)])
def test_integers_of_rows(shape):
    weight = np.random.default_rng(0).choice(np.float32([-0.5, 0, 0.5]), (40, 8))

    def net(emit, x):
        q, scale = quantised_rows(emit, x)
        data = emit(relax.op.divide(q, scale))
        return emit(dense(data if len(shape) == 2 else emit(relax.op.reshape(data, [2 * shape_of(x)[1], 40])), weight))

    before, after, decisions = optimised(net, shape)
    (layer,) = [b.value for b in bindings(after["main"]) if op_name(b.value) == "bnn.dense_weight"]
    assert bool(layer.attrs["integer"]) and [int(v) for v in layer.attrs["reachable"]] == [-40 * 128, 40 * 128, 1]
    assert decisions["dense"].planes == "int8 x 2"
    x = np.random.default_rng(1).normal(size=(2, 3, 40)[3 - len(shape) :]).astype(np.float32)
    np.testing.assert_allclose(run(after, [x])[0], run(before, [x])[0], rtol=1e-5, atol=1e-5)


def grid(emit, x, low, high):
    """round(clip(x))."""
    return emit(relax.op.round(emit(relax.op.minimum(emit(relax.op.maximum(x, c(np.float32(low)))), c(np.float32(high))))))


_ZERO_POINTS = [(-1, 128, "uint8"), (-7, 248, "uint8"), (-200, 55, "uint8"), (-255, 0, "uint8"), (-1, 255, None), (-300, -100, None)]


@pytest.mark.parametrize("low, high, kind", [(0, 255, "uint8"), (-128, 127, "int8"), (0, 256, None), *_ZERO_POINTS])
@pytest.mark.parametrize("operator", [relax.op.multiply, relax.op.divide, None])
def test_convolutions_of_bytes(low, high, kind, operator):
    weight = np.random.default_rng(0).choice(np.float32([-0.75, -0.25, 0.25, 0.75]), (8, 3, 3, 5))
    weight[0, 0, 0] = np.float32([-0.75, -0.25, 0.25, 0.75, 0.75])

    def net(emit, x):
        q = grid(emit, x, low, high)
        return emit(conv(emit(operator(q, c(np.float32(4)))) if operator else q, weight, pads=[1, 1, 1, 1]))

    before, after, decisions = optimised(net, ("n", 5, 5, 5))
    if kind is None:
        assert "bnn.conv2d_int8" not in calls(after)
        return
    (layer,) = [b.value for b in bindings(after["main"]) if op_name(b.value) == "bnn.conv2d_int8"]
    assert str(layer.attrs["data"]) == kind and [int(v) for v in layer.attrs["coefficients"]] == [2, 4]
    assert decisions["conv"].kind == "int8" and decisions["conv"].planes == "int8 x 2"
    same(before, after, 256 * quarters(2, 5, 5, 5))


def test_bytes_behind_a_transpose():
    """A one-dimensional convolution as the importer writes it: multiples of a byte [N, C, W] as [N, 1, W, C]."""
    weight = np.random.default_rng(0).choice(np.float32([-1, 0, 1]), (8, 1, 3, 5))

    def net(emit, x):
        q = emit(relax.op.multiply(grid(emit, x, -9, 246), c(np.float32(0.25))))
        rows = emit(relax.op.permute_dims(q, [0, 2, 1]))
        return emit(conv(emit(relax.op.reshape(rows, [shape_of(x)[0], 1, 7, 5])), weight, pads=[0, 1, 0, 1]))

    before, after, decisions = optimised(net, ("n", 5, 7))
    assert "bnn.conv2d_int8" in calls(after) and decisions["conv"].kind == "int8"
    same(before, after, 256 * quarters(2, 5, 7))


@pytest.mark.parametrize("low, high", [(100, 355), (-300, -100)])
def test_bytes_of_which_none_is_zero(low, high):
    """Without padding no zero is needed."""
    weight = np.random.default_rng(0).choice(np.float32([-1, 0, 1]), (8, 3, 3, 5))
    before, after, _ = optimised(lambda emit, x: emit(conv(grid(emit, x, low, high), weight, pads=[0, 0, 0, 0])), ("n", 5, 5, 5))
    assert "bnn.conv2d_int8" in calls(after)
    same(before, after, 256 * quarters(2, 5, 5, 5))


def test_unlimited_integers_are_not_taken_for_bytes():
    weight = np.random.default_rng(0).choice(np.float32([-1, 1]), (40, 8))
    _, after, decisions = optimised(lambda emit, x: emit(dense(emit(relax.op.round(x)), weight)), ("n", 40))
    assert decisions["dense"].planes == "float x 1"
