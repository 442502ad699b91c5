"""The ``.bnn`` file: complete or refused, atomic, and never run on a machine that it was not made for."""

import fcntl
import json
import os
import pathlib
import resource
import signal
import struct
import subprocess
import sys
import textwrap

import numpy as np
import numpy.random._pcg64
import pytest

import bnntvm
from bnntvm import artefact
from bnntvm.module import Module


@pytest.fixture
def net(module, tmp_path):
    path = tmp_path / "net.bnn"
    module.export(path)
    return path


def test_round_trip(one_input, net, tmp_path, images):
    loaded = bnntvm.load(net, threads=1)
    np.testing.assert_array_equal(loaded.run({"x": images})["y"], one_input.reference(images))
    assert loaded.report.as_dict() == Module.from_library(one_input.path, one_input.manifest).report.as_dict()
    loaded.export(tmp_path / "again.bnn")
    assert (tmp_path / "again.bnn").read_bytes() == net.read_bytes()
    assert net.read_bytes().startswith(open(one_input.path, "rb").read())


def test_any_path_and_any_name(module, tmp_path, monkeypatch, images):
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "ünïcode.bnn", "with space.so", "-dash.bnn", "x" * 200):
        module.export(name)
        assert bnntvm.load(name).run({"x": images})
    assert (tmp_path / "plain").stat().st_mode & 0o777 == 0o666 & ~artefact._umask()


