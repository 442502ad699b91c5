"""Which levels a tensor can hold, and where they change, for every spelling of a quantiser that exporters write."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from bnntvm import ops
from bnntvm.interpreter import run
from bnntvm.levels import Mono, Step, _ordinal
from bnntvm.passes.infer_levels import infer_levels
from bnntvm.pieces import Pieces
from tests.passes.relax_nets import c, conv, module, quarters, signs

r = relax.op
TINY = np.float32(1e-45)
#: Where spellings differ: zeros of both signs, denormals, thresholds and their neighbours, large numbers.
EDGES = np.float32(
    [0.0, -0.0, TINY, -TINY, 1e-38, -1e-38, 1e-20, 2**-24, -(2**-24), 0.5, -0.5, 1, -1, 1.5, 2.5, -2.5, 3.5, 127, -3e7, 3e7, 3e38, -3e38]
    + [np.nextafter(np.float32(v), np.float32(w)) for v in (0.5, 1, -1, 1.5) for w in (-9, 9)]
)


def chain(emit, x, *steps):
    """Apply functions one after the other."""
    for step in steps:
        x = emit(step(x))
    return x


def as_float(x):
    return r.astype(x, "float32")


def twice_minus_one(emit, bit):
    return chain(emit, bit, as_float, lambda v: r.multiply(v, c(2.0)), lambda v: r.subtract(v, c(1.0)))


def clipped(emit, x, low=-1.0, high=1.0):
    return chain(emit, x, lambda v: r.maximum(v, c(low)), lambda v: r.minimum(v, c(high)))


def qkeras(emit, x):
    s = emit(r.sign(x))
    code = emit(r.add(s, emit(r.subtract(c(1.0), emit(r.abs(s))))))
    return emit(r.add(x, emit(r.add(emit(r.negative(x)), emit(r.multiply(c(1.0), code))))))


def arithmetic_select(emit, x):
    bit = emit(r.greater_equal(x, c(0.0)))
    yes, no = chain(emit, bit, as_float), chain(emit, bit, r.logical_not, as_float)
    return emit(r.add(emit(r.multiply(yes, c(1.0))), emit(r.multiply(no, c(-1.0)))))


def zero_fix(emit, x):
    s = emit(r.sign(x))
    return emit(r.add(s, chain(emit, s, lambda v: r.equal(v, c(0.0)), as_float)))


def heaviside(emit, x):
    low = emit(r.where(emit(r.less(x, c(0.0))), c(0.0), c(1.0)))
    fixed = emit(r.where(emit(r.equal(x, c(0.0))), c(1.0), low))
    return emit(r.subtract(emit(r.multiply(fixed, c(2.0))), c(1.0)))


def hard_sigmoid_round(emit, x):
    half = chain(emit, x, lambda v: r.add(v, c(1.0)), lambda v: r.divide(v, c(2.0)))
    return chain(emit, clipped(emit, half, 0.0), r.round, lambda v: r.multiply(v, c(2.0)), lambda v: r.subtract(v, c(1.0)))


def ternary(emit, x):
    over = chain(emit, x, r.abs, lambda v: r.greater_equal(v, c(1.0)), as_float)
    return emit(r.multiply(over, emit(r.sign(x))))


SPELLINGS = {
    # class A: zero stays zero
    "sign": (lambda emit, x: emit(r.sign(x)), {-1, 0, 1}),
    "hardtanh_sign": (lambda emit, x: emit(r.sign(clipped(emit, x))), {-1, 0, 1}),
    "tanh_sign": (lambda emit, x: chain(emit, x, r.tanh, r.sign), {-1, 0, 1}),
    "divided": (lambda emit, x: chain(emit, x, lambda v: r.divide(v, c(3.0)), r.sign), {-1, 0, 1}),
    "negated": (lambda emit, x: chain(emit, x, r.negative, r.sign), {-1, 0, 1}),
    # class B: zero is +1
    "where_ge": (lambda emit, x: emit(r.where(emit(r.greater_equal(x, c(0.0))), c(1.0), c(-1.0))), {-1, 1}),
    "where_lt": (lambda emit, x: emit(r.where(emit(r.less(x, c(0.0))), c(-1.0), c(1.0))), {-1, 1}),
    "where_tensors": (lambda emit, x: emit(r.where(emit(r.greater_equal(x, c(0.0))), c(np.ones(8)), c(-np.ones(8)))), {-1, 1}),
    "ge_cast": (lambda emit, x: twice_minus_one(emit, emit(r.greater_equal(x, c(0.0)))), {-1, 1}),
    "swapped": (lambda emit, x: twice_minus_one(emit, emit(r.less_equal(c(0.0), x))), {-1, 1}),
    "not_lt": (lambda emit, x: twice_minus_one(emit, chain(emit, x, lambda v: r.less(v, c(0.0)), r.logical_not)), {-1, 1}),
    "sign_eps_sign": (lambda emit, x: chain(emit, x, r.sign, lambda v: r.add(v, c(0.1)), r.sign), {-1, 1}),
    "sign_plus_eps": (lambda emit, x: chain(emit, x, lambda v: r.add(v, c(1e-20)), r.sign), {-1, 0, 1}),
    "arithmetic_select": (arithmetic_select, {-1, 1}),
    "zero_fix": (zero_fix, {-1, 1}),
    "heaviside": (heaviside, {-1, 1}),
    # class C: zero is -1
    "where_gt": (lambda emit, x: emit(r.where(emit(r.greater(x, c(0.0))), c(1.0), c(-1.0))), {-1, 1}),
    "gt_cast": (lambda emit, x: twice_minus_one(emit, emit(r.greater(x, c(0.0)))), {-1, 1}),
    # class D: by rounding
    "hard_sigmoid_round": (hard_sigmoid_round, {-1, 1}),
    # class E: {0, 1}
    "relu_sign": (lambda emit, x: chain(emit, x, r.nn.relu, r.sign), {0, 1}),
    "clip_sign": (lambda emit, x: emit(r.sign(clipped(emit, x, 0.0))), {0, 1}),
    "gt_bit": (lambda emit, x: chain(emit, x, lambda v: r.greater(v, c(0.0)), as_float), {0, 1}),
    "clip_round": (lambda emit, x: emit(r.round(clipped(emit, x, 0.0))), {0, 1}),
    # more levels
    "ternary": (ternary, {-1, 0, 1}),
    "two_bits": (lambda emit, x: emit(r.round(clipped(emit, x, 0.0, 3.0))), {0, 1, 2, 3}),
    # straight-through residue that cancels
    "ste_clip": (lambda emit, x: ste(emit, emit(r.sign(x)), clipped(emit, x)), {-1, 0, 1}),
    "qkeras_clip": (lambda emit, x: qkeras(emit, clipped(emit, x)), {-1, 1}),
}


def ste(emit, q, x):
    """(q - x) + x"""
    return emit(r.add(emit(r.subtract(q, x)), x))


def spelled(function, shape=("n", 8)):
    """A module of one quantiser, its result's fact and its variable."""
    mod = module(lambda emit, x: emit(r.reshape(function(emit, x), x.ty.shape)), shape)
    block = mod["main"].body.blocks[0].bindings
    return mod, infer_levels(mod["main"]).facts[block[-2].value.args[0]] if len(block) > 1 else None


