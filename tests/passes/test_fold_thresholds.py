"""Planes become comparisons with thresholds on the deepest tensor that decides them."""

import numpy as np
import pytest
from tvm import relax

from tests.passes.relax_nets import c, calls, conv, dense, find, fold, ints, module, quarters, same, signs

r = relax.op


def test_a_chain_behind_a_few_levels_is_evaluated_in_float32():
    """BatchNormalization's multiply and add tie at a level in float32, not in float64."""
    rng = np.random.default_rng(3)
    gain = rng.normal(size=64).astype(np.float32)
    level = rng.choice(np.float32([0.5, 1.0, 1.5]), 64)
    offset = -(level * gain)

    def network(emit, x):
        sign = emit(r.reshape(emit(r.sign(x)), (8, 64)))  # a source that can hold -1, 0, 1
        y = emit(r.add(emit(r.multiply(emit(r.add(sign, c(0.5))), c(gain))), c(offset)))
        s = emit(r.sign(y))
        s = emit(r.add(s, emit(r.astype(emit(r.equal(s, c(0.0))), "float32"))))
        return emit(dense(s, signs(64, 4)))

    before = module(network, (8, 8, 8))
    after, decisions = fold(before)
    assert decisions["dense"].kind == "binary"
    same(before, after, quarters(8, 8, 8))


def test_a_comparison_of_two_activations_is_packed_as_it_is():
    def network(emit, x, y):
        bit = emit(r.astype(emit(r.greater(x, y)), "float32"))
        return emit(dense(emit(r.subtract(emit(r.multiply(bit, c(2.0))), c(1.0))), signs(40, 5)))

    before = module(network, (6, 40), (6, 40))
    after, decisions = fold(before)
    assert decisions["dense"].kind == "binary"
    assert calls(after).count("greater") == 1
    same(before, after, quarters(6, 40), quarters(6, 40, seed=1))


def binary(x, emit):
    """+1 where x is not negative, else -1."""
    return emit(r.where(emit(r.less(x, c(0.0))), c(-1.0), c(1.0)))


@pytest.mark.parametrize("sign", ["positive", "mixed"])
def test_thresholds_that_differ_from_pixel_to_pixel(sign):
    """A full-size constant, as exporters write a broadcast bias; with mixed signs the comparison turns round from pixel to pixel."""
    gain = ints(3, 3, 40, largest=3)
    gain = np.where(gain == 0, np.float32(1), gain)
    gain = np.abs(gain) if sign == "positive" else gain

    def network(emit, x):
        y = emit(r.add(emit(r.multiply(x, c(gain))), c(ints(3, 3, 40, seed=1, largest=2))))
        return emit(conv(binary(y, emit), signs(5, 3, 3, 40)))

    before = module(network, ("n", 3, 3, 40))
    after, decisions = fold(before)
    assert decisions["conv"].kind == "binary"
    same(before, after, quarters(2, 3, 3, 40))


def test_thresholds_that_differ_from_pixel_to_pixel_behind_a_pool():
    def network(emit, x):
        y = emit(r.nn.max_pool2d(x, [2, 2], [2, 2], layout="NHWC"))
        y = emit(r.add(y, c(ints(2, 2, 8, largest=2))))
        return emit(conv(binary(y, emit), signs(5, 1, 1, 8)))

    before = module(network, ("n", 4, 4, 8))
    after, _ = fold(before)
    same(before, after, quarters(2, 4, 4, 8))


def test_factors_that_differ_from_pixel_to_pixel_before_a_pool():
    gain = ints(4, 4, 8, largest=2)

    def network(emit, x):
        y = emit(r.nn.max_pool2d(emit(r.multiply(x, c(gain))), [2, 2], [2, 2], layout="NHWC"))
        return emit(conv(binary(emit(r.subtract(y, c(0.5))), emit), signs(5, 1, 1, 8)))

    before = module(network, ("n", 4, 4, 8))
    after, _ = fold(before)
    assert "bnn.pool_bits" in calls(after)
    same(before, after, quarters(2, 4, 4, 8))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "bool"])
def test_sources_that_kernels_do_not_compare_are_converted(dtype):
    def network(emit, x):
        y = emit(r.subtract(emit(r.astype(x, "float32")), c(0.5)))
        return emit(dense(binary(y, emit), signs(40, 5)))

    before = module(network, x=((6, 40), dtype))
    after, decisions = fold(before)
    assert decisions["dense"].kind == "binary"
    for compare in find(after, "relax.less"):
        assert str(compare.args[0].ty.dtype) in ("float32", "int32")
    data = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 3, (6, 40)).astype(dtype)
    same(before, after, data)


def accumulator(emit, x, outputs=8, seed=5):
    """A binary dense layer's float result on +-1 inputs."""
    return emit(dense(binary(x, emit), signs(x.ty.shape[-1], outputs, seed=seed), layer="first"))


@pytest.mark.parametrize("channels", [6, 7])
def test_batch_norm_and_sign_become_one_integer_comparison(channels):
    """Gains of both signs, zero gains with and without shift, thresholds beyond every reachable sum, ties on integers."""
    gain = np.float32([1, -1, 0.3, -0.7, 0, 0, 1, -2])
    shift = np.float32([0, 0, -0.6, 1.4, 1, -1, 100, 0])

    def network(emit, x):
        y = emit(r.add(emit(r.multiply(accumulator(emit, x), c(gain))), c(shift)))
        return emit(dense(binary(y, emit), signs(8, 3), layer="second"))

    before = module(network, ("n", channels))
    after, decisions = fold(before)
    assert {d.kind for d in decisions.values()} == {"binary"}
    names = calls(after)
    assert names.count("less") == 2 and "where" not in names  # one on the input, one on the sums
    assert str(find(after, "relax.less")[1].args[0].ty.dtype) == "int32"
    same(before, after, quarters(64, channels))


