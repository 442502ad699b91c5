"""Pack the weights of layers that compute in float but whose weights hold two or three levels per output channel.

BinaryConnect and BWN ({-c, c}), ternary weight networks ({-c, 0, c}), TTQ ({-b, 0, a}) and any other two or three levels. The data stay
float, the weights take one or two bits: a scale of the output channel is factored out, for levels of no such form there is one sum per
level but one (Courbariaux et al. 2015; Rastegari et al. 2016, eq. 7; Li and Liu 2016; Zhu et al. 2017, eq. 6-7):

    w in {-c, c}      y = c * sum(+-x)
    w in {-c, 0, c}   y = c * (sum of x where w > 0 - sum of x where w < 0)
    levels l0, l1, l2 y = l0 * sum(x) + (l1 - l0) * sum(x where w = l1) + (l2 - l0) * sum(x where w = l2)

with l0 = 0 where zero is a level, else the level of least magnitude: nothing is added that the float layer would not add, so sums of a few
selected terms do not drown in the rounding of large ones that cancel.

Data that hold integers of 8 bits, or such integers times a number of their row or of the tensor (BitNet b1.58: activations quantised by
each token's largest magnitude; Ma et al. 2024), make an exact integer product, which the row's number then multiplies. So do
convolutions of such integers, times one number, with weights of up to 16 evenly spaced levels (W1A8, W2A8, ...), in bytes. Integers with
a zero point out of the middle are moved to 0 to 255: ``sum(w * x) = sum(w * (x - low)) + low * sum(w)``.

Ordering contract: after Binarise, on the layers that it left in float; before FuseEpilogues.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import tvm
from tvm import relax

from bnntvm import ops
from bnntvm.bits import pack_bits
from bnntvm.digits import integer_weights
from bnntvm.graph import Rewriter, bindings, const, constant, dims, dtype, op_name, same_dims
from bnntvm.levels import Mono, Step, ends, quiet
from bnntvm.planes import weight_planes

from .binarise import Decision
from .infer_levels import infer_levels

#: Relative deviations from one magnitude below this are worth a remark.
NEARLY = 1e-4


def deviation(weight):
    """How far the magnitudes of an output channel's weights that are not zero are from one: the largest (most - least) / most."""
    rows = np.abs(weight.reshape(len(weight), -1))
    most, least = rows.max(1), np.where(rows > 0, rows, np.inf).min(1)
    return float(np.max(np.where(most > 0, (most - least) / np.where(most > 0, most, 1), 0), initial=0))


def levelled(weight):
    """Weights with the magnitudes of an output channel replaced by their mean; zeros stay."""
    rows = np.abs(weight.reshape(len(weight), -1)).astype(np.float64)
    mean = rows.sum(1) / np.maximum((rows > 0).sum(1), 1)
    return np.sign(weight) * mean.astype(np.float32).reshape(-1, *(1 for _ in weight.shape[1:]))


def decompose(weight):
    """Weights as planes, or None if some output channel has more than three levels.

    Parameters
    ----------
    weight : np.ndarray
        float32 [O, ...], finite.

    Returns
    -------
    (str, np.ndarray, np.ndarray) or None
        The coding of :class:`bnntvm.spec.WeightCoding`, the planes bool [planes, O, ...], and the scales float32 [O] (codings ``sign`` and
        ``ternary``) or the levels float32 [planes + 1, O].
    """
    rows = weight.reshape(len(weight), -1) + np.float32(0)  # -0.0 is 0
    low, high = rows.min(1), rows.max(1)
    top = np.maximum(-low, high)
    if np.array_equal(np.abs(rows), np.broadcast_to(top[:, None], rows.shape)):
        return "sign", (weight < 0)[None], top
    middle = (rows > low[:, None]) & (rows < high[:, None])
    inner = np.where(middle, rows, -np.inf).max(1)
    if np.any(middle & (rows != inner[:, None])):
        return None
    if np.all((rows == 0) | (np.abs(rows) == top[:, None])):
        if np.any((low < 0) & (high > 0)):
            return "ternary", np.stack([weight > 0, weight < 0]), top
        return "levels", (weight != 0)[None], np.stack([np.zeros_like(top), np.where(low < 0, -top, top)])
    # level 0 is the one of least magnitude; a channel of fewer levels repeats it
    table = np.stack([low, np.where(middle.any(1), inner, low), high])
    table = np.take_along_axis(table, np.argsort(np.abs(table), axis=0, kind="stable"), 0)
    table[1] = np.where(table[1] == table[0], table[2], table[1])
    planes = np.stack([(rows == one[:, None]) & (rows != table[0][:, None]) for one in table[1:]])
    planes[1] &= ~planes[0]
    used = [True, planes[0].any(), planes[1].any()]
    return "levels", planes[used[1:]].reshape(-1, *weight.shape), np.ascontiguousarray(table[used])


