"""The packed binary convolution against numpy: shapes, strides, pads, dilations, groups, planes, schedules and all ISA levels."""

import random
from dataclasses import replace

import numpy as np
import pytest
import tvm
import tvm_ffi
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from bnntvm.schedules import binary_conv2d, epilogue
from bnntvm.schedules.binary_conv2d_kernel import Merged
from bnntvm.spec import BinaryConv2d, Epilogue, EpilogueInput, Output, Step, Window, store
from bnntvm.targets.x86 import LEVELS
from tests.schedules.machines import LEVELS as ISAS
from tests.schedules.machines import execute, program
from tests.schedules.test_epilogue import Program, everything_finite

BEST, WORST = ISAS[0], ISAS[-1]

DOTS = store("int32", "int32")


def threshold(op):
    """Packed bits of a comparison with one integer for each channel."""
    return Epilogue((EpilogueInput("channel", "int32"),), (Step(op, (0, 1), "bool"),), (Output("bits", 2),))


#: Dot products and bits; the thresholds are used twice, rounded in different directions.
TWICE = Epilogue(
    (EpilogueInput("channel", "int32"),),
    (Step("less", (0, 1), "bool"), Step("greater", (0, 1), "bool")),
    (Output("bits", 2), Output("bits", 3)),
)
SCALED = Epilogue(
    (EpilogueInput("channel"), EpilogueInput("channel"), EpilogueInput("tensor"), EpilogueInput("words", "uint32")),
    (Step("cast", (0,)), Step("multiply", (5, 1)), Step("add", (6, 2)), Step("add", (7, 3)), Step("less", (8, 0.0), "bool")),
    (Output("tensor", 8), Output("bits", 9, flip=4)),
)
EPILOGUES = [DOTS, threshold("greater_equal"), threshold("greater"), threshold("less"), threshold("less_equal"), threshold("equal"),
             TWICE, SCALED]  # fmt: skip


def operands(spec, batch, rng, zero_images):
    """Random data, canonical weights, the mask (zeros in the images ``zero_images`` only) and epilogue inputs."""
    window, bits = spec.window, spec.in_channels // spec.groups
    planes = (batch, window.in_height, window.in_width, spec.groups, bits)
    zeros = rng.random(planes) < 0.1
    zeros[[i for i in range(batch) if i not in zero_images]] = False
    data = (rng.random(planes) < 0.5) & ~(zeros & spec.zeros)
    weights = epilogue.pack(rng.random((spec.out_channels, *window.kernel, bits)) < 0.5)
    result = [_packed(spec, data), weights]
    if spec.zeros:
        result.append(_packed(spec, zeros))
    dims = (batch, window.out_height, window.out_width)
    return result, [_epilogue_input(e, epilogue.input_shape(e, spec.out_channels, dims), rng) for e in spec.epilogue.inputs]


def _packed(spec, plane):
    """Words of ``bool[N, H, W, groups, in_channels / groups]``."""
    rows, groups = (1, spec.groups) if spec.dense_groups else (spec.groups, 1)
    words = epilogue.pack(plane.reshape(*plane.shape[:3], rows, groups * plane.shape[-1]))
    return words.reshape(*plane.shape[:3], rows * words.shape[-1])


def _epilogue_input(operand, shape, rng):
    if operand.dtype == "int32":  # near the middle, with thresholds that nothing reaches among them
        return rng.choice(np.r_[np.arange(-9, 10), -(2**31), 2**31 - 1], shape).astype("int32")
    if operand.dtype == "uint32":
        return rng.integers(0, 2**32, shape).astype("uint32")
    return rng.standard_normal(shape).astype("float32")


def run(spec, schedule, isa, inputs, epilogue_inputs):
    """Build, compile and run; the outputs as numpy arrays."""
    kernel = program(binary_conv2d.build(spec, schedule, isa), isa)
    packed = [inputs[0], binary_conv2d.pack_weights(spec, schedule, isa, inputs[1]), *inputs[2:]]
    dims = (len(inputs[0]), spec.window.out_height, spec.window.out_width)
    outputs = [np.full(epilogue.output_shape(o, spec.out_channels, dims), 123, epilogue.output_dtype(o)) for o in spec.epilogue.outputs]
    arrays = execute(kernel, (*packed, *epilogue_inputs, *outputs))
    return arrays[len(arrays) - len(outputs) :]


