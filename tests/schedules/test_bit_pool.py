"""Pooling of packed bits against numpy: windows, pads, dilations, channel counts, all ISA levels."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules import bit_pool, epilogue
from tests.schedules.kernels import ISAS, Kernel, assert_same


def check(spec, isa, rng, schedule=None):
    kernel, window = Kernel(bit_pool, spec, isa, schedule), spec.window
    for images in (1, 3):
        bits = rng.random((images, window.in_height, window.in_width, spec.channels)) < rng.choice([0.2, 0.8])
        data = epilogue.pack(bits)
        shape = (images, window.out_height, window.out_width, specs.words(spec.channels))
        assert_same(kernel.run([data], [(shape, np.uint32)]), bit_pool.reference(spec, [data]), f"{spec}, {isa.name}")


@st.composite
def windows(draw):
    """Windows of every kind, some of which lie in the padding altogether."""
    size = draw(st.tuples(st.integers(1, 20), st.integers(1, 40)))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    dilations = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3)]))
    strides = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    pads = list(draw(st.tuples(*[st.integers(0, 3)] * 4)))
    for axis in (0, 1):  # the window must fit at least once
        reach = dilations[axis] * (kernel[axis] - 1) + 1
        pads[axis + 2] += max(0, reach - size[axis] - pads[axis] - pads[axis + 2])
    return specs.Window(*size, kernel, strides, tuple(pads), dilations)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    window=windows(),
    channels=st.integers(1, 130) | st.sampled_from([256, 300, 600]),
    op=st.sampled_from(["and", "or"]),
    rows=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_matches_reference(isa, window, channels, op, rows, seed):
    schedule = None if rows is None else bit_pool.Schedule(rows)
    check(specs.BitPool(window, channels, op), isa, np.random.default_rng(seed), schedule)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels", [64, 100, 512])
@pytest.mark.parametrize("kernel, pads", [(3, (1, 1, 1, 1)), (2, (0, 0, 0, 0))])
def test_usual_pools(isa, channels, kernel, pads):
    window = specs.Window(28, 30, (kernel, kernel), (2, 2), pads)
    check(specs.BitPool(window, channels, "and"), isa, np.random.default_rng(0))


def test_tail_bits_stay_zero_where_all_is_padding():
    spec = specs.BitPool(specs.Window(2, 2, (2, 2), (1, 1), (3, 3, 3, 3)), 40, "and")
    data = np.zeros((1, 2, 2, 2), np.uint32)
    shape = (1, spec.window.out_height, spec.window.out_width, 2)
    (result,) = Kernel(bit_pool, spec, ISAS[0].values[0]).run([data], [(shape, np.uint32)])
    assert (result[0, 0, 0] == [0xFFFFFFFF, 0xFF]).all() and (result[0, 3, 3] == 0).all()


def test_unknown_operation():
    with pytest.raises(ValueError, match="xor"):
        bit_pool.build(specs.BitPool(specs.Window(2, 2, (2, 2)), 8, "xor"), bit_pool.Schedule(1), ISAS[0].values[0])
