"""C of every specification against its family's numpy reference: many kernels in one file, compiled once, undefined behaviour trapped."""

import ctypes
from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bnntvm import spec as sp
from bnntvm.bits import pack_bits
from bnntvm.c99 import kernels
from bnntvm.c99.cwriter import TYPES
from bnntvm.c99.emit import Emitter
from bnntvm.c99.rows import Rows
from bnntvm.c99.weights import bits_of_weights
from bnntvm.schedules import families
from tests.c99.native import STRICT, run
from tests.schedules import test_binary_conv2d as binary_tests
from tests.schedules import test_binary_matmul as matmul_tests
from tests.schedules import test_bitserial_conv2d as planes_tests
from tests.schedules.kernels import epilogue_inputs, epilogue_outputs, thresholds
from tests.schedules.packed_weights import CODINGS, random_weights
from tests.schedules.planes import plane_sums, scales, weight_planes

#: Shared with bnn.h, which the tests include as it is shipped.
HEADER = kernels.__file__.replace("kernels.py", "templates")
ONE_RUN = settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
#: Everything that an epilogue of floats can do at once: operands of every kind, all outputs, functions.
RICH = sp.Epilogue(
    (sp.EpilogueInput("channel"), sp.EpilogueInput("tensor"), sp.EpilogueInput("pixel"), sp.EpilogueInput("image"),
     sp.EpilogueInput("words", "uint32")),
    (sp.Step("cast", (0,)), sp.Step("multiply", (6, 1)), sp.Step("add", (7, 2)), sp.Step("prelu", (8, 3)), sp.Step("add", (9, 4)),
     sp.Step("clip", (10, -6.0, 6.0)), sp.Step("less", (11, 0.0), "bool"), sp.Step("relu", (11,)), sp.Step("where", (12, 13, 11))),
    (sp.Output("tensor", 14), sp.Output("bits", 12, flip=5), sp.Output("planar", 11)),
)  # fmt: skip
FLOATS = [sp.store(), RICH]


class Kernels:
    """Cases are added, then compiled together and compared."""

    def __init__(self, folder):
        self.folder, self.cases, self.texts = folder, [], []

    def add(self, spec, operands, inputs, shapes, reference=None):
        """``operands`` as the family's reference takes them; ``shapes``: (shape, dtype) of the results."""
        expected = families.of(spec).reference(spec, operands, inputs) if reference is None else reference
        arrays = [
            *(self.stored(spec, i, a) for i, a in enumerate(operands)),
            *(self.masked(spec, e, a) for e, a in zip(_inputs(spec), inputs)),
        ]
        results = [np.full(shape, 77, dtype) for shape, dtype in shapes]
        name = f"kernel_{len(self.cases)}"
        self.texts.append(
            kernels.write(name, spec, tuple(TYPES[str(a.dtype)] for a in (*arrays, *results))).replace(
                f"static void {name}(", f"void {name}("
            )
        )
        self.cases.append((name, spec, arrays, results, expected))

    @staticmethod
    def stored(spec, index, array):
        """A constant as the emitter stores it: no padding of channels, bytes where they do."""
        if array.dtype == np.float32 and (getattr(spec, "coding", None) or hasattr(spec, "planes")) and index >= 2:
            array = array[:, : getattr(spec, "out_channels", 0) or spec.out_features]
        if isinstance(spec, sp.Int8Conv2d) and index == 1:
            array = bits_of_weights(spec, array)
        if not isinstance(spec, Rows) and kernels.weights_of_any_type(spec) and kernels.anchor_of(spec).names()[index] == "w":
            array = Emitter.narrow_words(type("Constant", (), dict(shape=array.shape, data=array))).data
        return np.ascontiguousarray(array)

    @staticmethod
    def masked(spec, operand, array):
        """The flip of packed words has no bits where there are no channels."""
        if operand.kind != "words":
            return np.ascontiguousarray(array)
        return array & pack_bits(np.ones(getattr(spec, "out_channels", None) or getattr(spec, "out_features", None) or spec.channels, bool))

    def check(self):
        (self.folder / "kernels.c").write_text('#include "bnn.h"\n' + "\n".join(self.texts))
        checks = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-Wno-missing-prototypes"]
        run(["gcc", *STRICT, "-O0", "-fPIC", "-shared", *checks, "-I", HEADER, "kernels.c", "-o", "kernels.so"], self.folder)
        library = ctypes.CDLL(str(self.folder / "kernels.so"))
        for name, spec, arrays, results, expected in self.cases:
            pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (*arrays, *results)]
            getattr(library, name)(ctypes.c_int32(len(results[0])), *pointers)
            for number, (got, wanted) in enumerate(zip(results, expected, strict=True)):
                if wanted is None:  # memory that the kernel needs
                    continue
                message = f"output {number} of {spec}"
                if wanted.dtype == np.float32 and not isinstance(spec, sp.BinaryConv2d):
                    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max(initial=1), err_msg=message)
                else:
                    np.testing.assert_array_equal(got, wanted, err_msg=message)


