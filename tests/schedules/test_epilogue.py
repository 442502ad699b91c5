"""Epilogues against numpy: random programs of exact operations bit by bit, transcendental functions to a few units in the last place."""

import math
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules import epilogue as tail
from bnntvm.schedules import map as family
from tests.schedules.kernels import ISAS, Kernel, assert_same, epilogue_inputs, epilogue_outputs

STEP, OUTPUT, INPUT = specs.Step, specs.Output, specs.EpilogueInput
UNARY = ["negative", "abs", "sign", "floor", "ceil", "round", "relu"]
BINARY = ["add", "subtract", "multiply", "maximum", "minimum", "prelu"]
COMPARE = ["greater", "greater_equal", "less", "less_equal", "equal", "not_equal"]
LOGICAL = ["logical_and", "logical_or", "logical_xor"]
KINDS = ["unary", "binary", "binary", "compare", "logical", "where", "cast", "divide", "root", "clip", "power"]
CONSTANTS = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, -0.75, 0.1])


class Program:
    """A random well-typed epilogue, built one step at a time. Value types are tracked by number.

    ``times``: some tensors, one at least, are read so many times side by side.
    """

    def __init__(self, draw, anchor, times=1):
        self.draw, self.steps = draw, []
        kinds = draw(st.lists(st.sampled_from(["tensor", "channel", "image", "pixel"]), max_size=4))
        self.inputs = [INPUT(kind, times=draw(st.sampled_from([1, times])) if kind == "tensor" else 1) for kind in kinds]
        self.inputs += [INPUT("tensor", times=times)] if times > 1 else []
        self.inputs += [INPUT("channel", "int32"), INPUT("words", "uint32")]
        self.words = len(self.inputs)
        self.types = [anchor, *(e.dtype for e in self.inputs)]
        for _ in range(draw(st.integers(1, 9))):
            self.step()

    def pick(self, dtype):
        """A value of a type, made from the anchor if there is none yet."""
        numbers = [i for i, t in enumerate(self.types) if t == dtype]
        if not numbers:
            source = next(i for i, t in enumerate(self.types) if t not in (dtype, "uint32"))
            step = ("less", (source, 1.0), "bool") if dtype == "bool" else ("cast", (source,), dtype)
            return self.append(*step)
        return self.draw(st.sampled_from(numbers))

    def append(self, op, args, dtype):
        self.steps.append(STEP(op, tuple(args), dtype))
        self.types.append(dtype)
        return len(self.types) - 1

    def step(self):
        draw = self.draw
        kind = draw(st.sampled_from(KINDS))
        x = self.pick("float32")
        y = draw(st.one_of(CONSTANTS, st.just(None)))
        y = self.pick("float32") if y is None else y
        if kind == "unary":
            self.append(draw(st.sampled_from(UNARY)), (x,), "float32")
        elif kind == "binary":
            self.append(draw(st.sampled_from(BINARY)), draw(st.permutations([x, y])) if draw(st.booleans()) else (x, y), "float32")
        elif kind == "compare":
            dtype = draw(st.sampled_from(["float32", "int32"]))
            other = y if dtype == "float32" else float(draw(st.integers(-3, 3)))
            self.append(draw(st.sampled_from(COMPARE)), draw(st.permutations([self.pick(dtype), other])), "bool")
        elif kind == "logical":
            a, b = self.pick("bool"), self.pick("bool")
            self.append(*draw(st.sampled_from([("logical_not", (a,), "bool"), *((op, (a, b), "bool") for op in LOGICAL)])))
        elif kind == "where":
            self.append("where", (self.pick("bool"), *draw(st.permutations([x, y]))), "float32")
        elif kind == "cast":
            self.append("cast", (self.pick(draw(st.sampled_from(["bool", "int32"]))),), "float32")
        elif kind == "divide":
            self.append("divide", (x, draw(st.sampled_from([3.0, -0.7, 10.0]))), "float32")
        elif kind == "root":
            size = self.append("abs", (x,), "float32")
            self.append(draw(st.sampled_from(["sqrt", "rsqrt"])), (self.append("add", (size, 0.5), "float32"),), "float32")
        elif kind == "clip":
            self.append("clip", (x, -1.5, draw(st.sampled_from([0.5, 6.0]))), "float32")
        else:
            self.append("power", (x, draw(st.sampled_from([2.0, 3.0]))), "float32")

    def epilogue(self):
        draw, outputs = self.draw, []
        for _ in range(draw(st.integers(1, 3))):
            dtype = draw(st.sampled_from(["float32", "float32", "int32", "bool"]))
            value = self.pick(dtype)
            if dtype == "bool":
                outputs.append(OUTPUT("bits", value, flip=draw(st.sampled_from([None, self.words]))))
            else:
                outputs.append(OUTPUT("tensor", value, dtype))
        return specs.Epilogue(tuple(self.inputs), tuple(self.steps), tuple(outputs))


