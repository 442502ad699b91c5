"""Sessions: the default first, nothing measured twice, nothing lost."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

import bnntvm
from benchmarks.layers import Layer
from bnntvm.targets import x86
from bnntvm.tuning import measure, records
from bnntvm.tuning.driver import Tuner
from bnntvm.tuning.measure import Pipeline
from bnntvm.tuning.space import Space, fields
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
        (dict(threads=100000), "cannot be measured on 100000 threads"),
    ):
        with pytest.raises(bnntvm.BnnError, match=message):
            bnntvm.tune(str(model), database=tmp_path, progress=False, **options)
