"""An array on a device, as :meth:`bnntvm.Module.run` returns it where its inputs were on the device."""

import ctypes
import weakref

import numpy as np

from bnntvm import runtime

CUDA = 2  #: DLPack's number of the device type.
_LEGACY = 1  # DLPack's and CUDA's number of the default stream


class DeviceArray:
    """A result in device memory. ``torch.from_dlpack(array)`` and ``cupy.from_dlpack(array)`` take it without a copy; ``array.numpy()``
    copies it to the host.

    Attributes
    ----------
    shape : tuple of int
    dtype : numpy.dtype
    device : str
        "cuda:0".
    """

    def __init__(self, block, shape, dtype, stream, driver, device):
        self._block, self._stream, self._driver, self._index = block, stream, driver, device
        self.shape, self.dtype, self.device = tuple(shape), np.dtype(dtype), f"cuda:{device}"

    def __dlpack_device__(self):
        return CUDA, self._index

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        """A DLPack capsule; work that the consumer gives ``stream`` waits for the result. -1: the consumer takes care of that itself."""
        if dl_device is not None and tuple(map(int, dl_device)) != (CUDA, self._index):
            raise BufferError(f"the array is on {self.device}")
        if copy:
            raise BufferError("it is handed over as it is; copy it on the other side")
        if stream != -1:
            other = _LEGACY if stream is None else int(stream)
            self._driver.wait(other, self._stream)
            self._block.readers.add(other)
        return self._block.tensor.__dlpack__(max_version=max_version)

    def data_ptr(self):
        """Address in device memory. The result is complete when :meth:`synchronize` returns."""
        return self._block.tensor.data_ptr()

    def synchronize(self):
        """Wait until the result is there."""
        self._driver.synchronize(self._stream)

    def numpy(self):
        """A copy on the host."""
        out = np.empty(self.shape, self.dtype)
        self._driver.download(out.ctypes.data, self.data_ptr(), out.nbytes, self._stream)
        self._driver.synchronize(self._stream)
        return out

    def __array__(self, dtype=None, copy=None):
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def __len__(self):
        return self.shape[0]

    def __repr__(self):
        return f"<bnntvm array {self.dtype}{list(self.shape)} on {self.device}>"


class Block:
    """Device memory for results of one shape. ``readers``: streams of those who were given it, perhaps still at work."""

    def __init__(self, tensor):
        self.tensor, self.readers = tensor, set()

    def lent(self):
        """Whether anybody but this object holds the memory (the strong count is the first word of every object of TVM's FFI)."""
        return ctypes.c_uint32.from_address(self.tensor.__chandle__()).value > 1


class Blocks:
    """Memory for results, used again when nobody holds it any more: device memory is slow to allocate."""

    MOST = 16  #: blocks of one shape that are kept

    def __init__(self, driver, device, stream):
        self._driver, self._device, self._stream, self._kept = driver, device, stream, {}

    def array(self, shape, dtype):
        """A :class:`DeviceArray` whose memory nobody else has."""
        kept = self._kept.setdefault((shape, dtype), [])
        found = next((i for i, (block, owner) in enumerate(kept) if owner() is None and not block.lent()), None)
        if found is None:
            block = Block(empty(shape, dtype, self._device))
            if len(kept) >= self.MOST:
                kept.pop(0)
        else:
            block, _ = kept.pop(found)
            for other in block.readers:
                self._driver.wait(self._stream, other)
            block.readers.clear()
        array = DeviceArray(block, shape, dtype, self._stream, self._driver, self._device)
        kept.append((block, weakref.ref(array)))
        return array


def empty(shape, dtype, device):
    """Uninitialised device memory as a tensor of TVM's."""
    ffi = runtime.ffi()
    allocate = ffi.get_global_func("runtime.TVMTensorAllocWithScope")
    return allocate(ffi.Shape([int(d) for d in shape]), ffi.dtype(str(np.dtype(dtype))), ffi.device("cuda", device), None)


def part(whole, offset, shape, dtype):
    """A tensor in the memory of another one, from a byte on. TVM's views keep the address and an offset, which kernels do not take."""
    ffi = runtime.ffi()
    view = ffi.get_global_func("runtime.TVMTensorCreateView")
    return ffi.from_dlpack(_Moved(view(whole, ffi.Shape([int(d) for d in shape]), ffi.dtype(str(np.dtype(dtype))), offset)))


class _Moved:
    """A view whose address is that of its first element."""

    def __init__(self, view):
        self._view = view

    def __dlpack_device__(self):
        return self._view.__dlpack_device__()

    def __dlpack__(self, **_):
        capsule = self._view.__dlpack__()
        address = _capsule_pointer(capsule, b"dltensor")  # of a DLTensor: the data's address comes first, byte_offset at byte 40
        data, offset = ctypes.c_uint64.from_address(address), ctypes.c_uint64.from_address(address + 40)
        data.value, offset.value = data.value + offset.value, 0
        return capsule


def _capsule_pointer(capsule, name):
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return get(capsule, name)


def borrow(value, stream):
    """A device array of any library as a tensor of TVM's, without a copy; work of ``stream`` waits until it is complete."""
    return runtime.ffi().from_dlpack(_Capsule(value, stream))


class _Capsule:
    """``from_dlpack`` names no stream; this does."""

    def __init__(self, value, stream):
        self._value, self._stream = value, stream

    def __dlpack_device__(self):
        return self._value.__dlpack_device__()

    def __dlpack__(self, **options):
        return self._value.__dlpack__(stream=self._stream)


def on_device(value):
    """Whether ``value`` is an array in the memory of an NVIDIA GPU."""
    device = getattr(value, "__dlpack_device__", None)
    return device is not None and not isinstance(value, np.ndarray) and int(device()[0]) == CUDA
