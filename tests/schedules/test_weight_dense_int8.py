"""Dense layers of 8-bit data and packed weights against their reference, at every instruction-set level that this machine has."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules import weight_dense_int8 as family
from tests.schedules.kernels import ISAS, Kernel, assert_same, epilogue_inputs, epilogue_outputs, thresholds
from tests.schedules.packed_weights import CODINGS, random_weights

EPILOGUES = {"int32": specs.store("int32", "int32"), "float32": specs.store("float32", "int32"), "bits": thresholds("less", "greater")}


def run(isa, features, coding, epilogue, seed, row_counts, schedule=None):
    """One kernel, for several numbers of rows: single rows, tiles, and tasks of several tiles are different code."""
    rng = np.random.default_rng(seed)
    spec = specs.WeightDenseInt8(*features, coding, EPILOGUES[epilogue])
    kernel = Kernel(family, spec, isa, schedule)
    weights, _ = random_weights(rng, coding, features[::-1])
    for rows in row_counts:
        data = rng.choice([-128, 127, *range(-128, 128, 5)], (rows, features[0])).astype(np.float32)
        inputs = epilogue_inputs(rng, spec.epilogue, features[1], (rows,), spread=int(100 * features[0] ** 0.5))
        packed = family.pack_weights(spec, kernel.schedule, isa, weights)
        got = kernel.run([data, packed, *inputs], epilogue_outputs(spec.epilogue, features[1], (rows,)))
        assert_same(got, family.reference(spec, [data, weights], inputs), f"{rows} rows of {spec} {kernel.schedule} {isa.name}")


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=4, deadline=None, phases=(Phase.generate,))
@given(
    features=st.tuples(st.integers(1, 100), st.integers(1, 150)),
    coding=st.sampled_from(CODINGS[:2]),
    epilogue=st.sampled_from(list(EPILOGUES)),
    rows=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_any_size(isa, features, coding, epilogue, rows, seed):
    run(isa, features, coding, epilogue, seed, (1, rows))


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_sums(isa):
    """The largest products that bytes and masked fields can make, in one long sum."""
    spec = specs.WeightDenseInt8(4096, 32, CODINGS[1], EPILOGUES["int32"])
    kernel = Kernel(family, spec, isa)
    plus = np.full((1, 32, 128), 0xFFFFFFFF, np.uint32)
    weights = np.concatenate([plus, np.zeros_like(plus)])
    for rows, value in ((1, -128), (60, -128), (60, 127)):
        data = np.full((rows, 4096), value, np.float32)
        packed = family.pack_weights(spec, kernel.schedule, isa, weights)
        assert np.all(kernel.run([data, packed], [((rows, 32), "int32")])[0] == 4096 * value)


@pytest.mark.parametrize("coding", CODINGS[:2], ids=str)
def test_tiles_of_rows(coding):
    """Numbers of rows around those that fill tiles, groups of tiles and tasks; the last step of 64 features is not full."""
    run(ISAS[0].values[0], (197, 150), coding, "bits", 5, (15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 150))


@pytest.mark.parametrize("coding", CODINGS[:2], ids=str)
def test_without_instructions_for_bytes(coding):
    isa = replace(ISAS[-1].values[0], products="")
    run(isa, (70, 40), coding, "int32", 3, (1, 5))


@pytest.mark.parametrize("coding", CODINGS[:2], ids=str)
def test_every_schedule_of_the_space_is_correct(coding):
    isa = ISAS[0].values[0]
    for schedule in family.space(specs.WeightDenseInt8(70, 300, coding), isa):
        run(isa, (70, 300), coding, "int32", 3, (1, 5, 70), schedule)
