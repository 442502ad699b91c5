"""Packing of images in channel order against numpy, on every instruction-set level that this machine runs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm.bits import pack_bits
from bnntvm.schedules import planar_pack
from bnntvm.spec import Epilogue, EpilogueInput, Output, PlanarPack, Step
from tests.schedules.machines import LEVELS as RUNNABLE
from tests.schedules.machines import execute, program

SIGN = Epilogue(steps=(Step("less", (0, 0.0), "bool"),), outputs=(Output("bits", 1, "uint32"),))
#: Per-channel thresholds with flipped channels, and a second plane that is a xor of two comparisons.
TWO_PLANES = Epilogue(
    (EpilogueInput("channel"), EpilogueInput("words", "uint32")),
    (Step("less", (0, 1), "bool"), Step("less", (0, 0.5), "bool"), Step("logical_xor", (3, 4), "bool")),
    (Output("bits", 3, "uint32", 2), Output("bits", 5, "uint32")),
)


def run(spec, schedule, isa, batches=(1, 2)):
    kernel = program(planar_pack.build(spec, schedule, isa), isa)
    rng, channels = np.random.default_rng(0), spec.channels
    inputs = []
    if spec.epilogue.inputs:
        thresholds = np.zeros(-(-channels // 32) * 32, np.float32)
        thresholds[:channels] = rng.standard_normal(channels)
        inputs = [thresholds, pack_bits(rng.random(channels) < 0.5)]
    for batch in batches:
        data = rng.standard_normal((batch, channels, *spec.spatial)).astype(np.float32)
        want = planar_pack.reference(spec, [data], inputs)
        got = execute(kernel, (data, *inputs, *(np.full_like(w, 0xDEADBEEF) for w in want)))
        for g, w in zip(got[1 + len(inputs) :], want):
            np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(spatial=st.tuples(st.integers(1, 12), st.integers(1, 12)), channels=st.integers(1, 100), epilogue=st.sampled_from([SIGN, TWO_PLANES]))
def test_equals_numpy(isa, spatial, channels, epilogue):
    spec = PlanarPack(spatial, channels, epilogue)
    run(spec, planar_pack.default_schedule(spec, isa), isa)


def test_every_schedule_of_the_space_is_correct():
    spec = PlanarPack((7, 9), 70, SIGN)
    for schedule in planar_pack.space(spec, RUNNABLE[0])[::3]:
        run(spec, schedule, RUNNABLE[0], batches=(1,))