def step_values(fact, x):
    """The values that a Step whose source is ``x`` promises, for a source of floats."""
    assert fact.domain.values is None and not fact.domain.integer
    number = _ordinal(x) - _ordinal(fact.domain.at(np.asarray(0)))
    level = np.sum(number[..., None] >= fact.cuts, -1)
    return np.take_along_axis(np.broadcast_to(fact.values, (*x.shape, fact.values.shape[-1])), level[..., None], -1)[..., 0]


def checked(function, x):
    """The levels of a spelling, after its fact was compared with the module's own arithmetic on ``x`` [n, 8]."""
    mod, fact = spelled(function)
    assert isinstance(fact, Step)
    assert fact.source == mod["main"].params[0]
    np.testing.assert_array_equal(step_values(fact, x), run(mod, [x])[0])
    return set(fact.levels().tolist())


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_understood_at_every_edge(name):
    function, levels = SPELLINGS[name]
    x = np.resize(EDGES, (4, 8))
    assert checked(function, x) == levels


@settings(max_examples=40)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=8, max_size=8), st.sampled_from(sorted(SPELLINGS)))
def test_any_number_lands_on_the_level_that_was_inferred(numbers, name):
    checked(SPELLINGS[name][0], np.float32(numbers).reshape(1, 8))


def test_sign_of_sum_with_epsilon_is_minus_one_only_below_it():
    """Sign(x + 1e-20): the threshold is where float32 addition says, not 0."""
    _, fact = spelled(SPELLINGS["sign_plus_eps"][0])
    assert fact.domain.at(fact.cuts).tolist() == [-np.float32(1e-20), np.nextafter(-np.float32(1e-20), np.float32(0))]


