"""Grouped float convolutions with input channels in pairs, at every level that this machine has."""

from functools import partial

import numpy as np
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules import float_conv2d, float_conv2d_paired
from tests.schedules.float_kernels import EPILOGUES, RUNNABLE, check, geometries, small_integers

BITS = ["bits", "residual_and_bits"]


def paired(spec, isa):
    return [s for s in float_conv2d.space(spec, isa) if s.paired]


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@settings(max_examples=8, deadline=None, phases=[Phase.generate])
@given(
    window=geometries(), groups=st.integers(2, 9), per_in=st.sampled_from([2, 4, 6]),
    epilogue=st.sampled_from([*BITS, "plain", "bias_relu"]), images=st.integers(1, 2), pick=st.integers(0, 99), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_geometry(isa, window, groups, per_in, epilogue, images, pick, seed):
    """Groups that do not fill the last block among them."""
    spec = specs.FloatConv2d(window, groups * per_in, groups * isa.lanes // 2, groups, EPILOGUES[epilogue])
    found = paired(spec, isa)
    assume(found)  # a wide kernel leaves no registers
    rng = np.random.default_rng(seed)
    data = small_integers(rng, (images, window.in_height, window.in_width, spec.in_channels))
    weights = small_integers(rng, (spec.out_channels, *window.kernel, per_in))
    dims = images, window.out_height, window.out_width
    check(float_conv2d, spec, isa, [data], weights, spec.out_channels, dims, rng, found[pick % len(found)])


def test_which_layers():
    isa, window = RUNNABLE[0], specs.Window(9, 30, (3, 3), (1, 1), (1, 1, 1, 1))
    layer = partial(specs.FloatConv2d, window)
    half = isa.lanes // 2
    assert paired(layer(16, 4 * half, 4), isa)
    for other in (layer(16, 16), layer(12, 4 * half, 4), layer(16, 8 * half, 4), layer(16, 4 * half, 4, planar=True)):
        assert not float_conv2d_paired.fits(other, isa) and not paired(other, isa)
