"""Functions that are monotone piece by piece: absolute values, products with a step function, clips spelled by ``|x| - |x - a|``.

A :class:`Pieces` is one float32 function of its source, kept as code like :class:`bnntvm.levels.Mono`, with cuts between which it is
monotone. Applying a quantiser bisects inside every piece. Where two summands pull apart (``x - relu(x - a)`` beyond a) no direction is
known, but often the real function is constant there and only rounding is left; so every piece may also carry a first-order model
``slope * x + offset`` with a bound of its rounding errors (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 2.2: one
relative error of 2**-24 per operation). A piece without slope lies in an interval around its offset, and a quantiser that is constant
there is decided.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bnntvm.levels import MAX_TABLE, Mono, Step, compress, first, quiet

#: One rounding, relative.
EPS = 2.0**-24
#: The direction of a piece of which nothing is known.
UNKNOWN = 2
#: More pieces than this are not followed.
MAX_PIECES = 24
#: Bounds of |x| that are tried for a piece whose rounding errors grow with it, and the least that is taken for out of the ordinary.
BOUNDS = [2.0**k for k in range(24, 11, -1)]


@dataclass(frozen=True, eq=False)
class Pieces:
    """``tensor = function(source)``, monotone within each piece.

    Attributes
    ----------
    cuts : np.ndarray
        int64 S + (P-1,), non-decreasing: the numbers of the source at which pieces begin.
    directions : np.ndarray
        int8 S + (P,): 1, -1, 0 (constant) or UNKNOWN.
    model : callable
        ``model(bound) -> (slope, offset, error)``, float64 S + (P,) each: ``|function(x) - slope * x - offset| <= error`` for all x of the
        piece with ``|x| <= bound``; NaN where nothing is known.
    """

    source: object
    domain: object
    cuts: np.ndarray
    directions: np.ndarray
    function: object
    model: object
    integral: bool = False

    @property
    def shape(self):
        return self.directions.shape[:-1]

    def starts(self):
        """int64 S + (P,): the first number of every piece."""
        return np.concatenate([np.zeros((*self.shape, 1), np.int64), self.cuts], -1)

    def stops(self):
        """int64 S + (P,): the number after the last of every piece."""
        return np.concatenate([self.cuts, np.full((*self.shape, 1), self.domain.count())], -1)

    def edges(self):
        """The function's values at the first and last number of every piece, float32 S + (P,)."""
        values = []
        for numbers in (self.starts(), self.stops() - 1):
            numbers = np.clip(numbers, 0, self.domain.count() - 1)
            columns = [np.broadcast_to(quiet(self.function, self.domain.at(numbers[..., p])), self.shape) for p in range(numbers.shape[-1])]
            values.append(np.stack(columns, -1))
        return values

    def reach(self):
        """The largest magnitude of the source in every piece, S + (P,)."""
        return _reach(self.domain, self.starts(), self.stops())

    def useful(self):
        """Whether every piece has a direction, or a model without slope."""
        unknown = (self.directions == UNKNOWN) & (self.stops() > self.starts())
        if not unknown.any():
            return True
        slope, offset, error = quiet(self.model, BOUNDS[-1])
        return bool(np.all(~unknown | (slope == 0) & np.isfinite(offset) & np.isfinite(error)))

    def bound(self):
        """The largest magnitude of the source."""
        ends = self.domain.at(np.array([0, self.domain.count() - 1]))
        return float(np.max(np.abs(ends)))


def _reach(domain, starts, stops):
    """Largest magnitude of the source's values with numbers from ``starts`` to before ``stops``."""
    return np.maximum(*(np.abs(domain.at(np.clip(v, 0, domain.count() - 1)).astype(np.float64)) for v in (starts, stops - 1)))


def no_model(shape):
    """The model of a function of which nothing is known."""
    nothing = np.full(shape, np.nan)
    return lambda bound: (nothing, nothing, nothing)


