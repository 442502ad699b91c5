"""The same bits on every machine: this one, aarch64 and armv7 under qemu-user, Cortex-M4 and Cortex-M7 on QEMU's models of Arm's boards."""

import shutil
import subprocess

import numpy as np
import pytest
from onnx import helper, numpy_helper

import bnntvm
from tests.c99.native import STRICT, run

#: What the exported Makefile is asked for.
MACHINES = ("check", "check-aarch64", "check-armv7", "check-m4", "check-m7")


def network():
    """A float stem, binary and ternary convolutions, pools, a residual sum, functions of a library, and a classifier."""
    rng = np.random.default_rng(0)
    constants = {
        "w0": rng.standard_normal((24, 3, 3, 3)), "w1": rng.choice([-1, 1], (40, 24, 3, 3)), "w2": rng.choice([-1, 0, 1], (40, 40, 3, 3)),
        "s": rng.standard_normal(40), "b": rng.standard_normal(40), "m": rng.integers(-9, 9, 40), "v": rng.random(40) + 0.5,
        "w3": rng.choice([-1, 1], (40, 10)), "one": np.ones(1),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], pads=[1] * 4, strides=[2, 2]), helper.make_node("Tanh", ["c0"], ["t0"]),
        helper.make_node("Sign", ["t0"], ["q0"]), helper.make_node("Conv", ["q0", "w1"], ["c1"], pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c1", "s", "b", "m", "v"], ["n1"]), helper.make_node("Sign", ["n1"], ["q1"]),
        helper.make_node("Conv", ["q1", "w2"], ["c2"], pads=[1] * 4), helper.make_node("Add", ["c2", "n1"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]), helper.make_node("Sigmoid", ["p"], ["g"]),
        helper.make_node("GlobalAveragePool", ["g"], ["a"]), helper.make_node("Flatten", ["a"], ["f"]),
        helper.make_node("MatMul", ["f", "w3"], ["l"]), helper.make_node("Softmax", ["l"], ["y"], axis=1),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "network", [helper.make_tensor_value_info("x", 1, ["N", 3, 17, 13])], [helper.make_tensor_value_info("y", 1, ["N", 10])],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model.SerializeToString()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("c99") / "network"
    bnntvm.export_c(network(), path, batch=2)
    return path


@pytest.fixture(scope="module")
def here(folder):
    return run(["make", "-s", "check"], folder)


@pytest.mark.parametrize("machine", MACHINES)
def test_same_bits(folder, here, machine):
    """The example finds what the interpreter says, and its hash of the output is this machine's."""
    assert run(["make", "-s", machine], folder) == here
    assert here.splitlines()[-1] == "ok"


def test_compilers_and_levels(folder, here):
    """Every C compiler that is installed, from no optimisation to the most, with popcount and without, and as C++'s guests."""
    sources = ["main.c", "model.c", "model_weights.c"]
    for compiler in filter(shutil.which, ("gcc", "clang")):
        for options in (["-O0"], ["-O3"], ["-Os", "-DBNN_NO_CHECK_FINITE"], ["-O2", "-march=native"]):
            run([compiler, *STRICT, *options, *sources, "-o", "one"], folder)
            assert run(["./one"], folder) == here, (compiler, options)


def test_wider_floats_are_refused(folder):
    """Where the compiler evaluates floats as doubles (x87, s390x), bits would differ: an error that says what to do."""
    command = ["gcc", "-std=c99", "-ffp-contract=off", "-fsyntax-only", "-U__FLT_EVAL_METHOD__"]
    for method, fine in (("0", True), ("16", True), ("1", False), ("2", False), ("-1", False)):
        done = subprocess.run([*command, f"-D__FLT_EVAL_METHOD__={method}", "model.c"], cwd=folder, capture_output=True, text=True)
        assert (done.returncode == 0) == fine, (method, done.stderr)
        assert fine or "-fexcess-precision=fast" in done.stderr


def test_no_library(folder):
    """The network's object files need nothing: no symbol of a C library, on this machine and on a Cortex-M."""
    arm = ["arm-none-eabi-gcc", "-mcpu=cortex-m4", "-mthumb", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard"]
    for compiler, symbols in ((["gcc"], "nm"), (arm, "arm-none-eabi-nm")):
        run([*compiler, *STRICT, "-O2", "-ffreestanding", "-fno-builtin", "-c", "model.c", "model_weights.c"], folder)
        defined = run([symbols, "--defined-only", "model.o", "model_weights.o"], folder).split()
        wanted = set(run([symbols, "--undefined-only", "model.o"], folder).split()) - {"U", *defined}
        assert all(name.startswith("__aeabi_") for name in wanted), wanted  # the compiler's own arithmetic
