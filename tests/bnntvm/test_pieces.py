"""Functions that are monotone piece by piece: what quantisers make of them, against plain evaluation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from bnntvm.interpreter import run
from bnntvm.levels import Step
from bnntvm.passes.infer_levels import infer_levels
from tests.passes.relax_nets import c, module

r = relax.op
floats = st.floats(-1e4, 1e4, width=32)


def pact(emit, x, alpha=2.5):
    """0.5 * (|x| - |x - alpha| + alpha), the clip of Choi et al. (PACT, 2018, eq. 1)."""
    out = emit(r.subtract(emit(r.abs(x)), emit(r.abs(emit(r.subtract(x, c(alpha)))))))
    return emit(r.multiply(emit(r.add(out, c(alpha))), c(0.5)))


def two_relus(emit, x, alpha=2.5):
    return emit(r.subtract(emit(r.nn.relu(x)), emit(r.nn.relu(emit(r.subtract(x, c(alpha)))))))


def selected(emit, x, alpha=2.5):
    """relu(x) where x <= alpha, else alpha, with the selection spelled as a sum of products."""
    small = emit(r.less_equal(x, c(alpha)))
    yes, no = (emit(r.astype(v, "float32")) for v in (small, emit(r.logical_not(small))))
    return emit(r.add(emit(r.multiply(yes, emit(r.nn.relu(x)))), emit(r.multiply(c(alpha), no))))


def rounded(emit, x, scale=1.2):
    return emit(r.divide(emit(r.round(emit(r.multiply(x, c(scale))))), c(scale)))


def round_then_clip(emit, x):
    quarters = emit(r.multiply(emit(r.round(emit(r.multiply(x, c(4.0))))), c(0.25)))
    return emit(r.minimum(emit(r.maximum(quarters, c(0.0))), c(0.75)))


CHAINS = {
    "pact": (lambda emit, x: rounded(emit, pact(emit, x)), 4),
    "pact per channel": (lambda emit, x: rounded(emit, pact(emit, x, np.float32([1, 2.5, 0.75, 2]))), 4),
    "two relus": (lambda emit, x: rounded(emit, two_relus(emit, x)), 4),
    "arithmetic select": (lambda emit, x: rounded(emit, selected(emit, x)), 4),
    "band": (lambda emit, x: emit(r.sign(emit(r.subtract(c(1.5), emit(r.abs(x)))))), 3),
    "folded twice": (lambda emit, x: emit(r.sign(emit(r.subtract(emit(r.abs(emit(r.subtract(emit(r.abs(x)), c(2.0))))), c(1.0))))), 3),
    "round, then clip": (round_then_clip, 4),
    "square": (lambda emit, x: emit(r.round(emit(r.minimum(emit(r.multiply(x, x)), c(3.0))))), 4),
}


def fact_of(function):
    mod = module(function, ("n", 4))
    variable = mod["main"].body.blocks[0].bindings[-1].var
    analysis = infer_levels(mod["main"])
    return mod, analysis, analysis.facts[variable]


@settings(max_examples=60)
@given(st.lists(floats, min_size=8, max_size=8), st.sampled_from(sorted(CHAINS)))
def test_a_quantised_chain_is_a_step_function(numbers, name):
    function, count = CHAINS[name]
    mod, analysis, fact = fact_of(function)
    assert isinstance(fact, Step) and fact.source == mod["main"].params[0] and len(fact.levels()) >= count
    x = np.float32(numbers).reshape(2, 4)
    x = np.concatenate([x, x / 1024, np.round(x * 4) / 4 % 4, fact.domain.at(np.broadcast_to(fact.cuts, (4, fact.cuts.shape[-1]))).T])
    got = run(mod, [x])[0]
    level = np.sum(x[..., None] >= fact.domain.at(fact.cuts), -1)
    expected = np.take_along_axis(np.broadcast_to(fact.values, (*x.shape, fact.values.shape[-1])), level[..., None], -1)[..., 0]
    np.testing.assert_array_equal(got, expected)


def test_noise_of_large_numbers_is_an_assumption_that_is_remembered():
    """|x| - |x - a| is a only up to a rounding error that grows with x."""
    mod, analysis, _ = fact_of(CHAINS["pact"][0])
    (bound,) = analysis.assumed.values()
    assert 2**12 <= bound <= 2**24
    x = np.float32([[-bound, bound, 1 - bound, bound - 1]])
    assert set(run(mod, [x])[0].reshape(-1).tolist()) == {0.0, np.float32(3) / np.float32(1.2)}


def test_a_bounded_tensor_needs_no_assumption():
    def network(emit, x):
        return CHAINS["pact"][0](emit, emit(r.minimum(emit(r.maximum(x, c(-100.0))), c(100.0))))

    _, analysis, fact = fact_of(network)
    assert isinstance(fact, Step) and not analysis.assumed


@pytest.mark.parametrize("kind", ["round", "floor", "ceil", "trunc"])
@given(st.floats(-(2.0**40), 2.0**40, width=32))
def test_the_claim_behind_rounding_residues(kind, t):
    """(round(t) - t) + t == round(t) for every float32 t, and for floor, ceil and trunc where their result is representable beside t."""
    t, function = np.float32(t), {"round": np.rint, "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc}[kind]
    assert (function(t) - t) + t == function(t)
