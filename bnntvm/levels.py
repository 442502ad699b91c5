"""Which values can a tensor hold? The abstract domain behind the inference of levels.

A tensor that depends elementwise on one other tensor, its *source*, is described by one of

* :class:`Mono`: a monotone float32 function of the source, kept as code and evaluated operation by operation, never solved algebraically;
* :class:`Step`: a step function of the source: cuts between levels and one value per level.

The source has a :class:`Domain`: the values it can take, numbered in increasing order. Applying Sign, Round, a comparison, ... to a Mono
finds the cuts by bisection over that numbering, so a threshold is exact: the first float32 (or reachable integer) at which the level
changes. All arrays have a shape S that broadcasts against the tensor's trailing axes (usually ``()`` or ``(C,)``).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

#: More levels than this are not "a few levels".
MAX_LEVELS = 16
#: Larger per-element tables are not worth carrying.
MAX_TABLE = 1 << 20


@dataclass(frozen=True)
class Domain:
    """The values a source can take, in increasing order and numbered from 0.

    Exactly one of: ``values`` (finite, float or int), an integer progression ``low, low + stride, ..., high``, or all finite float32
    numbers between ``low`` and ``high``.
    """

    low: float = -np.inf
    high: float = np.inf
    stride: int = 0
    values: tuple | None = None

    @property
    def integer(self):
        return self.stride > 0

    def count(self):
        if self.values is not None:
            return len(self.values)
        if self.integer:
            return (int(self.high) - int(self.low)) // self.stride + 1
        return int(_ordinal(np.float32(self._top())) - _ordinal(np.float32(self._bottom()))) + 1

    def at(self, index):
        """float32 (or exact integer as float32) values with these numbers."""
        if self.values is not None:
            return np.asarray(self.values, np.float32)[index]
        if self.integer:
            return (int(self.low) + self.stride * index).astype(np.float32)
        return _from_ordinal(index + _ordinal(np.float32(self._bottom())))

    def _bottom(self):
        return max(self.low, -np.finfo(np.float32).max)

    def _top(self):
        return min(self.high, np.finfo(np.float32).max)


def _ordinal(x):
    """Position of float32 numbers on the number line; -0.0 and 0.0 share one."""
    bits = np.asarray(x, np.float32).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _from_ordinal(k):
    k = np.asarray(k, np.int64)
    return np.where(k < 0, (-k) | 0x80000000, k).astype(np.uint32).view(np.float32)


ALL_FLOATS = Domain()


@dataclass(frozen=True, eq=False)
class Mono:
    """``tensor = function(source)``, monotone per element of S: direction 1 (never falls), -1 (never rises) or 0 (constant).

    ``integral``: its values are integers, so it becomes a Step once its range is small. ``stepped``: it is a function of integers, and may
    become a Step too. ``parts``: makes the same function as
    :class:`bnntvm.pieces.Pieces`, where more is known than that it is monotone.
    """

    source: object
    domain: Domain
    function: object
    direction: np.ndarray
    integral: bool = False
    parts: object = None
    stepped: bool = False

    @property
    def shape(self):
        return self.direction.shape


@dataclass(frozen=True, eq=False)
class Step:
    """``tensor = values[..., k]`` where k counts the cuts that the source's number has reached.

    ``cuts``: int64 S + (L-1,), non-decreasing along the last axis. ``values``: S + (L,).
    """

    source: object
    domain: Domain
    cuts: np.ndarray
    values: np.ndarray

    @property
    def shape(self):
        return self.values.shape[:-1]

    def occupied(self):
        """bool S + (L,): levels that some value of the source reaches."""
        edge = np.concatenate([np.zeros((*self.shape, 1), np.int64), self.cuts, np.full((*self.shape, 1), self.domain.count())], -1)
        return edge[..., 1:] > edge[..., :-1]

    def levels(self):
        """Sorted distinct values that the tensor can hold (-0.0 counts as 0.0)."""
        return np.unique(self.values[self.occupied()] + 0)


@dataclass(frozen=True, eq=False)
class Linear:
    """``tensor = base + sum(sign * term)``: what is left of a straight-through estimator until its terms cancel.

    ``terms`` maps variables to +1 or -1. ``rounds``: the variable whose rounding ``base`` is, where it is no Step.
    """

    base: object
    terms: dict = field(default_factory=dict)
    rounds: object = None


def identity(source, domain):
    """The fact about a source itself."""
    if domain.values is not None:
        values = np.asarray(domain.values, np.float32)
        return Step(source, domain, np.arange(1, len(values), dtype=np.int64), values)
    return Mono(source, domain, lambda x: x, np.ones((), np.int8))


def quiet(function, *args):
    """Evaluate numpy code on extreme arguments without warnings."""
    with np.errstate(all="ignore"):
        return function(*args)


def first(domain, predicate, shape, low=0, high=None):
    """Smallest number between ``low`` and ``high`` whose value satisfies a predicate that is monotone in the value; ``high`` (default: the
    domain's count) where none does. int64 S."""
    low = np.broadcast_to(np.asarray(low, np.int64), shape)
    high = np.broadcast_to(np.asarray(domain.count() if high is None else high, np.int64), shape)
    while True:
        open_ = low < high
        if not open_.any():
            return low
        middle = (low + high) // 2
        hit = quiet(predicate, domain.at(np.minimum(middle, domain.count() - 1)))
        hit = np.broadcast_to(hit, shape)
        high = np.where(open_ & hit, middle, high)
        low = np.where(open_ & ~hit, middle + 1, low)


def ends(mono):
    """Smallest and largest value of a Mono, arrays of shape S."""
    domain, shape = mono.domain, mono.shape
    edge = [np.broadcast_to(quiet(mono.function, np.broadcast_to(domain.at(np.asarray(i)), shape)), shape) for i in (0, domain.count() - 1)]
    return np.minimum(*edge), np.maximum(*edge)


def quantise(mono, index, table):
    """Step function ``table[index(mono)]``.

    Parameters
    ----------
    index : callable
        Non-decreasing function of the Mono's value to level numbers 0..L-1.
    table : np.ndarray
        Value of each level, S' + (L,).
    """
    count = table.shape[-1]
    shape = np.broadcast_shapes(mono.shape, table.shape[:-1])
    table = np.broadcast_to(table, (*shape, count))
    falling = np.broadcast_to(mono.direction, shape) < 0
    cuts = []
    for k in range(1, count):
        def reached(x, k=k):
            level = np.broadcast_to(index(mono.function(x)), shape)
            return np.where(falling, level <= count - 1 - k, level >= k)

        cuts.append(first(mono.domain, reached, shape))
    cuts = np.stack(cuts, -1) if cuts else np.zeros((*shape, 0), np.int64)
    values = np.where(falling[..., None], table[..., ::-1], table)
    return compress(Step(mono.source, mono.domain, cuts, values))


def plateaus(mono):
    """A Mono that takes few values as a Step, found value by value; None if it takes more than MAX_LEVELS."""
    shape, count, up = mono.shape, mono.domain.count(), mono.direction >= 0
    starts, values = [np.zeros(shape, np.int64)], []
    while len(values) <= MAX_LEVELS:
        here = np.broadcast_to(quiet(mono.function, mono.domain.at(np.minimum(starts[-1], count - 1))), shape)
        values.append(here)

        def beyond(x, here=here):
            value = mono.function(x)
            return np.where(up, value > here, value < here)

        following = first(mono.domain, beyond, shape, starts[-1])
        if np.all(following >= count):
            cuts = np.stack(starts, -1)[..., 1:]
            return compress(Step(mono.source, mono.domain, cuts, np.stack(values, -1)))
        starts.append(following)
    return None


def compress(step):
    """Merge neighbouring levels that hold equal values or that no source value reaches; shrink S where nothing varies."""
    cuts, values, occupied = step.cuts, step.values, step.occupied()
    k = 0
    while k + 1 < values.shape[-1]:
        a, b = values[..., k], values[..., k + 1]
        if np.all(~occupied[..., k] | ~occupied[..., k + 1] | (a == b)):
            merged = np.where(occupied[..., k], a, b)
            values = np.concatenate([values[..., :k], merged[..., None], values[..., k + 2 :]], -1)
            both = (occupied[..., k] | occupied[..., k + 1])[..., None]
            occupied = np.concatenate([occupied[..., :k], both, occupied[..., k + 2 :]], -1)
            cuts = np.delete(cuts, k, -1)
        else:
            k += 1
    return _shrink(Step(step.source, step.domain, cuts, values))


def _shrink(step):
    """Give size-1 axes to S where cuts and values do not vary, and drop leading ones."""
    cuts, values = step.cuts, step.values
    for axis in range(len(step.shape)):
        if values.shape[axis] > 1 and _constant_along(cuts, axis) and _constant_along(values, axis):
            cuts, values = np.take(cuts, [0], axis), np.take(values, [0], axis)
    while values.ndim > 1 and values.shape[0] == 1:
        cuts, values = cuts[0], values[0]
    return Step(step.source, step.domain, cuts, values)


def _constant_along(array, axis):
    return bool(np.all(array == np.take(array, [0], axis)))


def map_step(step, function):
    """Apply an elementwise function to a Step's values."""
    values = quiet(function, step.values)
    return compress(Step(step.source, step.domain, step.cuts, np.asarray(values)))


def merge_steps(a, b, function):
    """``function(a, b)`` of two Steps of the same source."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    if int(np.prod(shape)) * (a.values.shape[-1] + b.values.shape[-1]) > MAX_TABLE:
        return None
    cuts_a, cuts_b = (np.broadcast_to(s.cuts, (*shape, s.cuts.shape[-1])) for s in (a, b))
    cuts = np.sort(np.concatenate([cuts_a, cuts_b], -1), -1)
    starts = np.concatenate([np.zeros((*shape, 1), np.int64), cuts], -1)
    values = [_value_at(s, starts, shape) for s in (a, b)]
    return compress(Step(a.source, a.domain, cuts, np.asarray(quiet(function, *values))))


def _value_at(step, numbers, shape):
    """Value of a Step at source numbers (S + (m,))."""
    cuts = np.broadcast_to(step.cuts, (*shape, step.cuts.shape[-1]))
    level = np.sum(numbers[..., :, None] >= cuts[..., None, :], -1)
    return np.take_along_axis(np.broadcast_to(step.values, (*shape, step.values.shape[-1])), level, -1)


def threshold_values(step, k, dtype):
    """Thresholds for ``source >= t`` that mean "cut k is reached": array S of ``dtype``; beyond the ends where a cut never or always holds.

    Floats use -inf / +inf, integers the dtype's extremes, so ``source < t`` is false / true for every value of the source.
    """
    cut, count = step.cuts[..., k], step.domain.count()
    inner = step.domain.at(np.clip(cut, 0, count - 1))
    if np.dtype(dtype).kind == "f":
        return np.where(cut <= 0, -np.inf, np.where(cut >= count, np.inf, inner)).astype(dtype)
    info = np.iinfo(dtype)
    inner = np.clip(np.ceil(inner), info.min, info.max).astype(np.int64)
    return np.where(cut <= 0, info.min, np.where(cut >= count, info.max, inner)).astype(dtype)
