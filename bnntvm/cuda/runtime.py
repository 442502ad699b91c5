"""Runs a network on a GPU: TVM's small run time and nothing of its compiler.

The network writes into memory that it is given (:mod:`bnntvm.cuda.plan`), so the second run with the same addresses is recorded as a CUDA
graph, and later ones start that with a single call. Inputs that come from the host have an address of their own in each machine; those on
the device are read where they are, and each address that comes again gets a graph of its own.

A machine has a stream; several machines (one for each thread that runs a network) share the device.
"""

import collections
import math

import numpy as np

from bnntvm import runtime
from bnntvm.cuda import driver as drivers
from bnntvm.cuda.tensor import CUDA, Blocks, borrow, empty
from bnntvm.errors import BnnError

_CPU, _POOLED = 1, 2  # DLDevice type and TVM's allocator type
#: Bytes to which the address of an input is a multiple where kernels read it in place.
ALIGNMENT = 16


class DeviceLibrary(runtime.Library):
    """A network's library, for the machines of one device.

    Parameters
    ----------
    path : str
    facts : dict
        The manifest's ``device``: ``storages``, ``results``, ``recordable``; ``[a, b]`` stands for a * n + b, where n is the batch.
    """

    def __init__(self, path, facts, device=0):
        self.driver, self.device, self.facts = drivers.load(), device, facts
        super().__init__(path)

    def machine(self, instrument=None):
        vm = self._open()
        if instrument is not None:
            vm["set_instrument"](instrument)
        return DeviceMachine(vm, self)


class DeviceMachine:
    """One virtual machine on the device; it serves one caller at a time."""

    MAX_SHAPES = 8  #: shapes whose memory and graphs are kept
    MAX_GRAPHS = 8  #: graphs of one shape, each for other addresses

    def __init__(self, vm, library):
        self.library, self.driver, self.device = library, library.driver, library.device
        self.driver.use(self.device)
        vm["vm_initialization"](CUDA, self.device, _POOLED, _CPU, 0, _POOLED)
        self._main, self._check = vm["main"], library._is_finite
        self.stream = self.driver.stream()
        self._place = runtime.ffi().device("cuda", self.device)
        self._storages, self._shapes, self._free = [], {}, Blocks(self.driver, self.device, self.stream)
        self._flag = empty((1,), "int32", self.device)
        self._flagged = np.zeros(1, np.int32)
        self.driver.clear(self._flag.data_ptr(), 4, self.stream)
        self._lent = collections.deque()  # (event behind a run, its inputs), of runs that only were started
        self.not_recorded = None  # why runs are not recorded as graphs, if they are not

    def run(self, inputs, batch, check, to_host):
        """Run the network.

        Parameters
        ----------
        inputs : list of numpy.ndarray or device arrays
            Of declared shapes and of the types that kernels take.
        batch : int
        check : tuple of int
            Inputs to check for NaN and infinity.
        to_host : bool
            Whether results are wanted as numpy arrays.

        Returns
        -------
        list of numpy.ndarray or DeviceArray, or None where an input is not finite
        """
        self.driver.use(self.device)
        self._let_go()
        shapes = tuple([tuple(array.shape) for array in inputs])
        place = self._shapes.get(shapes)
        if place is None:
            place = self._arrange(shapes, batch)
        tensors = [place.input(i, array) for i, array in enumerate(inputs)]
        place.start(tensors, check)
        results = [self._result(one, to_host) for one in place.outputs]
        if check:
            self.driver.download(self._flagged.ctypes.data, self._flag.data_ptr(), 4, self.stream)
        if check or to_host:
            self.driver.synchronize(self.stream)
        else:
            self._lent.append((self.driver.mark(self.stream), tensors))
        if check and self._flagged[0]:
            self.driver.clear(self._flag.data_ptr(), 4, self.stream)
            return None
        return results

    def _let_go(self):
        """Drop inputs whose runs are over: until then nobody else may be given their memory."""
        while self._lent and self.driver.passed(self._lent[0][0]):
            self._lent.popleft()

    def _result(self, output, to_host):
        size = output.nbytes
        if to_host:
            array = np.empty(output.shape, output.dtype)
            self.driver.download(array.ctypes.data, output.tensor.data_ptr(), size, self.stream)
            return array
        array = self._free.array(output.shape, output.dtype)
        self.driver.copy(array.data_ptr(), output.tensor.data_ptr(), size, self.stream)
        return array

    def _arrange(self, shapes, batch):
        """Memory for inputs of these shapes."""
        if len(self._shapes) >= self.MAX_SHAPES:
            self._forget_all()
        needed = [max(_at(one, batch) for one in storage) for storage in self.library.facts["storages"]]
        if any(need > have for need, (_, have) in zip(needed, self._storages or [(None, 0)] * len(needed))):
            self._forget_all()  # their graphs name the old storages
            self.driver.synchronize(self.stream)
            sizes_before = [have for _, have in self._storages] or [0] * len(needed)
            self._storages = []
            grown = [max(pair) for pair in zip(needed, sizes_before)]
            self._storages = [(empty((max(size, 1),), "uint8", self.device), size) for size in grown]
        results = self.library.facts["results"]
        outputs = [_Output([_at(extent, batch) for extent in shape], dtype, self.device) for shape, dtype in results]
        self._shapes[shapes] = _Place(self, outputs)
        return self._shapes[shapes]

    def _forget_all(self):
        for place in self._shapes.values():
            place.forget()
        self._shapes.clear()

    def __del__(self):
        try:
            self._forget_all()
        except Exception:  # noqa: BLE001  (the process may be on its way out)
            pass


