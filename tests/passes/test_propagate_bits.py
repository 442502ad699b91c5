"""Packing moves up through what only moves or pools values."""

import numpy as np
import pytest
from tvm import relax

from tests.passes.relax_nets import bipolar, c, calls, conv, dense, fold, module, quarters, same, signs

r = relax.op


def unipolar(emit, x):
    return emit(r.astype(emit(r.greater(x, c(0.0))), "float32"))


def turned(emit, x):
    """The same two levels with their order reversed."""
    return emit(r.negative(bipolar(emit, x)))


def through(emit, move, x, quantise=bipolar, outputs=5):
    """quantise, move, binary convolution."""
    y = emit(move(quantise(emit, x)))
    return emit(conv(y, signs(outputs, 1, 1, int(y.ty.shape[-1]))))


def checked(network, *shapes, data=None):
    before = module(network, *shapes)
    after, decisions = fold(before)
    assert {d.kind for d in decisions.values()} == {"binary"}
    same(before, after, *(data or [quarters(*[2 if d == "n" else d for d in shape], seed=i) for i, shape in enumerate(shapes)]))
    return calls(after)


@pytest.mark.parametrize("channels", [3, 32, 40])
@pytest.mark.parametrize("quantise", [bipolar, unipolar, turned])
@pytest.mark.parametrize("pads, dilation", [([0, 0, 0, 0], 1), ([1, 1, 1, 1], 1), ([1, 0, 0, 1], 1), ([1, 1, 1, 1], 2)])
def test_max_pool_is_a_pool_of_bits(quantise, channels, pads, dilation):
    def pool(x):
        return r.nn.max_pool2d(x, [3, 2], [2, 1], pads, [dilation, 1], layout="NHWC")

    names = checked(lambda emit, x: through(emit, pool, x, quantise), ("n", 7, 6, channels))
    assert "bnn.pool_bits" in names and "nn.max_pool2d" not in names


def test_a_pool_of_three_levels_is_still_right():
    def network(emit, x):
        y = emit(r.nn.max_pool2d(emit(r.sign(x)), [2, 2], [2, 2], layout="NHWC"))
        return emit(conv(y, signs(5, 1, 1, 8)))

    checked(network, ("n", 6, 6, 8))


@pytest.mark.parametrize("value", [1.0, -1.0])
@pytest.mark.parametrize("channels", [5, 32, 64])
@pytest.mark.parametrize("quantise", [bipolar, turned])
def test_padding_with_a_level_is_two_level(quantise, channels, value):
    def pad(y):
        return r.nn.pad(y, [0, 0, 1, 2, 0, 1, 0, 0], "constant", value)

    names = checked(lambda emit, x: through(emit, pad, x, quantise), ("n", 4, 3, channels))
    if channels % 32 == 0 or (value == 1.0):
        assert names.index("bnn.pack") < (names.index("nn.pad") if "nn.pad" in names else len(names))


@pytest.mark.parametrize("channels", [5, 32])
def test_padding_with_zero_is_a_third_level(channels):
    checked(lambda emit, x: through(emit, lambda y: r.nn.pad(y, [0, 0, 1, 2, 0, 1, 0, 0], "constant", 0.0), x), ("n", 4, 3, channels))


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_other_paddings(mode):
    checked(lambda emit, x: through(emit, lambda y: r.nn.pad(y, [0, 0, 1, 1, 1, 1, 0, 0], mode), x), ("n", 4, 3, 8))


@pytest.mark.parametrize("first, second, moved", [(32, 40, True), (64, 32, True), (8, 40, False), (33, 31, False)])
def test_concatenation_of_channels(first, second, moved):
    def network(emit, x, y):
        joined = emit(r.concat([bipolar(emit, x), bipolar(emit, y)], 3))
        return emit(conv(joined, signs(5, 1, 1, first + second)))

    names = checked(network, ("n", 4, 3, first), ("n", 4, 3, second))
    assert names.count("bnn.pack") == (2 if moved else 1) or not moved


@pytest.mark.parametrize("quantise", [(bipolar, turned), (bipolar, unipolar)])
def test_concatenation_of_different_quantisers(quantise):
    """Unions of levels: {-1, 1} with {0, 1} is ternary."""

    def network(emit, x, y):
        joined = emit(r.concat([quantise[0](emit, x), quantise[1](emit, y)], 3))
        return emit(conv(joined, signs(5, 3, 3, 64)))

    checked(network, ("n", 4, 3, 32), ("n", 4, 3, 32))


