"""Move packing up through operators that only move or pool values, so that they work on bits.

``encode(max_pool(x))`` becomes ``pool_bits(encode(x))`` and so on for reshape, padding, concatenation and slicing, wherever the words of
the result can be made from the words of the operand. What cannot be moved is packed from the float tensor by FoldThresholds.

Ordering contract: after Binarise, before FoldThresholds.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from bnntvm import ops
from bnntvm.bits import WORD_BITS
from bnntvm.graph import Rewriter, bindings, dims, op_name, same_dims
from bnntvm.levels import Step

from .infer_levels import infer_levels


class _Propagate(Rewriter):
    def begin(self):
        self.facts = infer_levels(self.func).facts
        self.producer = {binding.var: binding.value for binding in bindings(self.func)}
        self.done = {}

    def rewrite(self, var, value):
        if op_name(value) == "bnn.encode":
            levels = [float(v) for v in value.attrs["levels"]]
            if len(levels) == 1:
                return self.encoded(value.args[0], levels[0], int(value.attrs["groups"]))
        return super().rewrite(var, value)

    def encoded(self, var, level, groups):
        """Words of the plane "``var`` equals ``level``" (``var``: of the old graph), pushed up as far as it goes."""
        var, level = self.deepest(var, level)
        key = (var, level, groups)
        if key not in self.done:
            out = self.moved(var, level, groups)
            self.done[key] = out if out is not None else self.emit(ops.call(ops.ENCODE, [self.env[var]], levels=[level], groups=groups))
        return self.done[key]

    def deepest(self, var, level):
        """The low-bit tensor that ``var`` is a one-to-one relabelling of, and its level that corresponds."""
        fact = self.facts.get(var)
        if not isinstance(fact, Step) or fact.source == var or fact.domain.values is None or fact.shape:
            return var, level
        inverse = [v for k, v in enumerate(fact.domain.values) if fact.values[np.sum(fact.cuts <= k)] == level]
        return self.deepest(fact.source, float(inverse[0])) if len(inverse) == 1 else (var, level)

    def moved(self, var, level, groups):
        call = self.producer.get(var)
        name = (op_name(call) or "").removeprefix("relax.")
        handler = getattr(self, "through_" + name.replace(".", "_"), None)
        if handler is None or groups != 1 and dims(var)[-1] // groups % WORD_BITS:
            return None
        return handler(var, call, level, groups)

    def levels(self, var):
        fact = self.facts.get(var)
        return [float(v) for v in fact.levels()] if isinstance(fact, Step) else []

    def through_nn_max_pool2d(self, _var, call, level, groups):
        source = call.args[0]
        levels = self.levels(source)
        if len(levels) != 2 or level not in levels or str(call.attrs["layout"]) != "NHWC" or bool(call.attrs["ceil_mode"]):
            return None
        # The maximum is the lower level only where all are; it is the higher one where any is.
        return self.emit(pool_bits(self.encoded(source, level, groups), call, "and" if level == levels[0] else "or", dims(source)[-1]))

    def through_reshape(self, var, call, level, groups):
        source = call.args[0]
        old, new = dims(source), dims(var)
        if not self.levels(source) or not old or not isinstance(old[-1], int):
            return None
        aligned = old[-1] % WORD_BITS == 0 and new[-1] % WORD_BITS == 0
        if groups != 1 or not (aligned or old[-1] == new[-1]):
            return None
        words = self.encoded(source, level, 1)
        return self.emit(relax.op.reshape(words, [*new[:-1], new[-1] // WORD_BITS if aligned else dims(words)[-1]]))

    def through_nn_pad(self, _var, call, level, groups):
        source, value = call.args[0], float(call.attrs["pad_value"])
        width = [int(v) for v in call.attrs["pad_width"]]
        if not self.levels(source) or str(call.attrs["pad_mode"]) != "constant" or any(width[-2:]):
            return None
        if value == level and dims(source)[-1] // groups % WORD_BITS:
            return None  # a padded word would need its tail cleared
        word = float(0xFFFFFFFF) if value == level else 0.0
        return self.emit(relax.op.nn.pad(self.encoded(source, level, groups), width, "constant", word))

    def through_concat(self, var, call, level, groups):
        fields, axis = list(call.args[0].fields), int(call.attrs["axis"]) % len(dims(var))
        last = axis == len(dims(var)) - 1
        if not all(isinstance(f, relax.Var) and self.levels(f) for f in fields) or last and groups != 1:
            return None
        if last and any(dims(f)[-1] % WORD_BITS for f in fields[:-1]):
            return None
        return self.emit(relax.op.concat([self.encoded(f, level, groups) for f in fields], axis))

    def through_strided_slice(self, var, call, level, groups):
        source = call.args[0]
        if not self.levels(source) or not same_dims(dims(source)[-1:], dims(var)[-1:]):
            return None
        args = [self.encoded(source, level, groups), *call.args[1:]]
        return self.emit(relax.Call(call.op, args, call.attrs, call.ty_args))



def pool_bits(words, call, kind, channels):
    """The packed counterpart of the max pool ``call``."""
    attrs = call.attrs
    pads = [int(v) for v in attrs["padding"]]
    return ops.call(
        ops.POOL_BITS, [words], kind=kind, kernel=[int(v) for v in attrs["pool_size"]], strides=[int(v) for v in attrs["strides"]],
        pads=pads, dilations=[int(v) for v in attrs["dilation"]], channels=channels,
    )  # fmt: skip


@tvm.transform.module_pass(opt_level=0, name="bnn.PropagateBits")
class PropagateBits:
    """See the module's documentation."""

    def transform_module(self, mod, _context):
        return _Propagate().run(mod)
