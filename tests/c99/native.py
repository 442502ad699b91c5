"""Compiles exported networks, and runs them here or on an emulated machine."""

import ctypes
import pathlib
import re
import shutil
import subprocess

import numpy as np

import bnntvm
from bnntvm.importer import import_model

STRICT = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-ffp-contract=off"]


def run(command, folder, seconds=120):
    """Standard output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def execute(model, feed, folder, *, batch=1, name="net", **options):
    """Outputs of the exported network on ``feed``, in the order of the model; undefined behaviour ends the process."""
    imported = import_model(model)
    bnntvm.export_c(model, folder, name=name, batch=batch, vectors=False, **options)
    checks = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    sources = [f"{name}.c", f"{name}_weights.c"]
    run(["gcc", *STRICT, "-O0", "-fPIC", "-shared", *checks, *sources, "-o", "network.so"], folder)
    library = ctypes.CDLL(str(pathlib.Path(folder, "network.so").resolve()))
    inputs = [_staged(feed[info.name]) for info in imported.inputs]
    outputs = [_room(info, batch) for info in imported.outputs]
    macros = [line.split() for line in pathlib.Path(folder, f"{name}.h").read_text().splitlines() if line.startswith("#define")]
    sizes = [int(words[2]) for words in macros if re.search(r"_SIZE(_\d+)?$", words[1])]
    assert sizes == [a.size for a in (*inputs, *outputs)]
    status = getattr(library, f"{name}_run")(*[a.ctypes.data_as(ctypes.c_void_p) for a in (*inputs, *outputs)])
    return status, outputs


def _staged(array):
    return np.ascontiguousarray(array, np.float32 if array.dtype == np.float16 else array.dtype)


def _room(info, batch):
    dtype = np.float32 if info.dtype == "float16" else info.dtype
    return np.zeros([d if isinstance(d, int) else batch for d in info.shape], dtype)


def emulator(machine):
    """QEMU's user-mode emulator, under either of Debian's names."""
    return next(name for name in (f"qemu-{machine}", f"qemu-{machine}-static") if shutil.which(name))
