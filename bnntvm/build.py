"""``bnntvm.build``: from an ONNX file to a module that runs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import pathlib
import shutil
import tempfile

import numpy as np
import tvm
from tvm import relax
from tvm.ir.expr import GenericConst, TensorLoad
from tvm_ffi import structural_visit

import bnntvm
from bnntvm import checked, direct, runtime
from bnntvm.calls import kernel_calls
from bnntvm.errors import BnnError, TargetError, ToolchainError, UnsupportedError
from bnntvm.graph import bindings, dims, op_name, operands
from bnntvm.importer import import_model
from bnntvm.linker import code_bytes, link
from bnntvm.lower import Lower
from bnntvm.module import Module
from bnntvm.passes.binarise import Decision
from bnntvm.passes.float_layers import FloatLayers
from bnntvm.pipeline import optimise
from bnntvm.schedules import finite
from bnntvm.schedules.fallback import ScheduleFallback
from bnntvm.targets import registry
from bnntvm.tuning.workload import chooser


def build(model, target="x86", *, assume_nonzero=False, weight_tolerance=0.0, threads=None, tuning=None, verify=False):
    """Compile an ONNX network.

    Parameters
    ----------
    model : str, path, bytes or onnx.ModelProto
    target : str, dict or tvm.target.Target
        "x86" (this machine), a level such as "x86-64-v3" or "aarch64", a processor name of LLVM's, "cuda" (this machine's first GPU),
        an architecture such as "sm_80", or a TVM target of kind llvm or cuda.
    assume_nonzero : bool
        Take Sign's result for +1 where its argument is exactly 0 although that can happen. Faster, not exact; the report says so.
    weight_tolerance : float
        Relative spread of |w| within an output channel that still counts as binary. 0 keeps the network exactly as it is.
    threads : int, optional
        Threads the module runs with; default: environment BNNTVM_NUM_THREADS, else all cores.
    tuning : str, path, list of those, function or False, optional
        Folders of records that :func:`bnntvm.tune` wrote; layers that they do not know use the records that are part of the package, or
        their default schedules. False: default schedules everywhere. A function chooses itself: it is called with a kernel family, a
        specification, an instruction-set level and the shape of the first operand, and returns a schedule of the family's space.
    verify : bool
        Evaluate the network in numpy before and after every pass, and compare the machine code with that: slow, for finding bugs. A pass
        that changes a result is a BnnError that names it.

    Returns
    -------
    Module

    Raises
    ------
    BnnError
        ModelError, UnsupportedError, TargetError or ToolchainError: what, where, why, and what to do.
    """
    isa = _resolve(target)
    backend, tolerance = backend_of(isa), _tolerance(weight_tolerance)
    threads = runtime.choose_threads(threads)
    imported = import_model(model)
    verifier = _verifier(imported, exact_inputs=not assume_nonzero) if verify else None
    try:
        decisions = {}
        mod = optimise(imported.mod, decisions, verifier, assume_nonzero=bool(assume_nonzero), weight_tolerance=tolerance)
        lower = Lower(isa, chooser(tuning, threads))
        mod, checked_inputs = backend.checked(FloatLayers()(lower.run(mod)), lower.lowered.kernels, isa)
        compiled = backend.compile(mod, isa)
    except BnnError:
        raise
    except Exception as error:
        raise UnsupportedError(
            "the network could not be compiled", why=_last_line(error), hint="this is a gap in bnntvm: please report it with the model"
        ) from error
    options = dict(assume_nonzero=bool(assume_nonzero), weight_tolerance=tolerance)
    with _workspace(compiled) as folder:
        library = pathlib.Path(folder, "network.so")
        backend.link(compiled, library, isa)
        manifest = _manifest(imported, isa, decisions, lower.lowered, compiled, library, options) | {"checked_inputs": checked_inputs}
        manifest["target"] |= backend.target_facts(isa)
        manifest |= backend.facts(compiled)
        module = Module.from_library(library, manifest, threads=threads)
    if verifier is not None:
        with contextlib.suppress(TargetError):  # built for another machine: its code is not run
            verifier.compiled(module)
    return module


def _verifier(imported, exact_inputs):
    from bnntvm.verify import Verifier

    return Verifier(imported, exact_inputs=exact_inputs)


def _resolve(target):
    if isinstance(target, tvm.target.Target):
        target = target.export()
    isa = registry.resolve(dict(target) if hasattr(target, "items") else target)
    if isa is None:
        raise TargetError(
            f"unknown target {target!r}",
            hint="use 'x86' for this machine, one of " + ", ".join(registry.names()) + ", sm_100 or newer, or a processor name of LLVM's",
        )
    if isa.machine == "cuda":
        from bnntvm.cuda.toolchain import check_arch

        check_arch(isa.mcpu)
    return isa


def _tolerance(value):
    try:
        value = float(value)
    except (TypeError, ValueError):
        value = -1.0
    if not 0 <= value < 1:
        raise BnnError(
            "weight_tolerance must be a number from 0 to below 1", hint="it is the relative spread of |w| within an output channel"
        )
    return value


def _last_line(error):
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


class Compiled:
    """A Relax executable and what its memory plan says."""

    def __init__(self, executable, entries, calls, workspace_bytes, constants_bytes, fresh_outputs, unaligned_inputs, straight=None):
        self.entries, self.calls, self.direct = entries, calls, straight or direct.Direct()
        self.executable, self.workspace_bytes, self.constants_bytes = executable, workspace_bytes, constants_bytes
        self.fresh_outputs, self.unaligned_inputs = fresh_outputs, unaligned_inputs


def backend_of(isa):
    """What compiles for an instruction-set level: a processor's code is LLVM's, a GPU's goes through CUDA C++."""
    if isa.machine == "cuda":
        from bnntvm.cuda.backend import Cuda

        return Cuda()
    return Processor()


