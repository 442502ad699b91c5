"""Exchange of axes against numpy, on every instruction-set level that this machine runs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm.schedules import transpose
from bnntvm.spec import Transpose
from tests.schedules.machines import LEVELS as RUNNABLE
from tests.schedules.machines import execute, program


def run(spec, schedule, isa):
    kernel = program(transpose.build(spec, schedule, isa), isa)
    for batch in (1, 3):
        data = np.random.default_rng(0).standard_normal((batch, *spec.shapes[0])).astype(np.float32)
        (want,) = transpose.reference(spec, [data])
        _, got = execute(kernel, (data, np.full_like(want, np.nan)))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(size=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 70)), first=st.booleans())
def test_equals_numpy(isa, size, first):
    height, width, channels = size
    inner, outer = (height, width, channels), (channels, height, width)
    spec = Transpose(height * width, channels, (inner, outer)) if first else Transpose(channels, height * width, (outer, inner))
    run(spec, transpose.default_schedule(spec, isa), isa)


def test_every_schedule_of_the_space_is_correct():
    spec = Transpose(49, 40, ((7, 7, 40), (40, 7, 7)))
    for schedule in transpose.space(spec, RUNNABLE[0]):
        run(spec, schedule, RUNNABLE[0])
