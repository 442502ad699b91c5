"""A Debian user-land for 64-bit ARM that runs under user-mode QEMU, without installing, mounting or registering anything.

``mmdebstrap --variant=extract`` unpacks Debian's Python and its libraries into a folder; wheels of that platform are unpacked beside it.
The emulator finds the dynamic linker and the C library there (``-L``). What was downloaded is kept in ``~/.cache/bnntvm/userland``.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version

from .emulator import emulator

_ROOT = pathlib.Path(__file__).parents[2]
_SUITE, _PYTHON = "bookworm", "3.11"
_PACKAGES = ["python3-minimal", "libpython3-stdlib", "libstdc++6"]
_WHEELS = ["numpy<2.4", "typing_extensions", "ml_dtypes", "click", f"apache-tvm=={version('apache-tvm')}"]
_WHEELS += [f"apache-tvm-ffi=={version('apache-tvm-ffi')}"]
#: Of TVM's wheel: neither the compiler (a quarter of a gigabyte) nor sources.
_LEFT_OUT = ("tvm/lib/libtvm_compiler", "tvm/3rdparty/", "tvm/include/", "tvm/src/", "tvm_ffi/include/", "tvm_ffi/3rdparty/")


def _cache():
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return root / "bnntvm" / "userland" / f"{_SUITE}-tvm-{version('apache-tvm')}-1"


@contextlib.contextmanager
def _locked(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, f"{' '.join(map(str, command))}: {done.stderr[-2000:]}"


def userland():
    """The folder of the user-land, made once: ``tree`` is Debian's, ``site`` holds the Python packages."""
    folder = _cache()
    with _locked(folder):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _run(["mmdebstrap", "--variant=extract", "--architectures=arm64", "--include=" + ",".join(_PACKAGES), _SUITE, folder / "tree"])
            platforms = [f"--platform=manylinux{kind}_aarch64" for kind in ("2014", "_2_17", "_2_27", "_2_28")]
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms]
            _run([*command, f"--python-version={_PYTHON}", "--dest", folder / "wheels", *_WHEELS])
            for wheel in (folder / "wheels").glob("*.whl"):
                with zipfile.ZipFile(wheel) as file:
                    file.extractall(folder / "site", [name for name in file.namelist() if not name.startswith(_LEFT_OUT)])
            shutil.rmtree(folder / "wheels")
            (folder / "done").touch()
    return folder


class Userland:
    """The user-land with this checkout in it.

    Parameters
    ----------
    scratch : pathlib.Path
        An empty folder.
    with_bnntvm : bool
        Whether ``import bnntvm`` works in it.
    """

    def __init__(self, scratch, with_bnntvm=True):
        folder, paths = userland(), []
        if with_bnntvm:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(_ROOT / "bnntvm", scratch / "bnntvm", ignore=ignore)
            shutil.copytree(_ROOT / "targets", scratch / "bnntvm" / "targets", ignore=ignore)
            paths.append(str(scratch))
        tree, paths = folder / "tree", [*paths, str(folder / "site")]
        settings = [f"PYTHONPATH={os.pathsep.join(paths)}", "OMP_NUM_THREADS=1", "OPENBLAS_NUM_THREADS=1", "PYTHONDONTWRITEBYTECODE=1"]
        #: Starts Python there.
        self.python = ["env", *settings, *emulator("aarch64"), "-L", str(tree), str(tree / "usr/bin" / f"python{_PYTHON}")]
        self.site = folder / "site"
