"""What measurements on a GPU need, made where TVM and a CUDA compiler are: ``python -m benchmarks.cuda_prepare FOLDER [sm_90a]``.

A device at hand for minutes only should not wait for compilers. The folder holds networks with their expected results, kernels with theirs,
kernels to time, loops that measure limits, and TVM's run time for the Python that is there (``--python 3.12``).
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import pathlib
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace

import numpy as np

from benchmarks.cuda_device import ROOT
from bnntvm import spec as sp

#: Networks whose results have to be equal bit by bit, and those that are timed.
EXACT = ("tests/cuda/data/exact_mlp.onnx", "tests/cuda/data/exact_resnet.onnx")
CLOSE = ("tutorials/data/digits_bnn.onnx",)
TIMED = ("birealnet18", "quicknet", "binary_densenet28", "reactnet_a")
#: Products of square matrices of bits, and 3x3 convolutions: (height, width, channels in, channels out, batch).
MATRICES = (4096, 8192, 16384)
CONVOLUTIONS = (
    (56, 56, 256, 256, 64),
    (56, 56, 64, 64, 64),
    (28, 28, 128, 128, 64),
    (14, 14, 256, 256, 64),
    (7, 7, 512, 512, 64),
    (14, 14, 512, 512, 64),
)
#: Batches with which other run times compute a network: those of PyTorch.
PEER_BATCHES = (256, 64, 1)
#: Scores of attention, (tokens, features) of a head, for so many heads of a batch.
ATTENTION, HEADS = ((197, 64), (512, 64), (512, 512)), 96
#: Layers of few tiles for one image, and their operations.
FEW_ROWS = (
    ("7x7x512x512", sp.BinaryConv2d(sp.Window(7, 7, (3, 3), (1, 1), (1, 1, 1, 1)), 512, 512, epilogue=sp.store("int32", "int32")),
     2 * 49 * 9 * 512**2),
    *((f"{n}x{m}", sp.BinaryDense(n, m, epilogue=sp.store("int32", "int32")), 2 * n * m) for n, m in ((4096, 1000), (25088, 512))),
)  # fmt: skip


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("target", nargs="?", default="sm_90a")
    parser.add_argument("--python", help="version of the Python on the device, such as 3.12; default: TVM is installed there")
    parser.add_argument("--networks", nargs="*", default=list(TIMED))
    parser.add_argument("--candidates", type=int, default=0, help="schedules of each kernel to build, to be measured there")
    parser.add_argument("--tune", nargs="*", default=["birealnet18"], help="networks whose kernels those are (default %(default)s)")
    parser.add_argument("--layers", nargs="*", default=[""], help="only kernels in whose name this occurs")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    from bnntvm.targets import registry

    isa = registry.resolve(options.target)
    for step in (_limits, _cases, _timed_kernels, _exact_networks, _timed_networks, _peers, _candidates, _run_time):
        print(step.__name__.strip("_"), flush=True)
        step(options, isa)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    (options.folder / "prepared.json").write_text(json.dumps(dict(target=isa.name, commit=commit)))
    size = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file())
    print(f"{options.folder}: {size / 2**20:.1f} MiB")
    return 0


def compile_kernels(functions, path, isa):
    """A library of PrimFuncs for a device; what their kernels use."""
    from bnntvm.cuda.backend import Cuda

    made = Cuda().link_kernels(functions, path, isa)
    return {name: vars(one) for compiled in made for name, one in compiled.usage.items()}


def _limits(options, isa):
    number = isa.mcpu.removeprefix("sm_")
    out, source = options.folder / "limit.cubin", pathlib.Path(__file__).with_name("cuda_limit.cu")
    subprocess.run(["nvcc", "-cubin", "-O3", f"-gencode=arch=compute_{number},code=sm_{number}", "-o", str(out), str(source)], check=True)


def _cases(options, isa):
    """Kernels with inputs and results."""
    from benchmarks.cuda_cases import cases
    from bnntvm.schedules import families
    from bnntvm.schedules.cuda import simt

    functions, arrays, index = {}, {}, []
    for case in cases(isa):
        function = families.of(case.spec, isa).build(case.spec, case.schedule, isa)
        functions[case.name] = function.with_attr("global_symbol", case.name)
        for kind, values in (("in", case.arrays), ("out", case.results)):
            arrays.update({f"{case.name}/{kind}/{i}": np.ascontiguousarray(array) for i, array in enumerate(values)})
        index.append(dict(name=case.name, inputs=len(case.arrays), outputs=len(case.results), workspace=simt.workspace(function),
                          tolerance=case.tolerance,
                          spec=str(case.spec), schedule=str(case.schedule)))  # fmt: skip
    usage = compile_kernels(functions, options.folder / "cases.so", isa)
    np.savez_compressed(options.folder / "cases.npz", **arrays)
    (options.folder / "cases.json").write_text(json.dumps(dict(cases=index, usage=usage)))


def timed(isa):
    """Kernels to time: ``(name, spec, shapes and types of parameters, operations)``; the first dimension of the data is the batch."""
    from benchmarks.cuda_cases import THRESHOLD, some
    from bnntvm.schedules import epilogue as tail
    from bnntvm.schedules import families
    from bnntvm.schedules.cuda import simt

    def entry(name, spec, batch, dims, channels, operations, weights=None, schedule=None):
        family = families.of(spec, isa)
        schedule = schedule or family.default_schedule(spec, isa)
        function = family.build(spec, schedule, isa).with_attr("global_symbol", name)
        params = [([batch if not hasattr(d, "value") else int(d) for d in b.shape], str(b.dtype)) for b in _buffers(function)]
        outputs = (len(spec.epilogue.outputs) if hasattr(spec, "epilogue") else 1) + bool(simt.workspace(function))
        return dict(name=name, params=params, operations=operations, schedule=str(schedule), outputs=outputs), function

    for size in MATRICES:
        for kind, epilogue in (("int32", sp.store("int32", "int32")), ("bits", THRESHOLD)):
            spec = sp.BinaryDense(size, size, epilogue=epilogue)
            yield entry(f"gemm_{size}_{kind}", spec, size, None, size, 2 * size**3)
        sign = sp.Epilogue((), (sp.Step("less", (0, 0.0), "bool"),), (sp.Output("bits", 1),))
        yield entry(f"pack_half_{size}", sp.Map(2, (1, 1), size, "float16", sign), size, None, size, 0)
    for engine in ("mma", "cores"):
        spec = sp.BinaryDense(4096, 4096, epilogue=sp.store("int32", "int32"))
        found = [s for s in families.of(spec, isa).space(spec, isa) if getattr(s, "engine", None) == engine]
        if found:
            yield entry(f"gemm_4096_{engine}", spec, 4096, None, 4096, 2 * 4096**3, schedule=found[0])
    for height, width, channels, outputs, batch in CONVOLUTIONS:
        window = sp.Window(height, width, (3, 3), (1, 1), (1, 1, 1, 1))
        operations = 2 * batch * height * width * channels * outputs * 9
        spec = sp.BinaryConv2d(window, channels, outputs, epilogue=THRESHOLD)
        yield entry(f"conv_{height}x{width}x{channels}x{outputs}_b{batch}", spec, batch, None, outputs, operations)
    for tokens, features in ATTENTION:
        for engine in ("mma", "cores"):
            spec = sp.BinaryMatmul(tokens, tokens, features, features // 32, scale=0.125, turned=True)
            found = [s for s in families.of(spec, isa).space(spec, isa) if s.engine == engine]
            name, operations = f"product_{tokens}x{tokens}x{features}_b{HEADS}_{engine}", 2 * HEADS * tokens**2 * features
            yield from (entry(name, spec, HEADS, None, tokens, operations, schedule=one) for one in found[:1])
    for name, spec, operations in FEW_ROWS:  # one image: with K in parts, in clusters and in memory, and whole
        chosen = families.of(spec, isa).default_schedule(spec, isa)
        whole = replace(chosen, split=1, in_memory=False)
        in_memory = [s for s in families.of(spec, isa).space(spec, isa) if s.in_memory and replace(s, split=1, in_memory=False) == whole]
        for schedule in dict.fromkeys((chosen, whole, *in_memory)):
            channels = getattr(spec, "out_channels", None) or spec.out_features
            way = f"split{schedule.split}" + "_in_memory" * schedule.in_memory
            yield entry(f"few_{name}_{way}", spec, 1, None, channels, operations, schedule=schedule)
    stem = sp.FloatConv2d(sp.Window(224, 224, (7, 7), (2, 2), (3, 3, 3, 3)), 3, 64, 1, sp.store(), True)
    point = sp.FloatConv2d(sp.Window(28, 28, (1, 1)), 128, 256, 1, sp.store())
    dense = sp.FloatDense(512, 1000, sp.store())
    floats = ("stem", stem, 112 * 112 * 147 * 64), ("pointwise", point, 28 * 28 * 128 * 256), ("classifier", dense, 512 * 1000)
    for name, spec, operations in floats:
        for number, schedule in enumerate(some(families.of(spec, isa).space(spec, isa))):  # every way; the default first
            way = f"_{number}" if number else ""
            channels = getattr(spec, "out_channels", None) or spec.out_features
            yield entry(f"{name}_b256{way}", spec, 256, None, channels, 2 * 256 * operations, schedule=schedule)
    assert tail


def _buffers(function):
    mapped = getattr(function, "buffer_map", None)
    return [mapped[p] for p in function.params] if mapped else list(function.params)


def _timed_kernels(options, isa):
    functions, index = {}, []
    for entry, function in timed(isa):
        functions[entry["name"]] = function
        index.append(entry)
    usage = compile_kernels(functions, options.folder / "timed.so", isa)
    (options.folder / "timed.json").write_text(json.dumps(dict(kernels=index, usage=usage)))


def _exact_networks(options, isa):
    from benchmarks.attention import Attention

    for number, path in enumerate((*EXACT, *CLOSE)):
        _network(options, pathlib.Path(path).stem, ROOT / path, number < len(EXACT), batches=(1, 4))
    _network(options, "exact_attention", Attention(12, 197, 64).model(), True, batches=(1,))


def _timed_networks(options, isa):
    from benchmarks import zoo

    for name in options.networks:
        _network(options, name, zoo.build(name), False, batches=(2,))


def _peers(options, _isa):
    """ONNX files in half precision for other run times (:mod:`benchmarks.cuda_peers`): what PyTorch is measured with."""
    from benchmarks import zoo

    models = [("birealnet18", half(zoo.build("birealnet18")), PEER_BATCHES, 0)]
    for height, width, channels, outputs, batch in CONVOLUTIONS:
        model = half(convolution(height, width, channels, outputs))
        models.append((f"conv_{height}x{width}x{channels}x{outputs}", model, (batch,), 2 * height * width * channels * outputs * 9))
    folder, index = options.folder / "peers", []
    folder.mkdir(exist_ok=True)
    for name, model, batches, operations in models:
        (folder / f"{name}.onnx.gz").write_bytes(gzip.compress(model.SerializeToString(), 6))
        index.append(dict(name=name, file=f"{name}.onnx.gz", batches=list(batches), operations=operations))
    (folder / "peers.json").write_text(json.dumps(index))


def half(model):
    """A model whose floats, inputs and results too, are float16."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(model, keep_io_types=False)


