"""Code for ARM, run under user-mode QEMU: every kernel family against its reference, networks against this machine's, inner loops as read
off the assembly.

``BNNTVM_TEST_TARGETS=aarch64,armv7 pytest tests/schedules`` runs all kernel tests like this; here is a small selection.
"""

import numpy as np
import pytest
from onnx import helper, numpy_helper

import bnntvm
from benchmarks.arm import counting_loop, layer, operands, program
from bnntvm.linker import find_cross_compiler
from bnntvm.schedules import (
    binary_conv2d,
    binary_dense,
    binary_matmul,
    bit_pad,
    bit_pool,
    bitserial_conv2d,
    bitserial_dense,
    by_bytes,
    concat,
    cum_sum,
    depthwise_conv2d,
    epilogue,
    float_conv2d,
    float_dense,
    int8_conv2d,
    planar_pack,
    pool2d,
    reduce,
    row_extreme,
    top_k,
    transpose,
    weight_conv2d,
    weight_dense,
    weight_dense_int8,
    weight_depthwise,
)
from bnntvm.schedules import map as map_family
from bnntvm.schedules.families import DEPTHWISE, FAMILIES
from bnntvm.spec import (
    BinaryConv2d,
    BinaryDense,
    BinaryMatmul,
    BitPad,
    BitPool,
    Concat,
    CumSum,
    Digits,
    Epilogue,
    EpilogueInput,
    FloatConv2d,
    FloatDense,
    GlobalPool,
    Int8Conv2d,
    Map,
    Output,
    PlanarPack,
    PlanesConv2d,
    PlanesDense,
    PlaneSum,
    Pool2d,
    RowExtreme,
    Softmax,
    Step,
    TopK,
    Transpose,
    WeightCoding,
    WeightConv2d,
    WeightDense,
    WeightDenseInt8,
    Window,
    store,
)
from bnntvm.targets import aarch64, armv7, registry
from tests.schedules.test_epilogue import deciding, picking

from .emulator import Program
from .network import Network

TARGETS = ("cortex-a72", "cortex-a76", "aarch64-i8mm", "armv7")
#: What other instructions for products of bytes change.
BYTES = (int8_conv2d, weight_dense_int8)
INTS = store("int32", "int32")
SIGNS = Epilogue(steps=(Step("less", (0, 0.0), "bool"),), outputs=(Output("bits", 1),))
LEVELS = Epilogue(
    (EpilogueInput("channel", "int32"),), (Step("greater_equal", (0, 1), "bool"),), (Output("bits", 2), Output("tensor", 0, "int32"))
)
#: A residual of half the channels, added to either half.
TWICE = Epilogue(
    (EpilogueInput("tensor", times=2),), (Step("cast", (0,)), Step("add", (2, 1)), Step("less", (3, 0.0), "bool")),
    (Output("tensor", 3), Output("bits", 4)),
)  # fmt: skip
SAME = (1, 1, 1, 1)
TWO_BITS = Digits(0, (1, 2))


def bits(rng, *shape):
    return epilogue.pack(rng.random(shape) < 0.5)


def whole(rng, *shape):
    return rng.integers(-4, 5, shape).astype(np.float32)


