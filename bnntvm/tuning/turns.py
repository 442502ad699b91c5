"""What a comparison in turns says: whether a schedule is faster than the default, or the machine was too busy to tell.

Other work on a machine only ever adds time, to some turns more than to others: a kernel on two threads takes many times as long while
another process has one of its cores. So a turn counts for a pair of schedules if neither took much longer than in its own fastest turn;
a schedule is faster if it is so in the middle of such turns, and in most of them.

Pure Python: looking records up is part of every build.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

#: A schedule must be this much faster than the default before it replaces it.
LEAST_GAIN = 1.01
#: A turn was disturbed if a schedule took so many times what it took in its fastest turn. What a turn alone does (where its program's code
#: and data lie, what the clock is) is less as a rule.
DISTURBED = 1.5
#: Turns that have to be undisturbed, where there were so many; and the part of these in which a faster schedule is faster.
ENOUGH, MOST = 4, 2 / 3


@dataclass(frozen=True)
class Judged:
    """What becomes of a kernel.

    Attributes
    ----------
    schedule : object
        The fastest; the default where none is clearly faster.
    default : float
        Seconds of the default.
    gain : float
        The default's time over that of ``schedule``; 1 for the default.
    noisy : bool
        The default is kept although a schedule may be faster: too few turns were undisturbed.
    """

    schedule: object
    default: float
    gain: float
    noisy: bool

    @property
    def seconds(self):
        """Of ``schedule``."""
        return self.default / self.gain


def undisturbed(*schedules):
    """Numbers of the turns in which none of the schedules (each a list of seconds, one a turn) was disturbed so that it matters: the faster
    one, whose times may be no longer than the clock's steps, may take what the slower one takes at best."""
    slowest = max(map(min, schedules))
    most = [max(DISTURBED * min(seconds), slowest) for seconds in schedules]
    return [turn for turn, one in enumerate(zip(*schedules)) if all(a <= b for a, b in zip(one, most))]


def gain(default, other):
    """The default's time over another schedule's, both lists of seconds in the same turns: 1 where it is not clearly faster, None where too
    few turns were undisturbed."""
    turns = undisturbed(default, other)
    if len(turns) < min(ENOUGH, len(default), len(other)):
        return None
    ratios = [default[turn] / other[turn] for turn in turns]
    ratio = statistics.median(ratios)  # of the two in one turn: what slows a whole turn down slows both
    return ratio if ratio > LEAST_GAIN and sum(one > 1 for one in ratios) >= MOST * len(turns) else 1.0


def judge(compared, default):
    """The outcome of a comparison.

    Parameters
    ----------
    compared : dict
        Schedule to its seconds in every turn.
    default : object
        One of them.

    Returns
    -------
    Judged
    """
    gains = {schedule: gain(compared[default], own) for schedule, own in compared.items() if schedule != default}
    known = {schedule: one for schedule, one in gains.items() if one is not None and one > 1}
    best = max(known, key=known.get, default=default)
    own = compared[default]
    seconds = statistics.median(own[turn] for turn in undisturbed(own))
    return Judged(best, seconds, known.get(best, 1.0), noisy=not known and None in gains.values())
