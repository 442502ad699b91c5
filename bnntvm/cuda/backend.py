"""Compiling a network for a GPU: what :mod:`bnntvm.build` does otherwise for a processor.

The host's part (shapes, launches) is machine code of this processor; kernels are compiled for the one architecture that was asked for. All
tensors and constants are on the device.
"""

from __future__ import annotations

import platform

import tvm
from tvm import relax
from tvm.ir.expr import GenericConst

from bnntvm.calls import kernel_calls
from bnntvm.cuda import packing, toolchain
from bnntvm.cuda.plan import plan
from bnntvm.errors import TargetError
from bnntvm.graph import Rewriter, bindings, dims, dtype
from bnntvm.linker import link
from bnntvm.schedules.cuda import copy, finite
from bnntvm.schedules.cuda import pipeline as tir_pipeline
from bnntvm.schedules.cuda.fallback import ScheduleFallback
from bnntvm.targets import registry

#: Instruction-set level of the host's code, by ``platform.machine()``.
_HOSTS = {"x86_64": "x86-64-v2", "aarch64": "aarch64", "arm64": "aarch64"}
#: The driver's version that machine code of CUDA 13 needs, by what ``cudaDriverGetVersion`` says.
LEAST_DRIVER = 13000


def host_isa():
    """The processor that starts kernels: any of this machine's architecture."""
    level = registry.resolve(_HOSTS.get(platform.machine()))
    if level is None:
        raise TargetError(f"networks for GPUs are not built on {platform.machine()}", hint="build on x86-64 or 64-bit ARM")
    return level


def device_target(isa):
    """TVM's target of a device."""
    host = host_isa()
    options = {"kind": "llvm", "mtriple": host.triple, "mcpu": host.mcpu}
    return tvm.target.Target({"kind": "cuda", "arch": isa.mcpu}, host=options)


class Cuda:
    """The back end of GPUs; see ``bnntvm.build.Processor`` for what its functions are for."""

    def checked(self, mod, kernels, isa):
        """The check for NaN and infinity is a kernel of its own, which the run time calls: no other entry point."""
        return mod, [dtype(p) == "float32" for p in mod["main"].params]

    def compile(self, mod, isa):
        from bnntvm.build import Compiled, constants_bytes, fresh_outputs, lower_memory

        target = device_target(isa)
        with target:
            mod = ScheduleFallback()(own_results(legalise(mod)))
            inputs, results = len(mod["main"].params), len(fresh_outputs(mod["main"]))
            calls, constants = kernel_calls(mod), constants_bytes(mod)
            mod = tvm.transform.Sequential(
                [relax.transform.ToNonDataflow(), relax.transform.RemovePurityChecking(), relax.transform.CallTIRRewrite()]
            )(mod)
            mod, memory = plan(mod)
            mod = lower_memory(mod)
            mod[finite.NAME] = finite.build(isa).with_attr("global_symbol", finite.NAME)
            with packing.source_kept():
                executable = relax.build(mod, target=target, relax_pipeline=None, tir_pipeline=tir_pipeline.NAME)
        compiled = Compiled(executable, ["main"], calls, memory.storage_bytes(1), constants, [True] * results, [True] * inputs)
        compiled.memory, compiled.device_code = memory, []
        return compiled

    def link(self, compiled, path, isa):
        def compile_one(source):
            compiled.device_code.append(toolchain.compile_source(source, isa.mcpu))
            return compiled.device_code[-1].cubin

        link(compiled.executable, path, host_isa(), fpack_imports=packing.packer(compile_one))

    def link_kernels(self, functions, path, isa):
        """Write a library of single kernels, ``functions`` by name; the code of each translation unit."""
        made = []

        def compile_one(source):
            made.append(toolchain.compile_source(source, isa.mcpu))
            return made[-1].cubin

        with packing.source_kept():
            executable = tvm.compile(tvm.IRModule(functions), target=device_target(isa), tir_pipeline=tir_pipeline.NAME)
        link(executable, path, host_isa(), fpack_imports=packing.packer(compile_one))
        return made

    def target_facts(self, isa):
        """What the manifest's target says of the device."""
        return dict(machine="cuda", arch=isa.mcpu, least_driver=LEAST_DRIVER, needs=sorted(host_isa().needs))

    def facts(self, compiled):
        """What else the run time has to know."""
        memory = compiled.memory
        device = dict(
            storages=[[[one.per_image, one.fixed] for one in storage] for storage in memory.storages], recordable=memory.recordable,
            results=[[[[one.per_image, one.fixed] for one in shape], kind] for shape, kind in memory.results], batch=memory.batch,
        )  # fmt: skip
        return dict(device=device, device_code_bytes=sum(len(one.cubin) for one in compiled.device_code))


def legalise(mod):
    """Kernels of TVM's, without threads yet, for what no family takes; to be called within the target."""
    return relax.transform.DeadCodeElimination()(relax.transform.LegalizeOps(skip_ops=["relax.reshape"])(mod))


def own_results(mod):
    """Copy results that are an input, a constant or another result: each is written into memory of its own.

    A result that is a reshaped kernel's result is not copied.
    """
    from bnntvm.build import fresh_outputs

    fresh = fresh_outputs(mod["main"])
    return mod if all(fresh) else _Copies(fresh).run(mod)


class _Copies(Rewriter):
    def __init__(self, fresh):
        self.fresh = fresh

    def finish(self, body):
        values = {binding.var: binding.value for binding in bindings(self.func)}
        while isinstance(values.get(body), (relax.Var, relax.Tuple)):
            body = values[body]
        fields = [self.substitute(field) for field in (body.fields if isinstance(body, relax.Tuple) else [body])]
        fields = [field if own else self._copy(field) for own, field in zip(self.fresh, fields)]
        return relax.Tuple(fields) if isinstance(body, relax.Tuple) else fields[0]

    def _copy(self, value):
        shape, kind = dims(value), dtype(value)
        count = tvm.tirx.IntImm("int64", 1)
        for extent in shape:
            count = count * extent
        count = tvm.sym.Analyzer().simplify(count)
        gvar = self.builder.add_func(copy.build(kind).without_attr("global_symbol").with_attr("bnn.kernel", f"copy_{kind}"), f"copy_{kind}")
        value = value if not isinstance(value, GenericConst) else self.builder.emit(value)
        flat = self.emit(relax.op.reshape(value, [count]))
        made = self.emit(relax.call_tir(gvar, relax.Tuple([flat]), relax.TensorType([count], kind)))
        return self.emit(relax.op.reshape(made, list(shape)))
