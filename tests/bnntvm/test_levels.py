"""The abstract domain: what it says about a source holds for every value of the source."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bnntvm.levels import (
    ALL_FLOATS,
    MAX_TABLE,
    Domain,
    Mono,
    Step,
    _from_ordinal,
    _ordinal,
    compress,
    ends,
    first,
    identity,
    map_step,
    merge_steps,
    quantise,
    threshold_values,
)

F = np.finfo(np.float32)
f32 = np.float32
SOURCE = "x"
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


# ---- float32 numbers as integers


@pytest.mark.parametrize(
    "value, neighbour",
    [
        (0.0, F.smallest_subnormal),
        (-0.0, F.smallest_subnormal),
        (-F.smallest_subnormal, 0.0),
        (F.tiny, np.nextafter(F.tiny, f32(1))),
        (np.nextafter(F.tiny, f32(0)), F.tiny),
        (1.0, 1 + F.eps),
        (np.nextafter(F.max, f32(0)), F.max),
        (F.min, np.nextafter(F.min, f32(0))),
    ],
)
def test_the_next_ordinal_is_the_next_float(value, neighbour):
    assert _ordinal(f32(neighbour)) == _ordinal(f32(value)) + 1
    assert _from_ordinal(_ordinal(f32(value)) + 1) == f32(neighbour)


@given(floats, floats)
def test_ordinals_are_in_the_order_of_the_numbers(a, b):
    assert (_ordinal(f32(a)) < _ordinal(f32(b))) == (f32(a) < f32(b))
    assert (_ordinal(f32(a)) == _ordinal(f32(b))) == (f32(a) == f32(b))


@given(floats)
def test_an_ordinal_leads_back_to_its_number(x):
    assert _from_ordinal(_ordinal(f32(x))) == f32(x)


def test_all_finite_floats_are_counted():
    assert ALL_FLOATS.count() == 2 * 0x7F7FFFFF + 1
    assert ALL_FLOATS.at(np.asarray(0)) == F.min
    assert ALL_FLOATS.at(np.asarray(ALL_FLOATS.count() - 1)) == F.max


# ---- domains


@st.composite
def domains(draw):
    """Small domains of every kind."""
    kind = draw(st.sampled_from(["values", "integers", "floats"]))
    if kind == "values":
        return Domain(values=tuple(sorted(draw(st.sets(st.integers(-20, 20).map(lambda v: v / 4), min_size=1, max_size=8)))))
    if kind == "integers":
        low, stride, steps = draw(st.integers(-12, 12)), draw(st.integers(1, 3)), draw(st.integers(0, 12))
        return Domain(low, low + stride * steps, stride)
    start = _ordinal(f32(draw(floats)))
    return Domain(float(_from_ordinal(start)), float(_from_ordinal(min(start + draw(st.integers(0, 30)), 0x7F7FFFFF))))


def everything(domain):
    """All values of a small domain, in order."""
    return domain.at(np.arange(domain.count()))


@given(domains())
def test_a_domain_counts_its_values_in_increasing_order(domain):
    values = everything(domain)
    assert values.dtype == np.float32
    assert np.all(np.diff(values.astype(np.float64)) > 0)
    if domain.values is None:
        assert values[0] == domain.low and values[-1] == domain.high


@given(domains())
def test_the_identity_is_the_source(domain):
    fact = identity(SOURCE, domain)
    np.testing.assert_array_equal(evaluate(fact), everything(domain))
    if isinstance(fact, Step):
        assert fact.values.dtype == np.float32  # chains on it have to round as the network does


@given(domains(), st.integers(0, 50))
def test_first_by_bisection_is_first_by_looking(domain, where):
    values = everything(domain)
    bound = values[min(where, len(values) - 1)] if where < 45 else f32(np.inf)
    found = first(domain, lambda x: x >= bound, ())
    assert found == next((i for i, v in enumerate(values) if v >= bound), len(values))


# ---- facts


def evaluate(fact):
    """The fact's tensor at every value of its domain: S + (count,)."""
    numbers = np.arange(fact.domain.count())
    if isinstance(fact, Mono):
        return np.stack([np.broadcast_to(fact.function(np.broadcast_to(x, fact.shape)), fact.shape) for x in everything(fact.domain)], -1)
    level = np.sum(numbers[:, None] >= fact.cuts[..., None, :], -1)
    return np.take_along_axis(fact.values, level, -1)


CHANNELS = st.sampled_from([(), (1,), (3,), (2, 1), (2, 3)])
GAIN = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 3.0])


@st.composite
def monos(draw, shapes=CHANNELS):
    """``gain * x + offset`` with numbers per channel."""
    domain, shape = draw(domains()), draw(shapes)
    size = int(np.prod(shape))
    gain = np.array(draw(st.lists(GAIN, min_size=size, max_size=size)), np.float32).reshape(shape)
    offset = np.array(draw(st.lists(st.integers(-8, 8), min_size=size, max_size=size)), np.float32).reshape(shape) / f32(2)
    return Mono(SOURCE, domain, lambda x: x * gain + offset, np.sign(gain).astype(np.int8))


