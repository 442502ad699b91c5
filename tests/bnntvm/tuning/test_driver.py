"""Sessions: the default first, nothing measured twice, nothing lost."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

import bnntvm
from benchmarks.layers import Layer
from bnntvm import cli
from bnntvm.targets import x86
from bnntvm.tuning import measure, records
from bnntvm.tuning.driver import Tuner
from bnntvm.tuning.measure import Pipeline
from bnntvm.tuning.space import Space, fields
from bnntvm.tuning.store import Store
from bnntvm.tuning.tasks import extract


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two equal layers of 32 channels and their surroundings."""
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    path.write_bytes(Layer(32, 6).chain(3).SerializeToString())
    return path


def lines(folder):
    path = folder / records.RECORDS
    return path.read_text().splitlines() if path.exists() else []


def test_equal_layers_are_one_task(model):
    tasks = extract(str(model), x86.host_level())
    convolutions = [t for t in tasks if t.family == "binary_conv2d"]
    assert sorted(len(t.layers) for t in convolutions) == [1, 2], "layers with equal epilogues share a task"
    assert len({t.id for t in tasks}) == len(tasks)


SCRIPT = "import sys, bnntvm; bnntvm.tune(sys.argv[1], trials=400, database=sys.argv[2], progress=False)"


def wait_for(folder, count, process=None):
    """Wait until there are ``count`` records."""
    deadline = time.monotonic() + 300
    while len(lines(folder)) < count and (process is None or process.poll() is None) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(lines(folder)) >= count