def as_pieces(fact):
    """A Mono or a Step as Pieces."""
    if isinstance(fact, Pieces):
        return fact
    if isinstance(fact, Mono):
        known = fact.parts() if fact.parts is not None else None
        return known if known is not None else _single(fact, no_model((*fact.shape, 1)))
    table = fact.values.astype(np.float64)
    flat = np.zeros_like(table)
    directions = np.zeros(table.shape, np.int8)
    whole = bool(np.all(table == np.rint(table)))
    return Pieces(fact.source, fact.domain, fact.cuts, directions, step_function(fact), lambda bound: (flat, table, flat), whole)


def _single(fact, model):
    """A Mono as one piece."""
    cuts = np.zeros((*fact.shape, 0), np.int64)
    return Pieces(fact.source, fact.domain, cuts, fact.direction[..., None].astype(np.int8), fact.function, model, fact.integral)


def whole_source(fact):
    """The identity on a source as one piece: slope 1, no error."""
    one = np.ones((*fact.shape, 1))
    return _single(fact, lambda bound: (one, 0 * one, 0 * one))


def step_function(step):
    """A Step as a function of the source's values."""
    count = step.domain.count()
    thresholds = step.domain.at(np.clip(step.cuts, 0, count - 1))
    thresholds = np.where(step.cuts >= count, np.inf, np.where(step.cuts <= 0, -np.inf, thresholds)).astype(np.float32)

    def function(x):
        out = step.values[..., 0]
        for k in range(thresholds.shape[-1]):
            out = np.where(x >= thresholds[..., k], step.values[..., k + 1], out)
        return out

    return function


def simplest(pieces):
    """The same as a Step (all pieces constant), a Mono (one direction, across cuts too), or as it is; None if it is too large."""
    pieces = _joined(pieces)
    count = pieces.directions.shape[-1]
    if count > MAX_PIECES or pieces.directions.size > MAX_TABLE:
        return None
    if np.all((pieces.directions == 0) | (pieces.stops() <= pieces.starts())):
        values = pieces.edges()[0]
        return compress(Step(pieces.source, pieces.domain, pieces.cuts, values))
    if np.any((pieces.directions == UNKNOWN) & (pieces.stops() > pieces.starts())):
        return pieces
    way = _one_way(pieces)
    if way is None:
        return pieces
    return Mono(pieces.source, pieces.domain, pieces.function, way, pieces.integral, lambda: pieces, pieces.integral)


def _joined(pieces):
    """Without pieces that no element of S has."""
    keep = [p for p in range(pieces.directions.shape[-1]) if np.any(pieces.stops()[..., p] > pieces.starts()[..., p])]
    if len(keep) == pieces.directions.shape[-1] or not keep:
        return pieces
    cuts = pieces.starts()[..., keep][..., 1:]
    old = pieces.model
    return Pieces(
        pieces.source, pieces.domain, cuts, pieces.directions[..., keep], pieces.function,
        lambda bound: tuple(v[..., keep] for v in old(bound)), pieces.integral,
    )  # fmt: skip


def _one_way(pieces):
    """The direction of the whole function, int8 S, or None where it turns."""
    first_values, last_values = pieces.edges()
    there = pieces.stops() > pieces.starts()
    rises = np.any(there & (pieces.directions == 1), -1)
    falls = np.any(there & (pieces.directions == -1), -1)
    for p in range(1, there.shape[-1]):
        before = np.max(np.where(there[..., :p], np.arange(p), -1), -1)
        last = np.take_along_axis(last_values, np.maximum(before, 0)[..., None], -1)[..., 0]
        both = there[..., p] & (before >= 0)
        rises |= both & (first_values[..., p] > last)
        falls |= both & (first_values[..., p] < last)
        if np.any(both & (np.isnan(first_values[..., p]) | np.isnan(last))):
            return None
    return None if np.any(rises & falls) else rises.astype(np.int8) - falls.astype(np.int8)


