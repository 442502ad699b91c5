"""Candidates within their network: every call belongs to its task, and only such times decide where there are some."""

import pickle
import threading
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import bnntvm
from benchmarks.layers import Layer
from bnntvm.targets import x86
from bnntvm.tuning import in_network, measure, records, stage, turns, worker
from bnntvm.tuning.in_network import Chooser, Network
from bnntvm.tuning.measure import Failure, Local, Pipeline
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


def test_every_kernel_belongs_to_its_task(model, tasks):
    chooser = Chooser()
    module = bnntvm.build(model, tuning=chooser, threads=1)
    calls = [call["kernel"] for call in module._manifest["calls"] if call["own"]]
    found = [task for kernel in calls for task in chooser.tasks(kernel).values()]
    assert sorted(found) == sorted(name for name, task in tasks.items() for _ in task.layers)
    for kernel in calls:
        (task,) = chooser.tasks(kernel).values()
        assert kernel.startswith(tasks[task].family)
    for (_, schedule), own in chooser.kernels.items():
        assert all(schedule == Space(tasks[task], 1).default for task in own.values() if task in tasks)


def test_kernels_of_tvms_have_no_task():
    """An operator that no family takes is a call like any other, whatever its name ends with."""
    data = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 32, 6, 6])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 32, 6, 6])
    graph = helper.make_graph([helper.make_node("Sin", ["x"], ["s"]), helper.make_node("Sigmoid", ["s"], ["y"])], "g", [data], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    chooser = Chooser()
    calls = bnntvm.build(model, tuning=chooser, threads=1)._manifest["calls"]
    own = [call["kernel"] for call in calls if call["own"]]
    assert 0 < len(own) < len(calls) and all(chooser.tasks(kernel) for kernel in own)


@pytest.fixture
def pipeline():
    made = Pipeline(None, Local(1), threading.Event())
    yield made
    made.close()


def test_times_of_every_task(model, tasks, pipeline):
    """Whatever its rank, a schedule runs in its network, the default beside it; one that does not build is left out."""
    spaces = [Space(task, 1) for task in tasks.values()]
    chosen = [(space, space.schedules[: 1 + n % 3]) for n, space in enumerate(spaces)]
    broken = next(n for n, (space, _) in enumerate(chosen) if space.task.family == "binary_conv2d")
    chosen[broken][1].append(replace(spaces[broken].default, task_rows=0))
    network = pipeline.build_network(Network(model, ISA, 1, {}))
    found = in_network.compare_schedules(network, pipeline, chosen)
    assert found.keys() == tasks.keys()
    for n, (space, schedules) in enumerate(chosen):
        own = found[space.task.id]
        assert list(own)[0] == space.default and set(own) == set(schedules[:-1] if n == broken else schedules)
        counts = (in_network.TURNS, 2 * in_network.TURNS)  # twice where the machine was busy
        assert all(len(turns) in counts and 0 < min(turns) and max(turns) < 1 for turns in own.values())


def test_the_network_calls_what_stands_for_its_kernels(model, tasks, tmp_path):
    """Another kernel's function in the place of one is called with the same arguments, except for the weights."""
    built = Network(model, ISA, 1, {}).build(str(tmp_path))
    task = next(task for task in tasks.values() if task.family == "binary_conv2d")
    space = Space(task, 1)
    worker.prepare(_folder(tmp_path, task), 60)
    libraries = [str(tmp_path / f"{n}.so") for n in range(2)]
    for library, schedule in zip(libraries, (space.default, space.schedules[-1])):
        worker.build(_folder(tmp_path, task), schedule, library, 60, 60)
    one = stage.Stage(built, {task.id: [stage.Candidate(library, task.weights_at) for library in libraries]})
    assert len(one.calls) == len(task.layers)

    def result():
        one.probe["bnn_probe_reset"]()
        return one.machine.run(one.staged, 1, one.single)[0].copy()

    one.swap({})
    expected = result()
    one.swap({task.id: stage.Candidate(libraries[0], -1)})  # the default schedule with the network's weights
    assert (result() == expected).all()
    results = []
    for candidate in one.candidates[task.id]:  # with the first layer's weights for all, in their own layouts
        one.swap({task.id: candidate})
        results.append(result())
    assert (results[0] == results[1]).all() and (results[0] != expected).any()
    one.swap({})
    assert (result() == expected).all()


def _folder(tmp_path, task):
    folder = tmp_path / task.id
    if not folder.exists():
        folder.mkdir()
        (folder / "task.pickle").write_bytes(pickle.dumps(task))
    return str(folder)


def test_a_turn_that_crashes_is_a_failure(model, tasks, tmp_path):
    built = Network(model, ISA, 1, {}).build(str(tmp_path))
    name = next(iter(tasks))
    with pytest.raises(Failure, match="none.so"):
        in_network.compare(built, {name: [stage.Candidate(str(tmp_path / "none.so"), -1)]})


def test_a_session_ends_with_a_comparison_in_the_network(model, tasks, tmp_path):
    result = bnntvm.tune(model, trials=len(tasks) + 8, database=tmp_path, progress=False)
    found = records.by_task(records.read(tmp_path)[0])
    compared = {task: [r for own in schedules.values() for r in own if r.compared] for (task, *_), schedules in found.items()}
    compared = {task: own for task, own in compared.items() if own}
    assert compared and all(2 <= len(own) <= 1 + in_network.STAY for own in compared.values())
    for row in result.rows:
        if row.task in compared:
            turns_of = {r.schedule: r.seconds for r in compared[row.task]}
            default = next(r.schedule for r in compared[row.task] if r.default)
            judged = turns.judge(turns_of, default)
            assert row.best_us == pytest.approx(1e6 * judged.seconds, rel=1e-4) and row.name not in result.uncompared
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
    assert store.compared(space) == {default: pytest.approx((40e-6,)), second: pytest.approx((38e-6,))} and store.measured(space) == {}
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


def test_one_layer_at_two_sizes_is_two_tasks(pipeline):
    """One kernel computes both; within the network each call is timed for its own task."""
    weights = np.where(np.random.default_rng(0).random((64, 32)) < 0.5, -1, 1).astype(np.float32)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, 64]) for name, rows in (("a", 1), ("b", 17))]
    outputs = [helper.make_tensor_value_info(f"y{name}", TensorProto.FLOAT, [rows, 32]) for name, rows in (("a", 1), ("b", 17))]
    nodes = [node for name in "ab" for node in (helper.make_node("Sign", [name], [f"s{name}"]),
                                                helper.make_node("MatMul", [f"s{name}", "w"], [f"y{name}"]))]  # fmt: skip
    graph = helper.make_graph(nodes, "two sizes", inputs, outputs, [numpy_helper.from_array(weights, "w")])
    two = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    spaces = [Space(task, 1) for task in extract(two, ISA) if task.family == "binary_dense"]
    assert sorted(space.task.operands[0].shape[0] for space in spaces) == [1, 17]
    found = in_network.compare_schedules(pipeline.build_network(Network(two, ISA, 1, {})), pipeline, [(s, s.schedules[:2]) for s in spaces])
    assert {task: set(own) for task, own in found.items()} == {s.task.id: set(s.schedules[:2]) for s in spaces}


