"""Runs a compiled library: TVM's small runtime library and nothing of its compiler.

``import tvm`` maps the 260 MB compiler. A process that only runs a network needs three things instead: the ``tvm_ffi`` package, the 3 MB
``libtvm_runtime.so`` that lies in the ``tvm`` package, and the network's own library. This file loads exactly these, unless ``tvm`` has
been imported already, in which case both share the same libraries.

Threads
-------
TVM keeps one pool of worker threads per *calling* thread. A pool's size is fixed when it is made, and its threads do not survive a fork.
:func:`call_with_threads` configures the calling thread's pool and, where that pool cannot serve (too small, or made before a fork), runs
the call on a helper thread whose own pool can.
"""

import concurrent.futures
import ctypes
import importlib.util
import os
import pathlib
import sys
import threading

import numpy as np

from bnntvm import huge_pages
from bnntvm.errors import BnnError

_CPU, _POOLED = 1, 2  # DLDevice type and TVM's allocator type
NOT_FINITE = "an input is not finite"  #: what entry points that check their inputs say
ALIGNMENT = 64  #: bytes; what compiled kernels may assume of every buffer
_THREADS_VARIABLE = "BNNTVM_NUM_THREADS"

_lock = threading.Lock()
_ffi = None
_set_max_concurrency = None


def ffi():
    """The ``tvm_ffi`` package, with TVM's runtime library loaded. Cheap after the first call."""
    global _ffi
    if _ffi is None:
        with _lock:
            if _ffi is None:
                _ffi = _load()
    return _ffi


def _load():
    # TVM would pin its workers, and the caller, to cores of its own choice, whatever the process's affinity is.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    # Workers spin between two kernels; the default keeps them spinning for a tenth of a second after the last one.
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "20000")
    package = import_tvm_ffi()
    library = ctypes.CDLL(str(runtime_library()), mode=ctypes.RTLD_GLOBAL)
    global _set_max_concurrency
    _set_max_concurrency = getattr(library, "_ZN3tvm7runtime9threading17SetMaxConcurrencyEi", None)
    return package


def import_tvm_ffi():
    """Import ``tvm_ffi`` without PyTorch: it imports torch when it finds it, which costs seconds and hundreds of megabytes."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None
    try:
        import tvm_ffi
    finally:
        if hide:
            del sys.modules["torch"]
    return tvm_ffi


def runtime_library():
    spec = importlib.util.find_spec("tvm")
    folders = [pathlib.Path(p) / "lib" for p in (spec.submodule_search_locations if spec else [])]
    if os.environ.get("TVM_LIBRARY_PATH"):
        folders.insert(0, pathlib.Path(os.environ["TVM_LIBRARY_PATH"]))
    for folder in folders:
        path = folder / ("libtvm_runtime.dylib" if sys.platform == "darwin" else "libtvm_runtime.so")
        if path.exists():
            return path
    raise BnnError(
        "TVM's runtime library is not installed",
        where=", ".join(map(str, folders)) or "no package called tvm",
        hint="pip install apache-tvm, at the version that bnntvm asks for",
    )


# ---------------------------------------------------------------------------------------------------------------- threads


def usable_cpus():
    """CPUs that this process may run on: the affinity mask, less what a container's quota leaves of it."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return max(1, min(len(cpus), _quota()))


def _quota():
    try:
        quota, period = pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no cgroup v2 here, or "max"
        return sys.maxsize


