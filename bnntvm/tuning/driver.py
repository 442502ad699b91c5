"""``bnntvm.tune``: finds the fastest schedules of a network's kernels."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import threading
import time
from concurrent.futures import wait
from dataclasses import dataclass, field

from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule import _ffi_api
from tvm.s_tir.meta_schedule.logging import get_logging_func

from bnntvm.build import _resolve, tvm_target
from bnntvm.errors import BnnError
from bnntvm.linker import is_native
from bnntvm.runtime import usable_cpus
from bnntvm.tuning import in_network, measure, worker
from bnntvm.tuning.features import Extractor
from bnntvm.tuning.measure import Local, Pipeline
from bnntvm.tuning.search import Budget, Progress, Search
from bnntvm.tuning.space import Space, SpaceGenerator
from bnntvm.tuning.store import Store
from bnntvm.tuning.tasks import extract

#: Kernels whose share of a network's time is smaller are left at their defaults.
LEAST_SHARE = 0.003
#: Candidates of one task that are built and measured together.
BATCH = 8
#: The fastest candidates of a task are measured again beside the default, in turns, before one is believed.
FINALISTS = measure.KEPT
#: Those of them that are compared alone, where the network cannot be had, and seconds that each of them takes, about.
FINALISTS_ALONE, ALONE_SECONDS = 3, 0.5
#: Why a session ended whose time was over.
TIME_LIMIT = "the time limit was reached"
#: Part of the time behind the profile that the search leaves to the last comparison at most.
RESERVED = 0.4


@dataclass
class Result:
    """What a tuning session found.

    Attributes
    ----------
    rows : list of TaskResult
    measured, failed : int
        Candidates of this session.
    seconds : float
    interrupted : str
        Why it ended before its trials did; else empty.
    damaged : int
        Lines of the database that could not be read.
    remark : str
        Why the fastest candidates were not compared within the network, where they should have been.
    noisy : list of str
        Kernels of which a schedule may be faster, but the machine was too busy to tell. They keep their defaults.
    uncompared : list of str
        Kernels of which candidates were measured, but not compared with the default any more. No gain is claimed for them; the next session
        makes up for it.
    """

    rows: list = field(default_factory=list)
    measured: int = 0
    failed: int = 0
    seconds: float = 0.0
    interrupted: str = ""
    remark: str = ""
    damaged: int = 0
    noisy: list = field(default_factory=list)
    uncompared: list = field(default_factory=list)

    @property
    def gain(self):
        """Time of all kernels with default schedules over their time with the best ones."""
        known = [r for r in self.rows if r.default_us < float("inf")]
        before = sum(r.count * r.default_us for r in known)
        return before / max(sum(r.count * r.best_us for r in known), 1e-9) if known else 1.0


@dataclass
class TaskResult:
    """One kernel: name, occurrences, microseconds with the default and the best schedule, why its search ended. Another schedule than the
    default is the best only if the last comparison says so."""

    task: str
    name: str
    count: int
    default_us: float
    best_us: float
    schedule: object
    ended: str


class Context(ms.TuneContext):
    """A tuning context without ``import tvm.s_tir.tensor_intrin``: TVM's constructor spends 15 s there on intrinsics for CUDA."""

    def __init__(self, space, search, target):
        quiet = logging.getLogger("bnntvm.tuning")
        quiet.setLevel(logging.WARNING)
        self.__init_handle_by_constructor__(
            _ffi_api.TuneContext, space.module, target, SpaceGenerator(space), search, space.task.id, 1, 1, get_logging_func(quiet)
        )
        _ffi_api.TuneContextInitialize(self)


