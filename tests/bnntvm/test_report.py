"""The report: one line per layer, readable, complete."""

import json

import pytest

from bnntvm.report import WIDTH, Layer, Report, human_bytes

from .conftest import LAYERS, manifest


def _report(layers, **changes):
    return Report.from_manifest(manifest([], [], layers=layers, **changes))


def test_layers_are_data():
    layer = _report(LAYERS).layers[0]
    assert layer == Layer("conv1", "c1", "Conv", "binary", "", "binary_conv2d_0", 1_000_000, 1_000, 32_000, "1x1")
    with pytest.raises(AttributeError):
        layer.kind = "float"


def test_fields_of_later_versions_are_ignored_and_missing_ones_empty():
    layer = Layer.from_dict({"node": "n", "output": "o", "op": "Gemm", "kind": "float", "colour": "red"})
    assert (layer.reason, layer.macs, layer.planes) == ("", 0, "")


def test_text_has_one_line_per_layer_and_the_totals():
    lines = str(_report(LAYERS)).splitlines()
    assert sum(line.startswith(("conv1 ", "fc ")) for line in lines) == 2
    line = next(line for line in lines if line.startswith("conv1"))
    assert line.split() == ["conv1", "Conv", "binary", "1x1", "1", "M", "32", "kB", "1", "kB", "binary_conv2d_0"]
    assert next(line for line in lines if line.startswith("fc")).endswith("its weights take 300 levels")
    assert "1 of 2 layers on low bits, 100.0% of 1 M MACs" in lines  # 500 of 1,000,500 are not
    assert "weights 34 kB in float32, 3 kB stored (11.3x smaller)" in lines
    assert "constants 3 kB, code 20 kB, workspace 4.1 kB at batch 1, target x86-64-v2" in lines


def test_long_names_and_reasons_stay_on_one_line_and_reasons_are_told_in_full():
    reason = "weights are two-level in all but 17 of 36864 entries, which weight_tolerance=0 does not forgive; " * 2
    layers = [LAYERS[1] | {"node": f"/features/very/long/name/of/a/layer/{i}/Conv", "reason": reason} for i in range(5)]
    text = str(_report(layers))
    table, _, rest = text.partition("why not on bits, in full:")
    assert [line.split()[0][-6:] for line in table.splitlines() if line.startswith("...")] == [f"{i}/Conv" for i in range(5)]
    assert all(len(line) <= WIDTH for line in table.splitlines())
    assert " ".join(reason.split()) in rest and "and 2 more" in rest


def test_names_are_shown_as_they_are():
    text = str(_report([LAYERS[0] | {"node": "[bold]x[/bold]\x1b[31m\n[link=y]"}]))
    assert "[bold]x[/bold]?[31m [link=y]" in text.splitlines()[2] and "\x1b" not in text


def test_a_network_without_low_bit_layers_says_so():
    assert "no low-bit layer found" in str(_report([LAYERS[1]]))
    assert "no low-bit layer found" in str(_report([]))
    assert "no low-bit layer found" not in str(_report(LAYERS))


def test_options_that_change_results_are_told():
    text = str(_report(LAYERS, options={"assume_nonzero": True, "weight_tolerance": 0.01}))
    assert "assume_nonzero" in text and "weight_tolerance 0.01" in text
    assert "assume_nonzero" not in str(_report(LAYERS, options={"assume_nonzero": False, "weight_tolerance": 0.0}))


def test_json():
    plain = json.loads(json.dumps(_report(LAYERS).as_dict()))
    assert plain["layers"] == LAYERS and plain["constants_bytes"] == 3_000 and plain["target"] == "x86-64-v2"


@pytest.mark.parametrize(
    "count, text", [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (4_234_567, "4.23 MB"), (5e12, "5e+03 GB")]
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text
