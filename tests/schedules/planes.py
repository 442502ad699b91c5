"""Random planes for tests of bit-serial kernels."""

import numpy as np
from hypothesis import strategies as st

from bnntvm.schedules import epilogue
from bnntvm.spec import WORD_BITS, PlaneSum, words

KINDS = [(data, weights) for data in ("bipolar", "unipolar") for weights in ("bipolar", "unipolar", "ternary")]


@st.composite
def plane_sums(draw):
    """Up to four planes a side; a third are scaled by floats."""
    data, weights = draw(st.sampled_from(KINDS))
    if draw(st.integers(0, 3)) == 0:
        return PlaneSum((1,) * draw(st.integers(1, 3)), (1,) * draw(st.integers(1, 3)), data, weights, True)
    coefficients = st.sampled_from([(1,), (1,), (1, 2), (1, -2), (1, 1), (1, 2, -4), (2, 1, 8, 4), (-1, 2)])
    return PlaneSum(draw(coefficients), draw(coefficients), data, weights)


def data_plane(rng, shape):
    return rng.random(shape) < 0.5


def weight_planes(rng, planes, shape):
    """``uint32[Q', ..., words]`` of random weights of ``shape``."""
    found = []
    for _ in planes.weights:
        bits = rng.random(shape) < 0.5
        mask = rng.random(shape) < 0.6
        found += [bits & mask, mask] if planes.weight_kind == "ternary" else [bits]
    return epilogue.pack(np.stack(found))


def scales(rng, planes, outputs):
    """The operand of scaled planes, in a list."""
    if not planes.scaled:
        return []
    array = np.zeros((len(planes.data) * len(planes.weights), words(outputs) * WORD_BITS), np.float32)
    array[:, :outputs] = rng.standard_normal((len(array), outputs))
    return [array]
