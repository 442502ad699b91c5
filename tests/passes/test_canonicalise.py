"""Equal things come into one form."""

import numpy as np
import pytest
import tvm
from tvm import relax

from bnntvm.passes.canonicalise import Canonicalise
from tests.passes.relax_nets import c, calls, conv, dense, ints, module, quarters, same, signs

r = relax.op


def checked(network, *shapes):
    """Operators that are left, after the meaning was compared."""
    before = module(network, *shapes)
    after = Canonicalise()(before)
    same(before, after, *[quarters(*[2 if d == "n" else d for d in shape], seed=i) for i, shape in enumerate(shapes)])
    return calls(after)


@pytest.mark.parametrize(
    "neutral",
    [
        lambda x: r.multiply(x, c(1.0)),
        lambda x: r.multiply(c(1.0), x),
        lambda x: r.divide(x, c(1.0)),
        lambda x: r.add(x, c(np.zeros(8))),
        lambda x: r.add(c(0.0), x),
        lambda x: r.subtract(x, c(0.0)),
        lambda x: r.multiply(x, c(np.ones((1, 1, 8)))) if len(x.ty.shape) == 3 else r.multiply(x, c(np.ones((1, 8)))),
        lambda x: r.astype(x, "float32"),
    ],
)
def test_what_changes_nothing_vanishes(neutral):
    assert checked(lambda emit, x: emit(r.abs(emit(neutral(x)))), ("n", 8)) == ["abs"]


@pytest.mark.parametrize(
    "kept",
    [
        lambda x: r.subtract(c(0.0), x),  # a negation
        lambda x: r.divide(c(1.0), x),
        lambda x: r.multiply(x, c(np.linspace(1, 2, 8))),
        lambda x: r.add(x, c(np.zeros((3, 1, 8)))),  # changes the shape
        lambda x: r.multiply(c(np.ones((3, 1, 8))), x),
    ],
)
def test_what_changes_something_stays(kept):
    assert len(checked(lambda emit, x: emit(r.abs(emit(kept(x)))), ("n", 8))) == 2


def test_a_result_that_is_its_operand():
    checked(lambda emit, x: [emit(r.multiply(x, c(1.0)))], ("n", 8))


def test_repeated_expressions_are_computed_once():
    """Two spellings of clip(x) are one value, so that a straight-through term can cancel."""

    def network(emit, x):
        clip = [emit(r.minimum(emit(r.maximum(x, c(-1.0))), c(1.0))) for _ in range(2)]
        return emit(r.add(emit(r.subtract(emit(r.sign(x)), clip[0])), clip[1]))

    assert checked(network, ("n", 8)) == ["maximum", "minimum", "sign", "subtract", "add"]


@pytest.mark.parametrize("shape", [("n", 5, 8), (2, 5, 8), (2, 3, 4, 8)])
def test_dense_layers_become_two_dimensional(shape):
    names = checked(lambda emit, x: emit(dense(x, ints(8, 4))), shape)
    assert names == ["reshape", "bnn.matmul", "reshape"]


def test_dense_layers_on_rows_are_left():
    assert checked(lambda emit, x: emit(dense(x, ints(8, 4))), ("n", 8)) == ["bnn.matmul"]


def test_nested_concatenations_are_one():
    def network(emit, x, y):
        inner = emit(r.concat([x, y], 1))
        return emit(r.concat([inner, x], 1))

    assert checked(network, ("n", 3), ("n", 4)) == ["concat"]


def test_concatenations_along_other_axes_are_not_merged():
    def network(emit, x, y):
        inner = emit(r.concat([x, y], 1))
        return emit(r.concat([inner, inner], 2))

    assert checked(network, ("n", 3, 2), ("n", 4, 2)) == ["concat", "concat"]


@pytest.mark.parametrize(
    "begin, end, left",
    [
        (0, 3, []),  # exactly the first part
        (3, 7, []),
        (0, 7, ["concat"]),
        (3, 12, ["concat"]),
        (1, 7, ["concat", "strided_slice"]),  # cuts a part
        (3, 6, ["concat", "strided_slice"]),
        (3, 2**31, ["concat"]),  # an open end
    ],
)
def test_a_slice_between_parts_picks_them(begin, end, left):
    def network(emit, x, y, z):
        joined = emit(r.concat([x, y, z], 1))
        return emit(r.abs(emit(r.strided_slice(joined, [1], [begin], [end]))))

    assert checked(network, ("n", 3), ("n", 4), ("n", 5)) == [*left, "abs"]


def test_a_slice_with_a_stride_or_from_the_end_is_left():
    def network(emit, x, y):
        joined = emit(r.concat([x, y], 1))
        return [emit(r.strided_slice(joined, [1], [0], [7], [2])), emit(r.strided_slice(joined, [1], [-4], [7]))]

    assert checked(network, ("n", 3), ("n", 4)).count("strided_slice") == 2


def test_slices_of_rows_that_were_put_together_along_a_dynamic_axis():
    def network(emit, x, y):
        joined = emit(r.concat([x, y], 0))
        return emit(r.strided_slice(joined, [0], [0], [1]))

    checked(network, ("n", 3), ("n", 3))


def test_canonical_form_is_a_fixed_point():
    def network(emit, x):
        y = emit(r.add(emit(r.multiply(x, c(1.0))), c(0.0)))
        y = emit(conv(y, signs(4, 1, 1, 8)))
        return emit(r.concat([y, emit(r.concat([y, y], 3))], 3))

    once = Canonicalise()(module(network, ("n", 3, 3, 8)))
    tvm.ir.assert_structural_equal(Canonicalise()(once)["main"], once["main"], map_free_vars=True)
