"""1x1 convolutions in tile registers with results in channel order, against numpy and beside the kernel that counts bits."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnntvm.schedules import binary_conv2d, tile_product
from bnntvm.spec import BinaryConv2d, Epilogue, EpilogueInput, Output, Step, Window
from bnntvm.targets import registry
from tests.schedules.machines import LEVELS as ISAS
from tests.schedules.test_binary_conv2d import check, operands

TILES = registry.resolve("x86-64-v4-amx")
RUNNABLE = [pytest.param(isa, id=isa.name) for isa in ISAS if isa.products == "tiles"] or [
    pytest.param(None, marks=pytest.mark.skip("no tile registers here"))
]

PLAIN = Epilogue(steps=(Step("cast", (0,)),), outputs=(Output("planar", 1),))
#: Scale, bias and PReLU of a channel; the sums themselves once more.
SCALED = Epilogue(
    (EpilogueInput("channel"), EpilogueInput("channel"), EpilogueInput("channel", "int32")),
    (Step("add", (0, 3), "int32"), Step("cast", (4,)), Step("multiply", (5, 1)), Step("add", (6, 2)), Step("prelu", (7, 1))),
    (Output("planar", 8),),
)


def conv(spatial, inputs, outputs, **more):
    return BinaryConv2d(Window(*spatial, (1, 1)), inputs, outputs, **more)


def schedules(spec):
    return [binary_conv2d.Schedule(p, v, tile_product.ADDER, r, 1) for p, v, r in tile_product.space(spec)]


@st.composite
def specs(draw):
    spatial = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    kind = draw(st.sampled_from([{}, {"unipolar": True}, {"zeros": True}]))
    inputs, outputs = draw(st.sampled_from([64, 128, 320, 512, 576])), draw(st.sampled_from([32, 64, 96, 256]))
    return conv(spatial, inputs, outputs, epilogue=draw(st.sampled_from([PLAIN, SCALED])), **kind)


@pytest.mark.parametrize("isa", RUNNABLE)
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(spec=specs(), seed=st.integers(0, 99), data=st.data())
def test_equals_numpy(isa, spec, seed, data):
    assert tile_product.claims(spec, isa)
    check(spec, isa, data.draw(st.sampled_from(schedules(spec))), batch=data.draw(st.sampled_from([1, 3])), seed=seed)


@pytest.mark.parametrize("isa", RUNNABLE)
def test_every_schedule_and_the_default(isa):
    spec = conv((14, 14), 256, 128, epilogue=PLAIN)
    assert binary_conv2d.default_schedule(spec, isa).adder == tile_product.ADDER
    found = schedules(spec)
    assert set(found) <= set(binary_conv2d.space(spec, isa))
    for schedule in {(s.pixels, s.vectors): s for s in found}.values():
        check(spec, isa, schedule, batch=1)


def test_what_is_claimed():
    spec = conv((14, 14), 512, 512, epilogue=PLAIN)
    assert tile_product.claims(spec, TILES) and tile_product.wins(spec, TILES)
    assert not tile_product.wins(conv((1, 1), 512, 512, epilogue=PLAIN), TILES)  # unpacking weights for one pixel
    stored = replace(PLAIN, outputs=(Output("tensor", 1),))
    strided, wider = Window(14, 14, (1, 1), (2, 2)), Window(14, 14, (3, 3), pads=(1, 1, 1, 1))
    others = [replace(spec, epilogue=stored), replace(spec, in_channels=96), replace(spec, out_channels=48), replace(spec, groups=2),
              replace(spec, window=strided), replace(spec, window=wider)]  # fmt: skip
    assert not any(tile_product.claims(other, TILES) for other in others)
    assert not tile_product.claims(spec, registry.resolve("x86-64-v4-vpopcnt"))


def test_weights_keep_their_size_and_order():
    spec = conv((3, 3), 128, 32, epilogue=PLAIN)
    (_, weights), _ = operands(spec, 1, np.random.default_rng(0), ())
    packed = tile_product.pack_weights(spec, weights)
    assert packed.nbytes == weights.nbytes
    rows = packed.reshape(2, 2, 16, 8)  # strips, steps, rows, bytes
    np.testing.assert_array_equal(rows[1, 1, 3].view("<u4"), weights[16 + 3, 0, 0, 2:4])


def test_the_loop_multiplies_and_spills_nothing():
    """Two by two tiles: four loads and four products, and what runs beside them uses no stack."""
    import tvm

    from bnntvm.build import tvm_target

    spec = conv((14, 14), 512, 512, epilogue=PLAIN)
    func = binary_conv2d.build(spec, binary_conv2d.default_schedule(spec, TILES), TILES).with_attr("global_symbol", "kernel")
    assembly = tvm.compile(tvm.IRModule({"kernel": func}), target=tvm_target(TILES)).mod.inspect_source("asm")
    loops = [b for b in re.split(r"\n(?=\.LBB\w+:)", assembly) if "tdpbssd" in b]
    assert {b.count("tdpbssd") for b in loops} == {4, 2}  # the last group has one tile of pixels
    assert all(b.count("tileload") == (4 if b.count("tdpbssd") == 4 else 3) for b in loops)
    stack = [line for line in assembly.splitlines() if re.search(r"vmov\w+\s+%zmm\d+, -?\d*\(%rsp", line)]
    assert not stack