#: Family, specification, data (the mask of zeros last), canonical weights or None, epilogue inputs, shapes and types of the results.
def cases(rng):
    """One or two kernels of every family."""
    window = Window(9, 7, (3, 3), (2, 1), SAME)
    thresholds = np.r_[rng.integers(-20, 20, 70), np.zeros(26, int)].astype(np.int32)
    conv = [((1, 5, 7, 3), "uint32"), ((1, 5, 7, 70), "int32")]
    for depth in (160, 33, 20):
        spec = BinaryConv2d(window, depth, 70, epilogue=LEVELS)
        yield binary_conv2d, spec, [bits(rng, 1, 9, 7, depth)], bits(rng, 70, 3, 3, depth), [thresholds], conv
    halves = [((1, 5, 7, 64), "float32"), ((1, 5, 7, 2), "uint32")]
    residual = [whole(rng, 1, 5, 7, 32)]
    yield binary_conv2d, BinaryConv2d(window, 96, 64, epilogue=TWICE), [bits(rng, 1, 9, 7, 96)], bits(rng, 64, 3, 3, 96), residual, halves
    data, zeros = rng.random((1, 9, 7, 64)) < 0.5, rng.random((1, 9, 7, 64)) < 0.1
    planes = [epilogue.pack(data & ~zeros), epilogue.pack(zeros)]
    yield binary_conv2d, BinaryConv2d(window, 64, 70, 1, False, True, LEVELS), planes, bits(rng, 70, 3, 3, 64), [thresholds], conv
    yield binary_conv2d, BinaryConv2d(window, 64, 70, 1, True, False, LEVELS), planes[:1], bits(rng, 70, 3, 3, 64), [thresholds], conv
    spec = BinaryConv2d(window, 40, 40, 40, epilogue=INTS, dense_groups=True)
    yield binary_conv2d, spec, [bits(rng, 1, 9, 7, 40)], bits(rng, 40, 3, 3, 1), [], [((1, 5, 7, 40), "int32")]
    for rows, depth in ((1, 4200), (8, 100)):  # bytes overflow in the first
        results = [((rows, 3), "uint32"), ((rows, 70), "int32")]
        yield binary_dense, BinaryDense(depth, 70, epilogue=LEVELS), [bits(rng, rows, depth)], bits(rng, 70, depth), [thresholds], results
    yield bit_pool, BitPool(Window(9, 7, (2, 2), (2, 2)), 96, "and"), [bits(rng, 2, 9, 7, 96)], None, [], [((2, 4, 3, 3), "uint32")]
    yield bit_pad, BitPad((4, 5), 3, (1, 2, 0, 1), 0xFFFFFFFF), [bits(rng, 2, 4, 5, 96)], None, [], [((2, 5, 8, 3), "uint32")]
    yield planar_pack, PlanarPack((5, 6), 40, SIGNS), [whole(rng, 2, 40, 5, 6)], None, [], [((2, 5, 6, 2), "uint32")]
    yield map_family, Map(4, (3, 5), 70, "float32", SIGNS), [whole(rng, 2, 3, 5, 70)], None, [], [((2, 3, 5, 3), "uint32")]
    yield transpose, Transpose(15, 9, ((3, 5, 9), (9, 3, 5))), [whole(rng, 2, 3, 5, 9)], None, [], [((2, 9, 3, 5), "float32")]
    yield concat, Concat(2, (), (5, 40, 3)), [whole(rng, 3, 5), whole(rng, 3, 40), whole(rng, 3, 3)], None, [], [((3, 48), "float32")]
    image, plain = whole(rng, 1, 9, 7, 12), store()
    yield float_conv2d, FloatConv2d(window, 12, 20, 1, plain), [image], whole(rng, 20, 3, 3, 12), [], [((1, 5, 7, 20), "float32")]
    yield depthwise_conv2d, FloatConv2d(window, 12, 12, 12, plain), [image], whole(rng, 12, 3, 3, 1), [], [((1, 5, 7, 12), "float32")]
    yield float_dense, FloatDense(50, 30, plain), [whole(rng, 5, 50)], whole(rng, 30, 50), [], [((5, 30), "float32")]
    yield pool2d, Pool2d(window, 12, "avg", plain), [image], None, [], [((1, 5, 7, 12), "float32")]
    yield reduce, GlobalPool("avg", (9, 7), 12, plain), [image], None, [], [((1, 1, 1, 12), "float32")]
    yield reduce, Softmax(30), [whole(rng, 3, 30)], None, [], [((3, 30), "float32")]
    yield row_extreme, RowExtreme("max", 30), [whole(rng, 3, 30)], None, [], [((3, 1), "float32")]
    yield cum_sum, CumSum(9, 7, exclusive=True), [whole(rng, 3, 9, 7)], None, [], [((3, 9, 7), "float32")]
    yield top_k, TopK(30, 4, True), [whole(rng, 3, 30)], None, [], [((3, 4), "float32"), ((3, 4), "int64")]
    operands_ = [bits(rng, 2, 5, 96), rng.integers(0, 2**32, (2, 3, 11), dtype=np.uint32)]
    yield binary_matmul, BinaryMatmul(5, 11, 96, 3), operands_, None, [], [((2, 5, 11), "int32")]
    yield from planes_cases(rng, window, thresholds, conv)
    yield from weight_cases(rng, window)


