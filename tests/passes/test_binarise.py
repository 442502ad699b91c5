"""Which layers are computed on bits, how, and why the others are not."""

import numpy as np
import pytest
from tvm import relax

from bnntvm import ops
from bnntvm.passes.binarise import Binarise
from tests.passes.relax_nets import c, calls, conv, dense, find, fold, ints, module, quarters, same, signs

r = relax.op


def quantised(emit, x, kind="bipolar"):
    """``x`` reduced to a few levels."""
    if kind == "bipolar":
        return emit(r.where(emit(r.less(x, c(0.0))), c(-1.0), c(1.0)))
    if kind == "sign":
        return emit(r.sign(x))
    if kind == "unipolar":
        return emit(r.astype(emit(r.greater(x, c(0.0))), "float32"))
    if kind == "scaled":
        return emit(r.multiply(emit(r.sign(x)), c(0.5)))
    if kind == "negative":  # {-2, 0}
        return emit(r.multiply(emit(r.astype(emit(r.greater(x, c(0.0))), "float32")), c(-2.0)))
    if kind == "two bits":
        return emit(r.round(emit(r.minimum(emit(r.maximum(x, c(0.0))), c(3.0)))))
    raise ValueError(kind)


def binarised(mod, **options):
    decisions = {}
    return Binarise(decisions, **options)(mod), decisions


LEVELS = {"bipolar": "1x1", "sign": "2x1", "unipolar": "1x1", "scaled": "2x1", "negative": "1x1"}


@pytest.mark.parametrize("kind", LEVELS)
def test_convolutions_of_every_kind_of_levels(kind):
    def network(emit, x):
        return emit(conv(quantised(emit, x, kind), signs(6, 3, 3, 37), pads=[1, 0, 1, 2], strides=[2, 1]))

    before = module(network, ("n", 5, 6, 37))
    after, decisions = binarised(before)
    assert (decisions["conv"].kind, decisions["conv"].planes) == ("binary", LEVELS[kind])
    assert "bnn.conv" not in calls(after)
    same(before, after, quarters(2, 5, 6, 37))


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("features", [1, 31, 32, 33, 100])
def test_dense_layers_of_every_kind_of_levels(kind, features):
    before = module(lambda emit, x: emit(dense(quantised(emit, x, kind), signs(features, 7))), ("n", features))
    after, decisions = binarised(before)
    assert decisions["dense"].kind == "binary"
    same(before, after, quarters(9, features))


def test_a_layer_is_a_packed_operator_and_a_scale():
    def network(emit, x):
        return emit(conv(quantised(emit, x), np.float32(0.5) * signs(6, 3, 3, 8)))

    after, _ = binarised(module(network, ("n", 5, 5, 8)))
    assert calls(after)[-4:] == ["bnn.encode", "bnn.conv2d_bits", "astype", "multiply"]
    call = find(after, "bnn.conv2d_bits")[0]
    assert [int(v) for v in call.attrs["reachable"]] == [-72, 72, 2]
    assert not call.attrs["unipolar"] and not call.attrs["zeros"]


def test_weights_of_one_need_no_scale():
    after, _ = binarised(module(lambda emit, x: emit(dense(quantised(emit, x), signs(8, 4))), ("n", 8)))
    assert calls(after)[-1] == "astype"


@pytest.mark.parametrize(
    "alpha",
    [
        np.full(6, 0.25),  # one magnitude
        [1, 2, 0.5, 0.25, 4, 8],  # one per filter
        [1, 0, 2, 0, 0, 1],  # dead filters
        [0] * 6,
    ],
)
def test_magnitudes_per_filter(alpha):
    weight = signs(6, 3, 3, 5) * np.float32(alpha).reshape(-1, 1, 1, 1)
    before = module(lambda emit, x: emit(conv(quantised(emit, x, "sign"), weight)), ("n", 5, 5, 5))
    after, decisions = binarised(before)
    assert decisions["conv"].kind == "binary"
    same(before, after, quarters(2, 5, 5, 5))


def test_a_negative_gain_flips_the_signs_of_its_filter():
    """BatchNormalization folded into the weights: gamma < 0."""
    gain = np.float32([0.5, -0.5, -2, 1]).reshape(-1, 1, 1, 1)
    before = module(lambda emit, x: emit(conv(quantised(emit, x), signs(4, 3, 3, 5) * gain)), ("n", 5, 5, 5))
    after, decisions = binarised(before)
    assert decisions["conv"].kind == "binary"
    same(before, after, quarters(2, 5, 5, 5))


def test_negative_zeros_among_dead_weights_are_no_signs():
    weight = signs(2, 40)
    weight[1] = -0.0
    before = module(lambda emit, x: emit(dense(quantised(emit, x), np.ascontiguousarray(weight.T))), ("n", 40))
    after, decisions = binarised(before)
    assert decisions["dense"].kind == "binary"
    assert not np.any(run_layer(after, 40)[:, 1])


