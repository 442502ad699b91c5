"""What the tuner's processes do: prepare a task's case, build a candidate, measure it.

These processes stay warm (``tvm.support.popen_pool.PopenWorker``): importing TVM takes seconds, and MetaSchedule's own builder starts a new
pool of processes for every batch, each of which imports all CUDA intrinsics besides (15 s). Every piece of work then runs in a fork of its
process, so a candidate that crashes, hangs or writes where it should not takes nothing with it, and the next one starts at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import pathlib
import pickle
import select
import signal
import statistics
import time

import numpy as np

from bnntvm.spec import WORKSPACE
from bnntvm.tuning import turns

#: Numbers that a measurement has before its slower half is left out; single runs behind them are at most MOST_RUNS.
SAMPLES, MOST_RUNS = 12, 600


_PR_SET_PDEATHSIG = 1


class Failure(Exception):
    """A candidate did not build, crashed, hung, or computed something wrong. The message says which."""


class Stopped(Exception):
    """The candidate was not measured, as tuning has ended."""


class Late(Exception):
    """It was not done in time."""


def end_with_parent():
    """Have the system end this process when its parent ends, however that ends."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def isolated(function, *args, limit):
    """Result of ``function(*args)``, computed in a forked process.

    Parameters
    ----------
    limit : float
        Seconds after which the process is killed.

    Raises
    ------
    Failure
        If it raised, died or was killed.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _child(function, args, reader, writer)
    os.close(writer)
    data = _read(reader, time.monotonic() + limit)
    os.close(reader)
    if data is None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if data is None:
        raise Failure(f"time out after {limit:g} s")
    if not data:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        raise Failure(f"crashed: {signal.Signals(number).name}" if number else f"ended with status {os.waitstatus_to_exitcode(status)}")
    good, value = pickle.loads(data)
    if not good:
        raise Failure(value)
    return value


def _child(function, args, reader, writer):
    """The forked process: it never returns, and runs none of its parent's exit handlers."""
    os.close(reader)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        answer = True, function(*args)
    except Failure as failure:
        answer = False, str(failure)
    except BaseException as error:  # whatever it is, the parent is told
        lines = str(error).strip().splitlines() or [""]
        answer = False, f"{type(error).__name__}: {lines[-1]}"
    with os.fdopen(writer, "wb") as file:
        file.write(pickle.dumps(answer))
    os._exit(0)


def _read(reader, deadline):
    """All bytes until the other end is closed; None if that takes too long."""
    parts = []
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(reader, 1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)


def answer(function, *args):
    """(True, result) or (False, why it failed): TVM's worker would bring an exception back as its traceback's text."""
    try:
        return True, function(*args)
    except Failure as failure:
        return False, str(failure)


def start(cores, threads):
    """Settle a new process: its cores, the threads of its kernels, and everything that every candidate needs loaded."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the tuner's to answer
    os.environ.update(TVM_NUM_THREADS=str(threads), OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    if cores:
        os.sched_setaffinity(0, cores)
    import tvm
    from tvm import tirx

    import bnntvm.build  # noqa: F401
    from bnntvm.targets.tile_permission import tile_permission

    # A fork inherits this permission, too.
    tile_permission()
    # The first compilation sets LLVM up; every fork inherits that.
    block = tirx.PrimFunc([], tirx.Evaluate(tirx.const(0, "int32"))).with_attr("global_symbol", "kernel")
    tvm.compile(tvm.IRModule({"kernel": block}), target=tvm.target.Target({"kind": "llvm"}))


def prepare(folder, limit, images=1):
    """Compute the case of the task in ``folder``/task.pickle and write it there, once: another process may be about to, too."""
    with open(pathlib.Path(folder, "case.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not pathlib.Path(folder, "case.pickle").exists():
            isolated(_prepare, folder, images, limit=limit)


def _prepare(folder, images):
    from bnntvm.tuning import cases

    task = pickle.loads(pathlib.Path(folder, "task.pickle").read_bytes())
    operands, weights, expected = cases.make(task, images=images)
    pathlib.Path(folder, "case.new").write_bytes(pickle.dumps((task, operands, weights, expected), protocol=5))
    pathlib.Path(folder, "case.new").replace(pathlib.Path(folder, "case.pickle"))


def load(folder):
    """(task, operands, canonical weights, expected outputs)."""
    return pickle.loads(pathlib.Path(folder, "case.pickle").read_bytes())


def build(folder, schedule, library, limit, case_limit, images=1):
    """Build a candidate.

    Parameters
    ----------
    folder : str
        The task's.
    schedule : Schedule
    library : str
        Shared library to write; the weights in this schedule's layout go beside it, as .npy, and how much memory the kernel wants for
        itself, as .workspace.
    limit, case_limit : float
        Seconds that building may take, and preparing the task before its first candidate.
    images : int
        What the task's data have, where the batch is dynamic.
    """
    prepare(folder, case_limit, images)
    isolated(_build, folder, schedule, library, limit=limit)


def _build(folder, schedule, library):
    from bnntvm.build import backend_of

    task, _, weights, _ = load(folder)
    function = task.module.build(task.spec, schedule, task.isa).with_attr("global_symbol", "kernel")
    backend_of(task.isa).link_kernels({"kernel": function}, pathlib.Path(library), task.isa)
    if WORKSPACE in function.attrs:
        pathlib.Path(library + ".workspace").write_text(str(int(function.attrs[WORKSPACE])))
    if weights is not None:
        np.save(library + ".npy", task.module.pack_weights(task.spec, schedule, task.isa, weights))


def measure(folder, library, limit, seconds):
    """Check a candidate and time it.

    Parameters
    ----------
    folder, library : str
        As for :func:`build`.
    limit : float
        Seconds before it is killed.
    seconds : float
        How long to measure, about.

    Returns
    -------
    list of float
        Seconds of one run: the faster half of several samples, as other work on the machine only ever adds.
    """
    return isolated(_measure, folder, library, seconds, limit=limit)


def _measure(folder, library, seconds):
    import tvm

    return check_and_time(tvm.runtime.load_module(library), Here(), folder, library, seconds)


class Here:
    """Where a candidate runs: this process."""

    def __init__(self):
        import tvm

        from bnntvm.tuning import surroundings

        self.device, self.seal, self.fault = tvm.cpu(), surroundings.seal, surroundings.fault
        self.reserve, self.between = surroundings.place, "bnntvm.tuning.between"

    def place(self, array, role):
        """A copy of ``array`` between guards; ``role`` as :func:`bnntvm.tuning.surroundings.place` has it."""
        tensor = self.reserve(role, str(array.dtype), *array.shape)
        tensor.copyfrom(array)
        return tensor

    def sized(self, task, operands, expected):
        """Operands and expected outputs of what is measured, which is what the case has."""
        return operands, expected

    def call(self, module, tensors):
        """Run a loaded candidate once."""
        module["kernel"](*tensors)

    def read(self, tensor):
        """A tensor's contents."""
        return tensor.numpy()

    def write(self, tensor, array):
        """Change a tensor's contents."""
        tensor.copyfrom(array)

    def timer(self, module, repeat):
        """Function of tensors: the seconds of ``repeat`` single runs, the caches before each as in a network."""
        evaluate = module.time_evaluator("kernel", self.device, number=1, repeat=repeat, f_preproc=self.between)
        return lambda *tensors: evaluate(*tensors).results