class Processor:
    """How code for a processor is made. Another machine has a class with the same functions."""

    def checked(self, mod, kernels, isa):
        """``(mod, inputs)``: entry points that notice NaN and infinity, and which inputs are looked at."""
        return checked.add_checked(mod, kernels, isa)

    def compile(self, mod, isa):
        """The :class:`Compiled` network of a module of generated kernels."""
        return compile_module(mod, isa)

    def link(self, compiled, path, isa):
        """Write the library."""
        link(compiled.executable, path, isa)

    def link_kernels(self, functions, path, isa):
        """Write a library of single kernels, ``functions`` by name."""
        link(tvm.compile(tvm.IRModule(functions), target=tvm_target(isa)), path, isa)

    def target_facts(self, isa):
        """What the manifest says of the target beside its name, machine and flags."""
        return {}

    def facts(self, compiled):
        """What the run time has to know beside what it knows of every network."""
        return {}


def tvm_target(isa):
    """The LLVM target of an instruction-set level, or TVM's of a device."""
    if isa.machine == "cuda":
        from bnntvm.cuda.backend import device_target

        return device_target(isa)
    options = {"kind": "llvm", "mtriple": isa.triple, "mcpu": isa.mcpu}
    features = ["-prefer-256-bit"] if isa.lanes == 16 else list(isa.features)
    if features:
        options["mattr"] = features
    if isa.machine == "arm":
        options["mfloat-abi"] = "hard"
    return tvm.target.Target(options)


def compile_module(mod, isa):
    """Lower a module of generated kernels and leftover Relax operators to machine code."""
    target = tvm_target(isa)
    with target:
        mod = specialise_batch(legalise(mod))
        entries = [name for name in ("main", "main_1") if name in [gv.name_hint for gv in mod.get_global_vars()]]
        calls = kernel_calls(mod)
        constants, fresh, unaligned = constants_bytes(mod), fresh_outputs(mod["main"]), unaligned_inputs(mod)
        mod = tvm.transform.Sequential(
            [
                relax.transform.ToNonDataflow(),
                relax.transform.RemovePurityChecking(),
                relax.transform.CallTIRRewrite(),
                relax.transform.StaticPlanBlockMemory(),
            ]
        )(mod)
        workspace = workspace_bytes(mod)
        straight = direct.add(mod)
        mod = lower_memory(mod)
        mod[finite.NAME] = finite.build(isa)
        executable = relax.build(restricted(mod), target=target, relax_pipeline=None)
    workspace = straight.workspace_bytes if straight.entries else workspace
    return Compiled(executable, entries, calls, workspace, constants, fresh, unaligned, straight)


