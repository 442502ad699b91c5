"""Profiles: every kernel's call has its row, every layer its rows, and the sum of the rows is what a run takes, up to what lies between."""

import json

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import bnntvm
from benchmarks.layers import Layer
from bnntvm.profiling import limits, profile
from bnntvm.report import Layer as Row
from bnntvm.targets import aarch64, armv7, x86
from tests.bnntvm.remote.farm import farm


@pytest.fixture(scope="module")
def module():
    """Equal layers share a kernel: rows are told apart by their place alone."""
    return bnntvm.build(Layer(64, 12).chain(3), threads=1)


@pytest.fixture(scope="module")
def found(module):
    return bnntvm.profile(module, seconds=0.1)


def test_rows_belong_to_layers(found, module):
    layers = module.report.layers
    assert {c.layer for c in found.calls if c.layer} == {layer.output for layer in layers}
    assert [c.layer for c in found.calls if c.layer] == [layer.output for layer in layers]
    for call in found.calls:
        layer = next((one for one in layers if one.output == call.layer), None)
        assert (call.node, call.kind, call.macs) == ((layer.node, layer.kind, layer.macs) if layer else ("", "", 0))
        assert call.kernel == layer.kernel if layer else not call.kernel.startswith("binary_conv2d")


def test_times_and_limits(found):
    assert all(call.time_us > 0 and call.limit_us > 0 for call in found.calls)
    assert 0 < found.sum_us < 3 * found.whole_us  # other work on the machine may meet either; that they agree is measured, not tested
    starts = [call.start_us for call in found.calls]
    assert starts == sorted(starts)
    assert found.limits["bits"] > found.limits["float"] > 0 and found.limits["int8"] > 0
    assert [size for size, _ in found.limits["read"]] == list(limits._SIZES)


@pytest.mark.parametrize("batch", [1, 3])
def test_bytes(batch):
    """Of one dense layer of floats: data, weights, bias and results."""
    rng = np.random.default_rng(0)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "dense")], "network",
        [helper.make_tensor_value_info("x", 1, ["N", 96])], [helper.make_tensor_value_info("y", 1, ["N", 64])],
        [numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name) for name, shape in (("w", (96, 64)), ("b", (64,)))],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    profile_ = bnntvm.profile(bnntvm.build(model, threads=1), batch=batch, seconds=0.02)
    (call,) = [c for c in profile_.calls if c.layer == "y"]
    assert (call.node, call.kind, call.macs, call.bytes) == ("dense", "float", batch * 96 * 64, 4 * (96 * 64 + 64 + batch * (96 + 64)))


def test_what_is_written(found, tmp_path):
    assert json.loads(json.dumps(found.as_dict()))["sum_us"] == found.sum_us
    events = json.loads(json.dumps(found.chrome_trace()))["traceEvents"]
    assert [e["dur"] for e in events] == [c.time_us for c in found.calls]
    text = str(found)
    assert all(call.kernel in text for call in found.calls) and "us in kernels" in text
    for name in ("roof.svg", "roof.png"):
        found.roofline(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(bnntvm.BnnError, match="picture could not be written"):
        found.roofline(tmp_path / "missing" / "roof.svg")


@pytest.mark.parametrize(
    "kind, planes, macs, size, expected",
    [
        ("binary", "1x1", 1000, 5, (10.0, "int8")), ("bitserial", "2x1", 1000, 5, (10.0, "int8")), ("float", "", 100, 10, (100.0, "float")),
        ("weight-only", "", 100, 10, (100.0, "float")), ("binary", "1x1", 1000, 1000, (1000.0, "memory")),
        (None, "", 0, 10, (10.0, "memory")),
    ],
)  # fmt: skip
def test_limit(kind, planes, macs, size, expected):
    """The faster of the two ways to multiply, the slower of computing and moving."""
    layer = kind and Row.from_dict({"node": "n", "output": "o", "op": "Conv", "kind": kind, "planes": planes})
    measured = {"bits": 50.0, "int8": 100.0, "float": 1.0, "read": [[1, 1.0], [10000, 1.0]]}
    seconds, bound = profile._limit(layer, macs, size, measured)
    assert (pytest.approx(expected[0]), expected[1]) == (seconds, bound)


def test_a_mask_of_zeros_is_no_work():
    """Signs with a mask of their zeros are reported as two planes; the limit multiplies one, as the kernel does where no zero occurs."""
    measured = {"bits": 100.0, "int8": 10.0, "float": 1.0, "read": [[1, 1e9], [10, 1e9]]}
    for kind, seconds in (("binary", 10.0), ("bitserial", 20.0)):
        layer = Row.from_dict({"node": "n", "output": "o", "op": "Conv", "kind": kind, "planes": "2x1"})
        assert profile._limit(layer, 1000, 5, measured) == (pytest.approx(seconds), "bits")


@pytest.mark.parametrize("isa", [*x86.LEVELS, *aarch64.LEVELS, *armv7.LEVELS], ids=lambda isa: isa.name)
def test_limits_are_compiled_for_every_level(isa):
    names, library = profile._probe(isa)
    assert {"bits", "float", "read"} <= {limit["name"] for limit in names} and library[:4] == b"\x7fELF"


def test_over_rpc(module):
    """The same rows from a board."""
    with farm() as (address, _):
        there = bnntvm.profile(module, bnntvm.connect(address, "test"), seconds=0.05)
    assert [(c.kernel, c.layer, c.macs, c.bytes) for c in there.calls] == [
        (c.kernel, c.layer, c.macs, c.bytes) for c in bnntvm.profile(module, seconds=0.05).calls
    ]
    assert there.place.startswith("test at")


def test_an_older_artefact(module):
    older = bnntvm.Module(module._file, {k: v for k, v in module._manifest.items() if k != "calls"})
    with pytest.raises(bnntvm.UnsupportedError, match="does not tell"):
        bnntvm.profile(older)