def test_every_cut_is_noticed(net):
    whole = net.read_bytes()
    manifest_start = len(whole) - 56 - struct.unpack_from("<Q", whole, len(whole) - 48)[0]
    for length in (0, 1, 4, 100, 4096, len(whole) // 2, manifest_start, len(whole) - 57, len(whole) - 8, len(whole) - 1):
        net.write_bytes(whole[:length])
        with pytest.raises(bnntvm.ArtefactError, match="not a bnntvm artefact"):
            bnntvm.load(net)
    net.write_bytes(whole + b"\n")
    with pytest.raises(bnntvm.ArtefactError):
        bnntvm.load(net)
    net.write_bytes(whole[:1000] + whole[1001:])
    with pytest.raises(bnntvm.ArtefactError, match="damaged"):
        bnntvm.load(net)


def test_every_flipped_bit_is_noticed(net):
    whole = bytearray(net.read_bytes())
    for position in [*range(0, len(whole), len(whole) // 97), *range(len(whole) - 60, len(whole))]:
        whole[position] ^= 0x10
        net.write_bytes(whole)
        with pytest.raises(bnntvm.ArtefactError):
            bnntvm.load(net)
        whole[position] ^= 0x10
    net.write_bytes(whole)
    bnntvm.load(net)


@pytest.mark.parametrize(
    "content, why", [(b"", "empty"), (b"\x08\x07\x12\x04" * 30, "ONNX"), (b"\x7fELF" * 30, "cut short"), (b"zip" * 40, "magic")]
)
def test_foreign_files_are_named_for_what_they_look_like(tmp_path, content, why):
    path = tmp_path / "foreign.bnn"
    path.write_bytes(content)
    with pytest.raises(bnntvm.ArtefactError, match=why):
        bnntvm.load(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(bnntvm.ArtefactError, match="No such file"):
        bnntvm.load(tmp_path / "none.bnn")
    with pytest.raises(bnntvm.ArtefactError, match="Is a directory"):
        bnntvm.load(tmp_path)


def _write(path, library, manifest):
    path.with_suffix(".part").write_bytes(library)
    with open(path.with_suffix(".part"), "rb") as file:
        artefact.write(file, manifest, path)


def test_other_cpu_and_other_architecture(one_input, net, tmp_path):
    library, path = open(one_input.path, "rb").read(), tmp_path / "other.bnn"
    needs = {"target": {"name": "x86-64-v9", "needs": ["sse2", "avx9000", "amx_moon"]}}
    _write(path, library, one_input.manifest | needs)
    with pytest.raises(bnntvm.TargetError, match="x86-64-v9(.|\n)*lacks avx9000, amx_moon"):
        bnntvm.load(path)
    arm = library[:18] + (183).to_bytes(2, "little") + library[20:]
    _write(path, arm, one_input.manifest)
    with pytest.raises(bnntvm.TargetError, match="built for aarch64, this machine is x86_64"):
        bnntvm.load(path)


def test_tile_registers_that_the_system_refuses(one_input, tmp_path, monkeypatch):
    library, path = open(one_input.path, "rb").read(), tmp_path / "tiles.bnn"
    monkeypatch.setattr(artefact, "host_flags", lambda: frozenset({"amx_tile"}))
    _write(path, library, one_input.manifest | {"target": {"name": "x86-64-v4-amx", "needs": ["amx_tile"]}})
    monkeypatch.setattr(artefact, "tile_permission", lambda: True)
    bnntvm.load(path)
    monkeypatch.setattr(artefact, "tile_permission", lambda: False)
    with pytest.raises(bnntvm.TargetError, match="tile registers(.|\n)*x86-64-v4-amx"):
        bnntvm.load(path)


def test_built_for_another_machine_can_be_exported_but_not_run(one_input, tmp_path, images):
    needs = {"target": {"name": "x86-64-v9", "needs": ["avx9000"]}}
    module = Module.from_library(one_input.path, one_input.manifest | needs)
    module.export(tmp_path / "v9.bnn")
    with pytest.raises(bnntvm.TargetError, match="avx9000"):
        module.run({"x": images})


def test_manifest_of_another_format_or_without_its_parts(one_input, net, tmp_path, monkeypatch):
    library, path = open(one_input.path, "rb").read(), tmp_path / "odd.bnn"
    incomplete = {key: value for key, value in one_input.manifest.items() if key != "layers"}
    _write(path, library, incomplete)
    with pytest.raises(bnntvm.ArtefactError, match="no proper layers"):
        bnntvm.load(path)
    monkeypatch.setattr(artefact, "FORMAT", 2)
    with pytest.raises(bnntvm.ArtefactError, match="has format 1(.|\n)*reads format 2"):
        bnntvm.load(net)


def rewritten(path, change=lambda manifest: None, library=None):
    """The artefact at ``path`` with another manifest or library, and a checksum that fits."""
    file, manifest, length = artefact.read(path)
    with file:
        change(manifest)
        whole = path.read_bytes()[:length] if library is None else library
    source, out = path.with_suffix(".so"), path.with_suffix(".changed")
    source.write_bytes(whole)
    with open(source, "rb") as opened:
        artefact.write(opened, manifest, out)
    return out


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(inputs=[1]),
        lambda m: m.update(inputs=[{"name": "x"}]),
        lambda m: m.update(layers=[{}]),
        lambda m: m.update(layers=[3]),
        lambda m: m["target"].update(needs=5),
        lambda m: m["target"].update(needs=[[1]]),
    ],
)
def test_manifest_of_another_shape(net, change):
    with pytest.raises(bnntvm.ArtefactError, match="manifest"):
        bnntvm.load(rewritten(net, change))


def test_somebody_elses_library_in_a_sound_file(net):
    foreign = pathlib.Path(numpy.random._pcg64.__file__).read_bytes()
    with pytest.raises(bnntvm.ArtefactError, match="could not be loaded"):
        bnntvm.load(rewritten(net, library=foreign))


@pytest.mark.parametrize("path", [None, 5, object(), "zero\0byte"])
def test_what_is_no_path(module, path):
    with pytest.raises(bnntvm.ArtefactError, match="not the path"):
        bnntvm.load(path)
    with pytest.raises(bnntvm.ArtefactError, match="not the path"):
        module.export(path)


def test_a_sound_file_around_something_that_is_no_library(one_input, tmp_path):
    path = tmp_path / "text.bnn"
    _write(path, b"no library at all", one_input.manifest)
    with pytest.raises(bnntvm.ArtefactError, match="could not be loaded"):
        bnntvm.load(path)


def test_export_over_an_artefact_in_use(one_input, two_inputs, net, images):
    old = bnntvm.load(net, threads=1)
    Module.from_library(two_inputs.path, two_inputs.manifest).export(net)
    new = bnntvm.load(net, threads=1)
    assert [info.name for info in new.inputs] == ["a", "b"]
    assert (new.run({"a": np.ones((2, 4), np.float16), "b": np.ones((2, 4), np.int64)})["sum"] == 2).all()
    np.testing.assert_array_equal(old.run({"x": images})["y"], one_input.reference(images))


def test_export_replaces_no_device_and_no_folder(module, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(bnntvm.ArtefactError, match="could not be written"):
            module.export(path)
    assert (tmp_path / "pipe").is_fifo() and [entry.name for entry in tmp_path.iterdir()] == ["pipe"]


def test_failed_export_leaves_the_old_file_and_no_rest(module, net, tmp_path, monkeypatch):
    before, names = net.read_bytes(), sorted(os.listdir(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # what a full disk looks like to the writer
    try:
        with pytest.raises(bnntvm.ArtefactError, match="could not be written(.|\n)*net.bnn"):
            module.export(net)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for place in (tmp_path / "no" / "folder.bnn", tmp_path, net / "below.bnn", tmp_path / ("n" * 300)):
        with pytest.raises(bnntvm.ArtefactError, match="could not be written"):
            module.export(place)
    assert net.read_bytes() == before and sorted(os.listdir(tmp_path)) == names


def test_two_processes_exporting_to_one_path(one_input, two_inputs, net):
    program = """
        import json, sys
        from bnntvm.module import Module
        module = Module.from_library(sys.argv[1], json.loads(sys.argv[2]), threads=1)
        for _ in range(60):
            module.export(sys.argv[3])
    """
    writers = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), built.path, json.dumps(built.manifest), str(net)])
        for built in (one_input, two_inputs)
    ]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        file, manifest, _ = artefact.read(net)  # raises if it is anything but one whole artefact
        file.close()
        seen.add(len(manifest["inputs"]))
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen <= {1, 2} and seen
    assert [name for name in os.listdir(net.parent) if name.endswith(".part")] == []


def test_a_writer_does_not_remove_what_another_is_about_to_rename(module, net, monkeypatch):
    rename = os.replace

    def others_come_first(part, path):
        artefact._remove_if_left(pathlib.Path(part))
        rename(part, path)

    net.unlink()
    monkeypatch.setattr(artefact.os, "replace", others_come_first)
    module.export(net)
    assert bnntvm.load(net).inputs == module.inputs


def test_modules_that_are_dropped_close_their_files(net, images):
    def open_files():
        return sum("net.bnn" in os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))

    for _ in range(20):
        bnntvm.load(net, threads=1).run({"x": images})
    assert open_files() == 0
    kept = [bnntvm.load(net, threads=1) for _ in range(3)]
    assert open_files() == 3 and len(kept) == 3