def planes_cases(rng, window, thresholds, conv):
    """Sums of bit planes: looked up, counted and multiplied as bytes; bytes."""
    for planes in (
        PlaneSum((1, 2), (1,), "unipolar", "bipolar"),
        PlaneSum((1, 2), (1,), "unipolar", "ternary"),
        PlaneSum((1, 2, 4, 8), (1, 2, 4, -8), "unipolar", "unipolar"),
    ):
        weights = rng.random((len(planes.weights) * planes.words_per_weight, 70, 3, 3, 40)) < 0.5
        if planes.weight_kind == "ternary":
            weights[0] &= weights[1]
        data = [bits(rng, 1, 9, 7, 40) for _ in planes.data]
        yield bitserial_conv2d, PlanesConv2d(window, 40, 70, planes, epilogue=LEVELS), data, epilogue.pack(weights), [thresholds], conv
        rows, results = [bits(rng, 3, 360) for _ in planes.data], [((3, 3), "uint32"), ((3, 70), "int32")]
        weights = epilogue.pack(weights.reshape(*weights.shape[:2], -1))
        yield bitserial_dense, PlanesDense(360, 70, planes, epilogue=LEVELS), rows, weights, [thresholds], results
    for kind, low, high in (("int8", -128, 128), ("uint8", 0, 256)):
        data = [rng.choice([low, high - 1, 3, 5], (1, 9, 7, 21)).astype(kind)]
        weights = rng.choice([-128, 127, 5], (40, 3, 3, 21)).astype(np.int8)
        yield int8_conv2d, Int8Conv2d(window, 21, 40, kind, epilogue=INTS), data, weights, [], [((1, 5, 7, 40), "int32")]


def weight_cases(rng, window):
    """Packed weights, whose data are floats or bytes."""
    for coding in (WeightCoding("sign", 1), WeightCoding("ternary", 2)):
        weights = rng.random((coding.planes, 20, 3, 3, 12)) < 0.4
        weights[1:] &= ~weights[:1]
        image, rows, results = whole(rng, 1, 9, 7, 12), whole(rng, 5, 108), [((1, 5, 7, 20), "float32")]
        yield weight_conv2d, WeightConv2d(window, 12, 20, 1, store(), False, coding), [image], epilogue.pack(weights), [], results
        deep = weights[:, :12, :, :, :1]
        spec = WeightConv2d(window, 12, 12, 12, store(), False, coding)
        yield weight_depthwise, spec, [image], epilogue.pack(deep), [], [((1, 5, 7, 12), "float32")]
        flat = epilogue.pack(weights.reshape(coding.planes, 20, -1))
        yield weight_dense, WeightDense(108, 20, coding, store()), [rows], flat, [], [((5, 20), "float32")]
        yield weight_dense_int8, WeightDenseInt8(108, 20, coding, INTS), [rows], flat, [], [((5, 20), "int32")]


def test_no_family_is_missing():
    """Of every family there is a case above, and of every specification."""
    found = list(cases(np.random.default_rng(0)))
    assert {family.__name__.split(".")[-1] for family, *_ in found} == {*FAMILIES.values(), *DEPTHWISE.values()}
    assert {type(spec) for _, spec, *_ in found} == {*FAMILIES}


