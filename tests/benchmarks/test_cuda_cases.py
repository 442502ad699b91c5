"""The cases for a GPU: every way through the code is among them, and the emulator finds those of the newest engines right."""

import numpy as np
import pytest

from benchmarks import cuda as steps_of_gpu
from benchmarks import cuda_prepare
from benchmarks.cuda_cases import _problems, cases, some, way
from bnntvm import spec as sp
from bnntvm.schedules import families
from bnntvm.schedules.cuda import emulate
from bnntvm.targets import cuda as targets

LEVELS = {level.name: level for level in targets.LEVELS}


@pytest.fixture(scope="module")
def all_cases():
    return list(cases(LEVELS["sm_90a"]))


@pytest.fixture(scope="module")
def specs():
    return [spec for spec, *_ in _problems(np.random.default_rng(0))]


def test_every_way(all_cases):
    """Of wgmma: resident weights or not, clusters, narrow tiles for few rows, K in parts; names differ."""
    ways = {way(case.schedule) for case in all_cases}
    assert {w[0] for w in ways} >= {"cores", "mma", "wgmma"}
    resident = {(w[1:4], w[4] > 1) for w in ways if w[0] == "wgmma"}
    assert resident == {((stays, cluster, few), split) for stays, cluster in ((True, 1), (False, 1), (False, 2)) for few in (True, False)
                        for split in (True, False)}  # fmt: skip
    assert {w[4] for w in ways if w[0] == "mma"} >= {1, 2}
    names = [case.name for case in all_cases]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a"])
def test_parts_that_meet_in_memory(arch, specs):
    """Of convolutions, dense layers, products, and sums of planes that tensor cores count; how many is a size, not a way."""
    found, isa = {}, LEVELS[arch]
    for spec in specs:
        for schedule in some(families.of(spec, isa).space(spec, isa)):
            if getattr(schedule, "in_memory", False):
                found.setdefault(type(spec).__name__, set()).add(way(schedule)[4])
    planes = {"PlanesDense"} if isa.operation == "and" else set()
    assert set(found) == {"BinaryConv2d", "BinaryDense", "BinaryMatmul"} | planes and set.union(*found.values()) == {2}


def test_one_of_each_way_of_a_space():
    spec = sp.BinaryDense(8200, 200)
    space = families.of(spec, LEVELS["sm_90a"]).space(spec, LEVELS["sm_90a"])
    chosen = some(space)
    assert chosen[0] == space[0] and [way(s) for s in chosen] == list(dict.fromkeys(way(s) for s in space))


def test_rows_on_both_sides(all_cases):
    """Few rows take the kernels for few, many the others, and blocks that stay have several tiles."""
    rows = {case.arrays[0].shape[0] for case in all_cases if isinstance(case.spec, sp.BinaryDense)}
    assert min(rows) == 1 and max(rows) > 132 * 128


def test_the_emulator_finds_them_right(all_cases):
    isa, run = LEVELS["sm_90a"], 0
    for case in all_cases:
        split, product = getattr(case.schedule, "split", 1) > 1, isinstance(case.spec, sp.BinaryMatmul)
        if (split or product) and np.prod(case.results[0].shape) < 30000:
            results = [np.full(one.shape, 77, one.dtype) for one in case.results]
            function = families.of(case.spec, isa).build(case.spec, case.schedule, isa)
            emulate.run(function, [*case.arrays, *results])
            for got, expected in zip(results, case.results, strict=True):
                np.testing.assert_array_equal(got, expected, err_msg=case.name)
            run += 1
    assert run > 20


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_every_timed_kernel_belongs_to_a_step(arch, monkeypatch):
    """Also attention on both engines, and layers of few rows with K in parts where there are clusters."""
    names, steps = [entry["name"] for entry, _ in cuda_prepare.timed(LEVELS[arch])], []
    monkeypatch.setattr(steps_of_gpu, "_timed", lambda _folder, _write, prefixes: steps.extend(prefixes))
    steps_of_gpu.step_matrices(None, None)
    steps_of_gpu.step_convolutions(None, None)
    assert len(set(names)) == len(names) and all(name.startswith(tuple(steps)) for name in names)
    assert {"product_197x197x64_b96_mma", "product_197x197x64_b96_cores", "few_25088x512_split1"} <= set(names)
    assert ("few_25088x512_split8" in names) == (arch == "sm_90a")
