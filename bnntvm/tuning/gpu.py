"""Measuring on this machine's GPU: candidates are built in warm processes that need none, and measured by a program that has the device.

Several processes build, as compilers of CUDA take seconds for a kernel that runs for microseconds; on two cores it is one. The program that
measures (:mod:`.gpu_program`) is none of them and builds nothing. One that a candidate crashes or hangs, or in which one failed, is
ended, and the next candidate gets a new one: that costs a second or two, and nothing else.

The last comparison is between kernels that are alone on the device, in turns. A comparison within the network, as on processors, would
tell little more: kernels of a network follow one another on the device with nothing between them, and the caches before a launch are as
they are here (:mod:`.gpu_program`).
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from bnntvm.cuda import driver, toolchain
from bnntvm.cuda.backend import LEAST_DRIVER
from bnntvm.errors import BnnError, TargetError, UnsupportedError
from bnntvm.tuning import gpu_program
from bnntvm.tuning.measure import MEASURE_SECONDS, Backlog, Measures, Process, Stopped, choose_cores
from bnntvm.tuning.worker import Failure

#: The program that measures.
COMMAND = (sys.executable, "-m", gpu_program.__name__)
#: Seconds that one candidate may take to build, to be measured, and the program to start.
BUILD_LIMIT, MEASURE_LIMIT, START_LIMIT = 120.0, 30.0, 120.0
#: Most processes that build.
MOST_BUILDERS = 8


class Gpu(Measures):
    """Builds on this machine's processors and measures on its GPU.

    Parameters
    ----------
    isa : CudaIsa

    Raises
    ------
    BnnError
        Where this machine has no GPU that runs code for ``isa``, or no compiler for it.
    """

    images = 2  # different ones; larger batches repeat them

    def __init__(self, isa):
        toolchain.required_compiler()
        self.build_cores, cores = choose_cores(1)
        self.program = Program(cores)
        try:
            self._refuse(isa, self.program.start())
        except BaseException:
            self.program.close()
            raise
        self.machine = self.program.facts["machine"]
        self.backlog, self.queue = Backlog(), ThreadPoolExecutor(1, "measure")
        self.builders = [Process(self.build_cores, 1, self.backlog) for _ in range(min(MOST_BUILDERS, max(1, len(self.build_cores))))]

    @staticmethod
    def _refuse(isa, facts):
        """Raise an error if the device does not run code for ``isa``."""
        have, hint = facts["capability"], 'give target="cuda", or tune on a machine that has such a GPU: its records serve builds anywhere'
        why = f"this machine's {facts['machine']} is sm_{have[0]}{have[1]}"
        if facts["driver"] < LEAST_DRIVER:
            why, hint = f"this machine's NVIDIA driver serves CUDA {facts['driver'] // 1000}", "install a newer driver"
        elif driver.runs(isa.mcpu, have):
            return
        raise TargetError("candidates for this target cannot run here", where=isa.name, why=why, hint=hint)

    @property
    def build_limit(self):
        """Seconds that one candidate may take to build."""
        return BUILD_LIMIT

    def measure(self, folder, library):
        """Future of the seconds of single runs."""
        return self.queue.submit(self.program.call, MEASURE_LIMIT, "measure", folder, library, MEASURE_SECONDS)

    def compare(self, candidates):
        """Future of the seconds of several candidates, the default first, taken in turns."""
        return self.queue.submit(self.program.call, MEASURE_LIMIT * len(candidates), "compare", candidates, 2 * MEASURE_SECONDS)

    def close(self):
        self.program.close()
        self.queue.shutdown(wait=False)
        for process in self.builders:
            process.close()


def checked(isa, threads, rpc):
    """A :class:`Gpu`, for arguments of :func:`bnntvm.tune` that make sense with one."""
    if rpc:
        hint = "run `bnntvm tune` on the machine that has the GPU"
        raise UnsupportedError("GPUs are not measured through an RPC tracker", where=str(rpc), hint=hint)
    if threads != 1:
        raise BnnError("threads are those of a processor; a GPU has none to choose", where=f"threads={threads}", hint="leave it out")
    return Gpu(isa)


class Program:
    """The program that measures, started anew where need be. For one thread at a time, but for :meth:`close`.

    Parameters
    ----------
    cores : list of int
        Where it runs; empty for anywhere.
    """

    def __init__(self, cores):
        self.cores, self.process, self.closed, self.facts = cores, None, False, {}

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
                "candidates for a GPU cannot run here", why=" ".join([value.what, *([f"({value.why})"] if value.why else [])]),
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