def test_integer_ties_of_batch_norm_are_exact_zeros():
    """Mean on an integer, no shift: x * s + (0 - mean * s) is exactly 0 at the mean, whatever s is. Sign keeps the zero."""
    rng = np.random.default_rng(0)
    gain, mean = rng.normal(size=8).astype(np.float32), np.float32([0, 2, -2, 4, 0, 2, -4, 6])

    def network(emit, x):
        y = emit(r.add(emit(r.multiply(accumulator(emit, x), c(gain))), c(np.float32(0) - mean * gain)))
        return emit(dense(emit(r.sign(y)), signs(8, 3), layer="second"))

    before = module(network, ("n", 6))
    after, decisions = fold(before)
    assert decisions["second"].planes == "2x1" and "zeros" in decisions["second"].reason
    same(before, after, quarters(200, 6))


@pytest.mark.parametrize("slope", [0.25, 0.0, -0.5])
def test_prelu_before_a_sign(slope):
    """One threshold on the sum if the slope is not negative, two if it is (the function turns at 0)."""

    def network(emit, x):
        y = accumulator(emit, x)
        z = emit(r.where(emit(r.less(y, c(0.0))), emit(r.multiply(y, c(np.full(8, slope)))), y))
        return emit(dense(binary(emit(r.subtract(z, c(1.0))), emit), signs(8, 3), layer="second"))

    before = module(network, ("n", 6))
    after, decisions = fold(before)
    assert {d.kind for d in decisions.values()} == {"binary"}
    on_sums = [call for call in find(after, "relax.less") if str(call.args[0].ty.dtype) == "int32"]
    assert len(on_sums) == (1 if slope >= 0 else 2)
    same(before, after, quarters(64, 6))


def test_a_residual_sum_is_compared_in_float():
    def network(emit, x, y):
        z = emit(r.add(accumulator(emit, x), y))
        return emit(dense(binary(z, emit), signs(8, 3), layer="second"))

    before = module(network, ("n", 6), ("n", 8))
    after, _ = fold(before)
    assert str(find(after, "relax.less")[-1].args[0].ty.dtype) == "float32"
    same(before, after, quarters(64, 6), quarters(64, 8))


def test_a_shared_sign_is_packed_once_and_kept_for_the_float_branch():
    def network(emit, x):
        s = emit(r.sign(x))
        return [emit(dense(s, signs(40, 3), layer="a")), emit(dense(s, signs(40, 4, seed=1), layer="b")), emit(r.multiply(s, c(3.0)))]

    before = module(network, ("n", 40))
    after, decisions = fold(before)
    assert {d.kind for d in decisions.values()} == {"binary"}
    assert calls(after).count("bnn.pack") == 2  # signs and zeros, for both layers
    assert "sign" in calls(after)
    same(before, after, quarters(9, 40))


@pytest.mark.parametrize("pads, turned", [([0, 0, 0, 0], False), ([1, 1, 1, 1], False), ([1, 0, 0, 1], True)])
def test_a_comparison_moves_before_the_max_pool_that_feeds_only_it(pads, turned):
    gain = np.float32([1, -1, 2, -2, 1, -1, 2, -2]) if turned else np.ones(8, np.float32)

    def network(emit, x):
        y = emit(conv(binary(x, emit), signs(8, 3, 3, 8), layer="first", pads=[1, 1, 1, 1]))
        y = emit(r.nn.max_pool2d(y, [2, 2], [2, 2], pads, layout="NHWC"))
        y = emit(r.add(emit(r.multiply(y, c(gain))), c(1.0)))
        return emit(conv(binary(y, emit), signs(5, 1, 1, 8), layer="second"))

    before = module(network, ("n", 6, 6, 8))
    after, _ = fold(before)
    names = calls(after)
    assert "nn.max_pool2d" not in names and "bnn.pool_bits" in names
    same(before, after, quarters(2, 6, 6, 8))


def test_a_pool_whose_result_is_needed_is_left():
    def network(emit, x):
        y = emit(r.nn.max_pool2d(x, [2, 2], [2, 2], layout="NHWC"))
        return [y, emit(conv(binary(y, emit), signs(5, 1, 1, 8)))]

    before = module(network, ("n", 6, 6, 8))
    after, _ = fold(before)
    assert "nn.max_pool2d" in calls(after)
    same(before, after, quarters(2, 6, 6, 8))


@pytest.mark.parametrize("groups, channels", [(2, 64), (4, 128), (2, 6), (8, 8), (3, 33)])
def test_groups_start_at_words(groups, channels):
    def network(emit, x):
        return emit(conv(emit(r.sign(x)), signs(2 * groups, 3, 3, channels // groups), groups=groups, pads=[1, 1, 1, 1]))

    before = module(network, ("n", 4, 4, channels))
    after, decisions = fold(before)
    assert decisions["conv"].kind == "binary"
    same(before, after, quarters(2, 4, 4, channels))


def test_no_encode_is_left():
    def network(emit, x):
        return emit(conv(emit(r.sign(x)), signs(4, 3, 3, 8)))

    after, _ = fold(module(network, ("n", 4, 4, 8)))
    assert "bnn.encode" not in calls(after)
