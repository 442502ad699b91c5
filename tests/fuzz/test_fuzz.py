"""Random networks: ONNX Runtime's results, bit for bit.

``BNNTVM_FUZZ_SEEDS`` sets how many seeds the passes are tried on (a tenth as many are compiled, a thirtieth for ARM); ``python -m
tests.fuzz`` tries any range.
"""

import os
from collections import Counter

import numpy as np
import pytest

from tests.fuzz.check import CHECKS, interpreted, minimise
from tests.fuzz.graphs import LAYERS
from tests.fuzz.networks import OPSETS, generate, named, parse_layers
from tests.fuzz.regressions import FOUND
from tests.importer.helpers import reference

SEEDS = int(os.environ.get("BNNTVM_FUZZ_SEEDS", 200))
#: Compiled networks are others than the interpreted ones.
FIRST_BUILT = 100_000


def passes(check, seed, layers=None):
    """Fail with the smallest network that shows the same."""
    failure = CHECKS[check](generate(seed, layers))
    if failure is None:
        return
    kept = minimise(seed, CHECKS[check], failure.kind) if layers is None else layers
    small = generate(seed, kept)
    lines = [str(CHECKS[check](small) or failure), *small.log]
    lines.append(f"python -m tests.fuzz --check {check} --seeds {seed}:{seed + 1} --layers {named(small)}")
    pytest.fail("\n".join(lines), pytrace=False)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_passes(seed):
    passes("interpreter", seed)


@pytest.mark.parametrize("seed", range(FIRST_BUILT, FIRST_BUILT + max(1, SEEDS // 10)))
def test_compiled_networks(seed):
    passes("build", seed)


@pytest.mark.parametrize("seed", range(FIRST_BUILT, FIRST_BUILT + max(3, SEEDS // 30)))
def test_networks_on_arm(seed):
    """Small ones, kernel by kernel under emulation: on 32 bits and on 64 with and without smmla, in turns."""
    passes("emulate", seed, [number for number in generate(seed).layers if number < 9])


@pytest.mark.parametrize("check, seed, layers", FOUND)
def test_what_failed_once(check, seed, layers):
    passes(check, seed, parse_layers(layers))


# ---- the fuzzer itself


def test_a_seed_tells_everything():
    one, two = generate(7), generate(7)
    assert one.model.SerializeToString() == two.model.SerializeToString()
    np.testing.assert_array_equal(one.feed["x"], two.feed["x"])


def test_any_subset_of_layers_is_a_network():
    layers = generate(11).layers
    for drop in layers:
        network = generate(11, [i for i in layers if i != drop])
        assert reference(network.reference, network.feed)[-1].dtype == np.float32
    assert generate(11, []).log == ()


def test_two_hundred_seeds_have_every_layer_and_many_binary_ones():
    networks = [generate(seed) for seed in range(200)]
    kinds = Counter(line.split()[1] for network in networks for line in network.log)
    assert set(kinds) == set(LAYERS)
    assert sum(len(network.binary) for network in networks) > 250
    assert {network.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param for network in networks} == {"", "N"}
    assert {network.model.opset_import[0].version for network in networks} == set(OPSETS)
    assert sum(len(network.low) for network in networks) > 100
    assert any(network.model.opset_import[1:] for network in networks), "no custom domain"


@pytest.mark.parametrize("bug", ["threshold", "flip", "parity"])
def test_planted_bugs_are_found(bug, monkeypatch):
    from bnntvm.passes import binarise, fold_thresholds

    if bug == "threshold":
        right = fold_thresholds.threshold_values
        monkeypatch.setattr(fold_thresholds, "threshold_values", lambda step, k, dtype: right(step, k, dtype) + np.asarray(1, dtype))
    elif bug == "flip":
        right = fold_thresholds.membership
        monkeypatch.setattr(fold_thresholds, "membership", lambda *args: (lambda terms, flip: (terms, ~flip))(*right(*args)))
    else:
        right = binarise._Binarise.common
        monkeypatch.setattr(binarise._Binarise, "common", lambda *args: right(*args[:-1], True))
    assert any(interpreted(generate(seed)) is not None for seed in range(40))
