"""Direct functions: the same results as the virtual machine's entry points, on memory that is shared out without overlap."""

import subprocess
import sys

import hypothesis
import numpy as np
import onnx
import pytest
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import bnntvm
from bnntvm import direct


def _signs(*shape):
    return np.where(np.random.default_rng(len(shape)).random(shape) < 0.5, -1, 1).astype(np.float32)


def _model(nodes, inputs, outputs, **constants):
    infos = [[helper.make_tensor_value_info(n, kind, shape) for n, (kind, shape) in group.items()] for group in (inputs, outputs)]
    graph = helper.make_graph(nodes, "net", *infos, [numpy_helper.from_array(v, k) for k, v in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def residual(batch):
    """Two binary convolutions with a residual each, a kernel of TVM's (Erf) and two results, the first of which is read again."""
    weights = {"w": _signs(40, 40, 3, 3), "v": _signs(40, 40, 3, 3)}
    nodes = [
        helper.make_node("Sign", ["x"], ["a"]),
        helper.make_node("Conv", ["a", "w"], ["b"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["b", "x"], ["c"]),
        helper.make_node("Sign", ["c"], ["d"]),
        helper.make_node("Conv", ["d", "v"], ["e"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["e", "c"], ["f"]),
        helper.make_node("Erf", ["f"], ["g"]),
    ]
    shape = [batch, 40, 7, 9]
    return _model(nodes, {"x": (1, shape)}, {"c": (1, shape), "g": (1, shape)}, **weights)


def types(batch):
    """A bool, an int64 and a float16 among the results."""
    nodes = [
        helper.make_node("Greater", ["x", "t"], ["more"]),
        helper.make_node("ArgMax", ["x"], ["most"], axis=1, keepdims=0),
        helper.make_node("Erf", ["x"], ["erf"]),
        helper.make_node("Cast", ["erf"], ["half"], to=10),
    ]
    kinds = {"more": (9, [batch, 5]), "most": (7, [batch]), "half": (10, [batch, 5])}
    return _model(nodes, {"x": (1, [batch, 5])}, kinds, t=np.zeros(1, np.float32))


def same(got, want):
    assert list(got) == list(want)
    for name in want:
        assert got[name].dtype == want[name].dtype
        np.testing.assert_array_equal(got[name], want[name])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Of a network, the module and the one without direct functions, from a library on disk."""

    def build(model, **options):
        path = tmp_path_factory.mktemp("direct") / "net.bnn"
        bnntvm.build(model, **options).export(path)
        loaded = bnntvm.load(path, threads=options.get("threads"))
        plain = bnntvm.load(path, threads=options.get("threads"))
        plain._manifest = {key: value for key, value in plain._manifest.items() if key != "direct"}
        plain._library, plain._idle[:] = None, []
        return loaded, plain

    return build


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", ["N", 1, 3])
@pytest.mark.parametrize("network", [residual, types])
def test_results_are_those_of_the_virtual_machine(exported, network, batch, threads):
    module, plain = exported(network(batch), threads=threads)
    assert ("main_1" if batch == "N" else "main") in module._manifest["direct"]["entries"]
    for seed in range(3):
        feed = module.random_feed(seed, batch=1 if batch == "N" else batch)
        kept = module.run(feed)
        copies = {name: array.copy() for name, array in kept.items()}
        same(kept, plain.run(feed))
        module.run(module.random_feed(seed + 10))  # results stay who asked for them
        same(kept, copies)


def test_a_direct_function_is_what_runs(exported, monkeypatch):
    module, plain = exported(residual("N"))
    feed, called = module.random_feed(), []
    monkeypatch.setattr("bnntvm.runtime._Direct.functions", lambda *_args: called.append(1) or {})
    module._idle.clear()
    module.run(feed)
    assert called
    plain.run(feed)
    assert len(called) == 1


def test_batches_in_turn(exported):
    module, plain = exported(residual("N"))
    for batch in (1, 2, 1, 5):
        feed = module.random_feed(batch, batch=batch)
        same(module.run(feed), plain.run(feed))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_found(exported, bad):
    nodes = [helper.make_node("Sign", ["x"], ["s"]), helper.make_node("MatMul", ["s", "w"], ["y"])]
    module, _ = exported(_model(nodes, {"x": (1, ["N", 70])}, {"y": (1, ["N", 8])}, w=_signs(70, 8)))
    assert module._manifest["direct"]["entries"] == ["main_1", "main_checked_1"]
    array = np.ones((1, 70), np.float32)
    module(array), module(array)
    array[0, 41] = bad
    with pytest.raises(bnntvm.InputError, match="x"):
        module(array)
    module(array, check_finite=False)
    array[0, 41] = 1
    module(array)


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ([helper.make_node("Identity", ["x"], ["y"])], {"y": (1, ["N", 4])}),
        ([helper.make_node("Identity", ["c"], ["y"]), helper.make_node("Erf", ["x"], ["z"])], {"y": (1, [4]), "z": (1, ["N", 4])}),
        ([helper.make_node("Erf", ["x"], ["y"]), helper.make_node("Identity", ["y"], ["z"])], {"y": (1, ["N", 4]), "z": (1, ["N", 4])}),
    ],
    ids=["input", "constant", "twice"],
)
def test_results_that_no_kernel_fills_for_itself_are_left_to_the_virtual_machine(exported, nodes, outputs):
    module, _ = exported(_model(nodes, {"x": (1, ["N", 4])}, outputs, c=np.arange(4, dtype=np.float32)))
    assert module._manifest["direct"]["entries"] == []
    feed = module.random_feed()
    first = module.run(feed)
    for array in first.values():
        array[...] = 7  # what the caller does with his results is no matter to later runs
    second = module.run(feed)
    assert not any((array == 7).any() for array in second.values())


def test_a_reshaped_result(exported):
    nodes = [helper.make_node("Erf", ["x"], ["e"]), helper.make_node("Reshape", ["e", "s"], ["y"])]
    module, plain = exported(_model(nodes, {"x": (1, [2, 6])}, {"y": (1, [3, 4])}, s=np.array([3, 4])))
    assert "main" in module._manifest["direct"]["entries"]
    same(module.run(module.random_feed()), plain.run(module.random_feed()))


def test_manifests_that_do_not_fit_their_library(exported):
    def run(**changes):
        module, _ = exported(residual("N"))
        module._manifest["direct"] |= changes
        module._library, module._idle[:] = None, []
        return module.run(module.random_feed())

    right = exported(residual("N"))[0]._manifest["direct"]
    with pytest.raises(bnntvm.ArtefactError, match="could not be loaded"):
        run(entries=["main_7"])
    with pytest.raises(bnntvm.BnnError, match="failed while it ran"):
        run(workspace_bytes=right["workspace_bytes"] - 64)
    with pytest.raises(bnntvm.BnnError, match="not enough memory"):
        run(workspace_bytes=1 << 60)
    with pytest.raises(bnntvm.BnnError, match="failed while it ran"):
        run(outputs=[[[1, 40, 7, 8], "float32", True], right["outputs"][1]])
    with pytest.raises(bnntvm.BnnError, match="failed while it ran"):
        run(outputs=right["outputs"][:1])


GLOBALLY = """
import ctypes, sys
import numpy as np
import bnntvm
from bnntvm import runtime
runtime.ffi()
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
module = bnntvm.load(sys.argv[2], threads=1)
np.save(sys.argv[3], module(np.load(sys.argv[4])))
"""


def test_a_library_calls_its_own_kernels(tmp_path):
    """Also where another network's are visible to all libraries of the process, under the same names."""
    for operation in ("Add", "Mul"):
        nodes = [helper.make_node("Sign", ["x"], ["a"]), helper.make_node("Conv", ["a", "w"], ["b"], pads=[1, 1, 1, 1])]
        nodes += [helper.make_node(operation, ["b", "x"], ["y"])]
        shape = [1, 32, 5, 5]
        module = bnntvm.build(_model(nodes, {"x": (1, shape)}, {"y": (1, shape)}, w=_signs(32, 32, 3, 3)), threads=1)
        module.export(tmp_path / f"{operation}.bnn")
    x = module.random_feed()["x"]
    np.save(tmp_path / "x.npy", x)
    words = [str(tmp_path / name) for name in ("Add.bnn", "Mul.bnn", "y.npy", "x.npy")]
    done = subprocess.run([sys.executable, "-c", GLOBALLY, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), module(x))


@hypothesis.given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 12), st.integers(0, 6)), max_size=25))
def test_memory_in_use_at_a_time_does_not_overlap(pieces):
    memories = [direct._Memory((size,), "uint8", first=first, last=first + more) for size, first, more in pieces]
    size = direct._place(memories)
    assert size <= sum(memory.size for memory in memories)
    for time in range(20):
        used = sorted((m.offset, m.offset + m.size) for m in memories if m.first <= time <= m.last and m.size)
        assert all(low % 64 == 0 and high <= size for low, high in used)
        assert all(end <= start for (_, end), (start, _) in zip(used, used[1:]))


def test_memory_is_used_again():
    """A chain needs room for its two largest neighbours, here also the two that are shared out first."""
    memories = [direct._Memory((size,), "float32", first=i, last=i + 1) for i, size in enumerate([160, 320, 320, 160, 80])]
    assert direct._place(memories) == 2 * 320 * 4
