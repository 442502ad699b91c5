"""Float layers on tensor cores: three products of tf32 for each of float32, as the emulator runs them and as they are compiled."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import cuda_cases
from bnntvm import spec as specs
from bnntvm.schedules.cuda import emulate, float_conv2d, float_dense, functions, patches, rows, tf32, tf32_dense
from bnntvm.targets import registry
from tests.schedules.cuda.compiler import compiled, needs_nvcc, source, usage
from tests.schedules.cuda.floats import EPILOGUES, ISA, check, epilogue_names, execute, geometries, small_integers

FEW = settings(max_examples=8, deadline=None, derandomize=True)
MANY = settings(max_examples=20, deadline=None, derandomize=True)
HOPPER = registry.resolve("sm_90a")
STEM = specs.FloatConv2d(specs.Window(224, 224, (7, 7), (2, 2), (3, 3, 3, 3)), 3, 64, 1, EPILOGUES["bias_relu"], True)
POINTWISE = specs.FloatConv2d(specs.Window(28, 28, (1, 1)), 128, 256, 1, EPILOGUES["residual_and_bits"])
MMA = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
WGMMA = "wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32"
#: Bytes of spills, stores and loads, that are no matter: a few values that live through the loops.
FEW_BYTES = 128
ISAS = st.sampled_from([ISA, HOPPER])


def schedules(spec, isa=ISA):
    return [s for s in float_conv2d.space(spec, isa) if isinstance(s, tf32.Schedule)]


def operands(rng, spec, images, make=small_integers):
    window = spec.window
    image = (window.in_height, window.in_width)
    data = make(rng, (images, spec.in_channels, *image) if spec.planar else (images, *image, spec.in_channels))
    return data, make(rng, (spec.out_channels, *window.kernel, spec.in_channels))


def of_each_kind(spec):
    """A schedule of warps whose blocks stay and one whose do not, and of warpgroups, with their architectures."""
    kinds = {}
    for isa in (ISA, HOPPER):
        for schedule in schedules(spec, isa):
            kinds.setdefault((schedule.resident, schedule.grouped), (schedule, isa))
    assert len(kinds) == 3
    return kinds.values()


def exactly(spec, images, seed, schedule, isa=ISA):
    """Numbers of few bits: the reference, bit by bit."""
    rng = np.random.default_rng(seed)
    data, weights = operands(rng, spec, images)
    dims = (images, spec.window.out_height, spec.window.out_width)
    check(float_conv2d, spec, [data], weights, spec.out_channels, dims, rng, schedule, isa=isa)


def run(spec, schedule, data, weights, isa=ISA):
    """The result, channels last, of a convolution that stores its sums."""
    shape = (len(data), spec.window.out_height, spec.window.out_width, spec.out_channels)
    arrays = [data, float_conv2d.pack_weights(spec, schedule, isa, weights)]
    return execute(float_conv2d.build(spec, schedule, isa), arrays, [(shape, "float32")])[0]


def normal(rng, shape):
    return rng.normal(size=shape).astype(np.float32)


# Whole kernels ------------------------------------------------------------------------------------------------------------------------


@MANY
@given(
    window=geometries(most=9, kernel=3), channels=st.tuples(st.integers(1, 9), st.integers(1, 70)), epilogue=epilogue_names(),
    images=st.integers(1, 3), planar=st.booleans(), seed=st.integers(0, 999),
    isa=ISAS,
)  # fmt: skip
def test_convolutions(window, channels, epilogue, images, planar, seed, isa):
    spec = specs.FloatConv2d(window, *channels, 1, EPILOGUES[epilogue], planar)
    found = schedules(spec, isa)
    exactly(spec, images, seed, found[seed % len(found)], isa)


@FEW
@given(
    window=geometries(most=9, kernel=3), fours=st.integers(1, 12), outputs=st.integers(1, 140), epilogue=epilogue_names(),
    images=st.integers(1, 2), seed=st.integers(0, 999), isa=ISAS,
)  # fmt: skip
def test_channels_that_come_four_at_a_time(window, fours, outputs, epilogue, images, seed, isa):
    spec = specs.FloatConv2d(window, 4 * fours, outputs, 1, EPILOGUES[epilogue])
    assert tf32.in_fours(float_conv2d.problem_of(spec))
    found = schedules(spec, isa)
    exactly(spec, images, seed, found[seed % len(found)], isa)


@FEW
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 9)), channels=st.tuples(st.integers(1, 70), st.integers(1, 140)),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)), epilogue=epilogue_names(), images=st.integers(1, 4), seed=st.integers(0, 999),
    isa=ISAS,
)  # fmt: skip
def test_pointwise_convolutions(size, channels, strides, epilogue, images, seed, isa):
    spec = specs.FloatConv2d(specs.Window(*size, (1, 1), strides), *channels, 1, EPILOGUES[epilogue])
    found = schedules(spec, isa)
    exactly(spec, images, seed, found[seed % len(found)], isa)


@pytest.mark.parametrize("isa", [ISA, HOPPER], ids=lambda isa: isa.name)
def test_a_stem(isa):
    spec = specs.FloatConv2d(specs.Window(31, 29, (7, 7), (2, 2), (3, 3, 3, 3)), 3, 64, 1, EPILOGUES["bias_relu"], True)
    schedule = float_conv2d.default_schedule(spec, isa)
    assert isinstance(schedule, tf32.Schedule) and schedule.resident and schedule.grouped is isa.wgmma
    exactly(spec, 2, 3, schedule, isa)


def test_blocks_that_stay_take_all_tiles():
    """More tiles than blocks: each takes several, with stages of the ring that go on from one to the next."""
    few = dataclasses.replace(HOPPER, multiprocessors=1)
    spec = specs.FloatConv2d(specs.Window(24, 25, (3, 3), (1, 1), (1, 1, 1, 1)), 12, 40, 1, EPILOGUES["bias_relu"])
    rng = np.random.default_rng(0)
    data, weights = operands(rng, spec, 2)
    channel = np.zeros(64, np.float32)
    expected = float_conv2d.reference(spec, [data, weights], [channel])[0]
    stay = [s for s in schedules(spec, few) if s.resident and s.units == 8 and s.warps[1] == 1]
    for stages, grouped in itertools.product((2, 3), (False, True)):
        schedule = next(s for s in stay if (s.stages, s.grouped) == (stages, grouped))
        assert tf32.Layout(float_conv2d.problem_of(spec), schedule).chunks == 2
        arrays = [data, float_conv2d.pack_weights(spec, schedule, few, weights), channel]
        (got,) = execute(float_conv2d.build(spec, schedule, few), arrays, [(expected.shape, "float32")])
        np.testing.assert_array_equal(got, expected)


@MANY
@given(
    count=st.one_of(st.integers(1, 40), st.integers(60, 150)), fours=st.integers(16, 60), outputs=st.integers(1, 70),
    epilogue=epilogue_names(2), slices=st.sampled_from([4, 8]), seed=st.integers(0, 99),
)  # fmt: skip
def test_dense_layers(count, fours, outputs, epilogue, slices, seed):
    """Few rows and many; features that fill no group of 16, and no share of the warps."""
    rng, spec = np.random.default_rng(seed), specs.FloatDense(4 * fours, outputs, EPILOGUES[epilogue])
    schedule = next((s for s in float_dense.space(spec, ISA) if s == tf32_dense.Schedule(slices)), None)
    assert (schedule is not None) is (4 * fours >= 16 * slices)
    data, weights = small_integers(rng, (count, 4 * fours)), small_integers(rng, (outputs, 4 * fours))
    check(float_dense, spec, [data], weights, outputs, (count,), rng, schedule)


# Numbers --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planar", [False, True])
def test_sums_are_those_of_float32(planar):
    """As far from exact ones as float32 may be: an ulp of what is added up for the sum of steps of eight, 2^-20 for the products."""
    spec = specs.FloatConv2d(specs.Window(9, 8, (3, 3), (1, 1), (1, 1, 1, 1)), 32, 40, 1, specs.store(), planar)
    rng = np.random.default_rng(5)
    data, weights = operands(rng, spec, 2, normal)
    exact = float_conv2d.reference(spec, [data.astype(np.float64), weights.astype(np.float64)], [])[0]
    absolute = float_conv2d.reference(spec, [abs(data).astype(np.float64), abs(weights).astype(np.float64)], [])[0]
    for schedule, isa in of_each_kind(spec):
        got = run(spec, schedule, data, weights, isa)
        error = abs(got - exact) / absolute
        assert error.max() < 2.0**-20 and np.sqrt((error**2).mean()) < 2.0**-23
    cut = [functions.truncated(data).astype(np.float64), tf32.split(weights)[0].astype(np.float64)]
    one_product = float_conv2d.reference(spec, cut, [])[0]
    assert (abs(one_product - exact) / absolute).max() > 2.0**-14  # what a single product of tf32 would give


def test_weights_are_split_without_loss():
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2**32, 100000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([values, np.float32([0.0, -0.0, 1e-45, -1e-45, np.finfo(np.float32).max, np.inf, -np.inf, np.nan])])
    big, rest = tf32.split(values)
    finite = np.isfinite(values)
    assert np.isfinite(big[finite]).all() and (rest[~finite] == 0).all()
    np.testing.assert_array_equal(big[~finite], values[~finite])
    np.testing.assert_array_equal((big + rest)[finite], values[finite])
    np.testing.assert_array_equal(functions.truncated(big[finite]), big[finite])
    normal_ones = finite & (abs(values) > 1e-37) & (abs(values) < 3.39e38)
    assert (abs(rest)[normal_ones] <= abs(values)[normal_ones] * 2.0**-11).all()


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_infinity_stays_infinity(planar, bad):
    """Whatever the rest of an infinity is; weights among which are such without a rest, and zeros."""
    spec = specs.FloatConv2d(specs.Window(9, 8, (3, 3), (1, 1), (1, 1, 1, 1)), 8, 40, 1, specs.store(), planar)
    rng = np.random.default_rng(2)
    data, weights = operands(rng, spec, 2, normal)
    weights[:, 0], weights[3], weights[4] = 1.0, 0.0, 1e-45
    data.reshape(-1)[[5, 300, 301]] = bad
    with np.errstate(all="ignore"):
        expected = float_conv2d.reference(spec, [data, weights], [])[0]
    strange = ~np.isfinite(expected)
    assert strange.any() and not strange.all()
    for schedule, isa in of_each_kind(spec):
        got = run(spec, schedule, data, weights, isa)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
        np.testing.assert_array_equal(got[strange], expected[strange])
        np.testing.assert_allclose(got[~strange], expected[~strange], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("planar", [False, True])
def test_the_end_of_float32(planar):
    """Products of the largest number: most are infinite, none is cut off, and one times it stays it."""
    spec, largest = specs.FloatConv2d(specs.Window(5, 5, (3, 3)), 4, 40, 1, specs.store(), planar), np.finfo(np.float32).max
    data, weights = operands(np.random.default_rng(4), spec, 1, normal)
    weights[0], data.reshape(-1)[70] = 1.0, largest
    with np.errstate(over="ignore"):
        expected = float_conv2d.reference(spec, [data, weights], [])[0]
    assert np.isinf(expected).any() and (expected == largest).any()
    for schedule, isa in of_each_kind(spec):
        np.testing.assert_allclose(run(spec, schedule, data, weights, isa), expected, rtol=1e-5, atol=1e-5)


def test_weights_that_are_not_finite():
    spec = specs.FloatConv2d(specs.Window(5, 5, (3, 3)), 4, 33, 1, specs.store())
    data, weights = operands(np.random.default_rng(3), spec, 1, normal)
    weights[1, 0, 0, 0], weights[2, 1, 1, 3] = math.inf, math.nan
    expected = float_conv2d.reference(spec, [data, weights], [])[0]
    for schedule, isa in of_each_kind(spec):
        got = run(spec, schedule, data, weights, isa)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
        np.testing.assert_array_equal(got[np.isinf(expected)], expected[np.isinf(expected)])


def test_rests_are_multiplied_too():
    """The cases for a device whose numbers have 13 bits: three products are exact, one or two are not."""
    rng = np.random.default_rng(7)
    half, same = specs.Window(31, 29, (7, 7), (2, 2), (3, 3, 3, 3)), specs.Window(9, 11, (3, 3), (1, 1), (1, 1, 1, 1))
    for spec, (data,), weights, channels, dims, _ in cuda_cases._of_many_bits(rng, half, same):
        if isinstance(spec, specs.FloatDense):
            check(float_dense, spec, [data], weights, channels, dims, rng)
            continue
        schedule, isa = rng.choice(np.array([*of_each_kind(spec)], dtype=object))
        check(float_conv2d, spec, [data], weights, channels, dims, rng, schedule, isa=isa)


@pytest.mark.parametrize("count", [5, 70])
def test_numbers_of_dense_layers(count):
    spec, rng = specs.FloatDense(200, 40, specs.store()), np.random.default_rng(6)
    data, weights = normal(rng, (count, 200)), normal(rng, (40, 200))
    schedule = tf32_dense.Schedule(8)
    kernel, packed = float_dense.build(spec, schedule, ISA), float_dense.pack_weights(spec, schedule, ISA, weights)
    (got,) = execute(kernel, [data, packed], [((count, 40), "float32")])
    exact, absolute = data.astype(np.float64) @ weights.T.astype(np.float64), abs(data).astype(np.float64) @ abs(weights).T
    assert (abs(got - exact) / absolute).max() < 2.0**-20
    data[1, 7], data[2, 8], data[3, 9] = math.inf, -math.inf, math.nan
    weights[3], weights[:, 7] = 0.0, 1.0  # infinity times 0, and times a number without a rest
    with np.errstate(invalid="ignore"):
        expected = (data.astype(np.float64) @ weights.T.astype(np.float64)).astype(np.float32)
    (got,) = execute(kernel, [data, float_dense.pack_weights(spec, schedule, ISA, weights)], [((count, 40), "float32")])
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    np.testing.assert_array_equal(got[~np.isfinite(expected)], expected[~np.isfinite(expected)])


# Which layers ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch, expected", [
    ("sm_75", False), ("sm_80", True), ("sm_86", False), ("sm_89", False), ("sm_90", True), ("sm_90a", True), ("sm_120", False),
])  # fmt: skip
def test_where_tensor_cores_are_the_default(arch, expected):
    """Where they make more than three products in the time of one."""
    isa = registry.resolve(arch)
    for spec in (STEM, POINTWISE):
        assert isinstance(float_conv2d.default_schedule(spec, isa), tf32.Schedule) is expected
        assert bool(schedules(spec, isa)) is isa.tf32 is (arch != "sm_75")


@pytest.mark.parametrize("spec, expected", [
    (specs.FloatConv2d(specs.Window(32, 32, (1, 1)), 3, 64), False),  # K is 3 of 8
    (specs.FloatConv2d(specs.Window(32, 32, (3, 3)), 1, 64), False),  # 9 of 16
    (specs.FloatConv2d(specs.Window(32, 32, (3, 3)), 3, 64), True),  # 27 of 32
    (specs.FloatConv2d(specs.Window(32, 32, (3, 3)), 12, 64, 3), False),
])  # fmt: skip
def test_short_sums_stay_on_cuda_cores(spec, expected):
    assert isinstance(float_conv2d.default_schedule(spec, HOPPER), tf32.Schedule) is expected


@pytest.mark.parametrize("arch, features, expected", [
    ("sm_75", 512, False), ("sm_80", 512, True), ("sm_86", 512, False), ("sm_90a", 512, True), ("sm_90a", 100, False),
    ("sm_90a", 510, False),
])  # fmt: skip
def test_which_dense_layers(arch, features, expected):
    """Where every warp has a share of the features, four of which come at once."""
    chosen = float_dense.default_schedule(specs.FloatDense(features, 1000), registry.resolve(arch))
    assert isinstance(chosen, tf32_dense.Schedule if expected else rows.Schedule)


@pytest.mark.parametrize("isa", [ISA, HOPPER], ids=lambda isa: isa.name)
@pytest.mark.parametrize("spec", [STEM, POINTWISE])
def test_schedules_fit(spec, isa):
    problem, found = float_conv2d.problem_of(spec), schedules(spec, isa)
    assert len(found) > 20
    for schedule in found:
        layout = tf32.Layout(problem, schedule)
        assert 4 * layout.shared_words <= isa.block_shared_bytes and layout.threads % 32 == 0 and layout.blocks(isa) >= 0
    layout = tf32.Layout(problem, found[0])
    assert layout.blocks(isa) * layout.warps >= 8


# What is compiled -----------------------------------------------------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_90a"])
@pytest.mark.parametrize("spec", [STEM, POINTWISE])
def test_instructions(spec, arch):
    isa = registry.resolve(arch)
    schedule = float_conv2d.default_schedule(spec, isa)
    ptx, log = compiled(source(float_conv2d.build(spec, schedule, isa), isa), isa.mcpu)
    assert (MMA in ptx) is (arch in ("sm_80", "sm_90")) and (WGMMA in ptx) is (arch == "sm_90a") and ("mma" in ptx) is (arch != "sm_75")
    assert ("cp.async.c" in ptx) is (arch != "sm_75") and ("ldmatrix" in ptx) is (arch != "sm_75" and spec is POINTWISE)
    assert isinstance(schedule, tf32.Schedule if arch != "sm_75" else patches.Schedule)
    assert usage(log)[1] <= FEW_BYTES and "serialized" not in log


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a"])
def test_instructions_of_dense_layers(arch):
    spec, isa = specs.FloatDense(512, 1000, EPILOGUES["bias_relu"]), registry.resolve(arch)
    ptx, log = compiled(source(float_dense.build(spec, float_dense.default_schedule(spec, isa), isa), isa), isa.mcpu)
    assert (MMA in ptx) is (arch != "sm_75") and "fma.rn.f32" in ptx and usage(log)[1] == 0


@needs_nvcc
def test_products_of_long_chunks_stay_asynchronous():
    """Runs of groups in a loop."""
    spec = specs.FloatConv2d(specs.Window(56, 56, (3, 3), (1, 1), (1, 1, 1, 1)), 32, 32, 1, EPILOGUES["bias_relu"])
    schedule = next(s for s in schedules(spec, HOPPER) if s.grouped and s.units == 32)
    assert tf32.Layout(float_conv2d.problem_of(spec), schedule).steps == 36
    ptx, log = compiled(source(float_conv2d.build(spec, schedule, HOPPER), HOPPER), "sm_90a")
    assert ptx.count(WGMMA.replace("n64", "n32")) == 3 * (16 + 4) and "serialized" not in log and usage(log)[1] == 0


@pytest.mark.parametrize("where", [0, 1])
def test_data_that_are_not_aligned(where):
    """Rows of a caller's tensor may begin anywhere: the emulator's addresses are elements, so it is the copies' source that has to look."""
    code = functions.device.FUNCTIONS[("bnn_fetch4", "bnn_fetch1")[where]].source
    assert ("& 15) == 0" in code) is (where == 0) and "cp.async.ca.shared.global [%0], [%1], 4" in code


def test_copies_are_waited_for():
    """A kernel whose copies are read before they have arrived is found."""
    spec = specs.FloatConv2d(specs.Window(8, 8, (1, 1)), 32, 32)
    schedule = next(s for s in schedules(spec) if not s.resident and s.units == 8 and s.stages == 3)
    data, weights = operands(np.random.default_rng(0), spec, 2)

    class Hasty(tf32.Kernel):
        def _one_tile(self, turn):
            self.schedule = schedule.__class__(**{**vars(schedule), "stages": 4})  # waits for one group less
            return super()._one_tile(turn)

    before, tf32.Kernel = tf32.Kernel, Hasty
    try:
        with pytest.raises(emulate.Fault):
            run(spec, schedule, data, weights)
    finally:
        tf32.Kernel = before