class Tuner:
    """A session.

    Parameters
    ----------
    tasks : list of Task
    store : Store
    device : measure.Measures
    threads : int
    deadline : float or None
        time.monotonic() at which it ends.
    report : callable
        Called with (space, schedule, seconds) for every candidate, seconds empty for one that failed.
    network : Network, optional
        Where the fastest candidates are compared; without, they are compared alone.
    """

    def __init__(self, tasks, store, device, threads, deadline, report, network=None):
        self.tasks, self.store, self.device, self.threads, self.deadline = tasks, store, device, threads, deadline
        self.network, self.built, self.remark = network, None, ""
        self.stop, self.interrupted, self.pressed, self.timer = threading.Event(), "", 0, None
        self.spaces = {task.id: Space(task, threads, device.machine) for task in tasks}
        self.progress = {name: Progress(space, store.measured(space), store.compared(space)) for name, space in self.spaces.items()}
        self.pipeline = Pipeline(store, device, self.stop)
        self.pipeline.observers.append(self._watch)
        self.pipeline.observers.append(report)
        self.counts = [0, 0]

    def _watch(self, _space, _schedule, seconds):
        self.counts[not seconds] += 1

    def end(self, why):
        """End the session: nothing new is started."""
        self.interrupted = self.interrupted or why
        self.stop.set()

    @contextlib.contextmanager
    def _aside(self):
        """Keep the search and the cost model off the cores that measure."""
        if not hasattr(os, "sched_setaffinity"):
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.device.build_cores)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    @contextlib.contextmanager
    def _signals(self):
        """The first Ctrl-C, or SIGTERM, ends the session in good order, a second one raises KeyboardInterrupt."""
        here = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, self._give_up) for number in (signal.SIGINT, signal.SIGTERM)} if here else {}
        try:
            yield
        except RuntimeError:
            if self.pressed > 1:  # TVM has made this of a KeyboardInterrupt that went through its code
                raise KeyboardInterrupt from None
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._end_at(None)

    def _end_at(self, moment):
        """End the session at a time.monotonic(); None for never."""
        if self.timer:
            self.timer.cancel()
            self.timer.join()
        self.timer = None
        if moment is not None:
            self.timer = threading.Timer(max(0.0, moment - time.monotonic()), self.end, [TIME_LIMIT])
            self.timer.daemon = True
            self.timer.start()

    def _give_up(self, _number, _frame):
        self.pressed += 1
        if self.pressed > 1:
            raise KeyboardInterrupt
        self.end("interrupted")

    @property
    def given_up(self):
        """Whether the user wants no more."""
        return self.pressed > 0

    def run(self, trials):
        """Tune with at most ``trials`` measured candidates, those of earlier sessions counted."""
        start = time.monotonic()
        with self._signals(), self._aside():
            self._end_at(self.deadline)
            self.defaults()
            left = trials - sum(len(p.measured) for p in self.progress.values())
            if left > 0 and not self.stop.is_set():
                self._end_at(self._search_end())
                self.search(left)
            self._end_at(None)
            if not (self.given_up or self.pipeline.error):
                self.finals()
        if self.pipeline.error:
            raise self.pipeline.error
        noisy = [p.space.task.name for p in self.progress.values() if p.noisy]
        uncompared = [p.space.task.name for p, _ in self._due() if p.space.task.name not in noisy]
        seconds = time.monotonic() - start
        return Result(self.rows(), *self.counts, seconds, self.interrupted, self.remark, self.store.damaged, noisy, uncompared)

    def _search_end(self):
        """The time.monotonic() at which the search leaves the last comparison its time; None without a limit."""
        if self.deadline is None:
            return None
        return self.deadline - min(self._comparison_seconds(), RESERVED * max(0.0, self.deadline - time.monotonic()))

    def _comparison_seconds(self):
        """Seconds that the last comparison will take, about."""
        finalists = [(p.space, schedule) for p in self.progress.values() for schedule in (p.space.default, *p.fastest(FINALISTS))]
        builds = sum(self.pipeline.build_seconds(space, schedule) for space, schedule in finalists)
        if self.network:
            return builds + in_network.needed(1 + FINALISTS, self._run_seconds())
        return builds + ALONE_SECONDS * (1 + FINALISTS_ALONE) * sum(len(p.space.schedules) > 1 for p in self.progress.values())

    def _run_seconds(self):
        """What a run of the network takes, about."""
        known = [(p.measured.get(p.space.default, 0.0), p) for p in self.progress.values()]
        return sum(seconds * len(p.space.task.layers) for seconds, p in known if seconds < float("inf"))

    def defaults(self):
        """Measure the default schedule of every task that has none yet: this is the network's profile, too."""
        missing = [p for p in self.progress.values() if p.space.default not in p.measured]
        futures = [(p, self.pipeline.run(p.space, p.space.default)) for p in missing]
        for progress, future in futures:
            waited = measure.Waiting(future).result()
            progress.asked.add(progress.space.default)
            if waited.run_secs is not None:
                progress.measured[progress.space.default] = min(map(float, waited.run_secs))
            elif not self.stop.is_set():
                # Without a reference that the default matches there is nothing to compare candidates with.
                progress.measured[progress.space.default], progress.done = float("inf"), str(waited.error_msg)

    def worth(self):
        """Tasks to search, with their number of occurrences: those that matter to the network, and have a choice."""
        times = {n: len(p.space.task.layers) * p.measured.get(p.space.default, float("inf")) for n, p in self.progress.items()}
        total = sum(t for t in times.values() if t < float("inf"))
        for name, progress in self.progress.items():
            if times[name] < LEAST_SHARE * total:
                progress.done = progress.done or "too small a part of the network's time"
        chosen = [n for n, p in self.progress.items() if not p.done and len(p.space.schedules) > 1 and times[n] < float("inf")]
        return sorted(chosen, key=times.get, reverse=True)

    def search(self, trials):
        """Let MetaSchedule's gradient scheduler spend the trials where the network's time is."""
        names = self.worth()
        if not names:
            return
        if self.network:
            self._build_network()
        started, budget = {}, Budget(trials)
        target = tvm_target(self.spaces[names[0]].task.isa)
        model = ms.cost_model.XGBModel(extractor=Extractor(self.spaces), num_warmup_samples=2 * BATCH, num_tuning_cores=1)
        contexts = [Context(self.spaces[n], Search(self.progress[n], budget, self.stop), target) for n in names]
        self._learn(model, contexts, names)
        ms.TaskScheduler.create("gradient", seed=1).tune(
            contexts, [len(self.spaces[n].task.layers) for n in names], trials, trials, BATCH,
            measure.Builder(self.pipeline, self.spaces, started), measure.Runner(started),
            [ms.measure_callback.UpdateCostModel()], None, model,
        )  # fmt: skip

    def _learn(self, model, contexts, names):
        """Show the cost model what is known already: the defaults, and what earlier sessions measured."""
        for context, name in zip(contexts, names):
            space, known = self.spaces[name], self.progress[name].measured
            candidates = [ms.MeasureCandidate(space.trace(s), []) for s in known]
            results = [
                ms.runner.RunnerResult([t], None) if t < float("inf") else ms.runner.RunnerResult(None, "failed") for t in known.values()
            ]
            model.update(context, candidates, results)

    def finals(self):
        """Measure the fastest candidates of every task again, beside the default, within the time that is left, and record that."""
        self.stop.clear()
        with contextlib.suppress(measure.Stopped):
            for place, progress, times in self._compared(self._due()):
                for schedule, seconds in times.items():
                    self.store.commit(progress.space, schedule, seconds, place=place)
                progress.compared(times)

    def _compared(self, due):
        """(place of a record, progress, schedule -> seconds in turns) of tasks."""
        within = None
        try:
            if self.network and due:
                within = []
                with self._in_time():
                    within = self._compared_in_network(due)
        except (measure.Failure, BnnError) as error:
            within = None
            self.remark = f"compared alone, not within the network: {str(error).splitlines()[0]}"
        place = self.store.comparison(self.device.place if within is None else "network")
        for progress, times in self._compared_alone(due) if within is None else within:
            yield place, progress, times

    def _due(self):
        """(progress, the default and the fastest schedules) of the tasks whose last comparison is not of what is known now; those that take
        most of the network's time first."""
        found = []
        for progress in self.progress.values():
            default, best = progress.space.default, progress.fastest(FINALISTS)
            due = progress.fresh or progress.judged is None or progress.noisy
            if progress.measured.get(default, float("inf")) < float("inf") and best and due:
                found.append((progress, [default, *best]))
        return sorted(found, key=lambda one: -one[0].measured[one[1][0]] * len(one[0].space.task.layers))

    def _build_network(self):
        """Future of the network with default schedules, which is built beside the candidates."""
        if self.built is None:
            self.built = self.pipeline.build_network(self.network)
        return self.built

    def _wait(self, future, end=None):
        """A future's result; Stopped if the user gives up before, Late if it is not there at ``end``, a time.monotonic()."""
        while not self.given_up:
            if wait([future], timeout=0.2).done:  # in short steps, so that Python sees signals
                return future.result()
            if end is not None and time.monotonic() > end:
                raise worker.Late
        raise measure.Stopped

    def _compared_in_network(self, due):
        """(progress, schedule -> seconds of one call) of tasks, measured in their network.

        Raises
        ------
        Failure, BnnError
            Where it cannot be built or run.
        Late
            Where time is too short.
        """
        chosen = [(progress.space, schedules) for progress, schedules in due]
        network, wait_for, run_seconds = self._build_network(), self._wait, self._run_seconds()
        times = in_network.compare_schedules(network, self.pipeline, chosen, wait_for, self.deadline, run_seconds)
        return [(self.progress[task], own) for task, own in times.items()]

    def _compared_alone(self, due):
        """(progress, schedule -> seconds of single runs) of tasks, taken in turns with the default."""
        jobs, found = [], []
        for progress, chosen in due:
            chosen = chosen[: 1 + FINALISTS_ALONE]
            jobs.append((progress, chosen, [self.pipeline.build(progress.space, s) for s in chosen]))
        with self._in_time():
            for progress, chosen, built in jobs:
                with contextlib.suppress(measure.Failure):
                    found.append((progress, chosen, self.device.compare([self._wait(b, self.deadline) for b in built])))
        for progress, chosen, future in found:
            times = None
            with self._in_time(), contextlib.suppress(measure.Failure):
                times = self._wait(future, self.deadline)
            if times is not None:
                yield progress, dict(zip(chosen, times))

    @contextlib.contextmanager
    def _in_time(self):
        """What is too late is left out, and the session says so."""
        try:
            yield
        except worker.Late:
            self.interrupted = self.interrupted or TIME_LIMIT

    def rows(self):
        """What became of every task."""
        found = []
        for progress in self.progress.values():
            space, task, judged = progress.space, progress.space.task, progress.judged
            default = judged.default if judged else progress.measured.get(space.default, float("inf"))
            best, seconds = (judged.schedule, judged.seconds) if judged else (space.default, default)
            found.append(TaskResult(task.id, task.name, len(task.layers), default * 1e6, seconds * 1e6, best, progress.done))
        return found

    def close(self):
        self.pipeline.close()


