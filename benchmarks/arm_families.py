"""Instructions of kernels for ARM beside the least that their products take; see :mod:`benchmarks.arm`.

Ideals, per 128 multiply-accumulates: eor, cnt, add for a pair of bit planes, one more operation for ternary weights; two look-ups and two
additions for each weight plane where sums are looked up; 8 sdot, 4 smmla, or 16 smlal; 32 fmla.
"""

from __future__ import annotations

import numpy as np

from bnntvm import spec as sp
from bnntvm.schedules import epilogue, families
from tests.emulation.emulator import Program

_WINDOW = sp.Window(28, 28, (3, 3), (1, 1), (1, 1, 1, 1))
_BITS = sp.Epilogue((sp.EpilogueInput("channel", "int32"),), (sp.Step("greater_equal", (0, 1), "bool"),), (sp.Output("bits", 2),))
_INTS, _FLOATS = sp.store("int32", "int32"), sp.store()
_CHANNELS = 128
_TWO = sp.PlaneSum((1, 2), (1,), "unipolar", "bipolar")
_TERNARY = sp.PlaneSum((1, 2), (1,), "unipolar", "ternary")
_FOUR = sp.PlaneSum((1, 2, 4, 8), (1, 2, 4, -8), "unipolar", "unipolar")
_SIGN = sp.WeightCoding("sign", 1)


def _conv(family, *more, window=_WINDOW, channels=_CHANNELS, outputs=_CHANNELS, **named):
    return family(window, channels, outputs, *more, **named)


def specifications():
    """(name, specification, rows of a dense layer)."""
    one = sp.Window(28, 28, (1, 1))
    stem = sp.Window(64, 64, (3, 3), (2, 2), (1, 1, 1, 1))
    yield "binary 3x3", _conv(sp.BinaryConv2d, epilogue=_BITS), 0
    yield "binary 1x1", _conv(sp.BinaryConv2d, window=one, epilogue=_BITS), 0
    yield "binary 3x3, data with zeros", _conv(sp.BinaryConv2d, zeros=True, epilogue=_BITS), 0
    yield "binary 3x3, 4 groups", _conv(sp.BinaryConv2d, 4, epilogue=_BITS), 0
    yield "binary depthwise", _conv(sp.BinaryConv2d, _CHANNELS, epilogue=_BITS, dense_groups=True), 0
    yield "2 planes x 1", _conv(sp.PlanesConv2d, _TWO, epilogue=_BITS), 0
    yield "2 planes x ternary", _conv(sp.PlanesConv2d, _TERNARY, epilogue=_BITS), 0
    yield "4 planes x 4", _conv(sp.PlanesConv2d, _FOUR, epilogue=_BITS), 0
    yield "8 bits x 8", _conv(sp.Int8Conv2d, epilogue=_INTS), 0
    yield "float 3x3", _conv(sp.FloatConv2d, epilogue=_FLOATS), 0
    yield "float 1x1", _conv(sp.FloatConv2d, window=one, epilogue=_FLOATS), 0
    yield "float stem, channel order", _conv(sp.FloatConv2d, window=stem, channels=3, outputs=16, planar=True, epilogue=_FLOATS), 0
    yield "float depthwise", _conv(sp.FloatConv2d, _CHANNELS, epilogue=_FLOATS), 0
    yield "float x packed signs, 3x3", _conv(sp.WeightConv2d, coding=_SIGN, epilogue=_FLOATS), 0
    for rows in (1, 16):
        yield f"binary dense, {rows} rows", sp.BinaryDense(1024, 1024, epilogue=_BITS), rows
        yield f"2 planes x 1 dense, {rows} rows", sp.PlanesDense(1024, 1024, _TWO, epilogue=_BITS), rows
        yield f"float dense, {rows} rows", sp.FloatDense(1024, 1024, _FLOATS), rows
        yield f"float x packed signs dense, {rows} rows", sp.WeightDense(1024, 1024, _SIGN, _FLOATS), rows
        yield f"8 bits x packed signs dense, {rows} rows", sp.WeightDenseInt8(1024, 1024, _SIGN, _INTS), rows


def instructions(spec, rows, isa):
    """Instructions executed per 128 multiply-accumulates, on random operands."""
    family, (shape, taps, channels, outputs) = families.of(spec), _sizes(spec, rows)
    schedule, per_group = family.default_schedule(spec, isa), channels // getattr(spec, "groups", 1)
    data, weights = operands(spec, (*shape, channels), (outputs, *taps, per_group))
    zeros = [np.zeros_like(data[0])] if getattr(spec, "zeros", False) else []
    size = (shape[0], spec.window.out_height, spec.window.out_width) if taps else shape
    inputs = [np.zeros(outputs, np.int32) for _ in spec.epilogue.inputs]
    results = [np.zeros(epilogue.output_shape(o, outputs, size), epilogue.output_dtype(o)) for o in spec.epilogue.outputs]
    program = Program(family.build(spec, schedule, isa), isa)
    executed = program.instructions([*data, family.pack_weights(spec, schedule, isa, weights), *zeros, *inputs, *results])
    return executed / (np.prod(size) * outputs * np.prod(taps) * per_group / 128)


def operands(spec, shape, weights):
    """Random data (a list) of a shape, channels last, and weights."""
    rng, planes = np.random.default_rng(0), getattr(spec, "planes", None)
    if isinstance(spec, sp.Int8Conv2d):
        return [rng.integers(-128, 128, shape).astype(np.int8)], rng.integers(-128, 128, weights).astype(np.int8)
    if isinstance(spec, (sp.WeightConv2d, sp.WeightDense, sp.WeightDenseInt8)):
        return [rng.integers(-9, 9, shape).astype(np.float32)], epilogue.pack(rng.random((1, *weights)) < 0.5)
    if isinstance(spec, (sp.FloatConv2d, sp.FloatDense)):
        data = rng.random(shape, np.float32)
        return [np.moveaxis(data, 3, 1) if getattr(spec, "planar", False) else data], rng.random(weights, np.float32)
    words = (len(planes.weights) * planes.words_per_weight,) if planes else ()
    data = [epilogue.pack(rng.random(shape) < 0.5) for _ in (planes.data if planes else (1,))]
    return data, epilogue.pack(rng.random((*words, *weights)) < 0.5)


def _sizes(spec, rows):
    """Shape of the data without channels, taps, channels, outputs."""
    if not hasattr(spec, "window"):
        return (rows,), (), spec.in_features, spec.out_features
    window = spec.window
    return (1, window.in_height, window.in_width), window.kernel, spec.in_channels, spec.out_channels


def report(isa):
    """Print the table."""
    print(f"kernels for {isa.name}, instructions executed per 128 multiply-accumulates")
    for name, spec, rows in specifications():
        print(f"  {name:<40}{instructions(spec, rows, isa):8.2f}")