@pytest.mark.parametrize("form", ["sub_add", "add_neg", "minus_minus", "inner_first"])
@pytest.mark.parametrize("limit", [None, 2.0**23])
def test_straight_through_residue_cancels_for_sign(form, limit):
    def network(emit, x):
        x = x if limit is None else clipped(emit, x, -limit, limit)
        s = emit(r.sign(x))
        if form == "sub_add":
            return emit(r.add(emit(r.subtract(s, x)), x))
        if form == "add_neg":
            return emit(r.add(x, emit(r.add(emit(r.negative(x)), s))))
        if form == "minus_minus":
            return emit(r.subtract(x, emit(r.subtract(x, s))))
        return emit(r.add(x, emit(r.subtract(s, x))))

    mod, fact = spelled(network)
    assert isinstance(fact, Step) and fact.levels().tolist() == [-1, 0, 1]
    known = np.float32([-3e38, -1e9, -(2.0**25), -(2.0**24), 2.0**24, 2.0**25, 1e9, 3e38])  # between 2**24 and 2**25 rounding alternates
    x = np.resize(np.concatenate([EDGES[np.abs(EDGES) < 2**23], known]), (5, 8))
    np.testing.assert_array_equal(step_values(fact, x), run(mod, [x])[0])
    assert not infer_levels(mod["main"]).assumed


@pytest.mark.parametrize(
    "levels, x",
    [
        ((-1.0, 1.0), 0.30000001),  # -1 where x > 0: (-1 - x) + x rounds to something else
        ((-0.1, 0.1), 100.3),  # no power of two
    ],
)
def test_straight_through_residue_that_does_not_cancel_is_no_step(levels, x):
    def network(emit, v):
        return ste(emit, emit(r.where(emit(r.greater_equal(v, c(0.5))), c(levels[1]), c(levels[0]))), v)

    mod, fact = spelled(network)
    rng = np.random.default_rng(0)
    seen = run(mod, [rng.uniform(-2 * x, 2 * x, (4000, 8)).astype(np.float32)])[0]
    assert len(np.unique(seen)) > 2, "the example does not show what it is for"
    assert not (isinstance(fact, Step) and fact.source == mod["main"].params[0])


def test_straight_through_residue_of_two_bits_cancels_by_sterbenz():
    """round(clip(x, 0, 1) * 4) / 4 - clip(x, 0, 1) + clip(x, 0, 1): 3/4 is no power of two, but the term is close to it."""

    def network(emit, x):
        t = clipped(emit, x, 0.0)
        return ste(emit, chain(emit, t, lambda v: r.multiply(v, c(4.0)), r.round, lambda v: r.multiply(v, c(0.25))), t)

    x = np.random.default_rng(0).uniform(-0.5, 1.5, (500, 8)).astype(np.float32)
    assert checked(network, x) == {0, 0.25, 0.5, 0.75, 1}


def test_straight_through_residue_behind_a_dead_channel_that_overflows():
    """(x * 4) * 0 is NaN for the largest x, which is no reason to give up."""

    def network(emit, x):
        y = chain(emit, x, lambda v: r.multiply(v, c(4.0)), lambda v: r.multiply(v, c(np.float32([0, 1, -2, 3, 0, 1, 1, 1]))))
        y = emit(r.add(y, c(np.float32([0, 1, -2, 3, 0.5, -0.5, -1, 7]))))
        return ste(emit, emit(r.sign(y)), clipped(emit, y))

    assert checked(network, quarters(6, 8)) == {-1, 0, 1}


@given(st.floats(-(2.0**23), 2.0**23, width=32), st.integers(-8, 8))
def test_the_claim_behind_cancellation(x, exponent):
    """(q - x) + x == q for a power of two q with the sign of x and |x| < 2**24 q; for close x whatever q (Sterbenz)."""
    x = np.float32(x)
    q = np.float32(2.0**exponent) * np.where(x < 0, np.float32(-1), np.float32(1))
    if abs(x) < 2**24 * abs(q):
        assert (q - x) + x == q
    near = np.float32(x * np.float32(0.7))
    assert (near - x) + x == near


