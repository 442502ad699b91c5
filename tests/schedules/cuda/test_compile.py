"""Kernels become machine code of every architecture, with the instructions that they are for and without local memory; no device needed."""

import re

import pytest

from bnntvm.schedules import families
from bnntvm.schedules.cuda import bit_pad, bit_pool, pack, planar_pack
from bnntvm.schedules.cuda.layers import Schedule
from bnntvm.spec import (
    BinaryConv2d,
    BinaryDense,
    BinaryMatmul,
    BitPad,
    BitPool,
    Map,
    PlanarPack,
    PlanesConv2d,
    PlanesDense,
    PlaneSum,
    Window,
    store,
)
from tests.schedules.cuda.compiler import compiled, needs_nvcc, source, usage
from tests.schedules.cuda.layers import LEVELS, NEWER
from tests.schedules.test_binary_conv2d import DOTS, SCALED, threshold
from tests.schedules.test_planar_pack import SIGN, TWO_PLANES

pytestmark = needs_nvcc
CONVOLUTION = BinaryConv2d(Window(56, 56, (3, 3), (1, 1), (1, 1, 1, 1)), 256, 256, epilogue=threshold("less"))
RESIDUAL = BinaryConv2d(Window(28, 28, (3, 3), (1, 1), (1, 1, 1, 1)), 128, 128, epilogue=SCALED)
DENSE = BinaryDense(4096, 4096, epilogue=DOTS)
PLANES = PlanesConv2d(
    Window(14, 14, (3, 3), (1, 1), (1, 1, 1, 1)), 256, 256, PlaneSum((1, 2), (1,), "unipolar", "bipolar"), epilogue=threshold("less")
)
BITS = BinaryDense(4096, 4096, epilogue=threshold("less"))
#: K fills less than a slab, of six pairs of planes.
SIX_PASSES = PlanesDense(300, 70, PlaneSum((1, 2, 4), (1, 2), "unipolar", "unipolar"), epilogue=store("int32", "int32"))
#: What an architecture's kernels are made of by default.
EXPECTED = {
    "sm_75": r"mma\.sync\.aligned\.m8n8k128\.row\.col\.s32\.b1\.b1\.s32\.xor\.popc",
    "sm_80": r"mma\.sync\.aligned\.m16n8k256\.row\.col\.s32\.b1\.b1\.s32\.and\.popc",
    "sm_86": r"mma\.sync\.aligned\.m16n8k256\.row\.col\.s32\.b1\.b1\.s32\.and\.popc",
    "sm_89": r"mma\.sync\.aligned\.m16n8k256\.row\.col\.s32\.b1\.b1\.s32\.and\.popc",
    "sm_90": r"mma\.sync\.aligned\.m16n8k256\.row\.col\.s32\.b1\.b1\.s32\.and\.popc",
    "sm_90a": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k256\.s32\.b1\.b1\.and\.popc",
}
#: Bytes of spills, stores and loads, that are no matter: a few values that live through the loop along K.
FEW = 128


def compile_default(spec, isa):
    family = families.of(spec, isa)
    return compiled(source(family.build(spec, family.default_schedule(spec, isa), isa), isa), isa.mcpu)


@pytest.mark.parametrize("arch", EXPECTED)
def test_tensor_cores_of_every_architecture(arch):
    ptx, log = compile_default(RESIDUAL, LEVELS[arch])
    assert re.search(EXPECTED[arch], ptx)
    others = [pattern for pattern in set(EXPECTED.values()) if pattern != EXPECTED[arch]]
    assert not any(re.search(pattern, ptx) for pattern in others)
    assert ("cp.async.c" in ptx) == (arch != "sm_75") and ("cp.async.bulk" in ptx) == (arch == "sm_90a")
    registers, spilled, _ = usage(log)
    assert registers <= 255 and spilled <= FEW


