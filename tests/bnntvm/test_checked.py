"""Entry points that check inputs while they pack them: the same errors and results as a check beforehand."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import bnntvm


def _signs(rng, *shape):
    return np.where(rng.random(shape) < 0.5, -1, 1).astype(np.float32)


def _model(nodes, inputs, outputs, **constants):
    infos = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in group.items()] for group in (inputs, outputs)]
    graph = helper.make_graph(nodes, "net", *infos, [numpy_helper.from_array(v, k) for k, v in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def conv():
    nodes = [helper.make_node("Sign", ["x"], ["s"]), helper.make_node("Conv", ["s", "w"], ["y"], pads=[1, 1, 1, 1])]
    return _model(nodes, {"x": ["N", 40, 9, 9]}, {"y": ["N", 33, 9, 9]}, w=_signs(np.random.default_rng(0), 33, 40, 3, 3))


def dense():
    nodes = [helper.make_node("Sign", ["x"], ["s"]), helper.make_node("MatMul", ["s", "w"], ["y"])]
    return _model(nodes, {"x": ["N", 3, 70]}, {"y": ["N", 3, 8]}, w=_signs(np.random.default_rng(0), 70, 8))


def two_inputs():
    """One that is packed and one that a float layer reads; two results."""
    nodes = [
        helper.make_node("Sign", ["x"], ["s"]),
        helper.make_node("MatMul", ["s", "w"], ["y"]),
        helper.make_node("MatMul", ["f", "v"], ["z"]),
    ]
    rng = np.random.default_rng(0)
    weights = {"w": _signs(rng, 70, 8), "v": rng.standard_normal((5, 6)).astype(np.float32)}
    return _model(nodes, {"x": ["N", 70], "f": ["N", 5]}, {"y": ["N", 8], "z": ["N", 6]}, **weights)


def _feed(module, batch, seed=0):
    rng = np.random.default_rng(seed)
    return {i.name: rng.integers(-4, 5, [d if isinstance(d, int) else batch for d in i.shape]).astype(np.float32) for i in module.inputs}


def _same(got, want):
    assert list(got) == list(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("network, checked", [(conv, [True]), (dense, [True]), (two_inputs, [True, False])], ids=["conv", "dense", "two"])
def test_bad_values_are_refused_in_every_run(network, checked, threads, tmp_path):
    built = bnntvm.build(network(), threads=threads)
    built.export(tmp_path / "net.bnn")
    module = bnntvm.load(tmp_path / "net.bnn", threads=threads)
    assert module._checked_inputs == checked
    for batch in (1, 3):
        feed = _feed(module, batch)
        want = built.run(feed)
        for _ in range(3):  # the first run goes the long way
            _same(module.run(feed), want)
            _same(module.run(feed, check_finite=False), want)
        machines = len(module._idle)
        for name in feed:
            for at, bad in ((0, np.nan), (-1, np.inf), (feed[name].size // 2, -np.inf)):
                kept, feed[name].flat[at] = feed[name].flat[at], bad
                with pytest.raises(bnntvm.InputError, match=f"'{name}' is not finite: .*{'nan' if bad != bad else 'inf'}"):
                    module.run(feed)
                assert list(module.run(feed, check_finite=False)) == list(want)
                feed[name].flat[at] = kept
                _same(module.run(feed), want)
        assert len(module._idle) == machines  # a refused input costs no virtual machine


def test_networks_whose_inputs_no_packing_kernel_reads():
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = _model(nodes, {"x": ["N", 5]}, {"y": ["N", 6]}, w=np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32))
    module = bnntvm.build(model, threads=1)
    assert module._checked_inputs == [False]
    feed = _feed(module, 2)
    for _ in range(2):
        module.run(feed)
        with pytest.raises(bnntvm.InputError, match="not finite"):
            module.run({"x": feed["x"] * np.float32(np.inf)})