def test_a_polynomial_term_cancels():
    """Bi-Real net: sign(x) - f(x) + f(x) with a piecewise polynomial f."""

    def network(emit, x):
        masks = [chain(emit, x, lambda v, t=t: r.less(v, c(t)), as_float) for t in (-1.0, 0.0, 1.0)]

        def select(mask, yes, no):
            return emit(r.add(emit(r.multiply(yes, mask)), emit(r.multiply(no, emit(r.subtract(c(1.0), mask))))))

        square, double = emit(r.multiply(x, x)), emit(r.multiply(x, c(2.0)))
        out = select(masks[0], c(-1.0), emit(r.add(square, double)))
        out = select(masks[1], out, emit(r.add(emit(r.multiply(square, c(-1.0))), double)))
        return ste(emit, emit(r.sign(x)), select(masks[2], out, c(1.0)))

    mod, fact = spelled(network)
    assert isinstance(fact, Step) and fact.levels().tolist() == [-1, 0, 1]
    x = np.random.default_rng(0).uniform(-1.5, 1.5, (500, 8)).astype(np.float32)
    np.testing.assert_array_equal(step_values(fact, x), run(mod, [x])[0])


def domain_of(function, *shapes):
    """The domain of the last value of a small function."""
    mod = module(function, *shapes)
    return infer_levels(mod["main"]).value_domain(mod["main"].body.blocks[0].bindings[-1].var)


@pytest.mark.parametrize("value", [1.0, -1.0, 0.0, 7.0])
def test_padding_widens_a_range_to_its_value(value):
    def network(emit, x):
        return emit(r.nn.pad(clipped(emit, x, -0.75, -0.5), [0, 0, 1, 1, 0, 0, 0, 0], "constant", value))

    domain = domain_of(network, (1, 3, 3, 2))
    assert (domain.low, domain.high) == (min(-0.75, value), max(-0.5, value))


@pytest.mark.parametrize("value, levels", [(1.0, {-1, 1}), (-1.0, {-1, 1}), (0.0, {-1, 0, 1}), (2.0, {-1, 1, 2})])
def test_padding_adds_its_value_to_the_levels(value, levels):
    def network(emit, x):
        bits = SPELLINGS["where_ge"][0](emit, x)
        return emit(r.nn.pad(bits, [0, 0, 1, 1, 1, 1, 0, 0], "constant", value))

    assert set(domain_of(network, (1, 3, 3, 2)).values) == levels


def test_averages_have_no_levels_but_a_range():
    def network(emit, x):
        return emit(r.nn.avg_pool2d(emit(r.sign(x)), [2, 2], [2, 2], layout="NHWC"))

    domain = domain_of(network, (1, 4, 4, 8))
    assert domain.values is None and (domain.low, domain.high) == (-1, 1)


def test_sums_of_bounded_tensors_are_bounded():
    domain = domain_of(lambda emit, x, y: emit(r.subtract(clipped(emit, x), clipped(emit, y, 0.0, 5.0))), (4, 8), (4, 8))
    assert (domain.low, domain.high) == (-6, 1)


def test_levels_of_a_concatenation_are_those_of_all_its_fields():
    def network(emit, x, y):
        return emit(r.concat([emit(r.sign(x)), emit(r.round(clipped(emit, y, 0.0, 2.0)))], 1))

    assert domain_of(network, (4, 8), (4, 3)).values == (-1, 0, 1, 2)


def accumulated(emit, x, weight, *steps, **geometry):
    """A convolution of signs (+-1), then elementwise steps."""
    bits = SPELLINGS["where_ge"][0](emit, x)
    out = emit(conv(bits, weight, **geometry))
    return chain(emit, out, *steps)


def fact_after_packing(function, *shapes):
    """The fact about the tensor that ``function`` returns, in the graph that Binarise makes, and that graph."""
    from bnntvm.passes.binarise import Binarise

    mod = Binarise({})(module(function, *shapes))
    bindings = mod["main"].body.blocks[0].bindings
    return infer_levels(mod["main"]).facts[bindings[-1].var if not isinstance(bindings[-1].value, relax.Var) else bindings[-1].value], mod