def _inputs(spec):
    return spec.epilogue.inputs if hasattr(spec, "epilogue") else ()


def _whole(rng, *shape):
    return rng.integers(-8, 9, shape).astype(np.float32)


def _outputs(spec, channels, dims):
    return epilogue_outputs(spec.epilogue, channels, dims)


@ONE_RUN
@given(data=st.data())
def test_convolutions_of_bits(tmp_path_factory, data):
    """Kinds, groups, packing of groups, zeros, pads with 0 and +1."""
    batch = Kernels(tmp_path_factory.mktemp("kernels"))
    for seed in range(12):
        spec, *_ = data.draw(binary_tests.cases())
        operands, inputs = binary_tests.operands(spec, 2, np.random.default_rng(seed), (1,))
        dims = 2, spec.window.out_height, spec.window.out_width
        batch.add(spec, operands, inputs, _outputs(spec, spec.out_channels, dims))
    for seed in range(12):
        spec, *_ = data.draw(planes_tests.cases())
        rng, dims = np.random.default_rng(seed), (2, spec.window.out_height, spec.window.out_width)
        operands = planes_tests.operands(spec, 2, rng, (1,))
        batch.add(spec, operands, epilogue_inputs(rng, spec.epilogue, spec.out_channels, dims, 9), _outputs(spec, spec.out_channels, dims))
    batch.check()


@ONE_RUN
@given(data=st.data())
def test_operands_that_are_read_several_times_side_by_side(tmp_path_factory, data):
    """A residual of half the channels, in kernels of bits with all outputs at once."""
    batch, rng = Kernels(tmp_path_factory.mktemp("kernels")), np.random.default_rng(0)
    for times in (1, 2, 4):
        residual, *others = RICH.inputs[1:]
        tail = replace(RICH, inputs=(RICH.inputs[0], replace(residual, times=times), *others))
        size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
        spec = sp.BinaryConv2d(sp.Window(*size, (1, 1)), data.draw(st.sampled_from([20, 64])), 128, epilogue=tail)
        operands, _ = binary_tests.operands(spec, 2, rng, ())
        batch.add(spec, operands, epilogue_inputs(rng, tail, 128, (2, *size)), _outputs(spec, 128, (2, *size)))
    batch.check()


@ONE_RUN
@given(data=st.data())
def test_padding_with_ones(tmp_path_factory, data):
    """The kernel that pads with +1 against an image that was padded."""
    batch, rng = Kernels(tmp_path_factory.mktemp("kernels")), np.random.default_rng(0)
    for _ in range(8):
        kernel, pads = data.draw(st.sampled_from([(3, 3), (5, 2), (1, 4)])), data.draw(st.tuples(*[st.integers(0, 3)] * 4))
        height, width, depth = data.draw(st.integers(4, 8)), data.draw(st.integers(4, 8)), data.draw(st.sampled_from([3, 32, 70]))
        window = sp.Window(height, width, kernel, data.draw(st.sampled_from([(1, 1), (2, 1)])), pads)
        spec = sp.BinaryConv2d(window, depth, 9, epilogue=sp.store("int32", "int32"), plus_one=True)
        image = pack_bits(rng.random((2, height, width, depth)) < 0.5)
        weights = pack_bits(rng.random((9, *kernel, depth)) < 0.5)
        padded = np.pad(image, ((0, 0), (pads[0], pads[2]), (pads[1], pads[3]), (0, 0)))
        inside = sp.Window(*padded.shape[1:3], kernel, window.strides)
        expected = families.of(spec).reference(sp.BinaryConv2d(inside, depth, 9, epilogue=spec.epilogue), [padded, weights], [])
        batch.add(spec, [image, weights], [], [(expected[0].shape, "int32")], expected)
    batch.check()


