"""Data that candidates are checked on: what a network could hand to the kernel, and nothing else."""

import numpy as np
import pytest

from bnntvm.spec import BinaryConv2d, Window, store
from bnntvm.targets.x86 import LEVELS
from bnntvm.tuning import cases
from bnntvm.tuning.task import Operand, Task


@pytest.mark.parametrize(
    "channels, groups, dense", [(48, 2, False), (48, 6, True), (48, 3, True), (80, 2, False), (40, 1, False), (48, 1, True)]
)
@pytest.mark.parametrize("zeros", [False, True])
def test_bits_of_no_channel_are_zero(channels, groups, dense, zeros):
    """Groups begin with a word of their own or follow each other, in as many words for 2 x 24 channels either way."""
    spec = BinaryConv2d(
        Window(4, 4, (3, 3), (1, 1), (1, 1, 1, 1)), channels, 2 * groups, groups, False, zeros, store("int32", "int32"), dense
    )
    row = [1] * channels if dense else sum(([1] * (channels // groups) + [0] * (-(channels // groups) % 32) for _ in range(groups)), [])
    row += [0] * (-len(row) % 32)
    words = len(row) // 32
    bits = np.random.default_rng(1).random((2 * groups, 3, 3, 32 * -(-(channels // groups) // 32))) < 0.5
    bits[..., channels // groups :] = False
    weights = np.packbits(bits, axis=-1, bitorder="little").view(np.uint32)
    plane = Operand((1, 4, 4, words), "uint32")
    operands = (plane, Operand(weights.shape, "uint32", weights, True), *([plane] if zeros else []))
    task = Task("id", "key", "binary_conv2d", spec, LEVELS[-1], operands, (Operand((1, 4, 4, 2 * groups), "int32"),))
    arrays, _, (expected,) = cases.make(task)
    for array in [a for a in arrays if a is not None]:
        found = np.unpackbits(array.view(np.uint8), axis=-1, bitorder="little")
        assert not np.any(found & (1 - np.array(row, np.uint8)))
        assert found[..., np.array(row, bool)].any()
