"""Running sums against numpy, bit by bit, at every instruction-set level that this machine has."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm.schedules import cum_sum
from bnntvm.spec import CumSum
from tests.schedules.kernels import ISAS, Kernel


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "int32", "int64"])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(size=st.integers(0, 30), inner=st.integers(1, 40), static=st.tuples(st.booleans(), st.booleans()), exclusive=st.booleans(),
       backward=st.booleans())  # fmt: skip
def test_equals_numpy(isa, dtype, size, inner, static, exclusive, backward):
    spec = CumSum(size if static[0] else None, inner if static[1] else None, dtype, exclusive, backward)
    kernel = Kernel(cum_sum, spec, isa)
    for groups in (1, 3):
        data = np.random.default_rng(size).normal(0, 9, (groups, size, inner)).astype(dtype)
        (got,) = kernel.run([data], [(data.shape, dtype)])
        np.testing.assert_array_equal(got, cum_sum.reference(spec, [data])[0])


def test_reference_on_a_row():
    row = np.float32([1, 2, 4]).reshape(1, 3, 1)
    for exclusive, backward, wanted in ((0, 0, [1, 3, 7]), (1, 0, [0, 1, 3]), (0, 1, [7, 6, 4]), (1, 1, [6, 4, 0])):
        assert cum_sum.reference(CumSum(3, 1, "float32", exclusive, backward), [row])[0].reshape(-1).tolist() == wanted