@dataclass(frozen=True)
class Integers:
    """A tensor as ``tensor * factor`` or ``tensor / factor`` where ``tensor`` holds integers from ``low`` to ``high``.

    ``operator`` is relax.op.multiply or relax.op.divide, None for no factor; ``factor`` is one number for each row, or a constant.
    """

    tensor: relax.Var
    low: int
    high: int
    operator: object = None
    factor: object = None

    @property
    def most(self):
        """The largest magnitude."""
        return max(-self.low, self.high)


class _WeightOnly(Rewriter):
    def __init__(self, decisions, tolerance):
        self.decisions, self.tolerance = decisions, tolerance

    def begin(self):
        self.producer, self.facts = {binding.var: binding.value for binding in bindings(self.func)}, None

    def rewrite(self, var, value):
        name = op_name(value)
        if name not in ("bnn.conv", "bnn.matmul"):
            return super().rewrite(var, value)
        new = self.substitute(value)
        if self.nearly_sign(value.args[0]):
            self.decisions[str(new.attrs["layer"])] = Decision("float", "the activation is x / |x|, a sign but for the smallest x")
            return self.emit(new)
        out = self.layer(name, new, value.args[0])
        return self.emit(new) if out is None else out

    def nearly_sign(self, data):
        """Whether a tensor is ``x / max(|x|, c)``.

        Such a layer was meant to compute on bits. It stays float as a whole, so that the report does not pass it off as low-bit.
        """
        quotient = self.producer.get(data)
        if op_name(quotient) != "relax.divide":
            return False
        below = self.producer.get(quotient.args[1])
        if op_name(below) == "relax.maximum":
            below = self.producer.get(below.args[0])
        return op_name(below) == "relax.abs" and below.args[0].same_as(quotient.args[0])

    def layer(self, name, call, source):
        """The packed layer times its scales; None if it stays float. ``source`` is the data in the function that is rewritten."""
        data, weight = call.args[0], constant(call.args[1])
        if weight is None or dtype(data) != "float32" or weight.dtype != np.float32 or not np.isfinite(weight).all():
            return None
        dense = name == "bnn.matmul"
        if dense and (weight.ndim != 2 or len(dims(data)) != 2) or not dense and str(call.attrs["layout"]) != "NHWC":
            return None
        layer, weight = str(call.attrs["layer"]), weight.T if dense else weight
        if not dense and (out := self.integer_convolution(call, source, weight)) is not None:
            return out
        found = decompose(weight)
        if found is None or found[0] == "levels":
            found = self.nearly(layer, weight, found)
        if found is None or not dense and found[0] == "levels" and dims(data)[-1] == int(call.attrs["groups"]) > 1:
            return None  # the few weights of a depthwise convolution are not worth sums of their own
        integers = self.integers(source) if dense and found[0] != "levels" else None
        before = self.decisions.get(layer, Decision("float"))
        self.decisions[layer] = replace(before, kind="weight-only", planes=f"{'int8' if integers else 'float'} x {len(found[1])}")
        if integers:
            return self.integer_dense(call, integers, *found)
        return self.dense(call, *found) if dense else self.convolution(call, *found)

    def nearly(self, layer, weight, found):
        """``found`` unless the weights were meant to have one magnitude: then planes of that if the tolerance allows it, else none."""
        spread = deviation(weight)
        if spread <= self.tolerance:
            return decompose(levelled(weight))
        if spread >= NEARLY:
            return found
        before = self.decisions.get(layer, Decision("float"))
        if "weight_tolerance" not in before.reason:
            remark = f"its weights have one magnitude but for a relative deviation of {spread:.1e}"
            remark += f"; weight_tolerance={2 * spread:.0e} would pack them"
            self.decisions[layer] = replace(before, reason="; ".join(part for part in (before.reason, remark) if part))
        return None

    def convolution(self, call, coding, planes, numbers):
        attrs = {key: [int(v) for v in call.attrs[key]] for key in ("strides", "pads", "dilations")}
        out = self.emit(
            ops.call(
                ops.CONV_WEIGHT, self.operands(call.args[0], coding, planes, numbers), layer=str(call.attrs["layer"]),
                channels=dims(call.args[0])[-1], groups=int(call.attrs["groups"]), coding=coding, **attrs,
            )
        )  # fmt: skip
        return out if coding == "levels" else self.scaled(out, numbers)

    def dense(self, call, coding, planes, numbers):
        data, layer = call.args[0], str(call.attrs["layer"])
        operands = self.operands(data, coding, planes, numbers)
        out = self.emit(ops.call(ops.DENSE_WEIGHT, operands, layer=layer, channels=dims(data)[-1], coding=coding, integer=False))
        return out if coding == "levels" else self.scaled(out, numbers)

    def integer_dense(self, call, integers, coding, planes, numbers):
        """The exact product, the weights' scales, the rows' factors."""
        rows, features = dims(call.args[0])
        data, most = self.two_dimensional(integers.tensor, rows), features * integers.most
        layer = dict(layer=str(call.attrs["layer"]), channels=features, coding=coding, integer=True, reachable=[-most, most, 1])
        out = self.emit(ops.call(ops.DENSE_WEIGHT, self.operands(data, coding, planes, numbers), **layer))
        out = self.scaled(self.emit(relax.op.astype(out, "float32")), numbers)
        if integers.operator is None:
            return out
        factor = integers.factor
        factor = const(constant(factor).reshape(())) if constant(factor) is not None else self.two_dimensional(factor, rows)
        return self.emit(integers.operator(out, factor))

    def integer_convolution(self, call, source, weight):
        """The exact product of bytes and weights of few levels, times its scales; None if it is none."""
        moves, moved = [], source
        while op_name(move := self.producer.get(moved)) in ("relax.reshape", "relax.permute_dims"):
            moves.append(move)
            moved = move.args[0]
        integers = self.integers(moved, 255) if int(call.attrs["groups"]) == 1 else None
        if integers is None or integers.operator is not None and constant(integers.factor) is None:
            return None
        planes = weight_planes(weight, self.tolerance)
        found = None if isinstance(planes, str) else integer_weights(planes)
        if found is None:
            return None
        scale, values = found
        bound = int(np.abs(values).reshape(len(values), -1).sum(1).max()) * max(integers.most, integers.high - integers.low)
        if bound >= 2**31:
            return None
        fits = -128 <= integers.low and integers.high <= 127 or 0 <= integers.low and integers.high <= 255
        low = 0 if fits else integers.low
        pads = [int(v) for v in call.attrs["pads"]]
        sums = low * values.astype(np.int64).reshape(len(values), -1).sum(1)
        if low and (bound + np.abs(sums).max() >= 2**24 or any(pads) and not integers.low <= 0 <= integers.high):
            return None
        base, coefficients = _digits(values)
        layer = str(call.attrs["layer"])
        before = self.decisions.get(layer, Decision("float"))
        reason = "" if before.reason == "the activation is real-valued" else before.reason
        self.decisions[layer] = replace(before, kind="int8", reason=reason, planes=f"int8 x {len(coefficients)}")
        data = self.env[integers.tensor]
        for move in reversed(moves):  # a one-dimensional convolution sees its data through a reshape
            data = self.emit(relax.Call(move.op, [data, *move.args[1:]], move.attrs))
        if low:
            data, pads = self.from_zero(data, low, pads)
        attrs = {key: [int(v) for v in call.attrs[key]] for key in ("strides", "dilations")} | dict(pads=pads)
        attrs |= dict(layer=layer, base=base, coefficients=coefficients, reachable=[-bound, bound, 1])
        operands = [data, const(values.astype(np.int8))]
        signed = fits and integers.low < 0
        out = self.emit(ops.call(ops.CONV_INT8, operands, data="int8" if signed else "uint8", **attrs))
        out = self.emit(relax.op.astype(out, "float32"))
        if np.any(sums):
            out = self.emit(relax.op.add(out, const(sums.astype(np.float32))))
        if integers.operator is not None:
            factor = np.float64(constant(integers.factor).reshape(()))
            scale = (scale * factor if integers.operator is relax.op.multiply else scale / factor).astype(np.float32)
        return self.scaled(out, scale)

    def from_zero(self, data, low, pads):
        """Integers of at least ``low`` as integers of at least 0, and what is left to pad: zeros of the data are no zeros there."""
        data = self.emit(relax.op.subtract(data, const(np.float32(low))))
        if not any(pads):
            return data, pads
        top, left, bottom, right = pads
        return self.emit(relax.op.nn.pad(data, [0, 0, top, bottom, left, right, 0, 0], "constant", float(-low))), [0] * 4

    def two_dimensional(self, var, rows):
        """The new form of a variable, as rows of its last axis."""
        new = self.env[var]
        return new if len(dims(new)) == 2 else self.emit(relax.op.reshape(new, [rows, dims(new)[-1]]))

    def operands(self, data, coding, planes, numbers):
        return [data, const(pack_bits(planes)), *([const(numbers)] if coding == "levels" else [])]

    def scaled(self, out, numbers):
        """One multiplication per output unless every scale is 1."""
        if np.all(numbers == 1):
            return out
        return self.emit(relax.op.multiply(out, const(numbers if np.any(numbers != numbers[0]) else numbers[0])))

    def integers(self, data, highest=127):
        """A tensor as :class:`Integers`, or None; they are -128 to 127, or any of a span of ``highest`` if that is 255."""
        value = self.producer.get(data)
        if op_name(value) == "relax.reshape" and dims(value.args[0])[-1] == dims(data)[-1]:
            data = value.args[0]
            value = self.producer.get(data)
        if (bounds := self.bounds(data, highest)) is not None:
            return Integers(data, *bounds)
        if op_name(value) not in ("relax.multiply", "relax.divide"):
            return None
        sides = [tuple(value.args)] + ([tuple(reversed(value.args))] if op_name(value) == "relax.multiply" else [])
        for tensor, factor in sides:
            single = constant(factor) is not None and constant(factor).size == 1
            of_rows = isinstance(factor, relax.Var) and len(dims(factor)) == len(dims(data)) and dims(factor)[-1] == 1
            if not (single or of_rows and same_dims(dims(factor)[:-1], dims(data)[:-1])):
                continue
            if (bounds := self.bounds(tensor, highest)) is not None:
                return Integers(tensor, *bounds, relax.op.multiply if op_name(value) == "relax.multiply" else relax.op.divide, factor)
        return None

    def bounds(self, var, highest):
        """``(low, high)`` of a float32 tensor if it provably holds integers from -128 to 127, or 256 others where ``highest`` is 255."""
        if not isinstance(var, relax.Var) or dtype(var) != "float32":
            return None
        if self.facts is None:
            self.facts = infer_levels(self.func).facts
        fact = self.facts.get(var)
        if isinstance(fact, Step):
            values = fact.levels()
        elif isinstance(fact, Mono) and fact.integral:
            values = np.concatenate([np.ravel(v) for v in ends(fact)])
        elif isinstance(fact, Mono) and fact.domain.integer and fact.domain.count() <= 256:
            values = quiet(fact.function, fact.domain.at(np.arange(fact.domain.count())).reshape(-1, *(1 for _ in fact.shape)))
        else:
            return None
        if not (np.isfinite(values).all() and np.all(values == np.rint(values))):
            return None
        low, high = int(np.min(values)), int(np.max(values))
        return (low, high) if -128 <= low and high <= 127 or high - low <= 255 == highest else None


def _digits(values):
    """``(base, coefficients)`` of which all ``values``, integers, are ``base + sum(coefficients[j] * bit_j)``."""
    low, step = int(values.min()), 2 if np.all(values % 2) else 1
    bits = max(1, ((int(values.max()) - low) // step).bit_length())
    return low, [step << j for j in range(bits)]


@tvm.transform.module_pass(opt_level=0, name="bnn.WeightOnly")
class WeightOnly:
    """See the module's documentation.

    Parameters
    ----------
    decisions : dict
        Layer name -> Decision; those of the layers that are packed become "weight-only".
    weight_tolerance : float
        Relative spread of the magnitudes of an output channel's weights that is still taken for one magnitude, their mean.
    """

    def __init__(self, decisions, weight_tolerance=0.0):
        self.decisions, self.weight_tolerance = decisions, weight_tolerance

    def transform_module(self, mod, _context):
        return _WeightOnly(self.decisions, self.weight_tolerance).run(mod)