def run_layer(mod, features):
    from bnntvm.interpreter import run

    return run(mod, [quarters(5, features)])[0]


def nearly(spread):
    weight = signs(6, 40) * np.float32(0.3)
    weight[2, 7] *= np.float32(1 + spread)
    return np.ascontiguousarray(weight.T)


def test_nearly_binary_weights_stay_float_and_the_report_says_how_near():
    mod = module(lambda emit, x: emit(dense(quantised(emit, x), nearly(1e-6))), ("n", 40))
    after, decisions = binarised(mod)
    assert decisions["dense"].kind == "float" and "weight_tolerance" in decisions["dense"].reason
    assert "bnn.matmul" in calls(after)


def test_the_tolerance_takes_them():
    mod = module(lambda emit, x: emit(dense(quantised(emit, x), nearly(1e-6))), ("n", 40))
    after, decisions = binarised(mod, weight_tolerance=1e-5)
    assert decisions["dense"].kind == "binary"
    from bnntvm.interpreter import run

    x = quarters(9, 40)
    np.testing.assert_allclose(run(after, [x])[0], run(mod, [x])[0], rtol=1e-5, atol=1e-5)


def test_the_suggested_tolerance_is_enough():
    mod = module(lambda emit, x: emit(dense(quantised(emit, x), nearly(3e-6))), ("n", 40))
    reason = binarised(mod)[1]["dense"].reason
    tolerance = float(reason.split("weight_tolerance=")[1].split()[0])
    assert binarised(mod, weight_tolerance=tolerance)[1]["dense"].kind == "binary"


def test_one_entry_that_is_far_off_is_not_tolerated():
    mod = module(lambda emit, x: emit(dense(quantised(emit, x), nearly(0.5))), ("n", 40))
    assert binarised(mod, weight_tolerance=1e-5)[1]["dense"].kind != "binary"


def test_magnitudes_per_input_channel_are_no_magnitude_per_filter():
    weight = signs(6, 3, 3, 4) * np.float32([1, 1.7, 0.3, 1])
    before = module(lambda emit, x: emit(conv(quantised(emit, x), weight)), ("n", 5, 5, 4))
    after, decisions = binarised(before)
    assert decisions["conv"].kind != "binary"


@pytest.mark.parametrize("kind", ["bipolar", "sign"])
def test_ternary_weights_are_right_and_named(kind):
    """Their zeros are no signs: whatever becomes of them, it is not one plane."""
    mask = np.random.default_rng(1).random((6, 3, 3, 9)) < 0.6
    before = module(lambda emit, x: emit(conv(quantised(emit, x, kind), np.where(mask, signs(6, 3, 3, 9), np.float32(0)))), ("n", 5, 5, 9))
    after, decisions = binarised(before)
    assert decisions["conv"].kind == "bitserial" or "ternary" in decisions["conv"].reason
    same(before, after, quarters(2, 5, 5, 9))


@pytest.mark.parametrize("weights", ["signs", "ternary", "grid", "pair"])
@pytest.mark.parametrize("kind", ["bipolar", "sign", "unipolar", "two bits"])
def test_every_pair_of_decompositions(kind, weights):
    rng = np.random.default_rng(0)
    weight = {
        "signs": signs(4, 3, 3, 6),
        "ternary": rng.integers(-1, 2, (4, 3, 3, 6)).astype(np.float32),
        "grid": rng.integers(-2, 3, (4, 3, 3, 6)).astype(np.float32),
        "pair": np.where(rng.random((4, 3, 3, 6)) < 0.5, np.float32(0.5), np.float32(-0.25)),
    }[weights]
    before = module(lambda emit, x: emit(conv(quantised(emit, x, kind), weight, pads=[1, 1, 1, 1])), ("n", 5, 5, 6))
    after, decisions = fold(before)
    assert (decisions["conv"].kind == "binary") == (weights == "signs" and kind != "two bits")
    same(before, after, quarters(2, 5, 5, 6))


def average(x):
    return r.nn.avg_pool2d(x, [2, 2], [2, 2], layout="NHWC")


@pytest.mark.parametrize(
    "network, reason",
    [
        (lambda emit, x: emit(conv(x, signs(4, 3, 3, 8))), "real-valued"),
        (lambda emit, x: emit(conv(quantised(emit, x), np.random.default_rng(0).normal(size=(4, 3, 3, 8)))), "real-valued"),
        (lambda emit, x: emit(conv(emit(average(emit(r.sign(x)))), signs(4, 1, 1, 8))), "activation"),
        (lambda emit, x: emit(conv(emit(r.mean(emit(r.sign(x)), [1, 2], True)), signs(4, 1, 1, 8))), "activation"),
        (lambda emit, x: emit(conv(emit(r.add(emit(r.sign(x)), x)), signs(4, 1, 1, 8))), "activation"),
        (lambda emit, x: emit(conv(emit(r.minimum(emit(r.abs(emit(r.sign(x)))), c(0.0))), signs(4, 1, 1, 8))), "always zero"),
    ],
)
def test_what_stays_float_and_why(network, reason):
    before = module(network, ("n", 6, 6, 8))
    after, decisions = binarised(before)
    assert decisions["conv"].kind == "float" and reason in decisions["conv"].reason
    assert "bnn.conv" in calls(after)


