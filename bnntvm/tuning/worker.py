"""What the tuner's processes do: prepare a task's case, build a candidate, measure it.

Both processes stay warm (``tvm.support.popen_pool.PopenWorker``): importing TVM takes seconds, and MetaSchedule's own builder starts a new
pool of processes for every batch, each of which imports all CUDA intrinsics besides (15 s). Every piece of work then runs in a fork of its
process, so a candidate that crashes, hangs or writes where it should not takes nothing with it, and the next one starts at once.
"""

from __future__ import annotations

import os
import pathlib
import pickle
import select
import signal
import time

import numpy as np

#: Samples of one measurement; the faster half counts.
SAMPLES = 12


class Failure(Exception):
    """A candidate did not build, crashed, hung, or computed something wrong. The message says which."""


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


def prepare(folder, limit):
    """Compute the case of the task in ``folder``/task.pickle and write it there, once."""
    if not pathlib.Path(folder, "case.pickle").exists():
        isolated(_prepare, folder, limit=limit)


def _prepare(folder):
    from bnntvm.tuning import cases

    task = pickle.loads(pathlib.Path(folder, "task.pickle").read_bytes())
    operands, weights, expected = cases.make(task)
    pathlib.Path(folder, "case.new").write_bytes(pickle.dumps((task, operands, weights, expected), protocol=5))
    pathlib.Path(folder, "case.new").replace(pathlib.Path(folder, "case.pickle"))


def load(folder):
    """(task, operands, canonical weights, expected outputs)."""
    return pickle.loads(pathlib.Path(folder, "case.pickle").read_bytes())


def build(folder, schedule, library, limit, case_limit):
    """Build a candidate.

    Parameters
    ----------
    folder : str
        The task's.
    schedule : Schedule
    library : str
        Shared library to write; the weights in this schedule's layout go beside it, as .npy.
    limit, case_limit : float
        Seconds that building may take, and preparing the task before its first candidate.
    """
    prepare(folder, case_limit)
    isolated(_build, folder, schedule, library, limit=limit)


def _build(folder, schedule, library):
    import tvm

    from bnntvm.build import tvm_target
    from bnntvm.linker import link

    task, _, weights, _ = load(folder)
    function = task.module.build(task.spec, schedule, task.isa).with_attr("global_symbol", "kernel")
    compiled = tvm.compile(tvm.IRModule({"kernel": function}), target=tvm_target(task.isa))
    link(compiled, pathlib.Path(library), task.isa)
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

    return check_and_time(tvm.runtime.load_module(library), tvm.cpu(), folder, library, seconds)


def place(device, folder, library):
    """(task, operands and outputs on ``device``, expected outputs) of a candidate."""
    import tvm

    task, operands, weights, expected = load(folder)
    if weights is not None:
        packed = np.load(library + ".npy")
        operands = [packed if operand.weights else a for a, operand in zip(operands, task.operands)]
    # Outputs start as garbage, so that an element that is not stored shows.
    garbage = [np.full(e.shape, 77, e.dtype) for e in expected]
    return task, [tvm.runtime.tensor(np.ascontiguousarray(a), device) for a in (*operands, *garbage)], expected


def _number(module, device, tensors, seconds):
    """Runs of one sample, of SAMPLES in ``seconds``."""
    once = module.time_evaluator("kernel", device, number=1, repeat=3)(*tensors).min
    return max(1, min(10000, int(seconds / SAMPLES / max(once, 1e-7))))


def _clear_mask(task, tensors, device):
    """Data without zeros, to time the way that networks take."""
    import tvm

    from bnntvm.tuning import cases

    mask = cases.mask_of_zeros(task)
    if mask is not None:
        tensors[mask] = tvm.runtime.tensor(np.zeros(task.operands[mask].shape, "uint32"), device)


def check_and_time(module, device, folder, library, seconds):
    """Run a loaded candidate on ``device``, which may be far away, compare, and time it."""
    from bnntvm.tuning import cases

    task, tensors, expected = place(device, folder, library)
    module["kernel"](*tensors)
    wrong = cases.differs(task, [t.numpy() for t in tensors[-len(expected) :]], expected)
    if wrong:
        raise Failure(f"wrong result: {wrong}")
    _clear_mask(task, tensors, device)
    number = _number(module, device, tensors, seconds)
    samples = module.time_evaluator("kernel", device, number=number, repeat=SAMPLES)(*tensors).results
    return sorted(samples)[: SAMPLES // 2]


def compare(candidates, limit, seconds):
    """Time several candidates of one task in turns.

    Parameters
    ----------
    candidates : list of (str, str)
        Folder and library of each.

    Returns
    -------
    list of list of float
        Seconds of each, as :func:`measure`.
    """
    return isolated(_compare, candidates, seconds, limit=limit)


def _compare(candidates, seconds):
    import tvm

    return take_turns([(tvm.runtime.load_module(library), folder, library) for folder, library in candidates], tvm.cpu(), seconds)


def take_turns(candidates, device, seconds):
    """Time loaded candidates on ``device``, one sample of each at a time. ``candidates``: (module, folder, library) of each."""
    ready = []
    for module, folder, library in candidates:
        task, tensors, _ = place(device, folder, library)
        _clear_mask(task, tensors, device)
        number = _number(module, device, tensors, seconds)
        ready.append((module.time_evaluator("kernel", device, number=number, repeat=1), tensors, []))
    for _ in range(SAMPLES):
        for timer, tensors, samples in ready:
            samples.append(timer(*tensors).mean)
    return [sorted(samples)[: SAMPLES // 2] for *_, samples in ready]
