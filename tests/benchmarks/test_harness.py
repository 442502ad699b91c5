"""The harness: what it computes from samples, how it treats systems that fail, and one small run from end to end."""

import json

import numpy as np
import onnx
import onnxruntime  # noqa: F401
import pytest

import bnntvm
from benchmarks import limit, report, run  # noqa: E402
from benchmarks.attention import Attention  # noqa: E402
from benchmarks.layers import Layer  # noqa: E402
from benchmarks.packed_weights import PackedLayer  # noqa: E402
from benchmarks.peers import prepare_ort, prepare_ort_u8s8  # noqa: E402
from benchmarks.worker import Worker, WorkerError  # noqa: E402


def cell(*seconds, failure="", macs=0, difference=None):
    return {"seconds": list(seconds), "failure": failure, "note": "", "difference": difference, "prepare_seconds": 0.0, "macs": macs}


def content(*rows):
    facts = {"date": "today", "cpu": "a cpu", "cpu family/model/stepping": "1/2/3", "cores of the host": 2, "cores used": [1]}
    return {"environment": facts | {"load at start": 0.0, "rounds": 3, "python": "3", "versions": {"x": "1"}}, "rows": list(rows)}


def test_network_table_has_ratios_and_geometric_mean():
    rows = [
        {"kind": "network", "name": n, "macs": 1, "cells": {"bnntvm": cell(a), "ort": cell(b), "openvino": cell(c)}}
        for n, a, b, c in (("first", 1e-3, 10e-3, 2e-3), ("second", 1e-3, 40e-3, 8e-3))
    ]
    text = report.markdown(content(*rows))
    assert "| first | 1.00 ± 0.00 | 10.00 ± 0.00 | 2.00 ± 0.00 | 2.00x | 10.00x | 5.00x |" in text
    assert "| **geometric mean** |  |  |  | 4.00x | 20.00x | 5.00x |" in text


def test_chain_table_is_relative_to_the_limit():
    # 1e6 MACs in 1 ms is the limit's rate: a layer of 2e6 MACs has 2 ms.
    row = {"kind": "chain", "name": "layer", "macs": 2_000_000, "cells": {"bnntvm": cell(2.5e-3), "limit": cell(1e-3, macs=1_000_000)}}
    text = report.markdown(content(row))
    assert "| layer | 2500.0 ± 0.0 | 2000.0 | 80.0 % |" in text


def test_networks_stand_beside_the_limit_of_all_their_kernels():
    cells = {"bnntvm": cell(2e-3), "default": cell(4e-3) | {"limit_seconds": 1e-3}}
    text = report.markdown(content({"kind": "network", "name": "net", "macs": 1, "cells": cells}))
    assert "| net | 2.00 ± 0.00 | 4.00 ± 0.00 | 1.00 | 25 % | 50 % | 2.00x |" in text


def test_weights_table_is_relative_to_reading_them():
    cells = {"bnntvm": cell(3e-4) | {"note": "0 of 1 layers on bits, 2.00 bits a weight"}}
    cells |= {"ort": cell(3e-3), "ort-2bit": cell(6e-4), "stream": cell(2e-4)}
    text = report.markdown(content({"kind": "weights", "name": "layer", "macs": 1, "cells": cells}))
    assert "| layer | 300 ± 0 | 3000 ± 0 | 600 ± 0 | 200 ± 0 | 10.00x | 2.00x | 1.50x | 2.00 bits a weight |" in text


@pytest.mark.parametrize("bits", [1, 2])
def test_packed_layers_are_what_they_say(bits):
    layer = PackedLayer(bits, 128, 192)
    module = bnntvm.build(layer.model())
    (only,) = module.report.layers
    assert only.kind == "weight-only" and only.weight_bytes == layer.macs * bits / 8
    want = prepare_ort(layer.model(), {"input": layer.input()}, 1).outputs[0]
    np.testing.assert_allclose(module.run({"input": layer.input()})["output"], want, rtol=0, atol=1e-4 * np.abs(want).max())
    onnx.checker.check_model(layer.two_bits())


