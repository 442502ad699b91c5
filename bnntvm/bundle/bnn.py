"""Runs the network of this bundle. Needs numpy and the libraries in lib/, nothing else.

::

    import bnn
    net = bnn.Network("bundle")
    outputs = net.run({"images": images})        # name -> numpy array

A network serves one thread at a time; open it once per thread to use several.
"""

import ctypes
import hashlib
import json
import pathlib

import numpy as np

_CODES = {0: "i", 1: "u", 2: "f", 6: "b"}


class Error(Exception):
    """What the C interface reports. ``code``: see include/bnn.h."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class Tensor:
    """An input or output: ``name``, ``dtype``, ``shape``."""

    def __init__(self, name, dtype, shape):
        self.name, self.dtype, self.shape = name, np.dtype(dtype), tuple(shape)

    def __repr__(self):
        return f"{self.name}: {self.dtype}{list(self.shape)}"


def check(folder):
    """Names of the bundle's files that are missing or altered."""
    folder = pathlib.Path(folder)
    files = _manifest(folder)["files"]
    return [n for n, d in files.items() if not (folder / n).is_file() or hashlib.sha256((folder / n).read_bytes()).hexdigest() != d]


class Network:
    """The network in ``folder``, by default the one that this file lies in.

    Attributes
    ----------
    inputs, outputs : list of Tensor
    """

    def __init__(self, folder=None):
        folder = pathlib.Path(folder or pathlib.Path(__file__).parent).absolute()
        manifest = _manifest(folder)
        self._handle, self._library = ctypes.c_void_p(), _library(folder)
        self._try(self._library.bnn_open(bytes(folder), ctypes.byref(self._handle)))
        shapes = {"input": [], "output": []}
        for line in (folder / "network.txt").read_text().splitlines():
            word, *numbers = line.split()
            if word in shapes:
                code, bits, _, *shape = map(int, numbers)
                shapes[word].append((f"{_CODES[code]}{bits // 8}" if code != 6 else "bool", shape))
        self.inputs, self.outputs = (
            [Tensor(info["name"], *shape) for info, shape in zip(manifest[side + "s"], shapes[side])] for side in ("input", "output")
        )

    def run(self, feed):
        """Outputs, name to new array, of a dict of name to array."""
        if set(feed) != {info.name for info in self.inputs}:
            raise Error(1, f"the network's inputs are {', '.join(map(repr, self.inputs))}, not {', '.join(map(str, feed))}")
        for index, info in enumerate(self.inputs):
            array = np.asarray(feed[info.name])
            if array.shape != info.shape or not np.can_cast(array.dtype, info.dtype, "same_kind"):
                raise Error(2, f"{info.name} is {array.dtype}{list(array.shape)}, the network takes {info!r}")
            array = np.ascontiguousarray(array, info.dtype)
            self._try(self._library.bnn_input(self._handle, index, array.ctypes.data, array.nbytes))
        self._try(self._library.bnn_run(self._handle))
        outputs = {}
        for index, info in enumerate(self.outputs):
            array = outputs[info.name] = np.empty(info.shape, info.dtype)
            self._try(self._library.bnn_output(self._handle, index, array.ctypes.data, array.nbytes))
        return outputs

    def close(self):
        """Free everything; the network cannot run afterwards."""
        handle, self._handle = self._handle, None
        if handle:
            self._library.bnn_close(handle)

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.close()

    def _try(self, status):
        if status:
            busy = "another thread uses this network"
            raise Error(status, busy if status == 6 else self._library.bnn_error(self._handle).decode(errors="replace"))


def _manifest(folder):
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return {key: manifest[key] for key in ("inputs", "outputs", "files")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Error(3, f"{folder}/manifest.json cannot be read: {error}") from error


def _library(folder):
    try:
        library = ctypes.CDLL(str(folder / "lib" / "libbnn.so"))
    except OSError as error:
        raise Error(3, str(error)) from error
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    for name, result, arguments in (
        ("bnn_open", number, [ctypes.c_char_p, ctypes.POINTER(pointer)]), ("bnn_run", number, [pointer]),
        ("bnn_input", number, [pointer, number, pointer, size]), ("bnn_output", number, [pointer, number, pointer, size]),
        ("bnn_error", ctypes.c_char_p, [pointer]), ("bnn_close", None, [pointer]),
    ):  # fmt: skip
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
