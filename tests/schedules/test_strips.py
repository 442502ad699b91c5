"""Convolutions that store in channel order, against the reference; nothing is written beside the result."""

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
    func = binary_conv2d.build(spec, schedule, isa).with_attr("global_symbol", "kernel")
    kernel = tvm.compile(tvm.IRModule({"kernel": func}), target=tvm_target(isa))
    rng, w, batch = np.random.default_rng(0), spec.window, 2
    data = tail.pack(rng.random((batch, w.in_height, w.in_width, spec.in_channels)) < 0.5)
    weights = tail.pack(rng.random((spec.out_channels, *w.kernel, spec.in_channels)) < 0.5)
    shape = (batch, w.out_height, w.out_width)
    inputs = epilogue_inputs(rng, spec.epilogue, spec.out_channels, shape)
    (want,) = binary_conv2d.reference(spec, [data, weights], inputs)
    memory = np.full(want.size + 2 * GUARD, 77, np.float32)
    got = memory[GUARD:-GUARD].reshape(want.shape)
    packed = binary_conv2d.pack_weights(spec, schedule, isa, weights)
    kernel["kernel"](*(tvm_ffi.from_dlpack(a) for a in (data, packed, *inputs, got)))
    np.testing.assert_array_equal(got, want)
    assert (memory[:GUARD] == 77).all() and (memory[-GUARD:] == 77).all()


def test_a_single_layer_needs_no_transpose():
    layer = Layer(64, 8)
    x = layer.input()
    module = bnntvm.build(layer.binary(), threads=1)
    (got,) = module.run({"input": x}).values()
    assert b"transpose" not in module._file.read()
    assert got.shape == x.shape and got.dtype == np.float32