def test_sessions(model, tmp_path):
    """A killed session has recorded all that it measured; the next goes on; Ctrl-C ends one in order; a build uses the records."""
    tasks = {t.id: Space(t, 1) for t in extract(str(model), x86.host_level())}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(model), str(tmp_path)])
    wait_for(tmp_path, len(tasks) + 3, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    found, bad = records.read(tmp_path)
    assert not bad and len(found) >= len(tasks) + 3
    first = {r.task: r.schedule for r in found[: len(tasks)]}
    assert first == {name: fields(space.default) for name, space in tasks.items()}, "defaults come first"

    def interrupt():
        wait_for(tmp_path, len(found) + 2)
        os.kill(os.getpid(), signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    helper.start()
    second = bnntvm.tune(str(model), trials=400, database=tmp_path, progress=False)
    helper.join()
    after, bad = records.read(tmp_path)
    assert second.interrupted == "interrupted" and after[: len(found)] == found and not bad
    assert len(after) == len(found) + second.measured + second.failed and second.measured >= 2
    assert len({(r.task, r.schedule) for r in after}) == len(after), "nothing is measured twice"

    third = bnntvm.tune(str(model), trials=len(after) + 3, database=tmp_path, progress=False)
    assert third.measured == 3 and third.gain >= 1
    tuned, plain = bnntvm.build(str(model), tuning=tmp_path, threads=1), bnntvm.build(str(model), tuning=False, threads=1)
    feed = plain.random_feed()
    for name, array in plain.run(feed).items():
        np.testing.assert_array_equal(tuned.run(feed)[name], array)


def test_ctrl_c_ends_the_last_comparison(model, tmp_path, monkeypatch):
    """It takes some seconds, for which nobody who has pressed Ctrl-C wants to wait; what was measured before is kept."""
    asked = []

    def press(self, future, end=None):
        asked.append(future)
        os.kill(os.getpid(), signal.SIGINT)
        return wait_as_before(self, future, end)

    wait_as_before = Tuner._wait
    monkeypatch.setattr(Tuner, "_wait", press)
    result = bnntvm.tune(str(model), trials=12, database=tmp_path, progress=False)
    assert len(asked) == 1 and result.interrupted == "interrupted" and result.measured == 12
    assert result.uncompared and result.gain == 1, "what was not compared is no gain yet"
    assert not any("bnn.place" in line for line in lines(tmp_path))


def test_folders_of_killed_sessions_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    alive = Pipeline(None, SimpleNamespace(close=lambda: None), threading.Event())
    for name in ("bnntvm-tune-dead", "bnntvm-tune-starting", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "bnntvm-tune-dead" / "lock").touch()
    other = Pipeline(None, SimpleNamespace(close=lambda: None), threading.Event())
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {alive.folder.name, other.folder.name, "bnntvm-tune-starting", "other"}
    alive.close()
    other.close()
    assert {path.name for path in tmp_path.iterdir()} == {"bnntvm-tune-starting", "other"}


def test_what_the_machine_lacks_is_no_fault_of_a_candidate(model, tmp_path, monkeypatch):
    """A full disk ends the session with a message, a dead process its candidate; neither is recorded."""
    with monkeypatch.context() as patch:
        patch.setattr(measure, "LEAST_ROOM", 1 << 60)
        with pytest.raises(bnntvm.BnnError, match="too little room"):
            bnntvm.tune(str(model), trials=12, database=tmp_path, progress=False)
    process = measure.Process([], 1, measure.Backlog())
    with pytest.raises(measure.Stopped, match="died"):
        process.submit(os._exit, 1).result()
    process.close()
    assert not lines(tmp_path) and not (tmp_path / "failures.json").exists()


def test_bad_arguments(model, tmp_path):
    for options, message in (
        (dict(layers="no such layer"), "no kernel is called like this"),
        (dict(rpc="nowhere"), "which boards"),
        (dict(rpc="nowhere", key="k"), "not host:port"),
        (dict(trials=-1), "must not be negative"),
        (dict(trials="5"), "whole numbers"),
        (dict(time_limit=float("nan")), "number of seconds"),
        (dict(time_limit="1m"), "number of seconds"),
        (dict(threads=100000), "cannot be measured on 100000 threads"),
    ):
        with pytest.raises(bnntvm.BnnError, match=message):
            bnntvm.tune(str(model), database=tmp_path, progress=False, **options)


class Device(measure.Measures):
    """Measures nothing: a candidate takes a microsecond; in a comparison, which takes ``seconds``, what ``times`` says of its number."""

    build_cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def __init__(self, times, seconds=0.0):
        self.times, self.seconds, self.compared = times, seconds, []
        self.backlog, self.closed = measure.Backlog(), False
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while not self.closed:
            with self.backlog.changed:
                self.backlog.changed.wait_for(lambda: self.backlog.jobs, timeout=0.1)
                future, work = self.backlog.jobs.popleft() if self.backlog.jobs else (None, None)
            if future and future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(SimpleNamespace(call=lambda *_: None)))
                except measure.Stopped as error:
                    future.set_exception(error)

    def measure(self, folder, library):
        return self._later([1e-6] * 6, 0.0)

    def compare(self, candidates):
        self.compared.append(len(candidates))
        return self._later([self.times(n) for n in range(len(candidates))], self.seconds)

    def _later(self, value, seconds):
        future = Future()
        threading.Timer(seconds, future.set_result, [value]).start()
        return future

    def close(self):
        self.closed = True


def session(model, folder, device, trials, time_limit=None, tasks=None):
    """A session that compares alone."""
    found, store = tasks or extract(str(model), x86.host_level()), Store(folder)
    deadline = None if time_limit is None else time.monotonic() + time_limit
    tuner = Tuner(found, store, device, 1, deadline, lambda *_: None)
    try:
        return tuner.run(trials)
    finally:
        tuner.close()
        store.close()


def test_noise_is_said_and_changes_nothing(model, tmp_path):
    """Default schedules that took 25 times as long while others worked: no gain is claimed; the next session compares again."""

    def busy(number):
        return [0.9e-6, 30e-6] * 6 if number else [25e-6, 1e-6] * 6

    tasks = extract(str(model), x86.host_level())
    device = Device(busy)
    first = session(model, tmp_path, device, 30)
    assert first.gain == 1 and not first.uncompared
    assert set(first.noisy) == {task.name for task in tasks if len(Space(task, 1).schedules) > 1}
    assert all(row.schedule == Space(task, 1).default for row, task in zip(first.rows, tasks))

    def quiet(number):
        return [1e-6 - number * 1e-7] * 12

    second = session(model, tmp_path, Device(quiet), 0)
    assert second.measured == 0 and not second.noisy and second.gain > 1.2
    third = Device(quiet)
    assert session(model, tmp_path, third, 0).gain == pytest.approx(second.gain, rel=1e-3) and not third.compared


def test_what_was_measured_alone_is_no_gain(model, tmp_path):
    """A search that was ended by Ctrl-C claims nothing, and says so."""
    device = Device(lambda number: [1e-6])
    device.compare = lambda candidates: (_ for _ in ()).throw(measure.Stopped())
    result = session(model, tmp_path, device, 30)
    assert result.gain == 1 and result.uncompared and all(row.best_us == row.default_us for row in result.rows)


@pytest.mark.parametrize("limit", [0.0, 1.0, 3.0])
def test_the_time_limit_holds_for_the_comparison(model, tmp_path, limit):
    """A comparison that would take for ever is given up at the limit; what was measured is kept."""
    device, begin = Device(lambda number: [1e-6], seconds=100), time.monotonic()
    result = session(model, tmp_path, device, 10_000, limit)
    assert time.monotonic() - begin < limit + 15, "XGBoost may be imported at that moment"
    assert result.gain == 1 and (not limit or result.interrupted == "the time limit was reached")
    assert len(lines(tmp_path)) == result.measured and not any("bnn.place" in line for line in lines(tmp_path))


def test_the_search_leaves_the_comparison_its_time(model, tmp_path):
    tuner = Tuner(extract(str(model), x86.host_level()), Store(tmp_path), Device(lambda number: [1e-6]), 1, None, lambda *_: None)
    assert tuner._search_end() is None
    need = tuner._comparison_seconds()
    for limit in (0.0, need / 2, 2 * need, 100 * need):
        tuner.deadline = time.monotonic() + limit
        left = tuner.deadline - tuner._search_end()
        assert left == pytest.approx(min(need, 0.4 * limit), abs=0.1)
    tuner.close()
    tuner.store.close()


def test_a_network_with_nothing_to_tune(tmp_path):
    """Not an error."""
    data, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Sin", ["x"], ["y"])], "g", [data], [out])
    net = tmp_path / "net.onnx"
    net.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())
    done = CliRunner().invoke(cli.main, ["tune", str(net), "--database", str(tmp_path / "db")], catch_exceptions=False)
    assert (done.exit_code, done.output) == (0, "this network has no kernel that has schedules\n")
