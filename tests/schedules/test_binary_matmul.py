"""Products of two packed run-time tensors against numpy, on every instruction-set level that this machine runs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm.bits import pack_bits
from bnntvm.schedules import binary_matmul as family
from bnntvm.spec import BinaryMatmul
from tests.schedules.kernels import ISAS, Kernel

KINDS = ("bipolar", "unipolar", "ternary")


def operand(rng, kind, shape):
    """Planes [B, rows, words] of a random operand, and its values."""
    ones, zeros = rng.random(shape) < 0.5, rng.random(shape) < 0.3
    if kind == "unipolar":
        return [pack_bits(ones)], ones.astype(np.int64)
    if kind == "bipolar":
        return [pack_bits(ones)], np.where(ones, -1, 1)
    return [pack_bits(ones & ~zeros), pack_bits(zeros)], np.where(zeros, 0, np.where(ones, -1, 1))


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_equals_the_product_of_the_values(isa, data):
    left, right = (data.draw(st.sampled_from(KINDS)) for _ in range(2))
    rows, columns, features = (data.draw(st.integers(1, most)) for most in (9, 37, 100))
    shared, scale = data.draw(st.booleans()), data.draw(st.sampled_from([None, 1.0, 0.3]))
    spec = BinaryMatmul(rows, columns, features, -(-features // 32), left, right, shared, scale)
    schedule = data.draw(st.sampled_from(family.space(spec, isa)))
    kernel, rng = Kernel(family, spec, isa, schedule), np.random.default_rng(0)
    for batch in (1, 3):
        words, x = operand(rng, left, (batch, rows, features))
        others, y = operand(rng, right, (1 if spec.shared else batch, columns, features))
        arrays = [*words, *[np.ascontiguousarray(np.swapaxes(w, 1, 2)) for w in others]]
        (got,) = kernel.run(arrays, [((batch, rows, columns), "int32" if spec.scale is None else "float32")])
        dots = x @ np.swapaxes(y, 1, 2)
        np.testing.assert_array_equal(got, dots if spec.scale is None else dots.astype(np.float32) * np.float32(spec.scale))
        np.testing.assert_array_equal(got, family.reference(spec, arrays)[0])
