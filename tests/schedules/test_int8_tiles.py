"""Convolutions on tile registers (AMX) against numpy: how images are cut, weights that are unpacked once or for each group, planes."""

import numpy as np
import pytest
import tvm
import tvm_ffi
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from bnntvm.build import tvm_target
from bnntvm.schedules import int8_conv2d
from bnntvm.schedules.int8_layout import Layout
from bnntvm.schedules.int8_tiling import MOST_TILES, TILE, Tiling
from bnntvm.spec import Digits, Epilogue, EpilogueInput, Int8Conv2d, Output, Step, Window, store
from bnntvm.targets.x86 import LEVELS, host_flags, permitted
from tests.schedules.kernels import epilogue_inputs, thresholds
from tests.schedules.test_int8_conv2d import operands

AMX = LEVELS[0]
runnable = pytest.mark.skipif(not (AMX.needs <= host_flags() and permitted(AMX)), reason="no tile registers here")
PLANAR = Epilogue(
    (EpilogueInput("channel"), EpilogueInput("image")),
    (Step("cast", (0,)), Step("multiply", (3, 1)), Step("add", (4, 2)), Step("prelu", (5, 0.25))),
    (Output("planar", 6),),
)
ONE_BIT, TWO_BITS = Digits(1, (-2,)), Digits(0, (1, 2))
GUARD = 64


def image(height, width, kernel=3, stride=1):
    return Window(height, width, (kernel, kernel), (stride, stride), (kernel // 2,) * 4)


@st.composite
def convolutions(draw):
    window = image(draw(st.integers(1, 20)), draw(st.integers(1, 50)), draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 1, 2])))
    channels, outputs = draw(st.sampled_from([32, 64, 72, 160])), draw(st.sampled_from([16, 32, 45, 64, 100]))
    tail = draw(st.sampled_from([PLANAR, PLANAR, store("float32", "int32"), thresholds("less")]))
    return Int8Conv2d(window, channels, outputs, draw(st.sampled_from([ONE_BIT, TWO_BITS, "uint8"])), ONE_BIT, tail)


def outputs_of(spec, batch):
    """Zeroed results in the middle of guarded memory: (memory, result) for each."""
    found = []
    for output in spec.epilogue.outputs:
        height, width, channels = spec.window.out_height, spec.window.out_width, spec.out_channels
        shape = {"planar": (batch, channels, height, width), "tensor": (batch, height, width, channels)}.get(
            output.kind, (batch, height, width, -(-channels // 32))
        )
        memory = np.full(int(np.prod(shape)) + 2 * GUARD, 77, "uint32" if output.kind == "bits" else output.dtype)
        found.append((memory, memory[GUARD:-GUARD].reshape(shape)))
    return found


@runnable
@settings(max_examples=14, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(spec=convolutions(), cover=st.integers(1, MOST_TILES), tasks=st.tuples(st.integers(1, 9), st.integers(1, 3)))
@example(Int8Conv2d(image(16, 28), 64, 64, ONE_BIT, ONE_BIT, PLANAR), 2, (16, 2))  # weights kept for many groups, aligned planes
@example(Int8Conv2d(image(7, 7), 128, 33, ONE_BIT, ONE_BIT, PLANAR), 6, (1, 1))  # flat pixels, a second block of one channel
@example(Int8Conv2d(image(20, 30), 72, 32, TWO_BITS, ONE_BIT, store("float32", "int32")), 1, (40, 1))  # kept, and a step that is not full
def test_equals_the_reference(spec, cover, tasks):
    """Bit for bit, and nothing beside the results is written."""
    batch, rng = 2, np.random.default_rng(0)
    schedule = int8_conv2d.Schedule(cover * TILE, *tasks)
    plain, at = operands(spec, batch, rng)
    inputs = epilogue_inputs(rng, spec.epilogue, spec.out_channels, (batch, spec.window.out_height, spec.window.out_width), spread=50)
    wanted = int8_conv2d.reference(spec, plain, inputs)
    plain[at] = int8_conv2d.pack_weights(spec, schedule, AMX, plain[at])
    func = int8_conv2d.build(spec, schedule, AMX).with_attr("global_symbol", "kernel")
    kernel = tvm.compile(tvm.IRModule({"kernel": func}), target=tvm_target(AMX))
    results = outputs_of(spec, batch)
    kernel["kernel"](*(tvm_ffi.from_dlpack(a) for a in (*plain, *inputs, *(result for _, result in results))))
    for (memory, result), want in zip(results, wanted, strict=True):
        np.testing.assert_array_equal(result, want)
        assert (memory[:GUARD] == 77).all() and (memory[-GUARD:] == 77).all()


@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from([1, 3, 5]), st.integers(1, 2), st.integers(1, MOST_TILES))
def test_tiles_cover_every_pixel(height, width, kernel, stride, most):
    """Of the result, with at most 16 each, and groups have all tiles."""
    window = image(height, width, kernel, stride)
    layout = Layout(window, 64, 64, TILE)
    tiling = Tiling.of(layout)
    assert 1 <= tiling.rows <= TILE
    if tiling.along:
        assert (
            tiling.along * tiling.rows >= tiling.line >= tiling.rows and tiling.lines * tiling.line == window.out_height * window.out_width
        )
    else:
        assert tiling.tiles * tiling.rows >= layout.flat
    groups, large, large_groups = tiling.groups(most)
    assert large <= most and 1 <= large_groups <= groups
    assert large_groups * large + (groups - large_groups) * (large - 1) == tiling.tiles


def test_pixels_of_their_own_are_not_stored_in_channel_order():
    """Vectors of a plane hold many pixels of one channel: an operand that differs from pixel to pixel would have to be transposed."""
    tail = Epilogue((EpilogueInput("tensor"),), (Step("cast", (0,)), Step("add", (2, 1))), (Output("tensor", 3),))
    spec = Int8Conv2d(image(8, 8), 64, 64, ONE_BIT, ONE_BIT, tail)
    assert not int8_conv2d.stores_planar(spec, AMX)
    assert int8_conv2d.stores_planar(spec, LEVELS[1])