@ONE_RUN
@given(data=st.data())
def test_dense_layers(tmp_path_factory, data):
    """Bits, planes, floats, packed weights, bytes."""
    batch = Kernels(tmp_path_factory.mktemp("kernels"))
    for seed in range(10):
        rng, depth = np.random.default_rng(seed), data.draw(st.sampled_from([1, 31, 32, 70, 128, 4100]))
        columns, tail = data.draw(st.sampled_from([1, 33, 64])), thresholds("less", "greater_equal")
        ones, zeros = rng.random((3, depth)) < 0.5, rng.random((3, depth)) < 0.2
        unipolar, mask = data.draw(st.sampled_from([(False, False), (True, False), (False, True)]))
        spec = sp.BinaryDense(depth, columns, unipolar, mask, tail)
        operands = [pack_bits(ones & ~(zeros & mask)), pack_bits(rng.random((columns, depth)) < 0.5), *([pack_bits(zeros)] if mask else [])]
        batch.add(spec, operands, epilogue_inputs(rng, tail, columns, (3,)), _outputs(spec, columns, (3,)))
        planes = data.draw(plane_sums())
        tail = sp.store("float32", "float32") if planes.scaled else tail
        spec = sp.PlanesDense(depth, columns, planes, False, tail)
        operands = [pack_bits(rng.random((3, depth)) < 0.5) for _ in planes.data]
        operands += [weight_planes(rng, planes, (columns, depth)), *scales(rng, planes, columns)]
        batch.add(spec, operands, epilogue_inputs(rng, tail, columns, (3,)), _outputs(spec, columns, (3,)))
        coding = data.draw(st.sampled_from(CODINGS))
        weights, levels = random_weights(rng, coding, (columns, depth))
        spec = sp.WeightDense(depth, columns, coding, sp.store())
        batch.add(spec, [_whole(rng, 3, depth), weights, *levels], [], [((3, columns), "float32")])
        if coding.kind != "levels":
            spec = sp.WeightDenseInt8(depth, columns, coding, sp.store("int32", "int32"))
            batch.add(spec, [_whole(rng, 3, depth), weights], [], [((3, columns), "int32")])
        spec = sp.FloatDense(depth, columns, sp.store())
        batch.add(spec, [_whole(rng, 3, depth), _whole(rng, columns, depth)], [], [((3, columns), "float32")])
    batch.check()


@ONE_RUN
@given(data=st.data())
def test_float_windows(tmp_path_factory, data):
    """Convolutions with float and packed weights, grouped and depthwise, data in either order; pools."""
    batch = Kernels(tmp_path_factory.mktemp("kernels"))
    for seed in range(14):
        rng, window = np.random.default_rng(seed), data.draw(binary_tests.windows())
        groups, depth = data.draw(st.sampled_from([(1, 3), (1, 40), (2, 5), (7, 1)]))
        outputs, tail = groups * data.draw(st.sampled_from([1, 4, 33])), data.draw(st.sampled_from(FLOATS))
        dims = 2, window.out_height, window.out_width
        image = _whole(rng, 2, window.in_height, window.in_width, groups * depth)
        inputs = epilogue_inputs(rng, tail, outputs, dims)
        spec = sp.FloatConv2d(window, groups * depth, outputs, groups, tail)
        if groups != spec.in_channels or outputs == groups:  # a multiplier is another family's
            weights = _whole(rng, outputs, *window.kernel, depth)
            batch.add(spec, [image, weights], inputs, _outputs(spec, outputs, dims))
            if groups == 1:
                planar = sp.FloatConv2d(window, depth, outputs, 1, tail, True)
                expected = families.of(spec).reference(spec, [image, weights], inputs)
                moved = np.ascontiguousarray(image.transpose(0, 3, 1, 2))
                batch.add(planar, [moved, weights], inputs, _outputs(planar, outputs, dims), expected)
            coding = data.draw(st.sampled_from(CODINGS))
            packed, levels = random_weights(rng, coding, (outputs, *window.kernel, depth))
            spec = sp.WeightConv2d(window, groups * depth, outputs, groups, tail, coding=coding)
            batch.add(spec, [image, packed, *levels], inputs, _outputs(spec, outputs, dims))
        op = data.draw(st.sampled_from(["max", "avg_pad"]))
        reach = [d * (k - 1) for d, k in zip(window.dilations, window.kernel)]
        if all(p <= r for p, r in zip(window.pads, reach * 2)):  # no window without a pixel
            spec = sp.Pool2d(window, groups * depth, op, sp.store())
            batch.add(spec, [image], [], _outputs(spec, groups * depth, dims))
        bits = pack_bits(image > 0)
        spec = sp.BitPool(window, groups * depth, data.draw(st.sampled_from(["and", "or"])))
        batch.add(spec, [bits], [], [((*dims, sp.words(groups * depth)), "uint32")])
    batch.check()


