"""Memory of a network: tensors that live at the same time never share a storage, and storages are large enough for every batch."""

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm_ffi import structural_visit

import bnntvm
from bnntvm.calls import kernel_calls
from bnntvm.cuda.backend import device_target, legalise, own_results
from bnntvm.cuda.plan import Bytes, allocates, plan
from bnntvm.graph import bindings, dims, op_name, operands
from bnntvm.schedules.cuda.fallback import ScheduleFallback, schedule
from bnntvm.spec import WORKSPACE
from bnntvm.targets import registry
from tests.cuda.network import DIGITS_LIKE, Network, long_layers

ISA = registry.resolve("sm_80")


def planned(mod):
    with device_target(ISA):
        mod = ScheduleFallback()(own_results(legalise(mod)))
        mod = tvm.transform.Sequential(
            [relax.transform.ToNonDataflow(), relax.transform.RemovePurityChecking(), relax.transform.CallTIRRewrite()]
        )(mod)
        return mod, *plan(mod)


def views(func):
    """Variable -> (number of its storage, its type)."""
    return {
        b.var: (int(b.value.args[0].name.removeprefix("storage_")), b.var.ty)
        for b in bindings(func)
        if op_name(b.value) == "relax.memory.view"
    }


def test_a_workspace_has_memory_for_any_batch():
    """It is planned as results are, and others may have its memory behind the kernel; bytes that a profile counts leave it out."""
    network = Network(long_layers(), "sm_80")
    _, mod, memory = planned(network.mod)
    (size,) = (int(f.attrs[WORKSPACE]) for f in network.kernels.values() if WORKSPACE in f.attrs)
    (number,) = (number for number, ty in views(mod["main"]).values() if str(ty.dtype) == "int32" and dims(ty) == (size,))
    assert memory.recordable and size >= 8 * 2 * 32 * 32
    assert all(max(one.at(batch) for one in memory.storages[number]) >= 4 * size for batch in (1, 64))
    (call, *_) = [call for call in kernel_calls(network.mod) if call["kernel"].startswith("binary_dense")]
    assert call["bytes_per_image"] == 0 and call["bytes"] + 1 < 4 * size + 16384 * 40 // 8


@pytest.mark.parametrize("path", [*DIGITS_LIKE, long_layers()], ids=[*(path.stem for path in DIGITS_LIKE), "long"])
def test_storages(path):
    _, mod, memory = planned(Network(path, "sm_80").mod)
    func, made = mod["main"], views(mod["main"])
    assert memory.recordable and made
    origin, last, first = {v: v for v in made}, {}, {}
    values = {b.var: b.value for b in bindings(func)}
    for number, binding in enumerate(bindings(func)):
        value = binding.value
        if isinstance(value, relax.TupleGetItem):
            value = values[value.tuple_value].fields[value.index]
        if isinstance(value, relax.Var) and value in origin or op_name(value) == "relax.reshape" and value.args[0] in origin:
            origin[binding.var] = origin[value if isinstance(value, relax.Var) else value.args[0]]
        for var in operands(binding.value):
            if var in origin and not isinstance(binding.value, relax.Tuple):
                last[origin[var]] = number
        if binding.var in made:
            first[binding.var] = number
    for a in made:
        for b in made:
            if a is not b and made[a][0] == made[b][0]:
                assert last[a] < first[b] or last[b] < first[a], f"{a} and {b} live in the same storage at the same time"
    for batch in (1, 2, 64):
        for number, ty in made.values():
            shape = [int(tvm.sym.Analyzer().simplify(_at(d, batch))) for d in ty.shape]
            size = int(np.prod(shape)) * np.dtype(str(ty.dtype)).itemsize
            assert size <= max(one.at(batch) for one in memory.storages[number])


def _at(extent, batch):
    analyzer, found = tvm.sym.Analyzer(), []
    structural_visit(extent, [(tvm.tirx.Var, lambda var, _visitor: found.append(var))])
    for var in found:
        analyzer.bind(var, tvm.tirx.IntImm("int64", batch))
    return analyzer.simplify(extent)


def test_sizes_are_linear():
    assert Bytes(4, 16).at(3) == 28


def main_of(build):
    builder = relax.BlockBuilder()
    n = tvm.tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType([n, 4], "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            made = build(builder, x)
            result = builder.emit_output(made if isinstance(made, relax.Tuple) else relax.Tuple([made]))
        builder.emit_func_output(result)
    return builder.finalize()


def test_results_that_nothing_computes_are_copied():
    def build(builder, x):
        y = builder.emit(relax.op.exp(x))
        return relax.Tuple([x, y, y, relax.const(np.ones((2, 2), np.float32))])

    _, mod, memory = planned(main_of(build))
    names = [b.value.op.name_hint for b in bindings(mod["main"]) if isinstance(b.value, relax.Call) and hasattr(b.value.op, "name_hint")]
    assert names.count("copy_float32") == 4 and memory.recordable
    assert [p.name for p in mod["main"].params[1:5]] == [f"result_{i}" for i in range(4)]


def test_a_reshaped_result_is_written_in_place():
    _, mod, _ = planned(main_of(lambda builder, x: builder.emit(relax.op.reshape(builder.emit(relax.op.exp(x)), [-1]))))
    names = [b.value.op.name_hint for b in bindings(mod["main"]) if isinstance(b.value, relax.Call) and hasattr(b.value.op, "name_hint")]
    assert names == ["tir_exp"]


@pytest.mark.parametrize("op", [relax.op.nn.softmax, relax.op.argmax, relax.op.std], ids=["softmax", "argmax", "std"])
def test_reductions_of_tvm_keep_nothing_in_memory(op):
    """One kernel computes an element with all that it needs."""
    mod = main_of(lambda builder, x: builder.emit(op(x)))
    with device_target(ISA):
        for _, func in legalise(mod).functions_items():
            assert not isinstance(func, tvm.tirx.PrimFunc) or not allocates(schedule(func))


def test_shapes_of_results_follow_the_batch():
    def build(builder, x):
        return relax.Tuple([builder.emit(relax.op.exp(x)), builder.emit(relax.op.reshape(builder.emit(relax.op.exp(x)), [-1, 2]))])

    _, _, memory = planned(main_of(build))
    assert memory.batch == (0, 0)
    assert [([one.at(5) for one in shape], kind) for shape, kind in memory.results] == [([5, 4], "float32"), ([10, 2], "float32")]


def test_two_dynamic_dimensions_are_refused():
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType([tvm.tirx.Var("n", "int64"), tvm.tirx.Var("width", "int64")], "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(relax.Tuple([builder.emit(relax.op.exp(x))]))
        builder.emit_func_output(result)
    with pytest.raises(bnntvm.UnsupportedError, match="one dynamic dimension at most"):
        planned(builder.finalize())
