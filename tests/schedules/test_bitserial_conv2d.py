"""Convolutions of several planes against numpy: planes, kinds, shapes, pads, groups, schedules and all ISA levels."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnntvm.schedules import bitserial_conv2d, bitserial_lookup, epilogue
from bnntvm.spec import Epilogue, EpilogueInput, Output, PlanesConv2d, PlaneSum, Step, Window, store
from bnntvm.targets.x86 import LEVELS
from tests.schedules.kernels import Kernel, assert_same, epilogue_inputs, epilogue_outputs, thresholds
from tests.schedules.planes import KINDS, data_plane, plane_sums, scales, weight_planes
from tests.schedules.test_binary_conv2d import ISAS, windows

#: A two-bit number packed from three thresholds: its digits are a comparison and a xor of three.
TWO_BITS = Epilogue(
    tuple(EpilogueInput("channel", "int32") for _ in range(3)),
    (Step("less", (0, 1), "bool"), Step("less", (0, 2), "bool"), Step("less", (0, 3), "bool"), Step("logical_xor", (4, 5), "bool"),
     Step("logical_xor", (7, 6), "bool")),
    (Output("bits", 5), Output("bits", 8)),
)  # fmt: skip
#: Scaled and stored in channel order.
PLANAR = Epilogue(
    (EpilogueInput("channel"),), (Step("cast", (0,)), Step("multiply", (2, 1))), (Output("planar", 3),)
)  # fmt: skip
TAILS = [store("int32", "int32"), thresholds("less", "greater_equal"), TWO_BITS, PLANAR]


def operands(spec, batch, rng, zero_images=()):
    window, bits = spec.window, spec.in_channels // spec.groups
    shape = (batch, window.in_height, window.in_width, spec.groups, bits)
    zeros = rng.random(shape) < 0.1
    zeros[[i for i in range(batch) if i not in zero_images]] = False
    data = [packed(spec, data_plane(rng, shape) & ~(zeros & spec.zeros)) for _ in spec.planes.data]
    result = [*data, weight_planes(rng, spec.planes, (spec.out_channels, *window.kernel, bits))]
    if spec.zeros:
        result.append(packed(spec, zeros))
    return [*result, *scales(rng, spec.planes, spec.out_channels)]


def packed(spec, plane):
    """Words of ``bool[N, H, W, groups, in_channels / groups]``."""
    rows, groups = (1, spec.groups) if spec.dense_groups else (spec.groups, 1)
    words = epilogue.pack(plane.reshape(*plane.shape[:3], rows, groups * plane.shape[-1]))
    return words.reshape(*plane.shape[:3], rows * words.shape[-1])


def check(spec, isa, schedule=None, batch=2, zero_images=(1,), seed=0):
    """The kernel and the reference give equal results, bit for bit."""
    rng, count = np.random.default_rng(seed), len(spec.planes.data)
    plain = operands(spec, batch, rng, zero_images)
    dims = (batch, spec.window.out_height, spec.window.out_width)
    inputs = epilogue_inputs(rng, spec.epilogue, spec.out_channels, dims, spread=9)
    expected = bitserial_conv2d.reference(spec, plain, inputs)
    schedule = schedule or bitserial_conv2d.default_schedule(spec, isa)
    kernel = Kernel(bitserial_conv2d, spec, isa, schedule)
    weights = bitserial_conv2d.pack_weights(spec, schedule, isa, plain[count])
    actual = kernel.run([*plain[:count], weights, *plain[count + 1 :], *inputs], epilogue_outputs(spec.epilogue, spec.out_channels, dims))
    assert_same(actual, expected, f"{spec}, {schedule}, {isa.name}")


@st.composite
def cases(draw):
    """A specification, one of its schedules, an ISA level and images with zeros."""
    planes = draw(plane_sums())
    groups = draw(st.sampled_from([1, 1, 1, 1, 2, 3, 8]))
    bits = draw(st.sampled_from([1, 4, 31, 32, 37, 64, 96, 128]))
    dense = groups > 1 and 32 % bits == 0 and draw(st.booleans())
    outputs = groups * draw(st.sampled_from([1, 3, 8, 32, 37, 40]))
    zeros = planes.data == (1,) and planes.data_kind == "bipolar" and not planes.scaled and draw(st.booleans())
    tail = store("float32", "float32") if planes.scaled else draw(st.sampled_from(TAILS))
    spec = PlanesConv2d(draw(windows()), groups * bits, outputs, planes, groups, zeros, tail, dense)
    isa = draw(st.sampled_from([ISAS[0], ISAS[0], *ISAS]))
    schedules = bitserial_conv2d.space(spec, isa)
    schedule = random.Random(draw(st.integers(0, 999))).choice([schedules[0], *schedules])
    split = replace(schedule, task_rows=draw(st.integers(1, 4)), task_blocks=draw(st.integers(1, 2)))
    return spec, isa, draw(st.sampled_from([schedule, split])), draw(st.sampled_from([(), (0,), (0, 1)]))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases(), st.integers(0, 99))
def test_any_planes(case, seed):
    spec, isa, schedule, zero_images = case
    check(spec, isa, schedule, 2, zero_images, seed)


@pytest.mark.parametrize("data, weights", KINDS)
def test_every_kind_on_the_best_level(data, weights):
    """All kinds of planes, two of each, padded."""
    planes = PlaneSum((1, 2), (1, -2), data, weights)
    check(PlanesConv2d(Window(6, 9, (3, 3), (1, 1), (1, 1, 1, 1)), 96, 40, planes, epilogue=TAILS[0]), ISAS[0])


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_depthwise(isa):
    """One channel per group and one output per group: the mask of a lane has one bit."""
    planes = PlaneSum((1, 2), (1,), "unipolar", "bipolar")
    window = Window(5, 9, (3, 3), (1, 1), (1, 1, 1, 1))
    check(PlanesConv2d(window, 13, 13, planes, 13, epilogue=TAILS[0], dense_groups=True), isa)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_counters_do_not_overflow(isa):
    """All bits count in a long sum: 8-bit counters would wrap."""
    spec = PlanesConv2d(Window(5, 5, (5, 5)), 288, 32, PlaneSum((1, 2), (4,), "unipolar", "unipolar"), epilogue=TAILS[0])
    schedule = bitserial_conv2d.default_schedule(spec, isa)
    ones, kernel = np.full((1, 5, 5, 9), 2**32 - 1, "uint32"), Kernel(bitserial_conv2d, spec, isa, schedule)
    weights = bitserial_conv2d.pack_weights(spec, schedule, isa, np.full((1, 32, 5, 5, 9), 2**32 - 1, "uint32"))
    (actual,) = kernel.run([ones, ones, weights], [((1, 1, 1, 32), "int32")])
    assert np.all(actual == 25 * 288 * 3 * 4)


@pytest.mark.parametrize("channels", [32, 96, 256])
@pytest.mark.parametrize("data, weights", KINDS)
def test_little_is_stored_beside_the_weights(data, weights, channels):
    """Few channels too: what is not bits of weights is made at run time. (Indices of look-ups are of six channels.)"""
    for scaled in (False, True):
        planes = PlaneSum((1, 1), (1, 1), data, weights, scaled)
        spec = PlanesConv2d(Window(8, 8, (3, 3), (1, 1), (1, 1, 1, 1)), channels, 64, planes)
        plain = np.zeros((2 * planes.words_per_weight, 64, 3, 3, channels // 32), "uint32")
        for isa in LEVELS:
            stored = bitserial_conv2d.pack_weights(spec, bitserial_conv2d.default_schedule(spec, isa), isa, plain)
            assert plain.nbytes <= stored.nbytes <= 1.04 * plain.nbytes


WIDE = [isa for isa in ISAS if bitserial_lookup.shape(isa)]


@pytest.mark.parametrize("isa", WIDE, ids=lambda isa: isa.name)
@pytest.mark.parametrize(
    "planes, window, channels, outputs",
    [
        (PlaneSum((1, 2), (1,), "unipolar", "bipolar"), Window(7, 9, (3, 3), (1, 1), (1, 1, 1, 1)), 70, 100),
        (PlaneSum((1, 2, -4), (1, -2), "unipolar", "unipolar"), Window(9, 8, (2, 5), (2, 3), (0, 2, 3, 1), (3, 1)), 96, 64),
        (PlaneSum((1, -2), (2,), "bipolar", "bipolar"), Window(9, 8, (2, 5), (2, 3), (0, 2, 3, 1), (3, 1)), 37, 130),
        (PlaneSum((1, 2, 4, 8), (1,), "unipolar", "ternary"), Window(7, 9, (1, 1)), 70, 100),
        (PlaneSum((1, 2), (1,), "unipolar", "bipolar"), Window(12, 13, (1, 1)), 70, 100),
    ],
    ids=["two_bits", "twos_complement", "turned", "parts", "long_rows"],
)
def test_look_ups(isa, planes, window, channels, outputs):
    """Sums that are looked up: groups of channels across words, padding, strides, several tasks, channels that fill no register."""
    spec = PlanesConv2d(window, channels, outputs, planes, epilogue=TAILS[0])
    for each in (spec, replace(spec, epilogue=PLANAR))[: 2 if isa in WIDE[:2] else 1]:
        check(each, isa, replace(bitserial_conv2d.lookup_schedule(spec, isa), task_rows=3))


@pytest.mark.parametrize("isa", WIDE, ids=lambda isa: isa.name)
def test_look_ups_do_not_overflow(isa):
    """Byte counters are emptied in time, totals have room."""
    spec = PlanesConv2d(Window(5, 5, (5, 5)), 330, 64, PlaneSum((1, 2, 4), (1, 4), "unipolar", "unipolar"), epilogue=TAILS[0])
    schedule, ones = bitserial_conv2d.lookup_schedule(spec, isa), epilogue.pack(np.ones((1, 5, 5, 330), bool))
    kernel = Kernel(bitserial_conv2d, spec, isa, schedule)
    weights = bitserial_conv2d.pack_weights(spec, schedule, isa, epilogue.pack(np.ones((2, 64, 5, 5, 330), bool)))
    (actual,) = kernel.run([ones, ones, ones, weights], [((1, 1, 1, 64), "int32")])
    assert np.all(actual == 25 * 330 * 7 * 5)


def test_long_sums_are_not_looked_up():
    """Totals of 16 bits would wrap."""
    planes = PlaneSum((1, 2), (1,), "unipolar", "bipolar")
    assert bitserial_conv2d.lookup_schedule(PlanesConv2d(Window(9, 9, (3, 3)), 2400, 64, planes), WIDE[0])
    assert not bitserial_conv2d.lookup_schedule(PlanesConv2d(Window(9, 9, (3, 3)), 2432, 64, planes), WIDE[0])


def test_the_cheaper_way():
    """Two-bit data are looked up where tables serve enough output channels; one bit is counted."""
    level = next(isa for isa in LEVELS if isa.name == "x86-64-v4-vpopcnt")
    two, ternary = PlaneSum((1, 2), (1,), "unipolar", "bipolar"), PlaneSum((1,), (1,), "bipolar", "ternary")
    chosen = {
        (planes, outputs): bitserial_conv2d.default_schedule(PlanesConv2d(Window(14, 14, (3, 3)), 256, outputs, planes), level).adder
        for planes in (two, ternary) for outputs in (32, 256)
    }  # fmt: skip
    assert chosen == {(two, 32): "pairs", (two, 256): "lookup", (ternary, 32): "plain", (ternary, 256): "plain"}