def convolution(height, width, channels, outputs):
    """A 3x3 convolution of signs, [N, C, H, W], as an ONNX model."""
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).choice(np.float32([-1, 1]), (outputs, channels, 3, 3))
    node = helper.make_node("Conv", ["input", "weights"], ["output"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    image, result = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", count, height, width])
                     for name, count in (("input", channels), ("output", outputs)))  # fmt: skip
    graph = helper.make_graph([node], "convolution", [image], [result], [numpy_helper.from_array(weights, "weights")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _network(options, name, model, exact, batches):
    """The artefact for the device, and what this processor computes for some inputs."""
    import bnntvm

    bnntvm.build(model, target=options.target).export(options.folder / f"{name}.bnn")
    here, arrays = bnntvm.build(model), {}
    for batch in batches:
        feed = here.random_feed(seed=batch, batch=batch)
        for kind, values in (("in", feed), ("out", here.run(feed))):
            arrays.update({f"{batch}/{kind}/{key}": value for key, value in values.items()})
    np.savez_compressed(options.folder / f"{name}.npz", **arrays)
    (options.folder / f"{name}.json").write_text(json.dumps(dict(exact=exact, batches=list(batches))))


def _candidates(options, isa):
    """Schedules to choose from: ``candidates/TASK`` has what the tuner's processes leave, and the schedules by number, the default is 0."""
    if not options.candidates:
        return
    from benchmarks import zoo
    from bnntvm.tuning import tasks

    found = {task.id: task for name in options.tune for task in tasks.extract(zoo.build(name), isa)}
    for task in found.values():
        if any(part in task.name for part in options.layers):
            _candidates_of(task, options.folder / "candidates" / task.id, options.candidates)


def _candidates_of(task, folder, count):
    from bnntvm.tuning import worker
    from bnntvm.tuning.gpu import BUILD_LIMIT, Gpu
    from bnntvm.tuning.measure import PREPARE_LIMIT
    from bnntvm.tuning.space import schedules

    chosen, built = spread(schedules(task, 1), count), {}
    if len(chosen) < 2:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.pickle").write_bytes(pickle.dumps(task, protocol=5))
    for number, schedule in enumerate(chosen):
        try:
            worker.build(str(folder), schedule, str(folder / f"{number}.so"), BUILD_LIMIT, PREPARE_LIMIT, Gpu.images)
            built[number] = schedule
        except worker.Failure as failure:
            print(f"  {task.name} {schedule}: {failure}", flush=True)
    (folder / "schedules.pickle").write_bytes(pickle.dumps(built, protocol=5))
    print(f"  {task.name}: {len(built)} of {len(chosen)} built", flush=True)


def spread(space, count):
    """At most ``count`` schedules: the default, then by turns one of each way through the code, at random."""
    from benchmarks.cuda_cases import way

    left, ways = list(space[1:]), {}
    random.Random(0).shuffle(left)
    for schedule in left:
        ways.setdefault(way(schedule), []).append(schedule)
    turns = itertools.chain(*itertools.zip_longest(*ways.values()))
    return [space[0], *itertools.islice((s for s in turns if s is not None), count - 1)]


def _run_time(options, isa):
    """TVM's run time, and ``tvm_ffi`` for another Python."""
    if not options.python:
        return
    from bnntvm import runtime

    source, target = pathlib.Path(runtime.runtime_library()).parent, options.folder / "lib"
    target.mkdir(exist_ok=True)
    for name in ("libtvm_runtime.so", "libtvm_runtime_cuda.so"):
        shutil.copy(source / name, target / name)
    import importlib.metadata

    version = importlib.metadata.version("apache-tvm-ffi")
    with tempfile.TemporaryDirectory() as folder:
        platforms = [
            f"--platform={p}" for p in ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64")
        ]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", f"--python-version={options.python}"]
        subprocess.run([*command, *platforms, "-d", folder, f"apache-tvm-ffi=={version}"], check=True)
        for wheel in pathlib.Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(options.folder / "site")
    # The run time finds its FFI beside it, or by the name under which Python's package has loaded it.
    for header in (options.folder / "site").glob("tvm_ffi/include"):
        shutil.rmtree(header)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
