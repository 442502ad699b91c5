"""Times of a network's calls, and the limits of the machine: what runs where the network runs. Imports no compiler."""

from __future__ import annotations

import ctypes
import json
import statistics
import time

import numpy as np

from bnntvm import runtime
from bnntvm.module import Module

#: Seconds for which each limit is measured.
_LIMIT_S = 0.1
#: Bytes that are read for one measurement, small arrays several times: a call costs half a microsecond.
_LEAST_READ = 1 << 22


class _Record(ctypes.Structure):
    """As in probe.c."""

    _fields_ = [("begin", ctypes.c_int64), ("end", ctypes.c_int64), ("rows", ctypes.c_int64), ("name", ctypes.c_char * 48)]


def measure(plan):
    """Measure a network call by call.

    Parameters
    ----------
    plan : str
        JSON: ``artefact`` and ``probe``, paths; ``batch``, ``threads``; ``seconds`` to measure for; ``limits``, see :mod:`.limits`.

    Returns
    -------
    str
        JSON: ``whole_ns``, median of a run without the probe; ``calls``, for each call of a run ``[name, begin_ns, median ns]``, where
        ``begin_ns`` counts from the first call and belongs to one run, of median length; ``runs``; ``limits``, name to operations or bytes
        per second: a number, or for ``read`` a list of ``[bytes, rate]``.
    """
    plan = json.loads(str(plan))
    module = Module.load(plan["artefact"], plan["threads"])
    probe = runtime.ffi().get_global_func("ffi.Module.load_from_file.so")(plan["probe"], "so")
    whole, runs = _runs(module, probe, plan)
    names, runs, medians = _medians(runs)
    middle = sorted(runs, key=lambda run: run[-1][2] - run[0][1])[len(runs) // 2]
    calls = [[name, begin - middle[0][1], ns] for (name, begin, _), ns in zip(middle, medians)]
    limits = {limit["name"]: _limit(probe, limit, module.threads) for limit in plan["limits"]}
    result = {"whole_ns": statistics.median(whole), "runs": len(runs), "calls": calls, "threads": module.threads, "limits": limits}
    return json.dumps(result)


def _runs(module, probe, plan):
    """(nanoseconds of runs without the probe, records of those with it), taken in turns."""
    arrays, single = module._match(module.random_feed(batch=plan["batch"]))
    library = module._library
    plain, probed = library.machine(), library.machine(probe["bnn_probe"])
    staged = [module._stage(plain, i, array, False) for i, array in enumerate(arrays)]
    whole, runs, end = [], [], None
    for turn in range(100000):
        start = time.perf_counter_ns()
        plain.run(staged, module.threads, single)
        ns = time.perf_counter_ns() - start
        probe["bnn_probe_reset"]()
        probed.run(staged, module.threads, single)
        if turn < 2:  # workspaces are allocated
            continue
        end = end or time.perf_counter() + plan["seconds"]
        whole.append(ns)
        runs.append([(one.name.decode(errors="replace"), one.begin, one.end) for one in records(probe)])
        if turn >= 6 and time.perf_counter() > end:
            break
    return whole, runs


def _medians(runs):
    """(names of the calls of a run, the runs that made these calls, median nanoseconds of every call)."""
    names = [name for name, _, _ in runs[0]]
    runs = [run for run in runs if [name for name, _, _ in run] == names]
    return names, runs, [statistics.median(run[i][2] - run[i][1] for run in runs) for i in range(len(names))]


def noted(kernel):
    """A kernel's name as far as the probe notes it."""
    return kernel[: _Record.name.size - 1]


def records(probe):
    """What the probe noted since it was reset: its own memory, and it is reset.

    Returns
    -------
    ctypes array
        ``name`` (bytes, at most 47), ``begin`` and ``end`` in nanoseconds, ``rows`` of the first argument.
    """
    count = min(probe["bnn_probe_count"](), probe["bnn_probe_reset"]())
    return (_Record * count).from_address(probe["bnn_probe_records"]())


def _limit(probe, limit, threads):
    """Work per second: the best of several runs on all threads, as other work on the machine only ever adds."""
    function = probe[limit["function"]]
    if "sizes" in limit:
        rates = []
        for size in limit["sizes"]:
            rows, times = max(1, size // limit["row_bytes"] // threads), max(1, _LEAST_READ // size)
            arrays = [np.ones((threads, count, limit["elements"]), limit["dtype"]) for count in (rows, times)]
            rates.append([size, times * rows * limit["row_bytes"] * threads / _seconds(function, arrays, threads)])
        return rates
    array = np.full((threads, limit["elements"]), 0 if limit["dtype"] == "float32" else 1, limit["dtype"])
    return limit["work"] * threads / _seconds(function, [array], threads)


def _seconds(function, arrays, threads):
    tensors = [runtime.ffi().from_dlpack(array) for array in arrays]
    runtime.call_with_threads(function, tensors, threads)
    best, end = float("inf"), time.perf_counter() + _LIMIT_S
    while True:
        start = time.perf_counter()
        runtime.call_with_threads(function, tensors, threads)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            return best
