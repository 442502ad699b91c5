"""Groups: which operators are computed together, and that the order among groups stays legal."""

import numpy as np
import pytest
from tvm import relax

from bnntvm.graph import bindings, op_name
from bnntvm.passes.fuse_epilogues import FuseEpilogues, operand_kind
from tests.passes.relax_nets import c, calls, conv, dense, fold, ints, module, quarters, same, signs

r = relax.op


def fused(mod):
    """The fused module, and per group of ``main`` in order: (anchor, members)."""
    after = FuseEpilogues()(mod)
    groups = []
    for binding in bindings(after["main"]):
        value = binding.value
        if isinstance(value, relax.Call) and not op_name(value):
            func = after[value.op]
            members = [op_name(b.value).removeprefix("relax.") for b in bindings(func) if op_name(b.value)]
            groups.append((str(func.attrs["bnn.anchor"]).removeprefix("relax."), members))
    return after, groups


def test_scale_bias_and_activation_join_the_convolution():
    def network(emit, x):
        y = emit(conv(x, ints(6, 3, 3, 4)))
        y = emit(r.add(emit(r.multiply(y, c(ints(6)))), c(ints(6, seed=1))))
        return emit(r.nn.relu(y))

    before = module(network, ("n", 6, 6, 4))
    after, groups = fused(before)
    assert groups == [("bnn.conv", ["bnn.conv", "multiply", "add", "nn.relu"])]
    same(before, after, quarters(2, 6, 6, 4))


def test_a_residual_sum_and_its_bits_come_out_of_one_group():
    """conv -> add(x) -> (stored) and -> pack: two results."""

    def network(emit, x):
        y = emit(r.add(emit(conv(x, ints(4, 1, 1, 4))), x))
        s = emit(r.where(emit(r.less(y, c(0.0))), c(-1.0), c(1.0)))
        return [y, emit(conv(s, signs(5, 1, 1, 4), layer="second"))]

    before = module(network, ("n", 3, 3, 4))
    packed, _ = fold(before)
    after, groups = fused(packed)
    assert [g for g, _ in groups] == ["bnn.conv", "bnn.conv2d_bits"]
    assert groups[0][1][-1] == "bnn.pack" and "where" not in groups[0][1]
    same(before, after, quarters(2, 3, 3, 4))


def test_a_diamond_is_one_group():
    def network(emit, x):
        y = emit(conv(x, ints(4, 1, 1, 4)))
        return emit(r.multiply(emit(r.nn.relu(y)), emit(r.add(y, c(1.0)))))

    before = module(network, ("n", 3, 3, 4))
    after, groups = fused(before)
    assert groups == [("bnn.conv", ["bnn.conv", "nn.relu", "add", "multiply"])]
    same(before, after, quarters(2, 3, 3, 4))


def test_an_operand_that_depends_on_the_group_through_a_loose_operator_breaks_it():
    """y + flip(relu(y)): fused with y's convolution, the group would need its own result."""

    def network(emit, x):
        y = emit(conv(x, ints(4, 1, 1, 4)))
        z = emit(r.flip(emit(r.nn.relu(y)), 1))
        return emit(r.add(y, z))

    before = module(network, ("n", 3, 3, 4))
    after, groups = fused(before)
    assert groups == [("bnn.conv", ["bnn.conv", "nn.relu"]), ("identity", ["add"])]
    same(before, after, quarters(2, 3, 3, 4))


def test_two_groups_that_read_each_other_are_not_made():
    """a -> loose -> b's epilogue and b -> loose -> a's: one of the sums has to stay outside."""

    def network(emit, x):
        a, b = emit(conv(x, ints(4, 1, 1, 4), layer="a")), emit(conv(x, ints(4, 1, 1, 4, seed=1), layer="b"))
        first = emit(r.add(b, emit(r.flip(a, 1))))
        second = emit(r.add(a, emit(r.flip(b, 2))))
        return [first, second]

    before = module(network, ("n", 3, 3, 4))
    after, _ = fused(before)
    same(before, after, quarters(2, 3, 3, 4))


def test_a_sum_of_two_convolutions_joins_the_later_one():
    def network(emit, x):
        a, b = emit(conv(x, ints(4, 1, 1, 4), layer="a")), emit(conv(x, ints(4, 1, 1, 4, seed=1), layer="b"))
        return emit(r.add(a, b))

    before = module(network, ("n", 3, 3, 4))
    after, groups = fused(before)
    assert groups == [("bnn.conv", ["bnn.conv"]), ("bnn.conv", ["bnn.conv", "add"])]
    same(before, after, quarters(2, 3, 3, 4))


@pytest.mark.parametrize("shape, inside", [((1, 1, 1, 4), True), ((4,), True), ((1,), True), ((3, 3, 4), False), ((1, 3, 1, 1), False)])
def test_constants_per_channel_are_read_by_kernels_and_others_are_not(shape, inside):
    def network(emit, x):
        return emit(r.add(emit(conv(x, ints(4, 1, 1, 4))), c(ints(*shape))))

    before = module(network, ("n", 3, 3, 4))
    after, groups = fused(before)
    assert groups == [("bnn.conv", ["bnn.conv", "add"] if inside else ["bnn.conv"])]
    same(before, after, quarters(2, 3, 3, 4))