def _split(pieces, level):
    """Every piece in two, where the function reaches ``level`` (float32, broadcasts against S). Pieces of unknown direction keep all.

    Returns
    -------
    (Pieces, np.ndarray)
        The pieces, and bool S + (2P,): where the function is below the level.
    """
    shape = np.broadcast_shapes(pieces.shape, np.shape(level))
    starts, stops = (np.broadcast_to(v, (*shape, v.shape[-1])) for v in (pieces.starts(), pieces.stops()))
    ways = np.broadcast_to(pieces.directions, starts.shape)
    at_start = np.broadcast_to(pieces.edges()[0], starts.shape)
    cuts, below = [], []
    for p in range(starts.shape[-1]):
        way = ways[..., p]

        def reached(x, way=way):
            value = pieces.function(x)
            return np.where(way < 0, value <= level, value >= level)

        middle = first(pieces.domain, reached, shape, starts[..., p], np.maximum(starts[..., p], stops[..., p]))
        cuts += [starts[..., p], np.where((way == UNKNOWN) | (way == 0), stops[..., p], middle)]
        under = quiet(lambda v, way=way: np.where(way == 0, v < level, way > 0), at_start[..., p])
        below += [under, np.where(way == 0, under, way < 0)]
    old = pieces.model
    made = Pieces(
        pieces.source, pieces.domain, np.stack(cuts[1:], -1), np.repeat(ways, 2, -1), pieces.function,
        lambda bound: tuple(np.repeat(np.broadcast_to(v, starts.shape), 2, -1) for v in old(bound)), pieces.integral,
    )  # fmt: skip
    return made, np.stack([np.broadcast_to(b, shape) for b in below], -1)


def _image(model, function):
    """Model of a non-decreasing function of pieces without slope: the image of the interval."""
    slope, offset, error = model
    flat = slope == 0
    low, high = (quiet(function, np.where(flat, v, 0).astype(np.float32)).astype(np.float64) for v in (offset - error, offset + error))
    radius = (high - low) / 2 + 2 * EPS * (np.abs(low) + np.abs(high))
    return np.where(flat, 0.0, np.nan), np.where(flat, (low + high) / 2, np.nan), np.where(flat, np.where(high == low, 0.0, radius), np.nan)


def absolute(fact):
    """``abs``: every piece is split where the function crosses zero."""
    pieces, below = _split(as_pieces(fact), np.float32(0))
    turns = np.where(pieces.directions == UNKNOWN, UNKNOWN, np.where(below, -pieces.directions, pieces.directions))
    old, function = pieces.model, pieces.function

    def model(bound):
        slope, offset, error = old(bound)
        either = (pieces.directions == UNKNOWN) & ((slope != 0) | (np.abs(offset) < error))
        sign = np.where(either, np.nan, np.where(pieces.directions == UNKNOWN, np.where(offset < 0, -1, 1), np.where(below, -1, 1)))
        return slope * sign, offset * sign, error + 0 * sign

    return simplest(
        Pieces(pieces.source, pieces.domain, pieces.cuts, turns.astype(np.int8), lambda x: np.abs(function(x)), model, pieces.integral)
    )


def limited(fact, level, upper, function):
    """Pieces of ``minimum(fact, level)`` (``upper``) or ``maximum(fact, level)``; ``function`` computes it from the tensor's value."""
    pieces, below = _split(as_pieces(fact), level)
    known = pieces.directions != UNKNOWN
    held = known & (~below if upper else below)
    old, inner = pieces.model, pieces.function
    number = np.broadcast_to(np.asarray(level, np.float64)[..., None], below.shape)

    def model(bound):
        values = old(bound)
        image = _image(values, lambda v: function(v, number.astype(np.float32)))
        fixed = (np.zeros_like(number), number, np.zeros_like(number))
        return tuple(np.where(held, f, np.where(known, v, i)) for f, v, i in zip(fixed, values, image))

    whole = bool(np.all(number == np.rint(number)))
    return Pieces(
        pieces.source, pieces.domain, pieces.cuts, np.where(held, 0, pieces.directions).astype(np.int8),
        lambda x: function(inner(x), level), model, pieces.integral and whole,
    )  # fmt: skip


