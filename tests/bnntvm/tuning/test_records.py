"""Records on disk: complete without anything beside them, and robust line by line."""

import base64
import errno
import json
import os
import pathlib
import random
import shutil
import tempfile
from dataclasses import field, make_dataclass, replace
from dataclasses import fields as dataclass_fields

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.s_tir import meta_schedule as ms

import bnntvm
from bnntvm import cli
from bnntvm import spec as specs
from bnntvm.schedules import binary_conv2d, float_dense, transpose
from bnntvm.targets import x86
from bnntvm.tuning import records, report
from bnntvm.tuning.space import Space, fields
from bnntvm.tuning.store import Store
from bnntvm.tuning.tasks import Operand, Task
from bnntvm.tuning.workload import chooser, family_name, key_of

ISA = x86.LEVELS[0]


def task(spec, family, shape=(1, 8, 8, 2)):
    key = key_of(family, spec, shape[0])
    return Task(records.task_id(key), key, family_name(family), spec, ISA, (Operand(shape, "uint32"),), (), ["layer"])


CONV = task(specs.BinaryConv2d(specs.Window(8, 8, (3, 3)), 64, 64, epilogue=specs.store("float32", "int32")), binary_conv2d)
TURN = task(specs.Transpose(8, 96, ((8, 96), (96, 8))), transpose)
DENSE = task(specs.FloatDense(64, 100, specs.store()), float_dense, (3, 64))


def fill(folder, tasks=(CONV, TURN), count=6, seed=0):
    """A database in which the default of every task takes 1 ms and its other schedules 0.5 ms or more."""
    store, rng = Store(folder), random.Random(seed)
    for one in tasks:
        space = Space(one, 1)
        for i, schedule in enumerate([space.default, *rng.sample(space.schedules[1:], min(count, len(space.schedules) - 1))]):
            store.commit(space, schedule, [1e-3 - i * 1e-4 if i < 5 else 5e-4] * 3)
    store.close()
    return folder


@settings(max_examples=20, deadline=None)
@given(one=st.sampled_from([CONV, TURN, DENSE]), pick=st.integers(0, 10**6), times=st.lists(st.floats(1e-7, 10), min_size=1, max_size=9))
def test_schedules_survive_the_file(tmp_path_factory, one, pick, times):
    """What is read back is what was measured, booleans and names included, and TVM's own database reads the same file."""
    folder = tmp_path_factory.mktemp("db")
    space = Space(one, 1)
    schedule = space.schedules[pick % len(space.schedules)]
    store = Store(folder)
    store.commit(space, schedule, times)
    store.close()
    (record,), bad = records.read(folder)
    assert not bad
    assert (record.task, record.isa, record.threads) == (one.id, ISA.name, 1)
    assert record.schedule == fields(schedule) and type(schedule)(**dict(record.schedule)) == schedule
    np.testing.assert_allclose(record.seconds, times, rtol=1e-6)
    assert records.keys(folder) == {one.id: one.key}
    database = ms.database.JSONDatabase(work_dir=str(folder))
    assert len(database.get_top_k(database.commit_workload(space.module), 5)) == 1


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_damaged_line_costs_that_line(tmp_path_factory, data):
    """Whatever happens to one line of either file, the records of all other lines remain, for us and, once mended, for TVM."""
    folder = fill(tmp_path_factory.mktemp("db"))
    before, _ = records.read(folder)
    name = data.draw(st.sampled_from([records.RECORDS, records.RECORDS, records.WORKLOADS]))
    lines = (folder / name).read_bytes().splitlines()
    victim, cut = data.draw(st.integers(0, len(lines) - 1)), data.draw(st.integers(0, 60))
    junk = data.draw(st.sampled_from([b"", b"\x00\xff\xfe", b"[]", b"null", b'{"a": 1}', b"[0, [[[], []], [1.0], {}, []]]"]))
    lines[victim] = lines[victim][:cut] + junk
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    expected = [r for i, r in enumerate(before) if name == records.WORKLOADS or i != victim]
    assert records.read(folder)[0] == expected
    store = Store(folder)
    assert store.damaged == 1 and len(store.database) == len(expected)
    store.commit(Space(CONV, 1), Space(CONV, 1).default, [3e-3])
    store.close()
    assert len(records.read(folder)[0]) == len(expected) + 1
    assert Store(folder).damaged == 0


