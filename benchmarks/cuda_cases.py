"""Kernels for a GPU with inputs and the results that they have to give: made where TVM is, run where the device is.

One case or more for every family and every way in which it computes, on odd sizes: what the emulator runs, compute-sanitizer runs too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bnntvm import spec as sp
from bnntvm.schedules import epilogue as tail
from bnntvm.schedules import families

Step, Output, Input = sp.Step, sp.Output, sp.EpilogueInput

SIGN = sp.Epilogue((), (Step("less", (0, 0.0), "bool"),), (Output("bits", 1),))
THRESHOLD = sp.Epilogue(
    (Input("channel", "int32"), Input("words", "uint32")), (Step("less", (0, 1), "bool"),), (Output("bits", 3, flip=2),)
)
NORM = sp.Epilogue(
    (Input("channel"), Input("channel"), Input("tensor")),
    (Step("cast", (0,)), Step("multiply", (4, 1)), Step("add", (5, 2)), Step("add", (6, 3)), Step("less", (7, 0.0), "bool")),
    (Output("tensor", 7), Output("bits", 8)),
)
RESIDUAL = sp.Epilogue(
    (Input("tensor"), Input("channel"), Input("words", "uint32")),
    (Step("add", (0, 1)), Step("greater_equal", (4, 2), "bool")),
    (Output("bits", 5, flip=3), Output("tensor", 4)),
)
BIAS = sp.Epilogue((Input("channel"),), (Step("add", (0, 1)), Step("relu", (2,))), (Output("tensor", 3),))
INT = sp.store("int32", "int32")


@dataclass
class Case:
    """A kernel: ``arrays`` are its parameters up to the results, which have to be ``results``; ``tolerance`` relative, 0: bit by bit."""

    name: str
    spec: object
    schedule: object
    arrays: list
    results: list
    tolerance: float = 0.0


def cases(isa):
    """All of them, the same in every run."""
    rng = np.random.default_rng(20)
    for number, (spec, data, weights, channels, dims, tolerance) in enumerate(_problems(rng)):
        family = families.of(spec, isa)
        for chosen, schedule in enumerate(some(family.space(spec, isa))):
            yield _case(
                f"{type(spec).__name__}_{number}_{chosen}", family, spec, schedule, isa, data, weights, channels, dims, tolerance, rng
            )


def some(space):
    """The default schedule, and one for every other way through the code: engines, resident weights, clusters, kernels for few rows."""
    found = {way(space[0]): space[0]}
    for schedule in space:
        found.setdefault(way(schedule), schedule)
    return list(found.values())


def way(schedule):
    """What decides which code a schedule runs; the other fields are sizes, as is the number of parts that meet in memory."""
    kind, few = getattr(schedule, "engine", type(schedule).__module__), getattr(schedule, "few", 0) > 0
    split, in_memory = getattr(schedule, "split", 1), getattr(schedule, "in_memory", False)
    resident, cluster, grouped = getattr(schedule, "resident", False), getattr(schedule, "cluster", 1), getattr(schedule, "grouped", False)
    return kind, resident, cluster, few, min(split, 2) if in_memory else split, in_memory, grouped


def _case(name, family, spec, schedule, isa, data, weights, channels, dims, tolerance, rng):
    epilogue = getattr(spec, "epilogue", None)
    inputs = _inputs(rng, epilogue, channels, dims) if epilogue else []
    at = next((i for i, one in enumerate(data) if one is None), len(data))
    before, after = data[:at], data[at + 1 :]
    middle = [] if weights is None else [weights]
    results = family.reference(spec, [*before, *middle, *after], inputs)
    packed = [] if weights is None else [family.pack_weights(spec, schedule, isa, weights)]
    return Case(name, spec, schedule, [*before, *packed, *after, *inputs], results, tolerance)


def _inputs(rng, epilogue, channels, dims):
    arrays = []
    for operand in epilogue.inputs:
        shape = tail.input_shape(operand, channels, dims)
        if operand.kind == "words":
            arrays.append(rng.integers(0, 2**32, shape, dtype=np.uint32))
            continue
        array = rng.integers(-4, 5, shape).astype(operand.dtype)
        if operand.kind == "channel":
            array[channels:] = 0
        arrays.append(array)
    return arrays


def _bits(rng, shape):
    return tail.pack(rng.random(shape) < 0.5)


def _small(rng, shape):
    return rng.integers(-4, 5, shape).astype(np.float32)


def _conv(window, images):
    return images, window.out_height, window.out_width


def _image(window, images, channels):
    return images, window.in_height, window.in_width, channels


def _problems(rng):
    """``(spec, data, weights, channels, dims, tolerance)``; a None in the data is where the weights go."""
    yield from _binary(rng)
    yield from _planes(rng)
    yield from _moves(rng)
    yield from _floats(rng)


def _binary(rng):
    same = sp.Window(9, 11, (3, 3), (1, 1), (1, 1, 1, 1))
    half = sp.Window(13, 12, (3, 3), (2, 2), (1, 1, 1, 1))
    for window, channels, outputs, epilogue in (
        (same, 64, 64, NORM), (same, 40, 70, THRESHOLD), (half, 128, 128, NORM),
        (sp.Window(7, 7, (3, 3), (1, 1), (1, 1, 1, 1)), 256, 256, INT), (sp.Window(3, 4, (3, 3), (1, 1), (1, 1, 1, 1)), 512, 192, NORM),
        (sp.Window(8, 8, (1, 1)), 96, 160, THRESHOLD), (sp.Window(10, 10, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2)), 32, 33, INT),
    ):  # fmt: skip
        spec = sp.BinaryConv2d(window, channels, outputs, epilogue=epilogue)
        yield spec, [_bits(rng, _image(window, 3, channels))], _bits(rng, (outputs, *window.kernel, channels)), outputs, _conv(window, 3), 0
    grouped = sp.BinaryConv2d(same, 128, 64, 2, epilogue=THRESHOLD)
    yield grouped, [_bits(rng, _image(same, 2, 128))], _bits(rng, (64, 3, 3, 64)), 64, _conv(same, 2), 0
    one_sided = sp.BinaryConv2d(same, 64, 48, unipolar=True, epilogue=INT)
    yield one_sided, [_bits(rng, _image(same, 2, 64))], _bits(rng, (48, 3, 3, 64)), 48, _conv(same, 2), 0
    signs = rng.random(_image(same, 2, 64)) < 0.5
    zeros = rng.random(signs.shape) < 0.2
    masked = sp.BinaryConv2d(same, 64, 64, zeros=True, epilogue=INT)
    yield masked, [tail.pack(signs & ~zeros), None, tail.pack(zeros)], _bits(rng, (64, 3, 3, 64)), 64, _conv(same, 2), 0
    # K in parts for few rows, on both sides of the limit; several tiles for blocks that stay.
    for rows, features, outputs, epilogue in ((1, 1000, 70, INT), (130, 512, 256, THRESHOLD), (300, 1024, 384, INT), (3, 8200, 200, INT),
                                              (700, 4096, 300, THRESHOLD), (20000, 700, 130, THRESHOLD)):  # fmt: skip
        spec = sp.BinaryDense(features, outputs, epilogue=epilogue)
        yield spec, [_bits(rng, (rows, features))], _bits(rng, (outputs, features)), outputs, (rows,), 0
    yield from _products(rng)


def _products(rng):
    """Products of two activations: both engines, all kinds of operands, one right operand for all."""
    kinds = ("bipolar", "unipolar", "ternary")
    shapes = (33, 40, 70, False), (197, 197, 64, False), (100, 70, 600, True), (40, 36, 4090, False)
    for number, (rows, columns, features, shared) in enumerate(shapes):
        for left, right in ((kinds[i], kinds[(i + number) % 3]) for i in range(3)):
            for turned in (False, True)[number > 0 :]:
                spec = sp.BinaryMatmul(rows, columns, features, -(-features // 32), left, right, shared, (None, 0.125)[number % 2], turned)
                others = _operand(rng, right, (1 if shared else 2, columns, features))
                others = others if turned else [np.ascontiguousarray(one.transpose(0, 2, 1)) for one in others]
                yield spec, [*_operand(rng, left, (2, rows, features)), *others], None, columns, (2, rows), 0


def _operand(rng, kind, shape):
    """Words of one, of ternary numbers signs and zeros."""
    ones, zeros = rng.random(shape) < 0.5, rng.random(shape) < 0.3
    return [tail.pack(ones & ~zeros), tail.pack(zeros)] if kind == "ternary" else [tail.pack(ones)]


def _planes(rng):
    window = sp.Window(9, 11, (3, 3), (1, 1), (1, 1, 1, 1))
    for data, weights, kind, weight_kind in (((1, 2), (1,), "unipolar", "bipolar"), ((1, 2, 4), (1, 2), "unipolar", "unipolar"),
                                             ((1,), (1,), "bipolar", "ternary")):  # fmt: skip
        planes = sp.PlaneSum(data, weights, kind, weight_kind)
        spec = sp.PlanesConv2d(window, 64, 40, planes, epilogue=INT)
        operands = [_bits(rng, _image(window, 2, 64)) for _ in data]
        yield spec, operands, _weights(rng, planes, (40, 3, 3, 64)), 40, _conv(window, 2), 0
        for features in (300, 4100)[: 1 + (kind == "bipolar")]:
            dense = sp.PlanesDense(features, 70, planes, epilogue=INT)
            yield dense, [_bits(rng, (37, features)) for _ in data], _weights(rng, planes, (70, features)), 70, (37,), 0


def _weights(rng, planes, shape):
    """Planes of words; a sign is 0 where its mask is."""
    found = []
    for _ in planes.weights:
        signs, mask = rng.random(shape) < 0.5, rng.random(shape) < 0.7
        found += [tail.pack(signs & mask), tail.pack(mask)] if planes.weight_kind == "ternary" else [tail.pack(signs)]
    return np.stack(found)


def _moves(rng):
    window = sp.Window(9, 11, (3, 2), (2, 2), (1, 0, 1, 1))
    words = rng.integers(0, 2**32, _image(window, 2, 3), dtype=np.uint32)
    yield sp.BitPool(window, 96, "and"), [words], None, 96, _conv(window, 2), 0
    yield sp.BitPad((9, 11), 3, (1, 2, 0, 1), 0xF0F0F0F0), [words], None, 96, (2, 10, 14), 0
    planar = rng.normal(size=(2, 70, 9, 11)).astype(np.float32)
    yield sp.PlanarPack((9, 11), 70, SIGN), [planar], None, 70, (2, 9, 11), 0
    yield sp.Map(4, (9, 11), 70, "float32", SIGN), [rng.normal(size=(2, 9, 11, 70)).astype(np.float32)], None, 70, (2, 9, 11), 0
    yield sp.Map(2, (1, 1), 130, "float32", RESIDUAL), [_small(rng, (37, 130))], None, 130, (37,), 0
    yield sp.Concat(4, (5, 3), (33, 7, 64), BIAS), [_small(rng, (2, 5, 3, c)) for c in (33, 7, 64)], None, 104, (2, 5, 3), 0
    yield sp.Transpose(70, 45, ((70, 45), (45, 70))), [_small(rng, (3, 70, 45))], None, 70, (3, 45), 0
    yield sp.RowExtreme("max", 77), [rng.normal(size=(9, 77)).astype(np.float32)], None, 1, (9,), 0
    for kind, exclusive, backward in (("float32", False, True), ("int64", True, False)):
        yield sp.CumSum(21, 70, kind, exclusive, backward), [_small(rng, (3, 21, 70)).astype(kind)], None, 70, (3, 21), 0
    yield sp.TopK(50, 5, True), [rng.normal(size=(40, 50)).astype(np.float32)], None, 5, (40,), 0


def _floats(rng):
    same, half = sp.Window(9, 11, (3, 3), (1, 1), (1, 1, 1, 1)), sp.Window(31, 29, (7, 7), (2, 2), (3, 3, 3, 3))
    for spec, images in ((sp.FloatConv2d(half, 3, 64, 1, BIAS, True), 2), (sp.FloatConv2d(same, 20, 70, 1, RESIDUAL), 3),
                         (sp.FloatConv2d(sp.Window(9, 9, (1, 1), (2, 2)), 64, 128, 1, BIAS), 5),
                         (sp.FloatConv2d(same, 12, 18, 3, BIAS), 2)):  # fmt: skip
        shape = _image(spec.window, images, spec.in_channels)
        data = _small(rng, (shape[0], shape[3], *shape[1:3]) if spec.planar else shape)
        weights = _small(rng, (spec.out_channels, *spec.window.kernel, spec.in_channels // spec.groups))
        yield spec, [data], weights, spec.out_channels, _conv(spec.window, images), 0
    yield from _of_many_bits(rng, half, same)
    yield sp.FloatConv2d(same, 40, 40, 40, BIAS), [_small(rng, _image(same, 2, 40))], _small(rng, (40, 3, 3, 1)), 40, _conv(same, 2), 0
    for rows in (11, 100):  # few rows, and tiles
        yield sp.FloatDense(300, 70, BIAS), [_small(rng, (rows, 300))], _small(rng, (70, 300)), 70, (rows,), 0
    yield sp.Pool2d(same, 70, "max", RESIDUAL), [_small(rng, _image(same, 2, 70))], None, 70, _conv(same, 2), 0
    yield sp.Pool2d(same, 40, "avg", sp.store()), [_small(rng, _image(same, 2, 40))], None, 40, _conv(same, 2), 0
    yield sp.GlobalPool("avg", (7, 7), 70, sp.store()), [_small(rng, (3, 7, 7, 70))], None, 70, (3, 1, 1), 0
    yield sp.Softmax(100), [rng.normal(0, 5, (5, 100)).astype(np.float32)], None, 100, (5,), 1e-5
    coding = sp.WeightCoding("ternary", 2)
    chosen = rng.integers(0, 3, (70, 3, 3, 20))
    planes = tail.pack(np.stack([chosen == 1, chosen == 2]))
    yield sp.WeightConv2d(same, 20, 70, 1, BIAS, False, coding), [_small(rng, _image(same, 2, 20))], planes, 70, _conv(same, 2), 0
    chosen = rng.integers(0, 3, (70, 90))
    planes = tail.pack(np.stack([chosen == 1, chosen == 2]))
    yield sp.WeightDense(90, 70, coding, BIAS), [_small(rng, (9, 90))], planes, 70, (9,), 0
    yield sp.WeightDenseInt8(90, 70, coding, INT), [rng.integers(-128, 128, (9, 90)).astype(np.float32)], planes, 70, (9,), 0
    spec = sp.Int8Conv2d(same, 40, 37, "int8", "int8", INT)
    data = rng.integers(-128, 128, _image(same, 2, 40)).astype(np.int8)
    weights = rng.integers(-128, 128, (37, 3, 3, 40)).astype(np.int8)
    yield spec, [data], weights, 37, _conv(same, 2), 0
    digits = replace(spec, data=sp.Digits(0, (1, 2, 4, -8)), weights=sp.Digits(-1, (1, 2)))
    yield (
        digits,
        [_bits(rng, _image(same, 2, 40)) for _ in range(4)],
        rng.integers(-1, 3, weights.shape).astype(np.int8),
        37,
        _conv(same, 2),
        0,
    )


def _of_many_bits(rng, half, same):
    """Data, or weights, of 13 bits, more than a tf32 has, whose sums are exact all the same; and an infinity, which stays one."""
    stem, plain = sp.FloatConv2d(half, 3, 64, 1, BIAS, True), sp.FloatConv2d(same, 20, 70, 1, BIAS)
    odd = sp.FloatConv2d(same, 10, 40, 1, sp.store())
    for spec, data_most, weight_most, infinite in ((stem, 4095, 4, 0), (plain, 4, 4095, 0), (odd, 4095, 4, 1), (plain, 4, 4, 1)):
        shape = _image(spec.window, 2, spec.in_channels)
        shape = (shape[0], shape[3], *shape[1:3]) if spec.planar else shape
        data = rng.integers(-data_most, data_most + 1, shape).astype(np.float32)
        data.reshape(-1)[rng.integers(0, data.size, infinite)] = np.inf
        weights = rng.integers(-weight_most, weight_most + 1, (spec.out_channels, *spec.window.kernel, spec.in_channels)).astype(np.float32)
        weights[weights == 0] = 1  # times infinity it would be NaN
        yield spec, [data], weights, spec.out_channels, _conv(spec.window, 2), 0
    data, weights = rng.integers(-4095, 4096, (70, 300)).astype(np.float32), _small(rng, (70, 300)) + 0.5
    data[33, 200] = np.inf
    yield sp.FloatDense(300, 70, sp.store()), [data], weights, 70, (70,), 0
