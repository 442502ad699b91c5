"""Channels last: what is stored how, and that nothing moves without need."""

import numpy as np
import pytest
from tvm import relax

from bnntvm import ops
from bnntvm.passes.layout import ChannelsLast
from tests.passes.relax_nets import c, calls, conv, dense, find, ints, module, quarters, same, signs

r = relax.op


def nchw(x, weight, **options):
    return conv(x, weight, layout="NCHW", **options)


def checked(network, *shapes):
    """The rewritten module, after the meaning was compared."""
    before = module(network, *shapes)
    after = ChannelsLast()(before)
    same(before, after, *[quarters(*[2 if d == "n" else d for d in shape], seed=i) for i, shape in enumerate(shapes)])
    return after


def moves(mod):
    """How many transposes a module does (reshapes that only move axes of length one are free)."""
    return calls(mod).count("permute_dims")


def test_a_chain_is_turned_at_its_ends_only():
    def network(emit, x):
        y = emit(nchw(x, ints(6, 4, 3, 3), layer="a"))
        y = emit(r.add(emit(r.multiply(y, c(ints(1, 6, 1, 1)))), c(ints(6, 1, 1))))
        y = emit(r.nn.relu(emit(r.nn.max_pool2d(y, [2, 2], [2, 2]))))
        return emit(nchw(y, ints(5, 6, 1, 1), layer="b"))

    after = checked(network, ("n", 4, 8, 8))
    assert moves(after) == 2
    assert all(str(call.attrs["layout"]) == "NHWC" for call in find(after, "bnn.conv"))


