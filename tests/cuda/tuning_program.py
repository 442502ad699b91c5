"""The program that measures candidates, on a device that is not there: ``python -m tests.cuda.tuning_program``.

A candidate is what :mod:`.tuning_build` left. The emulator computes it when it runs with new tensors for the first time (to be compared);
how long a launch takes is made up: :func:`milliseconds`.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import pickle

from bnntvm.tuning import gpu_program
from tests.cuda import fake, faulty
from tests.cuda.tuning_build import CRASHES, FOLDER, LOG


def milliseconds(schedule, images=1):
    """Time of a launch."""
    if isinstance(schedule, faulty.Schedule):
        return 0.5 if schedule.kind == "better" else 1.0
    return images * (0.5 + int(hashlib.sha256(repr(schedule).encode()).hexdigest()[:8], 16) / 2**32)


class Device(fake.Fake):
    """Runs candidates."""

    def __init__(self):
        super().__init__()
        self.libraries[1].pass_time.argtypes = [ctypes.c_double]
        self.seen, self.begun = set(), (0, {})  # kernels of a candidate that were started, and their parameters

    def _start(self, name, params, stream):
        name, _, kernel = name.partition("/")
        folder, schedule, task, function, sources = candidate(name)
        started, addresses = self.begun
        addresses = addresses | self._addresses_in(sources, kernel, params)
        if isinstance(schedule, faulty.Schedule):
            self.libraries[1].pass_time(milliseconds(schedule))
            return faulty.execute(schedule, addresses)
        images, shapes = self._shapes(function, sources, kernel, params)
        self.begun = started + 1, addresses
        if started + 1 < self._count(function, shapes):
            return 0
        self.begun = 0, {}
        self.libraries[1].pass_time(milliseconds(schedule, images))
        if str(schedule) == os.environ.get(CRASHES):
            ctypes.string_at(0)
        if (name, *addresses.values()) not in self.seen:
            self.seen.add((name, *addresses.values()))
            self._emulate(function, fake.arrays_of(function, addresses, shapes))
        return 0

    @staticmethod
    def _count(function, shapes):
        from bnntvm.schedules.cuda import emulate

        return emulate.launches(function, shapes)

    @staticmethod
    def _emulate(function, arrays):
        from bnntvm.schedules.cuda import emulate

        emulate.run(function, arrays)

    def _addresses_in(self, sources, kernel, params):
        self.sources = sources
        return self._addresses(kernel, params)

    @staticmethod
    def _shapes(function, sources, kernel, params):
        """Images, and shapes of the parameters, by the numbers that the kernel is started with."""
        from tvm import tirx

        from bnntvm.tuning.workload import rows_of

        names = [n for n, _ in fake.toolchain_parameters(sources, kernel)]
        buffers = fake._buffers(function)
        batch = next((d.name for buffer in buffers for d in buffer.shape if isinstance(d, tirx.Var)), None)
        images = 1 if batch is None else ctypes.cast(params[names.index(batch)], ctypes.POINTER(ctypes.c_int32))[0]
        return images, [(tuple(rows_of((d,), images) for d in buffer.shape), str(buffer.dtype)) for buffer in buffers]


@functools.lru_cache(maxsize=64)
def candidate(name):
    """(task's folder, schedule, task, kernel or None, parameters of kernels in CUDA C++)."""
    folder, schedule, code = pickle.loads(pathlib.Path(os.environ[FOLDER], name).read_bytes())
    task = pickle.loads(pathlib.Path(folder, "task.pickle").read_bytes())
    function = None if isinstance(schedule, faulty.Schedule) else task.module.build(task.spec, schedule, task.isa)
    return folder, schedule, task, function, fake.parameters_of(code)


def main():
    with open(os.environ[LOG], "a") as log:
        log.write(f"{os.getpid()}\n")
    gpu_program.BATCHES = (1, 3)
    device = Device()  # C calls its functions as long as the program runs
    gpu_program.main()
    device.check()


if __name__ == "__main__":
    main()