def everything_finite(epilogue, data, inputs):
    """Whether no step overflows or is not a number: maximum and comparisons of NaN are nobody's business."""
    floats = [OUTPUT("tensor", 1 + len(inputs) + i) for i, step in enumerate(epilogue.steps) if step.dtype == "float32"]
    probe = specs.Epilogue(epilogue.inputs, epilogue.steps, tuple(floats))
    return all(np.isfinite(v).all() for v in tail.reference(probe, data, inputs))


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_programs(isa, data):
    anchor = data.draw(st.sampled_from(["float32", "int32"]))
    epilogue = Program(data.draw, anchor).epilogue()
    channels, spatial = data.draw(st.integers(1, 130)), data.draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    kernel = None
    for images in (1, 3):
        dims = (images, *spatial)
        values = rng.integers(-4, 4, (*dims, channels), endpoint=True) if anchor == "int32" else rng.normal(size=(*dims, channels)) * 2
        values = values.astype(anchor)
        inputs = epilogue_inputs(rng, epilogue, channels, dims)
        assume(everything_finite(epilogue, values, inputs))
        kernel = kernel or Kernel(family, specs.Map(4, spatial, channels, anchor, epilogue), isa)
        actual = kernel.run([values, *inputs], epilogue_outputs(epilogue, channels, dims))
        assert_same(actual, tail.reference(epilogue, values, inputs), f"{epilogue} on {values.shape}, {isa.name}")


@pytest.mark.parametrize("isa", ISAS)
def test_batch_norm_is_not_contracted(isa):
    """``x * s + b`` with b = -(mean * s): exact zeros where x == mean, which a fused multiply-add turns into noise."""
    epilogue = specs.Epilogue((INPUT("channel"), INPUT("channel")), (STEP("multiply", (0, 1)), STEP("add", (3, 2))), (OUTPUT("tensor", 4),))
    rng = np.random.default_rng(0)
    mean, scale = rng.integers(1, 9, 64).astype(np.float32), rng.normal(size=64).astype(np.float32)
    data = np.repeat(mean[None], 5, 0)
    kernel = Kernel(family, specs.Map(2, (), 64, "float32", epilogue), isa)
    (result,) = kernel.run([data, scale, -(mean * scale)], [(data.shape, np.float32)])
    assert (result == 0).all()


#: Steps that compare or pick, of values 0 and 1: zeros and subnormal numbers are no operands of arithmetic here.
PICKING = [
    *(STEP(op, (0, 1), "bool") for op in COMPARE), STEP("cast", (0,), "bool"), STEP("less", (0, 1e-45), "bool"), STEP("sign", (0,)),
    STEP("relu", (0,)), STEP("negative", (0,)), STEP("abs", (0,)), STEP("maximum", (0, 1)), STEP("minimum", (0, 1)),
    STEP("maximum", (0, 0.0)), STEP("minimum", (0.0, 0)), STEP("maximum", (1e-45, 0)), STEP("minimum", (0, 2.0)),
    STEP("clip", (0, -1.0, 1.0)), STEP("clip", (0, 0.0, 6.0)), STEP("clip", (0, -2e-45, 2e-45)),
]  # fmt: skip


