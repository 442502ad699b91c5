"""How the records that the package ships are chosen; nothing is measured here."""

import pytest

from benchmarks import records as maker_module
from benchmarks.records import Kernel, Maker, Winner
from bnntvm import spec as specs
from bnntvm.schedules import binary_conv2d, float_dense
from bnntvm.targets import x86
from bnntvm.tuning import records
from bnntvm.tuning.space import Space, fields
from bnntvm.tuning.store import Store
from bnntvm.tuning.tasks import Operand, Task
from bnntvm.tuning.workload import chooser, family_name, key_of

LEVEL, OTHER = (next(level for level in x86.LEVELS if level.name == name) for name in ("x86-64-v4-vpopcnt", "x86-64-v3"))


def kernel(spec, family, uses, level=LEVEL):
    key = key_of(family, spec, 1)
    task = Task(records.task_id(key), key, family_name(family), spec, level, (Operand((1, 8, 8, 2), "uint32"),), (), ["layer"])
    return Kernel(Space(task, 1), dict.fromkeys(uses, 1))


def conv(uses, level=LEVEL, channels=64):
    return kernel(
        specs.BinaryConv2d(specs.Window(8, 8, (3, 3)), 64, channels, epilogue=specs.store("float32", "int32")), binary_conv2d, uses, level
    )


def dense(uses):
    return kernel(specs.FloatDense(64, 100, specs.store()), float_dense, uses)


def winner(one, number=1):
    return Winner(one, one.space.schedules[number], 1.1, ([2e-5] * 3, [1e-5] * 3))


@pytest.fixture
def maker(tmp_path, monkeypatch):
    monkeypatch.setattr(Maker, "_kernels", lambda self: {})
    monkeypatch.setattr(Maker, "_network", lambda self, name, tuning, tag: f"{name} {tag}")
    return Maker(LEVEL, dict.fromkeys("abc"), tmp_path / "db", tmp_path)


def test_only_what_wins_every_round_is_kept(maker, monkeypatch):
    one, two = conv("a"), conv("a", channels=96)
    names = {k.space.task.id: k for k in (one, two)}
    for each in names.values():
        default, first, second, third = each.space.schedules[:4]
        store = Store(maker.database)
        for schedule, seconds in ((default, 10e-6), (first, 8e-6), (second, 7e-6), (third, 9.99e-6)):
            store.commit(each.space, schedule, [seconds])
        store.close()
    maker.kernels = names
    monkeypatch.setattr(Maker, "_built", lambda self, space, schedule: ("", str(space.schedules.index(schedule))))
    asked, rounds = [], iter([[(10, 7, 9), (10, 7, 9)], [(10, 9.9, 9), (10, 10, 10.5)]])

    def measure(_self, kind, jobs):
        asked.append([[int(library) for _, library in job] for job in jobs.values()])
        return {name: [[seconds] * 3 for seconds in row] for name, row in zip(jobs, next(rounds))}

    monkeypatch.setattr(Maker, "measure", measure)
    found = maker.choose()
    assert asked == [[[0, 2, 1], [0, 2, 1]]] * 2, "the default, then the fastest first; a gain within the noise is not compared"
    assert list(found) == [one.space.task.id]
    assert found[one.space.task.id].schedule == one.space.schedules[1] and found[one.space.task.id].gain == pytest.approx(10 / 9)


def test_records_of_a_slower_network_are_dropped(maker, monkeypatch):
    """b is slower with the record that it shares with a; a is measured again without, c keeps its own."""
    shared, own, third = conv("ab"), dense("a"), conv("c", channels=96)
    winners = {k.space.task.id: winner(k) for k in (shared, own, third)}
    ratios, seen = iter([{"a": 0.9, "b": 1.01, "c": 0.95}, {"a": 0.99}]), []

    def measure(_self, kind, jobs):
        seen.append(jobs)
        return {name: (1e-3, ratio * 1e-3, ratio) for name, ratio in next(ratios).items()}

    monkeypatch.setattr(Maker, "measure", measure)
    report, left = maker.networks(winners)
    assert seen == [{n: [f"{n} default", f"{n} tuned"] for n in "abc"}, {"a": ["a default", "a tuned"]}]
    assert set(left) == {own.space.task.id, third.space.task.id}
    assert {name: ratio for name, (*_, ratio) in report.items()} == {"a": 0.99, "c": 0.95}


def test_shipping_replaces_one_level(maker, tmp_path):
    target = tmp_path / "records"
    first, other, second = conv("a"), conv("a", OTHER), dense("a")
    maker.ship({"x": winner(first)}, target)
    maker.level = OTHER
    maker.ship({"x": winner(other, 2)}, target)
    assert {r.isa for r in records.read(target)[0]} == {LEVEL.name, OTHER.name}
    for one in (first, other):
        task = one.space.task
        chosen = chooser(str(target), 1)(task.module, task.spec, task.isa, (1, 8, 8, 2))
        assert chosen == one.space.schedules[1 if one is first else 2]
    maker.level = LEVEL
    maker.ship({"y": winner(second)}, target)
    assert [(r.isa, r.schedule) for r in records.read(target)[0]] == [
        (level.name, fields(one.space.schedules[n]))
        for level, one, n in ((OTHER, other, 0), (OTHER, other, 2), (LEVEL, second, 0), (LEVEL, second, 1))
    ]
    maker.ship({}, target)
    assert {r.isa for r in records.read(target)[0]} == {OTHER.name}


def test_jobs_that_no_process_finishes_end(maker, monkeypatch, tmp_path):
    """A measuring process that dies is started again, a few times, and what is never measured is missing from the results."""
    calls = []
    monkeypatch.setattr(maker_module.subprocess, "run", lambda command, **_: calls.append(command))
    assert maker.measure("kernels", {"x": []}) == {} and len(calls) == 3