def shifted(fact, name, level, swapped, function):
    """Pieces of a sum, difference, product or quotient with constants of known signs (float32, broadcast against S)."""
    pieces = as_pieces(fact)
    shape = (*np.broadcast_shapes(pieces.shape, level.shape), 1)
    number, old, inner = np.asarray(level, np.float64)[..., None] + np.zeros(shape), pieces.model, pieces.function
    turn = np.sign(number) if name in ("multiply", "divide") else -1 if name == "subtract" and swapped else 1
    directions = np.where(pieces.directions == UNKNOWN, UNKNOWN, pieces.directions * turn)
    directions = np.where((pieces.directions == UNKNOWN) & (turn == 0), 0, directions)

    def model(bound):
        slope, offset, error = old(bound)
        bound = np.minimum(bound, pieces.reach())
        if name in ("multiply", "divide"):
            by = number if name == "multiply" else 1 / number
            return _rounded(slope * by, offset * by, error * np.abs(by), bound)
        if name == "subtract" and swapped:
            return _rounded(-slope, number - offset, error, bound)
        return _rounded(slope, offset + (number if name == "add" else -number), error, bound)

    whole = pieces.integral and name in ("add", "subtract") and bool(np.all(number == np.rint(number)))
    made = (lambda x: function(level, inner(x))) if swapped else (lambda x: function(inner(x), level))
    cuts = np.broadcast_to(pieces.cuts, (*shape[:-1], pieces.cuts.shape[-1]))
    directions = np.broadcast_to(directions, (*shape[:-1], directions.shape[-1])).astype(np.int8)
    return Pieces(pieces.source, pieces.domain, cuts, directions, made, model, whole)


def rising(fact, function, integral=False):
    """A non-decreasing elementwise function of Pieces."""
    inner, old = fact.function, fact.model

    def model(bound):
        return _image(old(bound), function)

    return simplest(Pieces(fact.source, fact.domain, fact.cuts, fact.directions, lambda x: function(inner(x)), model, integral))


def negative(fact):
    """``-tensor``."""
    inner, old = fact.function, fact.model
    directions = np.where(fact.directions == UNKNOWN, UNKNOWN, -fact.directions).astype(np.int8)

    def model(bound):
        slope, offset, error = old(bound)
        return -slope, -offset, error

    return Pieces(fact.source, fact.domain, fact.cuts, directions, lambda x: -inner(x), model, fact.integral)


def combine(name, function, a, b):
    """``function(a, b)`` of two facts about one source; None if nothing is known of it."""
    a, b = as_pieces(a), as_pieces(b)
    if name == "multiply":  # a factor's sign turns the other
        a, b = (_split(f, np.float32(0))[0] if np.any(f.directions) and f.directions.shape[-1] <= MAX_PIECES else f for f in (a, b))
    shape = np.broadcast_shapes(a.shape, b.shape)
    many = a.directions.shape[-1] + b.directions.shape[-1]
    if many > 2 * MAX_PIECES or int(np.prod(shape)) * many > MAX_TABLE:
        return None
    cuts = np.sort(np.concatenate([np.broadcast_to(f.cuts, (*shape, f.cuts.shape[-1])) for f in (a, b)], -1), -1)
    starts = np.concatenate([np.zeros((*shape, 1), np.int64), cuts], -1)
    at = [np.sum(starts[..., :, None] >= np.broadcast_to(f.cuts, (*shape, f.cuts.shape[-1]))[..., None, :], -1) for f in (a, b)]

    def spread(values, which):
        return np.take_along_axis(np.broadcast_to(values, (*shape, values.shape[-1])), at[which], -1)

    da, db = spread(a.directions, 0), spread(b.directions, 1)
    ranges = [_ranges(f, cuts, starts) for f in (a, b)] if name == "multiply" else []
    directions = DIRECTIONS[name](da, db, *ranges)

    def model(bound):
        ma, mb = (tuple(spread(v, i) for v in f.model(bound)) for i, f in enumerate((a, b)))
        stops = np.concatenate([cuts, np.full((*shape, 1), a.domain.count())], -1)
        return MODELS[name](ma, mb, np.minimum(bound, _reach(a.domain, starts, stops)))

    fa, fb = a.function, b.function
    integral = a.integral and b.integral
    return simplest(Pieces(a.source, a.domain, cuts, directions.astype(np.int8), lambda x: function(fa(x), fb(x)), model, integral))