def legalise(mod):
    """Give every operator that is left a kernel of TVM's; to be called within the target."""
    # A reshape stays one: the virtual machine gives the same memory another shape.
    mod = relax.transform.LegalizeOps(skip_ops=["relax.reshape"])(mod)
    return ScheduleFallback()(relax.transform.DeadCodeElimination()(mod))


def restricted(mod):
    """Say of every function that its buffers do not overlap, as kernels say it and the functions of VMShapeLower, with one buffer, do not.

    TVM takes what the function that it declares last says for all of a module (``is_restricted_`` in ``codegen_llvm.cc``). Where that is
    nothing, LLVM reads the parameters of an epilogue again for every pixel: 1x1 layers of ReActNet took 30 % longer.
    """
    for gvar, func in mod.functions_items():
        if isinstance(func, tvm.tirx.PrimFunc):
            mod[gvar] = func.with_attr("tirx.noalias", True)
    return mod


def lower_memory(mod):
    """What is left once memory is planned: allocations, sizes and calls become the virtual machine's."""
    lowered = tvm.transform.Sequential(
        [
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )(mod)
    return order_shape_stores(lowered)


def order_shape_stores(mod):
    """Store computed sizes by slot: VMShapeLower goes through a hash table of addresses, and every process would make other code of it."""
    for gvar, func in mod.functions_items():
        if isinstance(func, tvm.tirx.PrimFunc) and gvar.name_hint.startswith("shape_func") and isinstance(func.body, tvm.tirx.SeqStmt):
            stores = list(func.body.seq)
            if all(isinstance(store, tvm.tirx.BufferStore) for store in stores) and not _slots_read(stores) & set(map(_slot, stores)):
                mod[gvar] = func.with_body(tvm.tirx.SeqStmt(sorted(stores, key=_slot)))
    return mod


def _slot(access):
    return int(access.indices[0])


def _slots_read(stores):
    found = set()
    for store in stores:
        structural_visit(store.value, [(TensorLoad, lambda load, _visitor: found.add(_slot(load)))])
    return found


def fresh_outputs(main):
    """For each result of ``main``: whether a kernel computes it into memory that no other result, input or constant shares."""
    values = {binding.var: binding.value for binding in bindings(main)}

    def origin(expr):
        """The variable whose memory an expression is."""
        while True:
            value = values.get(expr) if isinstance(expr, relax.Var) else expr
            if isinstance(value, relax.Var):
                expr = value
            elif op_name(value) == "relax.reshape":
                expr = value.args[0]
            else:
                return expr

    result = main.body.body
    while isinstance(result, relax.Var):
        result = values[result]
    origins = [origin(field) for field in result.fields]
    made = [isinstance(o, relax.Var) and _is_kernel(values.get(o), values) for o in origins]
    return [new and sum(o == other for other in origins) == 1 for new, o in zip(made, origins)]


def unaligned_inputs(mod):
    """For each parameter of ``main``: whether it may lie at any address that suits its elements.

    That is so where only kernels of ours read it: TVM's own take every buffer for aligned to 64 bytes.
    """
    main = mod["main"]
    origin, spoilt = {p: p for p in main.params}, set()
    for binding in bindings(main):
        value, read = binding.value, [origin[a] for a in operands(binding.value) if a in origin]
        if not read:
            continue
        if isinstance(value, relax.Var) or op_name(value) == "relax.reshape":
            origin[binding.var] = read[0]
        elif not (op_name(value) == "relax.call_tir" and "bnn.kernel" in (mod[value.args[0]].attrs or {})):
            spoilt.update(read)
    return [p not in spoilt for p in main.params]


def _is_kernel(value, values):
    if isinstance(value, relax.TupleGetItem):
        return op_name(values.get(value.tuple_value)) == "relax.call_tir"
    return op_name(value) == "relax.call_tir"


def specialise_batch(mod):
    """Add ``main_1``, ``main`` for a batch of one: its memory can be planned at compile time. Kernels are shared.

    ``main_checked`` likewise.
    """
    out = mod
    for name in ("main", checked.NAME):
        if name in [gv.name_hint for gv in mod.get_global_vars()]:
            out = _with_batch_of_one(out, name)
    return out


def _with_batch_of_one(mod, name):
    dynamic = {d for p in mod[name].params for d in dims(p) if isinstance(d, tvm.tirx.Var)}
    if len(dynamic) != 1:
        return mod
    dimension = dynamic.pop().name
    one = relax.transform.BindSymbolicVars({dimension: 1}, name)(tvm.IRModule({gv: f for gv, f in mod.functions_items()}))[name]
    out = tvm.IRModule({gv: f for gv, f in mod.functions_items()})
    out[tvm.ir.GlobalVar(f"{name}_1")] = relax.utils.copy_with_new_vars(one.with_attr("global_symbol", f"{name}_1"))
    return out


def constants_bytes(mod):
    """Bytes of the distinct constants of a module."""
    sizes = {}

    def note(expr):
        if isinstance(expr, GenericConst):
            array = expr.value.numpy()
            sizes[hashlib.sha256(array.tobytes() + str(array.dtype).encode()).digest()] = array.nbytes

    for _, func in mod.functions_items():
        if isinstance(func, relax.Function):
            relax.analysis.post_order_visit(func, note)
    return sum(sizes.values())


def workspace_bytes(mod):
    """Bytes of the planned storage of the statically shaped entry point."""
    func = mod["main_1"] if "main_1" in [gv.name_hint for gv in mod.get_global_vars()] else mod["main"]
    total = 0
    for binding in bindings(func):
        call = binding.value
        if isinstance(call, relax.Call) and getattr(call.op, "name", "") == "relax.memory.alloc_storage":
            total += int(np.prod([int(d) for d in call.args[0].values]))
        elif isinstance(call, relax.Call) and getattr(call.op, "name", "") == "relax.builtin.alloc_tensor":
            shape = call.args[0].values
            if all(isinstance(d, (int, tvm.tirx.IntImm)) for d in shape):
                total += int(np.prod([int(d) for d in shape])) * 4
    return total


def _workspace(compiled):
    """A temporary folder with room for the object files and the library: LLVM ends the process where a disk is full."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="bnntvm-")
    except OSError as error:
        raise ToolchainError(
            "no folder for temporary files", why=error.strerror or str(error), hint="point TMPDIR at a folder that can be written"
        ) from error
    free, needed = shutil.disk_usage(folder.name).free, 3 * compiled.constants_bytes + (8 << 20)
    if free < needed:
        where = tempfile.gettempdir()
        folder.cleanup()
        raise ToolchainError(
            "too little room for temporary files", where=where, why=f"{free >> 10} kB are free, {needed >> 10} kB may be needed",
            hint="make room, or point TMPDIR at another folder",
        )  # fmt: skip
    return folder


def _manifest(imported, isa, decisions, lowered, compiled, library, options):
    overridable = {
        name: dict(
            shape=list(array.shape), dtype=str(array.dtype), sha256=hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        )
        for name, array in imported.overridable.items()
    }
    return dict(
        format=1, bnntvm=bnntvm.__version__, target=dict(name=isa.name, needs=sorted(isa.needs), machine=isa.machine),
        inputs=[dict(name=i.name, shape=list(i.shape), dtype=i.dtype) for i in imported.inputs],
        outputs=[dict(name=o.name, shape=list(o.shape), dtype=o.dtype) for o in imported.outputs],
        entries=compiled.entries, calls=compiled.calls, direct=dataclasses.asdict(compiled.direct),
        fresh_outputs=compiled.fresh_outputs, unaligned_inputs=compiled.unaligned_inputs, overridable=overridable,
        layers=[_layer(info, decisions, lowered) for info in imported.layers],
        constants_bytes=compiled.constants_bytes, code_bytes=code_bytes(library), workspace_bytes=compiled.workspace_bytes, options=options,
    )  # fmt: skip


def _layer(info, decisions, lowered):
    decision = decisions.get(info.output, Decision("float", "its result is a constant" if info.folded else "no kernel takes it"))
    kernel, stored = lowered.layers.get(info.output, ("", info.float_bytes))
    kind = "int8" if decision.kind == "bitserial" and kernel.startswith("int8_") else decision.kind
    return dict(
        node=info.node, output=info.output, op=info.op_type, kind=kind, reason=decision.reason, kernel=kernel, macs=int(info.macs),
        weight_bytes=int(stored), float_bytes=int(info.float_bytes), planes=decision.planes,
    )  # fmt: skip
