"""Weights taken apart into digit planes give the weights back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bnntvm.bits import unpack_bits
from bnntvm.digits import digit_planes
from bnntvm.planes import WeightPlanes, weight_planes


def values(digits, channels):
    """What the planes mean, float64."""
    bits = unpack_bits(digits.words, channels).astype(np.float64)
    if digits.kind == "ternary":
        assert not np.any(bits[0] > bits[1])
        bits = ((1 - 2 * bits[0]) * bits[1])[None]
    elif digits.kind == "bipolar":
        bits = 1 - 2 * bits
    total = sum(c * plane for c, plane in zip(digits.coefficients, bits, strict=True))
    return total * digits.scale.reshape(-1, *(1,) * (total.ndim - 1))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    arrays(np.int64, (3, 2, 37), elements=st.integers(-8, 7)),
    st.sampled_from([(-1, 1), (-2, 1), (-1, 2), (0, 3), (-3, 3), (-8, 7), (-7, 8), (0, 15)]),
    st.sampled_from([1.0, 0.25, 0.1, 1 / 3]),
)
def test_integers_come_back(numbers, limits, step):
    weights = (np.clip(numbers, *limits) * np.float32(step)).astype(np.float32)
    planes = weight_planes(weights)
    if isinstance(planes, str):
        return
    digits = digit_planes(planes)
    if digits is not None:
        np.testing.assert_allclose(values(digits, 37), weights, rtol=1e-6, atol=1e-6 * np.abs(weights).max(initial=1e-9))


@pytest.mark.parametrize(
    "levels, kind, coefficients",
    [
        ((-1, 0, 1), "ternary", (1,)),
        ((-1, 1), "bipolar", (1,)),
        ((-3, -1, 1, 3), "bipolar", (1, 2)),
        ((-2, -1, 0, 1), "unipolar", (1, -2)),
        ((-1, 0, 1, 2), "unipolar", (-1, 2)),
        ((0, 1, 2, 3), "unipolar", (1, 2)),
        (range(-8, 8), "unipolar", (1, 2, 4, -8)),
        (range(-7, 9), "unipolar", (-1, -2, -4, 8)),
    ],
)
def test_fewest_planes(levels, kind, coefficients):
    rng = np.random.default_rng(0)
    weights = (rng.permuted(np.resize(list(levels), (5, 64)), axis=1) * np.float32(0.3)).astype(np.float32)
    digits = digit_planes(weight_planes(weights))
    assert (digits.kind, digits.coefficients) == (kind, coefficients)
    np.testing.assert_allclose(values(digits, 64), weights, rtol=1e-6, atol=1e-7)


def test_free_scales_are_no_integers():
    """Levels that are on no common grid (asymmetric ternary, free bases) stay as they are."""
    weights = np.resize(np.float32([-0.7, 0.0, 0.31]), (2, 33))
    assert digit_planes(weight_planes(weights)) is None
    assert digit_planes(WeightPlanes(np.ones(2, np.float32), [(np.float32([0.3, 0.4]), weights < 0)])) is None


def test_an_offset_off_the_grid_is_refused():
    weights = np.resize(np.float32([0.25, 1.0, 1.75, 2.5]), (2, 32))  # steps of 0.75 from a third of a step
    assert digit_planes(weight_planes(weights)) is None
