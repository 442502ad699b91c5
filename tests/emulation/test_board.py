"""A 64-bit ARM board, emulated: networks built here run there, kernels are tuned there."""

import numpy as np
import pytest

import bnntvm
from benchmarks.layers import Layer
from bnntvm.tuning import records
from tests.bnntvm.remote.farm import farm

from .userland import Userland


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with farm([Userland(tmp_path_factory.mktemp("board")).python], "arm") as (address, _):
        yield address


def test_a_network_runs_there(address):
    """Bits of an integer network are those that this machine computes, whatever the batch."""
    model = Layer(32, 6).chain(2)
    here, board = bnntvm.build(model), bnntvm.connect(address, "arm")
    assert board.machine == "aarch64" and "asimd" in board.flags
    there = board.load(bnntvm.build(model, "aarch64"))
    for batch in (1, 3):
        feed = here.random_feed(batch, batch)
        expected = here.run(feed)
        for name, array in there.run(feed).items():
            np.testing.assert_array_equal(array, expected[name])
    assert there.benchmark(repeat=10).median_ms > 0
    with pytest.raises(bnntvm.TargetError, match="built for x86_64, the board .* is aarch64"):
        board.load(here)


def test_a_network_is_profiled_there(address):
    module = bnntvm.build(Layer(32, 6).chain(2), "aarch64")
    found = bnntvm.profile(module, bnntvm.connect(address, "arm"), seconds=0.1)
    assert [c.layer for c in found.calls if c.layer] == [layer.output for layer in module.report.layers]
    assert found.target == "aarch64" and all(c.time_us > 0 for c in found.calls) and 0 < found.limits["float"] < found.limits["bits"]


def test_a_layer_is_tuned_there(address, tmp_path):
    model = Layer(32, 6).chain(1).SerializeToString()
    result = bnntvm.tune(
        model, target="aarch64", trials=4, layers=["binary_conv2d"], database=tmp_path, rpc=address, key="arm", progress=False
    )
    assert (result.measured, result.failed) == (4, 0)
    found, bad = records.read(tmp_path)
    assert len({(r.task, r.schedule) for r in found}) == 4 and not bad
    assert bnntvm.build(model, "aarch64", tuning=str(tmp_path)).report.target == "aarch64"
