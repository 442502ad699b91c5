"""Epilogues on a GPU: random programs behind kernels whose channels lie across lanes in every way, against numpy bit by bit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules import epilogue as tail
from bnntvm.schedules import families
from bnntvm.schedules.cuda.layers import Schedule
from bnntvm.schedules.cuda.layers import space as layer_space
from tests.schedules.cuda.layers import LEVELS, operands, run
from tests.schedules.kernels import epilogue_inputs
from tests.schedules.test_epilogue import FUNCTIONS, Program, everything_finite

STEP, OUTPUT, INPUT = specs.Step, specs.Output, specs.EpilogueInput
ISAS = {"cores": LEVELS["sm_75"], "mma": LEVELS["sm_80"], "wgmma": replace(LEVELS["sm_90a"], multiprocessors=2)}


@pytest.mark.parametrize("engine", ISAS)
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_programs(engine, data):
    channels, times = data.draw(st.sampled_from([(33, 1), (40, 1), (64, 1), (70, 1), (64, 2), (96, 3)]))
    isa, program = ISAS[engine], Program(data.draw, "int32", times).epilogue()
    window = specs.Window(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), (1, 1))
    spec = specs.BinaryConv2d(window, 512, channels, epilogue=program)
    schedule = next(s for s in layer_space(spec, isa) if s.engine == engine)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    dims = (3, window.out_height, window.out_width)
    plain, inputs = operands(spec, 3, rng), epilogue_inputs(rng, program, channels, dims)
    family = families.of(spec, isa)
    anchor = family.reference(replace(spec, epilogue=specs.store("int32", "int32")), plain, [])[0]
    assume(everything_finite(program, anchor, inputs))
    expected = tail.reference(program, anchor, inputs)
    for got, want in zip(run(spec, isa, plain, inputs, 3, schedule), expected, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=f"{program}")


def test_transcendental_functions():
    """To a unit in the last place of what numpy rounds from double precision (the device's own are within two of that)."""
    steps = [STEP("cast", (0,)), STEP("multiply", (1, 0.03))] + [STEP(name, (2,)) for name in FUNCTIONS if name != "log"]
    program = specs.Epilogue((), tuple(steps), tuple(OUTPUT("tensor", 3 + i) for i in range(len(steps) - 2)))
    spec, isa = specs.BinaryDense(128, 40, epilogue=program), ISAS["cores"]
    plain = operands(spec, 3, np.random.default_rng(0))
    expected = families.of(spec, isa).reference(spec, plain, [])
    for got, want in zip(run(spec, isa, plain, [], 3, Schedule("cores", 1)), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
