"""Products of two packed tensors that take over the conversion and the scale behind them."""

import numpy as np
import pytest
from tvm import relax

from bnntvm import ops
from bnntvm.bits import pack_bits
from bnntvm.passes.scale_products import ScaleProducts
from tests.passes.relax_nets import c, calls, module, same


def product(emit, x):
    """int32 [2, 3, 5], of signs of 40 numbers."""
    words = emit(ops.call(ops.PACK, [emit(relax.op.less(x, c(np.float32(0))))], groups=1))
    right = c(np.swapaxes(pack_bits(np.random.default_rng(0).random((2, 5, 40)) < 0.5), 1, 2).copy(), "uint32")
    attrs = dict(layer="m", features=40, left="bipolar", right="bipolar", reachable=[-40, 40, 2], scale=[])
    return emit(ops.call(ops.MATMUL_BITS, [words, right], **attrs))


def to_float(emit, x):
    return emit(relax.op.astype(x, "float32"))


def times(emit, x):
    return emit(relax.op.multiply(x, c(np.float32(0.3))))


@pytest.mark.parametrize(
    "tail, expected",
    [
        (to_float, []),
        (lambda emit, y: times(emit, to_float(emit, y)), []),
        (lambda emit, y: times(emit, times(emit, to_float(emit, y))), ["multiply"]),
        (lambda emit, y: y, []),
        (lambda emit, y: emit(relax.op.add(times(emit, to_float(emit, y)), to_float(emit, emit(relax.op.abs(y))))),
         ["astype", "multiply", "abs", "astype", "add"]),
    ],
    ids=["converted", "scaled", "scaled_twice", "integers", "integers_are_read"],
)  # fmt: skip
def test_what_becomes_part_of_the_product(tail, expected):
    before = module(lambda emit, x: tail(emit, product(emit, x)), (2, 3, 40))
    after = ScaleProducts()(before)
    assert [name for name in calls(after) if not name.startswith("bnn.") and name != "less"] == expected
    assert calls(after).count("bnn.matmul_bits") == 1
    same(before, after, np.random.default_rng(1).normal(size=(2, 3, 40)).astype(np.float32))