def place(where, folder, library):
    """(task, operands, outputs and workspace between guards, expected outputs) of a candidate."""
    task, operands, weights, expected = load(folder)
    operands, expected = where.sized(task, operands, expected)
    packed = None if weights is None else np.load(library + ".npy")
    tensors = [
        where.place(np.ascontiguousarray(packed if operand.weights else array), "input" if operand.array is None else "constant")
        for operand, array in zip(task.operands, operands)
    ]
    # Outputs start as garbage, so that an element that is not stored shows.
    tensors += [where.place(np.full(e.shape, 77, e.dtype), "output") for e in expected]
    workspace = pathlib.Path(library + ".workspace")
    if workspace.exists():
        tensors.append(where.place(np.full(int(workspace.read_text()), 77, np.int32), "output"))
    where.seal()
    return task, tensors, expected


def faster_half(seconds):
    """The faster half of single runs, as SAMPLES / 2 numbers: other work on the machine only ever adds."""
    fast = sorted(seconds)[: max(1, len(seconds) // 2)]
    return fast if len(fast) <= SAMPLES // 2 else [fast[round(i * (len(fast) - 1) / (SAMPLES // 2 - 1))] for i in range(SAMPLES // 2)]


def _repeats(module, where, tensors, seconds):
    """Single runs that fit in ``seconds``."""
    start = time.perf_counter()
    where.timer(module, 3)(*tensors)
    return min(MOST_RUNS, max(SAMPLES, int(seconds * 4 / (time.perf_counter() - start))))


def _clear_mask(task, where, tensors):
    """Data without zeros, to time the way that networks take."""
    from bnntvm.tuning import cases

    mask = cases.mask_of_zeros(task)
    if mask is not None:
        where.write(tensors[mask], np.zeros(tuple(map(int, tensors[mask].shape)), "uint32"))


def check_and_time(module, where, folder, library, seconds):
    """Run a loaded candidate ``where``, which may be far away, compare, see what it wrote beside its outputs, and time it."""
    from bnntvm.tuning import cases

    task, tensors, expected = place(where, folder, library)
    where.call(module, tensors)
    results = tensors[len(task.operands) : len(task.operands) + len(expected)]
    wrong = cases.differs(task, [where.read(t) for t in results], expected)
    if wrong:
        raise Failure(f"wrong result: {wrong}")
    fault = where.fault()
    if fault:
        raise Failure(f"wrong result: {fault}")
    _clear_mask(task, where, tensors)
    return faster_half(where.timer(module, _repeats(module, where, tensors, seconds))(*tensors))


def compare(candidates, limit, seconds):
    """Time several candidates of one task in turns.

    Parameters
    ----------
    candidates : list of (str, str)
        Folder and library of each, the default first.

    Returns
    -------
    list of list of float
        Seconds of one run of each, in every turn.
    """
    return isolated(_compare, candidates, seconds, limit=limit)


def _compare(candidates, seconds):
    import tvm

    return take_turns([(tvm.runtime.load_module(library), folder, library) for folder, library in candidates], Here(), seconds)


def take_turns(candidates, where, seconds):
    """Time loaded candidates ``where``, some runs of each at a time; more turns where too many were disturbed. ``candidates``: (module,
    folder, library) of each, the default first."""
    ready = []
    for module, folder, library in candidates:
        task, tensors, _ = place(where, folder, library)
        _clear_mask(task, where, tensors)
        runs = -(-_repeats(module, where, tensors, seconds) // SAMPLES)
        ready.append((where.timer(module, runs), tensors, []))
    for turn in range(2 * SAMPLES):
        if turn == SAMPLES and not any(turns.gain(ready[0][2], own) is None for *_, own in ready):
            break
        for timer, tensors, own in ready:
            runs = sorted(timer(*tensors))
            own.append(statistics.median(runs[: -(-len(runs) // 2)]))  # of the faster half: other work only ever adds
    return [own for *_, own in ready]
