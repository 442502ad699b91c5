"""What there is to tune on a GPU: every schedule of every family, without a device."""

import numpy as np
import pytest

from benchmarks.cuda_cases import _problems
from bnntvm import spec as sp
from bnntvm.schedules import families
from bnntvm.schedules.cuda import layers
from bnntvm.targets.cuda import LEVELS

SPECS = [problem[0] for problem in _problems(np.random.default_rng(0))]
LARGE = [
    sp.BinaryConv2d(sp.Window(56, 56, (3, 3), (1, 1), (1, 1, 1, 1)), 256, 256, epilogue=sp.store("int32", "int32")),
    sp.BinaryConv2d(sp.Window(7, 7, (3, 3), (1, 1), (1, 1, 1, 1)), 512, 512, epilogue=sp.store("int32", "int32")),
    sp.BinaryDense(8192, 8192, epilogue=sp.store("int32", "int32")),
]


@pytest.mark.parametrize("isa", LEVELS, ids=lambda isa: isa.name)
def test_the_default_comes_first_and_nothing_twice(isa):
    for spec in SPECS + LARGE:
        family = families.of(spec, isa)
        found = family.space(spec, isa)
        assert found[0] == family.default_schedule(spec, isa) and len(set(found)) == len(found), spec


@pytest.mark.parametrize("isa", LEVELS, ids=lambda isa: isa.name)
def test_tensor_core_schedules_fit(isa):
    """Shared memory and registers of the row, for the kernel for few rows, too; every engine of the architecture is there."""
    for spec in SPECS + LARGE:
        found = [s for s in families.of(spec, isa).space(spec, isa) if getattr(s, "engine", layers.CORES) != layers.CORES]
        for schedule in found:
            for one, _ in layers.footprints(spec, schedule, isa):
                assert one.shared_bytes <= isa.block_shared_bytes and one.threads <= min(1024, isa.threads)
                assert one.threads * one.sums <= 1 << 16 and one.sums < 255, schedule
                assert one.rows in (32, 64, 128) and one.columns % 32 == 0 and one.steps > 0
        if spec in LARGE and isa.operation == "and":
            assert {s.engine for s in found} == {layers.MMA, *([layers.WGMMA] if isa.wgmma else [])}


def test_every_choice_is_offered():
    """What may be tuned of the large layers on sm_90a has alternatives in every dimension."""
    isa = next(level for level in LEVELS if level.wgmma)
    found = [s for spec in LARGE for s in families.of(spec, isa).space(spec, isa)]
    several = ("engine", "rows", "columns", "warp_rows", "warp_columns", "slab", "stages", "slices", "resident", "cluster", "few", "split")
    assert [name for name in several if len({getattr(s, name) for s in found}) < 2] == []


def test_the_kernel_for_few_rows_comes_first():
    isa = next(level for level in LEVELS if level.wgmma)
    spec = LARGE[1]
    schedule = families.of(spec, isa).default_schedule(spec, isa)
    found = layers.footprints(spec, schedule, isa)
    assert [limit is None for _, limit in found] == [False] * (len(found) - 1) + [True] and len(found) > 1
    small, large = found[0][0], found[-1][0]
    assert small.rows * small.columns < large.rows * large.columns and small.split == schedule.split > 1 == large.split
