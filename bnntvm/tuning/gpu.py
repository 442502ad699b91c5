"""Measuring on this machine's GPU: candidates are built in warm processes that need none, and measured by a program that has the device.

Several processes build, as compilers of CUDA take seconds for a kernel that runs for microseconds; on two cores it is one. The program that
measures (:mod:`.gpu_program`) is none of them and builds nothing. One that a candidate crashes or hangs, or in which one failed, is
ended, and the next candidate gets a new one: that costs a second or two, and nothing else.

The last comparison is between kernels that are alone on the device, in turns. A comparison within the network, as on processors, would
tell little more: kernels of a network follow one another on the device with nothing between them, and the caches before a launch are as
they are here (:mod:`.gpu_program`).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from bnntvm.cuda import driver, toolchain
from bnntvm.cuda.backend import LEAST_DRIVER
from bnntvm.errors import BnnError, TargetError, UnsupportedError
from bnntvm.tuning.gpu_process import MEASURE_LIMIT, Program
from bnntvm.tuning.measure import MEASURE_SECONDS, Backlog, Measures, Process, choose_cores

#: Seconds that one candidate may take to build.
BUILD_LIMIT = 120.0
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

    images, place = 2, "device"  # different images: larger batches repeat them

    def __init__(self, isa):
        toolchain.required_compiler()
        self.build_cores, cores = choose_cores(1)
        self.program = Program(cores, isa.name)
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