def test_weights_are_turned_at_compile_time():
    weight = ints(6, 4, 3, 2)
    after = checked(lambda emit, x: emit(nchw(x, weight, strides=[2, 1], pads=[0, 1, 2, 0], dilations=[1, 2])), ("n", 4, 8, 8))
    call = find(after, "bnn.conv")[0]
    np.testing.assert_array_equal(call.args[1].value.numpy(), weight.transpose(0, 2, 3, 1))
    assert [int(v) for v in call.attrs["pads"]] == [0, 1, 2, 0]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups(groups):
    checked(lambda emit, x: emit(nchw(x, ints(8, 4 // groups, 3, 3), groups=groups)), ("n", 4, 6, 6))


def test_one_dimensional_convolutions_become_two_dimensional():
    def network(emit, x):
        y = emit(nchw(x, ints(6, 4, 3), layer="a", strides=[2], pads=[1, 0]))
        return emit(nchw(emit(r.nn.relu(y)), ints(5, 6, 1), layer="b"))

    after = checked(network, ("n", 4, 9))
    assert [len(call.args[0].ty.shape) for call in find(after, "bnn.conv")] == [4, 4]
    assert moves(after) == 2


def test_three_dimensional_convolutions_are_left():
    after = checked(lambda emit, x: emit(nchw(x, ints(6, 4, 3, 3, 3))), ("n", 4, 5, 5, 5))
    assert str(find(after, "bnn.conv")[0].attrs["layout"]) == "NCHW"


def test_the_transposes_of_tf2onnx_vanish():
    """NHWC -> NCHW, convolution, back, for every layer."""

    def network(emit, x):
        for i in range(3):
            y = emit(r.permute_dims(x, [0, 3, 1, 2]))
            x = emit(r.permute_dims(emit(nchw(y, ints(4, 4, 3, 3, seed=i), layer=f"c{i}", pads=[1, 1, 1, 1])), [0, 2, 3, 1]))
            x = emit(r.sign(x))
        return x

    assert moves(checked(network, ("n", 6, 6, 4))) == 0


def test_a_transpose_on_one_of_two_branches():
    def network(emit, x):
        y = emit(nchw(x, ints(4, 4, 1, 1)))
        other = emit(r.abs(emit(r.permute_dims(y, [0, 2, 3, 1]))))
        return emit(r.add(y, emit(r.permute_dims(other, [0, 3, 1, 2]))))

    assert moves(checked(network, ("n", 4, 6, 5))) == 2


def test_height_and_width_exchanged_for_good():
    def network(emit, x):
        y = emit(r.permute_dims(emit(nchw(x, ints(4, 4, 3, 1), layer="a")), [0, 1, 3, 2]))
        return emit(nchw(y, ints(4, 4, 3, 1, seed=1), layer="b"))

    checked(network, ("n", 4, 6, 7))


@pytest.mark.parametrize("reshape", [lambda x: r.reshape(x, (2, 60)), lambda x: r.reshape(x, (x.ty.shape[0], 60))])
def test_a_flattened_image_permutes_the_dense_weights(reshape):
    def network(emit, x):
        y = emit(nchw(x, ints(4, 4, 1, 1)))
        flat = emit(reshape(y))
        flat = emit(r.add(emit(r.multiply(flat, c(ints(60)))), c(ints(1, 60))))
        return emit(dense(emit(r.sign(flat)), ints(60, 7)))

    after = checked(network, (2, 4, 3, 5))
    assert "take" not in calls(after) and moves(after) == 1


def test_a_flattened_image_that_is_a_result_is_put_in_order():
    def network(emit, x):
        flat = emit(r.reshape(emit(nchw(x, ints(4, 4, 1, 1))), (2, 60)))
        return [flat, emit(dense(flat, ints(60, 7))), emit(r.add(flat, emit(r.abs(flat))))]

    checked(network, (2, 4, 3, 5))


def test_flattened_images_of_different_orders_are_added():
    def network(emit, x, y):
        a = emit(r.reshape(emit(nchw(x, ints(4, 4, 1, 1), layer="a")), (2, 60)))
        b = emit(r.reshape(emit(nchw(y, ints(5, 5, 1, 1), layer="b")), (2, 60)))
        return emit(dense(emit(r.add(a, b)), ints(60, 7)))

    checked(network, (2, 4, 3, 5), (2, 5, 3, 4))


def test_a_flattened_image_plus_a_vector_of_the_network():
    def network(emit, x, y):
        flat = emit(r.reshape(emit(nchw(x, ints(4, 4, 1, 1))), (2, 60)))
        return emit(r.multiply(flat, y))

    for shape in ((2, 60), (2, 1), (60,), (1,)):
        checked(network, (2, 4, 3, 5), shape)


@pytest.mark.parametrize("shape", [(4, 3, 5), (1, 4, 3, 5), (2, 4, 1, 1), (1, 4, 1, 5), (3, 5), (5,), (3, 1), (4, 1, 1)])
def test_operands_of_fewer_axes_are_broadcast_as_in_the_graph(shape):
    def constant(emit, x):
        return emit(r.subtract(emit(nchw(x, ints(4, 4, 1, 1))), c(ints(*shape))))

    def variable(emit, x, y):
        return emit(r.subtract(y, emit(nchw(x, ints(4, 4, 1, 1)))))

    checked(constant, (2, 4, 3, 5))
    checked(variable, (2, 4, 3, 5), shape)


@pytest.mark.parametrize("axis", [[1], [2, 3], [3], [1, 2, 3], [0], [-1]])
@pytest.mark.parametrize("keepdims", [True, False])
@pytest.mark.parametrize("reduce", [r.sum, r.max])
def test_reductions(reduce, keepdims, axis):
    def network(emit, x):
        y = emit(nchw(x, ints(4, 4, 1, 1)))
        return emit(r.abs(emit(reduce(y, axis, keepdims))))

    checked(network, (2, 4, 3, 5))


def test_a_reduction_gates_the_image():
    """Mean over channels per pixel and over pixels per channel, multiplied back."""

    def network(emit, x):
        y = emit(nchw(x, ints(4, 4, 1, 1)))
        y = emit(r.multiply(y, emit(r.sum(emit(r.abs(y)), [1], True))))
        return emit(r.multiply(y, emit(r.sum(y, [2, 3], True))))

    assert moves(checked(network, (2, 4, 3, 5))) == 2


@pytest.mark.parametrize("axis", [1, 2, 3, -1, -3])
def test_concatenation_splitting_and_slicing(axis):
    def network(emit, x, y):
        a, b = emit(nchw(x, ints(4, 4, 1, 1), layer="a")), emit(nchw(y, ints(4, 4, 1, 1), layer="b"))
        joined = emit(r.concat([a, b, y], axis))
        halves = emit(r.split(joined, 3, axis))
        part = emit(relax.TupleGetItem(halves, 1))
        return [emit(r.strided_slice(joined, [axis % 4], [1], [5], [2])), emit(r.add(part, part))]

    checked(network, (2, 4, 4, 4), (2, 4, 4, 4))


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
def test_picking_rows_columns_or_channels(axis):
    """As Resize to the nearest pixel does: nothing is turned for it."""
    indices = np.array([0, 0, 1, 1, 3, 2] if axis else [1, 0, 0], np.int64)

    def network(emit, x):
        y = emit(nchw(x, ints(6, 4, 3, 3), layer="a"))
        y = emit(r.take(y, c(indices, "int64"), axis=axis, mode="clip"))
        return emit(nchw(y, ints(5, 6, 1, 1), layer="b"))

    after = checked(network, (2, 4, 6, 6))
    assert moves(after) == 2


@pytest.mark.parametrize("mode, value", [("constant", 1.0), ("constant", -1.0), ("reflect", 0.0)])
def test_padding(mode, value):
    def network(emit, x):
        y = emit(nchw(x, ints(4, 4, 1, 1), layer="a"))
        y = emit(r.nn.pad(y, [0, 0, 0, 0, 1, 2, 0, 1], mode, value))
        return emit(nchw(y, ints(4, 4, 1, 1), layer="b"))

    assert moves(checked(network, (2, 4, 5, 5))) == 2


@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 0, 0, 1]])
def test_pools(pads):
    def network(emit, x):
        y = emit(nchw(x, ints(4, 4, 1, 1)))
        y = emit(r.nn.max_pool2d(y, [2, 3], [2, 1], pads))
        return emit(r.nn.avg_pool2d(y, [2, 2], [1, 1], pads, count_include_pad=True))

    assert moves(checked(network, (2, 4, 6, 6))) == 2


def test_channel_shuffle():
    def network(emit, x):
        y = emit(nchw(x, ints(6, 4, 1, 1), layer="a"))
        y = emit(r.permute_dims(emit(r.reshape(y, (2, 2, 3, 5, 5))), [0, 2, 1, 3, 4]))
        return emit(nchw(emit(r.reshape(y, (2, 6, 5, 5))), ints(4, 6, 1, 1), layer="b"))

    checked(network, (2, 4, 5, 5))


def test_axes_that_come_and_go():
    """Unsqueeze and squeeze, as one-dimensional layers of Keras are exported."""

    def network(emit, x):
        y = emit(r.expand_dims(emit(r.permute_dims(x, [0, 2, 1])), [2]))
        y = emit(nchw(y, ints(6, 4, 1, 3)))
        return emit(r.permute_dims(emit(r.squeeze(y, [2])), [0, 2, 1]))

    checked(network, (2, 9, 4))


def test_transposed_convolutions_read_their_own_layout():
    def network(emit, x):
        y = emit(nchw(x, ints(4, 4, 1, 1), layer="a"))
        return emit(
            ops.call(
                ops.CONV_TRANSPOSE, [y, c(ints(4, 3, 2, 2))], layer="up", layout="NCHW", strides=[2, 2], pads=[0, 0, 0, 0],
                dilations=[1, 1], groups=1, output_padding=[0, 0],
            )
        )  # fmt: skip

    checked(network, (2, 4, 3, 3))


def test_a_network_without_images_is_untouched():
    after = checked(lambda emit, x: emit(r.nn.relu(emit(dense(x, ints(8, 4))))), ("n", 8))
    assert calls(after) == ["bnn.matmul", "nn.relu"]


def test_signs_in_both_layouts_meet():
    """A sign in channels-last order, a float branch in channels-first order, added."""

    def network(emit, x):
        s = emit(r.permute_dims(emit(r.sign(emit(r.permute_dims(x, [0, 2, 3, 1])))), [0, 3, 1, 2]))
        return emit(r.add(emit(nchw(s, signs(4, 4, 3, 3), pads=[1, 1, 1, 1])), x))

    checked(network, (2, 4, 5, 5))
