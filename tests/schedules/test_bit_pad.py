"""Padding of packed images against numpy, on every instruction-set level that this machine runs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm.schedules import bit_pad
from bnntvm.spec import BitPad
from tests.schedules.machines import LEVELS as RUNNABLE
from tests.schedules.machines import execute, program


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_equals_numpy(isa, data):
    spec = BitPad(
        data.draw(st.tuples(st.integers(1, 9), st.integers(1, 20))), data.draw(st.integers(1, 5)),
        data.draw(st.tuples(*[st.integers(0, 3)] * 4)), data.draw(st.sampled_from([0, 0xFFFFFFFF])),
    )  # fmt: skip
    kernel = program(bit_pad.build(spec, bit_pad.default_schedule(spec, isa), isa), isa)
    rng = np.random.default_rng(0)
    for batch in (1, 3):
        words = rng.integers(0, 2**32, (batch, *spec.spatial, spec.words), dtype=np.uint32)
        (want,) = bit_pad.reference(spec, [words])
        _, got = execute(kernel, (words, np.full_like(want, 0xDEADBEEF)))
        np.testing.assert_array_equal(got, want)