def tune(
    model, target="x86", *, trials=1000, database, threads=1, time_limit=None, layers=None, rpc=None, key=None,
    assume_nonzero=False, weight_tolerance=0.0, progress=True,
):  # fmt: skip
    """Measure schedules for the kernels of a network, and record the fastest.

    Parameters
    ----------
    model : str, path, bytes or onnx.ModelProto
    target : str, dict or tvm.target.Target
        As for :func:`bnntvm.build`; a GPU must be this machine's.
    trials : int
        Candidates to measure, those that the database has of this network counted: a session that was interrupted goes on.
    database : str or path
        Folder of records, made if it does not exist. Every candidate is recorded as soon as it is measured.
    threads : int
        Threads of a processor that kernels run on while they are measured. Records for one thread serve any number, unless there are
        better ones.
    time_limit : float, optional
        Seconds for the whole session: the search ends in time for the last comparison, which is shortened where need be. What runs at the
        end is finished first, so that a session takes a second or two more; one that is too short to import the network and measure its
        default schedules takes longer by the candidate that is building or running then.
    layers : str or list of str, optional
        Tune only kernels in whose name, or whose layers' names, one of these occurs.
    rpc, key : str, optional
        Address "host:port" of a TVM RPC tracker, and the key under which its boards are registered: measure there.
    assume_nonzero, weight_tolerance
        As for :func:`bnntvm.build`, which they must match.
    progress : bool
        Show a progress bar on standard error.

    Returns
    -------
    Result

    Raises
    ------
    BnnError
        On bad arguments. A candidate that crashes, hangs or computes something wrong is recorded as failed, and is never chosen.
    """
    from bnntvm.tuning.bar import bar

    _check_installed(["cloudpickle", "psutil", *(["tornado"] if rpc else [])])
    isa = _resolve(target)
    deadline = _deadline(trials, threads, time_limit)
    options = dict(assume_nonzero=assume_nonzero, weight_tolerance=weight_tolerance)
    with contextlib.ExitStack() as ending:
        device = _device(isa, threads, rpc, key)  # first: it says whether anything can be measured
        ending.callback(device.close)
        tasks = _chosen(extract(model, isa, **options), layers)
        store = Store(database)
        ending.callback(store.close)
        network = None if layers or not device.runs_networks else in_network.Network(model, isa, threads, options)
        shown = ending.enter_context(bar(trials, progress))
        tuner = Tuner(tasks, store, device, threads, deadline, shown.note, network)
        ending.callback(tuner.close)
        shown.start(tuner)
        return tuner.run(trials)