def _usable_cores():
    """As :func:`usable_cpus`, with two hardware threads of one core counted once."""
    cores = set()
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1):
        try:
            cores.add(pathlib.Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(cpu)
    return max(1, min(len(cores), _quota()))


def choose_threads(threads=None):
    """Number of threads to run on: ``threads``, else ``BNNTVM_NUM_THREADS``, else one per core; never more than the usable CPUs.

    Raises
    ------
    BnnError
        If the number is not a positive integer.
    """
    where = "threads="
    if threads is None:
        text = os.environ.get(_THREADS_VARIABLE, "").strip()
        if not text:
            return _usable_cores()
        where = f"environment variable {_THREADS_VARIABLE}"
        threads = int(text) if text.isdecimal() else text
    if isinstance(threads, bool) or not hasattr(threads, "__index__") or threads < 1:
        raise BnnError(f"not a number of threads: {threads!r}", where=where, hint="give an integer of 1 or more")
    return min(int(threads), usable_cpus())


class _Lane(threading.local):
    """What one calling thread knows about its TVM thread pool."""

    pid = None  # process in which the settings below were made; a fork unsets ``threads`` as well
    threads = None  # threads in force
    has_pool = False
    helper = None  # executor whose one thread has a pool of its own
    helper_threads = None


_lane = _Lane()


def threads_in_force():
    """The number of threads that the calling thread's parallel loops run on; None if that is not settled."""
    return _lane.threads


def _after_fork():
    _lane.threads = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def call_with_threads(function, args, threads):
    """``function(*args)`` with TVM's parallel loops on ``threads`` threads of the calling thread's pool."""
    if _lane.threads == threads or _configure(threads):
        return function(*args)
    if _lane.helper is None or _lane.helper_threads != threads:
        _lane.helper = concurrent.futures.ThreadPoolExecutor(1, "bnntvm")
        _lane.helper_threads = threads
    return _lane.helper.submit(call_with_threads, function, args, threads).result()


def _configure(threads):
    """Give the calling thread's pool ``threads`` threads; False if that pool cannot have them."""
    pid, lane = os.getpid(), _lane
    forked = lane.pid is not None and lane.pid != pid
    if forked:
        lane.helper, lane.threads = None, None  # its thread stayed in the parent process
    if threads == 1 and _set_max_concurrency is not None:
        _set_max_concurrency(1)  # parallel loops run inline, no pool is made
    elif forked and lane.has_pool:
        return False
    else:
        # The list of CPUs only sets the size of a pool that does not exist yet: with TVM_BIND_THREADS=0 nothing is bound.
        ffi().get_global_func("runtime.config_threadpool")(1, threads, ["0"] * threads)
        lane.has_pool = True
        if ffi().get_global_func("runtime.NumThreads")() != threads:
            return False
    lane.threads = threads
    lane.pid = pid
    return True


# ---------------------------------------------------------------------------------------------------------------- running


def aligned_empty(shape, dtype):
    """An uninitialised C-order array whose data begins at a multiple of 64 bytes."""
    dtype = np.dtype(dtype)
    size = dtype.itemsize
    for dim in shape:
        size *= dim
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


class Library:
    """A compiled network, loaded: code and constants, shared by every machine that runs it.

    Parameters
    ----------
    path : str
        Shared library of a Relax VM executable; what follows its ELF contents in the file is ignored. It has an entry point ``main`` and
        may have ``main_1``, the same for inputs whose dynamic dimensions are all 1, with its memory planned at compile time;
        ``main_checked`` and ``main_checked_1`` do the same and raise an error for NaN and infinity in some inputs.
    direct : dict, optional
        What the manifest says of direct functions (:class:`bnntvm.direct.Direct`), which run instead of entry points that have one.

    Notes
    -----
    Loading runs the library's initialisers, i.e. native code of whoever made the file.
    """

    def __init__(self, path, direct=None):
        load = ffi().get_global_func("ffi.Module.load_from_file.so")
        huge_pages.gather()
        huge_pages.trim()  # free memory that the library would lie in comes into use anew, and is seen to
        self._memory = huge_pages.Watch()
        self._module = load(path, "so")
        self._open = self._module["vm_load_executable"]  # AttributeError where the library is somebody else's
        try:
            self._is_finite = self._module.get_function("bnn_is_finite", query_imports=True)
        except AttributeError:  # a library without it
            self._is_finite = None
        self._clear_pool = ffi().get_global_func("vm.builtin.memory_manager.clear")
        self._item = ffi().get_global_func("ffi.ArrayGetItem")  # without the checks of Array.__getitem__
        self._direct = _Direct(self._module, direct) if direct and direct["entries"] else None
        huge_pages.trim()
        self._memory.collapse()

    def machine(self, instrument=None):
        """A new virtual machine: it has registers of its own, constants and code are shared.

        Parameters
        ----------
        instrument : tvm_ffi.Function, optional
            Called before and after everything that the machine calls, see ``bnntvm/profiling/probe.c``. Such a machine has no direct
            functions.
        """
        vm = self._open()
        if instrument is not None:
            vm["set_instrument"](instrument)
        vm["vm_initialization"](_CPU, 0, _POOLED)
        direct = self._direct.functions(vm, self._item) if self._direct and instrument is None else {}
        names = [["main", "main_1"], ["main_checked", "main_checked_1"]]
        entries = [[direct.get(name) or _virtual(vm, name, self._item) for name in pair] for pair in names]
        return Machine(entries, self._clear_pool, self._is_finite, self._memory)


def _virtual(vm, name, item):
    """A function of the virtual machine's as one that returns numpy arrays, or None where there is none."""
    try:
        function = vm[name]
    except AttributeError:  # this is how it says that it has no such function
        return None

    def run(*arrays):
        results = function(*arrays)
        if isinstance(results, _ffi.Tensor):
            return [np.from_dlpack(results)]
        return [np.from_dlpack(item(results, i)) for i in range(len(results))]

    return run


class _Direct:
    """The direct functions of a library, see :mod:`bnntvm.direct`."""

    def __init__(self, module, facts):
        self._functions = {name: module.get_function(f"{name}_direct", query_imports=True) for name in facts["entries"]}
        self._workspace_bytes = int(facts["workspace_bytes"])
        self._outputs = [(tuple(shape), np.dtype(dtype), np.empty if free else aligned_empty) for shape, dtype, free in facts["outputs"]]
        self._constants = None  # kept: the table has their addresses

    def functions(self, vm, item):
        """Entry point to a function that takes and returns numpy arrays, with a workspace of its own."""
        with _lock:  # the first callers may be several
            if self._constants is None:
                found = vm["main_constants"]()
                tensors = [item(found, i) for i in range(len(found))]
                self._constants = tensors, _ffi.from_dlpack(np.array([tensor.data_ptr() for tensor in tensors] or [0], np.int64))
        try:
            workspace, table = _ffi.from_dlpack(aligned_empty((self._workspace_bytes,), np.uint8)), self._constants[1]
        except (MemoryError, ValueError) as error:  # ValueError: beyond what an array can be
            raise BnnError("not enough memory for the network", why=str(error), hint=f"it takes {self._workspace_bytes} bytes") from error
        return {name: self._bound(function, workspace, table) for name, function in self._functions.items()}

    def _bound(self, function, workspace, table):
        wanted = self._outputs

        def run(*arrays):
            outputs = [empty(shape, dtype) for shape, dtype, empty in wanted]
            function(workspace, table, *arrays, *outputs)
            return outputs

        return run


class Machine:
    """What runs a library's entry points; it serves one caller at a time.

    Parameters
    ----------
    entries : list of list
        For ``main`` and ``main_checked``: the function, and the one for inputs whose dynamic dimensions are all 1. They take arrays and
        return a list of numpy arrays. None where there is none.
    """

    #: Workspaces are pooled by size. When the shapes change this often, the pool is emptied, so that it cannot grow without end.
    MAX_SHAPES = 8

    def __init__(self, entries, clear_pool, is_finite=None, memory=None):
        #: Entry points by whether all dynamic dimensions are 1.
        self._main, self._checked = ((entry, one or entry) for entry, one in entries)
        self._clear_pool, self._is_finite = clear_pool, is_finite
        self._shapes = set()
        self._memory = memory  # watched since before the library was loaded: a first run's workspaces lie in what loading gave back
        self._buffers = {}

    def buffer(self, index, shape, dtype):
        """The 64-byte aligned array for input ``index``; kept while its shape stays the same."""
        array = self._buffers.get(index)
        if array is None or array.shape != shape:
            array = self._buffers[index] = aligned_empty(shape, dtype)
        return array

    def is_finite(self, array):
        """Whether a float32 array in C order certainly holds neither NaN nor infinity; False also where the library cannot tell."""
        return self._is_finite is not None and bool(self._is_finite(_ffi.from_dlpack(array.reshape(-1))))

    def run(self, arrays, threads, single=False):
        """Run ``main``, or ``main_1`` where there is one and ``single`` says that every dynamic dimension is 1.

        Parameters
        ----------
        arrays : list of numpy.ndarray
            Inputs, C order, native byte order, aligned as the kernels want them.
        threads : int
            Threads of TVM's pool.
        single : bool

        Returns
        -------
        list of numpy.ndarray
            Some may be an input, a constant, or one and the same.
        """
        shapes = tuple([array.shape for array in arrays])
        memory = None if shapes in self._shapes else self._new_shapes(shapes)
        tensors = [_ffi.from_dlpack(array) for array in arrays]
        results = call_with_threads(self._main[single], tensors, threads)
        if memory is not None:
            memory.collapse()
        return results

    def _new_shapes(self, shapes):
        """Note shapes that are run for the first time; the watch on the workspaces that they take."""
        if len(self._shapes) >= self.MAX_SHAPES:
            self._shapes.clear()
            self._clear_pool()
        self._shapes.add(shapes)
        memory, self._memory = self._memory or huge_pages.Watch(), None
        return memory

    def run_again(self, arrays, shapes, single, unchecked=None):
        """The same as :meth:`run` for arrays that the kernels take as they are, of shapes that this machine has had before, with the thread
        pool in order; written out, see ``Module._repeater``.

        Parameters
        ----------
        unchecked : tuple of int, optional
            Inputs that ``main_checked`` does not check for NaN and infinity; all of them where there is no such entry point. By default no
            input is checked.

        Returns
        -------
        list of numpy.ndarray, or None where the shapes are new or an input may not be finite
        """
        if shapes not in self._shapes:
            return None
        entry = self._main[single]
        if unchecked is not None:
            for index in unchecked:
                if not self._is_finite(arrays[index].reshape(-1)):
                    return None
            entry = self._checked[single] or entry
        try:
            return entry(*arrays)
        except ValueError as error:
            if NOT_FINITE not in str(error):
                raise
            return None
