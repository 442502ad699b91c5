"""The database that a tuning session writes: MetaSchedule's JSON database, one line for each candidate as soon as it is measured."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
import threading
import time

from tvm.s_tir import meta_schedule as ms

from bnntvm.build import tvm_target
from bnntvm.errors import BnnError
from bnntvm.tuning import records
from bnntvm.tuning.space import fields, workload_module

FAILURES = "failures.json"


class Store:
    """A folder of records, open for writing by one tuner.

    Parameters
    ----------
    folder : path
        Made if it does not exist. Lines that cannot be read move to ``*.damaged`` files.

    Attributes
    ----------
    damaged : int
        How many lines that were.
    """

    def __init__(self, folder):
        self.folder, self.lock, self.workloads = pathlib.Path(folder), threading.Lock(), {}
        with contextlib.ExitStack() as held:
            self._open(held)
            self._held = held.pop_all()  # until close, but not if opening failed

    def _open(self, held):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(records.only_writer(self.folder))
            self.damaged = records.mend(self.folder, placeholder, whole=_whole)
        except OSError as error:
            raise _unwritable(self.folder, error.strerror or str(error)) from error
        try:
            self.database = ms.database.JSONDatabase(work_dir=str(self.folder))
        except Exception as error:  # TVM's errors have no common base
            raise _unwritable(self.folder, str(error).strip().splitlines()[-1]) from error
        self.known = records.by_task(records.read(self.folder)[0])

    def measured(self, space):
        """Schedule -> seconds of a space's schedules that its machine measured alone before; infinite for those that failed."""
        found = {s: [r for r in results if not r.compared] for s, results in self._known(space).items()}
        return {s: float("inf") if any(r.failed for r in own) else own[-1].time for s, own in found.items() if own}

    def _known(self, space):
        """Schedule -> records of the space's machine."""
        found = {}
        for fields_, results in self.known.get((space.task.id, space.task.isa.name, space.threads), {}).items():
            schedule, own = space.schedule_from(dict(fields_)), [r for r in results if r.machine == space.machine]
            if schedule is not None and own:
                found[schedule] = found.get(schedule, []) + own
        return found

    def commit(self, space, schedule, seconds, failure=None, place=""):
        """Append a measured candidate.

        Parameters
        ----------
        seconds : list of float
            Empty if it failed: then ``failure`` says why.
        place : str
            See :class:`.records.Record`.

        Raises
        ------
        BnnError
            If it could not be written.
        """
        trace, target = space.trace(schedule, place).trace, tvm_target(space.task.isa)
        with self.lock:
            if space.task.id not in self.workloads:
                self.workloads[space.task.id] = self.database.commit_workload(space.module)
            run = [float(s) for s in seconds] or [records.FAILED]
            before = self._size()
            self.database.commit_tuning_record(ms.database.TuningRecord(trace, self.workloads[space.task.id], run, target, []))
            if self._size() <= before or not self._ended():  # TVM's writer does not look
                raise BnnError(
                    "a record could not be written", where=str(self.folder), why="the disk is full, or the folder is gone",
                    hint="what was recorded before is sound: make room, and tune again",
                )  # fmt: skip
            if failure:
                self._note(dict(task=space.task.id, isa=space.task.isa.name, schedule=dict(fields(schedule)), reason=failure))

    def _note(self, failure):
        """Append to the list of failures."""
        try:
            with open(self.folder / FAILURES, "a", encoding="utf-8") as file:
                file.write(json.dumps(failure) + "\n")
        except OSError as error:
            raise _unwritable(self.folder, error.strerror or str(error)) from error

    def _size(self):
        path = self.folder / records.RECORDS
        return path.stat().st_size if path.exists() else 0

    def _ended(self):
        """Whether the last record has its line end."""
        with open(self.folder / records.RECORDS, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"

    def compared(self, space):
        """The last comparison of a space's machine that can be judged: schedule -> seconds in every turn; empty where there is none."""
        for place, schedules in records.comparisons(self._known(space)):
            if place and space.default in schedules and len(schedules) > 1 and not records.judge(place, schedules, space.default).noisy:
                return schedules
        return {}

    def comparison(self, kind):
        """Place of the records of a new comparison: greater than those that are there, whatever the clock says."""
        names = (r.place.partition(" ")[2] for own in self.known.values() for results in own.values() for r in results)
        last = max((int(name, 16) for name in names if re.fullmatch("[0-9a-f]+", name)), default=0)
        return f"{kind} {max(time.time_ns(), last + 1):016x}"

    def close(self):
        with contextlib.suppress(OSError):
            self._held.close()


def _unwritable(folder, why):
    hint = "what is there is sound: make room, or give a folder that can be written"
    return BnnError("the tuning database cannot be written", where=str(folder), why=why, hint=hint)


def placeholder(task):
    """A line of the workload file that stands for the task of an id."""
    return json.dumps(ms.database.Workload(workload_module(task)).as_json())


def _whole(line):
    """Parse a record, as this project and as TVM do: TVM's database gives up at the first line that it cannot read."""
    record = records.parse(line)
    if _has_null(record.line):  # TVM 0.27 crashes on one
        raise ValueError("null")
    try:
        ms.database.TuningRecord.from_json(record.line[1], _any_workload())
    except Exception as error:  # TVM's errors have no common base
        raise ValueError(str(error)) from error
    return record


def _has_null(value):
    """Whether there is a null anywhere in JSON."""
    if isinstance(value, (list, dict)):
        return any(map(_has_null, value.values() if isinstance(value, dict) else value))
    return value is None


@functools.lru_cache(maxsize=1)
def _any_workload():
    return ms.database.Workload(workload_module("any"))
