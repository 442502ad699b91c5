"""Building and measuring candidates in two warm processes, one core each, for MetaSchedule.

MetaSchedule builds a whole batch before it measures any of it. Here its builder only starts the builds, and each candidate is measured as
soon as it is built, while the next ones are building. Building takes several times as long as measuring, so the process that measures
builds, too, whenever nothing waits to be measured.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import itertools
import os
import pathlib
import pickle
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from concurrent.futures import Future, wait

from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.support.popen_pool import PopenWorker

from bnntvm.errors import BnnError, ToolchainError
from bnntvm.tuning import worker
from bnntvm.tuning.worker import Failure, Stopped

#: Seconds that one candidate may take to build, to run, and a task to be prepared (its reference computed) for.
BUILD_LIMIT, MEASURE_LIMIT, PREPARE_LIMIT = 30.0, 15.0, 300.0
#: Seconds that a candidate is measured for.
MEASURE_SECONDS = 0.1
#: Beginning of the name of a session's folder, and the file in it that is locked while it lives.
_PREFIX, _LOCK = "bnntvm-tune-", "lock"
#: Bytes that must be free where candidates are built.
LEAST_ROOM = 64 << 20
#: Libraries of a task that stay, beside that of its default schedule: its fastest ones are measured again in the end.
KEPT = 8


def choose_cores(threads):
    """(cores to build on, cores to measure on): the last ones measure alone, if there are enough."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(allowed) <= threads:
        return allowed, allowed
    return allowed[:-threads], allowed[-threads:]


class Backlog:
    """Candidates to build, for whichever process has time first."""

    def __init__(self):
        self.changed, self.jobs = threading.Condition(), collections.deque()

    def add(self, work):
        """Future of ``work(process)``."""
        return self.put(self.jobs, work)

    def put(self, jobs, work):
        """Append to a queue that threads of this backlog look at."""
        future = Future()
        with self.changed:
            jobs.append((future, work))
            self.changed.notify_all()
        return future


