"""What measurements on a GPU need of it: tensors, kernels of a library, machine code of our own, clocks. No compiler, no TVM package."""

from __future__ import annotations

import ctypes
import os
import pathlib
import shutil
import statistics
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent


def set_up(folder):
    """Make ``bnntvm`` and TVM's run time importable from a checkout and a prepared folder, where nothing is installed."""
    import bnntvm

    if str(ROOT) not in bnntvm.__path__:
        bnntvm.__path__.append(str(ROOT))  # passes, schedules and targets stand at the top
    site, libraries = pathlib.Path(folder, "site"), pathlib.Path(folder, "lib")
    if site.is_dir():
        sys.path.insert(0, str(site))
    if libraries.is_dir():
        os.environ["TVM_LIBRARY_PATH"] = str(libraries)


class Device:
    """The first device: everything goes through one stream."""

    def __init__(self):
        from bnntvm import runtime
        from bnntvm.cuda import driver, tensor

        self.driver, self.ffi = driver.load(), runtime.ffi()
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
        found = ctypes.c_float()
        self.driver._call("cudaEventSynchronize", second)
        self.driver._call("cudaEventElapsedTime", ctypes.byref(found), first, second)
        return found.value

    def milliseconds(self, work, count=10, repeat=7):
        """Median time of ``work()``, recorded ``count`` times as one graph; the first launches are not counted."""
        work()
        self.driver.synchronize(self.stream)
        graph = self.driver.record(lambda: [work() for _ in range(count)], self.stream)
        times = []
        try:
            for number in range(repeat + 2):
                with Stopwatch(self) as watch:
                    self.driver.launch(graph, self.stream)
                times += [watch.milliseconds / count] if number > 1 else []
        finally:
            self.driver.forget(graph)
        return statistics.median(times)


class Stopwatch:
    """Time between two events of the stream."""

    def __init__(self, device):
        self.device, self.library = device, device.driver._library
        self.events = []
        for _ in range(2):
            event = ctypes.c_void_p()
            device.driver._call("cudaEventCreate", ctypes.byref(event))
            self.events.append(event)

    def __enter__(self):
        self.device.driver._call("cudaEventRecord", self.events[0], ctypes.c_void_p(self.device.stream))
        return self

    def __exit__(self, *_):
        driver, elapsed = self.device.driver, ctypes.c_float()
        driver._call("cudaEventRecord", self.events[1], ctypes.c_void_p(self.device.stream))
        driver._call("cudaEventSynchronize", self.events[1])
        driver._call("cudaEventElapsedTime", ctypes.byref(elapsed), *self.events)
        self.milliseconds = elapsed.value
        for event in self.events:
            self.library.cudaEventDestroy(event)


class MachineCode:
    """Kernels of a cubin, started through the driver."""

    def __init__(self, device, path):
        self.device, self.library = device, ctypes.CDLL("libcuda.so.1")
        self.image, self.module = pathlib.Path(path).read_bytes(), ctypes.c_void_p()
        self._check(self.library.cuModuleLoadData(ctypes.byref(self.module), self.image))

    def _check(self, status):
        if status:
            text = ctypes.c_char_p()
            self.library.cuGetErrorName(status, ctypes.byref(text))
            raise RuntimeError(f"the driver says {text.value and text.value.decode()}")

    def start(self, name, grid, block, *pointers):
        """Start a kernel whose parameters are all pointers or 64-bit numbers."""
        function = ctypes.c_void_p()
        self._check(self.library.cuModuleGetFunction(ctypes.byref(function), self.module, name.encode()))
        values = [ctypes.c_uint64(p) for p in pointers]
        params = (ctypes.c_void_p * len(values))(*(ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in values))
        stream = ctypes.c_void_p(self.device.stream)
        self._check(self.library.cuLaunchKernel(function, grid, 1, 1, block, 1, 1, 0, stream, params, None))


def facts():
    """What the driver says of the device."""
    keys = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu,memory.total"
    if shutil.which("nvidia-smi") is None:
        return {}
    done = subprocess.run(["nvidia-smi", f"--query-gpu={keys}", "--format=csv,noheader"], capture_output=True, text=True)
    values = [value.strip() for value in done.stdout.strip().splitlines()[0].split(",")] if done.stdout.strip() else []
    return dict(zip((key.replace(".", "_") for key in keys.split(",")), values))
