"""Layers of bits on CUDA cores, emulated, against numpy: any shape, stride, pad, group and plane."""

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnntvm.schedules import families
from bnntvm.spec import BinaryConv2d, BinaryDense, PlanesConv2d, PlanesDense, Window, store
from tests.schedules.cuda.layers import LEVELS, NEWER, check
from tests.schedules.planes import plane_sums
from tests.schedules.test_binary_conv2d import EPILOGUES, windows
from tests.schedules.test_bitserial_conv2d import TAILS


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    depthwise = draw(st.integers(0, 3)) == 0
    if depthwise:
        groups = draw(st.sampled_from([5, 32, 40]))
    inputs = groups * draw(st.sampled_from([1, 2, 4, 8] if depthwise else [1, 31, 32, 37, 64, 96]))
    outputs = groups * draw(st.sampled_from([1, 2, 3, 8] if depthwise else [1, 16, 32, 37, 70]))
    dense = draw(st.booleans()) and groups > 1 and 32 % (inputs // groups) == 0
    if draw(st.booleans()):
        planes = draw(plane_sums())
        zeros = planes.data_kind == "bipolar" and len(planes.data) == 1 and draw(st.booleans())
        tails = [store("float32")] if planes.scaled else TAILS
        return PlanesConv2d(draw(windows()), inputs, outputs, planes, groups, zeros, draw(st.sampled_from(tails)), dense)
    unipolar, zeros = draw(st.sampled_from([(False, False), (False, False), (True, False), (False, True)]))
    plus_one = draw(st.booleans()) and groups == 1 and not (unipolar or zeros)
    return BinaryConv2d(draw(windows()), inputs, outputs, groups, unipolar, zeros, draw(st.sampled_from(EPILOGUES)), dense, plus_one)


@st.composite
def dense_layers(draw):
    inputs, outputs = draw(st.sampled_from([1, 33, 64, 100, 288])), draw(st.sampled_from([1, 10, 32, 70]))
    if draw(st.booleans()):
        planes = draw(plane_sums())
        zeros = planes.data_kind == "bipolar" and len(planes.data) == 1 and draw(st.booleans())
        tails = [store("float32")] if planes.scaled else TAILS[:2]
        return PlanesDense(inputs, outputs, planes, zeros, draw(st.sampled_from(tails)))
    unipolar, zeros = draw(st.sampled_from([(False, False), (True, False), (False, True)]))
    return BinaryDense(inputs, outputs, unipolar, zeros, draw(st.sampled_from(EPILOGUES)))


def _schedule(spec, isa, number):
    found = [s for s in families.of(spec, isa).space(spec, isa) if s.engine == "cores"]
    return random.Random(number).choice(found)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(convolutions(), st.integers(0, 99))
def test_any_convolution(spec, seed):
    isa = [NEWER, LEVELS["sm_75"]][seed % 2]
    check(spec, isa, _schedule(spec, isa, seed), 1 + seed % 2, seed)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(dense_layers(), st.integers(0, 99))
def test_any_dense_layer(spec, seed):
    check(spec, NEWER, _schedule(spec, NEWER, seed), 1 + seed % 5, seed)


def test_planar_results():
    """Results in channel order, of more than one image."""
    spec = BinaryConv2d(Window(4, 5, (3, 3), (1, 1), (1, 1, 1, 1)), 40, 36, epilogue=TAILS[3])
    check(spec, NEWER)