def test_an_odd_number_of_signs_is_never_zero():
    fact, _ = fact_after_packing(lambda emit, x: accumulated(emit, x, signs(4, 3, 3, 5), r.sign), (1, 5, 5, 5))
    assert fact.levels().tolist() == [-1, 1]
    assert fact.domain.integer and fact.domain.stride == 2


def test_an_even_number_of_signs_can_be_zero():
    fact, _ = fact_after_packing(lambda emit, x: accumulated(emit, x, signs(4, 1, 1, 6), r.sign), (1, 5, 5, 6))
    assert fact.levels().tolist() == [-1, 0, 1]


def test_padding_of_odd_channels_breaks_the_parity():
    fact, _ = fact_after_packing(lambda emit, x: accumulated(emit, x, signs(4, 3, 3, 5), r.sign, pads=[1, 1, 1, 1]), (1, 5, 5, 5))
    assert fact.levels().tolist() == [-1, 0, 1]


def test_padding_of_even_channels_keeps_it():
    """With six channels a padded tap drops six numbers: sums stay even, so a bias of 1 keeps them off zero."""
    fact, _ = fact_after_packing(
        lambda emit, x: accumulated(emit, x, signs(4, 3, 3, 6), lambda v: r.add(v, c(1.0)), r.sign, pads=[1, 1, 1, 1]), (1, 5, 5, 6)
    )
    assert fact.levels().tolist() == [-1, 1]


def test_batch_norm_thresholds_lie_between_integers():
    """A mean of 0.5 keeps an even sum off zero."""
    gain, shift = np.float32([0.1, -2, 3, 7]), np.float32([0.05, 1, 1, 1])

    def network(emit, x):
        return accumulated(emit, x, signs(4, 1, 1, 6), lambda v: r.multiply(v, c(gain)), lambda v: r.add(v, c(shift)), r.sign)

    fact, _ = fact_after_packing(network, (1, 5, 5, 6))
    assert fact.levels().tolist() == [-1, 1]


@pytest.mark.parametrize("slope", [0.25, 0.0])
def test_prelu_with_a_slope_that_is_not_negative_is_monotone(slope):
    def network(emit, x):
        v = accumulated(emit, x, signs(4, 1, 1, 6), lambda u: r.subtract(u, c(1.0)))
        out = emit(r.where(emit(r.less(v, c(0.0))), emit(r.multiply(v, c(slope))), v))
        return chain(emit, out, lambda u: r.add(u, c(0.3)), r.sign)

    fact, _ = fact_after_packing(network, (1, 5, 5, 6))
    assert isinstance(fact, Step) and fact.domain.integer


def test_prelu_with_a_negative_slope_has_two_pieces():
    def network(emit, x):
        v = accumulated(emit, x, signs(4, 1, 1, 6), lambda u: r.add(u, c(1.0)))
        return emit(r.where(emit(r.less(v, c(0.0))), emit(r.multiply(v, c(np.float32([0.5, -0.25, 0.0, 1.0])))), v))

    fact, mod = fact_after_packing(network, (1, 5, 5, 6))
    assert isinstance(fact, Pieces) and fact.domain.integer
    assert fact.directions.reshape(4, -1).tolist() == [[1, 1], [-1, 1], [0, 1], [1, 1]]


def test_floats_stay_unknown():
    mod = module(lambda emit, x: emit(ops.call(ops.MATMUL, [x, c(np.eye(8))], layer="m")), ("n", 8))
    fact = infer_levels(mod["main"]).facts[mod["main"].body.blocks[0].bindings[0].var]
    assert isinstance(fact, Mono) and fact.domain.values is None and fact.domain.count() > 2**31


def test_few_values_of_different_tensors_make_few_values():
    def total(emit, x, y):
        return emit(r.add(emit(r.sign(x)), emit(r.multiply(emit(r.sign(y)), c(2.0)))))

    main = module(total, ("n", 8), ("n", 8))["main"]
    facts = infer_levels(main).facts
    found = [facts[b.var] for b in main.body.blocks[0].bindings if getattr(b.value, "op", None) is not None and "add" in str(b.value.op)]
    assert [fact.levels().tolist() for fact in found] == [[-3, -2, -1, 0, 1, 2, 3]]