@pytest.mark.parametrize(
    "shape, operand, kind",
    [
        ((1, 1, 1, 4), (4,), "channel"),  # not "tensor", although the sizes agree
        ((1, 1, 1, 4), (1, 1, 1, 4), "channel"),
        ((1, 3, 3, 4), (1, 3, 3, 4), "tensor"),
        ((1, 3, 3, 4), (3, 3, 4), None),
        ((2, 3, 3, 4), (1, 3, 3, 4), None),
        ((2, 3, 3, 4), (1, 1), "scalar"),
        ((2, 3, 3, 1), (1, 1, 1, 1), "scalar"),
    ],
)
def test_kinds_of_constants(shape, operand, kind):
    assert operand_kind(c(ints(*operand)), shape) == kind


@pytest.mark.parametrize("shape", [("n", 1, 1, 4), ("n", 3, 3, 1)])
def test_factors_per_image_and_per_pixel_are_read_by_kernels(shape):
    def network(emit, x, factor):
        return emit(r.multiply(emit(conv(x, ints(4, 1, 1, 4))), factor))

    before = module(network, ("n", 3, 3, 4), shape)
    after, groups = fused(before)
    assert groups == [("bnn.conv", ["bnn.conv", "multiply"])]
    same(before, after, quarters(2, 3, 3, 4), quarters(2, *shape[1:]))


def test_a_bool_that_is_read_outside_is_computed_there_again():
    """A comparison in a convolution's epilogue that selects among values of another shape's group."""

    def network(emit, x):
        y = emit(conv(x, ints(4, 1, 1, 4)))
        over = emit(r.greater(y, c(0.0)))
        inside = emit(r.where(over, y, c(0.0)))
        outside = emit(r.flip(over, 1))
        return [inside, emit(r.astype(outside, "float32"))]

    before = module(network, ("n", 3, 3, 4))
    after, groups = fused(before)
    assert groups[0] == ("bnn.conv", ["bnn.conv", "greater", "where"])
    for func in (after[b.value.op] for b in bindings(after["main"]) if isinstance(b.value, relax.Call) and not op_name(b.value)):
        kinds = func.ret_ty.fields if isinstance(func.ret_ty, relax.TupleType) else [func.ret_ty]
        assert "bool" not in [str(k.dtype) for k in kinds] + [str(p.ty.dtype) for p in func.params]
    same(before, after, quarters(2, 3, 3, 4))


def test_bits_whose_comparison_is_shared_are_still_packed_in_the_kernel():
    def network(emit, x):
        y = emit(conv(x, ints(4, 1, 1, 4)))
        over = emit(r.greater(y, c(0.0)))
        s = emit(r.where(over, c(1.0), c(-1.0)))
        turned = emit(r.astype(emit(r.flip(over, 1)), "float32"))
        return [turned, emit(conv(s, signs(5, 1, 1, 4), layer="second"))]

    before = module(network, ("n", 3, 3, 4))
    packed, _ = fold(before)
    after, groups = fused(packed)
    assert "bnn.pack" in groups[0][1]
    assert "bnn.pack" not in calls(after)
    same(before, after, quarters(2, 3, 3, 4))


def test_pools_head_groups():
    def network(emit, x):
        y = emit(r.nn.max_pool2d(x, [2, 2], [2, 2], layout="NHWC"))
        return emit(r.add(y, c(ints(4))))

    before = module(network, ("n", 4, 4, 4))
    after, groups = fused(before)
    assert groups == [("nn.max_pool2d", ["nn.max_pool2d", "add"])]
    same(before, after, quarters(2, 4, 4, 4))


def test_dense_layers_head_groups():
    def network(emit, x):
        return emit(r.nn.relu(emit(r.add(emit(dense(x, ints(8, 5))), c(ints(5))))))

    before = module(network, ("n", 8))
    after, groups = fused(before)
    assert groups == [("bnn.matmul", ["bnn.matmul", "add", "nn.relu"])]
    same(before, after, quarters(3, 8))


def test_a_product_of_two_activations_stays_outside():
    from bnntvm import ops

    def network(emit, x, y):
        return emit(r.nn.relu(emit(ops.call(ops.MATMUL, [x, y], layer="m"))))

    before = module(network, (4, 6), (6, 5))
    after, groups = fused(before)
    assert "bnn.matmul" in calls(after) and groups == [("identity", ["nn.relu"])]
    same(before, after, quarters(4, 6), quarters(6, 5))


def test_values_that_nothing_reads_are_not_results():
    def network(emit, x):
        y = emit(conv(x, ints(4, 1, 1, 4)))
        return emit(r.nn.relu(emit(r.negative(y))))

    after, _ = fused(module(network, ("n", 3, 3, 4)))
    func = next(after[b.value.op] for b in bindings(after["main"]) if isinstance(b.value, relax.Call) and not op_name(b.value))
    assert isinstance(func.ret_ty, relax.TensorType)


def test_fusing_twice_in_parallel_branches_of_equal_shape():
    """Two branches over one input, joined twice: every order of groups has to respect both joins."""
    rng = np.random.default_rng(0)

    def network(emit, x):
        values = [x]
        for i in range(12):
            a, b = (values[int(k)] for k in rng.integers(0, len(values), 2))
            kind = int(rng.integers(0, 4))
            if kind == 0:
                values.append(emit(conv(a, ints(4, 1, 1, 4, seed=i, largest=1), layer=f"c{i}")))
            elif kind == 1:
                values.append(emit(r.flip(a, 1)))
            elif kind == 2:
                values.append(emit(r.maximum(a, b)))
            else:
                values.append(emit(r.subtract(a, b)))
        return values[-4:]

    for seed in range(8):
        rng = np.random.default_rng(seed)
        before = module(network, (2, 3, 3, 4))
        after, _ = fused(before)
        same(before, after, quarters(2, 3, 3, 4))
