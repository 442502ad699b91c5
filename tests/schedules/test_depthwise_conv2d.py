"""The depthwise float convolution against its reference, at every instruction-set level that this machine has."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules import depthwise_conv2d
from tests.schedules.float_kernels import EPILOGUES, RUNNABLE, check, epilogue_names, geometries, sample, small_integers


def run(isa, window, channels, multiplier, epilogue, images, seed, schedule=None):
    rng = np.random.default_rng(seed)
    spec = specs.FloatConv2d(window, channels, channels * multiplier, channels, EPILOGUES[epilogue])
    data = small_integers(rng, (images, window.in_height, window.in_width, channels))
    weights = small_integers(rng, (spec.out_channels, *window.kernel, 1))
    dims = (images, window.out_height, window.out_width)
    check(depthwise_conv2d, spec, isa, [data], weights, spec.out_channels, dims, rng, schedule)


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@settings(max_examples=8, deadline=None)
@given(
    window=geometries(),
    channels=st.integers(2, 70),
    multiplier=st.sampled_from([1, 1, 1, 2, 3]),
    epilogue=epilogue_names(),
    images=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_geometry(isa, window, channels, multiplier, epilogue, images, seed):
    run(isa, window, channels, multiplier, epilogue, images, seed)


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@pytest.mark.parametrize("stride", [1, 2])
def test_usual_layers(isa, stride):
    run(isa, specs.Window(7, 30, (3, 3), (stride, stride), (1, 1, 1, 1)), 64, 1, "bits", 1, seed=1)
    run(isa, specs.Window(8, 23, (5, 5), (stride, stride), (2, 2, 2, 2)), 48, 1, "bias_relu", 2, seed=2)


def test_schedules_of_the_space_are_correct():
    isa, window = RUNNABLE[0], specs.Window(5, 30, (3, 3), (1, 1), (1, 1, 1, 1))
    for schedule in sample(depthwise_conv2d.space(specs.FloatConv2d(window, 40, 40, 40), isa)):
        run(isa, window, 40, 1, "bias_relu", 1, 4, schedule)


def test_claims_only_one_input_channel_per_group():
    window = specs.Window(5, 5, (3, 3))
    assert depthwise_conv2d.claims(specs.FloatConv2d(window, 8, 16, 8))
    assert not depthwise_conv2d.claims(specs.FloatConv2d(window, 8, 16, 4))
    assert not depthwise_conv2d.claims(specs.FloatConv2d(window, 1, 16, 1))
