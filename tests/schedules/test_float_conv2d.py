"""The float convolution against its reference, at every instruction-set level that this machine has."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules import float_conv2d, windows
from bnntvm.targets.x86 import LEVELS
from tests.schedules.float_kernels import EPILOGUES, RUNNABLE, check, epilogue_names, geometries, sample, small_integers
from tests.schedules.kernels import Kernel


def run(isa, window, channels, groups, epilogue, images, seed, schedule=None, planar=False):
    rng = np.random.default_rng(seed)
    spec = specs.FloatConv2d(window, *channels, groups, EPILOGUES[epilogue], planar)
    data = small_integers(rng, (images, window.in_height, window.in_width, channels[0]))
    data = np.ascontiguousarray(data.transpose(0, 3, 1, 2)) if planar else data
    weights = small_integers(rng, (channels[1], *window.kernel, channels[0] // groups))
    check(float_conv2d, spec, isa, [data], weights, channels[1], (images, window.out_height, window.out_width), rng, schedule)


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@settings(max_examples=8, deadline=None)
@given(
    window=geometries(),
    groups=st.sampled_from([1, 1, 2, 3]),
    per_group=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    epilogue=epilogue_names(),
    images=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_geometry(isa, window, groups, per_group, epilogue, images, seed):
    run(isa, window, (per_group[0] * groups, per_group[1] * groups), groups, epilogue, images, seed)


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@settings(max_examples=4, deadline=None)
@given(
    size=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    channels=st.tuples(st.integers(1, 20), st.integers(1, 70)),
    epilogue=epilogue_names(),
    images=st.integers(1, 3),
)
def test_pointwise_runs_over_joined_rows(isa, size, channels, epilogue, images):
    run(isa, specs.Window(*size, (1, 1)), channels, 1, epilogue, images, seed=1)


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
def test_stem_shapes(isa):
    run(isa, specs.Window(21, 45, (7, 7), (2, 2), (3, 3, 3, 3)), (3, 64), 1, "bias_relu", 1, seed=2)
    run(isa, specs.Window(19, 61, (3, 3), (2, 2), (1, 1, 1, 1)), (3, 8), 1, "bits", 2, seed=3)


@pytest.mark.parametrize("isa", RUNNABLE[:1], ids=lambda isa: isa.name)
@settings(max_examples=8, deadline=None)
@given(window=geometries(), channels=st.tuples(st.integers(1, 9), st.integers(1, 40)), images=st.integers(1, 2))
def test_planar_input(isa, window, channels, images):
    run(isa, window, channels, 1, "bias_relu", images, seed=5, planar=True)


def test_schedules_of_the_space_are_correct():
    isa, window = RUNNABLE[0], specs.Window(9, 30, (3, 3), (1, 1), (1, 1, 1, 1))
    for schedule in sample(float_conv2d.space(specs.FloatConv2d(window, 5, 40), isa)):
        run(isa, window, (5, 40), 1, "bias_relu", 1, 4, schedule)


@pytest.mark.parametrize("epilogue", ["plain", "bias_relu", "residual_and_bits", "image_pixel"])
@pytest.mark.parametrize("outputs, planar", [(33, True), (40, False), (48, True), (72, False), (80, False)])
@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
def test_channels_that_leave_half_a_word(isa, outputs, planar, epilogue):
    """Default and other tiles, three vectors in one block among them, where two vectors at a time would compute one for nothing."""
    window = specs.Window(9, 30, (3, 3), (2, 2), (1, 1, 1, 1))
    spec = specs.FloatConv2d(window, 3, outputs, 1, EPILOGUES[epilogue], planar)
    for schedule in sample(float_conv2d.space(spec, isa), 2):
        run(isa, window, (3, outputs), 1, epilogue, 2, outputs, schedule, planar)


def test_no_vector_of_a_tile_is_empty():
    """By default, whatever the channels: of one block, or of more where no bits are packed."""
    isa = next(level for level in LEVELS if level.name == "x86-64-v4-vpopcnt")
    for outputs in range(1, 260):
        for epilogue in ("plain", "bits"):
            spec = specs.FloatConv2d(specs.Window(20, 20, (3, 3), (1, 1), (1, 1, 1, 1)), 8, outputs, 1, EPILOGUES[epilogue])
            vectors = float_conv2d.default_schedule(spec, isa).vectors
            if epilogue == "plain" or outputs <= 48:
                assert -(-outputs // 16) % vectors == 0, outputs


def test_tiles_of_one_vector_share_loads_where_two_multiply_in_a_cycle():
    """And everywhere for stems in channel order, whose pixels are no neighbours in memory."""
    level = next(level for level in LEVELS if level.name == "x86-64-v4-vpopcnt")
    window = specs.Window(20, 20, (3, 3), (1, 1), (1, 1, 1, 1))
    for outputs, planar, vendor, shared in [
        (80, False, "AMD", False),
        (80, False, "Intel", True),
        (80, True, "AMD", True),
        (64, False, "AMD", True),
    ]:
        spec = specs.FloatConv2d(window, 8, outputs, 1, EPILOGUES["plain"], planar)
        assert float_conv2d.default_schedule(spec, replace(level, vendor=vendor)).shared == shared


@given(window=geometries(most=40, kernel=7), most=st.integers(1, 14))
def test_tiles_cover_every_tap_of_every_pixel_once(window, most):
    pixels = windows.even_tile(window.out_width, most)
    covered = set()
    for run_ in windows.column_runs(window, pixels):
        for number in range(run_.count):
            start = run_.start + number * run_.step
            tile = {(start + p, s) for t in run_.taps for s in range(t.first, t.stop) for p in range(t.low, t.high)}
            valid = {
                (start + p, s)
                for p in range(pixels)
                for s in range(window.kernel[1])
                if 0 <= (start + p) * window.strides[1] - window.pads[1] + s * window.dilations[1] < window.in_width
            }
            assert tile == valid
            covered |= {start + p for p in range(pixels)}
    assert covered == set(range(window.out_width))


@pytest.mark.parametrize("isa", [isa for isa in RUNNABLE if isa.lanes > 4], ids=lambda isa: isa.name)
def test_vectors_on_the_stack_are_aligned(isa):
    """Wide tiles spill; where the stack is only aligned to 16 bytes, such a vector lies across two lines of the cache."""
    spec = specs.FloatConv2d(specs.Window(32, 32, (11, 11), (4, 4), (0, 0, 0, 0)), 3, 96, 1, EPILOGUES["plain"], False)
    assembly = Kernel(float_conv2d, spec, isa).assembly
    assert re.search(r"andq\s+\$-64, %rsp", assembly[assembly.index("compute_") :])
