"""Layers of bits on tensor cores, emulated, against numpy: every engine, architecture and kind of plane, odd shapes, all schedules."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnntvm.schedules import families
from bnntvm.schedules.cuda import emulate
from bnntvm.schedules.cuda.layers import Schedule
from bnntvm.spec import BinaryConv2d, BinaryDense, PlanesConv2d, PlanesDense, PlaneSum, Window, store
from tests.schedules.cuda.layers import LEVELS, check
from tests.schedules.planes import plane_sums
from tests.schedules.test_binary_conv2d import DOTS, EPILOGUES, SCALED, windows
from tests.schedules.test_bitserial_conv2d import TAILS

#: A device of few multiprocessors: blocks that stay have several tiles.
SMALL = replace(LEVELS["sm_90a"], multiprocessors=3)
ISAS = [LEVELS["sm_75"], LEVELS["sm_80"], LEVELS["sm_86"], SMALL]


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    inputs = groups * draw(st.sampled_from([32, 37, 64, 96, 128, 160, 256]))
    outputs = groups * draw(st.sampled_from([32, 64, 96])) if groups > 1 else draw(st.sampled_from([16, 33, 64, 100, 128, 200, 300]))
    if draw(st.integers(0, 2)) == 0:
        planes = draw(plane_sums())
        zeros = planes.data_kind == "bipolar" and len(planes.data) == 1 and draw(st.booleans())
        tails = [store("float32")] if planes.scaled else TAILS
        return PlanesConv2d(draw(windows()), inputs, outputs, planes, groups, zeros, draw(st.sampled_from(tails)))
    unipolar, zeros = draw(st.sampled_from([(False, False), (False, False), (True, False), (False, True)]))
    plus_one = draw(st.booleans()) and groups == 1 and not (unipolar or zeros)
    return BinaryConv2d(draw(windows()), inputs, outputs, groups, unipolar, zeros, draw(st.sampled_from(EPILOGUES)), False, plus_one)


@st.composite
def dense_layers(draw):
    inputs, outputs = draw(st.sampled_from([128, 200, 288, 640, 1100])), draw(st.sampled_from([16, 40, 64, 130, 300]))
    if draw(st.integers(0, 2)) == 0:
        planes = draw(plane_sums())
        zeros = planes.data_kind == "bipolar" and len(planes.data) == 1 and draw(st.booleans())
        tails = [store("float32")] if planes.scaled else TAILS[:2]
        return PlanesDense(inputs, outputs, planes, zeros, draw(st.sampled_from(tails)))
    unipolar, zeros = draw(st.sampled_from([(False, False), (True, False), (False, True)]))
    return BinaryDense(inputs, outputs, unipolar, zeros, draw(st.sampled_from(EPILOGUES)))


def _schedules(spec, isa):
    return [s for s in families.of(spec, isa).space(spec, isa) if s.engine != "cores"]


def _any(spec, isa, batch, seed):
    found = _schedules(spec, isa)
    if found:
        pick = random.Random(seed)
        engine = pick.choice(sorted({s.engine for s in found}))
        check(spec, isa, pick.choice([s for s in found if s.engine == engine]), batch, seed)


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(convolutions(), st.sampled_from([*ISAS, SMALL]), st.integers(0, 999))
def test_any_convolution(spec, isa, seed):
    _any(spec, isa, 1 + seed % 3, seed)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(dense_layers(), st.sampled_from([*ISAS, SMALL]), st.sampled_from([1, 7, 130, 400]), st.integers(0, 999))
def test_any_dense_layer(spec, isa, batch, seed):
    _any(spec, isa, batch, seed)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_every_schedule_of_a_layer(isa):
    """All valid schedules, on a layer with borders and a K that fills no slab."""
    spec = BinaryConv2d(Window(7, 9, (3, 3), (1, 1), (1, 1, 1, 1)), 96, 80, epilogue=SCALED)
    found = _schedules(spec, isa)
    assert len(found) > 5
    for schedule in found[:: max(1, len(found) // 12)]:
        check(spec, isa, schedule, 3)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_long_sums(isa):
    """Many turns of the ring, several tiles for each block, blocks with fewer tiles than others."""
    check(BinaryDense(5000, 200, epilogue=DOTS), isa, batch=700)


@pytest.mark.parametrize("isa", [LEVELS["sm_80"], SMALL], ids=lambda isa: isa.name)
@pytest.mark.parametrize("planes", [
    PlaneSum((1, 2), (1,), "unipolar", "bipolar"), PlaneSum((1,), (1,), "bipolar", "ternary"),
    PlaneSum((1, 2, -4), (1, -2), "unipolar", "unipolar"),
], ids=["w1a2", "ternary", "w2a3"])  # fmt: skip
def test_planes_by_default(isa, planes):
    spec = PlanesConv2d(Window(9, 9, (3, 3), (1, 1), (1, 1, 1, 1)), 160, 200, planes, epilogue=TAILS[1])
    family = families.of(spec, isa)
    assert family.default_schedule(spec, isa).engine != "cores"
    check(spec, isa)


@pytest.mark.parametrize("rows, batch", [(128, 700), (128, 129)])
def test_clusters(rows, batch):
    """Two blocks write to each other's shared memory; one of them has no rows of its own at the end."""
    spec, isa = BinaryDense(1300, 100, epilogue=DOTS), replace(SMALL, multiprocessors=4)
    check(spec, isa, Schedule("wgmma", rows, 64, 64, 64, 128, 4, 1, False, 2), batch)