class Process:
    """A warm process with a thread that feeds it: with its own jobs first, then with those of a backlog.

    Parameters
    ----------
    cores : list of int
    threads : int
        Threads of the kernels that run in it.
    backlog : Backlog
    """

    def __init__(self, cores, threads, backlog):
        self.worker = PopenWorker(worker.start, (cores, threads), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.backlog, self.jobs, self.closed = backlog, collections.deque(), False
        threading.Thread(target=self._serve, daemon=True).start()

    def submit(self, function, *args):
        """Future of ``function(*args)`` in the process."""
        return self.backlog.put(self.jobs, lambda process: process.call(function, *args))

    def _serve(self):
        # A process that this thread starts inherits the mask: Ctrl-C, which a terminal sends to all, is the tuner's to answer.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        while (job := self._next()) is not None:
            future, work = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = work(self)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

    def _next(self):
        queues, changed = (self.jobs, self.backlog.jobs), self.backlog.changed
        with changed:
            changed.wait_for(lambda: self.closed or any(queues))
            return None if self.closed else next(queue for queue in queues if queue).popleft()

    def call(self, function, *args):
        """``function(*args)`` in the process; for its own thread."""
        try:
            self.worker.send(worker.answer, (function, *args))
            good, value = self.worker.recv()
        except (ChildProcessError, EOFError) as error:  # not the candidate's doing: that runs in a process of its own
            raise Stopped("the tuner's process died") from error
        if not good:
            raise Failure(value)
        return value

    def close(self):
        """End the process, whatever it does."""
        with self.backlog.changed:
            self.closed = True
            self.backlog.changed.notify_all()
        with contextlib.suppress(AttributeError, OSError):  # its own thread may be about to kill it, too
            self.worker.kill()


class Measures:
    """What measures candidates: this machine (:class:`Local`), boards (:class:`.rpc.Farm`) or a GPU (:class:`.gpu.Gpu`).

    Each also has ``backlog``, whose processes build, ``build_cores``, ``measure(folder, library)`` and ``compare(candidates)``, which are
    futures, and ``close()``.

    Attributes
    ----------
    machine : str or None
        What records name as their machine; None: this machine's processor.
    images : int
        Images of a case, where the batch is dynamic.
    runs_networks : bool
        Whether candidates can be compared within their network.
    place : str
        Kind of place that records of ``compare`` have, see :class:`.records.Record`.
    """

    machine, images, runs_networks, place = None, 1, False, "alone"

    @property
    def build_limit(self):
        """Seconds that one candidate may take to build."""
        return BUILD_LIMIT


class Local(Measures):
    """Builds and measures on this machine.

    One process measures, and builds while nothing waits to be measured: what it measures runs alone on its cores. A second one builds
    on the other cores, if there are any.

    Parameters
    ----------
    threads : int
    """

    runs_networks = True

    def __init__(self, threads):
        self.backlog = Backlog()
        self.build_cores, cores = choose_cores(threads)
        self.process = Process(cores, threads, self.backlog)
        self.builder = None if set(self.build_cores) & set(cores) else Process(self.build_cores, 1, self.backlog)

    def measure(self, folder, library):
        """Future of the seconds of single runs."""
        return self.process.submit(worker.measure, folder, library, MEASURE_LIMIT, MEASURE_SECONDS)

    def compare(self, candidates):
        """Future of the seconds of single runs of several candidates, taken in turns."""
        return self.process.submit(worker.compare, candidates, MEASURE_LIMIT * len(candidates), 2 * MEASURE_SECONDS)

    def close(self):
        for process in filter(None, (self.process, self.builder)):
            process.close()


class Pipeline:
    """From schedules to times.

    Parameters
    ----------
    store : Store
        Gets every result at once.
    device : Measures
    stop : threading.Event
        What is not measured when it is set, never is.
    """

    def __init__(self, store, device, stop):
        self.store, self.device, self.stop = store, device, stop
        _remove_abandoned()
        try:
            self.folder = pathlib.Path(tempfile.mkdtemp(prefix=_PREFIX))
            self.held = open(self.folder / _LOCK, "w")
        except OSError as error:
            hint = "make room, or point TMPDIR at a folder that can be written"
            raise ToolchainError("no place for temporary files", where=tempfile.gettempdir(), why=error.strerror, hint=hint) from error
        fcntl.flock(self.held, fcntl.LOCK_EX)
        self.numbers, self.lock, self.observers = itertools.count(), threading.Lock(), []
        self.kept = {}  # task id -> {schedule: (seconds, folder, library)}
        self.built = []  # seconds that every build took
        self.error = None  # of the store, with which the session ends

    def task_folder(self, task):
        """Where a task's data are."""
        folder = self.folder / task.id
        if not folder.exists():
            folder.mkdir()
            (folder / "task.pickle").write_bytes(pickle.dumps(task, protocol=5))
        return str(folder)

    def build(self, space, schedule):
        """Future of (folder, library)."""
        with self.lock:
            known = self.kept.get(space.task.id, {}).get(schedule)
        if known:
            ready = Future()
            ready.set_result(known[1:])
            return ready
        folder = self.task_folder(space.task)
        library = os.path.join(folder, f"{next(self.numbers)}.so")

        def work(process):
            if self.stop.is_set():
                raise Stopped
            self._check_room()
            begin = time.monotonic()
            process.call(worker.build, folder, schedule, library, self.device.build_limit, PREPARE_LIMIT, self.device.images)
            self.built.append(time.monotonic() - begin)
            return folder, library

        return self.device.backlog.add(work)

    def build_seconds(self, space, schedule):
        """Seconds that :meth:`build` will take, about."""
        if schedule in self.kept.get(space.task.id, {}):
            return 0.0
        return statistics.median(self.built) if self.built else 1.0

    def _check_room(self):
        """What a compiler cannot write is no candidate's fault."""
        free = shutil.disk_usage(self.folder).free
        if free < LEAST_ROOM:
            raise ToolchainError(
                "too little room for temporary files", where=str(self.folder.parent), why=f"{free >> 10} kB are free",
                hint="make room, or point TMPDIR at another folder, and tune again: what was measured is kept",
            )  # fmt: skip

    def build_network(self, network):
        """Future of a :class:`bnntvm.tuning.in_network.Network` that is built."""
        return self.device.backlog.add(lambda process: process.call(network.build, str(self.folder)))

    def run(self, space, schedule):
        """Build, check, measure and record a candidate.

        Returns
        -------
        Future
            Seconds of single runs; :class:`Failure` or :class:`Stopped`.
        """
        result = Future()

        def built(future):
            try:
                folder, library = future.result()
                if self.stop.is_set():
                    raise Stopped
                done = self.device.measure(folder, library)
                done.add_done_callback(lambda d: self._measured(space, schedule, d, result, (folder, library)))
            except BaseException as error:
                self._failed(space, schedule, error, result)

        self.build(space, schedule).add_done_callback(built)
        return result

    def _measured(self, space, schedule, done, result, built):
        try:
            seconds = done.result()
            self.store.commit(space, schedule, seconds)
        except BaseException as error:
            _remove(built[1])
            self._failed(space, schedule, error, result)
            return
        self._keep(space, schedule, min(seconds), built)
        self._tell(space, schedule, seconds)
        result.set_result(seconds)

    def _keep(self, space, schedule, seconds, built):
        """Keep the library if it may be measured again; the slowest of those that stayed so far makes room."""
        with self.lock:
            kept = self.kept.setdefault(space.task.id, {})
            kept[schedule] = (seconds, *built)
            fast = sorted((s for s in kept if s != space.default), key=lambda s: kept[s][0])
            for slow in fast[KEPT:]:
                _remove(kept.pop(slow)[2])

    def _failed(self, space, schedule, error, result):
        try:
            if isinstance(error, Failure):
                self.store.commit(space, schedule, [], str(error))
                self._tell(space, schedule, [])
        except (BnnError, OSError, RuntimeError) as broken:
            error = broken
        if not isinstance(error, (Failure, Stopped)):
            self.error = self.error or error
            self.stop.set()
        result.set_exception(error)

    def _tell(self, space, schedule, seconds):
        for observer in self.observers:
            observer(space, schedule, seconds)

    def close(self):
        self.device.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.held.close()


def _remove_abandoned():
    """Delete the folders of sessions that were killed: nobody holds their locks."""
    for folder in pathlib.Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), open(folder / _LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def _remove(library):
    """Delete a candidate's library and its weights."""
    for path in (library, library + ".npy"):
        with contextlib.suppress(OSError):
            os.unlink(path)


@derived_object
class Builder(ms.builder.PyBuilder):
    """MetaSchedule's builder: starts what its candidates stand for, and gives it a number.

    Parameters
    ----------
    pipeline : Pipeline
    spaces : dict
        Task id to Space.
    started : dict
        Shared with the runner: number to future.
    """

    def __init__(self, pipeline, spaces, started):
        super().__init__()
        self.pipeline, self.spaces, self.started, self.numbers = pipeline, spaces, started, itertools.count()

    def build(self, inputs):
        results = []
        for one in inputs:
            space = self.spaces[str(one.mod["main"].body.block.annotations["bnn.task"])]
            number = str(next(self.numbers))
            self.started[number] = self.pipeline.run(space, space.schedule_of(one.mod))
            results.append(ms.builder.BuilderResult(number, None))
        return results


@derived_object
class Waiting(ms.runner.PyRunnerFuture):
    """A candidate's result as MetaSchedule asks for it."""

    def __init__(self, future):
        super().__init__()
        self.future = future

    def done(self):
        return self.future.done()

    def result(self):
        while not wait([self.future], timeout=0.2).done:  # in short steps, so that Python sees signals
            pass
        error = self.future.exception()
        if error is not None:
            return ms.runner.RunnerResult(None, f"{type(error).__name__}: {error}")
        return ms.runner.RunnerResult(self.future.result(), None)


@derived_object
class Runner(ms.runner.PyRunner):
    """MetaSchedule's runner: waits for what the builder started."""

    def __init__(self, started):
        super().__init__()
        self.started = started

    def run(self, inputs):
        return [Waiting(self.started.pop(str(one.artifact_path))) for one in inputs]
