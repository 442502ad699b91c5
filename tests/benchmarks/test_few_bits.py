"""The models of few-bit layers are what the table says they are."""

import numpy as np
import onnxruntime
import pytest

from benchmarks.few_bits import FewBits


def run(model, x):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"input": x})[0]


@pytest.mark.parametrize("weights, activations, levels", [("1", 2, 2), ("2", 2, 4), ("t", 1, 3)])
def test_chain_quantises_what_the_plain_layer_is_given(weights, activations, levels):
    layer = FewBits(weights, activations, 5, 40)
    bare = run(layer.plain(), layer.input(quantised=True))
    one, two = run(layer.chain(1), layer.input()), run(layer.chain(2), layer.input())
    assert len(np.unique(layer._weights(0))) == levels and len(np.unique(layer.input(quantised=True))) == 2**activations
    # One scale for all channels, then a shift for each: the differences between pixels are in one ratio.
    moved, change = bare - bare[..., :1, :1], one - one[..., :1, :1]
    ratio = change[np.abs(moved) > 0.1] / moved[np.abs(moved) > 0.1]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)
    assert two.shape == one.shape and np.std(two) > 0.05