def _ranges(pieces, cuts, starts):
    """Least and greatest value of a function at the ends of the pieces between ``cuts``."""
    shape, count = starts.shape[:-1], pieces.domain.count()
    stops = np.concatenate([cuts, np.full((*shape, 1), count)], -1)
    ends = []
    for numbers in (starts, stops - 1):
        numbers = np.clip(numbers, 0, count - 1)
        columns = [np.broadcast_to(quiet(pieces.function, pieces.domain.at(numbers[..., p])), shape) for p in range(numbers.shape[-1])]
        ends.append(np.stack(columns, -1))
    return np.minimum(*ends), np.maximum(*ends)


def _together(da, db):
    """Direction of a function that rises with both."""
    known = (da != UNKNOWN) & (db != UNKNOWN) & (da * db >= 0)
    return np.where(known, np.where(da != 0, da, db), UNKNOWN)


def _apart(da, db):
    return _together(da, np.where(db == UNKNOWN, UNKNOWN, -db))


def _product(da, db, range_a, range_b):
    """Direction of a product: each factor rises with the other's sign."""

    def sign(low, high):
        return np.where(low >= 0, 1, np.where(high <= 0, -1, UNKNOWN))

    def turned(direction, by):
        return np.where(direction == 0, 0, np.where((direction == UNKNOWN) | (by == UNKNOWN), UNKNOWN, direction * by))

    sa, sb = (np.where(d == UNKNOWN, UNKNOWN, sign(*r)) for d, r in ((da, range_a), (db, range_b)))
    finite = [np.isfinite(low) & np.isfinite(high) for low, high in (range_a, range_b)]
    dead = ((da == 0) & (range_a[0] == 0) & (db != UNKNOWN) & finite[1]) | ((db == 0) & (range_b[0] == 0) & (da != UNKNOWN) & finite[0])
    return np.where(dead, 0, _together(turned(da, sb), turned(db, sa)))


DIRECTIONS = {"add": _together, "maximum": _together, "minimum": _together, "subtract": _apart, "multiply": _product}


def _rounded(slope, offset, error, bound):
    """One rounding more."""
    return slope, offset, error + EPS * (np.abs(slope) * bound + np.abs(offset) + error)


def _model_sum(sign):
    return lambda a, b, bound: _rounded(a[0] + sign * b[0], a[1] + sign * b[1], a[2] + b[2], bound)


def _model_product(a, b, bound):
    """Known where one factor is an exact constant."""
    flat_a, flat_b = (a[0] == 0) & (a[2] == 0), (b[0] == 0) & (b[2] == 0)
    by, other = np.where(flat_a, a[1], np.where(flat_b, b[1], np.nan)), [np.where(flat_a, q, p) for p, q in zip(a, b)]
    zero = (flat_a & (a[1] == 0)) | (flat_b & (b[1] == 0))
    out = _rounded(other[0] * by, other[1] * by, other[2] * np.abs(by), bound)
    return tuple(np.where(zero, 0.0, v) for v in out)


def _model_unknown(a, b, _bound):
    nothing = np.full(np.broadcast_shapes(a[0].shape, b[0].shape), np.nan)
    return nothing, nothing, nothing


MODELS = {
    "add": _model_sum(1), "subtract": _model_sum(-1), "multiply": _model_product, "maximum": _model_unknown, "minimum": _model_unknown,
}  # fmt: skip