@pytest.mark.parametrize("target", TARGETS)
def test_every_family(target):
    """All kernels in one program: integers bit for bit, floats to 1e-5."""
    isa, kernels, runs = registry.resolve(target), {}, []
    for family, spec, data, weights, inputs, results in cases(np.random.default_rng(0)):
        if isa.products in ("dot", "matrix") and family not in BYTES and not (family is bitserial_conv2d and by_bytes.wins(spec, isa)):
            continue
        schedule, name = family.default_schedule(spec, isa), f"kernel_{len(kernels)}"
        kernels[name] = family.build(spec, schedule, isa)
        arrays, plain = list(data), list(data)
        if weights is not None:
            at = len(spec.planes.data) if hasattr(spec, "planes") else 1
            arrays.insert(at, family.pack_weights(spec, schedule, isa, weights))
            plain.insert(at, weights)
        runs.append((name, spec, [*arrays, *inputs], family.reference(spec, plain, inputs), results))
    compiled = Program(kernels, isa)
    for name, spec, arrays, expected, results in runs:
        got = compiled.run([*arrays, *(np.full(shape, 77, dtype) for shape, dtype in results)], name=name)[len(arrays) :]
        for a, b in zip(got, expected, strict=True):
            if b.dtype == np.float32:
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=str(spec))
            else:
                np.testing.assert_array_equal(a, b, err_msg=str(spec))


@pytest.mark.parametrize("made, inexact", [(picking, 0), (deciding, 1)])
def test_the_smallest_numbers_are_told_apart(made, inexact):
    """Where they decide, though NEON's arithmetic takes them for zero; the last ``inexact`` results are such arithmetic."""
    steps, data, operand = made()
    spec, isa = Map(2, (), 40, "float32", steps), registry.resolve("armv7")
    results = map_family.reference(spec, [data], [operand])
    garbage = [np.full_like(r, 77) for r in results]
    compiled = Program(map_family.build(spec, map_family.default_schedule(spec, isa), isa), isa)
    got = compiled.run([data, operand, *garbage])[2:]
    for a, b in zip(got[: len(got) - inexact], results):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "target, size, channels", [("cortex-a72", 14, 256), ("armv7", 7, 512), ("cortex-a72", 28, 128), ("armv7", 28, 128)]
)
def test_inner_loop_and_whole_layer(target, size, channels):
    """At most 3.6 instructions per 128 binary MACs in the loop, nothing spilled, and the whole layer at most 1.35 times that."""
    isa, spec = registry.resolve(target), layer(size, channels)
    compiled, schedule = program(spec, isa)
    body, pairs = counting_loop(compiled.assembly)
    assert len(body) / pairs <= 3.6 and not any("[sp" in line or line.startswith(("mov\tv", "str", "stp")) for line in body), body
    executed = compiled.instructions(operands(spec, schedule, isa))
    assert executed / (size * size * channels * channels * 9 / 128) <= 1.35 * len(body) / pairs


def same(height, width, channels, outputs, family, **kinds):
    """A 3x3 convolution."""
    return family(Window(height, width, (3, 3), (1, 1), SAME), channels, outputs, **kinds)


@pytest.mark.parametrize(
    "family, spec, target, name",
    [
        (int8_conv2d, same(14, 14, 64, 64, Int8Conv2d, epilogue=INTS), "cortex-a76", "sdot"),
        (int8_conv2d, same(14, 14, 64, 64, Int8Conv2d, data=TWO_BITS, weights=Digits(1, (-2,)), epilogue=INTS), "cortex-a72", "smlal"),
        (float_conv2d, same(14, 14, 64, 64, FloatConv2d, epilogue=store()), "cortex-a72", "fmla"),
        (float_dense, FloatDense(128, 64, store()), "cortex-a72", "fmla"),
    ],
)  # fmt: skip
def test_loops_of_products(family, spec, target, name):
    """Loads and all else are at most a quarter of the products (smlal: three quarters, bytes are repeated), and nothing is spilled."""
    isa = registry.resolve(target)
    compiled = Program(family.build(spec, family.default_schedule(spec, isa), isa), isa)
    body, count = counting_loop(compiled.assembly, (name, f"{name}2"))
    assert len(body) / count <= (1.75 if name == "smlal" else 1.25), body
    assert not any("[sp" in line or line.startswith("mov\tv") for line in body), body