@pytest.mark.parametrize("spec, most", [
    pytest.param(CONVOLUTION, FEW, id="conv"), pytest.param(DENSE, FEW, id="dense"), pytest.param(BITS, FEW, id="bits"),
    pytest.param(PLANES, FEW, id="planes"), pytest.param(SIX_PASSES, 320, id="six_passes"),
])  # fmt: skip
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_hot_kernels_keep_their_registers(arch, spec, most):
    _, log = compile_default(spec, LEVELS[arch])
    _, spilled, _ = usage(log)
    assert spilled <= most, log
    assert "serialized" not in log and "setmaxnreg" not in log


@pytest.mark.parametrize("way, instruction", [
    (Schedule("wgmma", 128, 256, 64, 256, 128, 4, 1, False, 2), "multicast::cluster"),
    (Schedule("wgmma", 128, 256, 64, 256, 128, 4), "cp.async.bulk.shared::cluster.global"),
    (Schedule("wgmma", 64, 256, 64, 256, 128, 5, 1, True), "setmaxnreg.inc"),
], ids=["cluster", "together", "resident"])  # fmt: skip
def test_ways_of_warpgroups(way, instruction):
    isa = LEVELS["sm_90a"]
    family = families.of(DENSE, isa)
    assert way in family.space(DENSE, isa)
    ptx, log = compiled(source(family.build(DENSE, way, isa), isa), isa.mcpu)
    assert instruction in ptx and usage(log)[1] <= FEW
    # Four products of a full slab, and nothing that makes the compiler wait after each.
    assert ptx.count("wgmma.mma_async") == 4 and "serialized" not in log


def test_architectures_without_tensor_cores_for_bits():
    """What is newer than the table counts on CUDA cores. (The compiler may not know it yet: its code is that of an older one.)"""
    family = families.of(RESIDUAL, NEWER)
    ptx, _ = compiled(source(family.build(RESIDUAL, family.default_schedule(RESIDUAL, NEWER), NEWER), NEWER), "sm_80")
    assert "mma" not in ptx and "popc.b32" in ptx


@pytest.mark.parametrize("family, spec", [
    (pack, Map(2, (1, 1), 4096, "float16", SIGN)), (pack, Map(4, (7, 7), 70, "float32", TWO_PLANES)),
    (planar_pack, PlanarPack((28, 28), 70, TWO_PLANES)), (bit_pool, BitPool(Window(9, 9, (3, 3), (2, 2), (1, 1, 1, 1)), 70, "and")),
    (bit_pad, BitPad((9, 9), 3, (1, 1, 1, 1))),
], ids=["pack_half", "pack", "planar", "pool", "pad"])  # fmt: skip
def test_small_kernels(family, spec):
    isa = LEVELS["sm_80"]
    ptx, log = compiled(source(family.build(spec, family.default_schedule(spec, isa), isa), isa), "sm_80")
    assert usage(log)[1] == 0
    if family is pack:
        assert re.search(r"ld\.global(\.nc)?\.v4" if spec.channels % 32 == 0 else r"vote\.sync\.ballot", ptx)


def test_products_of_run_time_bits():
    spec = BinaryMatmul(64, 64, 64, 2, "bipolar", "ternary", scale=0.125)
    ptx, log = compile_default(spec, LEVELS["sm_80"])
    assert usage(log)[1] == 0 and "mma" not in ptx


@pytest.mark.parametrize("arch", EXPECTED)
def test_products_of_run_time_bits_on_tensor_cores(arch):
    """Scores of attention; signs times {0, 1} have sums of columns, and with xor of rows."""
    for right, scale in (("bipolar", 0.125), ("unipolar", None)):
        spec = BinaryMatmul(197, 197, 64, 2, "bipolar", right, scale=scale, turned=True)
        ptx, log = compile_default(spec, LEVELS[arch])
        assert re.search(EXPECTED[arch if arch != "sm_90a" else "sm_90"], ptx) and usage(log)[1] == 0


def test_no_product_is_contracted():
    """Scale, bias and residual: a multiplication and two additions, each rounded."""
    ptx, _ = compile_default(RESIDUAL, LEVELS["sm_80"])
    assert "mul.rn.f32" in ptx and "add.rn.f32" in ptx and "fma.rn.f32" not in ptx