def test_a_file_cut_short_goes_on(tmp_path):
    """A process that was killed while it wrote leaves half a line, without its end."""
    folder = fill(tmp_path)
    data = (folder / records.RECORDS).read_bytes()
    (folder / records.RECORDS).write_bytes(data[:-40])
    count = len(records.read(folder)[0])
    store = Store(folder)
    store.commit(Space(TURN, 1), Space(TURN, 1).default, [1e-3])
    store.close()
    assert len(records.read(folder)[0]) == count + 1


def test_merging_loses_and_doubles_nothing(tmp_path):
    a, b = fill(tmp_path / "a", (CONV, TURN), seed=1), fill(tmp_path / "b", (DENSE, CONV), seed=2)
    both = {*records.read(a)[0], *records.read(b)[0]}
    count, bad = records.merge([a, b], tmp_path / "c")
    assert (count, bad) == (len(both), 0) and set(records.read(tmp_path / "c")[0]) == both
    assert set(records.keys(tmp_path / "c")) == {CONV.id, TURN.id, DENSE.id}
    assert records.merge([b, a, tmp_path / "c"], tmp_path / "c") == (len(both), 0)
    assert Store(tmp_path / "c").damaged == 0
    with pytest.raises(bnntvm.BnnError, match="no tuning records"):
        records.merge([tmp_path], tmp_path / "d")


def chosen(folder, one):
    """The schedule that a build takes."""
    return chooser(str(folder), 1)(one.module, one.spec, ISA, one.operands[0].shape)


def commit(folder, *entries):
    store = Store(folder)
    for schedule, seconds in entries:
        store.commit(Space(CONV, 1), schedule, seconds, None if seconds else "crashed")
    store.close()


def test_the_fastest_is_used_and_never_a_slower_one(tmp_path):
    default, first, second, third = Space(CONV, 1).schedules[:4]
    commit(tmp_path, (default, [1e-3]), (first, [0.999e-3]))
    assert chosen(tmp_path, CONV) == default, "a gain within the noise changes nothing"
    commit(tmp_path, (first, [8e-4]), (second, [9e-4]))
    assert chosen(tmp_path, CONV) == first
    commit(tmp_path, (third, [1e-4]), (third, []))
    assert chosen(tmp_path, CONV) == first, "what failed once is never chosen"
    commit(tmp_path, (first, [2e-3]))
    assert chosen(tmp_path, CONV) == second, "the last measurement counts"
    assert chosen(tmp_path, DENSE) == float_dense.default_schedule(DENSE.spec, ISA)


def test_records_of_a_similar_level_serve(tmp_path):
    """Records of one level of AVX-512 serve another with as many registers that counts bits in the same way; those of AVX2 do not."""
    like = [level for level in x86.LEVELS if (level.lanes, level.popcount) == (ISA.lanes, ISA.popcount)]
    other = next(level for level in x86.LEVELS if level.lanes == 8)
    space = Space(replace(CONV, isa=like[-1]), 1)
    store = Store(tmp_path)
    store.commit(space, space.default, [1e-3])
    store.commit(space, space.schedules[1], [5e-4])
    store.close()
    for level, expected in [*((one, space.schedules[1]) for one in like), (other, binary_conv2d.default_schedule(CONV.spec, other))]:
        assert chooser(str(tmp_path), 1)(CONV.module, CONV.spec, level, (1, 8, 8, 2)) == expected