@st.composite
def steps(draw, domain):
    """Any step function: cuts may lie together or outside, values may repeat."""
    shape, levels = draw(CHANNELS), draw(st.integers(1, 5))
    size = int(np.prod(shape))
    cuts = draw(st.lists(st.integers(0, domain.count()), min_size=size * (levels - 1), max_size=size * (levels - 1)))
    values = draw(st.lists(st.integers(-2, 2), min_size=size * levels, max_size=size * levels))
    cuts = np.sort(np.array(cuts, np.int64).reshape(*shape, levels - 1), -1)
    return Step(SOURCE, domain, cuts, np.array(values, np.float32).reshape(*shape, levels))


@given(monos())
def test_ends_are_the_least_and_the_greatest_value(mono):
    low, high = ends(mono)
    values = evaluate(mono)
    np.testing.assert_array_equal(low, values.min(-1))
    np.testing.assert_array_equal(high, values.max(-1))


@given(monos(), st.lists(st.integers(-6, 6), min_size=0, max_size=4, unique=True))
def test_quantise_finds_every_cut(mono, bounds):
    bounds = np.sort(np.array(bounds, np.float32))
    table = np.arange(len(bounds) + 1, dtype=np.float32) * 10

    def index(value):
        return np.sum(np.asarray(value)[..., None] >= bounds, -1)

    step = quantise(mono, index, table)
    np.testing.assert_array_equal(*np.broadcast_arrays(evaluate(step), table[index(evaluate(mono))]))


@given(monos(st.just((3,))))
def test_quantise_with_a_table_per_channel(mono):
    table = np.array([[0, 1], [5, 4], [7, 7]], np.float32)
    step = quantise(mono, lambda v: (v >= 0).astype(np.int64), table)
    picked = np.take_along_axis(table, (evaluate(mono) >= 0).astype(np.int64), -1)
    np.testing.assert_array_equal(*np.broadcast_arrays(evaluate(step), picked))


@given(st.data())
def test_compress_changes_no_value(data):
    step = data.draw(steps(data.draw(domains())))
    small = compress(step)
    np.testing.assert_array_equal(*np.broadcast_arrays(evaluate(small), evaluate(step)))
    assert small.values.shape[-1] <= step.values.shape[-1]


@given(st.data())
def test_occupied_and_levels_are_what_is_reached(data):
    step = data.draw(steps(data.draw(domains())))
    values = evaluate(step)
    np.testing.assert_array_equal(step.levels(), np.unique(values))
    reached = step.occupied()
    numbers = np.sum(np.arange(step.domain.count())[:, None] >= step.cuts[..., None, :], -1)
    for k in range(step.values.shape[-1]):
        np.testing.assert_array_equal(reached[..., k], (numbers == k).any(-1))


@given(st.data())
def test_map_step_maps_every_value(data):
    step = data.draw(steps(data.draw(domains())))
    np.testing.assert_array_equal(*np.broadcast_arrays(evaluate(map_step(step, np.abs)), np.abs(evaluate(step))))


@given(st.data())
def test_merge_steps_merges_every_value(data):
    domain = data.draw(domains())
    a, b = data.draw(steps(domain)), data.draw(steps(domain))
    function = data.draw(st.sampled_from([np.add, np.subtract, np.multiply, np.maximum, np.less]))
    try:
        np.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        assume(False)
    merged = merge_steps(a, b, function)
    np.testing.assert_array_equal(*np.broadcast_arrays(evaluate(merged), function(evaluate(a), evaluate(b))))


def test_merge_steps_refuses_tables_that_are_too_large():
    step = Step(SOURCE, Domain(0, 9, 1), np.zeros((MAX_TABLE, 1), np.int64), np.zeros((MAX_TABLE, 2), np.float32))
    assert merge_steps(step, step, np.add) is None


@given(st.data())
@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_thresholds_tell_the_same_as_cuts(dtype, data):
    """``source < t_k`` exactly where cut k is not reached."""
    domain = data.draw(domains())
    assume(dtype == "float32" or domain.integer)
    step = data.draw(steps(domain))
    source = everything(domain).astype(dtype)
    for k in range(step.cuts.shape[-1]):
        below = source < threshold_values(step, k, dtype)[..., None]
        np.testing.assert_array_equal(below, np.arange(domain.count()) < step.cuts[..., k, None])


@given(floats)
def test_the_threshold_of_a_comparison_is_the_number_itself(t):
    mono = identity(SOURCE, ALL_FLOATS)
    step = quantise(mono, lambda x: (x >= f32(t)).astype(np.int64), np.array([0, 1], np.float32))
    if f32(t) == F.min:
        assert step.levels().tolist() == [1]
    else:
        assert threshold_values(step, 0, "float32") == f32(t)


@given(st.sampled_from([0.1, -0.3, 7.7, 1e-3, -1e30, 1e-38]), st.floats(-4, 4, width=32))
def test_a_threshold_behind_arithmetic_is_the_first_float_that_reaches_it(gain, offset):
    """sign(x * gain + offset): at the cut the chain, evaluated in float32, changes; one float before it has not."""
    gain, offset = f32(gain), f32(offset)
    chain = lambda x: x * gain + offset  # noqa: E731
    mono = Mono(SOURCE, ALL_FLOATS, chain, np.asarray(np.sign(gain), np.int8))
    step = quantise(mono, lambda v: (v >= 0).astype(np.int64), np.array([0, 1], np.float32))
    assume(step.cuts.shape[-1] == 1)
    cut = step.cuts[0]
    with np.errstate(all="ignore"):
        before, after = (chain(ALL_FLOATS.at(np.asarray(n))) >= 0 for n in (cut - 1, cut))
    assert before != after and after == (gain > 0)
