"""Float pooling against its reference, at every instruction-set level that this machine has."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules import pool2d
from tests.schedules.float_kernels import EPILOGUES, RUNNABLE, check, epilogue_names, geometries, sample, small_integers


def run(isa, window, channels, op, epilogue, images, seed, schedule=None):
    rng = np.random.default_rng(seed)
    spec = specs.Pool2d(window, channels, op, EPILOGUES[epilogue])
    data = small_integers(rng, (images, window.in_height, window.in_width, channels), -50, 50)
    check(pool2d, spec, isa, [data], None, channels, (images, window.out_height, window.out_width), rng, schedule)


def sees_the_image(window):
    """Whether every position of the window holds at least one value that is not padding."""
    return all(
        any(0 <= o * stride - pad + k * dilation < size for k in range(taps))
        for size, count, taps, stride, pad, dilation in zip(
            (window.in_height, window.in_width), (window.out_height, window.out_width), window.kernel, window.strides,
            window.pads[:2], window.dilations)
        for o in range(count)
    )  # fmt: skip


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@settings(max_examples=10, deadline=None)
@given(
    window=geometries().filter(sees_the_image),
    channels=st.integers(1, 70),
    op=st.sampled_from(["max", "avg", "avg_pad"]),
    epilogue=epilogue_names(),
    images=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_geometry(isa, window, channels, op, epilogue, images, seed):
    run(isa, window, channels, op, epilogue, images, seed)


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@pytest.mark.parametrize("op", ["max", "avg", "avg_pad"])
def test_usual_pools(isa, op):
    run(isa, specs.Window(9, 32, (3, 3), (2, 2), (1, 1, 1, 1)), 64, op, "bits", 1, seed=1)
    run(isa, specs.Window(8, 18, (2, 2), (2, 2)), 24, op, "plain", 2, seed=2)


def test_maximum_of_infinities():
    data = np.full((1, 2, 2, 16), -np.inf, np.float32)
    spec = specs.Pool2d(specs.Window(2, 2, (2, 2)), 16, "max", specs.store())
    check(pool2d, spec, RUNNABLE[0], [data], None, 16, (1, 1, 1), np.random.default_rng(0))


def test_schedules_of_the_space_are_correct():
    isa, window = RUNNABLE[0], specs.Window(5, 30, (3, 3), (1, 1), (1, 1, 1, 1))
    for schedule in sample(pool2d.space(specs.Pool2d(window, 40, "avg"), isa)):
        run(isa, window, 40, "avg", "bias_relu", 1, 4, schedule)


@pytest.mark.parametrize("images", [1, 4])
def test_few_images_are_pooled_in_turn_and_many_side_by_side(images):
    run(RUNNABLE[0], specs.Window(40, 40, (2, 2), (2, 2)), 32, "max", "plain", images, seed=3)
