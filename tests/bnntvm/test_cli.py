"""The command line: what it prints, where, and its exit status."""

import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner

import bnntvm
from bnntvm import linker
from bnntvm.cli import _summary, main
from bnntvm.targets import registry
from tests.bnntvm.remote.farm import farm

DIGITS = pathlib.Path(__file__).parents[2] / "tutorials" / "data" / "digits_bnn.onnx"


@pytest.fixture
def net(module, tmp_path):
    path = tmp_path / "net.bnn"
    module.export(path)
    return path


def invoke(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)


def test_help_shows_examples_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['bnntvm', '--help']\nfrom bnntvm.cli import main\ntry: main()\n"
        "except SystemExit: print(sorted({'numpy', 'tvm', 'tvm_ffi', 'onnx', 'rich'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "Examples:" in out and "bnntvm build" in out and out.splitlines()[-1] == "[]"
    for command in ("build", "run", "explain", "bench", "profile", "package", "rpc-server"):
        result = invoke(command, "--help")
        assert result.exit_code == 0 and f"bnntvm {command}" in result.output


def test_run_with_files(one_input, net, tmp_path, images):
    np.save(tmp_path / "x.npy", images)
    result = invoke("run", net, "--input", f"x={tmp_path / 'x.npy'}", "--output", tmp_path / "out")
    assert result.exit_code == 0
    assert result.output.splitlines()[0].startswith("y: float32[5, 3, 8, 8] from 0 to ")
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "y.npy"), one_input.reference(images))
    assert invoke("run", net, "-i", tmp_path / "x.npy").exit_code == 0
    assert invoke("run", net, "--random").output.startswith("y: float32[1, 3, 8, 8]")


@pytest.mark.parametrize(
    "args, words",
    [
        (["run", "NET"], "missing: x"),
        (["run", "NET", "-i", "z=X", "--random"], "unknown: 'z'"),
        (["run", "NET", "-i", "x=nothing.npy"], "could not be read"),
        (["run", "NET", "-i", "x=NET"], "could not be read"),
        (["run", "NET", "-i", "ARCHIVE"], "an archive of arrays"),
        (["run", "NET", "-i", "X", "-o", "NET/below"], "could not be written"),
        (["run", "BAD", "--random"], "not a bnntvm artefact"),
        (["explain", "BAD"], "not a bnntvm artefact"),
        (["bench", "NET", "--onnx", "X"], "ONNX Runtime cannot run this model"),
    ],
)
def test_user_errors_are_messages_with_status_1(net, tmp_path, images, args, words):
    np.save(tmp_path / "x.npy", images)
    np.savez(tmp_path / "x.npz", images)
    (tmp_path / "bad.bnn").write_bytes(b"nothing")
    places = {"NET": net, "X": tmp_path / "x.npy", "ARCHIVE": tmp_path / "x.npz", "BAD": tmp_path / "bad.bnn"}
    for name, place in places.items():
        args = [arg.replace(name, str(place)) for arg in args]
    result = invoke(*args)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and words in result.stderr
    assert "Traceback" not in result.output and result.stdout == ""


@pytest.mark.parametrize("many", [1, 20])
def test_integers_are_shown_with_all_their_digits(many):
    assert _summary(np.full(many, 1234567)).split()[-1] == "1234567"
    assert _summary(np.full(many, True)).split()[-1] == "True"
    assert _summary(np.full(many, 1 / 3, np.float32)).split()[-1] == "0.333333"


def test_wrong_usage_has_status_2(net, tmp_path):
    for args in (["run"], ["run", tmp_path / "none.bnn"], ["frobnicate"], ["bench", net, "--compare"], ["run", net, "--threads", "0"]):
        assert invoke(*args).exit_code == 2


def test_build_looks_at_where_the_artefact_goes_before_it_compiles(tmp_path, monkeypatch):
    def build(*args, **options):
        raise AssertionError("compiled")

    monkeypatch.setattr(bnntvm, "build", build)
    model, other = tmp_path / "net.bnn", tmp_path / "link"  # by default the artefact of a model of this name is the model
    model.write_bytes(DIGITS.read_bytes())
    other.symlink_to(model)
    for args in ([model], [model, "-o", model], [model, "-o", other]):
        result = invoke("build", *args)
        assert result.exit_code == 2 and "would replace the model" in result.output
    assert model.read_bytes() == DIGITS.read_bytes()
    result = invoke("build", DIGITS, "-o", tmp_path / "none" / "net.bnn")
    assert result.exit_code == 1 and "there is no folder" in result.stderr


def test_explain_as_text_and_json(net):
    assert "conv1" in invoke("explain", net).output
    assert json.loads(invoke("explain", net, "--json").output)["layers"][0]["kind"] == "binary"


