"""Operators of ONNX Runtime's domain, as its offline optimiser writes them."""

import numpy as np
from tvm import relax

from ..registry import converts
from ..values import dtype_of
from .elementwise import Arithmetic, hard_sigmoid_of, leaky_relu
from .layers import add_bias, convolution


@converts("FusedConv", domains=("com.microsoft",))
def fused_conv(ctx, node, x, weight, bias=None, summand=None):
    """Convolution, bias, another tensor to add, activation, in this order."""
    result = add_bias(ctx, convolution(ctx, node, x, weight), bias)
    if summand is not None:
        result = ctx.emit(relax.op.add(*ctx.operands(result, summand)))
    return _activated(ctx, node, result)


def _activated(ctx, node, x):
    kind, parameters = node.attrs.get("activation", ""), [float(p) for p in node.attrs.get("activation_params", [])]
    m = Arithmetic(ctx, x)
    if kind == "":
        return x
    if kind == "Relu":
        return ctx.emit(relax.op.nn.relu(x))
    if kind == "Clip":
        low, high = (np.array(p, dtype=dtype_of(x)) for p in parameters)
        return m.minimum(m.maximum(x, low), high)
    if kind in ("Sigmoid", "Tanh"):
        return m.sigmoid(x) if kind == "Sigmoid" else m.tanh(x)
    if kind == "HardSigmoid":
        return hard_sigmoid_of(ctx, x, *parameters)
    if kind == "LeakyRelu":
        return leaky_relu(ctx, node, x, parameters[0])
    raise ctx.unsupported(f"FusedConv with the activation {kind} is not supported")
