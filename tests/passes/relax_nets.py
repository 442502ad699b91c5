"""Small Relax modules for tests of passes, and their evaluation."""

import numpy as np
import tvm
from tvm import relax

import bnntvm.interpreter.packed  # noqa: F401  (teaches the interpreter the packed operators)
from bnntvm import ops
from bnntvm.graph import bindings, op_name
from bnntvm.interpreter import run


def module(function, *shapes, **typed):
    """``main(x0, x1, ...) = function(emit, x0, x1, ...)``.

    Parameters
    ----------
    function : callable
        Gets ``emit``, which binds an expression, and one variable per input; returns an expression or a list of them (a tuple).
    shapes : tuples
        Shapes of float32 inputs; a string is a dynamic dimension.
    typed : name -> (shape, dtype)
        More inputs.
    """
    sizes = {}

    def var(name, shape, dtype):
        dims = [sizes.setdefault(d, tvm.tirx.Var(d, "int64")) if isinstance(d, str) else d for d in shape]
        return relax.Var(name, relax.TensorType(dims, dtype))

    params = [var(f"x{i}", shape, "float32") for i, shape in enumerate(shapes)]
    params += [var(name, shape, dtype) for name, (shape, dtype) in typed.items()]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            result = function(builder.emit, *params)
            out = builder.emit_output(relax.Tuple(result) if isinstance(result, list) else result)
        builder.emit_func_output(out)
    return builder.finalize()


def c(values, dtype="float32"):
    """A constant."""
    return relax.const(np.ascontiguousarray(np.asarray(values, dtype)) if np.ndim(values) else np.asarray(values, dtype), dtype)


def conv(x, weight, layer="conv", layout="NHWC", strides=None, pads=None, dilations=None, groups=1):
    """``bnn.conv``; ``weight`` is an array, [O, kh, kw, C/groups] in layout NHWC."""
    spatial = weight.ndim - 2
    return ops.call(
        ops.CONV, [x, c(weight)], layer=layer, layout=layout, strides=strides or [1] * spatial, pads=pads or [0] * 2 * spatial,
        dilations=dilations or [1] * spatial, groups=groups,
    )  # fmt: skip


def dense(x, weight, layer="dense"):
    """``bnn.matmul`` of [..., K] by an array [K, N]."""
    return ops.call(ops.MATMUL, [x, c(weight)], layer=layer)


def signs(*shape, seed=0):
    """Random float32 of +-1."""
    return np.where(np.random.default_rng(seed).random([int(d) for d in shape]) < 0.5, np.float32(-1), np.float32(1))


def quarters(*shape, seed=0):
    """Random multiples of 1/4 in [-2, 2] with many exact zeros of both signs."""
    rng = np.random.default_rng(seed)
    x = np.where(rng.random(shape) < 0.2, 0.0, rng.integers(-8, 9, shape) / 4)
    return np.where(rng.random(shape) < 0.1, -0.0, x).astype(np.float32)


def ints(*shape, seed=0, largest=9):
    """Random whole numbers as float32."""
    return np.random.default_rng(seed).integers(-largest, largest + 1, shape).astype(np.float32)


def calls(mod, function="main"):
    """Names of the operators that a function calls, in order, without ``relax.``."""
    return [op_name(b.value).removeprefix("relax.") for b in bindings(mod[function]) if op_name(b.value)]


def find(mod, name, function="main"):
    """The calls of one operator."""
    return [b.value for b in bindings(mod[function]) if op_name(b.value) == name]


def bipolar(emit, x):
    """The sign of ``x``, +1 for 0."""
    return emit(relax.op.where(emit(relax.op.less(x, c(0.0))), c(-1.0), c(1.0)))


def batchnorm(emit, x, seed):
    """A scale, of either sign or 0, and a shift for each channel."""
    channels = int(x.ty.shape[-1])
    scale, shift = ints(channels, seed=seed, largest=3) / 2, quarters(channels, seed=seed + 1)
    return emit(relax.op.add(emit(relax.op.multiply(x, c(scale))), c(shift)))


def same(before, after, *arrays):
    """Assert that two modules compute the same, bit for bit (0.0 and -0.0 are equal), and return the results."""
    wanted, got = run(before, list(arrays)), run(after, list(arrays))
    assert len(wanted) == len(got)
    for a, b in zip(got, wanted):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    return wanted


def fold(mod, **options):
    """Binarise, propagate, fold: a module in channels-last layout becomes packed. Returns the module and the decisions."""
    from bnntvm.passes.binarise import Binarise
    from bnntvm.passes.fold_thresholds import FoldThresholds
    from bnntvm.passes.propagate_bits import PropagateBits

    decisions = {}
    for one in (Binarise(decisions, **options), PropagateBits(), FoldThresholds()):
        mod = one(mod)
    return mod, decisions
