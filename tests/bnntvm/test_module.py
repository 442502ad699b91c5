"""Running: conversion and refusal of inputs, outputs that are the caller's, threads, processes."""

import hashlib
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import bnntvm
from bnntvm import runtime
from bnntvm.module import Module, Timing

from .conftest import manifest


def _big_endian(array):
    return array.astype(">f4")


def _strided(array):
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), np.float32)
    wide[..., ::2] = array
    return wide[..., ::2]


def _misaligned(array):
    raw = np.empty(array.nbytes + 1, np.uint8)
    view = raw[1:].view(np.float32).reshape(array.shape)
    view[...] = array
    return view


def _read_only(array):
    copy = array.copy()
    copy.flags.writeable = False
    return copy


@pytest.mark.parametrize(
    "form", [np.asarray, np.asfortranarray, _big_endian, _strided, _misaligned, _read_only, np.ndarray.tolist, lambda a: list(a)]
)
def test_every_form_of_the_same_values_gives_the_same_result(one_input, module, images, form):
    before = images.copy()
    outputs = module.run({"x": form(images)})
    np.testing.assert_array_equal(outputs["y"], one_input.reference(images))
    np.testing.assert_array_equal(images, before)


def test_float16_input_of_a_float32_network_is_widened(one_input, module, images):
    half = images.astype(np.float16)
    np.testing.assert_array_equal(module.run({"x": half})["y"], one_input.reference(half.astype(np.float32)))


def test_outputs_have_the_declared_types_and_belong_to_the_caller(one_input, module, images):
    first = module.run({"x": images})
    kept = {name: array.copy() for name, array in first.items()}
    assert first["y"].dtype == np.float32 and first["s"].dtype == np.float16
    module.run({"x": images + 1})
    for name, array in first.items():
        assert array.flags.writeable
        np.testing.assert_array_equal(array, kept[name])
        array[...] = 7
    np.testing.assert_array_equal(module.run({"x": images})["y"], kept["y"])


def test_float16_overflow_becomes_infinity_without_a_warning(module):
    with np.errstate(all="raise"):
        assert module.run({"x": np.full((1, 3, 8, 8), 1e4, np.float32)})["s"][0] == np.inf


def test_batches_of_many_sizes_in_any_order(one_input, module):
    rng = np.random.default_rng(1)
    for size in [*range(1, 2 * runtime.Machine.MAX_SHAPES + 3), 1, 5, 2, 33, 1]:
        x = rng.standard_normal((size, 3, 8, 8)).astype(np.float32)
        np.testing.assert_array_equal(module.run({"x": x})["y"], one_input.reference(x))


def test_call_with_one_array(module, two_inputs, images):
    assert set(module(images)) == {"y", "s"}
    pair = Module.from_library(two_inputs.path, two_inputs.manifest, threads=1)
    with pytest.raises(bnntvm.InputError, match="2 inputs.*\n.*a, b"):
        pair(images)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x: {"x": x.astype(np.float64)}, ["'x'", "float64", "float32", "astype"]),
        (lambda x: {"x": x.astype(np.int32)}, ["int32", "float32"]),
        (lambda x: {"x": x > 0}, ["bool", "float32"]),
        (lambda x: {"x": x.astype(np.complex64)}, ["complex64"]),
        (lambda x: {"x": x.astype(object)}, ["object"]),
        (lambda x: {"x": "text"}, ["'x'", "float32"]),
        (lambda x: {"x": None}, ["'x'"]),
        (lambda x: {"x": [[1.0], [1.0, 2.0]]}, ["'x'", "not an array"]),
        (lambda x: {"x": x[0]}, ["[3, 8, 8]", "[N, 3, 8, 8]", "batch dimension"]),
        (lambda x: {"x": x[:, :2]}, ["[5, 2, 8, 8]", "axis 1 is 2 instead of 3"]),
        (lambda x: {"x": x[:0]}, ["[0, 3, 8, 8]", "axis 0 is 0"]),
        (lambda x: {}, ["missing: x"]),
        (lambda x: {"X": x}, ["missing: x", "unknown: 'X'"]),
        (lambda x: {"x": x, "mask": x}, ["unknown: 'mask'"]),
        (lambda x: [x], ["dict", "list"]),
        (lambda x: x, ["dict", "ndarray"]),
    ],
)
def test_wrong_feeds_are_refused_by_name(module, images, change, words):
    with pytest.raises(bnntvm.InputError) as caught:
        module.run(change(images))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (4, 2, 7, 7), (2, 1, 3, 5)])