def picking():
    """``(epilogue, data, operand)``: every pair of notable numbers through all of these steps."""
    tiny = [1.4e-45, 2.8e-45, 1.1754942e-38, 1.1754944e-38, 1.0, 3.0, np.inf]
    numbers = np.array([0.0, -0.0, *tiny, *np.negative(tiny)], np.float32)
    pairs = np.stack(np.meshgrid(numbers, numbers), -1).reshape(-1, 2)
    pairs = np.resize(pairs, (-(-len(pairs) // 40) * 40, 2))
    outputs = [OUTPUT("bits" if step.dtype == "bool" else "tensor", 2 + i) for i, step in enumerate(PICKING)]
    epilogue = specs.Epilogue((INPUT("tensor"),), tuple(PICKING), tuple(outputs))
    return epilogue, pairs[:, 0].reshape(-1, 40), pairs[:, 1].reshape(-1, 40)


@pytest.mark.parametrize("isa", ISAS)
def test_the_smallest_numbers_are_told_apart(isa):
    """By everything that compares numbers or picks one of them, whatever arithmetic makes of them."""
    epilogue, data, operand = picking()
    kernel = Kernel(family, specs.Map(2, (), 40, "float32", epilogue), isa)
    actual = kernel.run([data, operand], epilogue_outputs(epilogue, 40, data.shape[:1]))
    for step, a, b in zip(PICKING, actual, tail.reference(epilogue, data, [operand]), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(step))


def deciding():
    """``(epilogue, data, operand)``: arithmetic of the smallest numbers before comparisons and signs; the last step decides nothing."""
    steps = [
        STEP("multiply", (0, 1e8)), STEP("sign", (2,)), STEP("add", (0, 1)), STEP("greater", (4, 0.0), "bool"),
        STEP("subtract", (0, 1)), STEP("multiply", (6, 0.5)), STEP("round", (7,)), STEP("less", (8, 7), "bool"),
        STEP("prelu", (0, -0.25)), STEP("sign", (10,)), STEP("multiply", (0, 0.5)),
    ]  # fmt: skip
    epilogue, data, operand = picking()
    finite = np.isfinite(data) & np.isfinite(operand)
    outputs = (OUTPUT("tensor", 3), OUTPUT("bits", 5), OUTPUT("bits", 9), OUTPUT("tensor", 11), OUTPUT("tensor", 12))
    return specs.Epilogue(epilogue.inputs, tuple(steps), outputs), np.where(finite, data, 0), np.where(finite, operand, 0)


@pytest.mark.parametrize("isa", ISAS)
def test_the_smallest_numbers_decide(isa):
    """Arithmetic before a decision knows them; other results may take them for zero."""
    epilogue, data, operand = deciding()
    kernel = Kernel(family, specs.Map(2, (), 40, "float32", epilogue), isa)
    *decided, plain = kernel.run([data, operand], epilogue_outputs(epilogue, 40, data.shape[:1]))
    *expected, last = tail.reference(epilogue, data, [operand])
    assert_same(decided, expected, isa.name)
    np.testing.assert_allclose(plain, last, rtol=1e-6, atol=2e-38)


@pytest.mark.parametrize("isa", ISAS)
def test_not_a_number_stays_one(isa):
    """Through what clips it, whatever its sign."""
    steps = (STEP("relu", (0,)), STEP("clip", (0, -1.0, 1.0)), STEP("clip", (0, 0.0, 6.0)), STEP("maximum", (1e-45, 0)))
    epilogue = specs.Epilogue((), steps, tuple(OUTPUT("tensor", 1 + i) for i in range(len(steps))))
    data = np.full((3, 40), np.nan, np.float32)
    data[1] = np.copysign(data[1], -1)
    kernel = Kernel(family, specs.Map(2, (), 40, "float32", epilogue), isa)
    for step, result in zip(steps, kernel.run([data], epilogue_outputs(epilogue, 40, data.shape[:1]))):
        assert np.isnan(result).all(), step


FUNCTIONS = {
    "exp": (np.exp, 4e-7),
    "log": (np.log, 4e-7),
    "tanh": (np.tanh, 4e-7),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), 4e-7),
    "erf": (np.vectorize(math.erf), 4e-7),
}


@pytest.mark.parametrize("isa", ISAS)
def test_transcendental_functions(isa):
    """Within a few units in the last place everywhere, right at infinities and zeros, NaN for NaN; no call of the C library."""
    rng = np.random.default_rng(0)
    spread = [rng.normal(size=4000) * s for s in (1e-4, 0.01, 0.3, 1, 5, 40)]
    edges = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 1e-45, 0.625, 4.0, -4.0, 88.7, -103.0, 1.0000001]
    points = np.concatenate([*spread, np.linspace(-110, 110, 5000), 2.0 ** rng.uniform(-149, 127, 4000), edges]).astype(np.float32)
    points = np.resize(points, (-(-len(points) // 128), 128))
    if isa.machine == "arm":  # 32-bit NEON takes subnormal numbers for zero
        points = np.where(np.abs(points) < 2.0**-126, np.float32(0), points)
    names = list(FUNCTIONS)
    epilogue = specs.Epilogue((), tuple(STEP(n, (0,)) for n in names), tuple(OUTPUT("tensor", 1 + i) for i in range(len(names))))
    kernel = Kernel(family, specs.Map(2, (), 128, "float32", epilogue), isa)
    results = kernel.run([points], epilogue_outputs(epilogue, 128, points.shape[:1]))
    assert not re.search(r"call.*(expf|logf|tanhf|erff)", kernel.assembly)
    with np.errstate(all="ignore"):
        for name, result in zip(names, results):
            function, tolerance = FUNCTIONS[name]
            exact = function(points.astype(np.float64))
            expected = exact.astype(np.float32)
            assert (np.isnan(result) == np.isnan(expected)).all(), name
            normal = np.abs(exact) > 2.0**-126
            close = np.abs(result - exact) <= tolerance * np.abs(exact)
            assert ((result == expected) | close | np.isnan(expected) | ~normal).all(), name
            assert (np.abs(result - exact)[~normal & np.isfinite(exact)] <= 2.0**-126).all(), name


def test_general_power_is_the_libraries():
    isa = ISAS[0].values[0]
    epilogue = specs.Epilogue((), (STEP("abs", (0,)), STEP("power", (1, 1.7))), (OUTPUT("tensor", 2),))
    data = np.random.default_rng(0).normal(size=(9, 40)).astype(np.float32)
    (result,) = Kernel(family, specs.Map(2, (), 40, "float32", epilogue), isa).run([data], [(data.shape, np.float32)])
    np.testing.assert_allclose(result, tail.reference(epilogue, data, [])[0], rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS[:1] + ISAS[2:3])
@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int64", "float64", "float16"])
def test_other_types_of_memory(isa, dtype):
    """Whole vectors and tails of any type that a network may return."""
    source = STEP("cast", (0,), "bool") if dtype == "bool" else STEP("round", (0,))
    epilogue = specs.Epilogue((), (source,), (OUTPUT("tensor", 1, dtype),))
    for channels in (64, 45):
        data = np.random.default_rng(0).integers(0, 5, (3, channels)).astype(np.float32)
        actual = Kernel(family, specs.Map(2, (), channels, "float32", epilogue), isa).run([data], [(data.shape, dtype)])
        assert_same(actual, tail.reference(epilogue, data, []), f"{dtype}, {channels} channels")


def test_mixed_types_are_refused():
    epilogue = specs.Epilogue((INPUT("channel", "int32"),), (STEP("less", (0, 1), "bool"),), (OUTPUT("bits", 2),))
    with pytest.raises(TypeError, match="different types"):
        family.build(specs.Map(2, (), 32, "float32", epilogue), family.Schedule(1024, 1), ISAS[0].values[0])


def test_pack_and_unpack():
    bits = np.random.default_rng(0).random((3, 70)) < 0.5
    packed = tail.pack(bits)
    assert packed.shape == (3, 3) and packed.dtype == np.uint32
    assert packed[1, 2] >> 6 == 0 and (packed[1, 1] >> 3) & 1 == bits[1, 35]
    assert (tail.unpack(packed, 70) == bits).all()
