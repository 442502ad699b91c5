"""Records of a GPU: of candidates that were built here and measured there, and of a database. The GPU is not there."""

import json
import shutil
import threading
from types import SimpleNamespace

import pytest

from benchmarks import cuda, cuda_prepare, cuda_records
from benchmarks.records import Kernel
from bnntvm.targets import cuda as targets
from bnntvm.tuning import gpu, records, tasks
from bnntvm.tuning.measure import Pipeline
from bnntvm.tuning.space import Space, fields
from bnntvm.tuning.store import Store
from tests.cuda import tuning_build
from tests.cuda.run_time import MODEL
from tests.cuda.tuning_program import milliseconds

ISA = targets.level("sm_90a")
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture
def device(tmp_path, monkeypatch):
    return tuning_build.present(tmp_path, monkeypatch)


def test_schedules_are_spread():
    """The default, then one of each engine before a second of any."""
    space = [SimpleNamespace(engine=engine, number=i) for engine in ("mma", "wgmma", "cores") for i in range(50)]
    chosen = cuda_prepare.spread(space, 7)
    assert chosen[0] is space[0] and len({id(s) for s in chosen}) == 7
    assert [sorted(s.engine for s in part) for part in (chosen[1:4], chosen[4:7])] == [["cores", "mma", "wgmma"]] * 2
    assert len(cuda_prepare.spread(space[:2], 7)) == 2


def test_prepared_candidates_become_records(tmp_path, device, monkeypatch):
    """Built here, measured by a process without a compiler, recorded here; one that fails there is recorded as that, and never shipped."""
    monkeypatch.setattr("benchmarks.zoo.build", lambda name: MODEL)
    spaces = {t.id: Space(t, 1, "x") for t in tasks.extract(MODEL, ISA)}
    prepared, out = tmp_path / "prepared", tmp_path / "out"
    out.mkdir()
    cuda_prepare._candidates(SimpleNamespace(folder=prepared, candidates=4, tune=["any"], layers=["dense"]), ISA)
    (prepared / "prepared.json").write_text(json.dumps(dict(target="sm_90a")))
    built = {name: cuda_prepare.spread(space.schedules, 4) for name, space in spaces.items()}
    bad = min((s for own in built.values() for s in own[1:]), key=milliseconds)
    monkeypatch.setenv(tuning_build.CRASHES, str(bad))
    cuda.step_candidates(prepared, cuda.Writer(out, "candidates"))
    cuda_records.main(["--take", str(prepared), str(out / "candidates.jsonl"), "--database", str(tmp_path / "db"), "--output",
                       str(tmp_path / "shipped")])  # fmt: skip
    known = records.read(tmp_path / "db" / "sm_90a")[0]
    assert {r.machine for r in known} == {"a device that is not there"} and any(r.failed for r in known)
    assert {r.schedule for r in known if r.failed} == {fields(bad)}
    expected = {}
    for name, own in built.items():
        best = min((s for s in own if s != bad), key=milliseconds)
        if milliseconds(own[0]) > cuda_records.LEAST_GAIN * milliseconds(best):
            expected[name] = {fields(own[0]), fields(best)}
    shipped = {}
    for record in records.read(tmp_path / "shipped")[0]:
        shipped.setdefault(record.task, set()).add(record.schedule)
    assert shipped == expected and expected
    report = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {one["name"]: one["gain"] > cuda_records.LEAST_GAIN for one in report} == {name: name in expected for name in spaces}


def test_without_prepared_candidates_nothing_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr("bnntvm.tuning.gpu_process.Program", lambda *_: pytest.fail("a program was started"))
    cuda.step_candidates(tmp_path, cuda.Writer(tmp_path, "candidates"))
    assert json.loads((tmp_path / "results.jsonl").read_text())["name"] == "skipped"


def test_finalists_are_compared_with_the_default(tmp_path, device):
    """What a database knows of a kernel decides who is compared; the comparison decides who wins."""
    space = Space(next(t for t in tasks.extract(MODEL, ISA) if t.family == "weight_dense"), 1, "x")
    store = Store(tmp_path / "db")
    for number, schedule in enumerate(space.schedules):  # better and better, whatever is true
        store.commit(space, schedule, [1e-3 / (1 + number)])
    store.close()
    kernel = Kernel(space, measured={s: 1e-3 / (1 + i) for i, s in enumerate(space.schedules)})
    assert kernel.finalists == space.schedules[:1:-1][:3]
    pipeline = Pipeline(None, gpu.Gpu(ISA), threading.Event())
    try:
        times = cuda_records.compared(pipeline, kernel)
    finally:
        pipeline.close()
    assert set(times) == {space.default, *kernel.finalists}
    for schedule, seconds in times.items():
        assert seconds == pytest.approx([milliseconds(schedule, 4) / 1e3] * len(seconds), rel=1e-3)