def test_foreign_schedules_are_not_trusted(tmp_path):
    """A schedule that is not in the family's space, or has other fields, is passed over."""
    default, first = Space(CONV, 1).schedules[:2]
    commit(tmp_path, (default, [1e-3]), (first, [5e-4]))
    path = tmp_path / records.RECORDS
    text = path.read_text()
    path.write_text(text.replace('"bnn.field.task_rows"', '"bnn.field.task_lines"'))
    assert chosen(tmp_path, CONV) == default


def test_keys_leave_constants_out():
    """Networks that differ in what was trained share records; networks whose kernels differ do not."""

    def key(**changes):
        epilogue = specs.Epilogue(steps=(specs.Step("multiply", (0, changes.pop("scale", 0.5))),), outputs=(specs.Output("tensor", 1),))
        return key_of(float_dense, specs.FloatDense(64, changes.pop("out", 32), epilogue), changes.pop("rows", 1))

    assert key(scale=0.25) == key(scale=0.5)
    assert len({key(), key(out=33), key(rows=2)}) == 3


def test_keys_survive_new_fields():
    """A field with a default, added to a specification, changes no key of a layer that does not use it."""
    fields_ = [(f.name, f.type, f) for f in dataclass_fields(specs.FloatDense)]
    longer = make_dataclass("FloatDense", [*fields_, ("planar", bool, field(default=False))], frozen=True)
    old, new = specs.FloatDense(64, 32), longer(64, 32)
    assert key_of(float_dense, new, 1) == key_of(float_dense, old, 1) != key_of(float_dense, longer(64, 32, planar=True), 1)


