"""Infer which tensors hold only a few levels, by abstract interpretation.

Works on channels-last graphs before and after binarisation: an elementwise chain over a float tensor is described as a function of that
tensor, one over the integer accumulator of a packed convolution as a function of the accumulator. Nothing is matched by name of idiom;
each elementwise operator has a transfer function, and a spelling of sign(x) is whatever composition of them yields two or three levels.

The result maps every variable to a fact of :mod:`bnntvm.levels` (absent: nothing known beyond its dtype).
"""

from __future__ import annotations

import numpy as np
from tvm import relax

from bnntvm.graph import bindings, constant, dtype, op_name, operands
from bnntvm.levels import (
    ALL_FLOATS,
    MAX_LEVELS,
    MAX_TABLE,
    Domain,
    Linear,
    Mono,
    Step,
    compress,
    ends,
    identity,
    map_step,
    merge_steps,
    plateaus,
    quantise,
    quiet,
)
from bnntvm.pieces import (
    BOUNDS,
    UNKNOWN,
    Pieces,
    absolute,
    as_pieces,
    combine,
    limited,
    negative,
    quantise_pieces,
    rising,
    select,
    shifted,
    simplest,
    whole_source,
)

_f32 = np.float32
#: Activations of this magnitude are nothing out of the ordinary.
_USUAL = 4096.0


def _sigmoid(x):
    return (_f32(1) / (_f32(1) + np.exp(-x))).astype(_f32)


