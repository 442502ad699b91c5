"""Rewrite convolutions and dense layers whose weights and activations hold few levels into packed operators.

Both are taken apart into bit planes (:mod:`bnntvm.planes`); the layer becomes the sum over plane pairs of exact int32 products, and one
scale per output channel. For x in {-b, b} and w in {-c_o, c_o} that is XNOR-Net (Rastegari et al. 2016, eq. 8-11),

    float(conv2d_bits(encode(x), sign(w))) * (b * c_o),

for k-bit grids DoReFa-Net's bit-serial sum (Zhou et al. 2016, eq. 3). The popcount identities are in spec.py. Levels
are taken from :mod:`passes.infer_levels`, which runs along on the new graph, so that a layer already knows that the layer before it is an
integer accumulator. Decisions are noted per layer for the report.

Ordering contract: after ChannelsLast; before PropagateBits and FoldThresholds, which remove ``bnn.encode``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import tvm
from tvm import relax

from bnntvm import ops
from bnntvm.bits import dense_groups, pack_bits
from bnntvm.digits import digit_planes
from bnntvm.graph import Rewriter, const, constant, dims, dtype, op_name
from bnntvm.levels import Step
from bnntvm.planes import activation_planes, weight_planes

from .decision import Decision
from .infer_levels import Analysis
from .run_time_products import RunTimeProduct

#: More plane pairs than this cost more than float32 arithmetic does on any target.
MOST_PAIRS = 20


@dataclass(frozen=True)
class Packed:
    """How a layer is made on planes.

    Attributes
    ----------
    op : tvm.ir.Op
        For several planes at once.
    words : callable
        Activation plane to its packed words, and those of its mask of zeros.
    product : callable
        ``product(plane, negative)``: int32 product of an activation plane and a bipolar weight plane.
    attrs : dict
        Of the layer, for ``op``.
    count : int
        Numbers that one output sums up.
    even : bool
        Whether that count is even for every output.
    """

    op: object
    words: object
    product: object
    attrs: dict
    count: int
    even: bool


class _Binarise(Rewriter):
    def __init__(self, decisions, assume_nonzero, weight_tolerance):
        self.decisions, self.assume_nonzero, self.tolerance = decisions, assume_nonzero, weight_tolerance

    def begin(self):
        self.analysis = Analysis(self.func.params)
        self.encoded = {}

    def emit(self, value, name=""):
        var = super().emit(value, name)
        if var is not value and var not in self.analysis.facts:
            self.analysis.visit(var, value)
        return var

    def rewrite(self, var, value):
        name = op_name(value)
        if name in ("bnn.conv", "bnn.matmul"):
            new = self.substitute(value)
            out = self.convolution(new) if name == "bnn.conv" else self.dense(new)
            layer = str(value.attrs["layer"])
            if isinstance(out, str):
                self.decisions.setdefault(layer, Decision("float", out))
                return self.emit(new)
            self.remark_on_magnitude(layer, new.args[0])
            return out
        if name == "bnn.conv_transpose":
            self.decisions.setdefault(str(value.attrs["layer"]), Decision("float", "its weights are not constant, or it is 3-D"))
        return super().rewrite(var, value)

    def remark_on_magnitude(self, layer, data):
        """Note in a decision up to which magnitude of its source the levels of ``data`` are exact, if not for every."""
        fact, decision = self.analysis.facts.get(data), self.decisions[layer]
        bound = self.analysis.assumed.get(fact.source) if isinstance(fact, Step) else None
        if bound is not None:
            note = f"levels are exact for magnitudes up to {bound:.0e} of what is quantised"
            self.decisions[layer] = replace(decision, reason=f"{decision.reason}; {note}" if decision.reason else note)

    def operands(self, data, weight):
        """Planes of the activation and of the weights [O, ...], or the reason why one has none."""
        if dtype(data) != "float32":
            return f"the activation is {dtype(data)}"
        fact = self.analysis.facts.get(data)
        activation = activation_planes(fact.levels(), self.assume_nonzero) if isinstance(fact, Step) else "the activation is real-valued"
        if isinstance(activation, str):
            return activation
        planes = weight_planes(weight, self.tolerance)
        if isinstance(planes, str):
            return planes
        pairs = activation.count * len(planes.planes)
        return (activation, planes) if pairs <= MOST_PAIRS else f"{pairs} pairs of planes are more work than float arithmetic"

    def convolution(self, call):
        data, weight = call.args[0], constant(call.args[1])
        if weight is None:
            return RunTimeProduct(self, call).convolution()
        if str(call.attrs["layout"]) != "NHWC":
            return "only one- and two-dimensional convolutions are packed"
        found = self.operands(data, weight)
        if isinstance(found, str):
            return found
        groups, channels = int(call.attrs["groups"]), dims(data)[-1]
        attrs = {key: [int(v) for v in call.attrs[key]] for key in ("strides", "pads", "dilations")}
        count = int(np.prod(weight.shape[1:3])) * (channels // groups)
        even = (channels // groups) % 2 == 0 or not any(attrs["pads"])

        def words(plane):
            return self.encode(data, plane, 1 if dense_groups(channels, groups) else groups)

        def product(plane, negative):
            common = self.common(call, plane, channels, count, even)
            return ops.call(ops.CONV_BITS, [*words(plane), const(pack_bits(negative))], **attrs, groups=groups, **common)

        packed = Packed(ops.CONV_PLANES, words, product, dict(attrs, groups=groups, channels=channels), count, even)
        return self.combine(call, *found, packed, (groups, *weight.shape[1:]))

    def dense(self, call):
        data, weight = call.args[0], constant(call.args[1])
        if weight is None and constant(data) is None:
            return RunTimeProduct(self, call).matmul()
        if weight is None or weight.ndim != 2 or len(dims(data)) != 2:
            return "only two-dimensional weights on the right are packed"
        found = self.operands(data, weight.T)
        if isinstance(found, str):
            return found
        features = dims(data)[-1]

        def words(plane):
            return self.encode(data, plane, 1)

        def product(plane, negative):
            common = self.common(call, plane, features, features, True)
            return ops.call(ops.DENSE_BITS, [*words(plane), const(pack_bits(negative))], **common)

        packed = Packed(ops.DENSE_PLANES, words, product, dict(channels=features), features, True)
        return self.combine(call, *found, packed, (1, features))

    def combine(self, call, activation, weights, packed, window):
        """The layer on planes, one scale per output channel; ``window``: (groups, *shape of one output's weights)."""
        layer = str(call.attrs["layer"])
        planes = f"{activation.count}x{len(weights.planes)}"
        kind = "binary" if len(activation.planes) == len(weights.planes) == 1 and weights.offset is None else "bitserial"
        self.decisions[layer] = Decision(kind, _remark(activation), planes)
        if kind == "binary":
            return self.separate(activation, weights, packed.product, window)
        digits = digit_planes(weights)
        if digits is not None and all(_whole(p.coefficient) for p in activation.planes):
            return self.fused(layer, activation, digits, packed)
        if weights.offset is None and not any(p.zeros for p in activation.planes):
            return self.fused_scaled(layer, activation, weights, packed)
        return self.separate(activation, weights, packed.product, window)

    def fused(self, layer, activation, digits, packed):
        """One kernel that sums up all pairs of planes in integers."""
        data, zeros = tuple(int(p.coefficient) for p in activation.planes), activation.planes[0].zeros
        kind = "unipolar" if activation.planes[0].unipolar else "bipolar"
        words = [packed.words(plane) for plane in activation.planes]
        bound = packed.count * sum(map(abs, data)) * sum(map(abs, digits.coefficients))
        odd = packed.even and not zeros and kind == digits.kind == "bipolar"  # the sum has the parity of the bound
        attrs = dict(
            packed.attrs, layer=layer, data=list(data), weights=list(digits.coefficients), data_kind=kind, weight_kind=digits.kind,
            scaled=False, zeros=zeros, reachable=[-bound, bound, 2 if odd else 1],
        )  # fmt: skip
        operands = [*(w[0] for w in words), const(digits.words), *words[0][1:]]
        total = self.emit(ops.call(packed.op, operands, **attrs))
        scale = (np.float32(activation.scale) * digits.scale).astype(np.float32)
        return self.scaled(self.emit(relax.op.astype(total, "float32")), scale)

    def fused_scaled(self, layer, activation, weights, packed):
        """One kernel that sums up all pairs of planes in float32, each times its scale, in the order of :meth:`separate`."""
        scale = (np.float32(activation.scale) * weights.scale).astype(np.float32)
        pairs = [(p.coefficient, w) for p in activation.planes for w, _ in weights.planes]
        scales = np.stack([(np.float32(a) * w * scale).astype(np.float32) for a, w in pairs])
        attrs = dict(
            packed.attrs, layer=layer, data=[1] * len(activation.planes), weights=[1] * len(weights.planes), scaled=True, zeros=False,
            data_kind="unipolar" if activation.planes[0].unipolar else "bipolar", weight_kind="bipolar",
        )  # fmt: skip
        negative = np.stack([pack_bits(plane) for _, plane in weights.planes])
        operands = [*(packed.words(plane)[0] for plane in activation.planes), const(negative), const(scales)]
        return self.emit(ops.call(packed.op, operands, **attrs))

    def separate(self, activation, weights, product, window):
        """The sum over separate products of two planes, in integers as far as the coefficients are, then one scale per output channel.

        ``product(plane, negative)`` makes the int32 product of an activation plane with a weight plane; ``window``: (groups, *shape of one
        output's weights), for the sum of the activations that an offset of the weights multiplies.
        """
        terms = [(a.coefficient, w, product(a, negative)) for a in activation.planes for w, negative in weights.planes]
        scale = (np.float32(activation.scale) * weights.scale).astype(np.float32)
        if all(_whole(a) and _whole(w) for a, w, _ in terms):
            total = self.integer_sum([(int(a) * int(w), self.emit(acc)) for a, w, acc in terms])
            out = self.scaled(self.emit(relax.op.astype(total, "float32")), scale)
        else:
            floats = [(a, w, self.emit(relax.op.astype(self.emit(acc), "float32"))) for a, w, acc in terms]
            out = self.total([self.scaled(acc, (np.float32(a) * w * scale).astype(np.float32)) for a, w, acc in floats])
        if weights.offset is None:
            return out
        groups, *shape = window
        ones = np.zeros((groups, *shape), bool)
        sums = self.integer_or_float_sum([(a.coefficient, self.emit(product(a, ones))) for a in activation.planes])
        offset = (np.float32(activation.scale) * weights.offset).astype(np.float32)
        if groups > 1:  # the sums of a group belong to all its outputs
            group_of = const(np.repeat(np.arange(groups), len(offset) // groups))
            sums = self.emit(relax.op.take(sums, group_of, axis=len(dims(sums)) - 1, mode="clip"))
        return self.emit(relax.op.add(out, self.emit(relax.op.multiply(sums, const(offset)))))

    def integer_sum(self, terms):
        """sum(coefficient * accumulator), int32."""
        return self.total([acc if k == 1 else self.emit(relax.op.multiply(acc, const(np.int32(k)))) for k, acc in terms])

    def integer_or_float_sum(self, terms):
        """The same, converted to float32; coefficients may be fractions."""
        if all(_whole(k) for k, _ in terms):
            return self.emit(relax.op.astype(self.integer_sum([(int(k), acc) for k, acc in terms]), "float32"))
        floats = [(np.float32(k), self.emit(relax.op.astype(acc, "float32"))) for k, acc in terms]
        return self.total([self.emit(relax.op.multiply(acc, const(k))) for k, acc in floats])

    def total(self, parts):
        out = parts[0]
        for part in parts[1:]:
            out = self.emit(relax.op.add(out, part))
        return out

    def common(self, call, plane, channels, count, even):
        """Attributes that convolution and dense share. The sum of ``count`` numbers +-1 has the parity of count."""
        stride = 2 if even and not plane.zeros and not plane.unipolar else 1
        return dict(
            layer=str(call.attrs["layer"]), channels=channels, unipolar=plane.unipolar, zeros=plane.zeros, reachable=[-count, count, stride]
        )

    def encode(self, data, plane, groups):
        """The packed words of a plane, and where zeros can occur those of their mask."""
        out = []
        for levels in [plane.ones, *([(0.0,)] if plane.zeros else [])]:
            key = (data, levels, groups)
            if key not in self.encoded:
                self.encoded[key] = self.emit(ops.call(ops.ENCODE, [data], levels=[float(v) for v in levels], groups=groups))
            out.append(self.encoded[key])
        return out

    def scaled(self, out, scale):
        """One multiplication per output unless every scale is 1."""
        if np.all(scale == 1):
            return out
        return self.emit(relax.op.multiply(out, const(scale if np.any(scale != scale[0]) else scale[0])))


def _whole(coefficient):
    return np.ndim(coefficient) == 0 and float(coefficient) == int(coefficient)


def _remark(activation):
    first = activation.planes[0]
    if first.zeros:
        return "zeros can occur in the activation and are counted exactly"
    return f"activations are {{0, {activation.scale * first.coefficient:g}}}" if len(activation.planes) == 1 and first.unipolar else ""


@tvm.transform.module_pass(opt_level=0, name="bnn.Binarise")
class Binarise:
    """See the module's documentation.

    Parameters
    ----------
    decisions : dict
        Filled with layer name -> Decision.
    assume_nonzero : bool
        Take Sign's output for two-level although zero is reachable.
    weight_tolerance : float
        See :func:`bnntvm.planes.weight_planes`.
    """

    def __init__(self, decisions, assume_nonzero=False, weight_tolerance=0.0):
        self.decisions, self.assume_nonzero, self.weight_tolerance = decisions, assume_nonzero, weight_tolerance

    def transform_module(self, mod, _context):
        return _Binarise(self.decisions, self.assume_nonzero, self.weight_tolerance).run(mod)
