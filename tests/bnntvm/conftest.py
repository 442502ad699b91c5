"""Small networks compiled by TVM alone: what the run-time half of the package needs, without the passes and the kernels."""

from dataclasses import dataclass

import numpy as np
import pytest

OFFSET = np.linspace(-1, 1, 3 * 8 * 8, dtype=np.float32).reshape(1, 3, 8, 8)

LAYERS = [
    {"node": "conv1", "output": "c1", "op": "Conv", "kind": "binary", "reason": "", "kernel": "binary_conv2d_0", "macs": 1_000_000}
    | {"weight_bytes": 1_000, "float_bytes": 32_000, "planes": "1x1"},
    {
        "node": "fc",
        "output": "y",
        "op": "Gemm",
        "kind": "float",
        "reason": "its weights take 300 levels",
        "kernel": "float_dense_0",
        "macs": 500,
    }
    | {"weight_bytes": 2_000, "float_bytes": 2_000, "planes": ""},
]


@dataclass(frozen=True)
class Built:
    """A compiled library, its manifest, and what it computes."""

    path: str
    manifest: dict
    reference: object


def manifest(inputs, outputs, **changes):
    """A manifest; ``inputs`` and ``outputs`` are (name, shape, dtype)."""
    entries = [[{"name": n, "shape": list(s), "dtype": d} for n, s, d in infos] for infos in (inputs, outputs)]
    plain = {"format": 1, "bnntvm": "0.1.0", "target": {"name": "x86-64-v2", "needs": []}, "inputs": entries[0], "outputs": entries[1]}
    plain |= {"overridable": {}, "layers": LAYERS, "constants_bytes": 3_000, "code_bytes": 20_000, "workspace_bytes": 4_096, "options": {}}
    return plain | changes


def parallel_relu():
    """TensorIR: y[i, j] = max(x[i, j], 0) for x of shape [n, 192], rows in parallel on TVM's threads."""
    from tvm import tirx

    n = tirx.Var("n", "int64")
    x, y = (tirx.decl_buffer((n, 192), "float32", name) for name in "xy")
    i, j = tirx.Var("i", "int64"), tirx.Var("j", "int64")
    zero = tirx.IntImm("int64", 0)
    store = tirx.BufferStore(y, tirx.max(tirx.BufferLoad(x, [i, j]), tirx.FloatImm("float32", 0.0)), [i, j])
    inner = tirx.For(j, zero, tirx.IntImm("int64", 192), tirx.ForKind.SERIAL, store)
    body = tirx.For(i, zero, n, tirx.ForKind.PARALLEL, inner)
    return tirx.PrimFunc([x, y], body).with_attr("global_symbol", "parallel_relu").with_attr("tirx.noalias", True)


def compile_library(function, params, path, prim_func=None):
    """Compile ``main(params) = function(block_builder, *params)`` to a shared library."""
    import tvm
    from tvm import relax

    builder = relax.BlockBuilder()
    kernel = builder.add_func(prim_func, "parallel_relu") if prim_func is not None else None
    with builder.function("main", params):
        with builder.dataflow():
            results = function(builder, kernel, *params)
            out = builder.emit_output(relax.Tuple(results))
        builder.emit_func_output(out)
    # TVM's own pipeline without RewriteDataflowReshape, which takes every PrimFunc for one of blocks.
    steps = "LegalizeOps ToNonDataflow RemovePurityChecking CallTIRRewrite StaticPlanBlockMemory LowerAllocTensor KillAfterLastUse"
    steps += " LowerRuntimeBuiltin ComputePrimValue VMShapeLower AttachGlobalSymbol"
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v2"})
    with target:
        lowered = tvm.transform.Sequential([getattr(relax.transform, step)() for step in steps.split()])(builder.get())
        relax.build(lowered, target=target, relax_pipeline=None).export_library(str(path))
    return str(path)


def _batch(name="N"):
    import tvm

    return tvm.tirx.Var(name, "int64")


@pytest.fixture(scope="session")
def one_input(tmp_path_factory):
    """x float32[N, 3, 8, 8] -> y = relu(x + OFFSET), s = sum of y per image, declared float16."""
    from tvm import relax

    def network(builder, kernel, x):
        n = x.ty.shape[0]
        shifted = builder.emit(relax.op.reshape(relax.op.add(x, relax.const(OFFSET)), (n, 192)))
        rows = builder.emit(relax.call_tir(kernel, [shifted], relax.TensorType((n, 192), "float32")))
        images = builder.emit(relax.op.reshape(rows, (n, 3, 8, 8)))
        return [images, builder.emit(relax.op.sum(images, axis=[1, 2, 3]))]

    x = relax.Var("x", relax.TensorType((_batch(), 3, 8, 8), "float32"))
    path = compile_library(network, [x], tmp_path_factory.mktemp("one") / "one.so", parallel_relu())
    infos = manifest([("x", ("N", 3, 8, 8), "float32")], [("y", ("N", 3, 8, 8), "float32"), ("s", ("N",), "float16")])
    return Built(path, infos, lambda x: np.maximum(x + OFFSET, 0))


@pytest.fixture(scope="session")
def two_inputs(tmp_path_factory):
    """a float32[N, 4] (declared float16), b int64[N, 4] -> a + float(b)."""
    from tvm import relax

    def network(builder, _kernel, a, b):
        return [builder.emit(relax.op.add(a, relax.op.astype(b, "float32")))]

    n = _batch()
    params = [relax.Var("a", relax.TensorType((n, 4), "float32")), relax.Var("b", relax.TensorType((n, 4), "int64"))]
    path = compile_library(network, params, tmp_path_factory.mktemp("two") / "two.so")
    infos = manifest([("a", ("N", 4), "float16"), ("b", ("N", 4), "int64")], [("sum", ("N", 4), "float32")])
    return Built(path, infos, lambda a, b: a.astype(np.float32) + b.astype(np.float32))


@pytest.fixture
def module(one_input):
    from bnntvm.module import Module

    return Module.from_library(one_input.path, one_input.manifest, threads=1)


@pytest.fixture
def images():
    return np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)