def _deadline(trials, threads, time_limit):
    """time.monotonic() at which a session ends, or None; a BnnError if one of the numbers is none."""
    begin = time.monotonic()
    if not (isinstance(trials, int) and isinstance(threads, int)) or trials < 0 or threads < 1:
        where = f"trials={trials!r}, threads={threads!r}"
        raise BnnError("trials must not be negative, threads at least 1, both whole numbers", where=where)
    if time_limit is None:
        return None
    if not isinstance(time_limit, (int, float)) or not time_limit >= 0:
        raise BnnError("a time limit is a number of seconds", where=f"time_limit={time_limit!r}")
    return begin + min(float(time_limit), threading.TIMEOUT_MAX / 2)


def _check_installed(names):
    """TVM imports these where it needs them, deep inside."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        raise BnnError("tuning needs packages that are not installed", where=", ".join(absent), hint="pip install 'bnntvm[tune]'")


def _chosen(tasks, layers):
    if not layers:
        return tasks
    layers = [layers] if isinstance(layers, str) else list(layers)
    found = [t for t in tasks if any(part in name for part in layers for name in (t.name, *t.layers))]
    if not found:
        raise BnnError(
            "no kernel is called like this", where=", ".join(layers), hint="kernels here: " + "; ".join(t.name for t in tasks[:40])
        )
    return found


def _device(isa, threads, rpc, key):
    """What measures."""
    if isa.machine == "cuda":
        from bnntvm.tuning import gpu

        return gpu.checked(isa, threads, rpc)
    if rpc:
        from bnntvm.tuning.rpc import Farm

        return Farm(rpc, key, threads)
    from bnntvm.targets.x86 import host_flags

    if threads > usable_cpus():
        why = f"{usable_cpus()} processors may be used here"
        raise BnnError(f"kernels cannot be measured on {threads} threads", why=why, hint="give a smaller number of threads")
    if not (is_native(isa) and isa.needs <= host_flags()):
        raise BnnError(
            "candidates for this target cannot run here", where=isa.name,
            why="this processor lacks " + (", ".join(sorted(isa.needs - host_flags())) or "its instruction set"),
            hint="register a board with a TVM RPC tracker, and give rpc='host:port' and its key",
        )  # fmt: skip
    return Local(threads)
