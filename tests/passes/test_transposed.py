"""Transposed convolutions as ordinary ones: every geometry, on real and on two-level operands."""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tvm import relax

from bnntvm import ops
from bnntvm.passes.layout import ChannelsLast
from bnntvm.passes.transposed import split_axis
from tests.passes.relax_nets import c, calls, fold, ints, module, quarters, same, signs


def transposed(x, weight, **attrs):
    spatial = weight.ndim - 2
    plain = dict(strides=[1] * spatial, pads=[0] * 2 * spatial, dilations=[1] * spatial, output_padding=[0] * spatial, groups=1)
    return ops.call(ops.CONV_TRANSPOSE, [x, c(weight)], layer="up", layout="NCHW", **plain | attrs)


@st.composite
def geometries(draw, spatial):
    axis = st.tuples(*[st.integers(1, 4)] * 3)  # kernel, stride, dilation
    axes = [draw(axis) for _ in range(spatial)]
    pads = [draw(st.integers(0, 3)) for _ in range(2 * spatial)]
    extra = [draw(st.integers(0, max(s, d) - 1)) for _, s, d in axes]
    sizes = [draw(st.integers(1, 5)) for _ in range(spatial)]
    out = [(n - 1) * s + d * (k - 1) + 1 + e - pads[i] - pads[spatial + i] for i, ((k, s, d), e, n) in enumerate(zip(axes, extra, sizes))]
    assume(min(out) >= 1)
    _, strides, dilations = zip(*axes)
    attrs = dict(strides=strides, dilations=dilations, pads=pads, output_padding=extra, groups=draw(st.sampled_from([1, 2])))
    return sizes, [a[0] for a in axes], attrs


@settings(max_examples=60)
@given(geometries(2) | geometries(1))
def test_every_geometry(geometry):
    sizes, kernel, attrs = geometry
    weight = ints(4, 3, *kernel)
    before = module(lambda emit, x: emit(transposed(x, weight, **attrs)), ("n", 4, *sizes))
    after = ChannelsLast()(before)
    assert "bnn.conv_transpose" not in calls(after)
    same(before, after, quarters(2, 4, *sizes))


@settings(max_examples=40)
@given(geometries(2))
def test_signs_are_multiplied_as_bits(geometry):
    sizes, kernel, attrs = geometry
    weight = signs(4, 3, *kernel)

    def network(emit, x):
        y = emit(relax.op.where(emit(relax.op.greater_equal(x, c(0.0))), c(1.0), c(-1.0)))
        return emit(transposed(y, weight, **attrs))

    before = module(network, ("n", 4, *sizes))
    after, decisions = fold(ChannelsLast()(before))
    assert "bnn.conv" not in calls(after)
    assert not decisions or decisions["up"].kind == "binary"
    same(before, after, quarters(2, 4, *sizes))


def test_equal_windows_are_one_convolution():
    attrs = dict(strides=[2, 2], pads=[0, 0, 0, 0])
    after = ChannelsLast()(module(lambda emit, x: emit(transposed(x, ints(4, 3, 2, 2), **attrs)), ("n", 4, 5, 6)))
    assert calls(after).count("bnn.conv") == 1 and "strided_slice" not in calls(after)


def test_taps_of_a_stride_of_two():
    axis = split_axis(size=5, kernel=3, stride=2, dilation=1, pads=(1, 1), output_padding=1)
    assert [p.taps for p in axis.phases] == [(2, 0), (1,)]
    assert (axis.first, axis.size) == (1, 10)
    np.testing.assert_equal([p.pads for p in axis.phases], [(1, 1), (0, 1)])
