"""A package outside bnntvm adds an operator: installed as a user would install it, found in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from bnntvm.errors import UnsupportedError
from bnntvm.importer import import_model

from .helpers import model

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(41)
X = np.array([[0.5, -0.5, 0.49, -0.49, 0, -0.0, 3, -3]], np.float32)

USE = """
import sys
import numpy as np
from bnntvm.importer import import_model, registry
from bnntvm.passes.infer_levels import infer_levels
from bnntvm.interpreter import run

imported = import_model(sys.argv[1])
given = np.load(sys.argv[2])
np.save(sys.argv[3], run(imported.mod, {"x": given})[0])
function = imported.mod["main"]
product = next(b.value for b in function.body.blocks[0].bindings if "bnn.matmul" in str(b.value))
print(*infer_levels(function).facts[product.args[0]].levels())
print(*np.unique(product.args[1].value.numpy()))
print("com.example::DeadZone" in registry.supported())
"""


def example():
    """DeadZone on an activation and on weights, then their product."""
    nodes = [
        helper.make_node("DeadZone", ["x", "two"], ["a"], name="activation", domain="com.example"),
        helper.make_node("DeadZone", ["w", "half"], ["b"], name="weights", domain="com.example", width=1.0),
        helper.make_node("MatMul", ["a", "b"], ["y"]),
    ]
    w = RNG.normal(size=(8, 5)).astype(np.float32)
    constants = {"w": w, "two": np.float32(2), "half": np.float32(0.5)}
    return model(nodes, {"x": X}, ["y"], constants, domains=["com.example"]), w


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the plugin installed in it, and nothing else."""
    source, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "tests" / "plugin", source)  # the build leaves files behind
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target"]
    done = subprocess.run([*pip, str(target), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def test_installed_plugin_is_found(site, tmp_path):
    proto, w = example()
    onnx.save(proto, tmp_path / "model.onnx")
    np.save(tmp_path / "x.npy", X)
    arguments = [str(tmp_path / name) for name in ("model.onnx", "x.npy", "y.npy")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", USE, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    activation = np.where(X >= 0.5, 2, np.where(X <= -0.5, -2, 0))
    weights = np.where(w >= 1, 0.5, np.where(w <= -1, -0.5, 0))
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), activation @ weights)
    levels, kinds, listed = done.stdout.split("\n")[:3]
    assert [float(v) for v in levels.split()] == [-2, 0, 2]
    assert [float(v) for v in kinds.split()] == [-0.5, 0, 0.5]
    assert listed == "True"


def test_without_the_plugin_the_operator_names_itself():
    with pytest.raises(UnsupportedError) as caught:
        import_model(example()[0])
    message = str(caught.value)
    assert "com.example::DeadZone" in message and "'activation'" in message and "bnntvm.importer" in message
