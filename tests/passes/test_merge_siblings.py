"""Layers of the same bits whose results are joined become one layer, whatever elementwise stands between."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from bnntvm.graph import dims
from bnntvm.passes.canonicalise import Canonicalise
from bnntvm.passes.fuse_epilogues import FuseEpilogues
from bnntvm.passes.merge_siblings import MergeSiblings
from bnntvm.spec import split_layers
from tests.passes.relax_nets import batchnorm, bipolar, c, calls, conv, find, fold, ints, module, quarters, same, signs

r = relax.op


def block(emit, x, parts=2, kernel=1, tail=lambda emit, y, x, i: emit(r.add(batchnorm(emit, y, i), x))):
    """ReActNet's: layers of the same signs, each with a BatchNorm of its own and the residual, side by side."""
    bits, channels, pads = bipolar(emit, x), dims(x)[-1], [kernel // 2] * 4
    made = [emit(conv(bits, signs(channels, kernel, kernel, channels, seed=i), f"layer{i}", pads=pads)) for i in range(parts)]
    return emit(r.concat([tail(emit, y, x, i) for i, y in enumerate(made)], 3))


def merged(before, *arrays):
    packed, _ = fold(Canonicalise()(before))
    after = MergeSiblings()(Canonicalise()(packed))
    same(before, after, *arrays)
    return after


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("channels", "parts"), [(32, 2), (64, 3)])
def test_siblings_with_a_residual(channels, parts, kernel):
    before = module(lambda emit, x: block(emit, x, parts, kernel), ("n", 4, 3, channels))
    after = merged(before, quarters(2, 4, 3, channels))
    (layer,) = find(after, "bnn.conv2d_bits")
    assert split_layers(str(layer.attrs["layer"])) == [f"layer{i}" for i in range(parts)] and dims(layer)[-1] == parts * channels
    (tile,) = find(after, "relax.tile")
    assert "concat" not in calls(after) and dims(tile)[-1] == parts * channels
    fused = FuseEpilogues()(after)
    same(before, fused, quarters(2, 4, 3, channels))
    assert "tile" not in calls(fused)  # an operand of the kernel
    assert [list(calls(fused, gv.name_hint)) for gv in fused.get_global_vars() if "conv2d_bits" in gv.name_hint] == [
        ["bnn.conv2d_bits", "astype", "multiply", "add", "tile", "add"]
    ]


def test_what_follows_belongs_to_the_kernel():
    def network(emit, x):
        joined = emit(r.nn.relu(batchnorm(emit, block(emit, x), 9)))
        return [joined, emit(conv(bipolar(emit, joined), signs(5, 1, 1, 64, seed=7), "next"))]

    after = FuseEpilogues()(merged(module(network, ("n", 4, 3, 32)), quarters(2, 4, 3, 32)))
    assert len([gv for gv in after.get_global_vars() if gv.name_hint.startswith("fused")]) == 3  # packing, the pair, the layer behind


def test_values_within_a_function_may_be_read_twice():
    """PReLU reads its argument three times."""

    def tail(emit, y, x, i):
        y = batchnorm(emit, y, i)
        return emit(r.where(emit(r.less(y, c(0.0))), emit(r.multiply(y, c(0.25 + i))), y))

    after = merged(module(lambda emit, x: block(emit, x, tail=tail), ("n", 4, 3, 32)), quarters(2, 4, 3, 32))
    assert len(find(after, "bnn.conv2d_bits")) == 1 and "concat" not in calls(after)


def _another_residual(emit, y, x, i):
    return emit(r.add(y, emit(r.nn.relu(x)) if i else x))


def _another_function(emit, y, x, i):
    return emit(r.nn.relu(y) if i else r.abs(y))


def _constants_of_every_pixel(emit, y, x, i):
    return emit(r.add(y, c(ints(1, 4, 3, 1, seed=i))))


@pytest.mark.parametrize("tail", [_another_residual, _another_function, _constants_of_every_pixel])
def test_different_functions_stay_apart(tail):
    after = merged(module(lambda emit, x: block(emit, x, tail=tail), ("n", 4, 3, 32)), quarters(2, 4, 3, 32))
    assert len(find(after, "bnn.conv2d_bits")) == 2 and "concat" in calls(after)


def test_a_part_that_is_read_elsewhere_stays():
    def network(emit, x):
        bits = bipolar(emit, x)
        a, b = (emit(conv(bits, signs(32, 1, 1, 32, seed=i), f"layer{i}")) for i in range(2))
        return [emit(r.concat([a, b], 3)), emit(r.nn.relu(a))]

    assert len(find(merged(module(network, ("n", 4, 3, 32)), quarters(2, 4, 3, 32)), "bnn.conv2d_bits")) == 2


@pytest.mark.parametrize(("first", "second"), [(20, 32), (32, 20), (33, 33)])
def test_parts_of_broken_words_stay(first, second):
    def network(emit, x):
        bits = bipolar(emit, x)
        return emit(r.concat([emit(conv(bits, signs(n, 1, 1, 32, seed=i), f"layer{i}")) for i, n in enumerate((first, second))], 3))

    assert len(find(merged(module(network, ("n", 4, 3, 32)), quarters(2, 4, 3, 32)), "bnn.conv2d_bits")) == 2


