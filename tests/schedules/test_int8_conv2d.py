"""Convolutions of 8-bit integers against numpy: data and weights of every kind, shapes, strides, pads, schedules and all ISA levels."""

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnntvm.schedules import epilogue, int8_conv2d
from bnntvm.spec import Digits, Epilogue, Int8Conv2d, Output, Step, Window, store
from tests.schedules.kernels import Kernel, assert_same, epilogue_inputs, epilogue_outputs, thresholds
from tests.schedules.test_binary_conv2d import ISAS, windows

#: A grid of integers clipped to 8 bits: what a quantised layer stores for the next.
BYTES = Epilogue(
    (),
    (Step("cast", (0,)), Step("multiply", (1, 2.0**-7)), Step("round", (2,)), Step("clip", (3, -128.0, 127.0)), Step("cast", (4,), "int8")),
    (Output("tensor", 5, "int8"),),
)
PLANAR = Epilogue((), (Step("cast", (0,)),), (Output("planar", 1),))
TAILS = [store("int32", "int32"), store("float32", "int32"), thresholds("less"), BYTES, PLANAR]
DATA = ["int8", "uint8", Digits(1, (-2,)), Digits(1, (-2, -1)), Digits(0, (1, 2)), Digits(0, (1, 2, 4, -8)), Digits(0, (64, 128))]
WEIGHTS = ["int8", Digits(1, (-2,)), Digits(-1, (1, 2)), Digits(-3, (2, 4)), Digits(-8, (1, 2, 4, 8))]


def operands(spec, batch, rng, extreme=False):
    """Random data planes or bytes, and weights that the specification allows; ``extreme``: the values of the largest magnitude."""
    shape = (batch, spec.window.in_height, spec.window.in_width, spec.in_channels)
    if isinstance(spec.data, Digits):
        data = [epilogue.pack(rng.random(shape) < 0.5) for _ in spec.data.coefficients]
    else:
        low, high = (-128, 127) if spec.data == "int8" else (0, 255)
        data = [(rng.choice([low, high], shape) if extreme else rng.integers(low, high, shape, endpoint=True)).astype(spec.data)]
        data = [d.astype("float32") for d in data] if spec.floats else data
    shape = (spec.out_channels, *spec.window.kernel, spec.in_channels)
    if isinstance(spec.weights, Digits):
        weights = spec.weights.base + sum(c * rng.integers(0, 2, shape) for c in spec.weights.coefficients)
    else:
        weights = rng.choice([-128, 127], shape) if extreme else rng.integers(-128, 128, shape)
    at = len(data) - spec.mask_last
    return [*data[:at], weights.astype(np.int8), *data[at:]], at


def check(spec, isa, schedule=None, batch=2, seed=0, extreme=False):
    """The kernel and the reference give equal results, bit for bit."""
    rng = np.random.default_rng(seed)
    plain, at = operands(spec, batch, rng, extreme)
    dims = (batch, spec.window.out_height, spec.window.out_width)
    inputs = epilogue_inputs(rng, spec.epilogue, spec.out_channels, dims, spread=50)
    expected = int8_conv2d.reference(spec, plain, inputs)
    schedule = schedule or int8_conv2d.default_schedule(spec, isa)
    packed = [*plain[:at], int8_conv2d.pack_weights(spec, schedule, isa, plain[at]), *plain[at + 1 :]]
    actual = Kernel(int8_conv2d, spec, isa, schedule).run([*packed, *inputs], epilogue_outputs(spec.epilogue, spec.out_channels, dims))
    assert_same(actual, expected, f"{spec}, {schedule}, {isa.name}")


@st.composite
def cases(draw):
    data = draw(st.sampled_from(DATA))
    mask = isinstance(data, Digits) and len(data.coefficients) == 2 and draw(st.booleans())
    channels, outputs = draw(st.sampled_from([1, 3, 4, 16, 31, 40, 64, 96, 130])), draw(st.sampled_from([1, 16, 37, 64]))
    weights, tail = draw(st.sampled_from(WEIGHTS)), draw(st.sampled_from(TAILS))
    floats = not isinstance(data, Digits) and draw(st.booleans())
    spec = Int8Conv2d(draw(windows()), channels, outputs, data, weights, tail, mask, floats)
    isa = draw(st.sampled_from([ISAS[0], ISAS[0], *ISAS]))
    schedules = int8_conv2d.space(spec, isa)
    return spec, isa, random.Random(draw(st.integers(0, 999))).choice([schedules[0], *schedules])


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases(), st.integers(0, 99))
def test_any_convolution(case, seed):
    check(*case, seed=seed)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("data", ["int8", "uint8"])
def test_extreme_values_do_not_saturate(isa, data):
    """Two products of 255 and -128 are more than 16 bits hold."""
    for floats in (False, True):
        check(Int8Conv2d(Window(4, 5, (3, 3), (1, 1), (1, 1, 1, 1)), 72, 32, data, "int8", TAILS[0], floats=floats), isa, extreme=True)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_strides_and_large_images(isa):
    """Phases of a strided image, several tasks and tiles that are not full."""
    check(Int8Conv2d(Window(19, 23, (3, 3), (2, 2), (1, 1, 1, 1)), 32, 40, Digits(0, (1, 2)), Digits(-1, (1, 2)), TAILS[0]), isa)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_channel_order(isa):
    """Tiles begin and end in the middle of rows and between them; the last channels fill no vector."""
    check(Int8Conv2d(Window(13, 11, (3, 3), (1, 1), (1, 1, 1, 1)), 32, 45, Digits(0, (1, 2)), Digits(1, (-2,)), PLANAR), isa)
    check(Int8Conv2d(Window(5, 7, (1, 1)), 32, 20, "uint8", "int8", PLANAR), isa)


def test_weights_are_stored_at_their_own_width():
    """One bit for each digit, plus nothing where channels fill whole quads and blocks."""
    for isa in ISAS:
        for digits, bits in ((Digits(1, (-2,)), 1), (Digits(-1, (1, 2)), 2), (Digits(-8, (1, 2, 4, 8)), 4), ("int8", 8)):
            spec = Int8Conv2d(Window(8, 8, (3, 3), (1, 1), (1, 1, 1, 1)), 192, 64, "int8", digits)
            weights = np.full((64, 3, 3, 192), -1, np.int8)
            stored = int8_conv2d.pack_weights(spec, int8_conv2d.default_schedule(spec, isa), isa, weights)
            assert stored.nbytes * 8 == weights.size * bits
