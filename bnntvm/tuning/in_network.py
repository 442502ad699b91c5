"""The last comparison: the fastest candidates of every kernel run within their network, beside the default schedules.

A kernel that is timed alone finds its activations where the tuner left them, and the memory bus to itself. In the network that differs
from kernel to kernel: what an earlier layer left in the caches, what neighbours evict, how its tensors lie to each other. So the network
runs with its kernels replaced: it is built once, with default schedules, and a probe (``bnntvm/profiling/probe.c``) calls a candidate's
function where the network would call its own, with weights in that candidate's layout, and takes the time. First all candidates of a
kernel take turns, then the fastest of them, for longer.
"""

from __future__ import annotations

import math
import pathlib
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass

from bnntvm.tuning import worker
from bnntvm.tuning.records import task_id
from bnntvm.tuning.workload import key_of, rows_of

#: Turns of every candidate in the first round, candidates of a kernel that stay for the second, turns of those.
FIRST_TURNS, STAY, TURNS = 2, 3, 6
#: Seconds of a turn, at least so many runs; runs before, which are not counted.
SECONDS, LEAST_RUNS, WARM_RUNS = 0.3, 3, 2
#: Seconds that all of that, and building the network, may take in the process that does it.
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
        """:class:`Built`; to be called in a process of its own."""
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
        return Built(str(artefact), str(probe), self.threads, owners)


def compare(built, candidates):
    """Time the fastest candidates of kernels beside their defaults; to be called in a process of its own.

    Parameters
    ----------
    built : Built
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
    return worker.isolated(_compare, built, candidates, limit=LIMIT)


def _compare(built, candidates):
    stage = _Stage(built, candidates)
    first = stage.rounds({task: range(len(own)) for task, own in candidates.items()}, FIRST_TURNS)
    return stage.rounds({task: _fastest(times) for task, times in first.items()}, TURNS)


def _fastest(times):
    """Numbers of the candidates that stay: the default, and some that were fastest."""
    others = sorted(set(times) - {0}, key=lambda number: statistics.median(times[number]))
    return [0, *others[:STAY]]


class _Stage:
    """A loaded network whose kernels are replaced."""

    def __init__(self, built, candidates):
        from bnntvm import runtime
        from bnntvm.module import Module
        from bnntvm.profiling import measure

        self.candidates, self.measure = candidates, measure
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
        names = {name[:47].encode(): tasks for name, tasks in owners.items()}
        found = [(number, names.get(record.name, {}).get(record.rows)) for number, record in enumerate(self.run())]
        return [(number, task) for number, task in found if task in self.candidates]

    def run(self):
        """One run; its records."""
        self.machine.run(self.staged, self.module.threads, self.single)
        return self.measure.records(self.probe)

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
                raise worker.Failure("the network has too many calls to replace its kernels")

    def turn(self, chosen):
        """Task id to median seconds of one call."""
        self.swap(chosen)
        for _ in range(WARM_RUNS):
            self.run()
        found, end = defaultdict(list), time.perf_counter() + SECONDS
        while len(found[None]) < LEAST_RUNS or time.perf_counter() < end:
            records = self.run()
            found[None].append(0)
            for number, _ in self.calls:
                found[number].append(records[number].end - records[number].begin)
        by_task = defaultdict(list)
        for number, task in self.calls:
            by_task[task].append(statistics.median(found[number]) / 1e9)
        return {task: math.fsum(times) / len(times) for task, times in by_task.items()}

    def rounds(self, numbers, turns):
        """Let candidates take turns: task id to {number: seconds in every turn}.

        The first of every task run together, then the second, and so on; a task that has no more runs its default again.
        """
        tasks = {task for _, task in self.calls}
        numbers = {task: list(own) for task, own in numbers.items() if task in tasks}
        ranks = range(max(map(len, numbers.values()), default=0))
        found = {task: {number: [] for number in own} for task, own in numbers.items()}
        for turn in range(turns):
            for rank in ranks if turn % 2 else reversed(ranks):
                times = self.turn({t: self.candidates[t][own[rank] if rank < len(own) else 0] for t, own in numbers.items()})
                for task, own in numbers.items():
                    if rank < len(own):
                        found[task][own[rank]].append(times[task])
        return found


def _weights(library):
    """A fresh copy of a candidate's packed weights, as a tensor."""
    import numpy as np

    from bnntvm import runtime

    packed = np.load(library + ".npy")
    own = runtime.aligned_empty(packed.shape, packed.dtype)
    own[...] = packed
    return runtime.ffi().from_dlpack(own)
