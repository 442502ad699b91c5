"""How weights are stored that are not stored as the passes have them."""

import numpy as np

from bnntvm.bits import pack_bits


def bits_of_weights(spec, weights):
    """Weights int8[O, kh, kw, I] of :class:`bnntvm.spec.Int8Conv2d` as words of their bits, one plane for each."""
    digits = spec.weights
    codes = np.arange(2 ** len(digits.coefficients))
    values = digits.base + sum(c * (codes >> j & 1) for j, c in enumerate(digits.coefficients))
    order = np.argsort(values, kind="stable")
    code = codes[order][np.searchsorted(values[order], weights)]
    return np.stack([pack_bits(code >> j & 1 == 1) for j in range(len(digits.coefficients))])
