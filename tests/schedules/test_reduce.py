"""Global pooling and softmax against their references, at every instruction-set level that this machine has."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules import reduce
from tests.schedules.float_kernels import EPILOGUES, RUNNABLE, check, epilogue_names, execute, small_integers


def run_pool(isa, op, spatial, channels, epilogue, images, seed, schedule=None):
    rng = np.random.default_rng(seed)
    spec = specs.GlobalPool(op, spatial, channels, EPILOGUES[epilogue])
    data = small_integers(rng, (images, *spatial, channels), -50, 50)
    check(reduce, spec, isa, [data], None, channels, (images, 1, 1), rng, schedule)


def run_softmax(isa, rows, classes, spread, seed):
    spec = specs.Softmax(classes)
    data = (np.random.default_rng(seed).standard_normal((rows, classes)) * spread).astype(np.float32)
    kernel = reduce.build(spec, reduce.default_schedule(spec, isa), isa)
    (got,) = execute(kernel, isa, [data], [], spec.epilogue, classes, (rows,))
    (expected,) = reduce.reference(spec, [data], [])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-37)
    np.testing.assert_allclose(got.sum(axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@settings(max_examples=10, deadline=None)
@given(
    op=st.sampled_from(["avg", "max"]),
    spatial=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.integers(1, 300),
    epilogue=epilogue_names(),
    images=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_global_pool(isa, op, spatial, channels, epilogue, images, seed):
    run_pool(isa, op, spatial, channels, epilogue, images, seed)


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
def test_every_schedule_of_the_space_is_correct(isa):
    for schedule in reduce.space(specs.GlobalPool("avg", (3, 3), 200), isa):
        run_pool(isa, "avg", (3, 3), 200, "residual_and_bits", 2, 1, schedule)


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@settings(max_examples=5, deadline=None)
@given(rows=st.integers(1, 5), classes=st.integers(1, 300), spread=st.sampled_from([0.1, 3, 100]), seed=st.integers(0, 99))
def test_softmax(isa, rows, classes, spread, seed):
    run_softmax(isa, rows, classes, spread, seed)


def test_softmax_of_equal_and_masked_classes():
    isa, spec = RUNNABLE[0], specs.Softmax(20)
    data = np.full((2, 20), 1e30, np.float32)
    data[1, 4:] = -np.inf
    kernel = reduce.build(spec, reduce.default_schedule(spec, isa), isa)
    (got,) = execute(kernel, isa, [data], [], spec.epilogue, 20, (2,))
    np.testing.assert_allclose(got, np.where(np.isinf(data), 0, [[1 / 20], [1 / 4]]), rtol=1e-6)