@pytest.mark.parametrize("quantise, kind", [(r.sign, "binary"), (r.tanh, "float")])
def test_products_of_two_activations(quantise, kind):
    def network(emit, x, y):
        return emit(ops.call(ops.MATMUL, [emit(r.sign(x)), emit(quantise(y))], layer="m"))

    _, decisions = binarised(module(network, (4, 6), (6, 5)))
    assert decisions["m"].kind == kind and "both operands" in decisions["m"].reason


def test_assume_nonzero_drops_the_mask_of_zeros():
    mod = module(lambda emit, x: emit(dense(emit(r.sign(x)), signs(40, 4))), ("n", 40))
    after, decisions = binarised(mod, assume_nonzero=True)
    assert decisions["dense"].planes == "1x1"
    x = quarters(9, 40)
    same(mod, after, np.where(x == 0, np.float32(1), x))


def test_a_layer_after_a_layer_knows_that_its_input_is_an_integer():
    """Sign of an odd sum has two levels, of an even one three."""
    for channels, planes in ((5, "1x1"), (6, "2x1")):

        def network(emit, x):
            first = emit(conv(quantised(emit, x), signs(8, 3, 3, x.ty.shape[3]), layer="first"))
            return emit(conv(emit(r.sign(first)), signs(4, 1, 1, 8), layer="second"))

        before = module(network, ("n", 5, 5, channels))
        after, decisions = binarised(before)
        assert decisions["second"].planes == planes
        same(before, after, quarters(2, 5, 5, channels))


@pytest.mark.parametrize("groups, channels", [(2, 6), (4, 128), (8, 8)])
def test_groups_and_depthwise(groups, channels):
    weight = signs(2 * groups, 3, 3, channels // groups)
    before = module(lambda emit, x: emit(conv(emit(r.sign(x)), weight, groups=groups, pads=[1, 1, 1, 1])), ("n", 5, 5, channels))
    after, decisions = binarised(before)
    assert decisions["conv"].kind == "binary"
    same(before, after, quarters(2, 5, 5, channels))


def test_grouped_offsets_belong_to_their_group():
    """Weights {-1/4, 1/2} need the sum of their own group's activations."""
    weight = np.where(signs(6, 3, 3, 4) > 0, np.float32(0.5), np.float32(-0.25))
    before = module(lambda emit, x: emit(conv(quantised(emit, x), weight, groups=3, pads=[1, 1, 1, 1])), ("n", 5, 5, 12))
    after, decisions = fold(before)
    assert decisions["conv"].kind == "bitserial"
    same(before, after, quarters(2, 5, 5, 12))


def test_layers_that_share_a_sign_share_its_planes():
    def network(emit, x):
        s = emit(r.sign(x))
        return [emit(conv(s, signs(4, 1, 1, 8), layer="a")), emit(conv(s, signs(4, 3, 3, 8), layer="b"))]

    after, _ = binarised(module(network, ("n", 5, 5, 8)))
    assert calls(after).count("bnn.encode") == 2  # signs and zeros


def test_layers_that_share_weights():
    weight = signs(8, 1, 1, 8)

    def network(emit, x):
        first = emit(conv(quantised(emit, x), weight, layer="a"))
        return emit(conv(quantised(emit, first), weight, layer="b"))

    before = module(network, ("n", 5, 5, 8))
    after, decisions = binarised(before)
    assert {d.kind for d in decisions.values()} == {"binary"}
    same(before, after, quarters(2, 5, 5, 8))


def test_an_integer_activation_is_not_binary():
    """A depthwise layer on bits, then a pointwise one on its sums (separable)."""

    def network(emit, x):
        first = emit(conv(quantised(emit, x), signs(8, 3, 3, 1), layer="depthwise", groups=8))
        return emit(conv(first, signs(4, 1, 1, 8), layer="pointwise"))

    before = module(network, ("n", 5, 5, 8))
    after, decisions = binarised(before)
    assert decisions["depthwise"].kind == "binary" and decisions["pointwise"].kind == "float"
    same(before, after, quarters(2, 5, 5, 8))


def test_real_weights_after_bits_are_left_alone():
    def network(emit, x):
        return emit(r.add(emit(dense(x, ints(8, 4))), c(ints(4))))

    before = module(network, ("n", 8))
    after, decisions = binarised(before)
    assert calls(after) == calls(before) and decisions["dense"].kind == "float"
