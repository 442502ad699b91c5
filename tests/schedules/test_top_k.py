"""The best elements of rows against numpy, ties included."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm.schedules import top_k
from bnntvm.spec import TopK
from tests.schedules.kernels import ISAS, Kernel


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "int32", "int64"])
@settings(max_examples=5, deadline=None)
@given(size=st.integers(1, 40), share=st.floats(0, 1), largest=st.booleans(), seed=st.integers(0, 99))
def test_equals_numpy(isa, dtype, size, share, largest, seed):
    spec = TopK(size, max(1, round(share * size)), largest, dtype)
    kernel = Kernel(top_k, spec, isa)
    for rows in (1, 5):
        data = np.random.default_rng(seed).integers(-4, 5, (rows, size)).astype(dtype)
        got = kernel.run([data], [((rows, spec.count), dtype), ((rows, spec.count), "int64")])
        for a, b in zip(got, top_k.reference(spec, [data])):
            np.testing.assert_array_equal(a, b)
