"""A GPU that is not there: TVM's own run time for GPUs on a driver of ours (``fake_cuda.c``), kernels run by the emulator.

To be used in a process of its own: it makes the driver's library one that the whole process finds. What it proves: how a network is loaded,
which kernels are started in which order with which parameters, what is recorded as a graph and replayed, what is copied and when.
"""

import ctypes
import pathlib
import re
import struct
import subprocess
import tempfile

import numpy as np

from bnntvm.cuda import toolchain

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p
)
_GRAPHS = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_BEGIN, _END, _INSTANTIATE, _START, _DESTROY = range(5)


class Fake:
    """The device.

    Attributes
    ----------
    launched : list of str
        Names of kernels that ran.
    recorded, replayed : int
        Graphs that were made, and started.
    """

    def __init__(self):
        with tempfile.TemporaryDirectory(prefix="bnntvm-fake-") as folder:  # what is loaded needs no file any more
            self.libraries = [_compile(pathlib.Path(folder), *one) for one in (("libcuda.so.1", "-DDRIVER"), ("libcudart.so.13",))]
        self._launch, self._graph = _LAUNCH(self._launched), _GRAPHS(self._graph_call)
        self.libraries[0].set_launch(self._launch)
        self.libraries[1].set_graphs(self._graph)
        self.sources, self.expected, self.places, self.partial = {}, [], {}, {}
        self.recording, self.graphs, self.numbers = {}, {}, 0
        self.launched, self.recorded, self.replayed, self.error = [], 0, 0, None

    def expect(self, network, calls):
        """Which kernels of a :class:`tests.cuda.network.Network` will be called: its ``calls``."""
        self.network, self.expected, self.places = network, calls, {}

    def _launched(self, name, params, grid, block, shared, stream):
        try:
            return self._start(name.decode(), params, stream)
        except BaseException as error:  # noqa: BLE001  (it may not leave a function that C calls)
            self.error = error
            return 1

    def _start(self, name, params, stream):
        place = self.places.get(stream, 0)  # every machine has a stream of its own
        kernel, shapes = self.expected[place % len(self.expected)][:2]
        assert name.startswith(f"{kernel}_kernel"), f"{name} was started instead of {kernel}"
        started, addresses = self.partial.pop(stream, (0, {}))  # of a function that starts several kernels, each with parameters of its own
        addresses = addresses | self._addresses(name, params)
        if started + 1 < self.network.launches(kernel, shapes):
            self.partial[stream] = started + 1, addresses
            return 0
        self.places[stream] = place + 1
        arrays = arrays_of(self.network.kernels[kernel], addresses, shapes)

        def work():
            self.launched.append(kernel)
            self.network.execute(kernel, arrays)

        if stream in self.recording:
            self.recording[stream].append(work)
        else:
            work()
        return 0

    def _addresses(self, name, params):
        """Parameter's name -> address, for those that are pointers."""
        names = toolchain_parameters(self.sources, name)
        return {n: ctypes.cast(params[i], ctypes.POINTER(ctypes.c_uint64))[0] for i, (n, pointer) in enumerate(names) if pointer}

    def _graph_call(self, operation, first, second):
        if operation == _BEGIN:
            self.recording[first] = []
        elif operation == _END:
            self.numbers += 1
            self.graphs[self.numbers] = self.recording.pop(first)
            return self.numbers
        elif operation == _INSTANTIATE:
            self.recorded += 1
            return first
        elif operation == _START:
            self.replayed += 1
            for work in self.graphs[first]:
                work()
        elif operation == _DESTROY:
            self.graphs.pop(first)
        return 0

    def check(self):
        """Raise what went wrong in a kernel."""
        if self.error is not None:
            raise self.error

    def compile_source(self, code, arch):
        """In the place of :func:`bnntvm.cuda.toolchain.compile_source`: no machine code, but the source is remembered."""
        self.sources |= parameters_of(code)
        return toolchain.Compiled(arch, b"\x7fELF" + struct.pack("<I", len(code)) + bytes(64), {}, "none")


def parameters_of(code):
    """Kernel -> its parameters as CUDA C++ declares them."""
    return {entry[1]: entry[2] for entry in re.finditer(r"__global__ void [^(]*\([0-9, ]+\) (\w+)\(([^)]*)\) \{", code)}


def toolchain_parameters(sources, name):
    """``(name, whether it is a pointer)`` of a kernel's parameters."""
    found = []
    for text in sources[name].split(","):
        identifier = re.search(r"(\w+)$", text.strip())[1]
        found.append((identifier.removesuffix("_ptr"), "*" in text))
    return found


def _identifier(name):
    return re.sub(r"\W", "_", name)


def _buffers(function):
    mapped = getattr(function, "buffer_map", None)
    return [mapped[p] for p in function.params] if mapped else list(function.params)


def arrays_of(function, addresses, shapes):
    """The parameters of a function by their names' addresses; but for a workspace, which not every kernel uses."""
    from bnntvm.schedules.cuda import simt

    buffers, found = _buffers(function), []
    for number, (buffer, (shape, dtype)) in enumerate(zip(buffers, shapes, strict=True)):
        name = _identifier(buffer.name)
        unused = number == len(buffers) - 1 and simt.workspace(function) and name not in addresses
        found.append(np.full(shape, 77, dtype) if unused else _array(addresses[name], shape, dtype))
    return found


def _array(address, shape, dtype):
    """The host's memory at an address as an array."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


def _compile(folder, name, *options):
    source, path = pathlib.Path(__file__).with_name("fake_cuda.c"), folder / name
    script = folder / "versions"
    script.write_text("libcudart.so.13 { global: *; };\n" if "cudart" in name else "")
    versions = [f"-Wl,--version-script={script}"] if "cudart" in name else []
    command = ["cc", "-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{name}", *versions, *options, "-o", str(path), str(source)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
