"""Largest and least values of rows, at every instruction-set level that this machine has."""

import numpy as np
import pytest

from bnntvm import spec as specs
from bnntvm.schedules import row_extreme
from tests.schedules.kernels import ISAS, Kernel, assert_same


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels", [7, 131, 256])
@pytest.mark.parametrize("op", ["max", "min"])
def test_rows(isa, channels, op):
    kernel = Kernel(row_extreme, specs.RowExtreme(op, channels), isa)
    for rows in (1, 5):
        data = np.random.default_rng(rows).normal(-3 if op == "max" else 3, 1, (rows, channels)).astype(np.float32)
        got = kernel.run([data], [((rows, 1), "float32")])
        assert_same(got, row_extreme.reference(kernel.spec, [data], []), f"{op} of {rows} x {channels}")