def test_two_tuners_do_not_share_a_folder(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(bnntvm.BnnError, match="another tuner"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


def test_show(tmp_path):
    """The table and the picture of a database, with a damaged line in it."""
    folder = fill(tmp_path)
    with open(folder / records.RECORDS, "a") as file:
        file.write("[0, \n")
    summaries, bad = report.summarise(folder)
    assert len(bad) == 1 and {s.task for s in summaries} == {CONV.id, TURN.id}
    conv = next(s for s in summaries if s.task == CONV.id)
    assert conv.name == "binary_conv2d 3x3 8x8 64-64" and conv.measured == 7 and conv.gain == pytest.approx(2.0, rel=1e-3)
    assert conv.curve == sorted(conv.curve, reverse=True) and "2.00x" in report.table(summaries)
    report.plot(summaries, tmp_path / "search.png")
    assert (tmp_path / "search.png").stat().st_size > 5000


def test_damaged_workloads_are_restored_for_lookups(tmp_path):
    """Without the workload's line a record is still found."""
    folder = fill(tmp_path / "a")
    wanted = chosen(folder, CONV)
    shutil.copytree(folder, tmp_path / "b")
    (tmp_path / "b" / records.WORKLOADS).write_text("damaged\n")
    assert chosen(tmp_path / "b", CONV) == wanted != Space(CONV, 1).default
    Store(tmp_path / "b").close()
    assert all(json.loads(line) for line in (tmp_path / "b" / records.WORKLOADS).read_text().splitlines())
    assert chosen(tmp_path / "b", CONV) == wanted


def test_records_whose_workload_is_lost_are_merged(tmp_path):
    """A record needs no workload to be found; a folder that still describes its task gives the description."""
    a, b = fill(tmp_path / "a", (CONV, TURN)), fill(tmp_path / "b", (CONV,), seed=2)
    wanted = chosen(a, TURN)
    (a / records.WORKLOADS).write_text("damaged\n")
    count = len(set(records.read(a)[0]) | set(records.read(b)[0]))
    assert records.merge([a, b], tmp_path / "c") == (count, 0)
    assert chosen(tmp_path / "c", TURN) == wanted != Space(TURN, 1).default
    assert list(records.keys(tmp_path / "c")) == [CONV.id]
    store = Store(tmp_path / "c")
    assert store.damaged == 0 and store.measured(Space(TURN, 1))
    store.close()


def test_commands(tmp_path):
    """`bnntvm tune show` and `merge`, and what is said where there are no records."""
    a, b = fill(tmp_path / "a", (CONV,), seed=1), fill(tmp_path / "b", (TURN,), seed=2)
    runner = CliRunner()
    merged = runner.invoke(cli.main, ["tune", "merge", str(a), str(b), "--output", str(tmp_path / "c")])
    assert (merged.exit_code, merged.output) == (0, f"{tmp_path / 'c'}: {len(records.read(a)[0]) + len(records.read(b)[0])} records\n")
    shown = runner.invoke(cli.main, ["tune", "show", str(tmp_path / "c")])
    assert shown.exit_code == 0 and "binary_conv2d 3x3 8x8 64-64" in shown.output and "2.00x" in shown.output
    for command in ("merge", "show"):
        nothing = runner.invoke(cli.main, ["tune", command, str(tmp_path)])
        assert nothing.exit_code == 1 and "no tuning records here" in nothing.output
    with pytest.raises(bnntvm.BnnError, match="no tuning records here"):
        chooser(str(tmp_path / "missing"), 1)


def test_measured_schedules_outlive_new_fields(tmp_path):
    """A database from before a schedule had a field is still known: the field has its default."""
    default, first = (replace(s, fetch=False) for s in Space(CONV, 1).schedules[:2])
    commit(tmp_path, (default, [1e-3]), (first, [5e-4]))
    path = tmp_path / records.RECORDS
    kept = []
    for line in path.read_text().splitlines():
        number, (trace, *rest) = json.loads(line)
        gone = next(i for i, one in enumerate(trace[0]) if one[0] == "Annotate" and one[2][0].startswith("bnn.field.fetch"))
        kept.append(json.dumps([number, [[trace[0][:gone] + trace[0][gone + 1 :], trace[1]], *rest]]))
    path.write_text("\n".join(kept) + "\n")
    found, bad = records.read(tmp_path)
    assert not bad and all("fetch" not in dict(r.schedule) for r in found)
    store = Store(tmp_path)
    assert store.measured(Space(CONV, 1)) == {default: pytest.approx(1e-3), first: pytest.approx(5e-4)}
    store.close()
    assert chosen(tmp_path, CONV) == first


def test_shipped_records_are_compared_with_the_default_of_today(tmp_path, monkeypatch):
    """Where the default schedule is another one than when the package's records were made, they do not count; a user's own do."""
    first, second = Space(CONV, 1).schedules[1:3]
    commit(tmp_path, (first, [8e-4]), (second, [9e-4]))
    monkeypatch.setattr(records, "shipped", lambda: tmp_path)

    def taken(tuning):
        return chooser(tuning, 1)(CONV.module, CONV.spec, ISA, CONV.operands[0].shape)

    default = Space(CONV, 1).default
    assert taken(None) == default and taken(str(tmp_path)) == first and chooser(False, 1) is None
    commit(tmp_path, (default, [9e-4]))
    assert taken(None) == first


def test_shipped_records_of_another_maker(tmp_path, monkeypatch):
    """Whoever names a processor gets the package's records of its maker; a level's name means all that have the level."""
    default, first = Space(CONV, 1).schedules[:2]
    monkeypatch.setattr("bnntvm.tuning.space.processor", lambda: "Intel(R) Xeon(R) Processor (6/207/2)")
    commit(tmp_path, (default, [9e-4]), (first, [8e-4]))
    monkeypatch.setattr(records, "shipped", lambda: tmp_path)

    def taken(vendor, tuning=None):
        return chooser(tuning, 1)(CONV.module, CONV.spec, replace(ISA, vendor=vendor), CONV.operands[0].shape)

    assert taken("") == taken("Intel") == first
    assert taken("AMD") == CONV.module.default_schedule(CONV.spec, replace(ISA, vendor="AMD")) != first
    assert taken("AMD", str(tmp_path)) == first, "a user's own records count on any"


def compare(folder, times, kind="network"):
    """Record a comparison in turns; ``times``: (schedule, seconds in every turn), the default first."""
    store = Store(folder)
    place = store.comparison(kind)
    for schedule, seconds in times:
        store.commit(Space(CONV, 1), schedule, seconds, place=place)
    store.close()


def damage(folder, which):
    """Break the lines of the record file for which ``which(record)``."""
    path = folder / records.RECORDS
    lines = path.read_text().splitlines()
    path.write_text("".join((line[:50] if which(records.parse(line)) else line) + "\n" for line in lines))


def test_a_noisy_comparison_changes_nothing(tmp_path):
    """Where too few turns were undisturbed the default stays, whatever was measured alone; an earlier comparison stays, too."""
    default, first, second = Space(CONV, 1).schedules[:3]
    commit(tmp_path, (default, [25e-3]), (first, [1e-3]), (second, [9e-4]))
    noise = [(default, [1e-3, 25e-3] * 4), (second, [25e-3, 1e-3] * 4)]
    compare(tmp_path, noise)
    assert chosen(tmp_path, CONV) == default
    (one,) = report.summarise(tmp_path)[0]
    assert one.compared == "too noisy" and one.gain == 1
    compare(tmp_path, [(default, [1e-3] * 8), (first, [9e-4] * 8)])
    assert chosen(tmp_path, CONV) == first
    compare(tmp_path, noise)
    assert chosen(tmp_path, CONV) == first
    store = Store(tmp_path)
    assert store.compared(Space(CONV, 1)) == {default: pytest.approx((1e-3,) * 8), first: pytest.approx((9e-4,) * 8)}
    store.close()


@pytest.mark.parametrize("alone, kept", [(5e-3, True), (1e-3, False), (None, True)])
def test_a_comparison_without_its_default(tmp_path, alone, kept):
    """Its fastest schedule counts if it was faster than the default in the search; the next session compares again."""
    default, first, second = Space(CONV, 1).schedules[:3]
    commit(tmp_path, *([] if alone is None else [(default, [alone])]), (first, [2e-3]), (second, [1e-4]))
    compare(tmp_path, [(default, [1e-3] * 8), (first, [9e-4] * 8), (second, [95e-5] * 8)])
    assert chosen(tmp_path, CONV) == first
    damage(tmp_path, lambda record: record.compared and record.default)
    assert chosen(tmp_path, CONV) == (first if kept else default), "not the fastest of the search, which lost in the network"
    (one,) = report.summarise(tmp_path)[0]
    assert (one.default_us is None) == (alone is None) and one.schedule == dict(fields(first if kept else default))
    store = Store(tmp_path)
    assert store.compared(Space(CONV, 1)) == {}
    store.close()


def test_clocks_that_are_set_back(tmp_path, monkeypatch):
    """A later comparison is a later one."""
    default, first, second = Space(CONV, 1).schedules[:3]
    for clock, schedule in ((2e18, first), (1e18, second), (0, first)):
        monkeypatch.setattr("time.time_ns", lambda clock=clock: int(clock))
        compare(tmp_path, [(default, [1e-3] * 8), (schedule, [9e-4] * 8)])
        assert chosen(tmp_path, CONV) == schedule


def test_machines_are_not_compared_with_each_other(tmp_path):
    """Of two machines' records that were merged each counts beside its own default; a session goes on from those of its machine."""
    task = replace(CONV)
    spaces = [Space(task, 1, machine) for machine in ("a fast one", "a slow one")]
    default, first, second = spaces[0].schedules[:3]
    store = Store(tmp_path)
    for space, schedule, seconds in ((spaces[0], first, 3e-4), (spaces[1], default, 9e-3), (spaces[1], second, 10e-3)):
        store.commit(space, schedule, [seconds])
    store.close()
    assert chosen(tmp_path, CONV) == default, "the slow machine's default is no limit for the fast one's schedule"
    store = Store(tmp_path)
    assert [set(store.measured(space)) for space in spaces] == [{first}, {default, second}]
    store.close()
    text = report.table(report.summarise(tmp_path)[0])
    assert "a fast one, x86" in text and "a slow one, x86" in text and text.count("1 thread\n") == 2


def test_show_counts_candidates_once(tmp_path):
    default, first = Space(CONV, 1).schedules[:2]
    commit(tmp_path, (default, [1e-3]), (first, [9e-4]), (Space(CONV, 1).schedules[2], []))
    compare(tmp_path, [(default, [1e-3] * 8), (first, [9e-4] * 8)])
    (one,) = report.summarise(tmp_path)[0]
    assert (one.measured, one.failed, one.threads, one.compared) == (2, 1, 1, "network") and one.gain == pytest.approx(1 / 0.9, rel=1e-4)
    head, _, line = report.table([one]).splitlines()
    assert head == f"{Space(CONV, 1).machine}, {ISA.name}, 1 thread" and line.split()[4:6] == ["2", "1"]


def test_what_is_damaged_is_said(tmp_path, monkeypatch):
    """Of both files, with the lines and what that costs, by show, merge and build; and nothing where all is sound."""
    folder, path = fill(tmp_path / "a"), str(tmp_path / "a" / records.WORKLOADS)
    assert records.damage(folder) == []
    wanted = chosen(folder, TURN)
    lines = (folder / records.WORKLOADS).read_text().splitlines()
    (folder / records.WORKLOADS).write_text("damaged\n" + lines[1] + "\n")
    with open(folder / records.RECORDS, "a") as file:
        file.write("[0, \n")
    count = len(records.read(folder)[0])
    texts = f"{folder / records.RECORDS}: line {count + 1} cannot be read", f"{path}: line 1 cannot be read; the records count"
    runner = CliRunner()
    shown = runner.invoke(cli.main, ["tune", "show", str(folder)])
    merged = runner.invoke(cli.main, ["tune", "merge", str(folder), "--output", str(tmp_path / "b")])
    model = tmp_path / "net.onnx"
    model.touch()
    monkeypatch.setattr(bnntvm, "build", lambda *_, **__: (_ for _ in ()).throw(bnntvm.BnnError("not built here")))
    built = runner.invoke(cli.main, ["build", str(model), "--tuning", str(folder)])
    for done in (shown, merged, built):
        assert all(text in done.output for text in texts), done.output
    assert CONV.id in shown.output and "transpose" in shown.output and chosen(folder, TURN) == wanted
    (folder / records.WORKLOADS).write_text(lines[0] + "\n")
    assert records.damage(folder)[1].startswith(f"{path}: line 2 missing")
    assert records.damage(tmp_path / "b") == []


def test_a_merge_into_a_damaged_folder_throws_nothing_away(tmp_path):
    folder = fill(tmp_path / "a")
    with open(folder / records.RECORDS, "a") as file:
        file.write("[0, \n")
    records.merge([fill(tmp_path / "b", (DENSE,))], folder)
    assert (folder / (records.RECORDS + ".damaged")).read_text() == "[0, \n" and records.read(folder)[1] == []


def test_where_there_are_no_records(tmp_path):
    """What is there instead is said."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a").touch()
    (tmp_path / "file").touch()
    model = tmp_path / "net.onnx"
    model.touch()
    for name, why in (("empty", "the folder is empty"), ("other", "has no file database_tuning_record.json"), ("file", "this is a file"),
                      ("none", "there is no such folder")):  # fmt: skip
        with pytest.raises(bnntvm.BnnError, match=f"(?s)no tuning records here.*where: {tmp_path / name}.*{why}.*bnntvm tune MODEL"):
            records.Tuned([tmp_path / name])


nonsense = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["bnn.task", "bnn.field.x:1|[2", "v1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=6)  # fmt: skip


def _places(value, at=()):
    """Where the parts of nested lists are."""
    yield at
    for i, one in enumerate(value if isinstance(value, list) else ()):
        yield from _places(one, (*at, i))


@settings(max_examples=300, deadline=None)
@given(pick=st.integers(0, 10**6), instead=nonsense)
def test_whatever_a_line_says(tmp_path_factory, pick, instead):
    """Any part of a line may be anything: it is a record, or it is none, and nothing else is lost."""
    line = _a_line()
    places = list(_places(line))
    changed = part = [json.loads(json.dumps(line))]
    for i in (path := (0, *places[pick % len(places)]))[:-1]:
        part = part[i]
    part[path[-1]] = instead
    folder = tmp_path_factory.mktemp("db")
    (folder / records.RECORDS).write_text(json.dumps(changed[0]) + "\n" + json.dumps(line) + "\n")
    found, bad = records.read(folder)
    assert len(found) + len(bad) == 2 and 1 not in bad[1:] and found
    chosen(folder, CONV)
    report.table(report.summarise(folder)[0])
    records.damage(folder)
    store = Store(folder)
    assert len(store.database) >= 1
    store.close()
    assert len((folder / records.WORKLOADS).read_text().splitlines()) <= 3, "a number that is far off costs no memory"


def _a_line():
    if not hasattr(_a_line, "kept"):
        with tempfile.TemporaryDirectory() as folder:
            commit(pathlib.Path(folder), (Space(CONV, 1).default, [1e-3, 2e-3]))
            _a_line.kept = json.loads(pathlib.Path(folder, records.RECORDS).read_text())
    return _a_line.kept


def test_lines_that_no_parser_takes(tmp_path):
    """Deeply nested brackets, numbers without end, in both files."""
    folder = fill(tmp_path)
    count = len(records.read(folder)[0])
    for name in (records.RECORDS, records.WORKLOADS):
        with open(folder / name, "a") as file:
            file.write("[" * 100_000 + "\n" + '["1", ' + "9" * 5000 + "]\n" + json.dumps(["1", "A" * 8 + base64.b64encode(
                b"[" * 99_999).decode()]) + "\n")  # fmt: skip
    assert len(records.read(folder)[0]) == count and len(records.damage(folder)) == 2
    report.summarise(folder)
    store = Store(folder)
    assert store.damaged == 6 and len(store.database) == count
    store.close()
    assert records.damage(folder) == []


def test_a_session_that_was_killed_while_it_compared(tmp_path):
    """Of a comparison there is the default only: it does not count, and the next session compares."""
    default, first = Space(CONV, 1).schedules[:2]
    commit(tmp_path, (default, [1e-3]), (first, [5e-4]))
    compare(tmp_path, [(default, [1e-3] * 8)])
    assert chosen(tmp_path, CONV) == first
    store = Store(tmp_path)
    assert store.compared(Space(CONV, 1)) == {}
    store.close()


def test_databases_that_cannot_be_written(tmp_path, monkeypatch):
    """Wherever that shows: a message."""
    (tmp_path / "file").touch()
    with pytest.raises(bnntvm.BnnError, match="(?s)cannot be written.*where: .*file"):
        Store(tmp_path / "file")
    folder = fill(tmp_path / "a")
    with open(folder / records.RECORDS, "a") as file:
        file.write("[0, \n")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def no_room(*_args, **_kwargs):
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(records, "_replace", no_room)
        with pytest.raises(bnntvm.BnnError, match="(?s)cannot be written.*No space left"):
            Store(folder)
    with monkeypatch.context() as patch:
        patch.setattr(ms.database, "JSONDatabase", no_room)
        with pytest.raises(bnntvm.BnnError, match="(?s)cannot be written.*No space left"):
            Store(folder)
    store = Store(folder)
    (folder / "failures.json").mkdir()
    with pytest.raises(bnntvm.BnnError, match="(?s)cannot be written.*Is a directory"):
        store.commit(Space(CONV, 1), Space(CONV, 1).default, [], "crashed")
    store.close()
