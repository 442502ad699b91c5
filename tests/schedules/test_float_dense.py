"""The float dense layer against its reference, at every instruction-set level that this machine has."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules import float_dense
from tests.schedules.float_kernels import EPILOGUES, RUNNABLE, check, epilogue_names, sample, small_integers


def run(isa, rows, features, epilogue, seed, schedule=None):
    rng = np.random.default_rng(seed)
    spec = specs.FloatDense(*features, EPILOGUES[epilogue])
    data, weights = small_integers(rng, (rows, features[0])), small_integers(rng, features[::-1])
    check(float_dense, spec, isa, [data], weights, features[1], (rows,), rng, schedule)


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@settings(max_examples=10, deadline=None)
@given(
    rows=st.integers(1, 40),
    features=st.tuples(st.integers(1, 70), st.integers(1, 100)),
    epilogue=epilogue_names(rank=2),
    seed=st.integers(0, 99),
)
def test_any_size(isa, rows, features, epilogue, seed):
    run(isa, rows, features, epilogue, seed)


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_classifier(isa, rows):
    run(isa, rows, (512, 1000), "bias_relu", seed=1)


def test_schedules_of_the_space_are_correct():
    for schedule in sample(float_dense.space(specs.FloatDense(300, 70), RUNNABLE[0])):
        run(RUNNABLE[0], 29, (300, 70), "bias_relu", 3, schedule)


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@pytest.mark.parametrize("depth", [15, 32, 100])
def test_reduction_in_chunks(isa, depth):
    schedule = replace(float_dense.default_schedule(specs.FloatDense(depth, 300), isa), chunk=32, group=3, tiles=2)
    run(isa, 60, (depth, 300), "bias_relu", 3, schedule)