def test_concatenation_along_rows():
    def network(emit, x, y):
        return emit(conv(emit(r.concat([bipolar(emit, x), bipolar(emit, y)], 1)), signs(5, 3, 3, 8)))

    checked(network, ("n", 4, 3, 8), ("n", 2, 3, 8))


@pytest.mark.parametrize("channels", [32, 33])
def test_flattening(channels):
    def network(emit, x):
        flat = emit(r.reshape(bipolar(emit, x), (3, 4 * channels)))
        return emit(dense(flat, signs(4 * channels, 7)))

    names = checked(network, (3, 2, 2, channels))
    assert (names.index("bnn.pack") < names.index("reshape")) == (channels == 32)


def test_a_spatial_slice():
    def network(emit, x):
        y = emit(r.strided_slice(bipolar(emit, x), [1, 2], [1, 0], [4, 3], [2, 1]))
        return emit(conv(y, signs(5, 1, 1, 8)))

    names = checked(network, ("n", 5, 4, 8))
    assert names.index("bnn.pack") < names.index("strided_slice")


def test_a_slice_of_channels():
    def network(emit, x):
        y = emit(r.strided_slice(bipolar(emit, x), [3], [3], [40]))
        return emit(conv(y, signs(5, 1, 1, 37)))

    checked(network, ("n", 5, 4, 40))


def test_relabelled_levels_share_their_plane():
    """sign, pooled, and the negative of it: one plane, packed once."""

    def network(emit, x):
        s = emit(r.nn.max_pool2d(bipolar(emit, x), [2, 2], [2, 2], layout="NHWC"))
        other = emit(r.add(emit(r.multiply(s, c(0.5))), c(0.5)))  # {0, 1}
        return [emit(conv(s, signs(4, 1, 1, 8), layer="a")), emit(conv(other, signs(4, 1, 1, 8), layer="b"))]

    checked(network, ("n", 4, 4, 8))


def test_levels_that_a_channel_turns_round():
    """+-1 times a sign per channel: levels are the same, planes are not."""

    def network(emit, x):
        s = emit(r.nn.max_pool2d(bipolar(emit, x), [2, 2], [2, 2], layout="NHWC"))
        return emit(conv(emit(r.multiply(s, c(signs(8, seed=3)))), signs(4, 1, 1, 8)))

    checked(network, ("n", 4, 4, 8))


@pytest.mark.parametrize("groups", [2, 4])
def test_pool_before_a_grouped_convolution(groups):
    def network(emit, x):
        y = emit(r.nn.max_pool2d(bipolar(emit, x), [2, 2], [2, 2], layout="NHWC"))
        return emit(conv(y, signs(8, 3, 3, 32 * 4 // groups), groups=groups))

    checked(network, ("n", 8, 8, 128))


def test_what_is_shared_is_pooled_once():
    def network(emit, x):
        s = emit(r.nn.max_pool2d(bipolar(emit, x), [2, 2], [2, 2], layout="NHWC"))
        return [emit(conv(s, signs(4, 1, 1, 8), layer="a")), emit(conv(s, signs(4, 3, 3, 8), layer="b"))]

    assert checked(network, ("n", 6, 6, 8)).count("bnn.pool_bits") == 1


def test_a_pooled_tensor_that_is_also_a_result_is_both():
    def network(emit, x):
        s = emit(r.nn.max_pool2d(bipolar(emit, x), [2, 2], [2, 2], layout="NHWC"))
        return [s, emit(conv(s, signs(4, 1, 1, 8)))]

    checked(network, ("n", 6, 6, 8))


def test_a_whole_network_of_bits_has_one_packing_of_floats():
    def network(emit, x):
        y = emit(conv(bipolar(emit, x), signs(32, 3, 3, 8), layer="a", pads=[1, 1, 1, 1]))
        y = emit(r.nn.max_pool2d(y, [2, 2], [2, 2], layout="NHWC"))
        y = emit(r.add(emit(r.multiply(y, c(np.float32(0.1)))), c(np.linspace(-1, 1, 32))))
        y = emit(conv(bipolar(emit, y), signs(32, 3, 3, 32, seed=1), layer="b", pads=[1, 1, 1, 1]))
        y = emit(r.reshape(bipolar(emit, emit(r.subtract(y, c(0.5)))), (2, 4 * 32)))
        return emit(dense(y, signs(128, 10)))

    names = checked(network, (2, 4, 4, 8))
    assert not {"multiply", "where", "nn.max_pool2d"} & set(names)
