"""Rewrite convolutions and dense layers with two-level weights and low-bit activations into packed operators.

``conv(x, w)`` with x in {-b, +b} (or {-b, 0, +b}, or {0, b}) and w in {-c_o, +c_o} per output channel o becomes

    float(conv2d_bits(encode(x), sign(w))) * (b * c_o)

where the packed operator's int32 result is the exact sum (XNOR-Net, Rastegari et al. 2016, eq. 8-11; the identities are in spec.py). Levels
are taken from :mod:`passes.infer_levels`, which runs along on the new graph, so that a layer already knows that the layer before it is an
integer accumulator. Decisions are noted per layer for the report.

Ordering contract: after ChannelsLast; before PropagateBits and FoldThresholds, which remove ``bnn.encode``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from bnntvm import ops
from bnntvm.bits import pack_bits
from bnntvm.graph import Rewriter, const, constant, dims, dtype, op_name
from bnntvm.levels import Step

from .infer_levels import Analysis


@dataclass(frozen=True)
class Decision:
    """What became of a layer.

    Attributes
    ----------
    kind : str
        "binary" or "float".
    reason : str
        Why it stayed float, or a remark.
    planes : str
        Activation planes x weight planes, for example "1x1".
    """

    kind: str
    reason: str = ""
    planes: str = ""


@dataclass(frozen=True)
class Activation:
    """A low-bit activation: value = scale * (plane), unipolar or bipolar, zeros possible or not."""

    scale: float
    unipolar: bool
    zeros: bool
    ones: float  # the level whose plane is encoded

    @property
    def planes(self):
        return 2 if self.zeros else 1


def classify_weight(weight, tolerance=0.0):
    """Sign plane and magnitude of two-level weights.

    Parameters
    ----------
    weight : np.ndarray
        float32 [O, ...].
    tolerance : float
        Relative spread of magnitudes within one output channel that is still taken for one magnitude (their mean).

    Returns
    -------
    (np.ndarray, np.ndarray) or str
        bool [O, ...] (True <-> negative) and float32 [O], or the reason why the weights are not two-level.
    """
    flat = np.abs(weight.reshape(weight.shape[0], -1))
    low, high = flat.min(1), flat.max(1)
    if np.array_equal(low, high):
        return np.signbit(weight) & (weight != 0), high
    spread = float(np.max((high - low) / np.where(high > 0, high, 1)))
    if spread <= tolerance:
        return weight < 0, flat.mean(1, dtype=np.float64).astype(np.float32)
    levels = np.unique(weight)
    if np.any(weight == 0) and np.all((flat == high[:, None]) | (flat == 0)):
        return f"the weights are ternary ({np.mean(weight == 0):.1%} zeros)"
    if spread < 1e-4:
        return f"the weights are binary but for a relative deviation of {spread:.1e}; weight_tolerance={2 * spread:.0e} would take them"
    if len(levels) <= 16:
        return f"the weights hold {len(levels)} levels"
    return "the weights are real-valued"


def classify_activation(fact, assume_nonzero=False):
    """An :class:`Activation`, or the reason why the tensor is not low-bit."""
    if not isinstance(fact, Step):
        return "the activation is real-valued"
    levels = [float(v) for v in fact.levels()]
    if assume_nonzero and len(levels) == 3 and levels[1] == 0:
        levels = [levels[0], levels[2]]
    if len(levels) == 1 and levels[0] != 0:
        return Activation(abs(levels[0]), False, False, -abs(levels[0]))
    if len(levels) == 2 and levels[0] == -levels[1]:
        return Activation(levels[1], False, False, levels[0])
    if len(levels) == 2 and 0.0 in levels:
        one = levels[0] or levels[1]
        return Activation(one, True, False, one)
    if len(levels) == 3 and levels[1] == 0 and levels[0] == -levels[2]:
        return Activation(levels[2], False, True, levels[0])
    return f"the activation holds {len(levels)} levels ({', '.join(f'{v:g}' for v in levels[:4])}{', ...' if len(levels) > 4 else ''})"


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
            return out
        return super().rewrite(var, value)

    def operands(self, data, weight, axis_out_first):
        """Classified activation and weights, or a reason."""
        if weight is None:
            return "the weights are not constant"
        if dtype(data) != "float32":
            return f"the activation is {dtype(data)}"
        signs = classify_weight(axis_out_first(weight), self.tolerance)
        activation = classify_activation(self.analysis.facts.get(data), self.assume_nonzero)
        if isinstance(activation, str):
            return activation
        if isinstance(signs, str):
            return signs
        return activation, *signs

    def convolution(self, call):
        data, weight = call.args[0], constant(call.args[1])
        if str(call.attrs["layout"]) != "NHWC":
            return "only one- and two-dimensional convolutions are packed"
        found = self.operands(data, weight, lambda w: w)
        if isinstance(found, str):
            return found
        activation, negative, magnitude = found
        groups, channels = int(call.attrs["groups"]), dims(data)[-1]
        attrs = {key: [int(v) for v in call.attrs[key]] for key in ("strides", "pads", "dilations")}
        taps = int(np.prod(weight.shape[1:3]))
        count = taps * (channels // groups)
        even = (channels // groups) % 2 == 0 or not any(attrs["pads"])
        acc = self.emit(
            ops.call(
                ops.CONV_BITS,
                [*self.encode(data, activation, groups), const(pack_bits(negative))],
                **attrs, groups=groups, **self.common(call, activation, channels, count, even),
            )
        )  # fmt: skip
        return self.scaled(call, acc, activation, magnitude)

    def dense(self, call):
        data, weight = call.args[0], constant(call.args[1])
        if weight is None or weight.ndim != 2 or len(dims(data)) < 2:
            return "both operands are activations" if weight is None else "only two-dimensional weights on the right are packed"
        found = self.operands(data, weight, lambda w: w.T)
        if isinstance(found, str):
            return found
        activation, negative, magnitude = found
        shape = dims(data)
        words = self.encode(data, activation, 1)
        if len(shape) > 2:
            words = [self.emit(relax.op.reshape(w, [_product(shape[:-1]), dims(w)[-1]])) for w in words]
        acc = self.emit(
            ops.call(ops.DENSE_BITS, [*words, const(pack_bits(negative))], **self.common(call, activation, shape[-1], shape[-1], True))
        )
        out = self.scaled(call, acc, activation, magnitude)
        return self.emit(relax.op.reshape(out, [*shape[:-1], weight.shape[1]])) if len(shape) > 2 else out

    def common(self, call, activation, channels, count, even):
        """Attributes that convolution and dense share. The sum of ``count`` numbers +-1 has the parity of count."""
        stride = 2 if even and not activation.zeros and not activation.unipolar else 1
        return dict(
            layer=str(call.attrs["layer"]), channels=channels, unipolar=activation.unipolar, zeros=activation.zeros,
            reachable=[-count, count, stride],
        )  # fmt: skip

    def encode(self, data, activation, groups):
        """The packed planes of a float tensor: its bits, and where zeros can occur their mask."""
        planes = [activation.ones] + ([0.0] if activation.zeros else [])
        out = []
        for level in planes:
            key = (data, level, groups)
            if key not in self.encoded:
                self.encoded[key] = self.emit(ops.call(ops.ENCODE, [data], level=float(level), groups=groups))
            out.append(self.encoded[key])
        return out

    def scaled(self, call, acc, activation, magnitude):
        """Back to float: one multiplication per output unless every scale is 1."""
        scale = (np.float32(activation.scale) * magnitude).astype(np.float32)
        self.decisions[str(call.attrs["layer"])] = Decision("binary", _remark(activation), f"{activation.planes}x1")
        out = self.emit(relax.op.astype(acc, "float32"))
        if np.all(scale == 1):
            return out
        return self.emit(relax.op.multiply(out, const(scale if np.any(scale != scale[0]) else scale[0])))


def _remark(activation):
    if activation.zeros:
        return "zeros can occur in the activation and are counted exactly"
    return "activations are {0, 1}" if activation.unipolar else ""


def _product(shape):
    out = 1
    for d in shape:
        out = out * d
    return out


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
        See :func:`classify_weight`.
    """

    def __init__(self, decisions, assume_nonzero=False, weight_tolerance=0.0):
        self.decisions, self.assume_nonzero, self.weight_tolerance = decisions, assume_nonzero, weight_tolerance

    def transform_module(self, mod, _context):
        return _Binarise(self.decisions, self.assume_nonzero, self.weight_tolerance).run(mod)
