"""From CUDA C++ to machine code of one architecture: nvcc where it is on the path, else NVRTC from its wheel.

Results have to be those of every other target, so nothing may contract a product with a sum (``--fmad=false``; kernels that want a fused
multiply-add ask for it), flush subnormal numbers or approximate a division: that is what both compilers do unless told otherwise.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field

from bnntvm.errors import TargetError, ToolchainError

#: Options of both compilers.
OPTIONS = ("--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true", "-std=c++17")
#: "nvcc" or "nvrtc": use this one and no other.
CHOICE_VARIABLE = "BNNTVM_CUDA_COMPILER"

_NVCC_ONLY = ("-O3", "-cubin")
_INTEGERS = "".join(
    f"using int{bits}_t = {name}; using uint{bits}_t = unsigned {name};\n"
    for bits, name in ((8, "char"), (16, "short"), (32, "int"), (64, "long long"))
).replace("int8_t = char", "int8_t = signed char", 1)
_HINT = "install NVIDIA's CUDA toolkit with nvcc, or pip install 'bnntvm[cuda]' for the compiler without it"


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel: registers a thread, and bytes of shared memory and of what is kept in (slow) local memory."""

    registers: int = 0
    shared_bytes: int = 0
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0


@dataclass(frozen=True)
class Compiled:
    """Machine code of one architecture, and what its kernels use.

    Attributes
    ----------
    arch : str
        Such as ``sm_80``.
    cubin : bytes
        An ELF file for the driver.
    usage : dict of str to Usage
        By the name of the kernel.
    compiler : str
    """

    arch: str
    cubin: bytes
    usage: dict = field(default_factory=dict)
    compiler: str = ""


def compile_source(code, arch):
    """Compile CUDA C++.

    Parameters
    ----------
    code : str
        One translation unit.
    arch : str
        ``sm_75`` and such; ``sm_90a`` where instructions are used that only this one architecture has.

    Returns
    -------
    Compiled

    Raises
    ------
    ToolchainError
        If there is no compiler, or it fails.
    """
    name = required_compiler()
    cubin, log = (_nvcc if name == "nvcc" else _nvrtc)(code, arch)
    return Compiled(arch, cubin, parse_usage(log), name)


def required_compiler():
    """ "nvcc" or "nvrtc"; a ToolchainError if there is neither."""
    name = find_compiler()
    if name is None:
        raise ToolchainError("no CUDA compiler found", why="kernels for NVIDIA GPUs are compiled when a network is built", hint=_HINT)
    return name


def find_compiler():
    """ "nvcc", "nvrtc" or None."""
    wanted = os.environ.get(CHOICE_VARIABLE, "").strip()
    if wanted not in ("", "nvcc", "nvrtc"):
        raise ToolchainError(f"no such CUDA compiler: {wanted!r}", where=f"environment variable {CHOICE_VARIABLE}", hint="nvcc or nvrtc")
    if wanted in ("", "nvcc") and shutil.which("nvcc"):
        return "nvcc"
    if wanted in ("", "nvrtc") and nvrtc_library() is not None:
        return "nvrtc"
    return None


def check_arch(arch):
    """Refuse an architecture that the compiler does not know, before anything is compiled. Without a compiler there is nothing to ask.

    Parameters
    ----------
    arch : str
        Such as ``sm_80``, ``sm_90a`` or ``sm_120f``.

    Raises
    ------
    TargetError
    """
    compiler = find_compiler()
    known = known_architectures(compiler, shutil.which("nvcc") if compiler == "nvcc" else str(nvrtc_library())) if compiler else ()
    number = re.fullmatch(r"sm_(\d+)[af]?", arch)
    if known and number and int(number[1]) not in known:
        raise TargetError(
            "the CUDA compiler does not know this architecture", where=arch,
            why=f"{'nvcc' if compiler == 'nvcc' else 'NVRTC'} here compiles for " + ", ".join(f"sm_{one}" for one in known),
            hint="give one of these; if there is such a GPU, a newer CUDA toolkit (or pip install -U 'bnntvm[cuda]') knows it",
        )  # fmt: skip


