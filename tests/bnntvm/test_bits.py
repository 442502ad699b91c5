"""Packing and unpacking of planes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnntvm.bits import pack_bits, unpack_bits


@given(st.integers(1, 100), st.integers(0, 2**32))
def test_round_trip_and_tail(channels, seed):
    plane = np.random.default_rng(seed).random((3, channels)) < 0.5
    words = pack_bits(plane)
    assert words.dtype == np.uint32 and words.shape == (3, -(-channels // 32))
    np.testing.assert_array_equal(unpack_bits(words, channels), plane)
    assert not unpack_bits(words, 32 * words.shape[-1])[:, channels:].any()


def test_channel_c_is_bit_c_of_its_word():
    plane = np.zeros(70, bool)
    plane[[0, 33, 69]] = True
    np.testing.assert_array_equal(pack_bits(plane), np.array([1, 1 << 1, 1 << 5], np.uint32))


@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 1, 0), (0, 2, 1)])
def test_any_memory_order(axes):
    plane = (np.random.default_rng(0).random((5, 3, 40)) < 0.5).transpose(axes)
    np.testing.assert_array_equal(pack_bits(plane), pack_bits(np.ascontiguousarray(plane)))
