"""The process of :mod:`.gpu_program`: started, asked, ended, and started anew. Imports no compiler."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

from bnntvm.errors import BnnError, TargetError
from bnntvm.tuning import gpu_program
from bnntvm.tuning.worker import Failure, Stopped

#: The program that measures.
COMMAND = (sys.executable, "-m", gpu_program.__name__)
#: Seconds that one candidate may take to be measured, and the program to start.
MEASURE_LIMIT, START_LIMIT = 30.0, 120.0


class Program:
    """The program that measures, started anew where need be. For one thread at a time, but for :meth:`close`.

    Parameters
    ----------
    cores : list of int
        Where it runs; empty for anywhere.
    target : str
        For messages.
    """

    def __init__(self, cores, target):
        self.cores, self.target, self.process, self.closed, self.facts = cores, target, None, False, {}

    def start(self):
        """Start it; what it says of the device.

        Raises
        ------
        BnnError
        """
        self.process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if self.cores:
            os.sched_setaffinity(self.process.pid, self.cores)
        try:
            kind, value = self._receive(START_LIMIT)
        except Failure as failure:
            raise BnnError("the program that measures on the GPU did not start", where=" ".join(COMMAND), why=str(failure)) from failure
        if kind == "error":
            self.end()
            raise TargetError(
                "candidates for a GPU cannot run here", where=self.target, why=value.what + (f" ({value.why})" if value.why else ""),
                hint="tune on a machine with an NVIDIA GPU; the records serve builds anywhere: bnntvm build --tuning DIR",
            ) from value  # fmt: skip
        self.facts = value
        return value

    def call(self, limit, *request):
        """The program's answer to a request.

        Raises
        ------
        Failure
            What the candidate did; the program is gone then.
        Stopped
            If it was closed.
        BnnError
            If it does not start any more.
        """
        if self.closed:
            raise Stopped
        if self.process is None:
            self.start()
        try:
            gpu_program.write(self.process.stdin, request)
        except OSError:  # it has ended: reading says how
            pass
        kind, value = self._receive(limit)
        if kind == "failed":
            self.end()
            raise Failure(value)
        return value

    def _receive(self, limit):
        deadline = time.monotonic() + limit
        try:
            return gpu_program.read(lambda count: self._read(count, deadline))
        except TimeoutError as error:
            self.end()
            raise Failure(f"time out after {limit:g} s") from error
        except (EOFError, OSError, ValueError) as error:
            if self.closed:
                raise Stopped from error
            status = self.end()
            what = f"crashed: {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            raise Failure(what) from error

    def _read(self, count, deadline):
        """``count`` bytes; fewer at the end of file."""
        parts, file = [], self.process.stdout.fileno()
        while count:
            ready, _, _ = select.select([file], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            part = os.read(file, min(count, 1 << 20))
            if not part:
                break
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def end(self):
        """End the process; how it ended, if it did by itself."""
        process, self.process = self.process, None
        try:
            status = process.wait(1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        for file in (process.stdin, process.stdout):
            try:
                file.close()
            except OSError:  # what was not written yet
                pass
        return status

    def close(self):
        """End it, whatever it does."""
        self.closed = True
        process = self.process
        if process is not None:
            process.kill()
            process.wait()
