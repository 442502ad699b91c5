"""Other run times on a GPU, where they are installed: ONNX Runtime with CUDA or TensorRT, and TensorRT by itself.

Each takes the same half-precision ONNX file, with inputs and results in the device's memory. What is not installed, or does not start, is
:class:`Missing` with its reason: a fact, not a failure. Nothing here needs a compiler or TVM's Python package.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time

import numpy as np

#: Provider -> options to try, what should be fastest first.
PROVIDERS = {
    "CUDAExecutionProvider": (
        {"enable_cuda_graph": "1", "cudnn_conv_algo_search": "EXHAUSTIVE", "prefer_nhwc": "1"},
        {"enable_cuda_graph": "1", "cudnn_conv_algo_search": "EXHAUSTIVE"},
        {"cudnn_conv_algo_search": "EXHAUSTIVE"},
    ),
    "TensorrtExecutionProvider": (
        {"trt_fp16_enable": "1", "trt_cuda_graph_enable": "1", "trt_builder_optimization_level": "3"},
        {"trt_fp16_enable": "1"},
    ),
}  # fmt: skip
#: Session option: an operator without a kernel on the device is an error, and not computed by the processor.
ON_DEVICE_ONLY = "session.disable_cpu_ep_fallback"
#: Runs before the clock starts; seconds to measure, about, in so many parts.
WARM_UP, SECONDS, PARTS = 5, 1.0, 5


class Missing(Exception):
    """This peer cannot be measured here; the message says why."""


class Run:
    """A network that is ready: ``start()`` gives the device a run, ``wait()`` waits for all; ``facts`` say how it runs."""

    def __init__(self, start, wait, **facts):
        self.start, self.wait, self.facts = start, wait, facts


def measure(run, clock=time.perf_counter):
    """``(seconds of a run, one started after the other; median seconds from a start to its end)``."""
    for _ in range(WARM_UP):
        run.start()
    run.wait()
    alone = []
    for _ in range(10):
        begun = clock()
        run.start()
        run.wait()
        alone.append(clock() - begun)
    latency = statistics.median(alone)
    count, times = int(min(1000, max(2, SECONDS / PARTS / max(latency, 1e-6)))), []
    for _ in range(PARTS):
        begun = clock()
        for _ in range(count):
            run.start()
        run.wait()
        times.append((clock() - begun) / count)
    return statistics.median(times), latency


# ONNX Runtime ---------------------------------------------------------------------------------------------------------------------------


def onnxruntime(provider):
    """The package, which has the provider."""
    try:
        import onnxruntime
    except ImportError as error:
        raise Missing(f"not present: {error}") from error
    with contextlib.suppress(Exception):  # finds CUDA's libraries in wheels; older versions have none of this
        onnxruntime.preload_dlls()
    have = onnxruntime.get_available_providers()
    if provider not in have:
        raise Missing(f"not present: onnxruntime {onnxruntime.__version__} has {', '.join(have)}")
    return onnxruntime


def ort_run(model, provider, batch, place="cuda"):
    """A network in ONNX Runtime.

    Parameters
    ----------
    model : bytes
        An ONNX file with one input, whose first dimension may be dynamic.
    provider : str
    batch : int
    place : str
        Where its memory is.

    Raises
    ------
    Missing
    """
    package, why = onnxruntime(provider), []
    for everything, options in itertools.product((True, False), PROVIDERS.get(provider, ({},))):
        try:
            return _bound(package, _session(package, model, provider, options, everything), batch, place, options, everything)
        except Exception as error:  # noqa: BLE001  (an option that this version lacks, a graph that cannot be captured, no memory)
            why.append(_line(error))
    raise Missing("does not run: " + " | ".join(dict.fromkeys(why)))


def _session(package, model, provider, options, everything):
    settings = package.SessionOptions()
    settings.log_severity_level = 3
    if everything:
        settings.add_session_config_entry(ON_DEVICE_ONLY, "1")
    others = ["CUDAExecutionProvider"] if provider.startswith("Tensorrt") else []
    session = package.InferenceSession(model, settings, providers=[(provider, options), *others])
    if session.get_providers()[0] != provider:  # it fell back to the processor, with a warning
        raise RuntimeError(f"{provider} does not start; {session.get_providers()[0]} does")
    return session


def _bound(package, session, batch, place, options, everything):
    """Memory for the input and the result is the session's from here on: a captured graph knows their addresses."""
    (source,), outputs, binding = session.get_inputs(), session.get_outputs(), session.io_binding()
    given = package.OrtValue.ortvalue_from_numpy(_random(_sized(source.shape, batch), _dtype(source.type)), place, 0)
    results = [package.OrtValue.ortvalue_from_shape_and_type(_sized(o.shape, batch), _dtype(o.type), place, 0) for o in outputs]
    binding.bind_ortvalue_input(source.name, given)
    for output, value in zip(outputs, results):
        binding.bind_ortvalue_output(output.name, value)
    how = package.RunOptions()
    how.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def start():
        session.run_with_iobinding(binding, how)

    start()  # what does not work shows here
    binding.synchronize_outputs()
    facts = dict(version=package.__version__, options=" ".join(f"{k}={v}" for k, v in options.items()), all_on_device=everything)
    run = Run(start, binding.synchronize_outputs, **facts)
    run.given, run.results = given, results
    return run


