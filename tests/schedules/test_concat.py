"""Channel concatenation against numpy, at every instruction-set level that this machine has."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules import concat
from tests.schedules.float_kernels import EPILOGUES, RUNNABLE, check, epilogue_names, small_integers


def run(isa, dims, channels, epilogue, seed, schedule=None):
    rng = np.random.default_rng(seed)
    spec = specs.Concat(len(dims) + 1, dims[1:], channels, EPILOGUES[epilogue])
    parts = [small_integers(rng, (*dims, c)) for c in channels]
    check(concat, spec, isa, parts, None, sum(channels), dims, rng, schedule)


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@settings(max_examples=12, deadline=None)
@given(
    dims=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)),
    channels=st.lists(st.one_of(st.integers(1, 80), st.sampled_from([32, 64, 96])), min_size=1, max_size=4),
    epilogue=epilogue_names(),
    seed=st.integers(0, 99),
)
def test_any_parts(isa, dims, channels, epilogue, seed):
    run(isa, dims, tuple(channels), epilogue, seed)


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@pytest.mark.parametrize("channels", [(64, 32), (32, 96, 20), (300, 7)])
@pytest.mark.parametrize("epilogue", ["plain", "residual_and_bits"])
def test_matrices_and_long_parts(isa, channels, epilogue):
    run(isa, (5,), channels, epilogue, seed=1)


def test_every_schedule_of_the_space_is_correct():
    for schedule in concat.space(specs.Concat(4, (2, 2), (500, 9)), RUNNABLE[0]):
        run(RUNNABLE[0], (2, 2, 2), (500, 9), "plain", 1, schedule)


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@pytest.mark.parametrize("words", [(2, 2, 2), (1, 5, 3), (16, 40)])
def test_packed_words(isa, words):
    rng = np.random.default_rng(2)
    spec = specs.Concat(4, (3, 2), words, specs.store("uint32", "uint32"), "uint32")
    parts = [rng.integers(0, 1 << 32, (2, 3, 2, count), np.uint32) for count in words]
    check(concat, spec, isa, parts, None, sum(words), (2, 3, 2), rng)
