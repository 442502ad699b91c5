"""bnntvm: compiles binarised and low-bit ONNX networks into bit-packed XNOR-popcount code.

``build`` compiles an ONNX model, ``load`` opens what was built and exported; both return a :class:`Module`. Every error that a user can
cause is a :class:`BnnError`. Importing this package imports neither TVM nor numpy; they come with the first name that needs them.
"""

import importlib
import sys
import types

from bnntvm.errors import ArtefactError, BnnError, InputError, ModelError, TargetError, ToolchainError, UnsupportedError

__version__ = "0.1.0"

_LAZY = {
    "build": "bnntvm.build",
    "tune": "bnntvm.tuning.driver",
    "export_c": "bnntvm.c99",
    "load": "bnntvm.module",
    "connect": "bnntvm.remote.client",
    "profile": "bnntvm.profiling.profile",
    "Module": "bnntvm.module",
    "TensorInfo": "bnntvm.module",
    "Timing": "bnntvm.module",
    "Report": "bnntvm.report",
    "Layer": "bnntvm.report",
}

__all__ = [
    "ArtefactError",
    "BnnError",
    "InputError",
    "ModelError",
    "TargetError",
    "ToolchainError",
    "UnsupportedError",
    *sorted(_LAZY),
]


class _Package(types.ModuleType):
    """Keeps ``bnntvm.build`` the function: importing the submodule ``bnntvm.build`` would put the module in its place."""

    def __setattr__(self, name, value):
        if name in _LAZY and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __getattr__(self, name):
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in ("build", "tune", "export_c"):
            importlib.import_module("bnntvm.runtime").import_tvm_ffi()  # before TVM does, which would import PyTorch along with it
        value = getattr(importlib.import_module(_LAZY[name]), name)
        setattr(self, name, value)
        return value

    def __dir__(self):
        return sorted({*super().__dir__(), *_LAZY})


sys.modules[__name__].__class__ = _Package