def test_what_a_killed_export_left_is_removed_and_what_another_writes_is_not(net, tmp_path):
    folder = tmp_path / "there"
    folder.mkdir()
    left, used, foreign = (folder / name for name in (".net.bnn.killed.part", ".net.bnn.writing.part", ".other.bnn.x.part"))
    for path in (left, used, foreign):
        path.write_bytes(b"half")
    with open(used, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        bnntvm.load(net).export(folder / "net.bnn")
    assert {p.name for p in folder.iterdir()} == {used.name, foreign.name, "net.bnn"}


def test_an_export_that_is_killed(net, tmp_path):
    """It leaves the old file as it was, and the next export removes what it left."""
    folder = tmp_path / "there"
    folder.mkdir()
    target = folder / "net.bnn"
    bnntvm.load(net).export(target)
    before = target.read_bytes()
    code = (
        "import os, signal, sys, bnntvm.artefact as a\n"
        "a._write_parts = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "import bnntvm; bnntvm.load(sys.argv[1]).export(sys.argv[2])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(net), str(target)])
    assert done.returncode == -signal.SIGKILL
    assert target.read_bytes() == before and len(list(folder.iterdir())) == 2
    bnntvm.load(net).export(target)
    assert [p.name for p in folder.iterdir()] == ["net.bnn"]
