"""Convolutions that store in channel order or pool their results, against the reference; nothing is written beside the result."""

from dataclasses import replace

import numpy as np
import pytest
import tvm
import tvm_ffi
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bnntvm
from benchmarks.layers import Layer
from bnntvm import spec as specs
from bnntvm.build import tvm_target
from bnntvm.schedules import binary_conv2d
from bnntvm.schedules import epilogue as tail
from bnntvm.targets.x86 import LEVELS, host_flags

from .kernels import epilogue_inputs

RUNNABLE = [isa for isa in LEVELS if isa.needs <= host_flags()]

EPILOGUE = specs.Epilogue(
    (specs.EpilogueInput("channel"),), (specs.Step("cast", (0,)), specs.Step("multiply", (2, 1))), (specs.Output("planar", 3),)
)
GUARD = 64


@st.composite
def convolutions(draw):
    size, channels = st.integers(1, 20), st.sampled_from([1, 16, 31, 32, 33, 40, 64])
    kernel, stride = draw(st.sampled_from([1, 3])), draw(st.integers(1, 2))
    window = specs.Window(draw(size), draw(size), (kernel, kernel), (stride, stride), (kernel // 2,) * 4)
    return specs.BinaryConv2d(window, draw(st.sampled_from([32, 33, 64])), draw(channels), epilogue=EPILOGUE)


def square(height, width, kernel, inputs, outputs):
    return specs.BinaryConv2d(specs.Window(height, width, (kernel, kernel), (1, 1), (kernel // 2,) * 4), inputs, outputs, epilogue=EPILOGUE)


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(spec=convolutions(), task_rows=st.integers(1, 9))
@example(square(14, 14, 1, 64, 64), 4)  # tasks of four and of three joined rows
@example(square(17, 5, 3, 32, 33), 7)
def test_equals_the_reference(isa, spec, task_rows):
    schedule = binary_conv2d.default_schedule(spec, isa)
    schedule = replace(schedule, task_rows=min(task_rows, schedule.task_rows))
    check(spec, schedule, isa)


def check(spec, schedule, isa, some_zeros=False):
    """The kernel's results are the reference's, bit for bit, and what lies around them is as it was."""
    func = binary_conv2d.build(spec, schedule, isa).with_attr("global_symbol", "kernel")
    kernel = tvm.compile(tvm.IRModule({"kernel": func}), target=tvm_target(isa))
    rng, w, batch = np.random.default_rng(0), spec.window, 2
    data = tail.pack(rng.random((batch, w.in_height, w.in_width, spec.in_channels)) < 0.5)
    weights = tail.pack(rng.random((spec.out_channels, *w.kernel, spec.in_channels)) < 0.5)
    zeros = tail.pack(rng.random((batch, w.in_height, w.in_width, spec.in_channels)) < 0.01 * some_zeros)
    masks = [zeros] if spec.zeros else []
    inputs = epilogue_inputs(rng, spec.epilogue, spec.out_channels, (batch, w.out_height, w.out_width))
    wanted = binary_conv2d.reference(spec, [data & ~zeros if masks else data, weights, *masks], inputs)
    memories = [np.full(want.size + 2 * GUARD, 77, want.dtype) for want in wanted]
    results = [memory[GUARD:-GUARD].reshape(want.shape) for memory, want in zip(memories, wanted)]
    packed = binary_conv2d.pack_weights(spec, schedule, isa, weights)
    operands = (data & ~zeros if masks else data, packed, *masks, *inputs, *results)
    kernel["kernel"](*(tvm_ffi.from_dlpack(a) for a in operands))
    for memory, got, want in zip(memories, results, wanted):
        np.testing.assert_array_equal(got, want)
        assert (memory[:GUARD] == 77).all() and (memory[-GUARD:] == 77).all()


@st.composite
def pooled(draw):
    """Convolutions of even results, with a residual, pooled results, and bits and tensors beside them in any order."""
    kernel, stride = draw(st.sampled_from([1, 3])), draw(st.integers(1, 2))
    size = st.integers(1, 10).map(lambda n: 2 * n * stride)
    window = specs.Window(draw(size), draw(size), (kernel, kernel), (stride, stride), (kernel // 2,) * 4)
    outputs = [specs.Output(draw(st.sampled_from(specs.POOLED)), 6), *draw(st.sets(st.sampled_from([
        specs.Output("tensor", 6), specs.Output("bits", 7, "uint32"), specs.Output("max_pool", 5), specs.Output("avg_pool", 5),
    ]), max_size=3))]  # fmt: skip
    epilogue = specs.Epilogue(
        (specs.EpilogueInput("channel"), specs.EpilogueInput("tensor"), specs.EpilogueInput("channel")),
        (specs.Step("cast", (0,)), specs.Step("multiply", (4, 1)), specs.Step("add", (5, 2)), specs.Step("less", (6, 3), "bool")),
        tuple(draw(st.permutations(outputs))),
    )
    channels = draw(st.sampled_from([1, 16, 31, 32, 33, 40, 64, 100]))
    return specs.BinaryConv2d(window, draw(st.sampled_from([32, 33, 64])), channels, zeros=draw(st.booleans()), epilogue=epilogue)


@pytest.mark.parametrize("isa", RUNNABLE, ids=lambda isa: isa.name)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(spec=pooled(), number=st.integers(0, 10000), some_zeros=st.booleans())
def test_pooled_results(isa, spec, number, some_zeros):
    if not binary_conv2d.stores_pooled(spec, isa):  # products of tiles are faster: the pool stays a kernel of its own
        return
    space = binary_conv2d.space(spec, isa)
    assert all(schedule.task_rows % 2 == 0 for schedule in space)
    check(spec, space[number % len(space)], isa, some_zeros)


def test_a_single_layer_needs_no_transpose():
    layer = Layer(64, 8)
    x = layer.input()
    module = bnntvm.build(layer.binary(), threads=1)
    (got,) = module.run({"input": x}).values()
    assert b"transpose" not in module._file.read()
    assert got.shape == x.shape and got.dtype == np.float32
