"""A device for single kernels: tensors, functions of a library, times. Imports no compiler."""

from __future__ import annotations

import contextlib
import statistics

import numpy as np

from bnntvm import runtime
from bnntvm.cuda import driver as drivers
from bnntvm.cuda import tensor


class Device:
    """The first device: everything goes through one stream."""

    def __init__(self):
        self.driver, self.ffi = drivers.load(), runtime.ffi()
        self.driver.use(0)
        self.stream, self.empty = self.driver.stream(), tensor.empty
        self.place = self.ffi.device("cuda", 0)

    def upload(self, array):
        """A tensor with the contents of an array."""
        array = np.ascontiguousarray(array)
        made = self.empty(array.shape, array.dtype, 0)
        self.driver.upload(made.data_ptr(), array.ctypes.data, array.nbytes, self.stream)
        self.driver.synchronize(self.stream)
        return made

    def download(self, tensor):
        """The contents of a tensor."""
        out = np.empty(tuple(tensor.shape), str(tensor.dtype))
        self.driver.download(out.ctypes.data, tensor.data_ptr(), out.nbytes, self.stream)
        self.driver.synchronize(self.stream)
        return out

    def library(self, path):
        """Functions of a shared library by name: each starts a kernel."""
        module = self.ffi.get_global_func("ffi.Module.load_from_file.so")(str(path), "so")
        return lambda name: module.get_function(name, query_imports=True)

    def call(self, function, *tensors):
        """Start a kernel on the stream."""
        with self.ffi.use_raw_stream(self.place, self.stream):
            function(*tensors)

    def elapsed(self, first, second):
        """Milliseconds between two events."""
        return self.driver.elapsed(first, second)

    def milliseconds(self, work, count=10, repeat=7):
        """Median time of ``work()``, recorded ``count`` times as one graph; the first launches are not counted."""
        work()
        self.driver.synchronize(self.stream)
        graph = self.driver.record(lambda: [work() for _ in range(count)], self.stream)
        times = []
        try:
            for _ in range(repeat + 2):
                watch = Stopwatch(self)
                with watch.running():
                    self.driver.launch(graph, self.stream)
                times.append(watch.read() / count)
        finally:
            self.driver.forget(graph)
        return statistics.median(times[2:])


class Stopwatch:
    """Time between two events of the stream."""

    def __init__(self, device):
        self.device, self.events = device, [device.driver.event() for _ in range(2)]

    @contextlib.contextmanager
    def running(self):
        """What the stream is given within counts; nothing is waited for."""
        self.device.driver.reached(self.events[0], self.device.stream)
        yield
        self.device.driver.reached(self.events[1], self.device.stream)

    def read(self):
        """Milliseconds, when the stream is past both; the events are gone then."""
        found = self.device.driver.elapsed(*self.events)
        for event in self.events:
            self.device.driver.drop(event)
        return found