def test_attention_is_what_it_says():
    layer = Attention(2, 5, 40)
    module = bnntvm.build(layer.model())
    assert [item.kind for item in module.report.layers] == ["binary"]
    want = prepare_ort(layer.model(signs=False), layer.feed(signs=True), 1).outputs[0]
    np.testing.assert_array_equal(module.run(layer.feed())["scores"], want)


def test_failures_and_missing_systems_are_remarks():
    cells = {
        "bnntvm": cell(failure="UnsupportedError: no such operator"),
        "openvino": cell(failure="ModuleNotFoundError: No module named 'openvino'"),
        "ort": cell(1.0, difference=0.0),
    }
    text = report.markdown(content({"kind": "network", "name": "net", "macs": 1, "cells": cells}))
    assert "| net | failed |" in text
    assert "network net, bnntvm: UnsupportedError: no such operator" in text
    assert "OpenVINO binary was left out" in text


def test_chain_figure_is_the_difference_of_two_lengths():
    jobs = [run.Job(b"", {}, -1 / 3), run.Job(b"", {}, 1 / 3)]

    class Fixed:
        def measure(self, key, repeats):
            return {"0": (0.0, 2.0), "1": (0.0, 5.0)}[key]

    figures = run.Cell()
    run.Bench._sample(figures, Fixed(), jobs, [1, 1], wall=False)
    assert figures.seconds == [pytest.approx(1.0)]


def test_worker_survives_a_model_that_fails():
    layer = Layer(32, 4)
    worker = Worker("ort", sorted(run.choose_cores(None))[:1])
    try:
        with pytest.raises(WorkerError, match="\\w+: "):
            worker.prepare("bad", layer.plain().SerializeToString(), {"wrong": layer.input()})
        ready = worker.prepare("good", layer.plain().SerializeToString(), {"input": layer.input()})
        assert ready.outputs[0].shape == layer.input_shape
        wall, cpu = worker.measure("good", 10)
        assert wall > 0 and cpu > 0
    finally:
        worker.close()


def test_worker_reports_a_process_that_dies():
    worker = Worker("ort", sorted(run.choose_cores(None))[:1])
    try:
        layer = Layer(32, 4)
        worker.prepare("0", layer.plain().SerializeToString(), {"input": layer.input()})
        worker._process.kill()
        with pytest.raises(WorkerError, match="SIGKILL"):
            worker.measure("0", 1)
        worker.prepare("0", layer.plain().SerializeToString(), {"input": layer.input()})
    finally:
        worker.close()


def test_u8s8_is_really_quantised():
    layer = Layer(64, 8)
    feed = {"input": layer.input(binary=True)}
    expected = prepare_ort(layer.plain(), feed, 1).outputs[0]
    actual = prepare_ort_u8s8(layer.plain(), feed, 1).outputs[0]
    error = np.abs(actual - expected).max()
    assert 0 < error < 0.05 * np.abs(expected).max()


def test_plain_layer_computes_the_binary_one():
    layer = Layer(64, 8)
    binary = prepare_ort(layer.binary(), {"input": layer.input()}, 1).outputs[0]
    plain = prepare_ort(layer.plain(), {"input": layer.input(binary=True)}, 1).outputs[0]
    np.testing.assert_array_equal(binary, plain)


@pytest.mark.parametrize("build, instructions", [(limit.xor_popcount, 3), (limit.fma, 1)])
def test_limit_kernels_stay_in_registers(build, instructions):
    kernel = build()
    loop = kernel.inner_loop()
    vector = {op: n for op, n in loop.items() if op.startswith("v")}
    if "vpopcntq" in vector or build is limit.fma:
        assert len(vector) == instructions
        assert set(vector.values()) <= {limit.ACCUMULATORS * k for k in range(1, 9)}
    assert kernel.macs_per_second(0.01) > 1e9


def test_run_from_end_to_end(tmp_path):
    arguments = ["--layers", "--only", "7x7x512", "--systems", "ort,openvino,limit", "--quick", "--rounds", "2", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [r["kind"] for r in rows] == ["layer", "chain"]
    assert all(len(c["seconds"]) == 2 or c["failure"] for r in rows for c in r["cells"].values())
    assert "3x3 7x7x512" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "results.png").stat().st_size > 1000


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        run.parse(["--networks", "resnet50"])
    assert "resnet50" in capsys.readouterr().err
