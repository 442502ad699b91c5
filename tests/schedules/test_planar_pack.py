"""Packing of images in channel order against numpy, on every instruction-set level that this machine runs."""

import numpy as np
import pytest
import tvm
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm.bits import pack_bits
from bnntvm.build import tvm_target
from bnntvm.schedules import planar_pack
from bnntvm.spec import Epilogue, EpilogueInput, Output, PlanarPack, Step
from bnntvm.targets.x86 import LEVELS, host_flags
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
@given(
    spatial=st.tuples(st.integers(1, 12), st.integers(1, 12)), channels=st.integers(1, 100), epilogue=st.sampled_from([SIGN, TWO_PLANES])
)
def test_equals_numpy(isa, spatial, channels, epilogue):
    spec = PlanarPack(spatial, channels, epilogue)
    run(spec, planar_pack.default_schedule(spec, isa), isa)


def test_every_schedule_of_the_space_is_correct():
    spec = PlanarPack((7, 9), 70, SIGN)
    for schedule in planar_pack.space(spec, RUNNABLE[0])[::3]:
        run(spec, schedule, RUNNABLE[0], batches=(1,))


@pytest.mark.parametrize("isa", [isa for isa in LEVELS if isa.needs <= host_flags()], ids=lambda isa: isa.name)
def test_images_at_every_alignment_of_an_element(isa):
    """Planes are whole lines: blocks are shifted to where lines begin, the first and the last ones are not."""
    spec = PlanarPack((16, 17), 40, SIGN)
    func = planar_pack.build(spec, planar_pack.default_schedule(spec, isa), isa).with_attr("global_symbol", "kernel")
    kernel = tvm.compile(tvm.IRModule({"kernel": func}), target=tvm_target(isa))
    rng, size = np.random.default_rng(0), 2 * 40 * 16 * 17
    memory = rng.standard_normal(size + 16).astype(np.float32)
    for start in range(16):
        data = memory[start : start + size].reshape(2, 40, 16, 17)
        (want,) = planar_pack.reference(spec, [data], [])
        got = np.full_like(want, 0xDEADBEEF)
        kernel["kernel"](tvm_ffi.from_dlpack(data), tvm_ffi.from_dlpack(got))
        np.testing.assert_array_equal(got, want)
