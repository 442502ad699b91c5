"""The run time for GPUs, on a device that is not there: see :mod:`tests.cuda.run_time`."""

import os
import pathlib
import subprocess
import sys

import pytest

import bnntvm
from tests.cuda import run_time

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def output():
    """What the checks print, in a process whose driver is a fake."""
    done = subprocess.run([sys.executable, "-m", "tests.cuda.run_time"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    return done.stdout + done.stderr


@pytest.mark.parametrize("check", [check.__name__ for check in run_time.CHECKS])
def test_on_a_device_that_is_not_there(output, check):
    assert f"ok {check}\n" in output, output[-3000:]


def test_without_a_driver_a_network_is_exported_and_refused(tmp_path, monkeypatch):
    from bnntvm.cuda import driver, toolchain

    if _has_driver():
        pytest.skip("this machine has an NVIDIA driver")
    monkeypatch.setattr(toolchain, "compile_source", lambda code, arch: toolchain.Compiled(arch, b"\x7fELF"))
    module = bnntvm.build(run_time.MODEL, target="sm_80")
    module.export(tmp_path / "net.bnn")
    for attempt in (lambda: module.run(module.random_feed()), lambda: bnntvm.load(tmp_path / "net.bnn"), driver.load):
        with pytest.raises(bnntvm.TargetError, match="no NVIDIA driver"):
            attempt()


def _has_driver():
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def test_networks_for_processors_load_nothing_of_cuda(tmp_path):
    bnntvm.build(run_time.MODEL).export(tmp_path / "net.bnn")
    code = (
        "import sys, bnntvm; m = bnntvm.load(sys.argv[1]); m.run(m.random_feed());"
        "loaded = open('/proc/self/maps').read();"
        "assert 'cuda' not in loaded.replace(sys.argv[2], ''), [l for l in loaded.splitlines() if 'cuda' in l][:3];"
        "assert not [m for m in sys.modules if m.startswith('bnntvm.cuda')]"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "net.bnn"), str(ROOT)], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def test_the_run_time_files_need_no_compiler():
    code = (
        "import sys, bnntvm.cuda.module, bnntvm.cuda.driver, bnntvm.cuda.runtime, bnntvm.cuda.tensor, bnntvm.cuda.device;"
        "assert not {'tvm', 'onnx', 'torch'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize(
    "arch, capability, expected",
    [
        ("sm_80", (8, 0), True), ("sm_80", (8, 9), True), ("sm_80", (9, 0), False), ("sm_86", (8, 0), False), ("sm_90a", (9, 0), True),
        ("sm_90a", (10, 0), False), ("sm_90", (9, 0), True), ("sm_100", (10, 3), True), ("sm_75", (7, 5), True),
        ("nonsense", (7, 5), False),
    ],
)  # fmt: skip
def test_which_device_runs_which_code(arch, capability, expected):
    from bnntvm.cuda.driver import runs

    assert runs(arch, capability) == expected
