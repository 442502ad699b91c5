"""What a candidate does to its process is the candidate's problem alone."""

import ctypes
import json
import os
import threading
import time

import numpy as np
import pytest

from bnntvm.targets import x86
from bnntvm.tuning import measure, records
from bnntvm.tuning.driver import Tuner
from bnntvm.tuning.measure import Local, Pipeline
from bnntvm.tuning.space import Space
from bnntvm.tuning.store import FAILURES, Store
from bnntvm.tuning.tasks import Operand
from bnntvm.tuning.worker import Failure, isolated

from .faulty import KINDS, SIZE, FaultyTask, Schedule, Spec


def test_isolated():
    """Values and reasons come back; crashes, endless loops and exits do not reach the caller."""
    assert isolated(np.arange, 3, limit=20).tolist() == [0, 1, 2]
    for function, argument, reason in (
        (np.zeros, -1, "ValueError: negative dimensions"),
        (ctypes.string_at, 0, "crashed: SIGSEGV"),
        (time.sleep, 60, "time out after 0.5 s"),
        (os._exit, 7, "ended with status 7"),
    ):
        start = time.monotonic()
        with pytest.raises(Failure, match=reason):
            isolated(function, argument, limit=0.5 if function is time.sleep else 20)
        assert time.monotonic() - start < 15


@pytest.fixture
def faulty_task():
    key = '{"family":"faulty"}'
    operand = Operand((SIZE,), "float32")
    return FaultyTask(records.task_id(key), key, "faulty", Spec(), x86.host_level(), (operand,), (operand,), ["a", "b"])


def test_bad_candidates_are_recorded_and_never_chosen(tmp_path, monkeypatch, faulty_task):
    """One of each: the good ones are measured, the others recorded with their reason, and the fastest good one wins."""
    monkeypatch.setattr(measure, "BUILD_LIMIT", 3.0)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    told = []
    tuner = Tuner([faulty_task], Store(tmp_path), Local(1), 1, None, lambda *one: told.append(one))
    try:
        result = tuner.run(len(KINDS))
    finally:
        tuner.close()
        tuner.store.close()
    assert (result.measured, result.failed) == (2, 8) == (sum(bool(s) for *_, s in told), sum(not s for *_, s in told))
    assert result.rows[0].schedule == Schedule("better") and result.gain > 1.5
    reasons = {}
    for line in (tmp_path / FAILURES).read_text().splitlines():
        entry = json.loads(line)
        reasons[entry["schedule"]["kind"]] = entry["reason"]
    assert reasons["wrong"] == "wrong result: output 0: 64 of 64 elements are wrong"
    assert reasons["behind"] == "wrong result: 8 bytes behind an output are overwritten"
    assert reasons["before"] == "wrong result: 8 bytes before an output are overwritten"
    assert reasons["input"] == "wrong result: an input is overwritten"
    assert reasons["no code"] == "ValueError: no code for this"
    assert reasons["compiler dies"] == reasons["crashes"] == "crashed: SIGSEGV"
    assert reasons["hangs"] == "time out after 3 s"
    tuned = records.Tuned([tmp_path])
    chosen = tuned.schedule(faulty_task.id, [faulty_task.isa.name], 1, lambda fields: Schedule(**fields), Schedule("good"))
    assert chosen == Schedule("better")


def test_nothing_is_measured_after_the_end(tmp_path, faulty_task, monkeypatch):
    """A session that was stopped starts nothing new, and records nothing that was not measured."""
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    stop, store = threading.Event(), Store(tmp_path)
    stop.set()
    pipeline = Pipeline(store, Local(1), stop)
    future = pipeline.run(Space(faulty_task, 1), Schedule("good"))
    assert isinstance(future.exception(timeout=60), measure.Stopped)
    pipeline.close()
    store.close()
    assert records.read(tmp_path) == ([], [])
