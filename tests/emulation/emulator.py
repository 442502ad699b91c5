"""Runs compiled kernels of other architectures on this machine, under user-mode QEMU."""

import functools
import pathlib
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter

import numpy as np
import tvm
import tvm_ffi

from bnntvm.build import tvm_target
from bnntvm.linker import compiler_for
from tests.folders import of_process

_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
_HERE = pathlib.Path(__file__).parent
#: Machine -> names of the emulator.
EMULATORS = {"aarch64": ("qemu-aarch64", "qemu-aarch64-static"), "arm": ("qemu-arm", "qemu-arm-static")}


def emulator(machine):
    """The emulator's command."""
    found = next((name for name in EMULATORS[machine] if shutil.which(name)), None)
    if found is None:
        raise RuntimeError(f"no emulator for {machine}: apt-get install qemu-user")
    return [found]


@functools.cache
def _main(isa):
    """The object file of main.c for ``isa``, made once per process."""
    path = of_process("bnntvm-emulation-") / f"main-{isa.machine}.o"
    root = pathlib.Path(tvm_ffi.__file__).parent
    command = [*_c_compiler(isa), "-O1", "-c", "-I", str(root / "include"), str(_HERE / "main.c"), "-o", str(path)]
    subprocess.run(command, check=True)
    return path


def _c_compiler(isa):
    return compiler_for(isa).replace("g++", "gcc").split()


class Program:
    """PrimFuncs as a program of their own.

    Parameters
    ----------
    functions : tirx.PrimFunc or dict of name to tirx.PrimFunc
    isa : targets.isa.Isa
    """

    def __init__(self, functions, isa):
        functions = functions if isinstance(functions, dict) else {"kernel": functions}
        self.isa, self.names = isa, list(functions)
        mod = tvm.IRModule({name: function.with_attr("global_symbol", name) for name, function in functions.items()})
        self.library = tvm.compile(mod, target=tvm_target(isa))
        self.folder = tempfile.TemporaryDirectory(prefix="bnntvm-emulation-")
        self.path = pathlib.Path(self.folder.name, "kernels")
        kernels, table = pathlib.Path(f"{self.path}.o"), pathlib.Path(f"{self.path}.c")
        self.library.mod.write_to_file(str(kernels))
        declared = "".join(f"int __tvm_ffi_{name}(void);\n" for name in self.names)
        table.write_text(declared + "void *const kernels[] = {" + ", ".join(f"__tvm_ffi_{name}" for name in self.names) + "};\n")
        command = [*_c_compiler(isa), "-static", "-w", "-o", str(self.path), str(_main(isa)), str(table), str(kernels), "-lm"]
        subprocess.run(command, check=True)

    @property
    def assembly(self):
        return self.library.mod.inspect_source("asm")

    def run(self, arrays, repeat=1, options=(), name=None):
        """The arrays as the kernel ``name`` (the first) leaves them, integers among them as they are; ``options`` go to the emulator."""
        number = self.names.index(name) if name else 0
        message = [struct.pack("<ii", len(arrays), repeat)]
        for array in arrays:
            if isinstance(array, int):
                message.append(struct.pack("<iiiq", -1, _CODES["i"], 64, array))
                continue
            array = np.ascontiguousarray(array)
            message.append(struct.pack(f"<iii{array.ndim}q", array.ndim, _CODES[array.dtype.kind], array.dtype.itemsize * 8, *array.shape))
            message.append(array.tobytes())
        command = [*emulator(self.isa.machine), *options, str(self.path), str(number)]
        done = subprocess.run(command, input=b"".join(message), capture_output=True)
        if done.returncode:
            raise RuntimeError(f"exit status {done.returncode}: {done.stderr.decode(errors='replace')}")
        self.messages = done.stderr.decode(errors="replace")
        return _split(done.stdout, arrays)

    def instructions(self, arrays, name=None):
        """Instructions that one run of the kernel executes."""
        return sum(instructions * times for (_, instructions), times in self.blocks(arrays, name).items())

    def blocks(self, arrays, name=None):
        """What one run of the kernel executes: (address, instructions) of a block -> how often. Three runs less one run, halved."""
        found = []
        for repeat in (1, 3):
            self.run(arrays, repeat, ["-plugin", str(counter())], name)
            found.append(Counter())
            for address, instructions, times in re.findall(r"block (\w+) (\d+) (\d+)", self.messages):
                found[-1][int(address, 16), int(instructions)] += int(times)
        return {block: (times - found[0][block]) // 2 for block, times in found[1].items() if times > found[0][block] + 1}

    @functools.cached_property
    def disassembly(self):
        """Address -> instruction."""
        tool = compiler_for(self.isa).replace("g++", "objdump").replace("gcc", "objdump")
        text = subprocess.run([tool, "-d", "--no-show-raw-insn", str(self.path)], capture_output=True, text=True, check=True).stdout
        return {int(address, 16): line for address, line in re.findall(r"^ +(\w+):\t(.*?)(?:\t?//.*)?$", text, re.MULTILINE)}


@functools.cache
def counter():
    """The plugin of count.c, made once per process. (QEMU built statically takes no plugins.)"""
    path = of_process("bnntvm-emulation-") / "count.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", str(_HERE / "count.c"), "-o", str(path)], check=True)
    return path


def _split(data, arrays):
    result, at = [], 0
    for array in arrays:
        if isinstance(array, int):
            result.append(array)
            continue
        size = array.dtype.itemsize * array.size
        result.append(np.frombuffer(data[at : at + size], array.dtype).reshape(array.shape))
        at += size
    return result
