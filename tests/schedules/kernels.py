"""Compile a kernel once, run it on many inputs, compare with the numpy reference bit by bit."""

from dataclasses import dataclass

import numpy as np
import pytest

from bnntvm import spec as specs
from bnntvm.schedules import epilogue as tail

from .machines import LEVELS, execute, program

ISAS = [pytest.param(isa, id=isa.name) for isa in LEVELS]


@dataclass
class Kernel:
    """One compiled kernel of a family."""

    family: object
    spec: object
    isa: object
    schedule: object = None

    def __post_init__(self):
        self.schedule = self.schedule or self.family.default_schedule(self.spec, self.isa)
        self.program = program(self.family.build(self.spec, self.schedule, self.isa), self.isa)

    @property
    def assembly(self):
        return self.program.assembly

    def run(self, arrays, outputs):
        """``outputs`` is a list of (shape, dtype); they start as garbage, so that an element that is not stored shows."""
        garbage = [np.full(shape, 77, dtype) for shape, dtype in outputs]
        return execute(self.program, (*arrays, *garbage))[len(arrays) :]


def epilogue_outputs(epilogue, channels, dims):
    """(shape, dtype) of every output."""
    return [(tail.output_shape(o, channels, dims), tail.output_dtype(o)) for o in epilogue.outputs]


def epilogue_inputs(rng, epilogue, channels, dims, spread=4):
    """Random operands; a third of the integers are extreme, where a comparison never or always holds. Channel padding is 0."""
    arrays = []
    for operand in epilogue.inputs:
        shape = tail.input_shape(operand, channels, dims)
        if operand.dtype == "uint32":
            array = rng.integers(0, 2**32, shape, dtype=np.uint32)
        elif operand.dtype == "int32":
            array = rng.integers(-spread, spread, shape, endpoint=True).astype(np.int32)
            extremes = rng.choice(np.array([-(2**31), -(2**31) + 1, 2**31 - 2, 2**31 - 1], np.int32), shape)
            array = np.where(rng.random(shape) < 0.3, extremes, array)
        else:
            array = rng.normal(size=shape).astype(np.float32)
        if operand.kind == "channel":
            array[channels:] = 0
        arrays.append(array)
    return arrays


def assert_same(actual, expected, message):
    """Equal arrays (-0.0 and 0.0 are equal, NaN equals NaN)."""
    assert len(actual) == len(expected)
    for number, (a, e) in enumerate(zip(actual, expected)):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e, err_msg=f"output {number} of {message}")


def thresholds(*ops):
    """Packed comparisons of an int32 anchor with per-channel integers, one output for each name; the first one is flipped."""
    inputs = (specs.EpilogueInput("channel", "int32"), specs.EpilogueInput("words", "uint32"))
    steps = tuple(specs.Step(op, (0, 1), "bool") for op in ops)
    outputs = tuple(specs.Output("bits", 3 + i, flip=None if i else 2) for i in range(len(ops)))
    return specs.Epilogue(inputs, steps, outputs)