@ONE_RUN
@given(data=st.data())
def test_windows_of_bytes(tmp_path_factory, data):
    """Convolutions of 8-bit integers held in floats, weights of one to four bits."""
    batch = Kernels(tmp_path_factory.mktemp("kernels"))
    for seed in range(8):
        rng, window = np.random.default_rng(seed), data.draw(binary_tests.windows())
        depth, outputs = data.draw(st.sampled_from([1, 3, 40])), data.draw(st.sampled_from([1, 4, 33]))
        digits = sp.Digits(*data.draw(st.sampled_from([(-1, (2,)), (-1, (1, 2)), (-3, (2, 4)), (-8, (1, 2, 4, 8))])))
        kind = data.draw(st.sampled_from([("int8", -128, 127), ("uint8", 0, 255)]))
        tail = data.draw(st.sampled_from([RICH, thresholds("less")]))
        image = rng.integers(*kind[1:], (2, window.in_height, window.in_width, depth), endpoint=True).astype(np.float32)
        weights = digits.base + sum(c * rng.integers(0, 2, (outputs, *window.kernel, depth)) for c in digits.coefficients)
        dims, spec = (2, window.out_height, window.out_width), sp.Int8Conv2d(window, depth, outputs, kind[0], digits, tail, floats=True)
        batch.add(spec, [image, weights.astype(np.int8)], epilogue_inputs(rng, tail, outputs, dims), _outputs(spec, outputs, dims))
    batch.check()


def _above(rng, window, tail):
    """A producer of rows: its specification, operands and the inputs of its epilogue."""
    outputs = int(rng.choice([1, 33, 40]))
    dims = 2, window.out_height, window.out_width
    if rng.random() < 0.5:
        spec = sp.BinaryConv2d(window, 37, outputs, epilogue=tail)
        shapes = (2, window.in_height, window.in_width, 37), (outputs, *window.kernel, 37)
        operands = [pack_bits(rng.random(shape) < 0.5) for shape in shapes]
    else:
        spec = sp.FloatConv2d(window, 3, outputs, epilogue=tail)
        operands = [_whole(rng, 2, window.in_height, window.in_width, 3), _whole(rng, outputs, *window.kernel, 3)]
    return spec, operands, epilogue_inputs(rng, tail, outputs, dims)


def _below(rng, window, channels, bits):
    """A consumer of rows, and its operands but for the data."""
    if bits:
        spec = sp.BinaryConv2d(window, channels, 21, epilogue=sp.store("int32", "int32"))
        return spec, [pack_bits(rng.random((21, *window.kernel, channels)) < 0.5)]
    if rng.random() < 0.5:
        return sp.Pool2d(window, channels, "avg_pad", sp.store()), []
    return sp.FloatConv2d(window, channels, channels, channels, sp.store()), [_whole(rng, channels, *window.kernel, 1)]


