"""Dense layers with packed weights against their reference, at every instruction-set level that this machine has."""

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules import weight_dense
from tests.schedules.float_kernels import EPILOGUES, epilogue_inputs, epilogue_names, execute, small_integers
from tests.schedules.packed_weights import CODINGS, WIDTHS, random_weights


def run(isa, rows, features, coding, epilogue, seed, schedule=None):
    rng = np.random.default_rng(seed)
    spec = specs.WeightDense(*features, coding, EPILOGUES[epilogue])
    schedule = schedule or weight_dense.default_schedule(spec, isa)
    data, (planes, levels) = small_integers(rng, (rows, features[0])), random_weights(rng, coding, features[::-1])
    inputs = epilogue_inputs(rng, spec.epilogue, features[1], (rows,))
    packed = [data, weight_dense.pack_weights(spec, schedule, isa, planes), *levels]
    got = execute(weight_dense.build(spec, schedule, isa), isa, packed, inputs, spec.epilogue, features[1], (rows,))
    for actual, expected in zip(got, weight_dense.reference(spec, [data, planes, *levels], inputs), strict=True):
        np.testing.assert_array_equal(actual, expected, err_msg=f"{spec} {schedule} {isa.name}")


@pytest.mark.parametrize("isa", WIDTHS, ids=lambda isa: isa.name)
@settings(max_examples=6, deadline=None, phases=(Phase.generate,))
@given(
    rows=st.integers(1, 40),
    features=st.tuples(st.integers(1, 100), st.integers(1, 150)),
    coding=st.sampled_from(CODINGS),
    epilogue=epilogue_names(rank=2),
    seed=st.integers(0, 99),
)
def test_any_size(isa, rows, features, coding, epilogue, seed):
    run(isa, rows, features, coding, epilogue, seed)


@pytest.mark.parametrize(
    "isa, coding", [(WIDTHS[0], CODINGS[0]), (WIDTHS[0], CODINGS[4]), (WIDTHS[-1], CODINGS[1])], ids=["sign", "levels", "ternary"]
)
def test_every_schedule_of_the_space_is_correct(isa, coding):
    for schedule in weight_dense.space(specs.WeightDense(70, 300, coding), isa):
        run(isa, 17, (70, 300), coding, "bias_relu", 3, schedule)
