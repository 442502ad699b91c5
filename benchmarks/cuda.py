"""Tests and measurements on a GPU: ``python -m benchmarks.cuda FOLDER [--out OUT] [--minutes 9] [--only STEP ...]``.

``FOLDER`` is what :mod:`benchmarks.cuda_prepare` made. Each step is a process of its own with a time limit; what it finds is appended to
``OUT/results.jsonl`` at once, and a step that fails, hangs or takes the device down does not stop the next. The most important come first.
At the end (and with ``--report`` alone) ``OUT/cuda.md`` says what came out.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks import cuda_device
from benchmarks.cuda_device import ROOT

#: Step -> seconds it may take. In the order in which they run.
STEPS = {
    "machine": 40, "cases": 60, "exact": 45, "run_time": 60, "limit": 30, "matrices": 45, "convolutions": 60, "networks": 90, "kernels": 45,
    "candidates": 120,
    "torch_convolutions": 60, "torch_network": 150, "memcheck": 90, "racecheck": 120, "synccheck": 90,
    "ort_cuda": 120, "tensorrt": 180, "ort_tensorrt": 180,
}  # fmt: skip


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    parser.add_argument("--minutes", type=float, default=9.0, help="stop starting steps after this time")
    parser.add_argument("--only", nargs="*", choices=list(STEPS), help="these steps")
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--step", choices=[*STEPS, "sanitized"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.step:
        cuda_device.set_up(options.folder)
        globals()[f"step_{options.step}"](options.folder, Writer(options.out, options.step))
        return 0
    if not options.report:
        _all_steps(options)
    write_report(options.out)
    return 0


class Writer:
    """Appends facts to the results, and prints them."""

    def __init__(self, out, step):
        self.path, self.step = out / "results.jsonl", step

    def __call__(self, name, **facts):
        with self.path.open("a") as file:
            file.write(json.dumps(dict(step=self.step, name=name, **facts)) + "\n")
        print(f"  {name}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()), flush=True)


def _all_steps(options):
    (options.out / "results.jsonl").write_text("")
    end = time.monotonic() + 60 * options.minutes
    for step in options.only or STEPS:
        left = end - time.monotonic()
        if left < 10:
            Writer(options.out, step)("not run", why="no time was left")
            continue
        print(f"== {step}", flush=True)
        begun = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.cuda", str(options.folder), "--out", str(options.out), "--step", step]
        status, log = _limited(command, min(STEPS[step], left))
        if status is None:
            Writer(options.out, step)("failed", why=f"it took longer than {min(STEPS[step], left):.0f} s")
        elif status:
            Writer(options.out, step)("failed", why=" | ".join(log.strip().splitlines()[-3:])[-600:], status=status)
        print(f"   {time.monotonic() - begun:.1f} s", flush=True)


def _limited(command, seconds):
    """Run a command, its output being shown; ``(status, what it wrote to standard error)``, None if it was ended, with all it started."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stderr=log, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
        log.seek(0)
        return status, log.read()


# Is it right ----------------------------------------------------------------------------------------------------------------------------


def step_machine(folder, write):
    """The device, its driver and clocks; how fast it copies."""
    write("device", **cuda_device.facts(), date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))
    write("prepared", **json.loads((folder / "prepared.json").read_text()))
    device = cuda_device.Device()
    major, minor = device.driver.capability(0)
    write(
        "versions",
        driver_serves=device.driver.version(),
        capability=f"{major}.{minor}",
        python=sys.version.split()[0],
        numpy=np.__version__,
    )
    size = 1 << 30
    a, b = device.empty((size,), "uint8", 0), device.empty((size,), "uint8", 0)
    ms = device.milliseconds(lambda: device.driver.copy(a.data_ptr(), b.data_ptr(), size, device.stream))
    write("copy", tb_per_s=2 * size / ms / 1e9)


