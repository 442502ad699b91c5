"""Helpers to run float kernels beside their references.

Data and weights are small integers stored as float32: every sum is exact in any order, so results are compared bit by bit.
"""

import random

import numpy as np
from hypothesis import strategies as st

from bnntvm import spec as specs
from bnntvm.schedules import epilogue as epilogues

from . import machines

RUNNABLE = list(machines.LEVELS)


def sample(space, count=12, seed=0):
    """The default schedule, which comes first, and some of the others, the same ones in every run."""
    return [space[0], *random.Random(seed).sample(space[1:], min(count, len(space) - 1))]


def small_integers(rng, shape, low=-4, high=4):
    """float32 array of integers."""
    return rng.integers(low, high, shape, endpoint=True).astype(np.float32)


_Step, _Output, _Input = specs.Step, specs.Output, specs.EpilogueInput

#: Epilogues that between them use every kind of input and output.
EPILOGUES = {
    "plain": specs.store(),
    "bias_relu": specs.Epilogue((_Input("channel"),), (_Step("add", (0, 1)), _Step("relu", (2,))), (_Output("tensor", 3),)),
    "residual_and_bits": specs.Epilogue(
        (_Input("tensor"), _Input("channel"), _Input("words", "uint32")),
        (_Step("add", (0, 1)), _Step("greater_equal", (4, 2), "bool")),
        (_Output("bits", 5, flip=3), _Output("tensor", 4)),
    ),
    "bits": specs.Epilogue((), (_Step("less", (0, 1.0), "bool"),), (_Output("bits", 1),)),
    "image_pixel": specs.Epilogue(
        (_Input("image"), _Input("pixel")), (_Step("multiply", (0, 1)), _Step("add", (3, 2))), (_Output("tensor", 4),)
    ),
}


def epilogue_names(rank=4):
    """Strategy over the names in EPILOGUES that make sense for [N, H, W, C] (rank 4) or [M, C] (rank 2)."""
    return st.sampled_from([name for name in EPILOGUES if rank == 4 or name != "image_pixel"])


def epilogue_inputs(rng, epilogue, channels, dims):
    """Arrays for the inputs of an epilogue; padding of ``channel`` inputs is zeros."""
    arrays = []
    for operand in epilogue.inputs:
        shape = epilogues.input_shape(operand, channels, dims)
        if operand.kind == "words":
            arrays.append(rng.integers(0, 2**32, shape, dtype=np.uint32))
            continue
        array = small_integers(rng, shape)
        if operand.kind == "channel":
            array[channels:] = 0
        arrays.append(array)
    return arrays


def execute(kernel, isa, operands, inputs, epilogue, channels, dims):
    """Compile a kernel and run it; outputs start as garbage so that an element that is not stored shows."""
    outputs = []
    for output in epilogue.outputs:
        dtype = epilogues.output_dtype(output)
        outputs.append(np.full(epilogues.output_shape(output, channels, dims), 77, dtype))
    arrays = machines.execute(machines.program(kernel, isa), (*operands, *inputs, *outputs))
    return arrays[len(arrays) - len(outputs) :]


def check(family, spec, isa, data, weights, channels, dims, rng, schedule=None):
    """Run the kernel that ``family`` builds for ``spec`` and compare every output with the reference, bit by bit."""
    schedule = schedule or family.default_schedule(spec, isa)
    inputs = epilogue_inputs(rng, spec.epilogue, channels, dims)
    plain = list(data) if weights is None else [*data, weights]
    packed = list(data) if weights is None else [*data, family.pack_weights(spec, schedule, isa, weights)]
    got = execute(family.build(spec, schedule, isa), isa, packed, inputs, spec.epilogue, channels, dims)
    for actual, expected in zip(got, family.reference(spec, plain, inputs), strict=True):
        np.testing.assert_array_equal(actual, expected, err_msg=f"{spec} {schedule} {isa.name}")


@st.composite
def geometries(draw, most=13, kernel=4):
    """A valid :class:`bnntvm.spec.Window` with any strides, pads, dilations."""
    size = draw(st.tuples(st.integers(1, most), st.integers(1, most)))
    taps = draw(st.tuples(st.integers(1, kernel), st.integers(1, kernel)))
    dilations = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    strides = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    pads = list(draw(st.tuples(*[st.integers(0, 2)] * 4)))
    for axis in (0, 1):  # the window must fit at least once
        reach = dilations[axis] * (taps[axis] - 1) + 1
        pads[axis + 2] += max(0, reach - size[axis] - pads[axis] - pads[axis + 2])
    return specs.Window(*size, taps, strides, tuple(pads), dilations)
