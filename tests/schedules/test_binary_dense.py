"""Binary dense layers against numpy: all planes, odd sizes, any number of rows, all ISA levels."""

import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules import binary_dense, epilogue
from tests.schedules.kernels import ISAS, Kernel, assert_same, epilogue_inputs, epilogue_outputs, thresholds

STEP, OUTPUT, INPUT = specs.Step, specs.Output, specs.EpilogueInput
EPILOGUES = {
    "accumulators": specs.store("int32", "int32"),
    "float": specs.Epilogue(
        (INPUT("channel"), INPUT("channel"), INPUT("tensor")),
        (STEP("cast", (0,)), STEP("multiply", (4, 1)), STEP("add", (5, 2)), STEP("add", (6, 3))),
        (OUTPUT("tensor", 7),),
    ),
    "thresholds": thresholds("less", "less_equal", "greater", "greater_equal"),
    "mirrored": specs.Epilogue(
        (INPUT("channel", "int32"),),
        (STEP("less", (1, 0), "bool"), STEP("greater_equal", (3.0, 0), "bool"), STEP("equal", (0, 1), "bool")),
        (OUTPUT("bits", 2), OUTPUT("bits", 3), OUTPUT("bits", 4), OUTPUT("tensor", 0, "int32")),
    ),
}


def operands(rng, spec, rows):
    """Random planes. Most rows have no zeros, some have a few, some have many."""
    data = rng.random((rows, spec.in_features)) < 0.5
    weights = epilogue.pack(rng.random((spec.out_features, spec.in_features)) < 0.5)
    if not spec.zeros:
        return [epilogue.pack(data), weights]
    mask = rng.random(data.shape) < rng.choice([0, 0, 0.01, 0.5], (rows, 1))
    return [epilogue.pack(data & ~mask), weights, epilogue.pack(mask)]


def check(kernel, rows, rng):
    spec = kernel.spec
    plain = operands(rng, spec, rows)
    inputs = epilogue_inputs(rng, spec.epilogue, spec.out_features, (rows,), spread=int(spec.in_features**0.5) + 1)
    packed = [plain[0], binary_dense.pack_weights(spec, kernel.schedule, kernel.isa, plain[1]), *plain[2:]]
    actual = kernel.run([*packed, *inputs], epilogue_outputs(spec.epilogue, spec.out_features, (rows,)))
    assert_same(actual, binary_dense.reference(spec, plain, inputs), f"{spec} with {rows} rows, {kernel.schedule}, {kernel.isa.name}")


@st.composite
def layers(draw):
    planes = draw(st.sampled_from(["bipolar", "bipolar", "unipolar", "zeros"]))
    return specs.BinaryDense(
        draw(st.integers(1, 130) | st.integers(131, 2600)),
        draw(st.integers(1, 130) | st.integers(131, 400)),
        planes == "unipolar",
        planes == "zeros",
        EPILOGUES[draw(st.sampled_from(sorted(EPILOGUES)))],
    )


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(spec=layers(), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_matches_reference(isa, spec, seed, data):
    schedule = data.draw(st.sampled_from([binary_dense.default_schedule(spec, isa), *binary_dense.space(spec, isa)]))
    kernel, rng = Kernel(binary_dense, spec, isa, schedule), np.random.default_rng(seed)
    for rows in (1, 2, 3, 5, 7, 8, 13, 14, 31):
        check(kernel, rows, rng)


@pytest.mark.parametrize("isa", ISAS)
def test_thresholds_at_every_accumulator(isa):
    """The comparison is made on popcounts; every accumulator meets every threshold around it, for odd and even K."""
    for features in (7, 8):
        spec = specs.BinaryDense(features, 64, epilogue=thresholds("less", "less_equal", "greater", "greater_equal"))
        kernel = Kernel(binary_dense, spec, isa)
        data = epilogue.pack(np.arange(features + 1)[:, None] > np.arange(features))  # row r has r ones
        weights = np.zeros((64, 1), np.uint32)
        limits = np.resize(np.r_[np.arange(-features - 2, features + 3), -(2**31), -(2**31) + 1, 2**31 - 1], 64).astype(np.int32)
        inputs = [limits, np.zeros(2, np.uint32)]
        packed = binary_dense.pack_weights(spec, kernel.schedule, isa, weights)
        actual = kernel.run([data, packed, *inputs], epilogue_outputs(spec.epilogue, 64, (features + 1,)))
        assert_same(actual, binary_dense.reference(spec, [data, weights], inputs), f"K = {features}")


@pytest.mark.parametrize("isa", [p for p in ISAS if p.values[0].popcount == "vector"])
@pytest.mark.parametrize("adder", ["plain", "carry_save"])
def test_inner_loop_counts_and_does_nothing_else(isa, adder):
    """Nothing in the hot loop but three operations a word, or five a pair, the loads, and the loop itself; no register is spilled."""
    spec = specs.BinaryDense(1024, 1024, epilogue=thresholds("less"))
    schedule = binary_dense.Schedule(7, 1, 2) if adder == "plain" else binary_dense.default_schedule(spec, isa)
    kernel = Kernel(binary_dense, spec, isa, schedule)
    blocks = re.split(r"\n(?=\.L\w+:)", kernel.assembly)
    pairs = adder == "carry_save"
    counts = schedule.rows * schedule.unroll // 2 if pairs else schedule.rows * 2 * schedule.unroll
    loops = [b.split("jne")[0] for b in blocks if b.split("jne")[0].count("vpopcntd") == counts]
    hot = [re.findall(r"^\t([a-z]\w+)", loop, re.MULTILINE) for loop in loops if "jne" not in loop]
    assert hot
    for loop in hot:
        count = {name: loop.count(name) for name in set(loop)}
        assert count.pop("vpxord") == count.pop("vpopcntd") == count.pop("vpaddd", 0) + count.pop("vpsubd", 0) == counts
        assert count.pop("vpternlogd", 0) == 2 * counts * pairs
        count.pop("vpbroadcastd", None), count.pop("vmovdqa64", None), count.pop("vmovdqu64", None)
        assert sum(count.values()) <= 4, count
    assert not any(re.search(r"%zmm\d+, -?\d*\(%rsp", loop) for loop in loops), "a vector register is spilled"


def test_unipolar_data_have_no_zeros_plane():
    with pytest.raises(ValueError, match="zeros"):
        binary_dense.build(specs.BinaryDense(32, 32, True, True), binary_dense.Schedule(1, 1, 1), ISAS[0].values[0])
