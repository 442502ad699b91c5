"""Float kernels for GPUs against their references, bit by bit, as the emulator runs them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules.cuda import (
    cells,
    concat,
    copy,
    cum_sum,
    depthwise_conv2d,
    emulate,
    finite,
    float_conv2d,
    float_dense,
    patches,
    pool2d,
    reduce,
    row_extreme,
    top_k,
    transpose,
)  # fmt: skip
from bnntvm.schedules.cuda import (
    map as maps,
)
from bnntvm.schedules.cuda import (
    rows as rows_of_blocks,
)
from tests.schedules.cuda.floats import EPILOGUES, ISA, check, epilogue_names, execute, geometries, small_integers

FEW = settings(max_examples=6, deadline=None, derandomize=True)
MANY = settings(max_examples=15, deadline=None, derandomize=True)


def convolution(window, channels, groups, epilogue, images, seed, schedule=None, planar=False, family=float_conv2d):
    rng = np.random.default_rng(seed)
    spec = specs.FloatConv2d(window, *channels, groups, EPILOGUES[epilogue], planar)
    shape = (images, channels[0], window.in_height, window.in_width) if planar else (images, window.in_height, window.in_width, channels[0])
    weights = small_integers(rng, (channels[1], *window.kernel, channels[0] // groups))
    dims = (images, window.out_height, window.out_width)
    check(family, spec, [small_integers(rng, shape)], weights, channels[1], dims, rng, schedule)


@FEW
@given(
    window=geometries(most=9, kernel=3), channels=st.tuples(st.integers(1, 9), st.integers(1, 70)), epilogue=epilogue_names(),
    images=st.integers(1, 3), planar=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_convolutions_by_patches(window, channels, epilogue, images, planar, seed):
    spec = specs.FloatConv2d(window, *channels, 1, planar=planar)
    schedules = float_conv2d.on_cores(spec)
    assert isinstance(schedules[0], patches.Schedule)
    convolution(window, channels, 1, epilogue, images, seed, schedules[seed % (len(schedules) - 2)], planar)


@FEW
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)), channels=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)), epilogue=epilogue_names(), images=st.integers(1, 3),
)  # fmt: skip
def test_pointwise_convolutions_count_pixels_through_images(size, channels, strides, epilogue, images):
    window = specs.Window(*size, (1, 1), strides)
    convolution(window, channels, 1, epilogue, images, 1, float_conv2d.on_cores(specs.FloatConv2d(window, *channels))[0])


@MANY
@given(
    window=geometries(most=9), groups=st.integers(1, 3), per_group=st.tuples(st.integers(1, 5), st.integers(1, 20)),
    epilogue=epilogue_names(), images=st.integers(1, 2), count=st.sampled_from([1, 2]),
)  # fmt: skip
def test_grouped_convolutions(window, groups, per_group, epilogue, images, count):
    channels = (per_group[0] * groups, per_group[1] * groups)
    convolution(window, channels, groups, epilogue, images, 2, cells.Schedule(count))


def test_a_stem():
    window = specs.Window(31, 29, (7, 7), (2, 2), (3, 3, 3, 3))
    schedule = float_conv2d.on_cores(specs.FloatConv2d(window, 3, 64, planar=True))[0]
    convolution(window, (3, 64), 1, "bias_relu", 1, 3, schedule, planar=True)


@MANY
@given(
    window=geometries(), channels=st.integers(2, 70), multiplier=st.integers(1, 2), epilogue=epilogue_names(), count=st.sampled_from([1, 2])
)
def test_depthwise_convolutions(window, channels, multiplier, epilogue, count):
    size = (channels, channels * multiplier)
    convolution(window, size, channels, epilogue, 2, 4, depthwise_conv2d.Schedule(count), family=depthwise_conv2d)


@MANY
@given(
    rows=st.integers(1, 20), sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)), epilogue=epilogue_names(2), number=st.integers(0, 4)
)
def test_dense_layers(rows, sizes, epilogue, number):
    rng = np.random.default_rng(rows)
    spec = specs.FloatDense(*sizes, EPILOGUES[epilogue])
    data, weights = small_integers(rng, (rows, sizes[0])), small_integers(rng, sizes[::-1])
    found = [s for s in float_dense.space(spec, ISA) if isinstance(s, rows_of_blocks.Schedule)]
    check(float_dense, spec, [data], weights, sizes[1], (rows,), rng, found[number])


@MANY
@given(
    rank=st.sampled_from([2, 4]), spatial=st.tuples(st.integers(1, 5), st.integers(1, 5)), channels=st.integers(1, 130),
    epilogue=epilogue_names(2), leading=st.integers(1, 4), count=st.integers(0, 3),
)  # fmt: skip
def test_elementwise_kernels(rank, spatial, channels, epilogue, leading, count):
    rng = np.random.default_rng(channels)
    dims = (leading, *(spatial if rank == 4 else ()))
    spec = specs.Map(rank, dims[1:], channels, "float32", EPILOGUES[epilogue])
    check(maps, spec, [small_integers(rng, (*dims, channels))], None, channels, dims, rng, maps.space(spec, ISA)[count])


@MANY
@given(
    rank=st.sampled_from([2, 4]), channels=st.lists(st.integers(1, 70), min_size=1, max_size=4), epilogue=epilogue_names(2),
    words=st.booleans(), count=st.sampled_from([1, 4]),
)  # fmt: skip
def test_concatenations(rank, channels, epilogue, words, count):
    rng = np.random.default_rng(len(channels))
    dims = (2, *((3, 2) if rank == 4 else ()))
    tail, dtype = (specs.store("uint32", "uint32"), "uint32") if words else (EPILOGUES[epilogue], "float32")
    spec = specs.Concat(rank, dims[1:], tuple(channels), tail, dtype)
    parts = [small_integers(rng, (*dims, c), 0 if words else -4).astype(dtype) for c in channels]
    check(concat, spec, parts, None, sum(channels), dims, rng, concat.Schedule(count))


@MANY
@given(
    window=geometries(), channels=st.integers(1, 70), op=st.sampled_from(["max", "avg", "avg_pad"]), epilogue=epilogue_names(),
    count=st.sampled_from([1, 2]),
)  # fmt: skip
def test_pools(window, channels, op, epilogue, count):
    taps = [_inside(window, axis) for axis in (0, 1)]
    if not all(all(one) for one in taps):
        return  # a window that lies outside the image altogether has no mean
    rng = np.random.default_rng(channels)
    data = small_integers(rng, (2, window.in_height, window.in_width, channels))
    dims = (2, window.out_height, window.out_width)
    check(pool2d, specs.Pool2d(window, channels, op, EPILOGUES[epilogue]), [data], None, channels, dims, rng, pool2d.Schedule(count))


def _inside(window, axis):
    size, out = ((window.in_height, window.out_height), (window.in_width, window.out_width))[axis]
    places = [
        [o * window.strides[axis] - window.pads[axis] + k * window.dilations[axis] for k in range(window.kernel[axis])] for o in range(out)
    ]
    return [any(0 <= p < size for p in one) for one in places]


@MANY
@given(op=st.sampled_from(["avg", "max"]), size=st.integers(1, 4), channels=st.integers(1, 70), epilogue=epilogue_names())
def test_global_pools(op, size, channels, epilogue):
    rng = np.random.default_rng(size)
    spec = specs.GlobalPool(op, (2**size, 2), channels, EPILOGUES[epilogue])
    check(reduce, spec, [small_integers(rng, (3, 2**size, 2, channels))], None, channels, (3, 1, 1), rng)


@pytest.mark.parametrize("classes", [1, 10, 32, 100])
def test_softmax(classes):
    data = np.random.default_rng(0).normal(0, 5, (5, classes)).astype(np.float32)
    spec = specs.Softmax(classes)
    (got,) = execute(reduce.build(spec, reduce.Schedule(1), ISA), [data], [(data.shape, "float32")])
    np.testing.assert_allclose(got, reduce.reference(spec, [data], [])[0], rtol=3e-6)


@MANY
@given(op=st.sampled_from(["max", "min"]), rows=st.integers(1, 9), channels=st.integers(1, 100), seed=st.integers(0, 9))
def test_row_extremes(op, rows, channels, seed):
    data = np.random.default_rng(seed).normal(size=(rows, channels)).astype(np.float32)
    spec = specs.RowExtreme(op, channels)
    (got,) = execute(row_extreme.build(spec, row_extreme.Schedule(), ISA), [data], [((rows, 1), "float32")])
    np.testing.assert_array_equal(got, row_extreme.reference(spec, [data], [])[0])


@MANY
@given(rows=st.integers(1, 40), size=st.integers(1, 30), largest=st.booleans(), dtype=st.sampled_from(["float32", "int32", "int64"]))
def test_top_k(rows, size, largest, dtype):
    rng = np.random.default_rng(rows)
    data, count = rng.integers(-5, 5, (rows, size)).astype(dtype), int(rng.integers(1, size + 1))
    spec = specs.TopK(size, count, largest, dtype)
    got = execute(top_k.build(spec, top_k.Schedule(), ISA), [data], [((rows, count), dtype), ((rows, count), "int64")])
    for actual, expected in zip(got, top_k.reference(spec, [data], []), strict=True):
        np.testing.assert_array_equal(actual, expected)


@MANY
@given(data=st.data(), dtype=st.sampled_from(["float32", "int32", "int64"]), exclusive=st.booleans(), backward=st.booleans())
def test_running_sums(data, dtype, exclusive, backward):
    shape = tuple(data.draw(st.integers(low, most)) for low, most in ((1, 3), (0, 20), (1, 40)))
    values = np.random.default_rng(shape[1]).normal(0, 9, shape).astype(dtype)
    sizes = [d if data.draw(st.booleans()) else None for d in shape[1:]]
    spec = specs.CumSum(*sizes, dtype, exclusive, backward)
    (got,) = execute(cum_sum.build(spec, cum_sum.Schedule(), ISA), [values], [(shape, dtype)])
    np.testing.assert_array_equal(got, cum_sum.reference(spec, [values])[0])


@MANY
@given(images=st.integers(1, 3), rows=st.integers(1, 70), columns=st.integers(1, 70))
def test_transposes(images, rows, columns):
    data = np.random.default_rng(rows).normal(size=(images, rows, columns)).astype(np.float32)
    spec = specs.Transpose(rows, columns, ((rows, columns), (columns, rows)))
    (got,) = execute(transpose.build(spec, transpose.Schedule(), ISA), [data], [((images, columns, rows), "float32")])
    np.testing.assert_array_equal(got, data.transpose(0, 2, 1))


@pytest.mark.parametrize("size", [1, 255, 1024, 5000])
@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8"])
def test_copies(size, dtype):
    data = np.arange(size).astype(dtype)
    (got,) = execute(copy.build(dtype), [data], [((size,), dtype)])
    np.testing.assert_array_equal(got, data)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [1, 300, 4100])
def test_finite_numbers_are_told_from_others(bad, size):
    data = np.random.default_rng(size).normal(size=size).astype(np.float32)
    data[0], flag = np.finfo(np.float32).max, np.zeros(1, np.int32)
    if bad is not None:
        data[-1] = bad
    emulate.run(finite.build(ISA), [data, flag])
    assert flag[0] == (bad is not None)


def test_the_flag_stays_set():
    flag = np.ones(1, np.int32)
    emulate.run(finite.build(ISA), [np.zeros(7, np.float32), flag])
    assert flag[0] == 1
