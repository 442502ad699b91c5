"""Kernels for GPUs with packed weights or 8-bit integers against their references, bit by bit, as the emulator runs them."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules.cuda import cells, int8_conv2d, weight_conv2d, weight_dense, weight_dense_int8, weight_depthwise
from tests.schedules.cuda.floats import EPILOGUES, ISA, check, epilogue_names, geometries, small_integers
from tests.schedules.kernels import epilogue_inputs
from tests.schedules.packed_weights import CODINGS, random_weights
from tests.schedules.test_int8_conv2d import DATA, TAILS, WEIGHTS, operands

SOME = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def data_of(rng, shape, levels):
    """The operands of a layer but for its weights; levels lie behind these."""
    data = small_integers(rng, shape)
    return [data, None, *levels] if levels else [data]


@SOME
@given(
    window=geometries(most=7, kernel=3), coding=st.sampled_from(CODINGS), channels=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    epilogue=epilogue_names(), tile=st.booleans(), planar=st.booleans(),
)  # fmt: skip
def test_convolutions_with_packed_weights(window, coding, channels, epilogue, tile, planar):
    rng = np.random.default_rng(channels[0])
    spec = specs.WeightConv2d(window, *channels, 1, EPILOGUES[epilogue], planar, coding)
    weights, levels = random_weights(rng, coding, (channels[1], *window.kernel, channels[0]))
    shape = (2, channels[0], window.in_height, window.in_width) if planar else (2, window.in_height, window.in_width, channels[0])
    schedule = weight_conv2d.space(spec, ISA)[0] if tile else cells.Schedule(1)
    dims = (2, window.out_height, window.out_width)
    check(weight_conv2d, spec, data_of(rng, shape, levels), weights, channels[1], dims, rng, schedule)


@SOME
@given(window=geometries(most=7), coding=st.sampled_from(CODINGS[:2]), channels=st.integers(2, 70), epilogue=epilogue_names())
def test_depthwise_convolutions_with_packed_weights(window, coding, channels, epilogue):
    rng = np.random.default_rng(channels)
    spec = specs.WeightConv2d(window, channels, channels, channels, EPILOGUES[epilogue], coding=coding)
    weights, _ = random_weights(rng, coding, (channels, *window.kernel, 1))
    data = small_integers(rng, (2, window.in_height, window.in_width, channels))
    check(weight_depthwise, spec, [data], weights, channels, (2, window.out_height, window.out_width), rng)


@SOME
@given(
    rows=st.integers(1, 12),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    coding=st.sampled_from(CODINGS),
    epilogue=epilogue_names(2),
)
def test_dense_layers_with_packed_weights(rows, sizes, coding, epilogue):
    rng = np.random.default_rng(rows)
    spec = specs.WeightDense(*sizes, coding, EPILOGUES[epilogue])
    weights, levels = random_weights(rng, coding, (sizes[1], sizes[0]))
    check(weight_dense, spec, data_of(rng, (rows, sizes[0]), levels), weights, sizes[1], (rows,), rng)


@SOME
@given(rows=st.integers(1, 12), sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)), coding=st.sampled_from(CODINGS[:2]))
def test_products_of_bytes_with_packed_weights(rows, sizes, coding):
    rng = np.random.default_rng(rows)
    spec = specs.WeightDenseInt8(*sizes, coding, specs.store("int32", "int32"))
    weights, _ = random_weights(rng, coding, (sizes[1], sizes[0]))
    check(weight_dense_int8, spec, [small_integers(rng, (rows, sizes[0]), -128, 127)], weights, sizes[1], (rows,), rng)


@st.composite
def bytes_specs(draw):
    data = draw(st.sampled_from(DATA))
    mask = isinstance(data, specs.Digits) and len(data.coefficients) == 2 and draw(st.booleans())
    channels, outputs = draw(st.sampled_from([1, 3, 4, 31, 40, 64])), draw(st.sampled_from([1, 16, 37, 64]))
    floats = not isinstance(data, specs.Digits) and draw(st.booleans())
    window = draw(geometries(most=6, kernel=3))
    return specs.Int8Conv2d(window, channels, outputs, data, draw(st.sampled_from(WEIGHTS)), draw(st.sampled_from(TAILS)), mask, floats)


@settings(SOME, max_examples=12)
@given(spec=bytes_specs(), tile=st.booleans(), seed=st.integers(0, 99))
def test_convolutions_of_bytes(spec, tile, seed):
    bytes_convolution(spec, int8_conv2d.space(spec, ISA)[0] if tile else cells.Schedule(1), seed)


@pytest.mark.parametrize("data", ["int8", "uint8"])
def test_extreme_bytes(data):
    spec = specs.Int8Conv2d(specs.Window(4, 5, (3, 3), (1, 1), (1, 1, 1, 1)), 40, 32, data, "int8", TAILS[0])
    for schedule in (int8_conv2d.default_schedule(spec, ISA), cells.Schedule(1)):
        bytes_convolution(spec, schedule, 0, extreme=True)


def bytes_convolution(spec, schedule, seed, extreme=False):
    rng = np.random.default_rng(seed)
    plain, at = operands(spec, 2, rng, extreme)
    dims = (2, spec.window.out_height, spec.window.out_width)
    inputs = epilogue_inputs(rng, spec.epilogue, spec.out_channels, dims, spread=50)
    data = [*plain[:at], None, *plain[at + 1 :]]
    check(int8_conv2d, spec, data, plain[at], spec.out_channels, dims, rng, schedule, inputs)
