"""Schedules that ask for cache lines ahead of time do so, and others leave it to the processor."""

from dataclasses import replace

import pytest
import tvm

from bnntvm import spec as specs
from bnntvm.build import tvm_target
from bnntvm.schedules import binary_conv2d, concat, float_conv2d, float_dense, pool2d

from . import machines

ISA = next(iter(machines.LEVELS))
FLOATS = specs.store("float32", "int32")
BINARY = specs.BinaryConv2d(specs.Window(8, 8, (1, 1)), 64, 64, epilogue=FLOATS)
#: Family, specification, fields without and with requests.
CASES = {
    "binary_conv2d": (binary_conv2d, BINARY, {"fetch": False}, {"prefetch": True, "fetch": False}),
    "weights of binary_conv2d": (binary_conv2d, BINARY, {"fetch": False}, {"fetch": True}),
    "float_conv2d": (float_conv2d, specs.FloatConv2d(specs.Window(8, 8, (1, 1)), 64, 64), {}, {"ahead": 8, "shared": False}),
    "float_dense": (float_dense, specs.FloatDense(64, 64), {}, {"ahead": 4096}),
    "pool2d": (pool2d, specs.Pool2d(specs.Window(8, 8, (2, 2), (2, 2)), 32, "max", specs.store()), {"ahead": 0}, {"ahead": 1}),
    "concat": (concat, specs.Concat(4, (8, 8), (32, 64)), {}, {"ahead": 4}),
}


@pytest.mark.skipif(ISA.machine != "x86_64", reason="instructions of x86")
@pytest.mark.parametrize("name", CASES)
def test_lines_are_asked_for(name):
    family, spec, without, with_requests = CASES[name]
    default, space = family.default_schedule(spec, ISA), family.space(spec, ISA)
    counts = []
    for changes in (without, with_requests):
        schedule = replace(default, **changes)
        assert schedule in space
        function = family.build(spec, schedule, ISA).with_attr("global_symbol", "kernel")
        code = tvm.compile(tvm.IRModule({"kernel": function}), target=tvm_target(ISA))
        counts.append(getattr(code, "mod", code).inspect_source("asm").count("\tprefetch"))
    assert counts[0] == 0 < counts[1]
