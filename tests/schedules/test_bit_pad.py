"""Padding of packed images against numpy, on every instruction-set level that this machine runs."""

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm.build import tvm_target
from bnntvm.schedules import bit_pad
from bnntvm.spec import BitPad
from bnntvm.targets.x86 import LEVELS, host_flags

RUNNABLE = [isa for isa in LEVELS if isa.needs <= host_flags()]


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_equals_numpy(isa, data):
    spec = BitPad(
        data.draw(st.tuples(st.integers(1, 9), st.integers(1, 20))), data.draw(st.integers(1, 5)),
        data.draw(st.tuples(*[st.integers(0, 3)] * 4)), data.draw(st.sampled_from([0, 0xFFFFFFFF])),
    )  # fmt: skip
    kernel = tvm.compile(tvm.IRModule({"bit_pad": bit_pad.build(spec, bit_pad.default_schedule(spec, isa), isa)}), target=tvm_target(isa))
    rng = np.random.default_rng(0)
    for batch in (1, 3):
        words = rng.integers(0, 2**32, (batch, *spec.spatial, spec.words), dtype=np.uint32)
        (want,) = bit_pad.reference(spec, [words])
        got = tvm.runtime.tensor(np.full_like(want, 0xDEADBEEF))
        kernel["bit_pad"](tvm.runtime.tensor(words), got)
        np.testing.assert_array_equal(got.numpy(), want)
