"""Build a network, compare it with ONNX Runtime, and say what became of its layers."""

import numpy as np

import bnntvm
from tests.importer.helpers import reference


def built(proto, feed, exact=True, **options):
    """Kinds of the layers by output name, and the module; the results equal ONNX Runtime's bit for bit, or to 1e-5 of the largest."""
    module = bnntvm.build(proto, threads=1, **options)
    for got, want in zip(module.run(feed).values(), reference(proto, feed)):
        if exact:
            np.testing.assert_array_equal(got, want)
        else:
            assert np.max(np.abs(got - want)) <= 1e-5 * np.max(np.abs(want))
    return {layer.output: layer.kind for layer in module.report.layers}, module


def eighths(rng, *shape, bound=4):
    """Multiples of 1/8, so that sums are exact."""
    return (rng.integers(-8 * bound, 8 * bound + 1, shape) / 8).astype(np.float32)