class Clock:
    """Turns that take no time but that of a clock of their own."""

    def __init__(self, monkeypatch, times, seconds_of=in_network.turn_seconds):
        self.now, self.times, self.turns, self.seconds_of = 0.0, times, [], seconds_of
        monkeypatch.setattr(in_network.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(in_network, "_turn", self.turn)

    def turn(self, turn):
        assert turn.candidates.keys() == turn.numbers.keys()  # a kernel of which nothing is to run stays as it is
        self.turns.append(turn.numbers)
        self.now += self.seconds_of(max(map(len, turn.numbers.values())), 0.0)
        return {task: {number: self.times(task, number, len(self.turns)) for number in own} for task, own in turn.numbers.items()}


ALL = {"a": ["library"] * 9, "b": ["library"] * 4}


def test_a_comparison_takes_the_time_that_there_is(monkeypatch):
    """With enough of it, two rounds; with less, the fastest candidates alone, in fewer turns; never fewer than two."""
    for limit in (None, *range(1, 60)):
        clock = Clock(monkeypatch, lambda task, number, turn: 1.0 + number / 10)
        found = in_network.compare(None, ALL, limit)
        assert all(0 in own and len(own) >= 2 and len({len(turns) for turns in own.values()}) == 1 for own in found.values())
        if limit is None or limit >= in_network.needed(9, 0.0):
            assert len(clock.turns) == in_network.FIRST_TURNS + in_network.TURNS and clock.turns[0]["a"] == list(range(9))
        least = in_network.LEAST_TURNS * in_network.turn_seconds(2, 0.0)
        assert limit is None or clock.now <= max(limit, least) + 1e-9
        assert found["a"].keys() == {0, *range(1, len(found["a"]))}, "the fastest of the search where there is no first round"


def test_noise_is_answered_by_more_turns(monkeypatch):
    """Only of the kernel that could not be judged, once, and in the time that there is."""

    def times(task, number, turn):
        return 25.0 if task == "a" and turn <= in_network.FIRST_TURNS + in_network.TURNS and turn % 2 == (number == 0) else 1 - number / 10

    clock = Clock(monkeypatch, times)
    found = in_network.compare(None, ALL)
    assert [len(turns_["a"]) for turns_ in clock.turns[-in_network.TURNS :]] == [1 + in_network.STAY] * in_network.TURNS
    assert all("b" not in turns_ for turns_ in clock.turns[-in_network.TURNS :]) and len(found["b"][0]) == in_network.TURNS
    assert len(found["a"][0]) == 2 * in_network.TURNS and turns.judge(found["a"], 0).schedule == 8
    end = in_network.needed(9, 0.0) + 0.1
    clock = Clock(monkeypatch, times)
    assert turns.judge(in_network.compare(None, ALL, end)["a"], 0).noisy and clock.now <= end


def test_what_is_not_built_in_time_is_left_out(tasks, monkeypatch):
    """Defaults first, then the fastest of every kernel; what has not begun then never does."""
    spaces = [space for space in (Space(task, 1) for task in tasks.values()) if len(space.schedules) > 2][:2]
    futures = {}

    def build(space, schedule):
        return futures.setdefault((space.task.id, schedule), Future())

    def wait(future, end):
        if len([one for one in futures.values() if one.done()]) >= 3:
            raise worker.Late
        future.set_result(("folder", "library"))
        return future.result()

    found, candidates = in_network._built(SimpleNamespace(build=build), [(s, s.schedules[:3]) for s in spaces], wait, 1.0)
    assert found == {spaces[0].task.id: spaces[0].schedules[:2], spaces[1].task.id: spaces[1].schedules[:1]}
    assert sum(future.cancelled() for future in futures.values()) == 3 and {len(own) for own in candidates.values()} == {1, 2}


def test_work_that_was_cancelled_is_not_done():
    backlog, done = measure.Backlog(), []
    process = measure.Process.__new__(measure.Process)
    process.backlog, process.jobs, process.closed = backlog, measure.collections.deque(), False
    futures = [backlog.add(lambda _, n=n: done.append(n)) for n in range(3)]
    assert futures[1].cancel()
    thread = threading.Thread(target=process._serve)
    thread.start()
    futures[2].result(10)
    with backlog.changed:
        process.closed = True
        backlog.changed.notify_all()
    thread.join()
    assert done == [0, 2]