def step_cases(folder, write, only=None):
    """Every kernel family on small inputs, beside what numpy says."""
    index, arrays = json.loads((folder / "cases.json").read_text())["cases"], np.load(folder / "cases.npz")
    device = cuda_device.Device()
    function, wrong = device.library(folder / "cases.so"), []
    for case in index:
        name = case["name"]
        inputs = [device.upload(arrays[f"{name}/in/{i}"]) for i in range(case["inputs"])]
        expected = [arrays[f"{name}/out/{i}"] for i in range(case["outputs"])]
        outputs = [device.upload(np.full(one.shape, 77, one.dtype)) for one in expected]
        workspace = [device.upload(np.full(own[0], 77, own[1]))] if (own := case["workspace"]) else []
        device.call(function(name), *inputs, *outputs, *workspace)
        for number, (tensor, want) in enumerate(zip(outputs, expected)):
            got = device.download(tensor)
            good = np.allclose(got, want, rtol=case["tolerance"]) if case["tolerance"] else np.array_equal(got, want)
            if not good:
                share = float(np.mean(got != want))
                wrong.append(name)
                write("WRONG", case=name, output=number, share=share, schedule=case["schedule"])
    write("kernels", right=len(index) - len(set(wrong)), of=len(index))


def step_sanitized(folder, write):
    """The same without looking at the results, below compute-sanitizer."""
    step_cases(folder, write)


def step_exact(folder, write):
    """Networks beside this project's results on x86, several runs each: the second is recorded, the third replayed."""
    import bnntvm

    for path in sorted(folder.glob("*.bnn")):
        facts, arrays = json.loads(path.with_suffix(".json").read_text()), np.load(path.with_suffix(".npz"))
        module = bnntvm.load(path)
        for batch in facts["batches"]:
            feed, want = (
                {key.split("/", 2)[2]: arrays[key] for key in arrays if key.startswith(f"{batch}/{kind}/")} for kind in ("in", "out")
            )
            runs = [module.run(feed) for _ in range(4)]
            same = all(np.array_equal(run[key], runs[0][key]) for run in runs for key in want)
            equal = all(np.array_equal(runs[0][key], want[key]) for key in want)
            most = max(float(np.abs(runs[0][key].astype(np.float64) - want[key]).max()) for key in want)
            scale = max(float(np.abs(want[key]).max()) for key in want)
            recorded = module._idle[0].not_recorded
            write(path.stem, batch=batch, bitwise=equal, wanted_bitwise=facts["exact"], off=most, largest=scale, runs_agree=same,
                  graph="recorded" if recorded is None else recorded)  # fmt: skip