@functools.lru_cache(maxsize=4)
def known_architectures(compiler, path):
    """Numbers of the architectures that nvcc, or NVRTC, at ``path`` compiles for; empty where it does not tell."""
    if compiler == "nvcc":
        done = subprocess.run([path, "--list-gpu-code"], capture_output=True, text=True, errors="replace")
        return tuple(sorted({int(number) for number in re.findall(r"^sm_(\d+)", done.stdout, re.MULTILINE)}))
    library, count = ctypes.CDLL(path), ctypes.c_int()
    if not hasattr(library, "nvrtcGetSupportedArchs"):  # older than CUDA 11.2
        return ()
    _call(library, "nvrtcGetNumSupportedArchs", ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    _call(library, "nvrtcGetSupportedArchs", numbers)
    return tuple(sorted(numbers))


# nvcc ---------------------------------------------------------------------------------------------------------------------------------


def _nvcc(code, arch):
    with tempfile.TemporaryDirectory(prefix="bnntvm-cuda-") as folder:
        source, out = pathlib.Path(folder, "kernels.cu"), pathlib.Path(folder, "kernels.cubin")
        source.write_text(code)
        number = arch.removeprefix("sm_")
        # The short form -arch=sm_90a also makes a pass for plain sm_90, which does not have the instructions.
        command = ["nvcc", *_NVCC_ONLY, f"-gencode=arch=compute_{number},code=sm_{number}", *OPTIONS, "-Xptxas=-v", "-o", out, source]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode or not out.exists():
            raise _failed("nvcc", arch, done.stderr or done.stdout)
        return out.read_bytes(), done.stderr + done.stdout


def _failed(compiler, arch, log):
    lines = [line for line in log.splitlines() if "error" in line.lower()] or log.strip().splitlines() or ["it says nothing"]
    return ToolchainError(
        f"{compiler} could not compile the network's kernels", where=arch, why="\n    ".join(lines[:6]),
        hint="a toolkit that is too old does not know the architecture; anything else is a gap in bnntvm: please report it",
    )  # fmt: skip


# NVRTC --------------------------------------------------------------------------------------------------------------------------------


def nvrtc_library():
    """Path of NVRTC's library: that of the ``nvidia-cuda-nvrtc`` wheel, or of an installed toolkit; None if there is neither."""
    folders = [root / sub for root in wheel_folders() for sub in ("lib", "bin")]
    folders += [pathlib.Path(root) / "lib64" for root in ("/usr/local/cuda", os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    for folder in folders:
        for path in sorted(folder.glob("libnvrtc.so*"), reverse=True):
            return path
    return None


def wheel_folders():
    """Folders of NVIDIA's wheels that hold ``lib`` and ``include``: ``nvidia/cu13``, of older wheels ``nvidia/cuda_nvrtc`` and such."""
    spec = importlib.util.find_spec("nvidia")
    roots = [pathlib.Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    return [folder for root in roots for folder in sorted(root.iterdir(), reverse=True) if folder.is_dir()]


def _nvrtc(code, arch):
    path = nvrtc_library()
    library = ctypes.CDLL(str(path))
    includes = [f"-I{folder / 'include'}" for folder in wheel_folders() if (folder / "include" / "cuda_runtime.h").exists()]
    if os.path.isdir("/usr/local/cuda/include"):
        includes.append("-I/usr/local/cuda/include")
    options = [f"--gpu-architecture={arch}", *OPTIONS, "-default-device", "--ptxas-options=-v", *includes]
    program = ctypes.c_void_p()
    source = (_INTEGERS + without_includes(code)).encode()
    _call(library, "nvrtcCreateProgram", ctypes.byref(program), source, b"kernels.cu", 0, None, None)
    try:
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), array)
        log = _bytes_of(library, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace")
        if status:
            raise _failed("NVRTC", arch, log)
        return _bytes_of(library, "nvrtcGetCUBINSize", "nvrtcGetCUBIN", program), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def without_includes(code):
    """TVM's source without the headers of the C++ library, which NVRTC does not have; what they define of integers comes before it."""
    lines = [
        line
        for line in code.splitlines()
        if not re.match(r"\s*(#include\s*<(cuda/std/|cstdint|type_traits|cuda\.h)|using cuda::std::)", line)
    ]
    return "\n".join(lines)


def _bytes_of(library, size_name, name, program):
    size = ctypes.c_size_t()
    _call(library, size_name, program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(max(1, size.value))
    _call(library, name, program, buffer)
    return buffer.raw[: size.value]


def _call(library, name, *args):
    status = getattr(library, name)(*args)
    if status:
        raise ToolchainError("NVRTC failed", where=name, why=f"status {status}", hint=_HINT)


# What ptxas says ----------------------------------------------------------------------------------------------------------------------


def parse_usage(log):
    """Kernel name -> Usage, from what ptxas prints with -v."""
    found, name = {}, None
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '([^']+)'", line):
            name = entry[1]
            found[name] = {}
        elif name and (frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            found[name] |= dict(zip(("stack_bytes", "spill_store_bytes", "spill_load_bytes"), map(int, frame.groups())))
        elif name and (used := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            found[name] |= {"registers": int(used[1]), "shared_bytes": int(shared[1]) if shared else 0}
    return {kernel: Usage(**facts) for kernel, facts in found.items()}