def test_values_that_are_not_finite(one_input, module, images, value, place):
    images[place] = value
    with pytest.raises(bnntvm.InputError, match="'x' is not finite") as caught:
        module.run({"x": images})
    assert str(list(place)) in str(caught.value) and "check_finite=False" in str(caught.value)
    if value == np.inf:  # relu of NaN is not the same everywhere
        np.testing.assert_array_equal(module.run({"x": images}, check_finite=False)["y"], one_input.reference(images))


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_infinities_of_both_signs_and_huge_finite_values(module, images):
    huge = np.full_like(images, 3e38)
    assert np.isfinite(module.run({"x": huge})["y"]).all()  # their sum overflows, they do not
    images[0, 0, 0, 0], images[1, 0, 0, 0] = np.inf, -np.inf
    with pytest.raises(bnntvm.InputError, match=r"inf at \[0, 0, 0, 0\]"):
        module.run({"x": images})


def test_two_inputs_with_a_common_dimension(two_inputs):
    pair = Module.from_library(two_inputs.path, two_inputs.manifest, threads=1)
    a, b = np.arange(8, dtype=np.float16).reshape(2, 4) / 8, np.arange(8).reshape(2, 4)
    for ints in (b, b.astype(np.int8), b.astype(np.uint32), b.tolist()):
        np.testing.assert_array_equal(pair.run({"b": ints, "a": a})["sum"], two_inputs.reference(a, b))
    with pytest.raises(bnntvm.InputError, match="axis 0, 'N', is 1 here and 2 in input 'a'"):
        pair.run({"a": a, "b": b[:1]})
    for wrong in (b.astype(np.uint64), b.astype(np.float32), [[0.5] * 4] * 2, [[2**63] * 4] * 2):
        with pytest.raises(bnntvm.InputError, match="'b'.*int64"):
            pair.run({"a": a, "b": wrong})


def test_constants_that_are_inputs_may_be_repeated_not_changed(one_input, images):
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    entry = {"shape": [2, 3], "dtype": "float32", "sha256": hashlib.sha256(weight.tobytes()).hexdigest()}
    module = Module.from_library(one_input.path, one_input.manifest | {"overridable": {"w": entry}}, threads=1)
    want = one_input.reference(images)
    for same in (weight, np.asfortranarray(weight), weight.astype(">f4")):
        np.testing.assert_array_equal(module.run({"x": images, "w": same})["y"], want)
    for other in (weight + 1, weight.T, weight.astype(np.float64), weight.ravel()):
        with pytest.raises(bnntvm.InputError, match="'w' is a constant of the compiled network"):
            module.run({"x": images, "w": other})


def test_a_module_serves_several_threads_at_once(one_input):
    module = Module.from_library(one_input.path, one_input.manifest, threads=2)
    failures = []

    def client(seed):
        rng = np.random.default_rng(seed)
        for _ in range(60):
            x = rng.standard_normal((rng.integers(1, 9), 3, 8, 8)).astype(np.float32)
            if not np.array_equal(module.run({"x": x})["y"], one_input.reference(x)):
                failures.append(seed)

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert not failures


def test_thread_count_argument_beats_environment(module, one_input, monkeypatch):
    monkeypatch.setattr(runtime, "usable_cpus", lambda: 4)
    monkeypatch.setenv("BNNTVM_NUM_THREADS", "3")
    assert Module.from_library(one_input.path, one_input.manifest).threads == 3
    assert Module.from_library(one_input.path, one_input.manifest, threads=2).threads == 2
    assert Module.from_library(one_input.path, one_input.manifest, threads=99).threads == 4
    monkeypatch.setenv("BNNTVM_NUM_THREADS", "many")
    with pytest.raises(bnntvm.BnnError, match="'many'.*\n.*BNNTVM_NUM_THREADS"):
        Module.from_library(one_input.path, one_input.manifest)
    for bad in (0, -1, 1.5, True, "2"):
        with pytest.raises(bnntvm.BnnError, match="not a number of threads"):
            Module.from_library(one_input.path, one_input.manifest, threads=bad)


def test_the_pool_gets_the_threads_that_are_asked_for_in_any_order():
    count = runtime.ffi().get_global_func("runtime.NumThreads")
    seen = []

    def ask():
        for threads in (2, 3, 2, 4, 1, 3):
            seen.append((threads, runtime.call_with_threads(count, [], threads)))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert [got for wanted, got in seen if wanted > 1] == [wanted for wanted, _ in seen if wanted > 1]


