"""Which candidates to measure next: a MetaSchedule search strategy over a family's schedules.

A family's space is a list of at most some thousand valid schedules, so the cost model can rank (a large sample of) all of them.
MetaSchedule's evolutionary search samples each decision by itself and would spend most of its population on combinations that are none.
"""

from __future__ import annotations

import random

import numpy as np
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from bnntvm.tuning import turns

#: Most candidates of one task that are ranked for a batch.
RANKED = 256
#: Part of a batch that is drawn at random, against a model that is wrong.
RANDOM = 0.25
#: A task ends after that many batches in which the best schedule did not improve by LEAST_GAIN ...
PATIENCE = 3
LEAST_GAIN = 0.01
#: ... if the model, too, expects less than this.
LEAST_EXPECTED = 0.02


class Budget:
    """Trials that are left for all tasks together: MetaSchedule's scheduler counts whole batches only."""

    def __init__(self, trials):
        self.left = trials

    def take(self, count):
        """At most ``count`` of what is left."""
        taken = min(count, self.left)
        self.left -= taken
        return taken


class Progress:
    """What is known of one task while it is tuned.

    Parameters
    ----------
    space : Space
    measured : dict
        Schedule -> seconds, infinite where it failed: what earlier sessions found.
    compared : dict
        Schedule -> seconds in turns of an earlier session's last comparison.

    Attributes
    ----------
    asked : set
        Schedules that are measured or on their way.
    stale : int
        Batches without a gain since the last one with it.
    fresh : bool
        Something was measured behind the last comparison.
    judged : Judged or None
        What the last comparison that can be judged says, which the network's builds go by; None before it.
    noisy : bool
        This session's comparison was too noisy for that.
    done : str
        Why the search has ended; else empty.
    """

    def __init__(self, space, measured, compared=()):
        self.space, self.measured = space, dict(measured)
        self.asked, self.stale, self.done, self.fresh = set(measured), 0, "", False
        self.judged, self.noisy = turns.judge(compared, space.default) if compared else None, False

    def compared(self, times):
        """Results of a last comparison: schedule -> seconds in every turn."""
        judged, self.fresh = turns.judge(times, self.space.default), False
        self.noisy = judged.noisy
        if self.judged is None or not judged.noisy:
            self.judged = judged

    def fastest(self, count):
        """The fastest schedules so far, but the default."""
        known = [s for s, t in self.measured.items() if t < float("inf") and s != self.space.default]
        return sorted(known, key=self.measured.get)[:count]

    @property
    def best(self):
        """Seconds of the best schedule so far."""
        return min(self.measured.values(), default=float("inf"))

    def note(self, results):
        """Results of a batch: list of (schedule, seconds)."""
        before, self.fresh = self.best, self.fresh or bool(results)
        self.measured.update(results)
        self.stale = 0 if self.best < before * (1 - LEAST_GAIN) else self.stale + 1


@derived_object
class Search(ms.search_strategy.PySearchStrategy):
    """Ranks by the cost model, explores around the best and at random.

    Parameters
    ----------
    progress : Progress
    budget : Budget
    stop : threading.Event
        Set when time is over or the user has had enough.
    """

    def __init__(self, progress, budget, stop, seed=0):
        self.progress, self.budget, self.stop, self.seed = progress, budget, stop, seed
        self.random, self.context, self.model, self.batch = random.Random(seed), None, None, 8

    def _initialize_with_tune_context(self, context):
        self.context = context

    def pre_tuning(self, max_trials, num_trials_per_iter, design_spaces, database=None, cost_model=None):
        self.batch, self.model = int(num_trials_per_iter), cost_model

    def post_tuning(self):
        pass

    def clone(self):
        return Search(self.progress, self.budget, self.stop, self.seed)

    def generate_measure_candidates(self):
        """The next batch, or None where this task is done."""
        progress = self.progress
        left = [s for s in progress.space.schedules if s not in progress.asked]
        if self.stop.is_set() or not self.budget.left:
            return None
        if not left:
            progress.done = "all of its space is measured"
            return None
        ranked, scores = self._rank(left)
        if progress.stale >= PATIENCE and self._expected(scores) < LEAST_EXPECTED:
            progress.done = "no gain expected"
            return None
        chosen = self._choose(ranked)
        progress.asked.update(s for s, _ in chosen)
        return [candidate for _, candidate in chosen]

    def _rank(self, left):
        """[(schedule, candidate)] of a sample of what is left, best first, and the model's scores in this order.

        A score is the speed relative to the best of its task that the model has seen.
        """
        space = self.progress.space
        best = sorted(self.progress.measured, key=self.progress.measured.get)[:3] or [space.default]
        near = {n for s in best for n in space.neighbours(s)}
        near = [s for s in left if s in near]
        others = [s for s in left if s not in set(near)]
        pool = near[:RANKED] + self.random.sample(others, max(0, min(len(others), RANKED - len(near))))
        pairs = [(s, ms.MeasureCandidate(space.trace(s), [])) for s in pool]
        scores = np.asarray(self.model.predict(self.context, [c for _, c in pairs]))
        order = np.argsort(-scores, kind="stable")
        return [pairs[i] for i in order], scores[order]

    def _choose(self, ranked):
        count = self.budget.take(min(self.batch, len(ranked)))
        drawn = round(count * RANDOM)
        chosen = ranked[: count - drawn]
        return chosen + self.random.sample(ranked[count - drawn :], drawn)

    def _expected(self, scores):
        """Relative gain over the best schedule that the model expects of the best candidate."""
        known = [s for s, t in self.progress.measured.items() if t == self.progress.best]
        own = self.model.predict(self.context, [ms.MeasureCandidate(self.progress.space.trace(s), []) for s in known[:1]])
        return float(scores[0] / max(own[0], 1e-6) - 1)

    def notify_runner_results(self, candidates, results):
        space = self.progress.space
        found = [(space.schedule_of(c.sch.mod), r) for c, r in zip(candidates, results)]
        failed = float("inf")
        known = [(s, min(map(float, r.run_secs)) if r.run_secs else failed) for s, r in found if not str(r.error_msg).startswith("Stopped")]
        self.progress.note(known)
