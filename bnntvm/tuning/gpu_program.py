"""What measures candidates on a GPU, as a program: ``python -m bnntvm.tuning.gpu_program``. Imports no compiler.

It has the device's context, and so is never forked; :mod:`.gpu` starts it, gives it one candidate after the other through a pipe, ends it
when one takes too long, and starts another after one that failed: what a kernel has done to a context, or to memory, stays there.

Times are those of single launches between two CUDA events, as networks find the caches that are not much smaller than they: before each
launch the ballast, twice the size of the second-level cache, is overwritten, so weights are in memory, and then the activations are, which
the kernels before would have just written. (Of a small network that runs again and again the weights stay in the cache. Which schedule is
best then, is decided by the same sums from a nearer place; the other way round a tile that reads weights many times would look good.)

A kernel serves any batch, so it is measured with each of BATCHES, and its time is the geometric mean of those. In the last comparison a
candidate counts by the batch at which it gains least.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import signal
import statistics
import struct
import sys
import zlib

import numpy as np

from bnntvm.cuda import tensor
from bnntvm.cuda.device import Device, Stopwatch
from bnntvm.errors import BnnError
from bnntvm.tuning import cases, turns, worker

#: Images of a batch that kernels are measured with; fewer of the larger one where it has more bytes than this.
BATCHES, MOST_BYTES = (1, 64), 1 << 30
#: Bytes on either side of a tensor, and their pattern.
GUARD_BYTES, PATTERN = 4096, 0xA5
_ALIGNMENT = 256
_LENGTH = struct.Struct("<Q")


class _Placed:
    """A tensor on the device between guards. ``role``: ``constant``, ``input`` or ``output``."""

    def __init__(self, device, array, role):
        self.device, self.role = device, role
        self.shape, self.dtype, self.size = array.shape, array.dtype, array.nbytes
        self.end = GUARD_BYTES + -(-self.size // _ALIGNMENT) * _ALIGNMENT
        self.whole = device.empty((self.end + GUARD_BYTES,), "uint8", 0)
        device.driver.fill(self.whole.data_ptr(), PATTERN, self.end + GUARD_BYTES, device.stream)
        self.tensor = tensor.part(self.whole, GUARD_BYTES, array.shape, array.dtype)
        self.source = device.empty((max(self.size, 1),), "uint8", 0) if role == "input" else None
        self.write(array)

    @property
    def address(self):
        return self.whole.data_ptr() + GUARD_BYTES

    def write(self, array):
        array = np.ascontiguousarray(array)
        self.sum = zlib.crc32(array)
        for target in (self.address, *([self.source.data_ptr()] if self.source is not None else [])):
            self.device.driver.upload(target, array.ctypes.data, self.size, self.device.stream)
        self.device.driver.synchronize(self.device.stream)

    def touch(self):
        """Write an activation once more, what it has already."""
        if self.source is not None:
            self.device.driver.copy(self.address, self.source.data_ptr(), self.size, self.device.stream)

    def fault(self):
        """What was written where nothing should be; empty if nothing was."""
        parts = (("before", 0, GUARD_BYTES), ("behind", GUARD_BYTES + self.size, self.end + GUARD_BYTES))
        for name, begin, end in parts:
            written = int((self._bytes(begin, end) != PATTERN).sum())
            if written:
                return f"{written} bytes {name} an {self.role} are overwritten"
        kept = self.role == "output" or zlib.crc32(self._bytes(GUARD_BYTES, GUARD_BYTES + self.size)) == self.sum
        return "" if kept else f"an {self.role} is overwritten"

    def _bytes(self, begin, end):
        found = np.empty(end - begin, np.uint8)
        self.device.driver.download(found.ctypes.data, self.whole.data_ptr() + begin, end - begin, self.device.stream)
        self.device.driver.synchronize(self.device.stream)
        return found


class OnDevice:
    """Where a candidate runs: the device, with so many images. See :class:`.worker.Here`."""

    def __init__(self, device, images):
        self.device, self.images, self.placed = device, images, {}

    def sized(self, task, operands, expected):
        if not task.batched:
            return operands, expected
        resized = cases.resized
        own = [resized(one, array, self.images) for one, array in zip(task.operands, operands)]
        return own, [resized(one, array, self.images) for one, array in zip(task.outputs, expected)]

    def place(self, array, role):
        made = _Placed(self.device, array, role)
        self.placed[made.address] = made
        return made.tensor

    def seal(self):
        pass

    def fault(self):
        return next((text for text in (one.fault() for one in self.placed.values()) if text), "")

    def call(self, kernel, tensors):
        self.device.call(kernel, *tensors)
        self.device.driver.synchronize(self.device.stream)

    def read(self, one):
        return self.device.download(one)

    def write(self, one, array):
        self.placed[one.data_ptr()].write(array)

    def timer(self, kernel, repeat):
        def run(*tensors):
            watches = []
            for _ in range(repeat):
                self._between(tensors)
                watches.append(Stopwatch(self.device))
                with watches[-1].running():
                    self.device.call(kernel, *tensors)
            self.device.driver.synchronize(self.device.stream)
            return [max(watch.read() / 1e3, 1e-9) for watch in watches]

        return run

    def _between(self, tensors):
        """Leave the second-level cache as other kernels would."""
        ballast, size = _ballast(self.device)
        self.device.driver.fill(ballast.data_ptr(), 0, size, self.device.stream)
        for one in reversed(tensors):  # inputs, which come first, were written last
            self.placed[one.data_ptr()].touch()


def _ballast(device):
    """Memory that fills the second-level cache, and its bytes."""
    if not hasattr(device, "ballast"):
        size = 2 * max(device.driver.cache_bytes(0), 1 << 20)
        device.ballast = device.empty((size,), "uint8", 0), size
    return device.ballast


def batches(task):
    """Images that a task's kernels are measured with; (1,) where the batch has a size."""
    if not task.batched:
        return (1,)
    each = sum(math.prod(one.shape) * np.dtype(one.dtype).itemsize for one in (*task.operands, *task.outputs) if one.batched)
    return tuple(dict.fromkeys(min(images, max(1, MOST_BYTES // max(each, 1))) for images in BATCHES))


def measure(device, folder, library, seconds):
    """Check a candidate with every batch and time it: seconds, geometric means over the batches."""
    task, kernel = worker.load(folder)[0], device.library(library)("kernel")
    found = [worker.check_and_time(kernel, OnDevice(device, images), folder, library, seconds) for images in batches(task)]
    return _together(found)


def _together(found):
    """Geometric means of the samples of several batches, the fastest together."""
    return np.exp(np.mean(np.log([sorted(samples) for samples in found]), axis=0)).tolist()


def compare(device, candidates, seconds):
    """Time candidates of one task in turns, the default first, with every batch.

    Returns
    -------
    list of list of float
        Seconds: the default's, as :func:`measure`; of every other one those, times its time over the default's at the batch where that is
        most. Where the device was too busy to tell, it counts as slow as the default.
    """
    task = worker.load(candidates[0][0])[0]
    loaded = [(device.library(library)("kernel"), folder, library) for folder, library in candidates]
    found = [worker.take_turns(loaded, OnDevice(device, images), seconds) for images in batches(task)]
    default = _together([worker.faster_half(times[0]) for times in found])
    ratios = [max(_ratio(times[0], times[i]) for times in found) for i in range(len(loaded))]
    return [[one * ratio for one in default] for ratio in ratios]


def _ratio(default, other):
    """Another schedule's time over the default's; 1 where too many of their turns were disturbed."""
    counted = turns.undisturbed(default, other)
    if turns.gain(default, other) is None:
        return 1.0
    return statistics.median(other[turn] / default[turn] for turn in counted)


_JOBS = {"measure": measure, "compare": compare}


def write(file, value):
    """Write a value so that :func:`read` finds it."""
    data = pickle.dumps(value)
    file.write(_LENGTH.pack(len(data)) + data)
    file.flush()


def read(exactly):
    """The next value; ``exactly(n)`` gives n bytes, fewer at the end of file.

    Raises
    ------
    EOFError
    """
    head = exactly(_LENGTH.size)
    size = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else 0
    data = exactly(size)
    if not size or len(data) < size:
        raise EOFError
    return pickle.loads(data)


def main():
    """Answer what comes through standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the tuner's to answer
    worker.end_with_parent()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print does not get among the answers
    try:
        device = Device()
        driver = device.driver
        write(out, ("ready", dict(machine=driver.name(0), capability=driver.capability(0), driver=driver.version())))
    except BnnError as error:
        write(out, ("error", error))
        return
    with contextlib.suppress(EOFError):
        while True:
            name, *args = read(sys.stdin.buffer.read)
            write(out, _answer(device, name, args))


def _answer(device, name, args):
    """("done", result) or ("failed", why)."""
    try:
        return "done", _JOBS[name](device, *args)
    except worker.Failure as failure:
        return "failed", str(failure)
    except Exception as error:  # noqa: BLE001  (whatever it is, the tuner is told)
        lines = str(error).strip().splitlines() or [""]
        return "failed", f"{type(error).__name__}: " + " ".join(line.strip() for line in lines[:2])


if __name__ == "__main__":
    main()
