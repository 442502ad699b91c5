"""Whole networks for GPUs, kernel by kernel in the emulator, beside this processor's and ONNX Runtime's golden results."""

import pathlib

import numpy as np
import pytest

import bnntvm
from tests.cuda.network import Network

DATA = pathlib.Path(__file__).with_name("data")
DIGITS = pathlib.Path(__file__).parents[2] / "tutorials" / "data" / "digits_bnn.onnx"
#: One for every way in which bits are multiplied: xor and and by warps, and by warpgroups, none.
TARGETS = ("sm_75", "sm_80", "sm_90a", "sm_120")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["exact_mlp", "exact_resnet"])
def test_exact_networks_give_the_same_bits(name, target):
    golden, network = np.load(DATA / f"{name}.npz"), Network(DATA / f"{name}.onnx", target)
    here = bnntvm.build(DATA / f"{name}.onnx", tuning=False)
    for kind in ("rand", "edge"):
        feed = {key.removeprefix(f"{kind}/in/"): golden[key] for key in golden if key.startswith(f"{kind}/in/")}
        got, expected = network.run(feed), here.run(feed)
        for output in expected:
            np.testing.assert_array_equal(got[output], expected[output])
            np.testing.assert_array_equal(got[output], golden[f"{kind}/out/{output}"])


def test_a_float_network_within_rounding():
    network, here = Network(DIGITS, "sm_90a"), bnntvm.build(DIGITS, tuning=False)
    feed = here.random_feed(batch=2)
    for name, expected in here.run(feed).items():
        np.testing.assert_allclose(network.run(feed)[name], expected, atol=1e-4)