def test_parts_of_different_sizes_without_a_residual_are_merged():
    def network(emit, x):
        bits = bipolar(emit, x)
        parts = [batchnorm(emit, emit(conv(bits, signs(n, 1, 1, 32, seed=n), f"layer{n}")), n) for n in (64, 32)]
        return emit(r.concat(parts, 3))

    (layer,) = find(merged(module(network, ("n", 4, 3, 32)), quarters(2, 4, 3, 32)), "bnn.conv2d_bits")
    assert dims(layer)[-1] == 96


def test_different_data_or_windows_stay_apart():
    def network(emit, x, y):
        a = emit(conv(bipolar(emit, x), signs(32, 1, 1, 32), "a"))
        b = emit(conv(bipolar(emit, y), signs(32, 1, 1, 32, seed=1), "b"))
        wide = emit(conv(bipolar(emit, x), signs(32, 3, 3, 32, seed=2), "c", pads=[1] * 4))
        return [emit(r.concat([a, b], 3)), emit(r.concat([emit(r.nn.relu(wide)), emit(r.nn.relu(emit(r.abs(a))))], 3))]

    before = module(network, ("n", 4, 3, 32), ("n", 4, 3, 32))
    assert len(find(merged(before, quarters(2, 4, 3, 32), quarters(2, 4, 3, 32, seed=1)), "bnn.conv2d_bits")) == 3


OPERATORS = [
    lambda emit, y, x, i: emit(r.add(y, x)),
    lambda emit, y, x, i: emit(r.multiply(x, y)),
    lambda emit, y, x, i: emit(r.maximum(y, c(quarters(32, seed=i)))),
    lambda emit, y, x, i: emit(r.add(y, c(0.5 + i))),
    lambda emit, y, x, i: emit(r.nn.relu(y)),
    lambda emit, y, x, i: emit(r.minimum(emit(r.maximum(y, c(-2.0))), c(3.0))),
    lambda emit, y, x, i: emit(r.subtract(y, emit(r.nn.relu(y)))),
]


@settings(max_examples=40, deadline=None)
@given(chain=st.lists(st.sampled_from(range(len(OPERATORS))), max_size=6), parts=st.integers(2, 3), kernel=st.sampled_from([1, 3]))
def test_random_functions(chain, parts, kernel):
    def tail(emit, y, x, i):
        for number in chain:
            y = OPERATORS[number](emit, y, x, i)
        return y

    before = module(lambda emit, x: block(emit, x, parts, kernel, tail), ("n", 4, 3, 32))
    after = merged(before, quarters(2, 4, 3, 32))
    assert len(find(after, "bnn.conv2d_bits")) == 1
    same(before, FuseEpilogues()(after), quarters(2, 4, 3, 32))


def test_a_tile_that_no_layer_reads_is_computed():
    """By Relax's own operator: behind nothing, behind a pool, read twice, along other axes, of broken words."""

    def network(emit, x, y):
        twice = emit(r.tile(x, [1, 1, 1, 2]))
        pooled = emit(r.nn.max_pool2d(emit(r.tile(x, [1, 1, 1, 2])), [2, 2], layout="NHWC"))
        return [emit(r.add(twice, emit(r.nn.relu(twice)))), emit(r.add(pooled, c(1.0))), emit(r.tile(x, [1, 2, 1, 1])),
                emit(r.add(emit(r.tile(y, [1, 1, 1, 2])), c(ints(40))))]  # fmt: skip

    before = module(network, ("n", 4, 4, 32), ("n", 4, 4, 20))
    after = FuseEpilogues()(before)
    assert calls(after).count("tile") == 4
    same(before, after, quarters(2, 4, 4, 32), quarters(2, 4, 4, 20))


def test_the_merged_network_runs(tmp_path):
    """An ONNX network with ReActNet's block, on this machine, beside its verification in numpy."""
    import onnx
    from onnx import helper, numpy_helper

    import bnntvm

    rng = np.random.default_rng(0)
    weights = {f"w{i}": np.where(rng.random((32, 32, 1, 1)) < 0.5, -1, 1).astype(np.float32) for i in range(2)}
    nodes = [helper.make_node("Sign", ["x"], ["s"])]
    for i in range(2):
        nodes += [helper.make_node("Conv", ["s", f"w{i}"], [f"c{i}"]), helper.make_node("Add", [f"c{i}", "x"], [f"a{i}"])]
    nodes.append(helper.make_node("Concat", ["a0", "a1"], ["y"], axis=1))
    ends = [helper.make_tensor_value_info(n, 1, ["N", size, 5, 4]) for n, size in (("x", 32), ("y", 64))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(w, n) for n, w in weights.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    module_ = bnntvm.build(model, verify=True)
    kernels = {layer.output: layer.kernel for layer in module_.report.layers}
    assert kernels["c0"] == kernels["c1"] and kernels["c0"].startswith("binary_conv2d")
    x = quarters(3, 32, 5, 4)
    expected = [np.einsum("oi,nihw->nohw", weights[f"w{i}"][:, :, 0, 0], np.sign(x)) + x for i in range(2)]
    np.testing.assert_array_equal(module_(x), np.concatenate(expected, 1))