def step_run_time(folder, write):
    """DLPack with PyTorch and CuPy where they are, threads, NaN, results that are used while the next run goes on."""
    import threading

    import bnntvm

    module = bnntvm.load(folder / "digits_bnn.bnn")
    arrays = np.load(folder / "digits_bnn.npz")
    image, want = arrays["4/in/image"], module.run({"image": arrays["4/in/image"]})
    (name, expected), *_ = want.items()
    broken = image.copy()
    broken.reshape(-1)[5] = np.nan
    try:
        module.run({"image": broken})
        write("NaN", noticed=False)
    except bnntvm.InputError as error:
        write("NaN", noticed=True, says=str(error).splitlines()[0])
    write("after NaN", right=bool(np.array_equal(module.run({"image": image})[name], expected)))
    results = {}

    def work(number):
        results[number] = [module.run({"image": image})[name] for _ in range(50)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    write("threads", right=len(results) == 4 and all(np.array_equal(one, expected) for many in results.values() for one in many))
    for library in ("torch", "cupy"):
        try:
            _exchange(library, module, image, name, expected, write)
        except ImportError as error:
            write(library, skipped=str(error))


def _exchange(library, module, image, name, expected, write):
    if library == "torch":
        import torch as lib

        there, back = lib.from_numpy(image).cuda(), lambda x: lib.from_dlpack(x).clone()
        host = lambda x: x.cpu().numpy()  # noqa: E731
    else:
        import cupy as lib

        there, back, host = lib.asarray(image), lambda x: lib.from_dlpack(x).copy(), lib.asnumpy
    kept = [back(module.run({"image": there * 1}, check_finite=False)[name]) for _ in range(60)]
    right = all(np.array_equal(host(one), expected) for one in kept)
    write(
        library,
        right=right,
        graphs=len(next(iter(module._idle[0]._shapes.values())).graphs),
        not_recorded=str(module._idle[0].not_recorded),
    )


def _sanitize(tool, folder, write):
    import shutil

    program = shutil.which("compute-sanitizer")
    if program is None:
        write("skipped", why="compute-sanitizer is not installed")
        return
    command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "5", sys.executable, "-m", "benchmarks.cuda", str(folder)]
    done = subprocess.run(
        [*command, "--out", str(write.path.parent / tool), "--step", "sanitized"], cwd=ROOT, capture_output=True, text=True
    )
    text = done.stdout + done.stderr
    summary = [line for line in text.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
    details = [line for line in text.splitlines() if line.startswith("=========")][:14]
    write("summary", status=done.returncode, says=" ".join(summary) or text[-300:], details=[] if done.returncode == 0 else details)


def step_memcheck(folder, write):
    """Accesses outside of arrays."""
    _sanitize("memcheck", folder, write)


def step_racecheck(folder, write):
    """Races in shared memory."""
    _sanitize("racecheck", folder, write)


def step_synccheck(folder, write):
    """Barriers that not all threads reach."""
    _sanitize("synccheck", folder, write)


# How fast -------------------------------------------------------------------------------------------------------------------------------


def step_limit(folder, write):
    """What the device does when nothing else is in the way."""
    device = cuda_device.Device()
    code, out = cuda_device.MachineCode(device, folder / "limit.cubin"), device.empty((4,), "int32", 0)
    processors = device.driver._attribute(16, 0)
    steps = 2048
    for name, threads, blocks, operations in (
        ("limit_mma", 128, 8, 4 * steps * 8 * 2 * 16 * 8 * 256), ("limit_wgmma", 256, 1, 2 * (steps // 8) * 2 * 64 * 256 * 256),
        ("limit_cores", 256, 8, 256 * steps * 16 * 2 * 32), ("limit_fma", 256, 8, 256 * steps * 16 * 2),
    ):  # fmt: skip
        grid = processors * blocks
        ms = device.milliseconds(lambda n=name, g=grid, t=threads: code.start(n, g, t, out.data_ptr()), 5)
        write(name, tops=grid * operations / ms / 1e9, ms=ms)


def _random(shape, dtype):
    """Random bits or normal numbers; a million of them, again and again."""
    rng, count = np.random.default_rng(0), 1 << 20
    some = rng.standard_normal(count, np.float32) if dtype.startswith("float") else rng.integers(0, 2**32, count, dtype=np.uint32)
    return np.resize(some.astype(dtype) if dtype.startswith("float") else some.view(dtype), shape)


def _timed(folder, write, names):
    device = cuda_device.Device()
    index = json.loads((folder / "timed.json").read_text())["kernels"]
    function = device.library(folder / "timed.so")
    for entry in index:
        if not entry["name"].startswith(names):
            continue
        count = len(entry["params"]) - entry["outputs"]
        tensors = [device.upload(_random(*param)) for param in entry["params"][:count]]
        tensors += [device.empty(*param, 0) for param in entry["params"][count:]]
        kernel = function(entry["name"])
        ms = device.milliseconds(lambda k=kernel, t=tensors: device.call(k, *t))
        facts = dict(ms=ms, schedule=entry["schedule"])
        if entry["operations"]:
            facts["tops"] = entry["operations"] / ms / 1e9
        else:
            facts["gb_per_s"] = sum(int(np.prod(s)) * np.dtype(d).itemsize for s, d in entry["params"]) / ms / 1e6
        write(entry["name"], **facts)


def step_matrices(folder, write):
    """Products of matrices of bits, and packing."""
    _timed(folder, write, ("gemm_", "pack_half", "product_"))


def step_convolutions(folder, write):
    """3x3 convolutions of bits, and float ones."""
    _timed(folder, write, ("conv_", "few_", "stem", "pointwise", "classifier"))


def step_networks(folder, write):
    """Images a second with inputs and results on the device, and the time of one image from numpy to numpy."""
    import bnntvm
    from bnntvm.cuda import driver

    device = cuda_device.Device()
    for path in sorted(folder.glob("*.bnn")):
        if path.stem.startswith(("exact", "digits")):
            continue
        module = bnntvm.load(path)
        (info,) = module.inputs
        for batch in (1, 64, 256):
            shape = [d if isinstance(d, int) else batch for d in info.shape]
            host = _random(shape, "float32")
            there = _Lent(device.upload(host))
            for _ in range(4):
                module.run({info.name: there}, check_finite=False)
            driver.load().synchronize_device()
            times = []
            for _ in range(5):
                count, begun = max(2, 200 // batch), time.perf_counter()
                for _ in range(count):
                    module.run({info.name: there}, check_finite=False)
                driver.load().synchronize_device()
                times.append((time.perf_counter() - begun) / count)
            facts = dict(batch=batch, ms=1e3 * min(times), images_per_s=batch / min(times))
            if batch == 1:
                facts["latency_ms"] = _latency(module, {info.name: there}, False)
                facts["numpy_ms"] = _latency(module, {info.name: host}, True)
            write(path.stem, **facts, graph=str(module._idle[0].not_recorded))


def _latency(module, feed, host):
    from bnntvm.cuda import driver

    times = []
    for _ in range(60):
        begun = time.perf_counter()
        module.run(feed, check_finite=host)
        if not host:
            driver.load().synchronize_device()
        times.append(time.perf_counter() - begun)
    return 1e3 * float(np.median(times[10:]))


class _Lent:
    """A tensor of TVM's as an array of another library."""

    def __init__(self, tensor):
        self.tensor, self.shape, self.dtype = tensor, tuple(tensor.shape), str(tensor.dtype)

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **_):
        return self.tensor.__dlpack__()


def step_kernels(folder, write):
    """Where a network's time goes: each kernel of Bi-RealNet-18, started one by one."""
    import bnntvm

    device, module = cuda_device.Device(), bnntvm.load(folder / "birealnet18.bnn")
    for batch in (256, 1):
        calls = _kernel_times(device, module, batch)
        total = sum(ms for _, ms in calls)
        for name, ms in sorted(calls, key=lambda call: -call[1])[:16]:
            write(name, batch=batch, ms=ms, share=ms / total)
        write("all", batch=batch, ms=total, share=1.0)


def _kernel_times(device, module, batch):
    """``(kernel, milliseconds)`` of the calls of a run, medians of some."""
    shape = [d if isinstance(d, int) else batch for d in module.inputs[0].shape]
    host, seen = _random(shape, "float32"), []

    def note(_function, name, before, _result, *_args):
        event = device.driver.event()
        device.driver.reached(event, machine.stream)
        seen.append((str(name), bool(before), event))
        return 0

    machine = module._library.machine(device.ffi.convert(note))
    machine.not_recorded = "each kernel is timed"
    rounds = []
    for _ in range(4):
        seen.clear()
        machine.run([host], batch, (), True)
        rounds.append([(name, device.elapsed(a, b)) for (name, before, a), (_, _, b) in zip(seen, seen[1:]) if before])
    known = {call["kernel"] for call in module._manifest["calls"]}
    calls = [(one[0][0], float(np.median([ms for _, ms in one]))) for one in zip(*rounds[1:])]
    return [(name, ms) for name, ms in calls if name in known]


def step_candidates(folder, write):
    """Schedules that :mod:`benchmarks.cuda_prepare` has built, checked and timed as ``bnntvm tune`` does; the fastest beside the default.

    ``OUT/candidates.jsonl`` is what :mod:`benchmarks.cuda_records` makes records of.
    """
    from bnntvm.tuning.gpu_process import MEASURE_LIMIT, Program
    from bnntvm.tuning.worker import Failure

    prepared = sorted(path.parent for path in (folder / "candidates").glob("*/schedules.pickle"))
    if not prepared:
        write("skipped", why="none are prepared: --candidates of benchmarks.cuda_prepare")
        return
    program = Program([], "candidates")
    with (write.path.parent / "candidates.jsonl").open("w") as file:

        def note(**facts):
            file.write(json.dumps(facts) + "\n")
            file.flush()

        note(machine=program.start()["machine"])
        for task in prepared:
            libraries, times = {int(path.stem): str(path) for path in task.glob("*.so")}, {}
            for number, library in sorted(libraries.items()):
                try:
                    seconds = program.call(MEASURE_LIMIT, "measure", str(task), library, 0.05)
                    times[number] = float(np.median(seconds))
                    note(task=task.name, number=number, seconds=seconds)
                except Failure as failure:
                    note(task=task.name, number=number, seconds=[], failed=str(failure))
            if 0 not in times:
                write(task.name, measured=len(times), of=len(libraries), why="the default failed")
                continue
            best = sorted(times.keys() - {0}, key=times.get)[:3]
            compared = program.call(MEASURE_LIMIT * 4, "compare", [(str(task), libraries[n]) for n in (0, *best)], 0.1)
            for number, seconds in zip((0, *best), compared):
                note(task=task.name, number=number, seconds=seconds, compared=True)
            default, *others = (float(np.median(seconds)) for seconds in compared)
            write(task.name, measured=len(times), of=len(libraries), default_us=1e6 * default, gain=default / min(others, default=default))
    program.close()


def step_torch_convolutions(folder, write):
    """cuDNN's half-precision convolutions of the same layers."""
    import torch

    from benchmarks.cuda_prepare import CONVOLUTIONS

    write("versions", torch=torch.__version__, cudnn=torch.backends.cudnn.version())
    torch.backends.cudnn.benchmark = True
    for height, width, channels, outputs, batch in CONVOLUTIONS:
        x = torch.randn(batch, channels, height, width, device="cuda", dtype=torch.half).to(memory_format=torch.channels_last)
        conv = torch.nn.Conv2d(channels, outputs, 3, padding=1, bias=False, device="cuda", dtype=torch.half).to(
            memory_format=torch.channels_last
        )
        with torch.inference_mode():
            ms = _torch_ms(lambda c=conv, x=x: c(x))
        operations = 2 * batch * height * width * channels * outputs * 9
        write(f"conv_{height}x{width}x{channels}x{outputs}_b{batch}", ms=ms, tops=operations / ms / 1e9)


def _torch_ms(work, repeat=10, count=10):
    import torch

    for _ in range(5):
        work()
    times = []
    for _ in range(repeat):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(count):
            work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / count)
    return float(np.median(times))


def step_torch_network(folder, write):
    """Bi-Real-18 in PyTorch: half precision, channels last, eager and compiled."""
    import torch

    from benchmarks.cuda_prepare import PEER_BATCHES
    from benchmarks.cuda_torch import BiReal18

    model = BiReal18().eval().cuda().half().to(memory_format=torch.channels_last)
    for name in ("eager", "compiled"):
        runner = model if name == "eager" else torch.compile(model, mode="reduce-overhead")
        for batch in PEER_BATCHES:
            x = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.half).to(memory_format=torch.channels_last)
            with torch.inference_mode():
                ms = _torch_ms(lambda r=runner, x=x: r(x), 5, 5)
            write(f"birealnet18_{name}", batch=batch, ms=ms, images_per_s=1e3 * batch / ms)


def step_ort_cuda(folder, write):
    """ONNX Runtime with CUDA, half precision, inputs and results on the device: the same network, batches and layers as PyTorch's."""
    from benchmarks import cuda_peers

    _peer(folder, write, lambda model, batch: cuda_peers.ort_run(model, "CUDAExecutionProvider", batch))


def step_ort_tensorrt(folder, write):
    """The same with ONNX Runtime's TensorRT."""
    from benchmarks import cuda_peers

    _peer(folder, write, lambda model, batch: cuda_peers.ort_run(model, "TensorrtExecutionProvider", batch))


def step_tensorrt(folder, write):
    """The same with TensorRT by itself."""
    from benchmarks import cuda_peers

    device = cuda_device.Device()
    _peer(folder, write, lambda model, batch: cuda_peers.tensorrt_run(model, batch, device))


def _peer(folder, write, make):
    """Measure what ``make(model, batch)`` makes of the prepared files; what is missing is written down once."""
    import gzip

    from benchmarks import cuda_peers

    index = folder / "peers" / "peers.json"
    if not index.exists():
        write("skipped", why="no networks are prepared for other run times")
        return
    for entry in json.loads(index.read_text()):
        model = gzip.decompress((folder / "peers" / entry["file"]).read_bytes())
        for batch in entry["batches"]:
            try:
                run = make(model, batch)
            except cuda_peers.Missing as missing:
                write(entry["name"], batch=batch, why=str(missing))
                if str(missing).startswith("not present"):
                    return
                continue
            seconds, latency = cuda_peers.measure(run)
            rate = {"tops": batch * entry["operations"] / seconds / 1e12} if entry["operations"] else {"images_per_s": batch / seconds}
            write(entry["name"], batch=batch, ms=1e3 * seconds, **rate, latency_ms=1e3 * latency, **run.facts)


# Report ---------------------------------------------------------------------------------------------------------------------------------


def write_report(out):
    """``cuda.md`` from ``results.jsonl``: one table for each step."""
    facts = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    lines = ["# On a GPU", ""]
    for step in dict.fromkeys(one["step"] for one in facts):
        doc = (globals()[f"step_{step}"].__doc__ or "").strip().splitlines()[0]
        lines += [f"## {step}", "", doc, ""]
        rows = [{k: v for k, v in one.items() if k != "step"} for one in facts if one["step"] == step]
        keys = list(dict.fromkeys(key for row in rows for key in row))
        lines += ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
        lines += ["| " + " | ".join(_cell(row.get(key, "")) for key in keys) + " |" for row in rows]
        lines.append("")
    (out / "cuda.md").write_text("\n".join(lines))
    print(f"written to {out / 'cuda.md'}")


def _cell(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
