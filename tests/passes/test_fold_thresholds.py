"""Planes become comparisons with thresholds on the deepest tensor that decides them."""

import numpy as np
from tvm import relax

from tests.passes.relax_nets import c, calls, dense, fold, module, quarters, same, signs


def test_a_chain_behind_a_few_levels_is_evaluated_in_float32():
    """BatchNormalization's multiply and add tie at a level in float32, not in float64."""
    rng = np.random.default_rng(3)
    gain = rng.normal(size=64).astype(np.float32)
    level = rng.choice(np.float32([0.5, 1.0, 1.5]), 64)
    offset = -(level * gain)

    def network(emit, x):
        sign = emit(relax.op.reshape(emit(relax.op.sign(x)), (8, 64)))  # a source that can hold -1, 0, 1
        y = emit(relax.op.add(emit(relax.op.multiply(emit(relax.op.add(sign, c(0.5))), c(gain))), c(offset)))
        s = emit(relax.op.sign(y))
        s = emit(relax.op.add(s, emit(relax.op.astype(emit(relax.op.equal(s, c(0.0))), "float32"))))
        return emit(dense(s, signs(64, 4)))

    before = module(network, (8, 8, 8))
    after, decisions = fold(before)
    assert decisions["dense"].kind == "binary"
    same(before, after, quarters(8, 8, 8))


def test_a_comparison_of_two_activations_is_packed_as_it_is():
    def network(emit, x, y):
        bit = emit(relax.op.astype(emit(relax.op.greater(x, y)), "float32"))
        return emit(dense(emit(relax.op.subtract(emit(relax.op.multiply(bit, c(2.0))), c(1.0))), signs(40, 5)))

    before = module(network, (6, 40), (6, 40))
    after, decisions = fold(before)
    assert decisions["dense"].kind == "binary"
    assert calls(after).count("greater") == 1
    same(before, after, quarters(6, 40), quarters(6, 40, seed=1))
