"""What surrounds a build: targets, the compiler that links, temporary files."""

import shutil
import sys

import numpy as np
import pytest
import tvm
from onnx import helper, numpy_helper

import bnntvm
from bnntvm import build as _  # noqa: F401  (the submodule, which the function's name hides)

building = sys.modules["bnntvm.build"]


@pytest.fixture(scope="module")
def network():
    weight = np.where(np.random.default_rng(0).random((8, 3)) < 0.5, -1, 1).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Sign", ["x"], ["s"]), helper.make_node("MatMul", ["s", "w"], ["y"])],
        "network",
        [helper.make_tensor_value_info("x", 1, ["N", 8])],
        [helper.make_tensor_value_info("y", 1, ["N", 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


def outputs(module):
    return module(np.ones((2, 8), np.float32))


@pytest.mark.parametrize("target", [{"kind": "llvm", "mcpu": "x86-64-v2"}, tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v2"})])
def test_targets_of_tvm(network, target):
    assert bnntvm.build(network, target).report.target == "x86-64-v2"


@pytest.mark.parametrize(
    "target",
    [
        "arm",
        "",
        None,
        5,
        [],
        {},
        {"kind": "cuda", "arch": "sm_35"},
        "sm_70",
        {"kind": "llvm", "mtriple": "riscv64-linux-gnu"},
        tvm.target.Target("c"),
    ],
)
def test_unknown_targets(network, target):
    with pytest.raises(bnntvm.TargetError, match="unknown target"):
        bnntvm.build(network, target)


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "/bin/false", "/bin/true", "cc --no-such-option", "cc 'unbalanced"])
@pytest.mark.parametrize("variable", ["CC", "CXX"])
def test_compilers_that_are_none(network, monkeypatch, variable, compiler):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(variable, compiler)
    with pytest.raises(bnntvm.ToolchainError, match=compiler):
        bnntvm.build(network)


def test_no_compiler_at_all(network, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(bnntvm.ToolchainError, match="apt-get install gcc"):
        bnntvm.build(network)


@pytest.mark.parametrize("compiler", [" ", "cc -O1", "env cc"])
def test_compilers_with_options(network, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    assert outputs(bnntvm.build(network)).shape == (2, 3)


def test_no_room_for_temporary_files(network, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 20, 1 << 20, 100))
    with pytest.raises(bnntvm.ToolchainError, match="TMPDIR"):
        bnntvm.build(network)


def test_threads_are_checked_before_anything_is_compiled(network, monkeypatch):
    monkeypatch.setattr(building, "import_model", None)
    with pytest.raises(bnntvm.BnnError, match="not a number of threads"):
        bnntvm.build(network, threads=0)


def test_kernels_keep_their_word_that_buffers_do_not_overlap(network, monkeypatch):
    """TVM takes what one function of a module says for all: a function without the promise made LLVM reload what it had."""
    compiled = []
    link = building.Processor.link
    monkeypatch.setattr(building.Processor, "link", lambda self, made, path, isa: (compiled.append(made), link(self, made, path, isa)))
    bnntvm.build(network, "x86-64-v2")
    (code,) = [library for library in compiled[0].executable.mod.imports if library.kind == "llvm"]
    text = code.inspect_source("ll")
    assert "shape_func" in text  # it has no promise of its own
    assert "!tbaa" in text and "tvm-alias" not in text