def quantise_pieces(pieces, index, table):
    """``table[index(tensor)]`` as a Step, and the bound of |source| up to which that is proven (None: everywhere); None if it is no Step.

    Parameters
    ----------
    index : callable
        Non-decreasing function of the tensor's value to level numbers 0..L-1.
    table : np.ndarray
        Value of each level, S' + (L,).
    """
    levels = table.shape[-1]
    shape = np.broadcast_shapes(pieces.shape, table.shape[:-1])
    count = pieces.directions.shape[-1]
    if int(np.prod(shape)) * count * levels > MAX_TABLE:
        return None
    starts, stops = (np.broadcast_to(v, (*shape, count)) for v in (pieces.starts(), pieces.stops()))
    directions, table = np.broadcast_to(pieces.directions, (*shape, count)), np.broadcast_to(table, (*shape, levels))
    fixed, proven = _constant_levels(pieces, index, shape)
    if fixed is None and np.any((directions == UNKNOWN) & (stops > starts)):
        return None
    cuts, values = [], []
    for p in range(count):
        way, low, high = directions[..., p], starts[..., p], np.maximum(starts[..., p], stops[..., p])
        for k in range(levels):
            if k:
                cuts.append(np.where(way == UNKNOWN, high, _bisect(pieces, index, way, k, levels, shape, low, high)))
            elif p:
                cuts.append(low)
            value = np.where(way < 0, table[..., levels - 1 - k], table[..., k])
            if np.any(way == UNKNOWN):
                settled = np.take_along_axis(table, fixed[..., p : p + 1], -1)[..., 0]
                value = np.where(way == UNKNOWN, settled, value)
            values.append(value)
    cuts = np.stack(cuts, -1) if cuts else np.zeros((*shape, 0), np.int64)
    step = compress(Step(pieces.source, pieces.domain, cuts, np.stack(values, -1)))
    return step, proven


def _bisect(pieces, index, way, k, levels, shape, low, high):
    """The first number of a piece that reaches level k (from the other end where the piece falls)."""

    def reached(x):
        level = np.broadcast_to(index(pieces.function(x)), shape)
        return np.where(way < 0, level <= levels - 1 - k, level >= k)

    return first(pieces.domain, reached, shape, low, high)


def _constant_levels(pieces, index, shape):
    """Level numbers of the pieces of unknown direction (int64 S + (P,)), and up to which |source| they are proven (None: everywhere)."""
    count = pieces.directions.shape[-1]
    open_ = np.broadcast_to((pieces.directions == UNKNOWN) & (pieces.stops() > pieces.starts()), (*shape, count))
    if not open_.any():
        return np.zeros((*shape, count), np.int64), None
    whole = pieces.bound()
    tries = [whole] if whole <= BOUNDS[0] else [whole, *BOUNDS] if not pieces.domain.integer else [whole]
    for bound in tries:
        slope, offset, error = quiet(pieces.model, bound)
        flat = np.broadcast_to((slope == 0) & np.isfinite(offset) & np.isfinite(error), (*shape, count))
        low, high = (
            np.stack([np.broadcast_to(quiet(index, np.nan_to_num(v[..., p]).astype(np.float32)), shape) for p in range(count)], -1)
            for v in (offset - error, offset + error)
        )
        if np.all(~open_ | (flat & (low == high))):
            return np.where(open_, low, 0), (None if bound == whole else bound)
    return None, None


def select(condition, yes, no):
    """``where(condition, yes, no)`` with a Step of truth values and any facts about the same source."""
    truth = Step(condition.source, condition.domain, condition.cuts, (condition.values != 0).astype(np.float32))
    c, y, n = as_pieces(truth), as_pieces(yes), as_pieces(no)
    shape = np.broadcast_shapes(c.shape, y.shape, n.shape)
    facts = (c, y, n)
    if sum(f.directions.shape[-1] for f in facts) > 2 * MAX_PIECES:
        return None
    cuts = np.sort(np.concatenate([np.broadcast_to(f.cuts, (*shape, f.cuts.shape[-1])) for f in facts], -1), -1)
    starts = np.concatenate([np.zeros((*shape, 1), np.int64), cuts], -1)
    at = [np.sum(starts[..., :, None] >= np.broadcast_to(f.cuts, (*shape, f.cuts.shape[-1]))[..., None, :], -1) for f in facts]

    def spread(values, which):
        return np.take_along_axis(np.broadcast_to(values, (*shape, values.shape[-1])), at[which], -1)

    chosen = spread(truth.values, 0) != 0
    directions = np.where(chosen, spread(y.directions, 1), spread(n.directions, 2)).astype(np.int8)

    def model(bound):
        return tuple(np.where(chosen, spread(p, 1), spread(q, 2)) for p, q in zip(y.model(bound), n.model(bound)))

    def function(x):
        return np.where(c.function(x) != 0, y.function(x), n.function(x))

    return simplest(Pieces(c.source, c.domain, cuts, directions, function, model, y.integral and n.integral))
