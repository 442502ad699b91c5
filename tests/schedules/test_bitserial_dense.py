"""Dense layers of several planes against numpy: planes, kinds, odd sizes, any number of rows, all ISA levels."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnntvm.schedules import bitserial_dense, epilogue
from bnntvm.spec import PlanesDense, PlaneSum, store
from bnntvm.targets.x86 import LEVELS
from tests.schedules.kernels import Kernel, assert_same, epilogue_inputs, epilogue_outputs, thresholds
from tests.schedules.planes import KINDS, data_plane, plane_sums, scales, weight_planes
from tests.schedules.test_binary_conv2d import ISAS


def operands(rng, spec, rows):
    """Random planes. Most rows have no zeros, some have a few, some have many."""
    shape = (rows, spec.in_features)
    mask = rng.random(shape) < rng.choice([0, 0, 0.01, 0.5], (rows, 1))
    data = [epilogue.pack(data_plane(rng, shape) & ~(mask & spec.zeros)) for _ in spec.planes.data]
    weights = weight_planes(rng, spec.planes, (spec.out_features, spec.in_features))
    return [*data, weights, *([epilogue.pack(mask)] if spec.zeros else []), *scales(rng, spec.planes, spec.out_features)]


def check(kernel, rows, rng):
    spec, count = kernel.spec, len(kernel.spec.planes.data)
    plain = operands(rng, spec, rows)
    inputs = epilogue_inputs(rng, spec.epilogue, spec.out_features, (rows,), spread=int(spec.in_features**0.5) + 1)
    weights = bitserial_dense.pack_weights(spec, kernel.schedule, kernel.isa, plain[count])
    outputs = epilogue_outputs(spec.epilogue, spec.out_features, (rows,))
    actual = kernel.run([*plain[:count], weights, *plain[count + 1 :], *inputs], outputs)
    assert_same(actual, bitserial_dense.reference(spec, plain, inputs), f"{spec} with {rows} rows, {kernel.schedule}, {kernel.isa.name}")


@st.composite
def layers(draw):
    planes = draw(plane_sums())
    zeros = planes.data == (1,) and planes.data_kind == "bipolar" and not planes.scaled and draw(st.booleans())
    tail = store("float32", "float32") if planes.scaled else draw(st.sampled_from([store("int32", "int32"), thresholds("less", "greater")]))
    sizes = draw(st.integers(1, 130) | st.integers(131, 1100)), draw(st.integers(1, 130) | st.integers(131, 400))
    return PlanesDense(*sizes, planes, zeros, tail)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(layers(), st.sampled_from([ISAS[0], *ISAS]), st.integers(0, 99), st.integers(0, 10**6))
def test_any_planes(spec, isa, number, seed):
    schedules = bitserial_dense.space(spec, isa)
    schedule = None if number % 2 else schedules[number % len(schedules)]
    kernel, rng = Kernel(bitserial_dense, spec, isa, schedule), np.random.default_rng(seed)
    for rows in (0, 1, 3, 9):
        check(kernel, rows, rng)


@pytest.mark.parametrize("data, weights", KINDS)
def test_every_kind_on_the_best_level(data, weights):
    planes = PlaneSum((1, 2), (1, -2), data, weights)
    kernel = Kernel(bitserial_dense, PlanesDense(330, 70, planes, epilogue=store("int32", "int32")), ISAS[0])
    for rows in (1, 7, 8):
        check(kernel, rows, np.random.default_rng(rows))


def test_ternary_weights_take_two_bits():
    spec = PlanesDense(4096, 4096, PlaneSum((1,), (1,), "bipolar", "ternary"))
    weights = np.zeros((2, 4096, 128), "uint32")
    for isa in LEVELS:
        stored = bitserial_dense.pack_weights(spec, bitserial_dense.default_schedule(spec, isa), isa, weights)
        assert weights.nbytes <= stored.nbytes <= 1.01 * weights.nbytes


def test_little_is_stored_beside_the_weights():
    """Unipolar and bipolar data with bipolar weights have no constants in memory."""
    for data in ("unipolar", "bipolar"):
        spec, words = PlanesDense(64, 128, PlaneSum((1, 2), (1, 2), data, "bipolar")), np.zeros((2, 128, 2), np.uint32)
        for isa in LEVELS:
            assert bitserial_dense.pack_weights(spec, bitserial_dense.default_schedule(spec, isa), isa, words).nbytes == words.nbytes
