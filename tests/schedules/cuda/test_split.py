"""K in parts: the blocks of a cluster share the steps of one tile; emulated, in several orders of blocks, against numpy."""

from dataclasses import replace

import numpy as np
import pytest

from bnntvm.schedules import families
from bnntvm.schedules.cuda import emulate, layers
from bnntvm.schedules.cuda.layer import Layer
from bnntvm.spec import BinaryConv2d, BinaryDense, PlanesConv2d, PlanesDense, PlaneSum, Window, store
from tests.schedules.cuda.compiler import compiled, needs_nvcc, source, usage
from tests.schedules.cuda.layers import LEVELS, check
from tests.schedules.test_binary_conv2d import DOTS, SCALED, threshold
from tests.schedules.test_bitserial_conv2d import TAILS

ISAS = [LEVELS["sm_90"], LEVELS["sm_90a"]]
ORDERS = (None, 0, 1, 2, 3)
SAME = (1, 1, 1, 1)
LAST = BinaryConv2d(Window(7, 7, (3, 3), (1, 1), SAME), 512, 512, epilogue=SCALED)
LONG = BinaryDense(25088, 512, epilogue=DOTS)
TERNARY, TWO_BITS = PlaneSum((1,), (1,), "bipolar", "ternary"), PlaneSum((1, 2), (1,), "unipolar", "bipolar")
SCALES = PlaneSum((1.0, 1.0), (1.0, 1.0), "bipolar", "bipolar", scaled=True)


def by_default(spec, isa):
    return families.of(spec, isa).default_schedule(spec, isa)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_which_layers_are_split(isa):
    """Few tiles, and at least two slabs for a block."""
    assert by_default(LAST, isa).split == 2
    assert by_default(LONG, isa).split == 8
    assert by_default(BinaryDense(4096, 1000), isa).split == 2
    assert by_default(BinaryDense(8192, 1000), isa).split == 4
    assert by_default(BinaryDense(8192, 4096), isa).split == 1  # 128 tiles for 132 multiprocessors
    assert by_default(BinaryDense(512, 64), isa).split == 1  # over in a slab
    assert by_default(replace(LAST, window=Window(56, 56, (3, 3), (1, 1), SAME)), isa).split == 1
    assert by_default(BinaryDense(8192, 1000), replace(isa, multiprocessors=70)).split == 2
    assert by_default(BinaryDense(8192, 1000), replace(isa, cluster=1)).split == 1


def parts(spec, isa):
    """``(most rows, blocks of a cluster)`` of the kernel that is split."""
    limit, own = layers._split_rows(Layer.of(spec), by_default(spec, isa), isa)
    return limit, own.split


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("spec, batch", [
    (LAST, 1), (LONG, 1), (LONG, 3), (replace(LONG, unipolar=True), 2), (BinaryDense(4100, 200, zeros=True, epilogue=threshold("less")), 5),
    (BinaryConv2d(Window(5, 6, (3, 3), (2, 2), SAME), 704, 192, 2, epilogue=SCALED), 2),
    (PlanesConv2d(Window(4, 5, (3, 3), (1, 1), SAME), 608, 70, TWO_BITS, epilogue=TAILS[1]), 1),
    (PlanesDense(6000, 130, TERNARY, epilogue=TAILS[0]), 2), (PlanesDense(4096, 64, SCALES, epilogue=store("float32")), 3),
], ids=["conv", "dense1", "dense3", "unipolar", "zeros", "groups", "w1a2", "ternary", "scaled"])  # fmt: skip
def test_every_order_of_blocks(isa, spec, batch):
    """Bit by bit the same, whichever block of a cluster is ahead."""
    limit, split = parts(spec, isa)
    assert split > 1 and batch * Layer.of(spec).out_pixels <= limit
    for order in ORDERS:
        check(spec, isa, batch=batch, seed=split, order=order)


@pytest.mark.parametrize("split", [2, 4, 8])
def test_every_split(split):
    """Also into parts of different length, of which some are empty."""
    isa = LEVELS["sm_90"]
    for spec in (BinaryDense(8192, 70, epilogue=DOTS), BinaryDense(1100, 40, epilogue=DOTS)):
        for chosen in (replace(by_default(spec, isa), split=split), replace(by_default(spec, isa), slab=64, split=split)):
            for order in ORDERS:
                check(spec, isa, chosen, batch=3, order=order)


def test_more_rows_take_the_whole_kernel():
    """On both sides of the limit."""
    isa = replace(LEVELS["sm_90a"], multiprocessors=20)
    spec = BinaryDense(4096, 64, epilogue=DOTS)
    limit, split = parts(spec, isa)
    family = families.of(spec, isa)
    function = family.build(spec, by_default(spec, isa), isa)
    for batch in (limit, limit + 1):
        check(spec, isa, batch=batch)
        (kernel,) = emulate._Program(function, _arrays(spec, isa, batch), False).launches
        assert (kernel.cluster == split) == (batch == limit)
    assert 0 < limit < 400


def _arrays(spec, isa, batch):
    weights = np.zeros((spec.out_features, spec.in_features // 32), np.uint32)
    packed = families.of(spec, isa).pack_weights(spec, by_default(spec, isa), isa, weights)
    return [np.zeros((batch, spec.in_features // 32), np.uint32), packed, np.zeros((batch, spec.out_features), np.int32)]


@needs_nvcc
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_machine_code(isa):
    """Blocks read each other's shared memory, and the registers suffice."""
    family = families.of(LAST, isa)
    ptx, log = compiled(source(family.build(LAST, by_default(LAST, isa), isa), isa), isa.mcpu)
    assert "ld.shared::cluster" in ptx and "mapa.shared::cluster" in ptx
    assert usage(log)[1] == 0 and "Error" not in log
