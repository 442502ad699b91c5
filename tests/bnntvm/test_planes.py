"""Decompositions into bit planes: what they add up to, and how many planes they take."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm.planes import WeightPlanes, activation_planes, weight_planes


def total(planes):
    """The weights that a WeightPlanes stands for, float64."""
    ones = (1,) * (planes.planes[0][1].ndim - 1)
    parts = [np.reshape(np.asarray(c, np.float64), (-1, *ones)) * np.where(negative, -1, 1) for c, negative in planes.planes]
    out = planes.scale.astype(np.float64).reshape(-1, *ones) * sum(parts)
    return out if planes.offset is None else out + planes.offset.astype(np.float64).reshape(-1, *ones)


def close(planes, weight):
    assert isinstance(planes, WeightPlanes), planes
    np.testing.assert_allclose(total(planes), weight, rtol=0, atol=2.0**-20 * np.abs(weight).max())
    return len(planes.planes)


@settings(max_examples=60)
@given(st.integers(1, 3), st.integers(0, 999), st.booleans())
def test_sums_of_scaled_signs_take_a_plane_for_each(bases, seed, shifted):
    """ABC-Net: w = sum(alpha_m * B_m), with a shift or without, alphas of each output channel its own."""
    rng = np.random.default_rng(seed)
    alphas = rng.uniform(0.1, 1, (bases, 5, 1)).astype(np.float32)
    weight = (alphas * rng.choice([-1, 1], (bases, 5, 60))).sum(0, dtype=np.float32) + np.float32(0.3 * shifted)
    planes = weight_planes(weight.astype(np.float32))
    assert close(planes, weight) <= bases and (planes.offset is None) == (not shifted)


@pytest.mark.parametrize("scales", [(0.3, 0.2, 0.11), (0.25, 0.5), (1.0, 0.3, 0.2)])
def test_signs_of_one_tensor_at_several_thresholds_have_no_constant_term(scales):
    """ABC-Net's bases are sign(w - mean + u * std): only m + 1 of the 2**m sums occur."""
    w = np.random.default_rng(0).normal(size=(6, 90)).astype(np.float32)
    weight = sum(np.float32(a) * np.sign(w + np.float32(u)) for a, u in zip(scales, (-0.5, 0, 0.5)))
    planes = weight_planes(weight.astype(np.float32))
    assert close(planes, weight) == len(scales) and planes.offset is None


@settings(max_examples=40)
@given(st.integers(0, 999), st.floats(1 / 64, 2, width=32), st.floats(1 / 64, 2, width=32))
def test_asymmetric_ternary_weights_take_two_planes(seed, positive, negative):
    weight = np.random.default_rng(seed).choice([-negative, 0, positive], (4, 50)).astype(np.float32)
    assert close(weight_planes(weight), weight) <= 2


@settings(max_examples=40)
@given(st.integers(2, 4), st.integers(0, 999), st.floats(1 / 64, 2, width=32))
def test_grids_take_a_plane_for_each_bit(bits, seed, step):
    weight = (np.random.default_rng(seed).integers(0, 2**bits, (4, 80)) * np.float32(step)).astype(np.float32)
    assert close(weight_planes(weight), weight) <= bits


def test_a_grid_of_which_a_channel_lacks_most_levels():
    weight = np.float32([[-8, -5, 0, 3, 7], [1, 2, 3, 4, 5]])
    assert close(weight_planes(weight), weight) <= 4


def test_levels_that_share_nothing_are_refused_by_name():
    weight = np.float32([[1, 2.3, 3.7001, 5.9, 11.1, 17.3]])
    assert "not evenly spaced" in weight_planes(weight)


LEVELS = [(-1, 1), (-1, 0, 1), (0, 1), (0, 1, 2, 3), (-2, -1, 0, 1), (-1, -0.5, -0.25, 0, 0.25, 0.5, 1), (0.3, 0.7), (-3, -1, 1, 3)]


@pytest.mark.parametrize("levels", LEVELS)
def test_activations_add_up(levels):
    found = activation_planes(np.float32(levels))
    for level in np.float32(levels):
        value = 0
        for p in found.planes:
            bit = level in np.float32(p.ones)
            value += p.coefficient * (bit if p.unipolar else 0 if p.zeros and level == 0 else 1 - 2 * bit)
        assert np.isclose(found.scale * value, level, rtol=1e-6)


def test_sums_of_signs_take_a_plane_for_each():
    assert activation_planes(np.float32([-3, -1, 1, 3])).count == 2
    assert activation_planes(np.float32([-0.76, 0.08, 0.76])).count == 2


# ---- nearly binary


@given(st.integers(0, 999))
def test_three_neighbouring_floats_are_binary_on_request_only(seed):
    """alpha * sign(w) - clip(w) + clip(w): up to three neighbouring floats in a filter."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(6, 200)).astype(np.float32)
    alpha, clipped = np.abs(w).mean(1, keepdims=True), np.clip(w, -1, 1)
    weight = (alpha * np.sign(w) - clipped) + clipped
    if np.array_equal(np.abs(weight).min(1), np.abs(weight).max(1)):
        return  # by chance, no weight was rounded
    refused = weight_planes(weight)
    assert isinstance(refused, str) and "deviation" in refused and "weight_tolerance" in refused
    taken = weight_planes(weight, 1e-6)
    assert len(taken.planes) == 1 and np.array_equal(taken.planes[0][1], w < 0)
    np.testing.assert_allclose(taken.scale, alpha.reshape(-1), rtol=1e-6)


@given(st.integers(2, 4), st.booleans(), st.floats(0.0078125, 12, width=32))
@settings(max_examples=60, deadline=None)
def test_a_grid_takes_one_plane_for_each_bit_however_its_scale_is_spelled(bits, signed, scale):
    """Differences of neighbouring levels carry the rounding of both; the step must not come from one of them."""
    numbers = np.float32(np.arange(2**bits) - signed * 2 ** (bits - 1))
    scale, top = np.float32(scale), np.float32(2**bits - 1)
    for levels in (numbers * scale, numbers / scale, numbers / top * scale, numbers / (top / scale), numbers * (np.float32(1) / top)):
        assert activation_planes(np.unique(levels)).count == bits