def check(spec, isa, schedule=None, batch=2, zero_images=(1,), seed=0):
    """The kernel and the reference give equal results, bit for bit."""
    inputs, epilogue_inputs = operands(spec, batch, np.random.default_rng(seed), zero_images)
    expected = binary_conv2d.reference(spec, inputs, epilogue_inputs)
    got = run(spec, schedule or binary_conv2d.default_schedule(spec, isa), isa, inputs, epilogue_inputs)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_reference_is_a_convolution_of_signs():
    """The reference itself against a sum written out by hand."""
    spec = BinaryConv2d(Window(2, 3, (2, 2), (1, 1), (1, 0, 0, 1)), 33, 2, epilogue=DOTS)
    inputs, _ = operands(spec, 1, np.random.default_rng(3), ())
    signs = 1 - 2 * epilogue.unpack(inputs[0], 33).astype(int)
    kernel = 1 - 2 * epilogue.unpack(inputs[1], 33).astype(int)
    (got,) = binary_conv2d.reference(spec, inputs, [])
    for y in range(2):
        for x in range(3):
            for o in range(2):
                taps = [(r, s) for r in range(2) for s in range(2) if 0 <= y + r - 1 < 2 and x + s < 3]
                assert got[0, y, x, o] == sum(signs[0, y + r - 1, x + s] @ kernel[o, r, s] for r, s in taps)


@st.composite
def windows(draw):
    """Windows with at least one output pixel; pads may exceed the kernel's reach."""
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 3), (2, 3), (1, 5), (5, 5), (7, 1)]))
    strides = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3)]))
    dilations = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3)]))
    pads = draw(st.sampled_from([(0, 0, 0, 0), (1, 1, 1, 1), (1, 1, 1, 1), (2, 2, 2, 2), (0, 1, 2, 3), (4, 5, 3, 5)]))
    smallest = [max(1, d * (k - 1) + 1 - pads[i] - pads[i + 2]) for i, (k, d) in enumerate(zip(kernel, dilations))]
    height, width = (draw(st.integers(low, max(low, 9))) for low in smallest)
    return Window(height, draw(st.sampled_from([width, width + 8, width + 25])), kernel, strides, pads, dilations)


@st.composite
def cases(draw):
    """A specification, one of its schedules, an ISA level and a batch."""
    groups = draw(st.sampled_from([1, 1, 1, 1, 2, 3]))
    depthwise = draw(st.integers(0, 2)) == 0
    if depthwise:
        groups = draw(st.sampled_from([5, 32, 40, 64, 100]))
    inputs = groups * draw(st.sampled_from([1, 1, 1, 2, 4, 8, 16] if depthwise else [1, 31, 32, 37, 64, 64, 96, 128, 160]))
    outputs = groups * draw(st.sampled_from([1, 1, 2, 3, 4, 8] if depthwise else [1, 16, 32, 37, 64]))
    unipolar, zeros = draw(st.sampled_from([(False, False), (False, False), (False, False), (True, False), (False, True)]))
    dense = draw(st.booleans()) and groups > 1 and 32 % (inputs // groups) == 0
    spec = BinaryConv2d(draw(windows()), inputs, outputs, groups, unipolar, zeros, draw(st.sampled_from(EPILOGUES)), dense)
    isa = draw(st.sampled_from([BEST, BEST, *ISAS]))
    schedules = binary_conv2d.space(spec, isa)
    schedule = random.Random(draw(st.integers(0, 999))).choice([schedules[0], *schedules])
    split = replace(schedule, task_rows=draw(st.integers(1, 4)), task_blocks=draw(st.integers(1, 2)))
    zero_images = draw(st.sampled_from([(), (0,), (0, 1)]))
    return spec, isa, draw(st.sampled_from([schedule, split])), draw(st.integers(1, 2)), zero_images


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases(), st.integers(0, 99))
def test_any_convolution(case, seed):
    spec, isa, schedule, batch, zero_images = case
    check(spec, isa, schedule, batch, [i for i in zero_images if i < batch], seed)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("size, channels, kernel", [(8, 128, 3), (7, 64, 3), (14, 96, 1)])
