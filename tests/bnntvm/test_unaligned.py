"""Inputs may lie anywhere in memory, though vector code assumes aligned buffers; results are the caller's."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import bnntvm
from bnntvm.targets.x86 import LEVELS, host_flags

RUNNABLE = [isa.name for isa in LEVELS if isa.needs <= host_flags()]


def network():
    """Sign and a binary convolution, beside a float convolution of the same input."""
    rng = np.random.default_rng(0)
    binary = np.where(rng.random((40, 33, 3, 3)) < 0.5, -1, 1).astype(np.float32)
    real = rng.integers(-4, 5, (9, 33, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Sign", ["x"], ["s"]),
        helper.make_node("Conv", ["s", "b"], ["y"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x", "r"], ["z"], pads=[1, 1, 1, 1]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 33, 7, 9])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, c, 7, 9]) for name, c in (("y", 40), ("z", 9))]
    initializers = [numpy_helper.from_array(binary, "b"), numpy_helper.from_array(real, "r")]
    graph = helper.make_graph(nodes, "unaligned", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("level", RUNNABLE)
def test_any_alignment_of_an_element(level):
    onnx.checker.check_model(network())
    module = bnntvm.build(network(), target=level, threads=1)
    x = np.random.default_rng(1).integers(-3, 4, (1, 33, 7, 9)).astype(np.float32)
    want = module.run({"x": x})
    memory = np.zeros(x.size + 16, np.float32)
    for offset in (1, 3, 4, 7):
        shifted = memory[offset : offset + x.size].reshape(x.shape)
        shifted[:] = x
        got = module.run({"x": shifted})
        assert all(np.array_equal(got[name], want[name]) for name in want)
        np.testing.assert_array_equal(shifted, x)


def test_a_result_outlives_the_next_run():
    module = bnntvm.build(network(), threads=1)
    x = np.random.default_rng(1).standard_normal((1, 33, 7, 9)).astype(np.float32)
    first = module.run({"x": x})
    kept = {name: array.copy() for name, array in first.items()}
    second = module.run({"x": -x})
    assert all(np.array_equal(first[name], kept[name]) for name in kept)
    second["y"][...] = 5
    assert np.array_equal(module.run({"x": x})["y"], kept["y"])


def test_a_feed_like_the_last_one_is_checked_all_the_same():
    module = bnntvm.build(network(), threads=1)
    x = np.random.default_rng(1).integers(-3, 4, (1, 33, 7, 9)).astype(np.float32)
    want = module.run({"x": x})
    for _ in range(2):
        again = module.run({"x": x})
        assert list(again) == list(want) and all(np.array_equal(again[name], want[name]) for name in want)
        for bad, why in ((np.nan, "not finite"), (np.inf, "not finite")):
            spoilt = x.copy()
            spoilt[0, 32, 6, 8] = bad
            with pytest.raises(bnntvm.InputError, match=why):
                module.run({"x": spoilt})
            assert np.isfinite(module.run({"x": spoilt}, check_finite=False)["y"]).all()
        for feed in ({"x": x[:, :, :6]}, {"x": x.astype(np.float64)}, {"z": x}, {"x": x, "z": x}, {}, {"x": None}):
            with pytest.raises(bnntvm.InputError):
                module.run(feed)
        for form in (x.astype(">f4"), np.asfortranarray(x), x[::-1], x.tolist()):
            got = module.run({"x": form})
            assert all(np.array_equal(got[name], want[name]) for name in want)
