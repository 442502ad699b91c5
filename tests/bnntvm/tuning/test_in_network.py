"""Candidates within their network: every call belongs to its task, and only such times decide where there are some."""

import os
from dataclasses import replace

import pytest
from onnx import TensorProto, helper

import bnntvm
from benchmarks.layers import Layer
from bnntvm.targets import x86
from bnntvm.tuning import records
from bnntvm.tuning.in_network import BUILDS, TURNS, Chooser, Network
from bnntvm.tuning.measure import Failure, Process
from bnntvm.tuning.space import Space
from bnntvm.tuning.store import Store
from bnntvm.tuning.tasks import extract

ISA = x86.host_level()


@pytest.fixture(scope="module")
def model():
    """Two equal layers of 32 channels and their surroundings."""
    return Layer(32, 6).chain(3).SerializeToString()


@pytest.fixture(scope="module")
def tasks(model):
    return {task.id: task for task in extract(model, ISA)}


def changed(tasks):
    """Another schedule for every task that has one."""
    spaces = {name: Space(task, 1) for name, task in tasks.items()}
    return {name: space.schedules[-1] for name, space in spaces.items() if len(space.schedules) > 1}


def test_every_kernel_belongs_to_its_task(model, tasks):
    for schedules in ({}, changed(tasks)):
        chooser = Chooser(schedules)
        module = bnntvm.build(model, tuning=chooser, threads=1)
        calls = [call["kernel"] for call in module._manifest["calls"] if call["own"]]
        found = [task for kernel in calls for task in chooser.tasks(kernel)]
        assert sorted(found) == sorted(name for name, task in tasks.items() for _ in task.layers)
        for kernel in calls:
            (task,) = chooser.tasks(kernel)
            assert kernel.startswith(tasks[task].family)
        for (_, schedule), (task,) in ((kernel, own) for kernel, own in chooser.kernels.items() if own <= tasks.keys()):
            assert schedule == (schedules.get(task) or Space(tasks[task], 1).default)


