"""Pack the weights of layers that compute in float but whose weights hold two or three levels per output channel.

BinaryConnect and BWN ({-c, c}), ternary weight networks ({-c, 0, c}), TTQ ({-b, 0, a}) and any other two or three levels. The data stay
float, the weights take one or two bits: a scale of the output channel is factored out, for levels of no such form there is one sum per
level but one (Courbariaux et al. 2015; Rastegari et al. 2016, eq. 7; Li and Liu 2016; Zhu et al. 2017, eq. 6-7):

    w in {-c, c}      y = c * sum(+-x)
    w in {-c, 0, c}   y = c * (sum of x where w > 0 - sum of x where w < 0)
    levels l0, l1, l2 y = l0 * sum(x) + (l1 - l0) * sum(x where w = l1) + (l2 - l0) * sum(x where w = l2)

with l0 = 0 where zero is a level, else the level of least magnitude: nothing is added that the float layer would not add, so sums of a few
selected terms do not drown in the rounding of large ones that cancel.

Ordering contract: after Binarise, on the layers that it left in float; before FuseEpilogues.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import tvm
from tvm import relax

from bnntvm import ops
from bnntvm.bits import pack_bits
from bnntvm.graph import Rewriter, const, constant, dims, dtype, op_name

from .binarise import Decision


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
        return "ternary", np.stack([weight > 0, weight < 0]), top
    # level 0 is the one of least magnitude; a channel of fewer levels repeats it
    table = np.stack([low, np.where(middle.any(1), inner, low), high])
    table = np.take_along_axis(table, np.argsort(np.abs(table), axis=0, kind="stable"), 0)
    table[1] = np.where(table[1] == table[0], table[2], table[1])
    planes = np.stack([(rows == one[:, None]) & (rows != table[0][:, None]) for one in table[1:]])
    planes[1] &= ~planes[0]
    used = [True, planes[0].any(), planes[1].any()]
    return "levels", planes[used[1:]].reshape(-1, *weight.shape), np.ascontiguousarray(table[used])


class _WeightOnly(Rewriter):
    def __init__(self, decisions):
        self.decisions = decisions

    def begin(self):
        self.producer = {}

    def emit(self, value, name=""):
        var = super().emit(value, name)
        self.producer[var] = value
        return var

    def rewrite(self, var, value):
        name = op_name(value)
        if name in ("bnn.conv", "bnn.matmul"):
            new = self.substitute(value)
            if self.nearly_sign(new.args[0]):
                self.decisions[str(new.attrs["layer"])] = Decision("float", "the activation is x / |x|, a sign but for the smallest x")
                return self.emit(new)
            out = self.layer(name, new)
            return self.emit(new) if out is None else out
        return super().rewrite(var, value)

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

    def layer(self, name, call):
        """The packed layer times its scales; None if it stays float."""
        data, weight = call.args[0], constant(call.args[1])
        if weight is None or dtype(data) != "float32" or weight.dtype != np.float32 or not np.isfinite(weight).all():
            return None
        dense = name == "bnn.matmul"
        if dense and (weight.ndim != 2 or len(dims(data)) != 2) or not dense and str(call.attrs["layout"]) != "NHWC":
            return None
        found = decompose(weight.T if dense else weight)
        if found is None or not dense and found[0] == "levels" and dims(data)[-1] == int(call.attrs["groups"]) > 1:
            return None  # the few weights of a depthwise convolution are not worth sums of their own
        coding, planes, numbers = found
        layer = str(call.attrs["layer"])
        attrs = dict(layer=layer, channels=dims(data)[-1], coding=coding)
        if not dense:
            attrs |= {key: [int(v) for v in call.attrs[key]] for key in ("strides", "pads", "dilations")}
            attrs["groups"] = int(call.attrs["groups"])
        operands = [data, const(pack_bits(planes)), *([const(numbers)] if coding == "levels" else [])]
        out = self.emit(ops.call(ops.DENSE_WEIGHT if dense else ops.CONV_WEIGHT, operands, **attrs))
        before = self.decisions.get(layer, Decision("float"))
        self.decisions[layer] = replace(before, kind="weight-only", planes=f"float x {len(planes)}")
        if coding == "levels" or np.all(numbers == 1):
            return out
        return self.emit(relax.op.multiply(out, const(numbers if np.any(numbers != numbers[0]) else numbers[0])))


@tvm.transform.module_pass(opt_level=0, name="bnn.WeightOnly")
class WeightOnly:
    """See the module's documentation.

    Parameters
    ----------
    decisions : dict
        Layer name -> Decision; those of the layers that are packed become "weight-only".
    """

    def __init__(self, decisions):
        self.decisions = decisions

    def transform_module(self, mod, _context):
        return _WeightOnly(self.decisions).run(mod)
