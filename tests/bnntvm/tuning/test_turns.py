"""Comparisons in turns on machines that do other things, too: no gain where there is none, whatever the noise."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnntvm.tuning import turns

seconds = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=24)


def busy(rng, time, count, often, most=25.0):
    """Seconds in turns on a machine where other work slows some of them down, up to ``most`` times."""
    return [time * rng.uniform(1, 1.02) * (rng.uniform(1.6, most) if rng.random() < often else 1) for _ in range(count)]


def test_a_quiet_machine():
    rng = random.Random(1)
    times = {name: busy(rng, time, 8, 0) for name, time in (("default", 10e-6), ("same", 10e-6), ("slower", 11e-6), ("faster", 8e-6))}
    judged = turns.judge(times, "default")
    assert judged.schedule == "faster" and judged.gain == pytest.approx(1.25, rel=0.02) and not judged.noisy
    assert judged.seconds == pytest.approx(8e-6, rel=0.03)
    del times["faster"]
    assert turns.judge(times, "default").schedule == "default" and turns.judge(times, "default").gain == 1


def test_a_default_that_was_disturbed_is_no_gain():
    """One turn in two is many times as long, those of the default more often by chance: the medians would say 25 times as fast."""
    default = [250e-6, 250e-6, 10e-6, 250e-6, 250e-6, 10e-6, 250e-6, 250e-6]
    other = [10.5e-6, 10.5e-6, 250e-6, 10.5e-6, 10.5e-6, 10.5e-6, 10.5e-6, 10.5e-6]
    judged = turns.judge({"default": default, "other": other}, "default")
    assert judged.schedule == "default" and judged.gain == 1 and judged.noisy and judged.default == pytest.approx(10e-6)


def test_what_slows_a_whole_turn_down_decides_nothing():
    """The clock drifts by a third; one schedule is faster by a twentieth in every turn."""
    drift = [1 + 0.05 * (turn * 5 % 8) for turn in range(8)]
    times = {"default": [10 * one for one in drift], "other": [9.5 * one for one in drift]}
    assert turns.judge(times, "default").gain == pytest.approx(10 / 9.5)


def test_a_schedule_that_is_faster_at_its_worst():
    """Times as short as a clock's steps differ by more than what counts as a disturbance."""
    times = {"default": [80.0, 81, 80, 82, 81, 80, 80, 81], "other": [1.0, 3, 2, 5, 4, 3, 2, 6]}
    judged = turns.judge(times, "default")
    assert judged.schedule == "other" and not judged.noisy and judged.gain > 13
    assert turns.judge(times, "other").schedule == "other" and turns.judge(times, "other").gain == 1


@pytest.mark.parametrize("often", [0.2, 0.5, 0.8])
def test_noise_makes_no_gain(often):
    """Of equal schedules few are taken for faster, and none for much faster; a schedule that is clearly faster is, or cannot be told."""
    rng, claimed, missed = random.Random(2), [], 0
    for _ in range(400):
        times = {name: busy(rng, time, 8, often) for name, time in (("default", 1.0), ("same", 1.0))}
        claimed.append(turns.judge(times, "default").gain)
        times = {name: busy(rng, time, 8, often) for name, time in (("default", 1.0), ("faster", 0.8))}
        found = turns.judge(times, "default")
        missed += found.schedule == "default" and not found.noisy
    assert sum(one > 1 for one in claimed) < 0.02 * len(claimed) and max(claimed) < 1.05 and missed < 0.02 * len(claimed)


@given(default=seconds, others=st.lists(seconds, max_size=4))
def test_any_times(default, others):
    """Whatever is in a database: a gain is one of a schedule that was faster in most turns; the default's time is one that it had."""
    compared = {"default": default, **dict(enumerate(others))}
    judged = turns.judge(compared, "default")
    assert min(default) <= judged.default <= turns.DISTURBED * min(default) * (1 + 1e-9) and judged.gain >= 1
    assert (judged.schedule == "default") == (judged.gain == 1) and (judged.schedule == "default" or not judged.noisy)
    if judged.gain > 1:
        won = sum(a < b for a, b in zip(compared[judged.schedule], default))
        assert judged.gain > turns.LEAST_GAIN and won >= 1