def test_warpgroups_in_turns():
    """Weights stay in shared memory; a block has an odd number of tiles, or one."""
    spec = BinaryDense(700, 70, epilogue=DOTS)
    for batch in (64 * 5 + 3, 70):
        check(spec, replace(SMALL, multiprocessors=2), Schedule("wgmma", 64, 96, 64, 96, 128, 3, 1, True), batch)


def test_layers_that_tiles_do_not_fit():
    """Groups that share words, sums that xor cannot count, and too little work stay on CUDA cores."""
    family = families.of(BinaryDense(64, 64), LEVELS["sm_80"])
    assert family.default_schedule(BinaryDense(64, 10), LEVELS["sm_80"]).engine == "cores"
    odd = PlanesDense(1024, 64, PlaneSum((1,), (1,), "unipolar", "unipolar"))
    assert families.of(odd, LEVELS["sm_75"]).default_schedule(odd, LEVELS["sm_75"]).engine == "cores"
    assert families.of(odd, LEVELS["sm_80"]).default_schedule(odd, LEVELS["sm_80"]).engine == "mma"
    grouped = BinaryConv2d(Window(9, 9, (3, 3)), 64, 64, 4, dense_groups=True)
    assert families.of(grouped, LEVELS["sm_80"]).default_schedule(grouped, LEVELS["sm_80"]).engine == "cores"


def test_schedules_are_plain_data():
    spec = BinaryDense(4096, 4096)
    for isa in ISAS:
        found = families.of(spec, isa).space(spec, isa)
        assert len(set(found)) == len(found) and all(isinstance(s, Schedule) for s in found)


@pytest.mark.parametrize("schedule", [None, Schedule("wgmma", 128, 256, 64, 256, 128, 4, 1, False, 2)], ids=["default", "cluster"])
def test_two_blocks_of_a_large_product(schedule):
    """4096 x 4096 x 4096 on as many blocks as the device has: what the last two of them write."""
    isa, rng, size = LEVELS["sm_90a"], np.random.default_rng(0), 4096
    spec = BinaryDense(size, size, epilogue=DOTS)
    family = families.of(spec, isa)
    schedule = schedule or family.default_schedule(spec, isa)
    data, weights = (rng.integers(0, 2**32, (size, size // 32), dtype=np.uint32) for _ in range(2))
    result = np.full((size, size), 77, np.int32)  # odd: no dot product of 4096 signs is
    last = 127 if schedule.resident else isa.multiprocessors - 1
    packed = family.pack_weights(spec, schedule, isa, weights)
    emulate.run(family.build(spec, schedule, isa), [data, packed, result], only_blocks=[last - 1, last])
    rows, columns = np.nonzero(result != 77)
    assert len(rows) >= 2 * 3 * schedule.rows * schedule.columns
    some = rng.integers(0, len(rows), 20000)
    expected = size - 2 * np.bitwise_count(data[rows[some]] ^ weights[columns[some]]).sum(1, dtype=np.int64)
    np.testing.assert_array_equal(result[rows[some], columns[some]], expected)
