"""Random packed weights of every coding, for the tests of the families that read them."""

import numpy as np

from bnntvm import spec as specs
from bnntvm.bits import pack_bits
from tests.schedules.float_kernels import RUNNABLE, small_integers

#: The best instruction-set level for each width of vectors: the kernels of float data differ by nothing else.
WIDTHS = list({isa.lanes: isa for isa in reversed(RUNNABLE)}.values())[::-1]

CODINGS = [
    specs.WeightCoding("sign", 1), specs.WeightCoding("ternary", 2), specs.WeightCoding("levels", 1), specs.WeightCoding("levels", 2),
    specs.WeightCoding("levels", 2, offset=True),
]  # fmt: skip


def random_weights(rng, coding, shape):
    """Planes that share no bit, packed along the last axis, and the levels (padded) if the coding has them.

    Returns
    -------
    (uint32 [planes, *shape[:-1], words], list of float32 [planes + 1, words(O) * 32])
    """
    chosen = rng.integers(0, coding.planes + 1, shape)
    planes = pack_bits(np.stack([chosen == p + 1 for p in range(coding.planes)]))
    if coding.kind != "levels":
        return planes, []
    levels = np.zeros((coding.planes + 1, specs.words(shape[0]) * 32), np.float32)
    levels[:, : shape[0]] = small_integers(rng, (coding.planes + 1, shape[0]), -3, 3)
    levels[0] *= coding.offset
    return planes, [levels]
