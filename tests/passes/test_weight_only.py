"""Which layers keep packed weights, and that nothing changes by it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from bnntvm.graph import bindings, op_name
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


def test_a_quotient_that_means_sign_stays_float_and_says_so():
    def net(emit, x):
        size = emit(relax.op.maximum(emit(relax.op.abs(x)), c(np.float32(1e-12))))
        return emit(dense(emit(relax.op.divide(x, size)), np.ones((8, 4), np.float32)))

    _, after, decisions = optimised(net, ("n", 8))
    (decision,) = decisions.values()
    assert decision.kind == "float" and "sign" in decision.reason
    assert [op_name(b.value) for b in bindings(after["main"])][-1] != "bnn.dense_weight"