def test_bench(net):
    result = invoke("bench", net, "--repeat", 10, "--threads", 1, "--batch", 2)
    assert result.exit_code == 0 and "1 thread:" in result.output and "10 runs" in result.output


def test_targets_names_every_level_and_what_this_machine_has():
    from bnntvm.targets.registry import names

    *lines, processors = invoke("targets").output.splitlines()
    assert [line.split()[0] for line in lines] == names() and "cortex-a72" in processors
    assert sum("what x86 means here" in line for line in lines) == 1


def test_build_then_run_a_real_model(tmp_path):
    built = invoke("build", DIGITS, "-o", tmp_path / "digits.bnn", "--target", "x86-64-v2")
    assert built.exit_code == 0 and "target x86-64-v2" in built.output and "of ONNX" in built.output
    assert invoke("run", tmp_path / "digits.bnn", "--random").output.startswith("logits: float32[1, 10] ")
    compared = invoke("bench", tmp_path / "digits.bnn", "--onnx", DIGITS, "--repeat", 10)
    assert "ONNX Runtime" in compared.output and compared.output.rstrip().endswith("x")
    loaded = bnntvm.load(tmp_path / "digits.bnn")
    assert loaded.report.target == "x86-64-v2"
    images = np.random.default_rng(0).random((3, 1, 8, 8), np.float32)
    singles = [loaded(images[i : i + 1]) for i in range(3)]  # a batch of one has an entry point of its own
    np.testing.assert_array_equal(loaded(images), np.concatenate(singles))
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(DIGITS.read_bytes()[:1000])
    result = invoke("build", broken)
    assert result.exit_code == 1 and "error:" in result.stderr and not (tmp_path / "broken.bnn").exists()


def test_profile(tmp_path):
    trace, picture, net = tmp_path / "trace.json", tmp_path / "roof.svg", tmp_path / "net.bnn"
    assert invoke("build", DIGITS, "-o", net).exit_code == 0
    result = invoke("profile", net, "--seconds", 0.05, "--threads", 1, "--json", "--chrome-trace", trace, "--roofline", picture)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    layers = [layer["output"] for layer in json.loads(invoke("explain", net, "--json").stdout)["layers"]]
    assert [call["layer"] for call in found["calls"] if call["layer"]] == layers
    assert len(json.loads(trace.read_text())["traceEvents"]) == len(found["calls"]) and picture.read_text().lstrip().startswith("<?xml")
    assert "us in kernels" in invoke("profile", net, "--seconds", 0.05).output


def test_profile_for_another_machine(monkeypatch):
    """Without a board: what to do is said, and nothing is compiled for a measurement that cannot be."""
    other = "x86-64-v2" if platform.machine() == "aarch64" else "aarch64"
    try:
        linker.compiler_for(registry.resolve(other))
    except bnntvm.ToolchainError:
        pytest.skip(f"no compiler for {other}")
    monkeypatch.setattr("bnntvm.profiling.profile._probe", lambda _: pytest.fail("the probe was compiled"))
    result = invoke("profile", DIGITS, "--target", other)
    assert result.exit_code == 1 and "error: built for " in result.stderr and "Traceback" not in result.stderr
    assert f"where: target {other}" in result.stderr and "rpc-server" in result.stderr and "--rpc HOST:PORT --key NAME" in result.stderr


def test_on_a_board(tmp_path):
    """run, bench and profile, of an artefact and of a model; a board that is not there."""
    net = tmp_path / "net.bnn"
    assert invoke("build", DIGITS, "-o", net).exit_code == 0
    with farm() as (address, _):
        board = ["--rpc", address, "--key", "test"]
        assert invoke("run", net, "--random", *board).output == invoke("run", net, "--random").output
        assert invoke("bench", net, "--repeat", 10, *board).output.startswith("bnntvm, 1 thread: ")
        assert "test at" in invoke("profile", DIGITS, "--seconds", 0.05, *board).output
        assert invoke("bench", net, "--compare", *board).exit_code == 2
        result = invoke("run", net, "--random", "--rpc", address, "--key", "other")
        assert result.exit_code == 1 and "no board of this key" in result.output


def test_ctrl_c_is_no_error_of_the_network(monkeypatch, tmp_path):
    """TVM makes other errors of a KeyboardInterrupt that goes through its code, and a build makes a message of those."""

    def interrupted(*_args, **_options):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise bnntvm.UnsupportedError("the network could not be compiled") from None

    monkeypatch.setattr(bnntvm, "build", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = CliRunner().invoke(main, ["build", str(DIGITS), "-o", str(tmp_path / "net.bnn")])
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 1 and "Aborted" in result.output and "compiled" not in result.output