def network_of(levels):
    """Sign, convolution with zero padding, batch normalisation, residual connection and classifier; weights of the given levels."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.choice(levels, (64, 64, 3, 3)), "s": np.abs(whole(rng, 64)) + 1, "b": whole(rng, 64), "m": whole(rng, 64),
        "v": np.abs(whole(rng, 64)) + 1, "d": rng.choice(levels, (64, 10)),
    }  # fmt: skip
    nodes = [
        helper.make_node("Sign", ["x"], ["x1"]), helper.make_node("Conv", ["x1", "w"], ["c"], pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["n"]), helper.make_node("Add", ["n", "x"], ["r"]),
        helper.make_node("Sign", ["r"], ["r1"]), helper.make_node("Conv", ["r1", "w"], ["c2"], pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["c2"], ["g"]), helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Sign", ["f"], ["f1"]), helper.make_node("MatMul", ["f1", "d"], ["y"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "network", [helper.make_tensor_value_info("x", 1, ["N", 64, 6, 6])], [helper.make_tensor_value_info("y", 1, ["N", 10])],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model.SerializeToString()


@pytest.fixture(scope="module")
def network():
    return network_of([-1, 1])


@pytest.mark.parametrize("target, levels", [("cortex-a72", [-1, 1]), ("armv7", [-1, 1]), ("armv7", [-1, 0, 1])])
def test_network_as_on_this_machine(target, levels):
    """Bit for bit, with exact zeros and subnormal numbers in the input, some of which decide after a sum with zero."""
    x = np.random.default_rng(1).standard_normal((2, 64, 6, 6)).astype(np.float32)
    x[0, :, 1], x[1, :, 2], x[1, :, 3], x[1, :, 4] = 0.0, -0.0, -1e-45, 1e-45
    network = network_of(levels)
    np.testing.assert_array_equal(Network(network, target).run({"x": x})["y"], bnntvm.build(network)(x))


@pytest.mark.parametrize("target", ["aarch64", "armv7"])
def test_built_for_another_machine(network, target, tmp_path):
    """It is exported and neither run nor loaded here, which the message says."""
    module = bnntvm.build(network, target)
    assert module.report.code_bytes > 1000
    module.export(tmp_path / "network.bnn")
    machine = registry.resolve(target).machine
    for action in (lambda: module(np.zeros((1, 64, 6, 6), np.float32)), lambda: bnntvm.load(tmp_path / "network.bnn")):
        with pytest.raises(bnntvm.TargetError, match=f"built for {machine}, this machine is"):
            action()


def test_names():
    """Architectures, levels, processors and TVM's targets."""
    assert registry.resolve("arm64").name == "aarch64" and registry.resolve("apple-m1").mcpu == "apple-m1"
    assert registry.resolve({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a53"}).name == "cortex-a53"
    assert registry.resolve({"kind": "llvm", "mtriple": "armv7l-linux-gnueabihf"}).machine == "arm"
    assert registry.resolve({"kind": "llvm", "mtriple": "aarch64-apple-darwin"}) is None
    assert all(registry.resolve(name).name == name for name in [*registry.names(), *aarch64.PROCESSORS, *armv7.PROCESSORS])


def test_no_cross_compiler(network, monkeypatch):
    """The message names both ways to get one."""
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_cross_compiler(registry.resolve("aarch64")) is None
    with pytest.raises(bnntvm.ToolchainError, match="(?s)no C compiler or linker found for aarch64.*pip install ziglang.*gcc-aarch64"):
        bnntvm.build(network, "aarch64")
