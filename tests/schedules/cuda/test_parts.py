"""K in parts that meet in memory: two kernels, emulated with the blocks in several orders, against numpy; and when that is the default."""

from dataclasses import replace

import pytest

from bnntvm.schedules import families
from bnntvm.schedules.cuda import emulate, layers, simt
from bnntvm.schedules.cuda.layer import Layer
from bnntvm.spec import BinaryConv2d, BinaryDense, BinaryMatmul, PlanesConv2d, PlanesDense, PlaneSum, Window, store, words
from tests.schedules.cuda.compiler import compiled, needs_nvcc, source
from tests.schedules.cuda.layers import LEVELS, check
from tests.schedules.cuda.test_matmul import check as check_product
from tests.schedules.cuda.test_split import LAST, LONG, SAME, SCALES, TERNARY, TWO_BITS, by_default
from tests.schedules.test_binary_conv2d import DOTS, SCALED, threshold
from tests.schedules.test_bitserial_conv2d import TAILS

#: xor and and, without clusters; in the place of a cluster.
ISAS = [LEVELS[name] for name in ("sm_75", "sm_80", "sm_90a")]
OLDER = [LEVELS[name] for name in ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89")]
SMALL = BinaryDense(2100, 70, epilogue=DOTS)
SIX_PAIRS = PlaneSum((1, 2, 4), (1, 2), "unipolar", "unipolar")


def in_memory(spec, isa):
    """The schedules whose parts meet in memory, the most parts first."""
    found = [s for s in families.of(spec, isa).space(spec, isa) if s.in_memory]
    return sorted(found, key=lambda s: -s.split)


def limit_of(spec, isa, schedule):
    return layers._split_rows(Layer.of(spec), schedule, isa)[0]


@pytest.mark.parametrize("isa", OLDER, ids=lambda isa: isa.name)
def test_the_default(isa):
    """Where a block is spared more steps than a launch takes; the small tile alone serves a shorter K."""
    expected = {
        LONG: (6, True),  # 25 slabs, 16 tiles
        LAST: (1, False),  # 5 slabs, 32 tiles
        PlanesConv2d(LAST.window, 512, 512, SIX_PAIRS, epilogue=TAILS[1]): (1, False) if isa.operation == "xor" else (2, True),
        BinaryDense(4096, 4096): (1, False),  # 128 tiles: no multiprocessor is idle
        BinaryDense(25088, 64): (12, True),  # two slabs in each part
    }
    for spec, chosen in expected.items():
        schedule = by_default(spec, isa)
        assert (schedule.split, schedule.in_memory) == chosen, spec
        assert schedule.engine != layers.MMA or schedule.few == 32
    assert in_memory(LAST, isa)  # to be tried all the same
    assert not in_memory(BinaryDense(512, 64), isa)


@pytest.mark.parametrize("isa", [LEVELS["sm_90"], LEVELS["sm_90a"]], ids=lambda isa: isa.name)
def test_clusters_come_first(isa):
    for spec in (LAST, LONG):
        assert by_default(spec, isa).split > 1 and not by_default(spec, isa).in_memory and in_memory(spec, isa)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("spec, batch", [
    (SMALL, 1), (SMALL, 33), (replace(SMALL, unipolar=True), 3), (BinaryDense(4100, 100, zeros=True, epilogue=threshold("less")), 5),
    (BinaryConv2d(Window(5, 6, (3, 3), (2, 2), SAME), 704, 192, 2, epilogue=SCALED), 2),
    (PlanesConv2d(Window(4, 5, (3, 3), (1, 1), SAME), 608, 70, TWO_BITS, epilogue=TAILS[1]), 1),
    (PlanesDense(6000, 130, TERNARY, epilogue=TAILS[0]), 2), (PlanesDense(4096, 64, SCALES, epilogue=store("float32")), 3),
], ids=["dense1", "dense33", "unipolar", "zeros", "groups", "w1a2", "ternary", "scaled"])  # fmt: skip
def test_every_order_of_blocks(isa, spec, batch):
    """Bit by bit the same; no block touches what another one of its launch writes; nothing is read that was not left."""
    schedules = in_memory(spec, isa)
    if not schedules:  # a tensor core that counts by xor cannot do without the signs: CUDA cores count, all of K
        assert isa.operation == "xor" and by_default(spec, isa).engine == "cores"
        return
    assert batch * Layer.of(spec).out_pixels <= limit_of(spec, isa, schedules[0])
    for order in (None, 0, 1):
        check(spec, isa, schedules[0], batch=batch, seed=order or 5, order=order)


@pytest.mark.parametrize("parts", [2, 3, 6, 16])
def test_every_number_of_parts(parts):
    """Also into parts of different length, of which some are empty."""
    isa = LEVELS["sm_80"]
    for slab in (64, 128):
        check(SMALL, isa, replace(in_memory(SMALL, isa)[0], split=parts, slab=slab), batch=3, order=parts)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize(
    "left, right, shared", [("bipolar", "bipolar", False), ("unipolar", "ternary", True), ("ternary", "bipolar", False)]
)
def test_products_of_activations(isa, left, right, shared):
    spec = BinaryMatmul(40, 36, 4090, 128, left, right, shared, 0.125, True)
    schedules = in_memory(spec, isa)
    if not schedules:
        assert isa.operation == "xor" and "ternary" in (left, right)
        return
    for order in (None, 1):
        check_product(spec, isa, schedules[0], order=order)


@pytest.mark.parametrize("spec", [SMALL, BinaryMatmul(40, 36, 4090, 128, turned=True)], ids=["dense", "product"])
def test_more_rows_take_the_whole_kernel(spec):
    """On both sides of the limit; behind it one kernel runs, and no workspace is used."""
    isa = replace(LEVELS["sm_80"], multiprocessors=20)
    schedule = next(s for s in in_memory(spec, isa) if not s.few)
    limit, each = limit_of(spec, isa, schedule), getattr(spec, "rows", 1)
    function = families.of(spec, isa).build(spec, schedule, isa)
    for batch, kernels in ((limit // each, 2), (limit // each + 1, 1)):
        (check_product if each > 1 else check)(spec, isa, schedule, batch)
        shapes = [(tuple(getattr(d, "value", batch) for d in b.shape), str(b.dtype)) for b in function.params]
        assert emulate.launches(function, shapes) == kernels
    assert 0 < limit < 500


def test_few_rows_without_parts():
    """The small tile, on both sides of where it ends."""
    isa = replace(LEVELS["sm_80"], multiprocessors=4)
    spec = BinaryDense(300, 70, epilogue=DOTS)
    schedule = by_default(spec, isa)
    limit, _ = layers._few_rows(Layer.of(spec), schedule, isa)
    assert schedule.few == 32 and schedule.split == 1 and 0 < limit < 500
    for batch in (1, limit, limit + 1):
        check(spec, isa, schedule, batch=batch)


def test_workspace():
    """As large as what is left in it, for any batch: all rows up to the limit, all words of channels, parts and products."""
    isa = LEVELS["sm_80"]
    spec = PlanesDense(4096, 70, SCALES, epilogue=store("float32"))
    schedule = in_memory(spec, isa)[0]
    size, dtype = simt.workspace(families.of(spec, isa).build(spec, schedule, isa))
    assert (size, dtype) == (4 * schedule.split * limit_of(spec, isa, schedule) * 32 * words(70), "int32")
    assert simt.workspace(families.of(spec, isa).build(spec, replace(schedule, split=1, in_memory=False), isa)) is None


@needs_nvcc
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_machine_code(isa):
    """Parts, their sums, the small tile, the whole kernel. The first has no results, the second no data, neither waits for others."""
    code = source(families.of(LONG, isa).build(LONG, in_memory(LONG, isa)[0], isa), isa)
    ptx, log = compiled(code, isa.mcpu)
    assert log.count("Compiling entry function") == 4 and "Error" not in log
    first, second = ([p.split()[-1] for p in kernel.split(")", 1)[0].split(",")] for kernel in
                     (code.split("binary_dense_kernel(")[-1], code.split("binary_dense_kernel_1(")[-1]))  # fmt: skip
    assert first == ["parts_ptr", "w_ptr", "x0_ptr", "n"] and second == ["parts_ptr", "w_ptr", "y0_ptr", "n"]
    assert "atom." not in ptx and "membar" not in ptx
