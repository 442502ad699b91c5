"""The last comparison: the fastest candidates of every kernel run within their network, beside the default schedules.

A kernel that is timed alone finds its activations where the tuner left them, and the memory bus to itself. In the network that differs
from kernel to kernel: what an earlier layer left in the caches, what neighbours evict, how its tensors lie to each other. So the network
is built several times, once with default schedules, then with the best candidates of all kernels, then with the second best. The builds
run in turns, and a probe times every call (:mod:`bnntvm.profiling`).
"""

from __future__ import annotations

import pathlib
import statistics
import tempfile
from collections import defaultdict

from bnntvm.build import build
from bnntvm.tuning import worker
from bnntvm.tuning.records import task_id
from bnntvm.tuning.workload import key_of, rows_of

#: Builds beside the one with default schedules: so many candidates of a kernel are compared with its default.
BUILDS = 2
#: How often the builds take turns, and seconds of each.
TURNS, SECONDS = 6, 0.4
#: Seconds that all of that may take in the process that measures, for every build.
LIMIT = 60.0


class Chooser:
    """Schedules for a build, and which kernel got which.

    Parameters
    ----------
    schedules : dict
        Task id to schedule; the default where a task is missing.
    """

    trusted = True

    def __init__(self, schedules):
        self.schedules, self.kernels = schedules, {}

    def __call__(self, family, spec, isa, shape):
        task = task_id(key_of(family, spec, rows_of(shape)))
        schedule = self.schedules.get(task) or family.default_schedule(spec, isa)
        self.kernels.setdefault((spec, schedule), set()).add(task)
        return schedule

    def tasks(self, kernel):
        """Ids of the tasks that one of our kernels computes: its name ends with its number, in the order in which they were asked for."""
        return list(self.kernels.values())[int(kernel.rpartition("_")[2])]


class Network:
    """A network whose kernels can be timed in it.

    Parameters
    ----------
    model : str, path, bytes or onnx.ModelProto
    isa : Isa
    process : bnntvm.tuning.measure.Process
        Where it runs.
    threads : int
    options : dict
        ``assume_nonzero`` and ``weight_tolerance`` as for :func:`bnntvm.build`.
    """

    def __init__(self, model, isa, process, threads, options):
        self.model, self.isa, self.process, self.threads, self.options = model, isa, process, threads, options

    def times(self, variants):
        """Time kernels with several choices of schedules.

        Parameters
        ----------
        variants : list of dict
            Task id to schedule.

        Returns
        -------
        list of dict
            For each variant: task id to seconds of one call, a list with one entry for each turn.

        Raises
        ------
        Failure, BnnError
        """
        from bnntvm.profiling.profile import _probe

        with tempfile.TemporaryDirectory(prefix="bnntvm-") as folder:
            probe = pathlib.Path(folder, "probe.so")
            probe.write_bytes(_probe(self.isa)[1])
            choosers, paths = [], []
            for number, schedules in enumerate(variants):
                chooser, path = Chooser(schedules), pathlib.Path(folder, f"{number}.bnn")
                module = build(self.model, self.isa, tuning=chooser, threads=self.threads, **self.options)
                module.export(path)
                choosers.append(chooser)
                paths.append(str(path))
            runs = self.process.call(_measure, paths, str(probe), self.threads, LIMIT * len(paths))
        return [_by_task(chooser, turns) for chooser, turns in zip(choosers, runs)]


def compare(network, candidates, defaults):
    """Time the fastest candidates of kernels beside their defaults.

    Parameters
    ----------
    network : Network
    candidates : dict
        Task id to schedules other than the default, best first; the first BUILDS are compared.
    defaults : dict
        Task id to the default schedule.

    Returns
    -------
    dict
        Task id to schedule, the default among them, to seconds of one call in every turn; kernels that nothing calls are missing.
    """
    count = min(BUILDS, max(map(len, candidates.values()), default=0))
    ranks = [{task: best[i] for task, best in candidates.items() if i < len(best)} for i in range(count)]
    first, *tuned = network.times([{}, *ranks]) if ranks else [{}]
    return {
        task: {defaults[task]: first[task], **{s: one[task] for s, one in zip(best, tuned) if task in one}}
        for task, best in candidates.items()
        if task in first
    }


def _by_task(chooser, turns):
    """Task id to seconds of one call in every turn, from a list of [(kernel, seconds)] of the calls of a run."""
    found = defaultdict(list)
    for calls in turns:
        sums = defaultdict(list)
        for kernel, seconds in calls:
            for task in chooser.tasks(kernel):
                sums[task].append(seconds)
        for task, seconds in sums.items():
            found[task].append(statistics.fmean(seconds))
    return dict(found)


def _measure(paths, probe, threads, limit):
    return worker.isolated(_take_turns, paths, probe, threads, limit=limit)


def _take_turns(paths, probe, threads):
    """For every artefact a list of turns, each the median seconds of every call of a kernel."""
    from bnntvm import runtime
    from bnntvm.module import Module
    from bnntvm.profiling import measure

    library = runtime.ffi().get_global_func("ffi.Module.load_from_file.so")(probe, "so")
    modules = [Module.load(path, threads) for path in paths]
    names = [{call["kernel"][:47]: call["kernel"] for call in module._manifest["calls"] if call["own"]} for module in modules]
    found = [[] for _ in modules]
    for turn in range(TURNS):
        for at in range(len(modules)) if turn % 2 else reversed(range(len(modules))):
            _, runs = measure._runs(modules[at], library, {"batch": 1, "seconds": SECONDS})
            called, _, medians = measure._medians(runs)
            found[at].append([(names[at][name], ns / 1e9) for name, ns in zip(called, medians) if name in names[at]])
    return found