def _script(text, *args):
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(text), *map(str, args)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_loading_and_running_maps_neither_compiler_nor_tvm_package(module, tmp_path, images):
    module.export(tmp_path / "net.bnn")
    np.save(tmp_path / "x.npy", images)
    out = _script(
        """
        import pathlib, sys, numpy, bnntvm

        def peak():  # kB; getrusage would start from the peak of the process that started this one
            return int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

        before = peak()
        module = bnntvm.load(sys.argv[1], threads=1)
        module.run({"x": numpy.load(sys.argv[2])})
        compiler = "libtvm_compiler" in pathlib.Path("/proc/self/maps").read_text()
        print(compiler, *(name in sys.modules for name in ("tvm", "torch", "onnx")), peak() - before)
        """,
        tmp_path / "net.bnn",
        tmp_path / "x.npy",
    )
    *flags, grown = out.split()
    assert flags == ["False"] * 4
    assert int(grown) < 40_000  # kB; 23 MB measured


def test_a_forked_child_runs_too(module, tmp_path):
    module.export(tmp_path / "net.bnn")
    out = _script(
        """
        import os, sys, numpy, bnntvm
        module = bnntvm.load(sys.argv[1])
        module.threads = 2
        x = numpy.ones((64, 3, 8, 8), "f4")
        want = module.run({"x": x})["y"]
        child = os.fork()
        if child == 0:
            os._exit(0 if (module.run({"x": x})["y"] == want).all() else 3)
        print(os.waitpid(child, 0)[1], (module.run({"x": x})["y"] == want).all())
        """,
        tmp_path / "net.bnn",
    )
    assert out.split() == ["0", "True"]


def test_names_of_the_package_are_functions_whatever_was_imported_first():
    assert _script("import bnntvm; print('numpy' in __import__('sys').modules, callable(bnntvm.load), 'build' in dir(bnntvm))").split() == [
        "False",
        "True",
        "True",
    ]
    with pytest.raises(AttributeError, match="no attribute 'compile'"):
        _ = bnntvm.compile


def test_benchmark_counts_and_compares(module):
    calls = []
    timing = module.benchmark(repeat=12)
    assert timing.repeat == 12 and 0 < timing.p10_ms <= timing.median_ms <= timing.p90_ms
    ours, theirs = module.benchmark(repeat=10, warmup=2, against=lambda: calls.append(1))
    assert len(calls) > 12 and ours.repeat == theirs.repeat == 10
    slow, _ = module.benchmark(repeat=3, warmup=1, against=lambda: time.sleep(0.1))
    assert slow.repeat == 3
    with pytest.raises(bnntvm.BnnError, match="number of runs"):
        module.benchmark(repeat=0)
    assert Timing.of([3.0, 1.0, 2.0]).median_ms == 2.0


def test_random_feed_fits_and_description_names_everything(two_inputs):
    pair = Module.from_library(two_inputs.path, two_inputs.manifest, threads=1)
    feed = pair.random_feed(batch=3)
    assert feed["a"].shape == (3, 4) and feed["a"].dtype == np.float16 and feed["b"].dtype == np.int64
    assert pair.run(feed)["sum"].shape == (3, 4)
    assert repr(pair) == "<bnntvm.Module a: float16[N, 4], b: int64[N, 4] -> sum: float32[N, 4]; target x86-64-v2, 1 thread>"
    with pytest.raises(TypeError, match="export"):
        pair.__reduce__()


def test_a_failure_inside_the_network_is_a_bnn_error(one_input, images):
    # The library takes three channels; a manifest that says two lets a wrong array through to it.
    wrong = manifest([("x", ("N", 2, 8, 8), "float32")], [("y", ("N", 2, 8, 8), "float32"), ("s", ("N",), "float32")])
    module = Module.from_library(one_input.path, wrong, threads=1)
    with pytest.raises(bnntvm.BnnError, match="failed while it ran"):
        module.run({"x": images[:, :2]})


def test_a_batch_beyond_all_memory(one_input):
    """The error is one of bnntvm's, and the module still runs."""
    module = Module.from_library(one_input.path, one_input.manifest, threads=1)
    batch = np.broadcast_to(np.float32(1), (10**12, *module.inputs[0].shape[1:]))
    with pytest.raises(bnntvm.BnnError, match="memory"):
        module(batch)
    assert module.run({module.inputs[0].name: np.array(batch[:1])})
    with pytest.raises(bnntvm.BnnError, match="smaller batch"):
        module.random_feed(batch=10**12)
