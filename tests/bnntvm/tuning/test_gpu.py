"""Sessions on a GPU that is not there (:mod:`tests.cuda.tuning_program`): what is measured is what the emulator computes."""

import collections
import json
import pathlib
import pickle
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

import bnntvm
from bnntvm.cuda import toolchain
from bnntvm.schedules import families
from bnntvm.targets import cuda
from bnntvm.tuning import driver, gpu, records, tasks
from bnntvm.tuning.space import Space, fields
from bnntvm.tuning.store import FAILURES, Store
from bnntvm.tuning.task import Operand
from bnntvm.tuning.workload import chooser, levels
from tests.cuda import faulty, tuning_build, tuning_program
from tests.cuda.network import long_layers
from tests.cuda.run_time import IMAGES, MODEL
from tests.cuda.test_run_time import _has_driver

ISA = cuda.level("sm_90a")
needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A GPU is there; file with a line for every measuring program."""
    return tuning_build.present(tmp_path, monkeypatch)


def programs(log):
    return len(log.read_text().splitlines())


@needs_cc
def test_bad_candidates_cost_a_program_and_nothing_else(tmp_path, device, monkeypatch):
    """One of each: the good ones are measured, the others recorded with their reason; each that failed on the device ended its program."""
    monkeypatch.setattr(gpu, "MEASURE_LIMIT", 10.0)
    key = '{"family":"faulty"}'
    operand = Operand((faulty.SIZE,), "float32")
    task = faulty.FaultyTask(records.task_id(key), key, "faulty", faulty.Spec(), ISA, (operand,), (operand,), ["a"])
    tuner = driver.Tuner([task], Store(tmp_path / "db"), gpu.Gpu(ISA), 1, None, lambda *one: None)
    try:
        result = tuner.run(len(faulty.KINDS))
    finally:
        tuner.close()
        tuner.store.close()
    assert (result.measured, result.failed) == (2, len(faulty.KINDS) - 2)
    assert result.rows[0].schedule == faulty.Schedule("better") and result.gain == pytest.approx(2)
    entries = [json.loads(line) for line in (tmp_path / "db" / FAILURES).read_text().splitlines()]
    reasons = {entry["schedule"]["kind"]: entry["reason"] for entry in entries}
    assert "CUDA_ERROR_OF_THE_TEST" in reasons.pop("refused")
    assert reasons == {
        "wrong": "wrong result: output 0: 64 of 64 elements are wrong",
        "behind": "wrong result: 8 bytes behind an output are overwritten",
        "before": "wrong result: 8 bytes before an output are overwritten",
        "input": "wrong result: an input is overwritten",
        "no code": "ValueError: no code for this",
        "compiler dies": "crashed: SIGSEGV",
        "crashes": "crashed: SIGSEGV",
        "hangs": "time out after 10 s",
    }
    on_the_device = len(reasons) + 1 - 2
    assert on_the_device <= programs(device) <= on_the_device + 1, "a program for each that failed there, and the first one"


@needs_cc
def test_a_candidate_of_two_kernels(tmp_path, device):
    """It gets its workspace, between guards, and is right with every batch."""
    task = next(task for task in tasks.extract(long_layers(), ISA) if getattr(task.spec, "in_features", 0) == 16384)
    schedule = next(s for s in Space(task, 1, "the device").schedules if getattr(s, "in_memory", False))
    (tmp_path / "task.pickle").write_bytes(pickle.dumps(task, protocol=5))
    library = str(tmp_path / "candidate.so")
    tuning_build.build(str(tmp_path), schedule, library, 600.0, 600.0, gpu.Gpu.images)
    assert int(pathlib.Path(library + ".workspace").read_text()) % (32 * schedule.split) == 0
    machine = gpu.Gpu(ISA)
    try:
        seconds = machine.program.call(600.0, "measure", str(tmp_path), library, 0.02)
    finally:
        machine.close()
    assert seconds and min(seconds) > 0


def measured(folder):
    return [r for r in records.read(folder)[0]]


@needs_cc
def test_sessions(tmp_path, device, monkeypatch):
    """Defaults first; a candidate that crashes its program is recorded; the next session goes on; builds use what was faster."""
    found, database = tasks.extract(MODEL, ISA), tmp_path / "db"
    spaces = {task.id: Space(task, 1, "the device") for task in found}
    most = max(spaces.values(), key=lambda space: len(space.schedules))
    bad = max(most.schedules[1:], key=lambda s: -tuning_program.milliseconds(s))
    monkeypatch.setenv(tuning_build.CRASHES, str(bad))
    first = bnntvm.tune(MODEL, target="sm_90a", trials=len(found) + 2, database=database, progress=False)
    lines = measured(database)
    alone = lines[: len(found) + 2]
    assert {r.task: r.schedule for r in lines[: len(found)]} == {name: fields(space.default) for name, space in spaces.items()}
    assert {(r.isa, r.threads, r.machine) for r in lines} == {("sm_90a", 1, "a device that is not there")}
    assert first.measured + first.failed == len(found) + 2 and not first.interrupted and first.remark == ""

    second = bnntvm.tune(MODEL, target="sm_90a", trials=100, database=database, progress=False)
    after = measured(database)
    assert after[: len(lines)] == lines
    counts = collections.Counter((r.task, r.schedule) for r in alone + after[len(lines) : len(lines) + second.measured + second.failed])
    assert set(counts.values()) == {1}, "nothing is measured twice"
    assert sum(counts.values()) == sum(len(space.schedules) for space in spaces.values()), "the spaces are small: all of them"
    assert {(r.task, r.schedule) for r in after if r.failed} == {(most.task.id, fields(bad))}
    assert programs(device) >= 3, "one a session, and one behind the crash"

    assert {r.place.split()[0] for r in after if r.compared} == {"device"}
    choose = chooser(database, 4)
    for space in spaces.values():
        sound = [s for s in space.schedules if (space, s) != (most, bad)]
        best = min(sound, key=tuning_program.milliseconds)
        gain = tuning_program.milliseconds(space.default) / tuning_program.milliseconds(best)
        chosen = choose(space.task.module, space.task.spec, ISA, (4,))
        assert chosen == (best if gain > records.LEAST_GAIN else space.default)
        row = next(r for r in second.rows if r.task == space.task.id)
        assert row.default_us / row.best_us == pytest.approx(gain, rel=1e-3)
    assert any(choose(s.task.module, s.task.spec, ISA, (4,)) != s.default for s in spaces.values())
    used = built_with(monkeypatch, database)
    assert used == {s.task.spec: choose(s.task.module, s.task.spec, ISA, (4,)) for s in spaces.values()}


def built_with(monkeypatch, database):
    """Specification -> schedule of the kernels that a build with the records makes."""
    made = {}
    monkeypatch.setattr(toolchain, "compile_source", lambda code, arch: toolchain.Compiled(arch, b"\x7fELF" + bytes(64)))
    for name in set(families.FAMILIES.values()):
        module = families.importlib.import_module(f"{families.__package__}.cuda.{name}")
        monkeypatch.setattr(module, "build", lambda spec, schedule, isa, real=module.build: made.update({spec: schedule}) or real(
            spec, schedule, isa))  # fmt: skip
    bnntvm.build(MODEL, target="sm_90a", tuning=str(database))
    return made


@needs_cc
def test_batches(tmp_path, device, monkeypatch):
    """Kernels of any batch are compared and timed with one image and with several; records count both."""
    result = bnntvm.tune(IMAGES, target="sm_90a", trials=9, database=tmp_path / "db", layers=["pool2d", "4x4 64-64"], progress=False)
    assert (result.measured, result.failed) == (9, 0), (tmp_path / "db" / FAILURES).read_text()
    engines = {dict(r.schedule).get("engine") for r in measured(tmp_path / "db")}
    assert {None, "wgmma"} <= engines
    spaces = {t.id: Space(t, 1, "x") for t in tasks.extract(IMAGES, ISA)}
    for record in measured(tmp_path / "db")[:9]:
        schedule = spaces[record.task].schedule_from(dict(record.schedule))
        expected = np.sqrt(tuning_program.milliseconds(schedule, 1) * tuning_program.milliseconds(schedule, 3)) / 1e3
        np.testing.assert_allclose(record.seconds, expected, rtol=1e-4)


@needs_cc
def test_the_program_ends_with_its_tuner(device):
    """However that ends."""
    code = (
        "import sys, time; from bnntvm.tuning import gpu_process as g; g.COMMAND = (sys.executable, '-m', 'tests.cuda.tuning_program');"
        "p = g.Program([], 'x'); p.start(); print(p.process.pid, flush=True); time.sleep(600)"
    )
    tuner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    number = int(tuner.stdout.readline())
    assert running(number)
    tuner.kill()
    tuner.wait()
    deadline = time.monotonic() + 30
    while running(number) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(number)


def running(number):
    """Whether a process is there and has not ended."""
    try:
        return pathlib.Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_a_device(tmp_path, monkeypatch):
    """It is said before anything else is done."""
    if _has_driver():
        pytest.skip("this machine has an NVIDIA driver")
    monkeypatch.setattr(driver, "extract", lambda *_, **__: pytest.fail("the network was looked at"))
    monkeypatch.setattr(toolchain, "required_compiler", lambda: "none")
    with pytest.raises(bnntvm.TargetError, match="(?s)cannot run here.*where: sm_86.*no NVIDIA driver.*tune on a machine with"):
        bnntvm.tune(MODEL, target="sm_86", database=tmp_path / "db", progress=False)
    assert not (tmp_path / "db").exists()


@needs_cc
def test_other_devices(tmp_path, device, monkeypatch):
    for variables, target, words in (
        ({"FAKE_MAJOR": "8", "FAKE_MINOR": "6"}, "sm_90a", "a device that is not there is sm_86"),
        ({"FAKE_DRIVER": "12040"}, "sm_90a", "serves CUDA 12"),
        ({"FAKE_DRIVER": "13000", "FAKE_DEVICES": "0"}, "sm_90a", "no GPU that CUDA can use"),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(bnntvm.TargetError, match=words):
            bnntvm.tune(MODEL, target=target, database=tmp_path / "db", progress=False)


def test_bad_arguments(tmp_path):
    for options, message in ((dict(rpc="host:1", key="k"), "not measured through"), (dict(threads=2), "those of a processor")):
        with pytest.raises(bnntvm.BnnError, match=message):
            bnntvm.tune(MODEL, target="sm_80", database=tmp_path, progress=False, **options)


def test_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "find_compiler", lambda: None)
    with pytest.raises(bnntvm.ToolchainError, match="no CUDA compiler"):
        bnntvm.tune(MODEL, target="sm_80", database=tmp_path, progress=False)


def test_records_are_those_of_an_architecture():
    assert [levels(cuda.level(name)) for name in ("sm_90a", "sm_80")] == [["sm_90a"], ["sm_80"]]
