"""Convolutions with packed weights against their reference, at every instruction-set level that this machine has."""

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules import families
from tests.schedules.float_kernels import EPILOGUES, epilogue_inputs, execute, geometries, small_integers
from tests.schedules.packed_weights import CODINGS, WIDTHS, random_weights


def run(isa, window, channels, groups, coding, epilogue, images, seed, planar=False, schedule=None):
    rng = np.random.default_rng(seed)
    spec = specs.WeightConv2d(window, *channels, groups, EPILOGUES[epilogue], planar, coding)
    family = families.of(spec)
    schedule = schedule or family.default_schedule(spec, isa)
    data = small_integers(rng, (images, window.in_height, window.in_width, channels[0]))
    data = np.ascontiguousarray(data.transpose(0, 3, 1, 2)) if planar else data
    planes, levels = random_weights(rng, coding, (channels[1], *window.kernel, channels[0] // groups))
    dims = (images, window.out_height, window.out_width)
    inputs = epilogue_inputs(rng, spec.epilogue, channels[1], dims)
    packed = [data, family.pack_weights(spec, schedule, isa, planes), *levels]
    got = execute(family.build(spec, schedule, isa), isa, packed, inputs, spec.epilogue, channels[1], dims)
    for actual, expected in zip(got, family.reference(spec, [data, planes, *levels], inputs), strict=True):
        np.testing.assert_array_equal(actual, expected, err_msg=f"{spec} {schedule} {isa.name}")


@pytest.mark.parametrize("isa", WIDTHS, ids=lambda isa: isa.name)
@settings(max_examples=4, deadline=None, phases=(Phase.generate,))
@given(
    window=geometries(),
    channels=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    coding=st.sampled_from(CODINGS),
    epilogue=st.sampled_from(["plain", "bias_relu", "bits"]),
    seed=st.integers(0, 99),
)
def test_any_shape(isa, window, channels, coding, epilogue, seed):
    run(isa, window, channels, 1, coding, epilogue, 1 + seed % 2, seed)


@pytest.mark.parametrize(
    "coding, groups, channels",
    [(CODINGS[0], 2, (8, 70)), (CODINGS[1], 3, (33, 99)), (CODINGS[4], 4, (16, 8)), (CODINGS[0], 4, (16, 8))],
    ids=str,
)
def test_groups(coding, groups, channels):
    run(WIDTHS[0], specs.Window(6, 7, (3, 3), pads=(1, 1, 1, 1)), channels, groups, coding, "plain", 2, 3)


@pytest.mark.parametrize("isa", WIDTHS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("coding", CODINGS[:2], ids=str)
@pytest.mark.parametrize("outputs", [19, 38])
def test_depthwise(isa, coding, outputs):
    run(isa, specs.Window(9, 8, (7, 5), strides=(1, 2), pads=(3, 2, 3, 2)), (19, outputs), 19, coding, "bias_relu", 2, 4)


@pytest.mark.parametrize("isa", WIDTHS[:1], ids=lambda isa: isa.name)
def test_image_in_channel_order(isa):
    run(isa, specs.Window(20, 20, (3, 3), (2, 2), (1, 1, 1, 1)), (3, 24), 1, CODINGS[0], "bias_relu", 2, 5, planar=True)


def test_schedules_of_the_space_are_correct():
    window, isa = specs.Window(9, 9, (3, 3), pads=(1, 1, 1, 1)), WIDTHS[0]
    spec = specs.WeightConv2d(window, 20, 40, coding=CODINGS[1])
    schedules = families.of(spec).space(spec, isa)
    for schedule in schedules[:: -(-len(schedules) // 4)]:
        run(isa, window, (20, 40), 1, CODINGS[1], "bias_relu", 1, 6, schedule=schedule)
