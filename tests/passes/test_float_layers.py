"""What no kernel takes is said in Relax's own operators."""

import numpy as np
import pytest
from tvm import relax

from bnntvm import ops
from bnntvm.passes.float_layers import FloatLayers
from tests.passes.relax_nets import c, calls, conv, dense, find, ints, module, quarters, same


def transposed(x, weight, **attrs):
    spatial = weight.ndim - 2
    plain = dict(strides=[1] * spatial, pads=[0] * 2 * spatial, dilations=[1] * spatial, groups=1, output_padding=[0] * spatial)
    return ops.call(ops.CONV_TRANSPOSE, [x, c(weight)], layer="up", layout="NCHW", **{**plain, **attrs})


def test_products_become_relax_products():
    before = module(lambda emit, x: emit(dense(x, ints(8, 4))), ("n", 8))
    after = FloatLayers()(before)
    assert calls(after) == ["matmul"]
    same(before, after, quarters(3, 8))


def test_products_of_two_activations():
    before = module(lambda emit, x, y: emit(ops.call(ops.MATMUL, [x, y], layer="m")), (2, 4, 6), (2, 6, 5))
    after = FloatLayers()(before)
    assert calls(after) == ["matmul"]
    same(before, after, quarters(2, 4, 6), quarters(2, 6, 5))


@pytest.mark.parametrize(
    "shape, weight, layout, name",
    [
        (("n", 4, 9), (6, 4, 3), "NCHW", "nn.conv1d"),
        (("n", 4, 6, 6), (6, 2, 3, 3), "NCHW", "nn.conv2d"),
        (("n", 6, 6, 4), (6, 3, 3, 2), "NHWC", "nn.conv2d"),
        (("n", 4, 5, 5, 5), (6, 4, 3, 3, 3), "NCHW", "nn.conv3d"),
    ],
)
def test_convolutions_keep_their_geometry(shape, weight, layout, name):
    spatial = len(weight) - 2
    groups = 2 if 2 in (weight[1], weight[-1]) and spatial == 2 else 1
    geometry = dict(strides=[2] * spatial, pads=[1] * spatial + [0] * spatial, dilations=[1] * spatial, groups=groups)
    before = module(lambda emit, x: emit(conv(x, ints(*weight), layout=layout, **geometry)), shape)
    after = FloatLayers()(before)
    assert calls(after) == [name]
    call = find(after, "relax." + name)[0]
    assert [int(v) for v in call.attrs["strides"]] == geometry["strides"]
    assert [int(v) for v in call.attrs["padding"]] == geometry["pads"]
    assert int(call.attrs["groups"]) == groups
    assert [int(d) for d in list(call.ty.shape)[1:]] == [int(d) for d in list(find(before, "bnn.conv")[0].ty.shape)[1:]]


@pytest.mark.parametrize(
    "shape, weight, name", [((2, 4, 5), (4, 3, 2), "nn.conv1d_transpose"), ((2, 4, 5, 4), (4, 3, 2, 3), "nn.conv2d_transpose")]
)
def test_transposed_convolutions_keep_their_shape(shape, weight, name):
    spatial = len(weight) - 2
    attrs = dict(strides=[2] * spatial, pads=[1] * spatial + [0] * spatial, output_padding=[1] * spatial)
    before = module(lambda emit, x: emit(transposed(x, ints(*weight), **attrs)), shape)
    after = FloatLayers()(before)
    assert calls(after) == [name]
    np.testing.assert_array_equal(
        [int(d) for d in find(after, "relax." + name)[0].ty.shape], [int(d) for d in find(before, "bnn.conv_transpose")[0].ty.shape]
    )


def test_other_operators_are_left():
    before = module(lambda emit, x: emit(relax.op.nn.relu(x)), ("n", 8))
    assert calls(FloatLayers()(before)) == ["nn.relu"]
