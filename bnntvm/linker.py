"""From object files to a shared library, for this machine and for others."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys

from bnntvm.errors import ToolchainError

#: glibc that libraries linked by zig are content with; the TVM runtime's wheels ask for the same.
_GLIBC = "2.28"
#: Machine -> (prefixes of cross compilers, zig's name for it, Debian's package).
_CROSS = {
    "aarch64": (("aarch64-linux-gnu-",), f"aarch64-linux-gnu.{_GLIBC}", "gcc-aarch64-linux-gnu"),
    "arm": (("arm-linux-gnueabihf-",), f"arm-linux-gnueabihf.{_GLIBC}", "gcc-arm-linux-gnueabihf"),
    "x86_64": (("x86_64-linux-gnu-",), f"x86_64-linux-gnu.{_GLIBC}", "gcc-x86-64-linux-gnu"),
}


def is_native(isa):
    """Whether this machine's own compiler links for ``isa``."""
    return platform.machine().replace("arm64", "aarch64").replace("armv7l", "arm") == isa.machine


def find_compiler():
    """The C++ or C compiler that links: CXX or CC if set, else what is on the path; None if there is none."""
    chosen = os.environ.get("CXX", "").strip() or os.environ.get("CC", "").strip()
    names = [chosen.split()[0]] if chosen else ["c++", "g++", "clang++", "cc", "gcc", "clang"]
    found = next((name for name in names if shutil.which(name)), None)
    return chosen if found and chosen else found


def find_cross_compiler(isa):
    """The command that links for another machine: a system's cross compiler, else the ``ziglang`` wheel; None if there is neither."""
    prefixes, zig, _package = _CROSS[isa.machine]
    for name in (prefix + tool for prefix in prefixes for tool in ("g++", "gcc")):
        if shutil.which(name):
            return name
    if importlib.util.find_spec("ziglang"):
        return f"{shlex.quote(sys.executable)} -m ziglang cc -target {zig}"
    return None


def compiler_for(isa):
    """The command that links for ``isa``.

    Raises
    ------
    ToolchainError
        If there is none.
    """
    native = is_native(isa)
    compiler = find_compiler() if native else find_cross_compiler(isa)
    if compiler is None:
        hint = "install gcc or clang (Debian/Ubuntu: apt-get install gcc), or point CC at one"
        if not native:
            hint = f"pip install ziglang, or install a cross compiler (Debian/Ubuntu: apt-get install {_CROSS[isa.machine][2]})"
        raise ToolchainError(
            "no C compiler or linker found" + ("" if native else f" for {isa.machine}"), where=_compiler_setting() if native else None,
            why="a compiled network is linked into a shared library", hint=hint,
        )  # fmt: skip
    return compiler


def link(executable, path, isa, **options):
    """Write the executable as a shared library; ``options`` are those of TVM's ``export_library``."""
    compiler = compiler_for(isa)
    try:
        executable.export_library(str(path), fcompile=lambda out, objects, **_: _run_linker(compiler, out, objects), **options)
    except (RuntimeError, ValueError, OSError, subprocess.SubprocessError) as error:
        raise ToolchainError(
            "linking the compiled network failed", where=compiler, why=f"{type(error).__name__}: {error}",
            hint="check that the compiler works, and CXX and CC where they are set",
        ) from error  # fmt: skip
    if not path.exists():
        raise ToolchainError("linking the compiled network made no file", where=compiler, hint="point CXX or CC at a C or C++ compiler")


def _compiler_setting():
    return next((f"environment variable {name}={os.environ[name]}" for name in ("CXX", "CC") if os.environ.get(name, "").strip()), None)


def _run_linker(compiler, out, objects):
    """Link ``objects``; the compiler's own words where it fails. It may be a command with options, as ``make`` takes it."""
    objects = [objects] if isinstance(objects, str) else objects
    # Every network defines functions of the same names: those of a library call each other.
    command = [*shlex.split(compiler), "-shared", "-fPIC", "-s", "-Wl,-Bsymbolic", "-o", str(out), *objects, "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError("\n    ".join(words[:8]) or f"exit status {done.returncode}")


def code_bytes(library):
    """Bytes of machine code (the .text section) of an ELF file."""
    data = pathlib.Path(library).read_bytes()

    def u(offset, size):
        return int.from_bytes(data[offset : offset + size], "little")

    wide = data[4] == 2  # 64-bit ELF
    word = 8 if wide else 4
    table, entry, count, names = (u(40, 8), u(58, 2), u(60, 2), u(62, 2)) if wide else (u(32, 4), u(46, 2), u(48, 2), u(50, 2))
    offset_at, size_at = (24, 32) if wide else (16, 20)
    strings = u(table + names * entry + offset_at, word)
    for i in range(count):
        header = table + i * entry
        start = strings + u(header, 4)
        if data[start : data.index(b"\0", start)] == b".text":
            return u(header + size_at, word)
    return 0
