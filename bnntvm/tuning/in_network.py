"""The last comparison: the fastest candidates of every kernel run within their network, beside the default schedules.

A kernel that is timed alone finds its activations where the tuner left them, and the memory bus to itself. In the network that differs
from kernel to kernel: what an earlier layer left in the caches, what neighbours evict, how its tensors lie to each other. So the network
runs with its kernels replaced: it is built once, with default schedules, and a probe (``bnntvm/profiling/probe.c``) calls a candidate's
function where the network would call its own, with weights in that candidate's layout, and takes the time (:mod:`.stage`). First all
candidates of a kernel take turns, then the fastest of them, more often.
"""

from __future__ import annotations

import collections
import contextlib
import pathlib
import pickle
import statistics
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import dataclass

from bnntvm.tuning import stage, worker
from bnntvm.tuning.records import task_id
from bnntvm.tuning.workload import key_of, rows_of

#: Turns of every candidate in the first round, candidates of a kernel that stay for the second, turns of those.
FIRST_TURNS, STAY, TURNS = 2, 3, 8
#: A round of a slow network ends behind so many seconds, if it has had two turns.
ROUND_SECONDS = 60.0
#: Seconds that building the network, and one turn of all candidates, may take.
LIMIT = 300.0


class Chooser:
    """Default schedules for a build, and which kernel belongs to which task."""

    trusted = True

    def __init__(self):
        self.kernels = {}

    def __call__(self, family, spec, isa, shape):
        rows = rows_of(shape)
        schedule = family.default_schedule(spec, isa)
        self.kernels.setdefault((spec, schedule), {})[rows] = task_id(key_of(family, spec, rows))
        return schedule

    def tasks(self, kernel):
        """Rows of the first operand to id of the task, for one of our kernels: its name ends with its number, in the order in which
        they were asked for."""
        return list(self.kernels.values())[int(kernel.rpartition("_")[2])]


@dataclass(frozen=True)
class Network:
    """What to build.

    Parameters
    ----------
    model : str, path, bytes or onnx.ModelProto
    isa : Isa
    threads : int
    options : dict
        ``assume_nonzero`` and ``weight_tolerance`` as for :func:`bnntvm.build`.
    """

    model: object
    isa: object
    threads: int
    options: dict

    def build(self, folder):
        """:class:`.stage.Built`; to be called in a process of its own."""
        return worker.isolated(self._build, folder, limit=LIMIT)

    def _build(self, folder):
        import bnntvm
        from bnntvm.profiling.profile import probe_library

        artefact, probe = pathlib.Path(folder, "network.bnn"), pathlib.Path(folder, "probe.so")
        chooser = Chooser()
        module = bnntvm.build(self.model, self.isa, tuning=chooser, threads=self.threads, **self.options)
        module.export(artefact)
        probe.write_bytes(probe_library(self.isa))
        owners = {call["kernel"]: chooser.tasks(call["kernel"]) for call in module._manifest["calls"] if call["own"]}
        return stage.Built(str(artefact), str(probe), self.threads, owners)


def compare_schedules(network, pipeline, chosen, wait=Future.result):
    """Build the fastest schedules of kernels, and time them in their network.

    Parameters
    ----------
    network : Future
        Of the :class:`.stage.Built` network.
    pipeline : bnntvm.tuning.measure.Pipeline
    chosen : list of (Space, list of Schedule)
        The default schedule first.
    wait : function
        From a future to its result.

    Returns
    -------
    dict
        Task id to schedule, the default among them, to seconds of one call in every turn; kernels that nothing calls are missing.

    Raises
    ------
    Failure, BnnError
        Where the network cannot be built or run.
    """
    jobs = [(space, schedule, pipeline.build(space, schedule)) for space, schedules in chosen for schedule in schedules]
    schedules, candidates = collections.defaultdict(list), collections.defaultdict(list)
    for space, schedule, job in jobs:
        with contextlib.suppress(worker.Failure):
            _, library = wait(job)
            schedules[space.task.id].append(schedule)
            candidates[space.task.id].append(stage.Candidate(library, space.task.weights_at))
    whole = {space.task.id: candidates[space.task.id] for space, own in chosen if schedules[space.task.id][:1] == own[:1]}
    times = wait(pipeline.device.process.submit(compare, wait(network), whole))
    return {task: {schedules[task][number]: seconds for number, seconds in own.items()} for task, own in times.items()}


def compare(built, candidates):
    """Time the fastest candidates of kernels beside their defaults; to be called in a process of its own.

    Parameters
    ----------
    built : bnntvm.tuning.stage.Built
    candidates : dict
        Task id to Candidates, that of the default schedule first.

    Returns
    -------
    dict
        Task id to {number of a candidate: seconds of one call in every turn of the second round}, the default among them; kernels that
        nothing calls are missing.

    Raises
    ------
    Failure
    """
    if not candidates:
        return {}
    first = _rounds(built, candidates, {task: list(range(len(own))) for task, own in candidates.items()}, FIRST_TURNS)
    return _rounds(built, candidates, {task: _fastest(times) for task, times in first.items()}, TURNS)


def _fastest(times):
    """Numbers of the candidates that stay: the default, and some that were fastest."""
    others = sorted(set(times) - {0}, key=lambda number: statistics.median(times[number]))
    return [0, *others[:STAY]]


def _rounds(built, candidates, numbers, turns):
    """Task to {number: seconds in every turn}."""
    found, end = {}, time.monotonic() + ROUND_SECONDS
    for turn in range(turns):
        if turn >= 2 and time.monotonic() > end:
            break
        for task, own in _turn(stage.Turn(built, candidates, numbers, bool(turn % 2))).items():
            for number, seconds in own.items():
                found.setdefault(task, {}).setdefault(number, []).append(seconds)
    return found


def _turn(turn):
    """One turn, in a program of its own: where the system puts code and data decides how fast some kernels are, by up to a tenth, and
    another program gets other places. It is short to start, as it imports no compiler."""
    job = pathlib.Path(turn.built.artefact).with_name("turn.pickle")
    job.write_bytes(pickle.dumps(turn))
    try:
        done = subprocess.run([sys.executable, "-m", stage.__name__, str(job)], capture_output=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        raise worker.Failure(f"time out after {LIMIT:g} s") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise worker.Failure(lines[-1] if lines and done.returncode > 0 else f"ended with status {done.returncode}")
    return pickle.loads(done.stdout)
