"""NVIDIA's run time, found and loaded; the few functions of it that are called directly; which machine code a device runs.

Nothing here is loaded before a network for a GPU is. ``libtvm_runtime_cuda.so`` lies beside TVM's runtime library and needs
``libcudart.so.13`` (of an installed toolkit, or of the ``nvidia-cuda-runtime`` wheel, which is loaded first) and the driver's
``libcuda.so.1``.
"""

import ctypes
import functools
import importlib.util
import os
import pathlib
import re
import threading

from bnntvm import runtime
from bnntvm.errors import BnnError, TargetError

_RUNTIME, _DRIVER, _PLUGIN = "libcudart.so.13", "libcuda.so.1", "libtvm_runtime_cuda.so"
_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3  # cudaMemcpyKind
_MAJOR, _MINOR, _CACHE = 75, 76, 38  # cudaDevAttrComputeCapabilityMajor, Minor, L2CacheSize
_NON_BLOCKING, _NO_TIMING, _THREAD_LOCAL = 1, 2, 1  # flags of streams and events, capture mode

_lock = threading.Lock()
_driver = None


def load():
    """The :class:`Driver`, with TVM's run time for GPUs loaded.

    Raises
    ------
    TargetError
        If this machine has no driver, no device, or lacks a library.
    """
    global _driver
    if _driver is None:
        with _lock:
            if _driver is None:
                _driver = _load()
    return _driver


