"""Exported networks against ONNX Runtime, and the files around them."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

import bnntvm
from bnntvm.c99 import kernels
from bnntvm.cli import main
from bnntvm.schedules import families
from tests.c99.native import execute, run
from tests.fuzz.check import differences
from tests.fuzz.networks import generate
from tests.importer.helpers import reference


@pytest.mark.parametrize("seed", range(14))
def test_random_networks(seed, tmp_path):
    """Exact arithmetic of every kind of layer, bit for bit."""
    network = generate(seed)
    batch = next(iter(network.feed.values())).shape[0]
    status, outputs = execute(network.model, network.feed, tmp_path / "net", batch=batch)
    assert status == 0
    assert differences(outputs, reference(network.reference, network.feed)) is None
    sizes = json.loads((tmp_path / "net" / "size.json").read_text())
    assert sizes["workspace"] == sizes["lower_bound"]


def test_not_finite(tmp_path):
    """NaN and infinity are answered by a status, and leave the outputs alone."""
    network = generate(3)
    ((name, array),) = network.feed.items()
    for value in (np.nan, np.inf, -np.inf):
        bad = array.copy()
        bad.flat[-1] = value
        status, outputs = execute(network.model, {name: bad}, tmp_path / f"{value}", batch=array.shape[0])
        assert status == 1 and not any(out.any() for out in outputs)


def test_same_bytes(tmp_path):
    """The same model gives the same files."""
    network = generate(5)
    for name in "ab":
        bnntvm.export_c(network.model, tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) > 10
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


@pytest.mark.parametrize("name", ["", "1net", "a b", "while", "a-b", "main", "bnn", 7])
def test_bad_name(name, tmp_path):
    with pytest.raises(bnntvm.BnnError, match="no name for C"):
        bnntvm.export_c(generate(3).model, tmp_path / "net", name=name)


def test_folder_in_use(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(bnntvm.BnnError, match="not empty"):
        bnntvm.export_c(generate(3).model, tmp_path)
    with pytest.raises(bnntvm.BnnError, match="could not be written"):
        bnntvm.export_c(generate(3).model, tmp_path / "file")


@pytest.mark.parametrize("existed", [False, True])
def test_nothing_is_left_of_a_failure(tmp_path, monkeypatch, existed):
    """A full disk after some files: the folder is as it was, and the same command works the next time."""
    folder, write = tmp_path / "net", pathlib.Path.write_text
    if existed:
        folder.mkdir()

    def full(path, *arguments, **options):
        if path.name == "mps2.ld":
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(bnntvm.BnnError, match="No space left"):
        bnntvm.export_c(generate(3).model, folder, vectors=False)
    assert list(folder.iterdir()) == [] if existed else not folder.exists()
    monkeypatch.undo()
    bnntvm.export_c(generate(3).model, folder, vectors=False)


def _graph(nodes, inputs, outputs, constants=()):
    """A model; ``inputs`` and ``outputs`` are (name, type, shape)."""
    infos = [[helper.make_tensor_value_info(n, t, s) for n, t, s in tensors] for tensors in (inputs, outputs)]
    graph = helper.make_graph(nodes, "graph", *infos, [numpy_helper.from_array(array, name) for name, array in constants])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


def _check(model, feed, folder, **options):
    status, outputs = execute(model, feed, folder, **options)
    assert status == 0
    for got, wanted in zip(outputs, reference(model, feed), strict=True):
        np.testing.assert_array_equal(got, wanted)


ODD_NAMES = [
    "class",
    "a b",
    "a/b",
    "workspace",
    "x",
    "X",
    "*/ ??/",
    "AT",
    "main",
    "n",
    "printf",
    "net",
    "9",
    "naïve",
    "MODEL_OK",
    "hash",
    "exp",
    "_Bool",
    "linux",
    "uint32_t",
    "finite_float",
    "x" * 5000,
    "x" * 5000 + "y",
]


def test_odd_names(tmp_path):
    """Names that are keywords, macros, functions, the same in capitals, or end a comment; in the example and in C++ too."""
    inputs = [(name, 1, [3]) for name in ODD_NAMES]
    nodes = [helper.make_node("Neg", [name], [f"-{name}"]) for name in ODD_NAMES]
    model = _graph(nodes, inputs, [(f"-{name}", 1, [3]) for name in ODD_NAMES])
    feed = {name: np.arange(3, dtype=np.float32) + i for i, name in enumerate(ODD_NAMES)}
    _check(model, feed, tmp_path / "net")
    bnntvm.export_c(model, tmp_path / "example")
    assert run(["make", "-s", "check"], tmp_path / "example").endswith("ok\n")
    for compiler in filter(shutil.which, ("g++", "clang++")):
        run([compiler, "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-x", "c++", "model.h"], tmp_path / "example")


def test_types_and_shared_results(tmp_path):
    """Every type of tensor; results that are an input, a constant, another result, the same again in another shape."""
    kinds = {"f": 1, "u": 2, "i8": 3, "i32": 6, "i64": 7, "b": 9}
    nodes = [
        helper.make_node("Identity", ["f"], ["same"]), helper.make_node("Cast", ["u"], ["y"], to=1), helper.make_node("Neg", ["i8"], ["z"]),
        helper.make_node("Add", ["i32", "i32"], ["w"]), helper.make_node("Not", ["b"], ["nb"]),
        helper.make_node("Gather", ["table", "i64"], ["row"]), helper.make_node("Identity", ["table"], ["constant"]),
        helper.make_node("Relu", ["f"], ["r"]), helper.make_node("Reshape", ["r", "shape"], ["r2"]), helper.make_node("Neg", ["r"], ["r3"]),
    ]  # fmt: skip
    results = [("same", 1, [4]), ("y", 1, [4]), ("z", 3, [4]), ("w", 6, [4]), ("nb", 9, [4]), ("row", 1, [4, 2])]
    results += [("constant", 1, [3, 2]), ("r", 1, [4]), ("r2", 1, [2, 2]), ("r3", 1, [4])]
    constants = [("table", np.arange(6, dtype=np.float32).reshape(3, 2)), ("shape", np.array([2, 2]))]
    model = _graph(nodes, [(name, kind, [4]) for name, kind in kinds.items()], results, constants)
    values = {"f": np.float32([-1, 2, 0, 3]), "u": np.uint8([0, 255, 3, 9]), "i8": np.int8([-127, 3, 0, 127])}
    values |= {"i32": np.int32([-(2**30), 5, 6, 2**29]), "i64": np.array([0, 2, 1, 2]), "b": np.array([True, False, True, True])}
    _check(model, values, tmp_path / "net")


@pytest.mark.parametrize("kind, dtype", [(3, np.int8), (4, np.uint16), (6, np.int32), (7, np.int64)])
def test_integers_wrap(kind, dtype, tmp_path):
    """Arithmetic of integers is modulo 2^bits, also within an expression; the compiled C traps where it is undefined."""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    feed = {"a": np.array([low, high, high, 3, high // 2 + 1], dtype), "b": np.array([high, low, high, -3 % (high + 1), 2], dtype)}
    nodes = [helper.make_node(op, ["a", "b"], [op]) for op in ("Add", "Sub", "Mul")] + [helper.make_node("Greater", ["Add", "a"], ["more"])]
    results = {"Add": feed["a"] + feed["b"], "Sub": feed["a"] - feed["b"], "Mul": feed["a"] * feed["b"]}
    results["more"] = results["Add"] > feed["a"]
    if low:
        nodes += [helper.make_node(op, ["a"], [op]) for op in ("Neg", "Abs")]
        results |= {"Neg": -feed["a"], "Abs": np.abs(feed["a"])}
    outputs = [(name, 9 if name == "more" else kind, [5]) for name in results]
    status, got = execute(_graph(nodes, [("a", kind, [5]), ("b", kind, [5])], outputs), feed, tmp_path / "net")
    assert status == 0
    for name, array in zip(results, got, strict=True):
        np.testing.assert_array_equal(array, results[name], err_msg=name)


def test_dynamic_batch(tmp_path):
    """``batch`` images at once, one by default."""
    nodes = [helper.make_node("Sign", ["x"], ["s"]), helper.make_node("MatMul", ["s", "w"], ["y"])]
    weights = np.random.default_rng(0).choice(np.float32([-1, 1]), (40, 7))
    model = _graph(nodes, [("x", 1, ["N", 40])], [("y", 1, ["N", 7])], [("w", weights)])
    for batch in (1, 5):
        x = np.random.default_rng(batch).standard_normal((batch, 40)).astype(np.float32)
        _check(model, {"x": x}, tmp_path / str(batch), batch=batch)
    with pytest.raises(bnntvm.BnnError, match="batch"):
        bnntvm.export_c(model, tmp_path / "none", batch=0)


def test_refused_by_name(tmp_path):
    """What has no C is named, and nothing is written."""
    model = _graph([helper.make_node("Sin", ["x"], ["y"])], [("x", 1, [3])], [("y", 1, [3])])
    with pytest.raises(bnntvm.UnsupportedError, match="standalone C has no operator sin"):
        bnntvm.export_c(model, tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_every_specification_has_c():
    """All that lowering makes."""
    missing = [kind for kind in families.FAMILIES if kernels.anchor_of.dispatch(kind) is kernels.anchor_of.dispatch(object)]
    assert not missing


def test_as_the_module_computes(tmp_path):
    """Integer layers and float chains of single operations: the bits of the built module."""
    network = generate(9)
    status, outputs = execute(network.model, network.feed, tmp_path / "net", batch=next(iter(network.feed.values())).shape[0])
    assert status == 0
    for got, wanted in zip(outputs, bnntvm.build(network.model).run(network.feed).values(), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_command(tmp_path):
    """The command shows the table; the folder has the same in size.txt."""
    (tmp_path / "net.onnx").write_bytes(generate(3).model.SerializeToString())
    done = CliRunner().invoke(main, ["export-c", str(tmp_path / "net.onnx"), "-o", str(tmp_path / "c"), "--name", "digits", "--no-vectors"])
    assert done.exit_code == 0, done.output
    table = (tmp_path / "c" / "size.txt").read_text()
    assert "RAM    workspace" in done.output and table.split("\n\nworkspace:")[0].strip() in done.output
    assert "int digits_run(" in (tmp_path / "c" / "digits.h").read_text()
    assert CliRunner().invoke(main, ["export-c", str(tmp_path / "net.onnx"), "-o", str(tmp_path / "c")]).exit_code == 1


def test_infinite_results(tmp_path):
    """Constants and expected results that are infinite, which C has no constants for; without vectors the example says so."""
    nodes = [helper.make_node("Div", ["x", "zero"], ["d"]), helper.make_node("Max", ["x", "low"], ["y"])]
    constants = [("zero", np.zeros(3, np.float32)), ("low", np.float32([-np.inf, np.inf, 0]))]
    model = _graph(nodes, [("x", 1, [3])], [("d", 1, [3]), ("y", 1, [3])], constants)
    _check(model, {"x": np.float32([1, -2, 3])}, tmp_path / "net")
    bnntvm.export_c(model, tmp_path / "example")
    assert run(["make", "-s", "check"], tmp_path / "example").endswith("\nok\n")
    bnntvm.export_c(model, tmp_path / "plain", vectors=False)
    assert "nothing to compare with" in run(["make", "-s", "check"], tmp_path / "plain")
