"""What does not mix channels is computed on the parts of a concatenation."""

import numpy as np
import pytest
from tvm import relax

from bnntvm.graph import dims
from bnntvm.passes.canonicalise import Canonicalise
from bnntvm.passes.split_concats import SplitConcats
from tests.passes.relax_nets import batchnorm, bipolar, c, calls, conv, find, fold, module, quarters, same, signs

r = relax.op


def dense_block(emit, x, layers=3, growth=32):
    """Every layer sees all tensors before it through a BatchNorm of its own, scales of both signs and zero."""
    for i in range(layers):
        y = conv(bipolar(emit, batchnorm(emit, x, 2 * i)), signs(growth, 3, 3, int(x.ty.shape[-1]), seed=i), f"layer{i}", pads=[1] * 4)
        x = emit(r.concat([x, emit(y)], 3))
    return x


def checked(before, *arrays):
    packed, decisions = fold(Canonicalise()(before))
    assert {d.kind for d in decisions.values()} == {"binary"}
    after = SplitConcats()(packed)
    same(before, after, *arrays)
    return after


@pytest.mark.parametrize("channels", [32, 64])
def test_a_dense_block_packs_each_tensor_where_it_is_made(channels):
    after = checked(module(dense_block, ("n", 5, 4, channels)), quarters(2, 5, 4, channels))
    joined = find(after, "relax.concat")
    assert sum(str(call.ty.dtype) == "float32" for call in joined) == 1  # the result itself
    assert not any(dims(pack.args[0])[-1] > max(channels, 32) for pack in find(after, "bnn.pack"))


@pytest.mark.parametrize("channels", [20, 33])
def test_parts_that_are_no_whole_words_stay_joined(channels):
    packed, _ = fold(Canonicalise()(module(dense_block, ("n", 4, 4, channels))))
    assert calls(SplitConcats()(packed)) == calls(packed)


def test_the_last_part_may_end_within_a_word():
    def network(emit, x, y):
        joined = emit(r.concat([x, y], 3))
        return emit(conv(bipolar(emit, batchnorm(emit, joined, 3)), signs(5, 1, 1, 77)))

    after = checked(module(network, ("n", 3, 4, 64), ("n", 3, 4, 13)), quarters(2, 3, 4, 64), quarters(2, 3, 4, 13, seed=1))
    assert [str(call.ty.dtype) for call in find(after, "relax.concat")] == ["uint32"]


POOLS = {
    "max": lambda x: r.nn.max_pool2d(x, [2, 2], [2, 2], layout="NHWC"),
    "average": lambda x: r.nn.avg_pool2d(x, [3, 3], [2, 2], [1, 1, 1, 1], layout="NHWC"),
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype_parts", [(16, 32), (64, 16, 16)])
def test_a_pool_that_shrinks_moves_before_the_concatenation(pool, dtype_parts):
    def network(emit, *parts):
        joined = emit(r.concat(list(parts), 3))
        return emit(POOLS[pool](emit(r.nn.relu(batchnorm(emit, joined, 5)))))

    shapes = [("n", 6, 8, channels) for channels in dtype_parts]
    before = module(network, *shapes)
    after = SplitConcats()(before)
    same(before, after, *(quarters(2, 6, 8, channels, seed=i) for i, channels in enumerate(dtype_parts)))
    assert calls(after)[-1] == "concat" and len(find(after, "relax.concat")) == 1


@pytest.mark.parametrize(
    "pool, channels, twice",
    [
        (lambda x: r.nn.max_pool2d(x, [3, 3], [1, 1], [1, 1, 1, 1], layout="NHWC"), 32, False),  # does not shrink
        (POOLS["max"], 12, False),  # parts that do not fill vectors
        (POOLS["max"], 32, True),  # the joined tensor is needed anyway
    ],
)
def test_other_pools_stay_behind_the_concatenation(pool, channels, twice):
    def network(emit, x, y):
        joined = emit(r.nn.relu(emit(r.concat([x, y], 3))))
        pooled = emit(pool(joined))
        return [pooled, joined] if twice else pooled

    before = module(network, (2, 6, 6, channels), (2, 6, 6, channels))
    assert calls(SplitConcats()(before)) == calls(before)


def test_constants_that_differ_from_pixel_to_pixel_are_not_cut():
    def network(emit, x, y):
        joined = emit(r.add(emit(r.concat([x, y], 3)), c(np.ones((1, 6, 6, 64), np.float32))))
        return emit(POOLS["max"](joined))

    before = module(network, (2, 6, 6, 32), (2, 6, 6, 32))
    assert calls(SplitConcats()(before)) == calls(before)


def test_two_concatenations_with_equal_parts_are_combined_part_by_part():
    def network(emit, *parts):
        left, right = emit(r.concat(list(parts[:2]), 3)), emit(r.concat(list(parts[2:]), 3))
        return emit(POOLS["max"](emit(r.add(left, right))))

    before = module(network, *[(2, 6, 6, 32)] * 4)
    after = SplitConcats()(before)
    same(before, after, *(quarters(2, 6, 6, 32, seed=i) for i in range(4)))
    assert calls(after).count("nn.max_pool2d") == 2


def test_long_chains_of_sums_are_looked_through_once():
    def network(emit, x):
        for _ in range(300):
            x = emit(r.add(x, emit(r.nn.relu(x))))
        return emit(POOLS["max"](x))

    before = module(network, (1, 4, 4, 32))
    assert calls(SplitConcats()(before)) == calls(before)
