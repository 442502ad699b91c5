"""The last comparison: the fastest candidates of every kernel run within their network, beside the default schedules.

A kernel that is timed alone finds its activations where the tuner left them, and the memory bus to itself. In the network that differs
from kernel to kernel: what an earlier layer left in the caches, what neighbours evict, how its tensors lie to each other. So the network
runs with its kernels replaced: it is built once, with default schedules, and a probe (``bnntvm/profiling/probe.c``) calls a candidate's
function where the network would call its own, with weights in that candidate's layout, and takes the time (:mod:`.stage`). First all
candidates of a kernel take turns, then the fastest of them, more often, and once more where the machine was too busy (:mod:`.turns`).
Where time is short there is no first round, and the second has fewer candidates and turns.
"""

from __future__ import annotations

import collections
import pathlib
import pickle
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

from bnntvm.tuning import stage, turns, worker
from bnntvm.tuning.records import task_id
from bnntvm.tuning.workload import key_of, rows_of

#: Turns of every candidate in the first round, candidates of a kernel that stay for the second, turns of those, and at least so many.
FIRST_TURNS, STAY, TURNS, LEAST_TURNS = 2, 3, 8, 2
#: A round of a slow network ends behind so many seconds, if it has had two turns.
ROUND_SECONDS = 60.0
#: Seconds that building the network, and one turn of all candidates, may take.
LIMIT = 300.0
#: Seconds until the program of a turn has started, about.
START_SECONDS = 1.0


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


def turn_seconds(candidates, run_seconds):
    """Seconds of a turn of so many candidates of every kernel, the default among them, in a network that takes ``run_seconds``."""
    return START_SECONDS + candidates * (max(stage.SECONDS, stage.LEAST_RUNS * run_seconds) + run_seconds)


def round_seconds(turns_, candidates, run_seconds):
    """Seconds of a round of so many turns."""
    turn = turn_seconds(candidates, run_seconds)
    return min(turns_ * turn, max(ROUND_SECONDS + turn, 2 * turn))


def needed(candidates, run_seconds):
    """Seconds of a whole comparison."""
    return round_seconds(FIRST_TURNS, candidates, run_seconds) + round_seconds(TURNS, min(candidates, 1 + STAY), run_seconds)


def _result(future, _end):
    return future.result()


def compare_schedules(network, pipeline, chosen, wait=_result, end=None, run_seconds=0.0):
    """Build the fastest schedules of kernels, and time them in their network.

    Parameters
    ----------
    network : Future
        Of the :class:`.stage.Built` network.
    pipeline : bnntvm.tuning.measure.Pipeline
    chosen : list of (Space, list of Schedule)
        The default schedule first, then the fastest.
    wait : function
        From a future, and the time.monotonic() until which to wait or None, to its result; raises :class:`.worker.Late`.
    end : float, optional
        time.monotonic() at which to be done: what is not built in time is left out.
    run_seconds : float
        What a run of the network takes, about.

    Returns
    -------
    dict
        Task id to schedule, the default among them, to seconds of one call in every turn; kernels that nothing calls are missing.

    Raises
    ------
    Failure, BnnError
        Where the network cannot be built or run.
    Late
        Where there is not time enough for two schedules.
    """
    built_by = None if end is None else end - LEAST_TURNS * turn_seconds(2, run_seconds)
    schedules, candidates = _built(pipeline, chosen, wait, built_by)
    whole = {space.task.id: candidates[space.task.id] for space, own in chosen if schedules[space.task.id][:1] == own[:1]}
    network = wait(network, built_by)
    times = wait(pipeline.device.process.submit(compare, network, whole, end, run_seconds), None)
    return {task: {schedules[task][number]: seconds for number, seconds in own.items()} for task, own in times.items()}


def _built(pipeline, chosen, wait, end):
    """Task id to schedules, and to their :class:`.stage.Candidate`, of those that can be built, until ``end``: all defaults first."""
    ranks = range(max((len(own) for _, own in chosen), default=0))
    order = [(space, own[rank]) for rank in ranks for space, own in chosen if rank < len(own)]
    jobs = [(space, schedule, pipeline.build(space, schedule)) for space, schedule in order]
    schedules, candidates, late = collections.defaultdict(list), collections.defaultdict(list), False
    for space, schedule, job in jobs:
        if late and not job.done():
            job.cancel()
            continue
        try:
            _, library = wait(job, end)
        except worker.Failure:
            continue
        except worker.Late:
            late = True
            job.cancel()
            continue
        schedules[space.task.id].append(schedule)
        candidates[space.task.id].append(stage.Candidate(library, space.task.weights_at))
    return schedules, candidates


def compare(built, candidates, end=None, run_seconds=0.0):
    """Time the fastest candidates of kernels beside their defaults; to be called in a process of its own.

    Parameters
    ----------
    built : bnntvm.tuning.stage.Built
    candidates : dict
        Task id to Candidates, that of the default schedule first, then the fastest.
    end, run_seconds : float
        See :func:`compare_schedules`.

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
    numbers = {task: list(range(len(own))) for task, own in candidates.items()}
    left = float("inf") if end is None else end - time.monotonic()
    if left >= needed(max(map(len, numbers.values())), run_seconds):
        first = _rounds(built, candidates, numbers, FIRST_TURNS)
        numbers = {task: _fastest(times) for task, times in first.items()}
    else:
        stay = next((n for n in range(STAY, 1, -1) if (LEAST_TURNS + 2) * turn_seconds(1 + n, run_seconds) <= left), 1)
        numbers = {task: own[: 1 + stay] for task, own in numbers.items()}
    found = _rounds(built, candidates, numbers, TURNS, end)
    noisy = {task: numbers[task] for task, times in found.items() if turns.judge(times, 0).noisy}
    if noisy and (end is None or time.monotonic() + turn_seconds(1 + STAY, run_seconds) <= end):
        again = {task: candidates[task] for task in noisy}  # the other kernels stay the network's own
        for task, own in _rounds(built, again, noisy, TURNS, end, least=0).items():
            for number, seconds in own.items():
                found[task][number] += seconds
    return found


def _fastest(times):
    """Numbers of the candidates that stay: the default, and some that were fastest."""
    others = sorted(set(times) - {0}, key=lambda number: statistics.median(times[number]))
    return [0, *others[:STAY]]


def _rounds(built, candidates, numbers, count, end=None, least=LEAST_TURNS):
    """Task to {number: seconds in every turn}, of ``count`` turns, or of as many as fit, but ``least``."""
    found, begin, taken = {}, time.monotonic(), 0.0
    for turn in range(count):
        now = time.monotonic()
        if turn >= least and (now > begin + ROUND_SECONDS or end is not None and now + taken > end):
            break
        for task, own in _turn(stage.Turn(built, candidates, numbers, bool(turn % 2))).items():
            for number, seconds in own.items():
                found.setdefault(task, {}).setdefault(number, []).append(seconds)
        taken = time.monotonic() - now
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
