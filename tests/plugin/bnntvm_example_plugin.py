"""Teaches bnntvm the operator ``com.example::DeadZone``, a ternary quantiser with a scale.

``DeadZone(x, scale)`` is ``scale`` where ``x >= width``, ``-scale`` where ``x <= -width`` and 0 between; ``width`` is an attribute, 0.5 by
default. Nothing has to be said about its levels: they follow from the Relax operators that it is made of.
"""

import numpy as np
from tvm import relax

from bnntvm.importer import converts


@converts("DeadZone", domains=("com.example",))
def dead_zone(ctx, node, x, scale):
    scale = ctx.array(scale, "the scale of DeadZone")
    width = np.float32(node.attrs.get("width", 0.5))
    if isinstance(x, np.ndarray):  # weights: a constant in, a constant out
        return (np.where(x >= width, scale, 0) - np.where(x <= -width, scale, 0)).astype(np.float32)
    zero = np.float32(0).reshape(())
    low = ctx.emit(relax.op.less_equal(*ctx.operands(x, np.array(-width))))
    below = ctx.emit(relax.op.where(low, *ctx.operands(-scale, zero)))
    high = ctx.emit(relax.op.greater_equal(*ctx.operands(x, np.array(width))))
    return ctx.emit(relax.op.where(high, *ctx.operands(scale, below)))
