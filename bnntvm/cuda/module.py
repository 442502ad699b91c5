"""A network for a GPU: :class:`bnntvm.module.Module` with arrays on the device."""

from collections.abc import Mapping

import numpy as np

from bnntvm import artefact
from bnntvm.cuda import driver
from bnntvm.cuda.runtime import DeviceLibrary, refuse_other_devices
from bnntvm.cuda.tensor import on_device
from bnntvm.errors import BnnError, InputError
from bnntvm.module import Module, _as_declared, _check_finite, _first_line, open_library


class DeviceModule(Module):
    """A network that runs on an NVIDIA GPU.

    As :class:`bnntvm.module.Module`, and :meth:`run` also takes arrays in device memory (of PyTorch, CuPy, or anything else that speaks
    DLPack) without copying them. Where all inputs are such arrays so are the results, :class:`bnntvm.cuda.tensor.DeviceArray`; work that
    DLPack's consumers start waits for them.
    """

    def run(self, feed, check_finite=True):
        """Run the network; see :meth:`bnntvm.module.Module.run`.

        ``check_finite`` has to wait for the device: without it, and with inputs and results on the device, a run only starts.
        """
        there = isinstance(feed, Mapping) and any(on_device(value) for value in feed.values())
        return (self._run_on_device if there else self._run)(feed, check_finite)

    def _run(self, feed, check_finite):
        arrays, _ = self._match(feed)
        staged = []
        for entry, array in zip(self._entries, arrays):
            array = np.ascontiguousarray(array, entry.staged)
            if check_finite and entry.floating and not entry.single_precision:
                _check_finite(array, entry.info.name)
            staged.append(array)
        return self._declared(self._on_machine(staged, check_finite, to_host=True))

    def _declared(self, results):
        """Results by name; those on the host as what the network declares (the device computes float16 in float32)."""
        return {
            info.name: _as_declared(array, dtype, True) if isinstance(array, np.ndarray) else array
            for (info, dtype, _own), array in zip(self._exits, results)
        }

    def _run_on_device(self, feed, check_finite):
        if feed.keys() != self._names:
            self._check_names(feed)
        arrays = [self._device_input(entry, feed[entry.info.name]) for entry in self._entries]
        shapes = tuple([tuple(array.shape) for array in arrays])
        if shapes not in self._known_shapes:
            self._check_shapes(shapes)
        return self._declared(self._on_machine(arrays, check_finite, to_host=not all(on_device(array) for array in arrays)))

    def _device_input(self, entry, value):
        """An input as it goes to the machine: device arrays as they are, others as arrays of the host."""
        name = entry.info.name
        if not on_device(value):
            return np.ascontiguousarray(entry.array(value), entry.staged)
        refuse_other_devices(value, name, 0)
        kind = str(value.dtype).removeprefix("torch.")
        if kind != str(entry.staged):
            raise InputError(f"input {name!r} on the device has dtype {kind}, kernels take {entry.staged}", hint="convert it there first")
        if not _is_contiguous(value):
            raise InputError(
                f"input {name!r} is not contiguous in memory", hint="x.contiguous() in PyTorch, cupy.ascontiguousarray(x) in CuPy"
            )
        return value

    def _on_machine(self, arrays, check_finite, to_host):
        machine = self._machine()
        place = self._manifest["device"]["batch"]
        batch = arrays[place[0]].shape[place[1]] if place else 1
        check = tuple(i for i, entry in enumerate(self._entries) if check_finite and entry.single_precision)
        try:
            results = machine.run(arrays, batch, check, to_host)
        except BnnError:
            raise
        except Exception as error:
            raise BnnError("the network failed while it ran", where=self._shapes_text(arrays), why=_first_line(error)) from error
        self._idle.append(machine)
        if results is None:
            for i in check:
                array = arrays[i] if isinstance(arrays[i], np.ndarray) else _to_host(arrays[i])
                _check_finite(array, self.inputs[i].name)
        return results

    def _load_library(self):
        artefact.check_machine(self._file, self._manifest, f"target {self.report.target}")
        return open_library(self._file, lambda path: DeviceLibrary(path, self._manifest["device"]))

    def _finished(self, feed):
        self.run(feed)
        if any(on_device(value) for value in feed.values()):
            self.synchronize()

    def synchronize(self):
        """Wait until the device has done everything that was started."""
        driver.load().synchronize_device()


def _is_contiguous(array):
    """Whether a device array of any library lies in memory in C order, as far as it tells."""
    if hasattr(array, "is_contiguous"):
        return bool(array.is_contiguous())
    return bool(array.flags.c_contiguous) if hasattr(array, "flags") else True


def _to_host(array):
    """A device array of any library on the host."""
    if hasattr(array, "cpu"):
        return array.cpu().numpy()
    return array.numpy() if hasattr(array, "numpy") else array.get()
