"""Exported networks against ONNX Runtime, and the files around them."""

import json

import numpy as np
import pytest

import bnntvm
from tests.c99.native import execute
from tests.fuzz.check import differences
from tests.fuzz.networks import generate
from tests.importer.helpers import reference


@pytest.mark.parametrize("seed", range(14))
def test_random_networks(seed, tmp_path):
    """Exact arithmetic of every kind of layer, bit for bit."""
    network = generate(seed)
    batch = next(iter(network.feed.values())).shape[0]
    status, outputs = execute(network.model, network.feed, tmp_path / "net", batch=batch)
    assert status == 0
    assert differences(outputs, reference(network.reference, network.feed)) is None
    sizes = json.loads((tmp_path / "net" / "size.json").read_text())
    assert sizes["workspace"] == sizes["lower_bound"]


def test_not_finite(tmp_path):
    """NaN and infinity are answered by a status, and leave the outputs alone."""
    network = generate(3)
    ((name, array),) = network.feed.items()
    for value in (np.nan, np.inf, -np.inf):
        bad = array.copy()
        bad.flat[-1] = value
        status, outputs = execute(network.model, {name: bad}, tmp_path / f"{value}", batch=array.shape[0])
        assert status == 1 and not any(out.any() for out in outputs)


def test_same_bytes(tmp_path):
    """The same model gives the same files."""
    network = generate(5)
    for name in "ab":
        bnntvm.export_c(network.model, tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) > 10
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


@pytest.mark.parametrize("name", ["", "1net", "a b", "while", "a-b", 7])
def test_bad_name(name, tmp_path):
    with pytest.raises(bnntvm.BnnError, match="no name for C"):
        bnntvm.export_c(generate(3).model, tmp_path / "net", name=name)


def test_folder_in_use(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(bnntvm.BnnError, match="not empty"):
        bnntvm.export_c(generate(3).model, tmp_path)
    with pytest.raises(bnntvm.BnnError, match="could not be written"):
        bnntvm.export_c(generate(3).model, tmp_path / "file")
