"""Builds candidates for the device that is not there: no machine code, but beside it what :mod:`tests.cuda.tuning_program` has to run."""

import os
import pathlib
import pickle
import sys

from bnntvm.cuda import toolchain
from bnntvm.tuning import gpu_process, worker

#: Environment variables: folder of what candidates are; the schedule with which the measuring program crashes; a file that gets a line
#: for every such program.
FOLDER, CRASHES, LOG = "FAKE_KERNELS", "FAKE_CRASHES", "FAKE_LOG"
ROOT = pathlib.Path(__file__).parents[2]
_build = worker.build


def present(tmp_path, monkeypatch):
    """Make a test's tuner find a GPU; file with a line for every measuring program."""
    log, kernels = tmp_path / "programs", tmp_path / "kernels"
    kernels.mkdir()
    for name, value in {"FAKE_MAJOR": 9, "FAKE_MINOR": 0, FOLDER: kernels, LOG: log, "PYTHONPATH": ROOT}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(gpu_process, "COMMAND", (sys.executable, "-m", "tests.cuda.tuning_program"))
    monkeypatch.setattr(worker, "build", build)
    monkeypatch.setattr(toolchain, "required_compiler", lambda: "none")
    monkeypatch.setattr(toolchain, "compile_source", toolchain.compile_source)  # what build() does to it ends with the test
    return log


def build(folder, schedule, library, limit, case_limit, images=1):
    """In the place of :func:`bnntvm.tuning.worker.build`."""
    toolchain.compile_source = lambda code, arch: _compiled(code, arch, folder, schedule)
    _build(folder, schedule, library, limit, case_limit, images)


def _compiled(code, arch, folder, schedule):
    name = os.urandom(8).hex()
    pathlib.Path(os.environ[FOLDER], name).write_bytes(pickle.dumps((folder, schedule, code)))
    return toolchain.Compiled(arch, b"\x7fELFname:" + name.encode() + bytes(64), {}, "none")
