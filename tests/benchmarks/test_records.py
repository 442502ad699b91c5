"""How the records that the package ships are chosen; nothing is measured here."""

from types import SimpleNamespace

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


def test_only_what_wins_in_every_network_is_kept(maker, monkeypatch):
    """In both halves of the turns, in all networks that have the kernel; of two, the one with the larger gain in its worst comparison."""
    one, two, three = conv("ab"), conv("a", channels=96), dense("a")
    maker.kernels = {k.space.task.id: k for k in (one, two, three)}
    ids = list(maker.kernels)
    for each in maker.kernels.values():
        store = Store(maker.database)
        for schedule, seconds in zip(each.space.schedules[:4], (10e-6, 8e-6, 7e-6, 9.99e-6)):
            store.commit(each.space, schedule, [seconds])
        store.close()
    times = {
        ("a", ids[0]): [(10,) * 4, (7,) * 4, (9,) * 4], ("b", ids[0]): [(10,) * 4, (9.5,) * 4, (8,) * 4],  # at worst 9.5 and 9
        ("a", ids[1]): [(10,) * 4, (9, 10.5) * 2, (9.95,) * 4],  # wins in one half, too little
        ("a", ids[2]): [(10,) * 4, (11,) * 4, (12,) * 4],
    }  # fmt: skip

    def compare(network, _pipeline, chosen):
        mine = {task: rows for (name, task), rows in times.items() if name == network.model}
        schedules = {space.task.id: own for space, own in chosen}
        assert schedules[ids[0]][:3] == [one.space.schedules[n] for n in (0, 2, 1)]
        return {task: {s: list(seconds) for s, seconds in zip(schedules[task], rows)} for task, rows in mine.items()}

    pipeline = SimpleNamespace(build_network=lambda network: network, close=lambda: None)
    monkeypatch.setattr(maker_module, "Local", lambda _threads: None)
    monkeypatch.setattr(maker_module, "Pipeline", lambda *_: pipeline)
    monkeypatch.setattr(maker_module.in_network, "compare_schedules", compare)
    maker.models = {"a": "a", "b": "b"}
    found = maker.choose()
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
    assert maker.measure("networks", {"x": []}) == {} and len(calls) == 3
