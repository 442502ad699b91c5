"""Binary dense layers in tile registers: numbers of rows around groups, short and long sums, all epilogues, against numpy."""

import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnntvm.schedules import binary_dense, binary_dense_tiles
from bnntvm.spec import BinaryDense
from bnntvm.targets import registry
from tests.schedules.kernels import ISAS, Kernel, epilogue_outputs
from tests.schedules.test_binary_dense import EPILOGUES, check

TILES = registry.resolve("x86-64-v4-amx")
RUNNABLE = [p for p in ISAS if p.values[0].products == "tiles"] or [pytest.param(None, marks=pytest.mark.skip("no tile registers here"))]


@st.composite
def layers(draw):
    features, outputs = draw(st.sampled_from([64, 128, 192, 576, 2048])), draw(st.sampled_from([1, 31, 32, 70, 96, 300]))
    return BinaryDense(features, outputs, epilogue=EPILOGUES[draw(st.sampled_from(sorted(EPILOGUES)))])


@pytest.mark.parametrize("isa", RUNNABLE)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(spec=layers(), seed=st.integers(0, 2**32 - 1))
def test_matches_reference(isa, spec, seed):
    schedule = binary_dense.default_schedule(spec, isa)
    assert schedule.adder == binary_dense_tiles.ADDER
    kernel, rng = Kernel(binary_dense, spec, isa, schedule), np.random.default_rng(seed)
    for rows in (1, 21, 22, 31, 32, 33, 44, 63, 65, 100):
        check(kernel, rows, rng)


def test_what_is_claimed():
    assert binary_dense_tiles.claims(BinaryDense(128, 5), TILES)
    assert not any(binary_dense_tiles.claims(spec, TILES) for spec in (BinaryDense(96, 5), BinaryDense(128, 5, unipolar=True)))
    assert not binary_dense_tiles.claims(BinaryDense(128, 5), registry.resolve("x86-64-v4-vpopcnt"))


def test_weights_are_those_of_the_kernel_that_counts():
    weights = np.random.default_rng(0).integers(0, 2**32, (40, 4), dtype=np.uint32)
    spec = BinaryDense(128, 40)
    both = [binary_dense.pack_weights(spec, binary_dense.Schedule(6, 1, 4, adder), TILES, weights) for adder in ("carry_save", "tiles")]
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("isa", RUNNABLE)
def test_the_loop_is_products_and_spills_nothing(isa):
    """Four loads and four products; beside them 64 features of 32 channels take a look-up, a shift and a store for 16 channels by four."""
    spec = BinaryDense(1024, 1024, epilogue=EPILOGUES["thresholds"])
    assembly = Kernel(binary_dense, spec, isa).assembly
    (loop,) = [b for b in re.split(r"\n(?=\.LBB\w+:)", assembly) if "tdpbssd" in b]
    assert loop.count("tdpbssd") == loop.count("tileload") == 4
    assert loop.count("vpermd") in (0, 64) and assembly.count("vpermd") % 64 == 0
    assert not re.search(r"vmov\w+\s+%zmm\d+, -?\d*\(%rsp", loop)
    assert epilogue_outputs(spec.epilogue, 1024, (1,))
