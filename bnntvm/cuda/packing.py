"""What lies beside the host's code in a compiled network's library, with machine code in the place of CUDA source.

TVM's code generator leaves CUDA C++ where its CUDA run time is not loaded (and compiles it with ``--use_fast_math`` where it is). Modules
that are no object files travel in one blob, which the loader takes apart::

    uint64  length of what follows
    import tree: two vectors of uint64 (row pointers, children)
    for each module, in the order of the tree: its kind; and unless that is "_lib", the host's code itself, its bytes

and the bytes of a module of kind ``cuda`` are the format of its code, a table of its functions, its code. Strings and vectors begin with
their length. The format becomes ``cubin``, the code that of the compiler; the table stays.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import struct
import threading

import tvm

from bnntvm.errors import UnsupportedError

_LENGTH = struct.Struct("<Q")
_SOURCE, _BINARY = b"cuda", b"cubin"
_FALLBACK_VARIABLE = "TVM_COMPILE_FORCE_FALLBACK"
_lock = threading.Lock()


@contextlib.contextmanager
def source_kept():
    """Within it, TVM generates CUDA C++ and does not compile it, also on a machine with a GPU."""
    with _lock:
        before = os.environ.get(_FALLBACK_VARIABLE)
        os.environ[_FALLBACK_VARIABLE] = "1"
        try:
            yield
        finally:
            os.environ.pop(_FALLBACK_VARIABLE)
            if before is not None:
                os.environ[_FALLBACK_VARIABLE] = before


def device_modules(module):
    """The modules of kind ``cuda`` below ``module``."""
    found, todo = [], [module]
    while todo:
        one = todo.pop()
        found += [one] if one.kind == "cuda" and not any(one.same_as(other) for other in found) else []
        todo += list(one.imports)
    return found


def source_of(module):
    """The CUDA C++ of all modules of kind ``cuda`` below ``module``; each is a translation unit."""
    return [one.inspect_source("cuda") for one in device_modules(module)]


def packer(compile_one):
    """For ``export_library(fpack_imports=...)``: writes the object file of the blob.

    Parameters
    ----------
    compile_one : callable
        CUDA C++ to the bytes of its machine code.
    """

    def pack(module, is_system_lib, prefix, folder):
        blob = bytes(tvm.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy())
        sources = {one.encode() for one in source_of(module)}
        blob = replaced(blob, lambda source: compile_one(source.decode()), sources)
        target = next(one.get_function("_get_target_string")() for one in _host_modules(module))
        made = tvm.get_global_func("codegen.codegen_blob")(blob, is_system_lib, target, prefix)
        path = pathlib.Path(folder, f"{prefix}devc.o")
        made.write_to_file(str(path))
        return str(path)

    return pack


def _host_modules(module):
    todo = [module]
    while todo:
        one = todo.pop()
        if one.kind == "llvm":
            yield one
        todo += list(one.imports)


def replaced(blob, compile_one, sources):
    """``blob`` with the code of its ``cuda`` modules compiled.

    Parameters
    ----------
    blob : bytes
    compile_one : callable
        CUDA C++ as bytes to machine code.
    sources : set of bytes
        The code that the modules have.
    """
    (length,) = _LENGTH.unpack_from(blob)
    if length != len(blob) - _LENGTH.size:
        raise _unknown("the blob's length")
    at, rows = _vector(blob, _LENGTH.size)
    at, children = _vector(blob, at)
    out = [_words(rows), _words(children)]
    for _ in range(len(rows) - 1):
        at, kind = _string(blob, at)
        out.append(_packed(kind))
        if kind == b"_lib":
            continue
        at, content = _string(blob, at)
        out.append(_packed(_compiled(content, compile_one, sources) if kind == b"cuda" else content))
    if at != len(blob):
        raise _unknown("what follows the modules")
    body = b"".join(out)
    return _LENGTH.pack(len(body)) + body


def _compiled(content, compile_one, sources):
    start, form = _string(content, 0)
    source = next((one for one in sources if content.endswith(_packed(one))), None)
    if form != _SOURCE or source is None:
        raise _unknown("the code of a module")
    table = content[start : len(content) - len(source) - _LENGTH.size]
    return _packed(_BINARY) + table + _packed(compile_one(source))


def _unknown(what):
    return UnsupportedError("compiled kernels could not be packed", why=f"this version of TVM writes {what} in another way",
                            hint="use the version of apache-tvm that bnntvm asks for")  # fmt: skip


def _string(blob, at):
    (length,) = _LENGTH.unpack_from(blob, at)
    begin = at + _LENGTH.size
    return begin + length, blob[begin : begin + length]


def _vector(blob, at):
    (length,) = _LENGTH.unpack_from(blob, at)
    begin, end = at + _LENGTH.size, at + _LENGTH.size * (1 + length)
    return end, list(struct.unpack(f"<{length}Q", blob[begin:end]))


def _packed(text):
    return _LENGTH.pack(len(text)) + text


def _words(numbers):
    return _LENGTH.pack(len(numbers)) + struct.pack(f"<{len(numbers)}Q", *numbers)
