"""The check for NaN and infinity against numpy, on every level that this machine runs, at every alignment of an element."""

import numpy as np
import pytest
import tvm
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm import runtime
from bnntvm.build import tvm_target
from bnntvm.schedules import finite, planar_pack
from bnntvm.schedules import map as map_
from bnntvm.spec import Epilogue, Map, Output, PlanarPack, Step
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


SIGN = Epilogue(steps=(Step("less", (0, 0.0), "bool"),), outputs=(Output("bits", 1, "uint32"),))
DOUBLE = Epilogue(steps=(Step("multiply", (0, 2.0)),), outputs=(Output("tensor", 1),))
SPECS = [
    (planar_pack, PlanarPack((14, 14), 40, SIGN)),  # a plane at once
    (planar_pack, PlanarPack((16, 17), 33, SIGN)),  # blocks that begin where lines do
    (planar_pack, PlanarPack((2, 3), 5, SIGN)),  # less than a vector
    (map_, Map(4, (3, 5), 70, "float32", SIGN)),
    (map_, Map(2, (1, 1), 300, "float32", SIGN)),
    (map_, Map(4, (5, 3), 7, "float32", DOUBLE)),  # joined rows
]


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@pytest.mark.parametrize("family, spec", SPECS, ids=[f"{f.__name__.split('.')[-1]}-{s.spatial}-{s.channels}" for f, s in SPECS])
def test_kernels_that_check_their_data(family, spec, isa):
    """They do what they do without the check, and raise for any one bad element of any image or row."""
    func = family.build(spec, family.default_schedule(spec, isa), isa, finite=True).with_attr("global_symbol", "kernel")
    kernel = tvm.compile(tvm.IRModule({"kernel": func}), target=tvm_target(isa))["kernel"]
    shape = (spec.channels, *spec.spatial) if isinstance(spec, PlanarPack) else (*(spec.spatial if spec.rank == 4 else ()), spec.channels)
    rng = np.random.default_rng(0)
    memory = rng.standard_normal(3 * int(np.prod(shape)) + 5).astype(np.float32)
    memory[[0, 1, 2, -1, -2]] = np.nan  # around the data
    data = memory[3:-2].reshape(3, *shape)
    data *= np.where(rng.random(data.shape) < 0.5, np.float32(5e37), np.float32(1e-42))  # products of zeros with these are zeros
    (want,) = family.reference(spec, [data], [])
    got = np.full_like(want, 77)
    kernel(tvm_ffi.from_dlpack(data), tvm_ffi.from_dlpack(got))
    np.testing.assert_array_equal(got, want)
    for at in [0, data.size - 1, *rng.integers(0, data.size, 40)]:
        for bad in (np.nan, -np.inf) if at % 2 else (np.inf, -np.nan):
            kept, data.flat[at] = data.flat[at], bad
            with pytest.raises(ValueError, match=finite.MESSAGE):
                kernel(tvm_ffi.from_dlpack(data), tvm_ffi.from_dlpack(got))
            data.flat[at] = kept
    kernel(tvm_ffi.from_dlpack(data), tvm_ffi.from_dlpack(got))


def test_the_run_time_knows_the_message():
    assert finite.MESSAGE == runtime.NOT_FINITE
