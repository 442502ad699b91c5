"""A network whose kernels are replaced, as a program: ``python -m bnntvm.tuning.stage JOB`` runs one :class:`Turn`. Imports no compiler."""

from __future__ import annotations

import collections
import itertools
import pathlib
import pickle
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np

from bnntvm import runtime
from bnntvm.errors import BnnError
from bnntvm.module import Module
from bnntvm.profiling import measure
from bnntvm.tuning import worker

#: Seconds for which candidates of one rank run, and how many runs that is at least; one more, before, is not counted.
SECONDS, LEAST_RUNS = 0.3, 2


@dataclass(frozen=True)
class Built:
    """A network with default schedules, in files: an artefact, and the library of the probe.

    ``owners``: name of a kernel to :meth:`Chooser.tasks`.
    """

    artefact: str
    probe: str
    threads: int
    owners: dict


@dataclass(frozen=True)
class Candidate:
    """A candidate as :func:`bnntvm.tuning.worker.build` left it. ``weights``: number of the operand that it packs; -1: none."""

    library: str
    weights: int


@dataclass(frozen=True)
class Turn:
    """What to run.

    Attributes
    ----------
    built : Built
    candidates : dict
        Task id to Candidates.
    numbers : dict
        Task id to the numbers of those that run.
    backwards : bool
        The last ones first.
    """

    built: Built
    candidates: dict
    numbers: dict
    backwards: bool


class Stage:
    """A loaded network whose kernels are replaced."""

    def __init__(self, built, candidates):
        self.candidates = candidates
        self.module = Module.load(built.artefact, built.threads)
        self.load = runtime.ffi().get_global_func("ffi.Module.load_from_file.so")
        self.probe, self.functions = self.load(built.probe, "so"), {}
        arrays, self.single = self.module._match(self.module.random_feed())
        self.machine = self.module._library.machine(self.probe["bnn_probe"])
        self.staged = [self.module._stage(self.machine, i, array, False) for i, array in enumerate(arrays)]
        self.calls = self._calls(built.owners)

    def _calls(self, owners):
        """[(number of a call in its run, task)] of the kernels that are compared."""
        self.swap({})
        self.run()
        names = {measure.noted(name).encode(): tasks for name, tasks in owners.items()}
        found = [(number, names.get(record.name, {}).get(record.rows)) for number, record in enumerate(self.run())]
        return [(number, task) for number, task in found if task in self.candidates]

    def run(self):
        """One run; its records."""
        self.machine.run(self.staged, self.module.threads, self.single)
        return measure.records(self.probe)

    def function(self, library):
        if library not in self.functions:
            self.functions[library] = self.load(library, "so")["kernel"]
        return self.functions[library]

    def swap(self, chosen):
        """Replace the kernels by those of ``chosen``, task id to Candidate; every call has weights of its own, as in a network."""
        swap = self.probe["bnn_probe_swap"]
        swap(-1, None, -1, None)
        self.held = []
        for number, task in self.calls if chosen else []:
            candidate = chosen[task]
            tensor = _weights(candidate.library) if candidate.weights >= 0 else None
            self.held.append(tensor)
            if not swap(number, self.function(candidate.library), candidate.weights, tensor):
                raise BnnError("the network has too many calls to replace its kernels")

    def times(self, chosen):
        """Task id to median seconds of one call, with the kernels of ``chosen``."""
        self.swap(chosen)
        self.run()
        taken, end = {number: [] for number, _ in self.calls}, time.perf_counter() + SECONDS
        for runs in itertools.count():
            if runs >= LEAST_RUNS and time.perf_counter() > end:
                break
            records = self.run()
            for number, own in taken.items():
                own.append(records[number].end - records[number].begin)
        by_task = collections.defaultdict(list)
        for number, task in self.calls:
            by_task[task].append(statistics.median(taken[number]) / 1e9)
        return {task: statistics.fmean(seconds) for task, seconds in by_task.items()}

    def turn(self, numbers, backwards):
        """Task to {number of a candidate: seconds}.

        The first candidates of all tasks run together, then the second, and so on; a task that has no more runs its default again.
        """
        tasks = {task for _, task in self.calls}
        numbers = {task: own for task, own in numbers.items() if task in tasks}
        ranks, found = range(max(map(len, numbers.values()), default=0)), {task: {} for task in numbers}
        for rank in reversed(ranks) if backwards else ranks:
            times = self.times({t: self.candidates[t][own[rank] if rank < len(own) else 0] for t, own in numbers.items()})
            for task, own in numbers.items():
                if rank < len(own):
                    found[task][own[rank]] = times[task]
        return found


def _weights(library):
    """A fresh copy of a candidate's packed weights, as a tensor."""
    packed = np.load(library + ".npy")
    own = runtime.aligned_empty(packed.shape, packed.dtype)
    own[...] = packed
    return runtime.ffi().from_dlpack(own)


def main(job):
    """Run a pickled :class:`Turn`, and write its result, pickled, to standard output."""
    worker.end_with_parent()
    turn = pickle.loads(pathlib.Path(job).read_bytes())
    times = Stage(turn.built, turn.candidates).turn(turn.numbers, turn.backwards)
    sys.stdout.buffer.write(pickle.dumps(times))


if __name__ == "__main__":
    from bnntvm.tuning import stage  # what is unpickled belongs to that name, not to __main__

    stage.main(sys.argv[1])
