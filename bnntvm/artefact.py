"""The ``.bnn`` file: a compiled network that needs no ONNX file and no compiler.

Layout
------
::

    the shared library, as the linker wrote it        an ELF file may have a tail, so the artefact itself can be loaded
    manifest: JSON, UTF-8
    footer, 56 bytes, little endian:
        uint64   length of the library
        uint64   length of the manifest
        32 bytes SHA-256 of library, manifest and the two lengths
        8 bytes  magic

The checksum finds damage, not malice: **loading an artefact runs native code of whoever made it.**
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import pathlib
import platform
import struct
import tempfile

from bnntvm.errors import ArtefactError, TargetError
from bnntvm.targets.isa import host_flags
from bnntvm.targets.tile_permission import tile_permission

FORMAT = 1
MAGIC = b"bnntvm\r\n"  # a transfer in text mode breaks the line end, and with it the magic
_LENGTHS = struct.Struct("<QQ")
_FOOTER_BYTES = _LENGTHS.size + 32 + len(MAGIC)
_CHUNK = 1 << 20
_ELF_MACHINES = {62: "x86_64", 183: "aarch64", 40: "arm", 243: "riscv64"}
_REQUIRED = {
    "target": dict,
    "inputs": list,
    "outputs": list,
    "overridable": dict,
    "layers": list,
    "constants_bytes": int,
    "code_bytes": int,
    "workspace_bytes": int,
}


def write(library, manifest, path, library_bytes=None):
    """Write an artefact, atomically: ``path`` holds the old contents or all of the new ones, whatever happens.

    Parameters
    ----------
    library : binary file
        The shared library, open for reading.
    manifest : dict
        See ``bnntvm.module.Module``.
    path : str or pathlib.Path
        Where to. Parent folders are not made.
    library_bytes : int, optional
        Length of the library where the file is an artefact itself.

    Raises
    ------
    ArtefactError
        If the file cannot be written: no such folder, no permission, disk full.
    """
    path = check_place(path)
    part = None
    try:
        handle, part = _part(path)
        with os.fdopen(handle, "wb") as out:
            _write_parts(library, library_bytes, manifest, out)
            os.fchmod(out.fileno(), 0o666 & ~_umask())
            out.flush()
            os.fsync(out.fileno())
            os.replace(part, path)  # while it is locked: another writer would remove it
            part = None
    except OSError as error:
        raise ArtefactError(
            "the artefact could not be written",
            where=str(path),
            why=error.strerror or str(error),
            hint="check folder, rights and free space",
        ) from error
    finally:
        if part is not None:
            with contextlib.suppress(OSError):
                os.unlink(part)
    _sync_folder(path.parent)


def check_place(path):
    """``path`` as one, after a check that needs no artefact: whether a file can be put there. See :func:`write`."""
    path = _path(path)
    why = None
    try:
        if path.exists() and not path.is_file():  # the rename would put a file in the place of /dev/null
            why = "it is a folder" if path.is_dir() else "it is a device, a pipe or a socket"
        elif not path.parent.is_dir():
            why = f"there is no folder {path.parent}"
    except OSError as error:  # a folder that may not be searched, a name that is too long
        why = error.strerror or str(error)
    if why is not None:
        raise ArtefactError("the artefact could not be written", where=str(path), why=why, hint="give the path of a file")
    return path


def _part(path):
    """(descriptor, path) of a new file next to ``path``, so that the rename stays within one file system; no two writers share one.

    A writer holds a lock on its file: one without a lock was left by a process that was killed, and is removed.
    """
    prefix = f".{path.name[:60]}."
    for old in path.parent.glob(glob.escape(prefix) + "*.part"):
        _remove_if_left(old)
    while True:
        handle, part = tempfile.mkstemp(prefix=prefix, suffix=".part", dir=path.parent)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(part):  # nobody took it for one that was left before it was locked
            return handle, part
        os.close(handle)


def _remove_if_left(path):
    with contextlib.suppress(OSError), open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)


def _write_parts(library, library_bytes, manifest, out):
    text = json.dumps(manifest | {"format": FORMAT}, separators=(",", ":"), allow_nan=False).encode()
    digest, length = hashlib.sha256(), 0
    for chunk in _chunks(library, 0, library_bytes):
        out.write(chunk)
        digest.update(chunk)
        length += len(chunk)
    tail = text + _LENGTHS.pack(length, len(text))
    digest.update(tail)
    out.write(tail + digest.digest() + MAGIC)


def _chunks(file, start, length=None):
    """The bytes [start, start + length) of ``file`` in pieces, without moving its position (threads may share it)."""
    end = os.fstat(file.fileno()).st_size if length is None else start + length
    while start < end:
        chunk = os.pread(file.fileno(), min(_CHUNK, end - start), start)
        if not chunk:
            raise OSError("the file became shorter while it was read")
        yield chunk
        start += len(chunk)


def _umask():
    with contextlib.suppress(OSError, StopIteration, ValueError):  # os.umask() would change it for other threads for a moment
        line = next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("Umask:"))
        return int(line.split()[1], 8)
    return 0o022


def _sync_folder(folder):
    """Make the rename itself durable; file systems that cannot do this are not an error."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path, to_run=True):
    """Open an artefact, verified: complete, undamaged, of this format, and for this machine. Runs none of its code.

    Parameters
    ----------
    path : str or pathlib.Path
    to_run : bool
        Whether this machine has to be able to run it.

    Returns
    -------
    file : binary file
        The artefact, open; it begins with the library.
    manifest : dict
    library_bytes : int
        Length of the library.

    Raises
    ------
    ArtefactError
        If the file is missing, not an artefact, damaged, or of another format version.
    TargetError
        If this machine lacks the architecture or the instructions that it was built for.
    """
    path = _path(path)
    try:
        file = open(path, "rb")  # noqa: SIM115  (handed to the caller)
    except OSError as error:
        raise ArtefactError("the artefact could not be opened", where=str(path), why=error.strerror or str(error)) from error
    try:
        manifest, library_bytes = _verify(file, str(path))
        if to_run:
            check_machine(file, manifest, str(path))
    except BaseException:
        file.close()
        raise
    return file, manifest, library_bytes