def test_usual_layers(isa, size, channels, kernel):
    """Layers of published networks, made small, in the packed chain."""
    pad = kernel // 2
    window = Window(size, size, (kernel, kernel), (1, 1), (pad,) * 4)
    check(BinaryConv2d(window, channels, channels, epilogue=threshold("greater_equal")), isa)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("unipolar, zeros", [(False, False), (True, False), (False, True)])
def test_depthwise(isa, unipolar, zeros):
    """One channel per group: words that pixels share with vectors or not, taps outside the image, strides and dilations."""
    window = Window(7, 19, (3, 5), (1, 1), (1, 2, 1, 3), (2, 1))
    for channels, steps, tail in ((40, (1, 1), SCALED), (96, (2, 3), DOTS), (20, (1, 2), threshold("less")), (600, (1, 1), TWICE)):
        spec = BinaryConv2d(replace(window, strides=steps), channels, channels, channels, unipolar, zeros, tail, dense_groups=True)
        check(spec, isa)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_depthwise_arrays_of_one_size_stay_apart(isa):
    """Rows as wide as makes the counters take as much memory as the repeated weights: TVM must not store them in one place."""
    spec = BinaryConv2d(Window(2, 9 * isa.lanes // 4, (3, 3), (1, 1), (1, 1, 1, 1)), 32, 32, 32, epilogue=DOTS, dense_groups=True)
    check(spec, isa)


@pytest.mark.parametrize("outputs", [8, 16, 24, 48, 72, 80])
@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_last_block_that_is_not_full(isa, vectors, outputs):
    """Vectors without a channel are not computed, those with some are; results and packed words beside them stay as they were."""
    spec = BinaryConv2d(Window(5, 11, (3, 3), (1, 1), (1, 1, 1, 1)), 40, outputs, epilogue=SCALED)
    first = next(s for s in binary_conv2d.space(spec, isa) if s.adder == "plain")
    check(spec, isa, replace(first, vectors=vectors, pixels=min(first.pixels, 12 // vectors), task_blocks=1), seed=outputs)
    check(replace(spec, zeros=True), isa, replace(first, vectors=vectors, pixels=2, task_blocks=9), seed=outputs)


@pytest.mark.parametrize("groups, inputs, outputs, dense", [
    (4, 40, 50, False), (3, 33, 20, False), (5, 64, 7, False), (9, 33, 3, False), (12, 16, 10, True),
])  # fmt: skip
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_groups_that_share_vectors(isa, groups, inputs, outputs, dense):
    """Two groups in a vector, several, and as many as are gathered; the last vectors hold channels that do not exist."""
    spec = BinaryConv2d(Window(4, 9, (3, 3), (1, 1), (1, 1, 1, 1)), groups * inputs, groups * outputs, groups, False, True, SCALED, dense)
    check(spec, isa, seed=groups)
    check(replace(spec, zeros=False), isa, next(s for s in binary_conv2d.space(spec, isa) if s.adder == "plain"), seed=outputs)


def test_words_of_few_groups_are_merged():
    """By broadcasts under masks; lane by lane they took seven times as long for two groups."""
    isa = next(level for level in LEVELS if level.name == "x86-64-v4-vpopcnt")
    for groups, outputs, others in [(4, 50, 1), (3, 20, 1), (5, 6, 2), (5, 3, None), (4, 32, None)]:
        spec = BinaryConv2d(Window(6, 14, (3, 3), (1, 1), (1, 1, 1, 1)), groups * 40, groups * outputs, groups, epilogue=DOTS)
        kernel = binary_conv2d.Kernel(spec, binary_conv2d.default_schedule(spec, isa), isa)
        (offset, _), *_ = kernel._groups(tvm.tirx.const(0, "int64"), 0)[0]
        assert (len(offset.others) if isinstance(offset, Merged) else None) == others, (groups, outputs)


def test_tiles_of_one_vector_where_half_a_block_is_left():
    """48 channels are three vectors of 16, not four; a full block has tiles of two where they were faster."""
    isa = next(level for level in LEVELS if level.name == "x86-64-v4-vpopcnt")
    for vendor in ("AMD", "Intel"):
        for outputs in (16, 48, 112):
            spec = BinaryConv2d(Window(20, 20, (3, 3), (1, 1), (1, 1, 1, 1)), 32, outputs, epilogue=DOTS)
            schedule = binary_conv2d.default_schedule(spec, replace(isa, vendor=vendor))
            kernel = binary_conv2d.Kernel(spec, schedule, isa)
            assert (schedule.vectors, kernel.blocks, kernel.parts) == (1, -(-outputs // 32), 2)
            assert [kernel.live_parts(b) for b in range(kernel.blocks)] == [2] * (kernel.blocks - 1) + [1]
        full = BinaryConv2d(Window(20, 20, (3, 3), (1, 1), (1, 1, 1, 1)), 32, 64, epilogue=DOTS)
        assert binary_conv2d.default_schedule(full, replace(isa, vendor=vendor)).vectors == 2


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_unipolar_arrays_of_one_size_stay_apart(isa):
    """The results of four pixels are as large as the sums of weights."""
    check(BinaryConv2d(Window(2, 2, (1, 1)), 64, 32, unipolar=True, epilogue=DOTS), isa)


def test_depthwise_weights_take_one_bit_each():
    spec = BinaryConv2d(Window(8, 8, (3, 3)), 64, 64, 64, dense_groups=True)
    weights = np.ones((64, 3, 3, 1), "uint32")
    for isa in LEVELS:
        assert binary_conv2d.pack_weights(spec, binary_conv2d.default_schedule(spec, isa), isa, weights).nbytes == 64 * 9 // 8


@pytest.mark.parametrize("channels, kernel", [(64, 3), (224, 3), (256, 3), (40, 1), (33, 7)])
def test_tables(channels, kernel):
    """Nibble tables with sums that are emptied after a row, within a row and at the end."""
    isa = next(isa for isa in LEVELS if isa.name == "x86-64-v3")
    spec = BinaryConv2d(Window(6, 9, (kernel, kernel), (1, 1), (kernel // 2,) * 4), channels, 70, epilogue=DOTS)
    assert binary_conv2d.default_schedule(spec, isa).adder == "tables"
    if isa in ISAS:
        check(spec, isa)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_counters_do_not_overflow(isa):
    """All bits differ in a long sum: 8-bit counters would wrap."""
    spec = BinaryConv2d(Window(5, 5, (5, 5), (1, 1), (2, 2, 2, 2)), 288, 32, epilogue=DOTS)
    inputs, _ = operands(spec, 1, np.random.default_rng(0), ())
    inputs = [np.zeros_like(inputs[0]), np.full_like(inputs[1], 2**32 - 1)]
    (expected,) = binary_conv2d.reference(spec, inputs, [])
    (got,) = run(spec, binary_conv2d.default_schedule(spec, isa), isa, inputs, [])
    assert expected.min() == -25 * 288
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("zero_images", [(), (0,), (2,)])
def test_zeros_in_some_images_only(zero_images):
    """Images with and without zeros take different paths of one kernel."""
    spec = BinaryConv2d(Window(9, 9, (3, 3), (1, 1), (1, 1, 1, 1)), 64, 64, zeros=True, epilogue=threshold("greater_equal"))
    check(spec, BEST, batch=3, zero_images=zero_images)


def test_one_zero_is_found_wherever_it_is():
    """Every word of the mask is looked at."""
    spec = BinaryConv2d(Window(3, 3, (3, 3), (1, 1), (1, 1, 1, 1)), 96, 32, zeros=True, epilogue=DOTS)
    schedule = binary_conv2d.default_schedule(spec, BEST)
    inputs, _ = operands(spec, 27, np.random.default_rng(0), ())
    mask = inputs[2].reshape(27, -1)
    mask[np.arange(27), np.arange(27)] = 1 << np.arange(27, dtype="uint32")
    inputs[0] &= ~inputs[2]
    (expected,) = binary_conv2d.reference(spec, inputs, [])
    (got,) = run(spec, schedule, BEST, inputs, [])
    np.testing.assert_array_equal(got, expected)


def test_empty_batch():
    spec = BinaryConv2d(Window(4, 4, (3, 3)), 64, 32, epilogue=DOTS)
    check(spec, BEST, batch=0, zero_images=())


def test_weights_take_one_bit_each():
    """Packed weights are as many words as the canonical ones when channels fill words."""
    spec = BinaryConv2d(Window(8, 8, (3, 3)), 64, 96)
    weights = np.arange(96 * 9 * 2, dtype="uint32").reshape(96, 3, 3, 2)
    for isa in LEVELS:
        for schedule in binary_conv2d.space(spec, isa):
            assert binary_conv2d.pack_weights(spec, schedule, isa, weights).nbytes == weights.nbytes


@pytest.mark.skipif(BEST.popcount == "neon", reason="there windows are copied, a few rows at a time")
def test_no_buffer_for_im2col():
    """What a kernel allocates is registers, one tile and at most a copy of the input rows that its task reads; as bytes, of the image."""
    spec = BinaryConv2d(Window(56, 56, (3, 3), (1, 1), (1, 1, 1, 1)), 256, 256, epilogue=DOTS)
    schedule = binary_conv2d.default_schedule(spec, BEST)
    sizes = []

    def size(node):
        sizes.append(np.dtype(str(node.buffer.dtype)).itemsize * int(np.prod([int(d) for d in node.buffer.shape])))

    tvm_ffi.structural_walk(binary_conv2d.build(spec, schedule, BEST).body, (tvm.tirx.AllocBuffer, size))
    image = 58 * 58 * (256 + 64) + 4096  # with its padding, lines between pixels, and what the last tile reads beyond it
    assert sizes and max(sizes) <= (image if schedule.adder == "bytes" else (schedule.task_rows + 2) * 56 * 8 * 4)


PLUS_ONE = [
    (Window(9, 8, (3, 3), (1, 1), (1, 1, 1, 1)), 64, 40),
    (Window(7, 7, (3, 3), (1, 1), (1, 1, 1, 1)), 96, 32),
    (Window(14, 30, (5, 3), (2, 1), (2, 1, 1, 1)), 33, 70),
    (Window(3, 2, (3, 3), (1, 1), (2, 2, 2, 2)), 128, 32),
    (Window(6, 31, (3, 4), (1, 2), (1, 4, 1, 2), (1, 2)), 20, 33),
]


@pytest.mark.parametrize("window, channels, outputs", PLUS_ONE)
@pytest.mark.parametrize("dots", [DOTS, threshold("greater"), SCALED])
def test_padding_with_plus_one_is_corrected(window, channels, outputs, dots):
    spec = BinaryConv2d(window, channels, outputs, epilogue=dots, plus_one=True)
    tried = [isa for isa in ISAS if binary_conv2d.pads_with_ones(spec, isa)]
    for isa in tried:
        for schedule in binary_conv2d.space(spec, isa)[:20:14]:
            check(spec, isa, schedule=schedule)
    assert tried or BEST.popcount != "vector"


@pytest.mark.parametrize("isa", [pytest.param(isa, id=isa.name) for isa in ISAS])
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_operands_that_are_read_several_times_side_by_side(isa, data):
    """Random epilogues with tensors of a half, a third or a quarter of the channels, in every loop order."""
    channels, times = data.draw(st.sampled_from([(64, 2), (96, 3), (128, 2), (128, 4)]))
    program_ = Program(data.draw, "int32", times).epilogue()
    window = Window(data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6)), (1, 1))
    spec = BinaryConv2d(window, data.draw(st.sampled_from([32, 70])), channels, zeros=data.draw(st.booleans()), epilogue=program_)
    inputs, epilogue_inputs = operands(spec, 2, np.random.default_rng(data.draw(st.integers(0, 99))), (1,))
    anchor = binary_conv2d.reference(replace(spec, epilogue=DOTS), inputs, [])[0]
    assume(everything_finite(program_, anchor, epilogue_inputs))
    schedule = data.draw(st.sampled_from(binary_conv2d.space(spec, isa)))
    expected = epilogue.reference(program_, anchor, epilogue_inputs)
    for a, b in zip(run(spec, schedule, isa, inputs, epilogue_inputs), expected, strict=True):
        np.testing.assert_array_equal(a, b)
