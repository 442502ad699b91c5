"""Checking a build as it goes: what a network computes is evaluated in numpy after every pass, and by the machine code at the end.

A pass that changes a result is named, with the output that differs. The evaluation is :mod:`bnntvm.interpreter`: slow, one operator after
the other, independent of TVM's code generation.
"""

from __future__ import annotations

import numpy as np

import bnntvm.interpreter.packed  # noqa: F401  (teaches the interpreter the packed operators)
from bnntvm.errors import BnnError
from bnntvm.interpreter import run

#: What a result may deviate by, relative to the largest magnitude of its output: sums of float32 may be taken in another order.
TOLERANCE = 1e-4
BATCH = 2


class Verifier:
    """Compares every stage of a build with the imported network on random inputs.

    Parameters
    ----------
    imported : bnntvm.importer.model.Imported
    seed : int
        Of the inputs: one set of normal numbers, one of quarters from -2 to 2, in which zeros and ties are frequent.
    exact_inputs : bool
        Whether the second set is used; not where the user promised that zeros do not occur.
    """

    def __init__(self, imported, seed=0, exact_inputs=True):
        rng = np.random.default_rng(seed)
        draws = [rng.standard_normal, *([lambda shape: rng.integers(-8, 9, shape) / 4] if exact_inputs else [])]
        self.feeds = [{info.name: _draw(info, draw, rng) for info in imported.inputs} for draw in draws]
        self.wanted = [_evaluate(imported.mod, feed) for feed in self.feeds]

    def passed(self, name, mod, rebase=False):
        """Check the module after the pass ``name``; with ``rebase`` take what it computes for right from here on."""
        results = [_evaluate(mod, feed) for feed in self.feeds]
        if rebase:
            self.wanted = results
        for got, wanted in zip(results, self.wanted):
            _compare(f"the pass {name}", got, wanted)

    def compiled(self, module):
        """Check what a built module computes."""
        for feed, wanted in zip(self.feeds, self.wanted):
            got = module.run(feed, check_finite=False)
            _compare("code generation", list(got.values()), wanted)


def _evaluate(mod, feed):
    try:
        return run(mod, feed)
    except NotImplementedError as error:
        raise BnnError("the network cannot be verified", why=str(error), hint="build it without verify") from error


def _draw(info, draw, rng):
    shape, dtype = [d if isinstance(d, int) else BATCH for d in info.shape], np.dtype(info.dtype)
    return (draw(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)).astype(dtype)


def _compare(stage, got, wanted):
    for number, (a, b) in enumerate(zip(got, wanted, strict=True)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        limit = TOLERANCE * max(np.abs(b[np.isfinite(b)]).max(initial=0.0), np.finfo(np.float32).tiny)
        with np.errstate(invalid="ignore"):
            wrong = ~((np.abs(a - b) <= limit) | (a == b) | np.isnan(a) & np.isnan(b)) if a.shape == b.shape else np.ones(1, bool)
        if wrong.any():
            raise BnnError(
                f"{stage} changed the network's result", where=f"output {number}",
                why=f"{wrong.sum()} of {wrong.size} elements deviate by more than {TOLERANCE:g} of the largest",
                hint="this is a bug in bnntvm: please report it with the model",
            )  # fmt: skip