def _path(path):
    """``path`` as one; numbers, which ``open`` takes for descriptors, and names that no file can have are refused."""
    try:
        path = pathlib.Path(os.fsdecode(path))
    except TypeError as error:
        raise ArtefactError("not the path of an artefact", why=f"got {type(path).__name__}", hint="give a str or a pathlib.Path") from error
    if "\0" in str(path):
        start = repr(str(path)[:60])
        raise ArtefactError("not the path of an artefact", where=start, why="it holds a zero byte", hint="give the path, not the content")
    return path


def is_artefact(path):
    """Whether the file's last bytes are an artefact's; False if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return os.pread(file.fileno(), len(MAGIC), max(0, os.fstat(file.fileno()).st_size - len(MAGIC))) == MAGIC
    except OSError:
        return False


def _verify(file, path):
    try:
        size = os.fstat(file.fileno()).st_size
        footer = os.pread(file.fileno(), _FOOTER_BYTES, max(0, size - _FOOTER_BYTES))
        if len(footer) < _FOOTER_BYTES or not footer.endswith(MAGIC):
            raise ArtefactError(
                "not a bnntvm artefact", where=path, why=_guess(file, size), hint="make one with `bnntvm build MODEL -o OUT.bnn`"
            )
        library_bytes, manifest_bytes = _LENGTHS.unpack_from(footer)
        if library_bytes + manifest_bytes + _FOOTER_BYTES != size:
            raise ArtefactError(
                "the artefact is damaged",
                where=path,
                why=f"its footer speaks of {library_bytes + manifest_bytes + _FOOTER_BYTES} bytes, the file has {size}",
                hint="copy or build it again",
            )
        digest = hashlib.sha256()
        for chunk in _chunks(file, 0, size - 32 - len(MAGIC)):
            digest.update(chunk)
        if digest.digest() != footer[_LENGTHS.size : _LENGTHS.size + 32]:
            raise ArtefactError("the artefact is damaged", where=path, why="its checksum does not match", hint="copy or build it again")
        text = b"".join(_chunks(file, library_bytes, manifest_bytes))
    except OSError as error:
        raise ArtefactError("the artefact could not be read", where=path, why=error.strerror or str(error)) from error
    return _parse(text, path), library_bytes


def _guess(file, size):
    start = os.pread(file.fileno(), 4, 0)
    if size == 0:
        return "the file is empty"
    if start == b"\x7fELF":
        return "it is a shared library without the artefact's tail: perhaps cut short"
    if start[:1] == b"\x08":
        return "it looks like an ONNX model, which has to be built first"
    return "the magic bytes at its end are missing"


def _parse(text, path):
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtefactError("the artefact's manifest is not JSON", where=path, why=str(error), hint="build it again") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise ArtefactError(
            f"the artefact has format {version}",
            where=path,
            why=f"this bnntvm reads format {FORMAT}",
            hint="build it again with this version",
        )
    bad = [key for key, kind in _REQUIRED.items() if not isinstance(manifest.get(key), kind)]
    needs = [] if "target" in bad else manifest["target"].get("needs", [])
    if not isinstance(needs, list) or not all(isinstance(flag, str) for flag in needs):
        bad.append("target.needs")
    if bad:
        raise ArtefactError("the artefact's manifest is incomplete", where=path, why="no proper " + ", ".join(bad), hint="build it again")
    return manifest


#: How to use another machine from here.
_BOARD = ": `bnntvm rpc-server` makes that machine a board, and --rpc HOST:PORT --key NAME here (bnntvm.connect in Python) uses it"


def check_machine(file, manifest, where, machine=None, flags=None, whose="this machine"):
    """Refuse a library that a machine cannot run.

    Parameters
    ----------
    file : binary file
        It begins with the library.
    manifest : dict
    where : str
        For the message.
    machine, flags : str, frozenset of str, optional
        Architecture and flags of the processor of another machine; default: this one's.
    whose : str
        Name of the machine.

    Raises
    ------
    TargetError
        Naming what is missing.
    """
    head = os.pread(file.fileno(), 20, 0)
    if head[:4] == b"\x7fELF":
        number = int.from_bytes(head[18:20], "little")
        built_for, here = _ELF_MACHINES.get(number, f"ELF machine {number}"), machine or platform.machine()
        if built_for != here.replace("arm64", "aarch64").replace("armv7l", "arm"):
            hint = "build it again for this machine (target x86 or its own), or run it there" + (_BOARD if machine is None else "")
            raise TargetError(f"built for {built_for}, {whose} is {here}", where=where, hint=hint)
    target = manifest["target"]
    flags = host_flags() if machine is None else flags
    missing = [flag for flag in target.get("needs", []) if flag not in flags] if flags else []  # none: this system does not tell
    if missing:
        raise TargetError(
            f"{'this CPU' if machine is None else whose} cannot run code for {target.get('name')}",
            where=where,
            why="it lacks " + ", ".join(missing),
            hint='build again with target="x86" on this machine, or for a lower level (`bnntvm targets` lists them)',
        )
    if target.get("machine") == "cuda":
        if machine is not None:
            raise TargetError(f"built for a GPU, {whose} is used for its processor", where=where, hint="load it on a machine with a GPU")
        from bnntvm.cuda.driver import check_device

        check_device(target, where)
    if machine is None and "amx_tile" in target.get("needs", []) and not tile_permission():
        raise TargetError(
            "the operating system does not let this process use the tile registers of AMX", where=where,
            why=f"it was built for {target.get('name')}", hint="build it for a lower level (`bnntvm targets` lists them)",
        )  # fmt: skip