def _at(linear, batch):
    """A number of the manifest for a batch."""
    per_image, fixed = linear
    return per_image * batch + fixed


class _Output:
    """A result that graphs write."""

    def __init__(self, shape, dtype, device):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.tensor = empty(self.shape, self.dtype, device)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize


class _Place:
    """What a machine keeps for one shape of inputs: copies of inputs, results, and graphs by the addresses of inputs."""

    def __init__(self, machine, outputs):
        self.machine, self.outputs = machine, outputs
        self.copies, self.graphs, self.seen = {}, {}, set()

    def input(self, index, array):
        """The tensor that kernels read for input ``index``."""
        machine = self.machine
        if isinstance(array, np.ndarray):
            copy = self._copy(index, array.shape, array.dtype)
            machine.driver.upload(copy.data_ptr(), array.ctypes.data, array.nbytes, machine.stream)
            return copy
        tensor = borrow(array, machine.stream)
        if tensor.data_ptr() % ALIGNMENT == 0:
            return tensor
        dtype = np.dtype(str(tensor.dtype))
        copy = self._copy(index, tuple(tensor.shape), dtype)
        machine.driver.copy(copy.data_ptr(), tensor.data_ptr(), math.prod(tensor.shape) * dtype.itemsize, machine.stream)
        return copy

    def _copy(self, index, shape, dtype):
        if index not in self.copies:
            self.copies[index] = empty(shape, dtype, self.machine.device)
        return self.copies[index]

    def start(self, inputs, check):
        """Give the stream a run: a graph where these addresses were met before, else kernel by kernel."""
        machine = self.machine
        key = (*(tensor.data_ptr() for tensor in inputs), check)
        graph = self.graphs.get(key)
        if graph is None and key in self.seen and machine.not_recorded is None:
            graph = self._record(key, inputs, check)
        if graph is not None:
            machine.driver.launch(graph, machine.stream)
            return
        self._work(inputs, check)
        if len(self.seen) > 64:
            self.seen.clear()
        if machine.library.facts["recordable"]:
            self.seen.add(key)

    def _record(self, key, inputs, check):
        machine = self.machine
        if len(self.graphs) >= machine.MAX_GRAPHS:
            self.forget()
        try:
            graph = self.graphs[key] = machine.driver.record(lambda: self._work(inputs, check), machine.stream)
        except Exception as error:  # noqa: BLE001  (the run itself goes on without a graph)
            machine.not_recorded = f"{type(error).__name__}: {error}"
            return None
        return graph

    def _work(self, inputs, check):
        """The kernels of one run."""
        machine = self.machine
        with runtime.ffi().use_raw_stream(machine._place, machine.stream):
            for index in check:
                machine._check(_flat(inputs[index]), machine._flag)
            machine._main(*inputs, *(one.tensor for one in self.outputs), *(tensor for tensor, _ in machine._storages))

    def forget(self):
        """Free the graphs."""
        if self.graphs:
            self.machine.driver.synchronize(self.machine.stream)
        for graph in self.graphs.values():
            self.machine.driver.forget(graph)
        self.graphs.clear()


def _flat(tensor):
    """A tensor of TVM's as one row."""
    ffi = runtime.ffi()
    view = ffi.get_global_func("runtime.TVMTensorCreateView")
    return view(tensor, ffi.Shape([math.prod(tensor.shape)]), tensor.dtype, 0)


def refuse_other_devices(value, name, device):
    """Raise an error for an array on another device than the network's."""
    index = int(value.__dlpack_device__()[1])
    if index != device:
        raise BnnError(f"input {name!r} is on cuda:{index}, the network runs on cuda:{device}", hint="copy it there first")
