"""Infer which tensors hold only a few levels, by abstract interpretation.

Works on channels-last graphs before and after binarisation: an elementwise chain over a float tensor is described as a function of that
tensor, one over the integer accumulator of a packed convolution as a function of the accumulator. Nothing is matched by name of idiom;
each elementwise operator has a transfer function, and a spelling of sign(x) is whatever composition of them yields two or three levels.

The result maps every variable to a fact of :mod:`bnntvm.levels` (absent: nothing known beyond its dtype).
"""

from __future__ import annotations

import numpy as np
from tvm import relax

from bnntvm.graph import bindings, constant, dtype, op_name
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
    quantise,
    quiet,
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
        relax.Var -> Mono | Step.
    absolutes : dict
        relax.Var -> the Mono whose absolute value it is.
    linear : dict
        relax.Var -> Linear: sums in which a straight-through term may still cancel.
    unbounded : dict
        relax.Var -> variables whose magnitude must stay below 2**24 for a straight-through cancellation to be exact, where that is neither
        proven nor part of the levels.
    """

    def __init__(self, params=()):
        self.facts, self.linear, self.negations, self.absolutes, self.unbounded = {}, {}, {}, {}, {}
        for param in params:
            self.facts[param] = identity(param, _domain_of_dtype(dtype(param)))

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
        if name == "abs" and isinstance(self.facts.get(value.args[0]), Mono):
            self.absolutes[var] = self.facts[value.args[0]]
        if dtype(var) in ("float32", "bool", "int8", "uint8", "int32", "int64"):
            fact = self.transfer(name, var, value)
        self.facts[var] = fact if fact is not None else identity(var, self.domain(name, var, value))

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
        if not isinstance(fact, Mono):
            return None
        if name == "negative":
            return Mono(fact.source, fact.domain, lambda x: -fact.function(x), -fact.direction)
        if name == "sign":
            return quantise(fact, lambda x: np.sign(x).astype(np.int64) + 1, np.array([-1, 0, 1], _f32))
        if name in ROUNDING:
            return self.rounded(fact, function)
        if name in RISING:
            integral = fact.integral and name == "nn.relu"
            return self.settled(Mono(fact.source, fact.domain, lambda x: function(fact.function(x)), fact.direction, integral))
        return None

    def settled(self, fact):
        """A Mono over few integers as the Step that it is."""
        return self.rounded(fact, np.rint) if fact.integral else fact

    def rounded(self, fact, function):
        low, high = (function(v) for v in ends(fact))
        low, high = float(np.min(low)), float(np.max(high))
        if not np.isfinite([low, high]).all() or high - low + 1 > MAX_LEVELS:
            return Mono(fact.source, fact.domain, lambda x: function(fact.function(x)), fact.direction, integral=True)
        levels = np.arange(low, high + 1, dtype=_f32)
        return quantise(fact, lambda x: (function(x) - low).astype(np.int64), levels)

    def cast(self, fact, kind):
        if isinstance(fact, Step):
            return map_step(fact, lambda v: v.astype(kind) if kind != "bool" else v != 0)
        if isinstance(fact, Mono):
            if kind == "float32":
                return fact
            if kind.startswith(("int", "uint")):
                return self.rounded(fact, np.trunc) if kind in ("int32", "int64", "int8") else None
        return None

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
        if isinstance(fa, Mono) and isinstance(fb, Mono) and fa.source == fb.source and name in ("add", "maximum", "minimum"):
            direction = _common_direction(fa.direction, fb.direction)
            if direction is not None:
                function = BINARY[name]
                return Mono(fa.source, fa.domain, lambda x: function(fa.function(x), fb.function(x)), direction)
        return None

    def linear_sum(self, var, lhs, rhs, sign):
        """``lhs + sign * rhs``: a Step once a straight-through term has cancelled; else None, and levels plus one term are remembered."""
        for levels, turn, other, s in ((lhs, 1, rhs, sign), (rhs, sign, lhs, 1)):
            known = self.as_linear(levels)
            if known is None:
                continue
            term, k = self.negations.get(other, (other, 1))
            if not known.terms:
                base = known.base if turn > 0 else map_step(known.base, np.negative)
                self.linear.setdefault(var, Linear(base, {term: s * k}))
            elif known.terms == {term: -turn * s * k}:
                base = known.base if turn > 0 else map_step(known.base, np.negative)
                exact, bounded = self.cancels(base, term, s * k)
                if exact and not bounded:
                    return self.swallowed(var, base, term)
                return base if exact else None
        return None

    def swallowed(self, var, base, term):
        """``base`` where the term is small enough for it to survive the sum, 0 where the term has swallowed it.

        Just past the bound the rounding can also leave two levels' worth; up to twice the bound such sums are taken as 0 too.
        """
        fact = self.facts.get(term)
        if not isinstance(fact, Mono) or fact.source != base.source:
            self.unbounded[var] = [term]
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
        return Linear(fact, {}) if isinstance(fact, Step) else None

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
        if not isinstance(fact, Mono) or fact.source != base.source:
            reach = self.value_domain(term)
            return set(base.levels().tolist()) <= {-1.0, 0.0, 1.0}, max(abs(reach.low), abs(reach.high)) < 2**24
        occupied, count = base.occupied(), fact.domain.count()
        exact = bounded = True
        for k in range(base.values.shape[-1]):
            begin = base.cuts[..., k - 1] if k else np.zeros(base.shape, np.int64)
            end = base.cuts[..., k] - 1 if k < base.cuts.shape[-1] else np.full(base.shape, count - 1)
            value = base.values[..., k].astype(np.float64)
            terms = [sign * quiet(fact.function, fact.domain.at(np.clip(i, 0, count - 1))).astype(np.float64) for i in (begin, end)]
            terms = [np.where(np.isnan(t), value, t) for t in terms]  # where a chain overflows to NaN, the network's result is NaN too
            near, far = np.minimum(*np.abs(terms)), np.maximum(*np.abs(terms))
            same = (value * terms[0] >= 0) & (value * terms[1] >= 0)
            close = same & (near >= np.abs(value) / 2) & (far <= 2 * np.abs(value)) | (value == 0)
            scaled = same & (np.frexp(np.abs(value))[0] == 0.5)
            exact &= bool(np.all(close | scaled | ~occupied[..., k]))
            bounded &= bool(np.all(close | (far < 2**24 * np.abs(value)) | ~occupied[..., k]))
        return exact, bounded

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
        if not isinstance(fact, Mono):
            return None
        if name in COMPARISONS and var in self.absolutes and np.all(other > 0):
            below, equal, above = COMPARISONS[MIRRORED[name] if swapped else name]
            table = np.broadcast_to(np.array([above, equal, below, equal, above], bool), (*other.shape, 5))
            c = other.astype(_f32)
            return quantise(
                self.absolutes[var], lambda x: (x >= -c).astype(np.int64) + (x > -c) + (x >= c) + (x > c), table
            )
        if name in COMPARISONS:
            below_equal_above = COMPARISONS[MIRRORED[name] if swapped else name]
            table = np.broadcast_to(np.array(below_equal_above, bool), (*other.shape, 3))
            other32 = other.astype(_f32)
            return quantise(fact, lambda x: (x > other32).astype(np.int64) + (x >= other32), table)
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
        direction = fact.direction * turn
        integral = fact.integral and name in ("add", "subtract", "maximum", "minimum") and bool(np.all(other == np.rint(other)))
        if swapped:
            return self.settled(Mono(fact.source, fact.domain, lambda x: function(other, fact.function(x)), direction, integral))
        return self.settled(Mono(fact.source, fact.domain, lambda x: function(fact.function(x), other), direction, integral))

    def where(self, call):
        condition, yes, no = (self.operand(arg) for arg in call.args)
        if not isinstance(condition, Step):
            return None
        if all(isinstance(v, (Step, np.ndarray)) for v in (yes, no)):
            return self.select_steps(condition, yes, no)
        return self.piecewise(condition, yes, no)

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

    def piecewise(self, condition, yes, no):
        """where(step(x), f(x), g(x)), PReLU for one: monotone if both pieces are, and the junction is."""
        if not (isinstance(yes, Mono) and isinstance(no, Mono) and yes.source == no.source == condition.source):
            return None
        if condition.values.shape[-1] != 2:
            return None
        shape = np.broadcast_shapes(condition.shape, yes.shape, no.shape)
        first_is_yes = np.broadcast_to(condition.values[..., 0] != 0, shape)
        cut, domain = condition.cuts[..., 0], condition.domain

        def function(x):
            below = x < domain.at(np.clip(cut, 0, domain.count() - 1))
            return np.where(below == first_is_yes, yes.function(x), no.function(x))

        direction = _common_direction(np.broadcast_to(yes.direction, shape), np.broadcast_to(no.direction, shape))
        if direction is None or np.any((cut <= 0) | (cut >= domain.count())):
            return None
        before, after = (np.broadcast_to(function(domain.at(k)), shape) for k in (cut - 1, cut))
        rising = np.where(direction < 0, after <= before, after >= before)
        return Mono(yes.source, domain, function, direction) if np.all(rising) else None

    def domain(self, name, var, call):
        """Values of a tensor that is its own source."""
        if name in ("bnn.conv2d_bits", "bnn.dense_bits"):
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
        if name in ("add", "subtract"):
            return self.summed(name, call)
        return _domain_of_dtype(dtype(var))

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
        if isinstance(fact, Mono):
            if fact.domain.integer and fact.source == arg:
                return fact.domain
            low, high = ends(fact)
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


def _common_direction(a, b):
    """Direction of the sum of two monotone functions, or None if they pull apart somewhere."""
    a, b = np.broadcast_arrays(a, b)
    return None if np.any(a * b < 0) else np.where(a != 0, a, b).astype(np.int8)