@ONE_RUN
@given(data=st.data())
def test_row_by_row(tmp_path_factory, data):
    """Two kernels that keep only the rows between them that a window reads, against one after the other."""
    batch, outputs = Kernels(tmp_path_factory.mktemp("kernels")), RICH.outputs
    for seed in range(12):
        rng, upper = np.random.default_rng(seed), data.draw(binary_tests.windows())
        lower = data.draw(binary_tests.windows())
        size = upper.out_height, upper.out_width
        lower = sp.Window(*size, lower.kernel, lower.strides, lower.pads, lower.dilations)
        rows, output = lower.dilations[0] * (lower.kernel[0] - 1) + 1, data.draw(st.sampled_from([0, 1]))
        if rows >= size[0] or min(lower.out_height, lower.out_width) < 1:
            continue
        above, operands, inputs = _above(rng, upper, RICH)
        below, more = _below(rng, lower, above.out_channels, outputs[output].kind == "bits")
        inputs = [Kernels.masked(above, e, a) for e, a in zip(RICH.inputs, inputs)]
        made = families.of(above).reference(above, operands, inputs)
        (result,) = families.of(below).reference(below, [made[output], *more], [])
        others = [m for i, m in enumerate(made) if i != output]
        kept = ((rows, *made[output].shape[2:]), str(made[output].dtype))
        shapes = [*((m.shape, str(m.dtype)) for m in (*others, result)), kept]
        batch.add(Rows(above, below, output, rows), [*operands, *inputs, *more], [], shapes, [*others, result, None])
    batch.check()


def test_everything_else(tmp_path):
    """One or two of each remaining kernel."""
    batch, rng = Kernels(tmp_path), np.random.default_rng(0)
    image, rows = _whole(rng, 2, 5, 4, 37), _whole(rng, 3, 21)
    signs = sp.Epilogue(steps=(sp.Step("less", (0, 0.0), "bool"),), outputs=(sp.Output("bits", 1),))
    spec = sp.Map(4, (5, 4), 37, "float32", RICH)
    batch.add(spec, [image], epilogue_inputs(rng, RICH, 37, (2, 5, 4)), _outputs(spec, 37, (2, 5, 4)))
    batch.add(sp.Map(2, (1, 1), 21, "float32", signs), [rows], [], [((3, 1), "uint32")])
    batch.add(sp.PlanarPack((5, 4), 37, signs), [np.ascontiguousarray(image.transpose(0, 3, 1, 2))], [], [((2, 5, 4, 2), "uint32")])
    for op in ("avg", "max"):
        batch.add(sp.GlobalPool(op, (5, 4), 37, sp.store()), [image], [], [((2, 1, 1, 37), "float32")])
    batch.add(sp.Pool2d(sp.Window(5, 4, (3, 2), (2, 1), (1, 1, 1, 0)), 37, "avg", sp.store()), [image], [], [((2, 3, 4, 37), "float32")])
    batch.add(sp.Softmax(21), [rows], [], [((3, 21), "float32")])
    batch.add(sp.Concat(2, (), (21, 5)), [rows, _whole(rng, 3, 5)], [], [((3, 26), "float32")])
    batch.add(sp.Concat(4, (5, 4), (37, 1, 2)), [image, image[..., :1].copy(), image[..., 5:7].copy()], [], [((2, 5, 4, 40), "float32")])
    batch.add(sp.BitPad((5, 4), 2, (1, 2, 0, 3), 0xFFFFFFFF), [pack_bits(image > 0)], [], [((2, 6, 9, 2), "uint32")])
    batch.add(sp.Transpose(20, 37, ((5, 4, 37), (37, 5, 4))), [image], [], [((2, 37, 5, 4), "float32")])
    for op in ("max", "min"):
        batch.add(sp.RowExtreme(op, 21), [rows], [], [((3, 1), "float32")])
    for dtype, largest in (("float32", True), ("int64", False)):
        batch.add(sp.TopK(21, 7, largest, dtype), [rows.astype(dtype)], [], [((3, 7), dtype), ((3, 7), "int64")])
    for dtype, exclusive, backward in (("float32", False, True), ("float32", True, False), ("int64", True, True), ("int32", False, False)):
        batch.add(sp.CumSum(5, 4, dtype, exclusive, backward), [_whole(rng, 3, 5, 4).astype(dtype)], [], [((3, 5, 4), dtype)])
    for left in matmul_tests.KINDS:
        for right in matmul_tests.KINDS:
            for shared in (False, True):
                spec = sp.BinaryMatmul(3, 5, 70, 3, left, right, shared)
                a, b = (matmul_tests.operand(rng, k, (1 if s else 2, m, 70))[0] for k, s, m in ((left, 0, 3), (right, shared, 5)))
                b = [np.ascontiguousarray(np.swapaxes(w, 1, 2)) for w in b]
                batch.add(spec, [*a, *b], [], [((2, 3, 5), "int32")])
                if left == right:
                    batch.add(replace(spec, scale=0.3), [*a, *b], [], [((2, 3, 5), "float32")])
    batch.check()