def test_kernels_of_tvms_have_no_task():
    """An operator that no family takes is a call like any other, whatever its name ends with."""
    data = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 32, 6, 6])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 32, 6, 6])
    graph = helper.make_graph([helper.make_node("Sin", ["x"], ["s"]), helper.make_node("Sigmoid", ["s"], ["y"])], "g", [data], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    chooser = Chooser({})
    calls = bnntvm.build(model, tuning=chooser, threads=1)._manifest["calls"]
    own = [call["kernel"] for call in calls if call["own"]]
    assert 0 < len(own) < len(calls) and all(chooser.tasks(kernel) for kernel in own)


def test_times_of_every_task(model, tasks):
    process = Process(sorted(os.sched_getaffinity(0))[-1:], 1)
    try:
        network = Network(model, ISA, process, 1, dict(assume_nonzero=False, weight_tolerance=0.0))
        both = network.times([{}, changed(tasks)])
        for times in both:
            assert times.keys() == tasks.keys()
            assert all(len(turns) == TURNS and 0 < min(turns) and max(turns) < 1 for turns in times.values())
        broken = {name: replace(Space(task, 1).default, task_rows=0) for name, task in tasks.items() if task.family == "binary_conv2d"}
        with pytest.raises((bnntvm.BnnError, Failure)):
            network.times([broken])
    finally:
        process.close()


def test_a_session_ends_with_a_comparison_in_the_network(model, tasks, tmp_path):
    result = bnntvm.tune(model, trials=len(tasks) + 8, database=tmp_path, progress=False)
    found = records.by_task(records.read(tmp_path)[0])
    compared = {task: [r for own in schedules.values() for r in own if r.in_network] for (task, *_), schedules in found.items()}
    compared = {task: own for task, own in compared.items() if own}
    assert compared and all(2 <= len(own) <= 1 + BUILDS for own in compared.values())
    for row in result.rows:
        if row.task in compared:
            assert row.best_us == pytest.approx(1e6 * min(r.time for r in compared[row.task]))
    again = bnntvm.tune(model, trials=len(tasks) + 8, database=tmp_path, progress=False)
    assert again.measured == 0, "times within the network are not taken for those of candidates"


def test_times_within_the_network_decide(tasks, tmp_path):
    space = next(space for space in (Space(task, 1) for task in tasks.values()) if len(space.schedules) > 3)
    default, first, second, third = space.schedules[:4]
    store = Store(tmp_path)
    for schedule, seconds in ((default, 9e-6), (first, 8e-6), (second, 7e-6), (third, 1e-6)):
        store.commit(space, schedule, [seconds])
    for schedule, seconds in ((default, 20e-6), (first, 18e-6), (second, 19e-6)):
        store.commit(space, schedule, [seconds], place="network 1")
    store.close()
    tuned = records.Tuned([tmp_path])
    assert tuned.schedule(space.task.id, [ISA.name], 1, space.schedule_from, default) == first
    store = Store(tmp_path)
    assert store.measured(space)[third] == pytest.approx(1e-6) and store.measured(space)[first] == pytest.approx(8e-6)
    store.close()


def test_only_the_last_comparison_counts(tasks, tmp_path):
    """A busy day makes everything slower: what was slower than the default then is no gain because the default was slower later."""
    space = next(space for space in (Space(task, 1) for task in tasks.values()) if len(space.schedules) > 3)
    default, first, second = space.schedules[:3]
    store = Store(tmp_path)
    for day, schedule, seconds in ((1, default, 20), (1, first, 21), (2, default, 40), (2, second, 38)):
        store.commit(space, schedule, [seconds * 1e-6], place=f"network {day}")
    store.close()
    assert records.Tuned([tmp_path]).schedule(space.task.id, [ISA.name], 1, space.schedule_from, default) == second
    store = Store(tmp_path)
    assert store.compared(space) == {default: pytest.approx(40e-6), second: pytest.approx(38e-6)} and store.measured(space) == {}
    store.close()


def test_a_comparison_that_was_missed_is_made_up_for(model, tasks, tmp_path):
    bnntvm.tune(model, trials=len(tasks) + 4, database=tmp_path, progress=False)
    path = tmp_path / records.RECORDS
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in whole if "bnn.place" not in line))
    again = bnntvm.tune(model, trials=len(tasks) + 4, database=tmp_path, progress=False)
    assert again.measured == 0 and not again.remark
    assert sum("bnn.place" in line for line in path.read_text().splitlines()) == sum("bnn.place" in line for line in whole)


def test_records_that_cannot_be_written_end_the_session(model, tmp_path, monkeypatch):
    """A full disk: TVM's writer says nothing, and the file does not grow."""
    monkeypatch.setattr(Store, "_size", lambda self: 10)
    with pytest.raises(bnntvm.BnnError, match="could not be written"):
        bnntvm.tune(model, trials=20, database=tmp_path / "db", progress=False)


@pytest.mark.parametrize("function", [lambda *a: None, lambda *a: 1 / 0, lambda one: one, lambda *a: "nonsense"])
def test_mistakes_of_a_function_that_chooses(model, function):
    with pytest.raises(bnntvm.BnnError, match="the tuning function (failed|returned)"):
        bnntvm.build(model, tuning=function)
    with pytest.raises(bnntvm.BnnError, match="tuning must be"):
        bnntvm.build(model, tuning=5)


def test_a_database_in_use_is_not_merged_into(tasks, tmp_path):
    space = Space(next(iter(tasks.values())), 1)
    for name in ("a", "b"):
        store = Store(tmp_path / name)
        store.commit(space, space.default, [1e-5])
    with pytest.raises(bnntvm.BnnError, match="another tuner"):
        records.merge([tmp_path / "a"], tmp_path / "b")
    store.close()
    assert records.merge([tmp_path / "a"], tmp_path / "b")[1] == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(bnntvm.BnnError, match="cannot be written"):
        records.merge([tmp_path / "a"], tmp_path / "file")
