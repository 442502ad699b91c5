"""One process per system: its threads, its allocator and its crashes stay its own, and only one of them runs at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ready:
    """A worker's answer to `Worker.prepare`.

    Attributes
    ----------
    outputs : list of np.ndarray
        Outputs of the model for its feed.
    macs : int
        See `peers.Prepared`.
    note : str
        See `peers.Prepared`.
    seconds : float
        How long the preparation took.
    limit_seconds : float
        See `peers.Prepared`.
    """

    outputs: list[np.ndarray]
    macs: int
    note: str
    seconds: float
    limit_seconds: float = 0.0


# Longest answer to wait for: the slowest builds take a minute on a quiet machine.
TIMEOUT_SECONDS = 900


class WorkerError(Exception):
    """The system could not prepare or run the model; the text says why."""


class Worker:
    """Parent's end of a process that runs one system.

    Parameters
    ----------
    system : str
        Key of `peers.SYSTEMS`.
    cores : list of int
        Processors that it may use; as many threads as cores.
    """

    def __init__(self, system: str, cores: list[int]):
        self.system, self.cores = system, cores
        self._process = self._pipe = None

    def prepare(self, key: str, model: bytes, feed: dict[str, np.ndarray]) -> Ready:
        """Build a model under a key; starts the process where necessary."""
        if self._process is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._pipe, child = context.Pipe()
            self._process = context.Process(target=_serve, args=(child, self.system, self.cores), daemon=True)
            self._process.start()
            child.close()
        return self._ask("prepare", key, model, feed)

    def measure(self, key: str, repeats: int) -> tuple[float, float]:
        """Run a prepared model once for warmth, then ``repeats`` times; seconds of wall and of CPU time for each run."""
        return self._ask("measure", key, repeats)

    def forget(self) -> None:
        """Drop all prepared models."""
        if self._process is not None and self._process.is_alive():
            self._ask("forget")

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._pipe.close()
            self._process.join(5)
            if self._process.is_alive():
                self._process.terminate()
            self._process = None

    def _ask(self, *command):
        try:
            self._pipe.send(command)
            if not self._pipe.poll(TIMEOUT_SECONDS):
                self._process.terminate()
            kind, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            code = self._process.exitcode
            reason = signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
            self._process = None
            raise WorkerError(f"process ended: {reason}") from error
        if kind == "error":
            raise WorkerError(answer)
        return answer


def _serve(pipe, system: str, cores: list[int]) -> None:
    """Child: answer commands until the pipe closes."""
    os.sched_setaffinity(0, cores)
    threads = len(cores)
    for variable in ("OMP_NUM_THREADS", "TVM_NUM_THREADS", "BNNTVM_NUM_THREADS"):
        os.environ[variable] = str(threads)
    prepared: dict = {}
    while True:
        try:
            command, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = _COMMANDS[command](prepared, system, threads, *arguments)
            pipe.send(("ok", answer))
        except Exception as error:  # noqa: BLE001 - whatever a system raises becomes a note in the table
            first_line = (str(error).strip() or repr(error)).splitlines()[0]
            pipe.send(("error", f"{type(error).__name__}: {first_line}"[:300]))


def _prepare(prepared: dict, system: str, threads: int, key: str, model: bytes, feed: dict[str, np.ndarray]) -> Ready:
    import onnx

    from .peers import FOR_WEIGHTS, SYSTEMS

    start = time.perf_counter()
    ready = prepared[key] = (SYSTEMS | FOR_WEIGHTS)[system].prepare(onnx.load_model_from_string(model) if model else None, feed, threads)
    return Ready(ready.outputs, ready.macs, ready.note, time.perf_counter() - start, ready.limit_seconds)


def _measure(prepared: dict, _system: str, _threads: int, key: str, repeats: int) -> tuple[float, float]:
    run = prepared[key].run
    run()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats


def _forget(prepared: dict, _system: str, _threads: int) -> None:
    prepared.clear()


_COMMANDS = {"prepare": _prepare, "measure": _measure, "forget": _forget}