#: name -> numpy function, non-decreasing on floats
RISING = {
    "nn.relu": lambda x: np.maximum(x, _f32(0)),
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "exp": np.exp,
    "sqrt": lambda x: np.sqrt(np.maximum(x, _f32(0))),
}
#: name -> numpy function whose result on a Mono is a step function over integers
ROUNDING = {"round": np.rint, "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc}
#: comparisons: value for below, equal, above
COMPARISONS = {
    "less": (1, 0, 0), "less_equal": (1, 1, 0), "equal": (0, 1, 0), "not_equal": (1, 0, 1), "greater_equal": (0, 1, 1),
    "greater": (0, 0, 1),
}  # fmt: skip
MIRRORED = {
    "less": "greater", "less_equal": "greater_equal", "greater": "less", "greater_equal": "less_equal", "equal": "equal",
    "not_equal": "not_equal",
}  # fmt: skip
UNARY = {
    **RISING, **ROUNDING, "sign": np.sign, "abs": np.abs, "negative": np.negative, "logical_not": np.logical_not, "square": np.square,
    "rsqrt": lambda x: _f32(1) / np.sqrt(x), "log": np.log,
}  # fmt: skip
BINARY = {
    "add": np.add, "subtract": np.subtract, "multiply": np.multiply, "divide": np.divide, "maximum": np.maximum, "minimum": np.minimum,
    "power": np.power, "less": np.less, "less_equal": np.less_equal, "equal": np.equal, "not_equal": np.not_equal, "greater": np.greater,
    "greater_equal": np.greater_equal, "logical_and": np.logical_and, "logical_or": np.logical_or, "logical_xor": np.logical_xor,
}  # fmt: skip
#: Integer types whose values are followed.
INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64")
#: Layers on packed planes; their accumulators are integers.
PACKED_LAYERS = {
    "bnn.conv2d_bits", "bnn.dense_bits", "bnn.conv2d_planes", "bnn.dense_planes", "bnn.matmul_bits", "bnn.dense_weight", "bnn.conv2d_int8",
}  # fmt: skip
#: Operators that only move values.
MOVING = {
    "reshape", "permute_dims", "strided_slice", "take", "squeeze", "expand_dims", "nn.max_pool2d", "broadcast_to", "flatten", "tile", "max",
    "min",
}  # fmt: skip


def infer_levels(func):
    """The :class:`Analysis` of a whole function."""
    analysis = Analysis(func.params)
    for binding in bindings(func):
        analysis.visit(binding.var, binding.value)
    return analysis


def _domain_of_dtype(kind):
    if kind == "bool":
        return Domain(values=(0.0, 1.0))
    if kind in ("int8", "uint8"):
        info = np.iinfo(kind)
        return Domain(info.min, info.max, 1)
    return ALL_FLOATS


class Analysis:
    """Facts about the variables of a function that is visited binding by binding.

    Attributes
    ----------
    facts : dict
        relax.Var -> Mono | Pieces | Step.
    linear : dict
        relax.Var -> Linear: sums in which a straight-through term may still cancel.
    rounds : dict
        relax.Var -> the variable that it is the rounding of.
    assumed : dict
        Source -> magnitude that it must not exceed for the levels inferred from it to be exact, where that is neither proven nor part of
        the levels: what it is rounded to beyond is noise.
    """

    def __init__(self, params=()):
        self.facts, self.linear, self.negations, self.rounds, self.assumed = {}, {}, {}, {}, {}
        for param in params:
            self.facts[param] = _source(param, _domain_of_dtype(dtype(param)))

    def visit(self, var, value):
        """Learn about ``var``, bound to ``value``."""
        if not isinstance(var.ty, relax.TensorType):
            return
        if isinstance(value, relax.Var):
            self.facts[var] = self.facts.get(value)
            return
        name = (op_name(value) or "").removeprefix("relax.")
        fact = None
        if name == "negative" and isinstance(value.args[0], relax.Var):
            self.negations[var] = (value.args[0], -1)
        if name in ROUNDING and isinstance(value.args[0], relax.Var):
            self.rounds[var] = value.args[0]
        if dtype(var) in ("float32", "bool", *INTEGERS):
            fact = self.transfer(name, var, value)
            if fact is None and self.resourced(value):
                fact = self.transfer(name, var, value)
        if isinstance(fact, Pieces) and not fact.useful():
            fact = None
        self.facts[var] = fact if fact is not None else _source(var, self.domain(name, var, value))

    def resourced(self, call):
        """Make operands with unknown pieces sources of their own; whether there are any."""
        lost = [arg for arg in operands(call) if isinstance(fact := self.facts.get(arg), Pieces) and np.any(fact.directions == UNKNOWN)]
        for arg in lost:
            low, high = _ends(self.facts[arg])
            low, high = float(np.min(low)), float(np.max(high))
            self.facts[arg] = _source(arg, Domain(low, high) if np.isfinite([low, high]).all() else _domain_of_dtype(dtype(arg)))
        return bool(lost)

    def transfer(self, name, var, call):
        if name == "astype":
            return self.cast(self.facts.get(call.args[0]), dtype(var))
        if name == "where":
            return self.where(call)
        if name in UNARY and len(call.args) == 1:
            return self.unary(name, call.args[0])
        if name in BINARY and len(call.args) == 2:
            return self.binary(name, var, *call.args)
        return None

    def unary(self, name, arg):
        fact, function = self.facts.get(arg), UNARY[name]
        if isinstance(fact, Step):
            return map_step(fact, function)
        if not isinstance(fact, (Mono, Pieces)):
            return None
        if name == "abs":
            return absolute(fact)
        if name == "square":
            return combine("multiply", np.multiply, fact, fact)
        if name == "sign":
            return self.quantised(fact, lambda x: np.sign(x).astype(np.int64) + 1, np.array([-1, 0, 1], _f32))
        if name in ROUNDING:
            return self.rounded(fact, function)
        if name == "nn.relu":
            return self.arithmetic("maximum", fact, np.zeros((), _f32), False)
        if isinstance(fact, Pieces):
            if name == "negative":
                return negative(fact)
            return rising(fact, function) if name in RISING or name == "log" and np.min(_ends(fact)[0]) > 0 else None
        if name == "negative":
            parts = lambda: negative(as_pieces(fact))  # noqa: E731
            return Mono(fact.source, fact.domain, lambda x: -fact.function(x), -fact.direction, fact.integral, parts, fact.stepped)
        if name in RISING or name == "log" and np.min(ends(fact)[0]) > 0:
            return Mono(fact.source, fact.domain, lambda x: function(fact.function(x)), fact.direction, stepped=fact.stepped)
        return None

    def quantised(self, fact, index, table):
        """The Step ``table[index(tensor)]``; None if it is none."""
        if isinstance(fact, Mono):
            return quantise(fact, index, table)
        made = quantise_pieces(fact, index, table)
        if made is None:
            return None
        step, proven = made
        self.assume(fact.source, proven)
        return step

    def assume(self, source, bound):
        """Remember that facts hold for magnitudes of ``source`` up to ``bound`` (None: whatever they are)."""
        if bound is not None:
            self.assumed[source] = min(bound, self.assumed.get(source, bound))

    def settled(self, fact):
        """A function with few values that are integers or functions of integers as the Step that it is."""
        if isinstance(fact, Mono) and fact.stepped and not fact.integral:
            low, high = ends(fact)
            small = np.all(np.isfinite(low) & np.isfinite(high)) and np.max(np.abs([low, high])) < _USUAL
            return (plateaus(fact) if small else None) or fact
        return self.rounded(fact, np.rint) if getattr(fact, "integral", False) else fact

    def rounded(self, fact, function):
        # Levels that only rounding errors of large numbers reach are none: quantise_pieces proves up to where there are no others.
        low, high = (function(v) for v in _ends(fact, BOUNDS[-1]))
        low, high = float(np.min(low)), float(np.max(high))
        if np.isfinite([low, high]).all() and high - low + 1 <= MAX_LEVELS:
            levels = np.arange(low, high + 1, dtype=_f32)
            step = self.quantised(fact, lambda x: np.clip(function(x) - low, 0, high - low).astype(np.int64), levels)
            if step is not None or isinstance(fact, Mono):
                return step
        if isinstance(fact, Pieces):
            return rising(fact, function, integral=True) if not fact.integral else fact
        return Mono(fact.source, fact.domain, lambda x: function(fact.function(x)), fact.direction, integral=True, stepped=True)

    def cast(self, fact, kind):
        if isinstance(fact, Step):
            return map_step(fact, lambda v: v.astype(kind) if kind != "bool" else v != 0)
        if not isinstance(fact, (Mono, Pieces)):
            return None
        if kind == "float32":
            return fact
        if kind not in INTEGERS:
            return None
        low, high = _ends(fact)
        info = np.iinfo(kind)
        inside = np.all(np.trunc(low) >= info.min) and np.all(np.trunc(high) <= info.max)  # beyond its range a cast is undefined
        return self.rounded(fact, np.trunc) if inside or kind in ("int32", "int64") else None

    def binary(self, name, var, lhs, rhs):
        a, b = constant(lhs), constant(rhs)
        if a is not None and b is not None:
            return None
        if b is not None:
            return self.with_constant(name, lhs, b, swapped=False)
        if a is not None:
            return self.with_constant(name, rhs, a, swapped=True)
        fa, fb = self.facts.get(lhs), self.facts.get(rhs)
        if isinstance(fa, Step) and isinstance(fb, Step) and fa.source == fb.source:
            return merge_steps(fa, fb, BINARY[name])
        if name in ("add", "subtract"):
            step = self.linear_sum(var, lhs, rhs, 1 if name == "add" else -1)
            if step is not None:
                return step
        about_one = fa is not None and fb is not None and getattr(fa, "source", None) == getattr(fb, "source", None)
        if about_one and name in ("add", "subtract", "multiply", "maximum", "minimum") and dtype(var) == "float32":
            return self.settled(combine(name, BINARY[name], fa, fb))
        return None

    def linear_sum(self, var, lhs, rhs, sign):
        """``lhs + sign * rhs``: a Step once a straight-through term has cancelled; else None, and levels plus one term are remembered."""
        for levels, turn, other, s in ((lhs, 1, rhs, sign), (rhs, sign, lhs, 1)):
            known = self.as_linear(levels)
            if known is None:
                continue
            term, k = self.negations.get(other, (other, 1))
            if not known.terms:
                self.linear.setdefault(var, Linear(self.turned(known.base, turn), {term: s * k}, known.rounds))
            elif known.rounds is not None and known.terms == {term: -turn * s * k}:
                # t - round(t) is exact (Sterbenz), or round(t) is a power of two with the sign of t, or zero: so is the sum.
                return self.turned(known.base, turn) if term == known.rounds else None
            elif known.terms == {term: -turn * s * k}:
                base = known.base if turn > 0 else map_step(known.base, np.negative)
                exact, bounded = self.cancels(base, term, s * k)
                if exact and not bounded:
                    return self.swallowed(var, base, term)
                return base if exact else None
        return None

    def turned(self, fact, sign):
        """``sign * fact``."""
        if sign > 0:
            return fact
        return map_step(fact, np.negative) if isinstance(fact, Step) else negative(as_pieces(fact))

    def swallowed(self, var, base, term):
        """``base`` where the term is small enough for it to survive the sum, 0 where the term has swallowed it.

        Just past the bound the rounding can also leave two levels' worth; up to twice the bound such sums are taken as 0 too.
        """
        fact = self.facts.get(term)
        if not isinstance(fact, Mono) or fact.source != base.source:
            self.assume(base.source, 2.0**24)
            return base
        levels = np.abs(base.levels())
        bound = _f32(2**24) * _f32(levels[levels > 0].min())
        usual = [quiet(fact.function, np.broadcast_to(_f32(x), fact.shape)) for x in (-_USUAL, _USUAL)]
        if not fact.domain.integer and np.max(np.abs(usual)) > bound:
            return None  # a term scaled up so far that the levels are lost as a rule
        kept = quantise(fact, lambda x: (x >= -bound).astype(np.int64) + (x > bound), np.array([0, 1, 0], _f32))
        return merge_steps(base, kept, np.multiply)

    def as_linear(self, var):
        """``var`` as levels, or as levels and one term; None if it is neither."""
        if var in self.linear:
            return self.linear[var]
        fact = self.facts.get(var)
        if isinstance(fact, Step):
            return Linear(fact, {})
        return Linear(fact, {}, self.rounds[var]) if var in self.rounds else None

    def cancels(self, base, term, sign):
        """Whether ``(base - sign * term) + sign * term`` equals ``base``, and whether the term is small enough for that.

        Rounding leaves no trace where the level is 0; where the term is between half and twice the level (Sterbenz); or where the
        level is a power of two, the term has its sign and is below 2**24 levels. Few values are tried out. A term that is no monotone
        function of the source (a polynomial) is trusted if the levels are those of sign(x).
        """
        fact = self.facts.get(term)
        if isinstance(fact, Step):
            q, t = base.levels().astype(_f32)[:, None], (sign * fact.levels()).astype(_f32)
            return bool(np.all((q - t) + t == q)), True
        if not isinstance(fact, (Mono, Pieces)) or fact.source != base.source:
            reach = self.value_domain(term)
            return set(base.levels().tolist()) <= {-1.0, 0.0, 1.0}, max(abs(reach.low), abs(reach.high)) < 2**24
        fact = as_pieces(fact)
        found = [self.cancels_level(base, k, fact, p, sign) for k in range(base.values.shape[-1]) for p in range(fact.directions.shape[-1])]
        exact, bounded = (all(one[i] for one in found) for i in (0, 1))
        if not exact and np.any(fact.directions == UNKNOWN):  # a polynomial, as above
            reach = self.value_domain(term)
            return set(base.levels().tolist()) <= {-1.0, 0.0, 1.0}, max(abs(reach.low), abs(reach.high)) < 2**24
        return exact, bounded

    def cancels_level(self, base, k, fact, p, sign):
        """:meth:`cancels` for one level of ``base`` and one piece of the term."""
        count = fact.domain.count()
        begin = base.cuts[..., k - 1] if k else np.zeros(base.shape, np.int64)
        end = base.cuts[..., k] - 1 if k < base.cuts.shape[-1] else np.full(base.shape, count - 1)
        begin, end = np.maximum(begin, fact.starts()[..., p]), np.minimum(end, fact.stops()[..., p] - 1)
        value, occupied = base.values[..., k].astype(np.float64), end >= begin
        terms = [sign * quiet(fact.function, fact.domain.at(np.clip(i, 0, count - 1))).astype(np.float64) for i in (begin, end)]
        unknown = fact.directions[..., p] == UNKNOWN
        if np.any(unknown & occupied):
            bound = min(fact.bound(), 2.0**20)
            slope, offset, error = (v[..., p] for v in fact.model(bound))
            flat = slope == 0
            terms = [np.where(unknown, np.where(flat, sign * offset + e, np.inf), t) for e, t in zip((-error, error), terms)]
            self.assume(fact.source, bound if bound < fact.bound() else None)
        terms = [np.where(np.isnan(t), value, t) for t in terms]  # where a chain overflows to NaN, the network's result is NaN too
        near, far = np.minimum(*np.abs(terms)), np.maximum(*np.abs(terms))
        same = np.all([(value == 0) | np.where(value > 0, t >= 0, t <= 0) for t in terms], axis=0)
        close = same & (near >= np.abs(value) / 2) & (far <= 2 * np.abs(value)) | (value == 0)
        scaled = same & (np.frexp(np.abs(value))[0] == 0.5)
        exact = bool(np.all(close | scaled | ~occupied))
        return exact, bool(np.all(close | (far < 2**24 * np.abs(value)) | ~occupied))

    def with_constant(self, name, var, other, swapped):
        fact = self.facts.get(var)
        if other.dtype.kind not in "fiub" or other.size > MAX_TABLE:
            return None
        if isinstance(fact, Step):
            c = other[..., None]
            if int(np.prod(np.broadcast_shapes(fact.shape, other.shape))) * fact.values.shape[-1] > MAX_TABLE:
                return None
            function = BINARY[name]
            return _map_broadcast(fact, other.shape, (lambda v: function(c, v)) if swapped else (lambda v: function(v, c)))
        if not isinstance(fact, (Mono, Pieces)):
            return None
        if name in COMPARISONS:
            below_equal_above = COMPARISONS[MIRRORED[name] if swapped else name]
            table = np.broadcast_to(np.array(below_equal_above, bool), (*other.shape, 3))
            other32 = other.astype(_f32)
            return self.quantised(fact, lambda x: (x > other32).astype(np.int64) + (x >= other32), table)
        return self.arithmetic(name, fact, other, swapped)

    def arithmetic(self, name, fact, other, swapped):
        """Mono op constant, where the result is still monotone."""
        if other.dtype != _f32:
            if other.dtype.kind == "b":
                return None
            other = other.astype(_f32)
        sign = np.sign(other).astype(np.int8)
        if name in ("add", "maximum", "minimum"):
            turn = np.ones_like(sign)
        elif name == "subtract":
            turn = np.full_like(sign, -1 if swapped else 1)
        elif name == "multiply" or name == "divide" and not swapped and np.all(other != 0):
            turn = sign
        else:
            return None
        function = BINARY[name]
        if name == "multiply" and np.any(other == 0):
            function = _product_with_zero
        if isinstance(fact, Pieces):
            return self.settled(simplest(_arithmetic_parts(name, fact, other, swapped, function)))
        direction = fact.direction * turn
        integral = fact.integral and name in ("add", "subtract", "maximum", "minimum") and bool(np.all(other == np.rint(other)))
        made = (lambda x: function(other, fact.function(x))) if swapped else (lambda x: function(fact.function(x), other))
        parts = lambda: _arithmetic_parts(name, fact, other, swapped, function)  # noqa: E731
        out = Mono(fact.source, fact.domain, made, direction, integral, parts, fact.stepped)
        return self.settled(out) if integral or name in ("maximum", "minimum") else out

    def where(self, call):
        condition, yes, no = (self.operand(arg) for arg in call.args)
        if not isinstance(condition, Step):
            return None
        if all(isinstance(v, (Step, np.ndarray)) for v in (yes, no)):
            return self.select_steps(condition, yes, no)
        facts = [_constant_step(condition, v) if isinstance(v, np.ndarray) else v for v in (yes, no)]
        if any(v is None or v.source != condition.source for v in facts):
            return None
        return self.settled(select(condition, *facts))

    def operand(self, arg):
        array = constant(arg)
        return array if array is not None else self.facts.get(arg)

    def select_steps(self, condition, yes, no):
        steps = [v if isinstance(v, Step) else _constant_step(condition, v) for v in (yes, no)]
        if any(s.source != condition.source for s in steps):
            return None
        tagged = merge_steps(condition, steps[0], lambda c, v: np.where(c, v, np.nan))
        if tagged is None:
            return None
        return merge_steps(tagged, steps[1], lambda t, v: np.where(np.isnan(t), v, t))

    def domain(self, name, var, call):
        """Values of a tensor that is its own source."""
        if name in PACKED_LAYERS and dtype(var) == "int32":
            low, high, stride = (int(v) for v in call.attrs["reachable"])
            return Domain(low, high, stride)
        if dtype(var) == "bool":
            return Domain(values=(0.0, 1.0))
        if name in MOVING:
            return self.moved([call.args[0]])
        if name == "concat":
            return self.moved(list(call.args[0].fields))
        if name == "nn.pad":
            return self.moved([call.args[0]], float(call.attrs["pad_value"]) if str(call.attrs["pad_mode"]) == "constant" else None)
        if name == "nn.avg_pool2d" or name == "mean":
            return _hull([self.value_domain(call.args[0])], [0.0])
        if dtype(var) == "float32" and (few := self.outcomes(name, call)) is not None:
            return few
        if name in ("add", "subtract"):
            return self.summed(name, call)
        return _domain_of_dtype(dtype(var))

    def outcomes(self, name, call):
        """Domain of an elementwise operator on tensors of few values, whatever they have to do with each other; None if there are many."""
        if name != "where" and (name not in BINARY or len(call.args) != 2):
            return None
        parts = [self.value_domain(arg).values for arg in (call.args[1:] if name == "where" else call.args)]
        if any(part is None for part in parts) or len(parts[0]) * len(parts[1]) > MAX_LEVELS**2:
            return None
        a, b = (np.array(part, _f32) for part in parts)
        values = np.concatenate([a, b]) if name == "where" else quiet(BINARY[name], a[:, None], b)
        values = np.unique(values.astype(_f32) + 0)
        return Domain(values=tuple(values.tolist())) if len(values) <= MAX_LEVELS and np.isfinite(values).all() else None

    def summed(self, name, call):
        parts = [self.value_domain(arg) for arg in call.args]
        low = parts[0].low + (parts[1].low if name == "add" else -parts[1].high)
        high = parts[0].high + (parts[1].high if name == "add" else -parts[1].low)
        return Domain(low, high) if max(abs(low), abs(high)) < 1e38 else ALL_FLOATS

    def moved(self, args, extra=None):
        parts = [self.value_domain(arg) for arg in args]
        if all(p.values is not None for p in parts):
            values = {float(v) + 0.0 for p in parts for v in p.values} | ({extra + 0.0} if extra is not None else set())
            if len(values) <= MAX_LEVELS:
                return Domain(values=tuple(sorted(values)))
        if extra is None and all(p.integer for p in parts) and len({(p.low, p.high, p.stride) for p in parts}) == 1:
            return parts[0]
        return _hull(parts, [] if extra is None else [extra])

    def value_domain(self, arg):
        """Domain of the values of an operand, whatever its source."""
        array = constant(arg)
        if array is not None:
            values = np.unique(array + 0) if array.size else np.zeros(1)
            few = len(values) <= MAX_LEVELS
            return Domain(float(values[0]), float(values[-1]), values=tuple(float(v) for v in values) if few else None)
        fact = self.facts.get(arg)
        if isinstance(fact, Step):
            levels = fact.levels()
            if len(levels) <= MAX_LEVELS:
                return Domain(float(levels[0]), float(levels[-1]), values=tuple(float(v) for v in levels))
        if isinstance(fact, (Mono, Pieces)):
            if isinstance(fact, Mono) and fact.domain.integer and fact.source == arg:
                return fact.domain
            low, high = _ends(fact)
            low, high = float(np.min(low)), float(np.max(high))
            if np.isfinite([low, high]).all():
                return Domain(low, high)
        return ALL_FLOATS


def _hull(parts, more=()):
    """All floats between the least and the greatest value of domains and of ``more`` numbers."""
    lows, highs = [p.values[0] if p.values else p.low for p in parts], [p.values[-1] if p.values else p.high for p in parts]
    return Domain(min([*lows, *more]), max([*highs, *more]))


def _constant_step(like, array):
    """A constant as a Step of the same source with one level."""
    values = np.asarray(array)[..., None]
    return Step(like.source, like.domain, np.zeros((*values.shape[:-1], 0), np.int64), values)


def _map_broadcast(step, shape, function):
    shape = np.broadcast_shapes(step.shape, shape)
    values = np.broadcast_to(step.values, (*shape, step.values.shape[-1]))
    cuts = np.broadcast_to(step.cuts, (*shape, step.cuts.shape[-1]))
    with np.errstate(all="ignore"):
        return compress(Step(step.source, step.domain, cuts, np.asarray(function(values))))


def _source(var, domain):
    """The fact about a tensor that is its own source."""
    fact = identity(var, domain)
    if isinstance(fact, Mono):
        return Mono(fact.source, fact.domain, fact.function, fact.direction, parts=lambda: whole_source(fact))
    return fact


def _product_with_zero(a, b):
    """The product, 0 where one factor is: an overflow elsewhere in a dead channel is no level (the network itself gives NaN there)."""
    return np.where((a == 0) | (b == 0), _f32(0), np.multiply(a, b))


def _arithmetic_parts(name, fact, other, swapped, function):
    """Pieces of ``fact`` (operator) constant."""
    if name in ("maximum", "minimum"):
        return limited(fact, other, name == "minimum", function)
    return shifted(fact, name, other, swapped, function)


def _ends(fact, bound=2.0**24):
    """Smallest and largest value of a Mono or of Pieces (infinite where a piece is not known), arrays of shape S.

    Where a piece's rounding errors grow with the source, those of sources up to ``bound`` are counted.
    """
    if isinstance(fact, Mono):
        return ends(fact)
    begin, end = fact.edges()
    low, high = np.minimum(begin, end).astype(np.float64), np.maximum(begin, end).astype(np.float64)
    unknown, there = fact.directions == UNKNOWN, fact.stops() > fact.starts()
    if np.any(unknown & there):
        slope, offset, error = quiet(fact.model, min(fact.bound(), bound))
        flat = slope == 0
        low = np.where(unknown, np.where(flat, offset - error, -np.inf), low)
        high = np.where(unknown, np.where(flat, offset + error, np.inf), high)
    return np.min(np.where(there, low, np.inf), -1), np.max(np.where(there, high, -np.inf), -1)
