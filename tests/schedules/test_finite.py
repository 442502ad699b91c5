"""The check for NaN and infinity against numpy, on every level that this machine runs, at every alignment of an element."""

import numpy as np
import pytest
import tvm
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm.build import tvm_target
from bnntvm.schedules import finite
from bnntvm.targets.x86 import LEVELS, host_flags

RUNNABLE = [isa for isa in LEVELS if isa.needs <= host_flags()]


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
def test_finds_one_bad_element_and_nothing_outside(isa):
    check = tvm.compile(tvm.IRModule({finite.NAME: finite.build(isa)}), target=tvm_target(isa))[finite.NAME]

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(size=st.integers(1, 300), start=st.integers(0, 15), at=st.integers(0, 299), bad=st.sampled_from([np.nan, np.inf, -np.inf, 3e38]))
    def holds(size, start, at, bad):
        memory = np.full(size + 40, np.nan, np.float32)
        array = memory[start : start + size]
        array[:] = np.random.default_rng(size).standard_normal(size) * 1e37
        assert check(tvm_ffi.from_dlpack(array)) == finite.reference(array) == 1
        array[at % size] = bad
        assert check(tvm_ffi.from_dlpack(array)) == finite.reference(array)

    holds()