# TensorRT -------------------------------------------------------------------------------------------------------------------------------


def tensorrt_run(model, batch, device):
    """A network in TensorRT, an engine for this batch alone; ``device`` is a :class:`bnntvm.cuda.device.Device`.

    Raises
    ------
    Missing
    """
    try:
        import tensorrt as trt
    except ImportError as error:
        raise Missing(f"not present: {error}") from error
    try:
        return _engine_run(trt, model, batch, device)
    except Missing:
        raise
    except Exception as error:  # noqa: BLE001
        raise Missing(f"does not run: {_line(error)}") from error


def _engine_run(trt, model, batch, device):
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # types are those of the file
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser, config = trt.OnnxParser(network, log), builder.create_builder_config()
    if not parser.parse(model):
        raise Missing("does not read the network: " + "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
    if typed is None:
        config.set_flag(trt.BuilderFlag.FP16)
    source, profile = network.get_input(0), builder.create_optimization_profile()
    shape = _sized(source.shape, batch)
    profile.set_shape(source.name, shape, shape, shape)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Missing("makes no engine of the network")
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    context.set_input_shape(source.name, shape)
    memory = []
    for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
        size, dtype = tuple(context.get_tensor_shape(name)), np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
        memory.append(device.upload(_random(size, dtype)))
        context.set_tensor_address(name, memory[-1].data_ptr())

    def enqueue():
        if not context.execute_async_v3(device.stream):
            raise RuntimeError("TensorRT starts no run")

    enqueue()
    device.driver.synchronize(device.stream)
    start, graph = _recorded(enqueue, device)
    run = Run(start, lambda: device.driver.synchronize(device.stream), version=trt.__version__, graph=graph)
    run.kept = memory, context, engine, runtime
    return run


def _recorded(work, device):
    """``(function that starts the work as a graph, "recorded")``, or the work and why it could not be recorded."""
    try:
        graph = device.driver.record(work, device.stream)
    except Exception as error:  # noqa: BLE001
        return work, _line(error)
    return (lambda: device.driver.launch(graph, device.stream)), "recorded"


# Shared ---------------------------------------------------------------------------------------------------------------------------------


def _sized(shape, batch):
    """A shape whose dynamic dimensions (names, None, -1) are the batch."""
    return [d if isinstance(d, int) and d > 0 else batch for d in shape]


def _dtype(kind):
    """numpy's type of ``tensor(float16)`` and such."""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(name, name))


def _random(shape, dtype):
    numbers = np.random.default_rng(0).standard_normal(min(int(np.prod(shape)), 1 << 20), np.float32)
    return np.resize(numbers, shape).astype(dtype)


def _line(error):
    """The first line of what an error says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
