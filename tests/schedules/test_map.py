"""Elementwise and packing kernels against numpy: ranks, channel counts, joined rows, all ISA levels, and the packing loop itself."""

import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules import map as family
from tests.schedules.kernels import ISAS, Kernel, assert_same, epilogue_inputs, epilogue_outputs, thresholds

STEP, OUTPUT, INPUT = specs.Step, specs.Output, specs.EpilogueInput
SIGN = specs.Epilogue((), (STEP("less", (0, 0.0), "bool"),), (OUTPUT("bits", 1),))
SIGN_THRESHOLD = specs.Epilogue((INPUT("channel"),), (STEP("less", (0, 1), "bool"),), (OUTPUT("bits", 2),))
EPILOGUES = {
    "sign": SIGN,
    "sign_and_zeros": specs.Epilogue(
        (), (STEP("less", (0, 0.0), "bool"), STEP("equal", (0, 0.0), "bool")), (OUTPUT("bits", 1), OUTPUT("bits", 2))
    ),
    "threshold": SIGN_THRESHOLD,
    "relu": specs.Epilogue((), (STEP("relu", (0,)),), (OUTPUT("tensor", 1),)),
    "norm": specs.Epilogue(
        (INPUT("channel"), INPUT("channel"), INPUT("tensor")),
        (STEP("multiply", (0, 1)), STEP("add", (4, 2)), STEP("add", (5, 3))),
        (OUTPUT("tensor", 6),),
    ),
    "everything": specs.Epilogue(
        (INPUT("channel"), INPUT("pixel"), INPUT("image"), INPUT("tensor"), INPUT("words", "uint32")),
        (STEP("less", (0, 1), "bool"), STEP("multiply", (0, 2)), STEP("add", (7, 3)), STEP("add", (8, 4))),
        (OUTPUT("bits", 6, flip=5), OUTPUT("tensor", 9)),
    ),
}


def check(kernel, leading, rng):
    spec = kernel.spec
    dims = (leading, *spec.spatial)
    data = rng.integers(-3, 3, (*dims, spec.channels), endpoint=True) * rng.choice([0.5, 1.0, 1.25])
    data = data.astype(spec.dtype)
    inputs = epilogue_inputs(rng, spec.epilogue, spec.channels, dims)
    actual = kernel.run([data, *inputs], epilogue_outputs(spec.epilogue, spec.channels, dims))
    assert_same(actual, family.reference(spec, [data], inputs), f"{spec}, leading {leading}, {kernel.isa.name}")


@st.composite
def maps(draw):
    name = draw(st.sampled_from([*EPILOGUES, "integer"]))
    rank = 4 if name == "everything" else draw(st.sampled_from([2, 4]))
    spatial = draw(st.tuples(st.integers(1, 5), st.integers(1, 5))) if rank == 4 else ()
    channels = draw(st.integers(1, 130) | st.sampled_from([256, 513, 700, 4097]))
    if name == "integer":
        return specs.Map(rank, spatial, channels, "int32", thresholds("less", "greater_equal"))
    return specs.Map(rank, spatial, channels, "float32", EPILOGUES[name])


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(spec=maps(), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_matches_reference(isa, spec, seed, data):
    schedule = data.draw(st.sampled_from([family.default_schedule(spec, isa), family.Schedule(256, 1), family.Schedule(4096, 8)]))
    kernel, rng = Kernel(family, spec, isa, schedule), np.random.default_rng(seed)
    for leading in (1, 2, 5, 33):
        check(kernel, leading, rng)


@pytest.mark.parametrize("isa", [p for p in ISAS if p.values[0].lanes == 16])
@pytest.mark.parametrize("epilogue", [SIGN, SIGN_THRESHOLD], ids=["sign", "threshold"])
def test_packing_loop_is_compare_join_store(isa, epilogue):
    """32 channels cost two comparisons with memory, one join of masks and one store."""
    kernel = Kernel(family, specs.Map(2, (), 64, "float32", epilogue), isa)
    loops = [b.split("jne")[0] for b in re.split(r"\n(?=\.L\w+:)", kernel.assembly) if b.count("kunpckwd") >= 2 and "jne" in b]
    assert loops
    body = re.findall(r"^\t([a-z]\w+)", max(loops, key=len), re.MULTILINE)
    words = body.count("kunpckwd")
    assert body.count("kmovd") == words
    assert len([i for i in body if i.startswith("vcmp")]) == 2 * words
    assert len(body) <= 4 * words + 4, body
