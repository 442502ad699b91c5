"""The instruction sets that kernel tests run on: this machine's, or with BNNTVM_TEST_TARGETS=aarch64,armv7 others under emulation."""

import os

import numpy as np
import tvm

from bnntvm.targets import registry, x86
from bnntvm.targets.isa import host_flags

from ..emulation.emulator import Program

_CHOSEN = [name for name in os.environ.get("BNNTVM_TEST_TARGETS", "").split(",") if name]
#: Best first.
LEVELS = [registry.resolve(name) for name in _CHOSEN] or [isa for isa in x86.LEVELS if isa.needs <= host_flags() and x86.permitted(isa)]


class _Native:
    def __init__(self, function, isa):
        target = tvm.target.Target({"kind": "llvm", "mcpu": isa.mcpu})
        self.library = tvm.compile(tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")}), target=target)

    @property
    def assembly(self):
        return self.library.mod.inspect_source("asm")

    def run(self, arrays):
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays]
        self.library["kernel"](*tensors)
        return [t.numpy() for t in tensors]


def program(function, isa):
    """A compiled PrimFunc, with ``assembly`` and ``run(arrays)``."""
    return (_Native if isa.machine == "x86_64" else Program)(function, isa)


def execute(compiled, arrays):
    """The arrays as the kernel leaves them."""
    return compiled.run(arrays)
