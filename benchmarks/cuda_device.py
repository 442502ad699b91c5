"""What measurements on a GPU need beside :mod:`bnntvm.cuda.device`: machine code of our own, facts. No compiler, no TVM package."""

from __future__ import annotations

import ctypes
import os
import pathlib
import shutil
import subprocess
import sys

from bnntvm.cuda.device import Device, Stopwatch

__all__ = ["ROOT", "Device", "MachineCode", "Stopwatch", "facts", "set_up"]
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