def _load():
    try:
        ctypes.CDLL(_DRIVER, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise TargetError(
            "this machine has no NVIDIA driver", why=str(error),
            hint='run the network on a machine with a GPU, or build it with target="x86"',
        ) from error  # fmt: skip
    library = _open_runtime()
    driver = Driver(library)
    if driver.count() == 0:
        raise TargetError(
            "this machine has no GPU that CUDA can use", why=driver.why_none(),
            hint="`nvidia-smi` shows what the driver sees; CUDA_VISIBLE_DEVICES may hide devices",
        )  # fmt: skip
    runtime.ffi()
    folder = pathlib.Path(runtime.runtime_library()).parent
    try:
        ctypes.CDLL(str(folder / _PLUGIN), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise BnnError(
            "TVM's run time for GPUs could not be loaded", where=str(folder / _PLUGIN), why=str(error),
            hint="install the version of apache-tvm that bnntvm asks for",
        ) from error  # fmt: skip
    return driver


def _open_runtime():
    """libcudart: as the dynamic linker finds it (or has loaded it), else from NVIDIA's wheel or a toolkit."""
    tried = []
    for path in [_RUNTIME, *_runtime_paths()]:
        try:
            return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            tried.append(str(error))
    raise TargetError(
        "CUDA's runtime library is missing", where=_RUNTIME, why=tried[0],
        hint="pip install 'bnntvm[cuda]', or install NVIDIA's CUDA toolkit 13",
    )  # fmt: skip


def _runtime_paths():
    spec = importlib.util.find_spec("nvidia")
    roots = [pathlib.Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    found = [path for root in roots for path in sorted(root.glob(f"*/lib/{_RUNTIME}"))]
    toolkits = dict.fromkeys([os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda", "/usr/local/cuda-13.0"])
    return found + [pathlib.Path(root, folder, _RUNTIME) for root in toolkits for folder in ("lib64", "lib", "targets/x86_64-linux/lib")]


class Driver:
    """Functions of libcudart; every failure is a BnnError with its name."""

    def __init__(self, library):
        self._library = library
        library.cudaGetErrorName.restype = library.cudaGetErrorString.restype = ctypes.c_char_p

    def _call(self, name, *args):
        status = getattr(self._library, name)(*args)
        if status:
            self._library.cudaGetLastError()  # or the next call would report it again
            raise BnnError(f"{name} failed", why=self._text(status), hint=_hint(name, status))

    def _text(self, status):
        return f"{self._library.cudaGetErrorName(status).decode()}: {self._library.cudaGetErrorString(status).decode()}"

    # Devices

    def count(self):
        """Number of devices; 0 where there is none or the driver says no."""
        number = ctypes.c_int()
        self._status = self._library.cudaGetDeviceCount(ctypes.byref(number))
        return 0 if self._status else number.value

    def why_none(self):
        """What the driver said when it was asked for devices."""
        return self._text(self._status) if self._status else "it counts 0 devices"

    def version(self):
        """The newest CUDA version that the driver serves, 13000 for 13.0."""
        number = ctypes.c_int()
        self._call("cudaDriverGetVersion", ctypes.byref(number))
        return number.value

    @functools.lru_cache(maxsize=64)  # noqa: B019  (there is one driver)
    def capability(self, device):
        """Compute capability of a device: (9, 0)."""
        return self._attribute(_MAJOR, device), self._attribute(_MINOR, device)

    def _attribute(self, number, device):
        value = ctypes.c_int()
        self._call("cudaDeviceGetAttribute", ctypes.byref(value), number, device)
        return value.value

    def name(self, device):
        """What the driver calls a device, such as "NVIDIA H200"."""
        driver, handle, text = ctypes.CDLL(_DRIVER), ctypes.c_int(), ctypes.create_string_buffer(256)
        if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), device) or driver.cuDeviceGetName(text, len(text), handle):
            raise BnnError("the NVIDIA driver does not say what the device is", where=f"device {device}")
        return text.value.decode(errors="replace")

    def cache_bytes(self, device):
        """Size of a device's second-level cache."""
        return self._attribute(_CACHE, device)

    def use(self, device):
        """Make a device the calling thread's."""
        self._call("cudaSetDevice", device)

    # Streams and copies

    def stream(self):
        """A new stream that does not wait for the default one."""
        handle = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(handle), _NON_BLOCKING)
        return handle.value

    def synchronize(self, stream):
        """Wait until all work of a stream is done."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def synchronize_device(self):
        """Wait until all work of all streams is done."""
        self._call("cudaDeviceSynchronize")

    def wait(self, waiting, other):
        """Let a stream wait for what another one has been given so far."""
        event = ctypes.c_void_p()
        self._call("cudaEventCreateWithFlags", ctypes.byref(event), _NO_TIMING)
        try:
            self._call("cudaEventRecord", event, ctypes.c_void_p(other))
            self._call("cudaStreamWaitEvent", ctypes.c_void_p(waiting), event, 0)
        finally:
            self._library.cudaEventDestroy(event)

    def mark(self, stream):
        """An event behind all work that a stream has been given so far; see :meth:`passed`."""
        event = ctypes.c_void_p()
        self._call("cudaEventCreateWithFlags", ctypes.byref(event), _NO_TIMING)
        self._call("cudaEventRecord", event, ctypes.c_void_p(stream))
        return event.value

    def passed(self, event):
        """Whether the work before an event is done; the event is gone then."""
        if self._library.cudaEventQuery(ctypes.c_void_p(event)):
            self._library.cudaGetLastError()
            return False
        self._library.cudaEventDestroy(ctypes.c_void_p(event))
        return True

    def event(self):
        """An event that takes the time."""
        event = ctypes.c_void_p()
        self._call("cudaEventCreate", ctypes.byref(event))
        return event.value

    def reached(self, event, stream):
        """Let an event take the time when a stream has done what it was given so far."""
        self._call("cudaEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def elapsed(self, first, second):
        """Milliseconds from one event to another, which is waited for."""
        found = ctypes.c_float()
        self._call("cudaEventSynchronize", ctypes.c_void_p(second))
        self._call("cudaEventElapsedTime", ctypes.byref(found), ctypes.c_void_p(first), ctypes.c_void_p(second))
        return found.value

    def drop(self, event):
        """Free an event."""
        self._library.cudaEventDestroy(ctypes.c_void_p(event))

    def upload(self, target, source, size, stream):
        """Copy host memory to the device; addresses and bytes."""
        self._copy(target, source, size, _TO_DEVICE, stream)

    def download(self, target, source, size, stream):
        """Copy from the device to host memory."""
        self._copy(target, source, size, _TO_HOST, stream)

    def copy(self, target, source, size, stream):
        """Copy within the device."""
        self._copy(target, source, size, _ON_DEVICE, stream)

    def _copy(self, target, source, size, kind, stream):
        if size:
            args = ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size), kind, ctypes.c_void_p(stream)
            self._call("cudaMemcpyAsync", *args)

    def clear(self, target, size, stream):
        """Set bytes on the device to 0."""
        self.fill(target, 0, size, stream)

    def fill(self, target, value, size, stream):
        """Set bytes on the device to a value."""
        self._call("cudaMemsetAsync", ctypes.c_void_p(target), value, ctypes.c_size_t(size), ctypes.c_void_p(stream))

    # Graphs

    def record(self, work, stream):
        """What ``work()`` gives the stream, as a graph that :meth:`launch` starts; nothing of it runs now."""
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cudaStreamBeginCapture", ctypes.c_void_p(stream), _THREAD_LOCAL)
        try:
            work()
        except BaseException:
            self._library.cudaStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph))
            self._library.cudaGetLastError()
            raise
        self._call("cudaStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        try:
            self._call("cudaGraphInstantiate", ctypes.byref(ready), graph, ctypes.c_ulonglong(0))
        finally:
            self._library.cudaGraphDestroy(graph)
        return ready.value

    def launch(self, graph, stream):
        """Start a recorded graph."""
        self._call("cudaGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def forget(self, graph):
        """Free a recorded graph."""
        self._library.cudaGraphExecDestroy(ctypes.c_void_p(graph))


def _hint(name, status):
    if status == 2:
        return "the device's memory is full: give a smaller batch, or end what else uses the device"
    return "a smaller batch needs less memory" if name == "cudaMalloc" else None


def check_device(target, where):
    """Refuse a network that this machine's first device cannot run.

    Parameters
    ----------
    target : dict
        The manifest's, with ``arch`` and ``least_driver``.
    where : str
        For the message.

    Raises
    ------
    TargetError
    """
    driver, arch = load(), str(target["arch"])
    have = driver.capability(0)
    if not runs(arch, have):
        raise TargetError(
            f"built for {arch}, this machine's GPU is sm_{have[0]}{have[1]}", where=where, why=_why(arch),
            hint=f'build it again with target="{"sm_90a" if have == (9, 0) else f"sm_{have[0]}{have[1]}"}"',
        )  # fmt: skip
    version, least = driver.version(), int(target.get("least_driver", 0))
    if version < least:
        raise TargetError(
            f"the NVIDIA driver serves CUDA {_dotted(version)}, the network needs {_dotted(least)}",
            where=where,
            hint="install a newer driver",
        )


def runs(arch, capability):
    """Whether a device of a compute capability runs machine code for ``arch``: within a major version what is newer runs older code; code
    for an architecture-specific target (``sm_90a``) runs on that one alone."""
    found = re.fullmatch(r"sm_(\d+)(\d)([af]?)", arch)
    if not found:
        return False
    major, minor = int(found[1]), int(found[2])
    return major == capability[0] and (capability[1] == minor if found[3] == "a" else capability[1] >= minor)


def _why(arch):
    return "it uses instructions that only this architecture has" if arch.endswith("a") else "machine code runs within one major version"


def _dotted(version):
    return f"{version // 1000}.{version % 1000 // 10}"
