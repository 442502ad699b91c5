"""Operators of ONNX Runtime's domain against ONNX Runtime."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from bnntvm.errors import UnsupportedError
from bnntvm.importer import import_model
from bnntvm.interpreter import run

from .helpers import calls, check, constants, one, reference, typed

DOMAIN = "com.microsoft"
RNG = np.random.default_rng(23)
f32 = np.float32


def data(*shape):
    return RNG.uniform(-2, 2, shape).astype(f32)


def yields(kind, *args, **kwargs):
    """A model of one operator of this domain whose output has a type that ONNX's inference does not know."""
    proto = one(*args, domain=DOMAIN, **kwargs)
    proto.graph.output[0].type.tensor_type.elem_type = typed(np.zeros(0, kind))
    return proto


# ---- transformers


@pytest.mark.parametrize("kind", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
@pytest.mark.parametrize("more", [0, 1, 2])
def test_normalisation_of_a_sum(kind, more):
    feed = {"x": data(2, 3, 8), "skip": data(2, 3, 8)}
    simple = kind == "SkipSimplifiedLayerNormalization"
    given = {"scale": data(8), **({} if simple else {"shift": data(8)}), "bias": data(8)}
    given = dict(list(given.items())[: 1 + (more > 0 if simple else more)])
    proto = one(kind, feed, given, domain=DOMAIN, epsilon=1e-3)
    check(proto, feed)
    if not simple:
        del proto.graph.node[0].attribute[:]
        check(proto, feed)


@pytest.mark.parametrize("folder", [False, True])
def test_normalisation_in_the_domain_of_onnx(folder, tmp_path):
    """ONNX Runtime's optimiser writes it there, though ONNX does not know it; with the weights in a file of their own too."""
    x, scale = data(2, 3, 8), data(8)
    proto = one("SimplifiedLayerNormalization", {"x": x}, {"scale": scale}, axis=-1, epsilon=1e-3)
    wanted = reference(proto, {"x": x})
    source = proto
    if folder:
        source = tmp_path / "net.onnx"
        onnx.save(proto, source, save_as_external_data=True, size_threshold=0)
    np.testing.assert_allclose(run(import_model(source).mod, {"x": x})[0], wanted[0], atol=1e-5)


def test_the_sum_itself_is_a_result():
    feed = {"x": data(2, 3, 8), "skip": data(2, 3, 8)}
    proto = one("SkipLayerNormalization", feed, {"scale": data(8)}, outputs=4, domain=DOMAIN)
    del proto.graph.node[0].output[1:3], proto.graph.output[1:3]
    proto.graph.node[0].output[1:1] = ["", ""]
    check(proto, feed)


@pytest.mark.parametrize("kind, bias", [("BiasGelu", True), ("FastGelu", True), ("FastGelu", False), ("QuickGelu", False)])
def test_gelus(kind, bias):
    x = data(2, 3, 8)
    check(one(kind, {"x": x}, {"bias": data(8)} if bias else {}, domain=DOMAIN), {"x": x})


# ---- MatMulNBits


def n_bits(x, bits, rows, block, zeros=None, level=0, bias=False, flat=False):
    """A model of one MatMulNBits; zeros: None, "packed" or "float"."""
    depth = x.shape[-1]
    blocks = -(-depth // block)
    given = {
        "w": RNG.integers(0, 256, (rows, blocks, block * bits // 8)).astype(np.uint8),
        "scales": RNG.uniform(0.01, 0.1, (rows * blocks,) if flat else (rows, blocks)).astype(f32),
    }
    order = ["x", "w", "scales", "", "", ""]
    if zeros:
        packed = RNG.integers(0, 256, (rows, -(-blocks * bits // 8))).astype(np.uint8)
        given["zeros"] = packed if zeros == "packed" else RNG.uniform(0, 2**bits, (rows, blocks)).astype(f32)
        given["zeros"] = given["zeros"].reshape(-1) if flat else given["zeros"]
        order[3] = "zeros"
    if bias:
        given["bias"], order[5] = data(rows), "bias"
    while not order[-1]:
        order.pop()
    attributes = dict(K=depth, N=rows, bits=bits, block_size=block, accuracy_level=level)
    return one("MatMulNBits", {"x": x}, given, order=order, domain=DOMAIN, **attributes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", [None, "packed"])
@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("depth, block", [(64, 32), (80, 16)])
def test_matmul_n_bits(bits, zeros, level, depth, block):
    x = data(3, depth)
    x[1, :block] = 0  # a block without a largest magnitude
    imported = check(n_bits(x, bits, 5, block, zeros, level), {"x": x})
    (layer,) = imported.layers
    assert (layer.op_type, layer.macs, layer.weight_shape) == ("MatMulNBits", depth * 5, (5, depth))
    (weight,) = [c for c in constants(imported) if c.ndim == 2]
    assert weight.shape == (depth, 5)


@pytest.mark.parametrize("level", [0, 4])
def test_matmul_n_bits_of_rank_3_with_bias(level):
    x = data(2, 3, 72)  # the last block is not full
    imported = check(n_bits(x, 4, 6, 32, "packed", level, bias=True, flat=True), {"x": x})
    assert ("relax.round" in calls(imported)) == (level == 4)


@pytest.mark.parametrize(
    "bits, block, zeros, rounds", [(4, 32, "float", 0), (2, 16, None, 0), (2, 64, None, 1), (2, 256, None, 0), (4, 256, None, 1)]
)
def test_activations_are_rounded_where_onnx_runtime_has_a_kernel_for_int8(bits, block, zeros, rounds):
    x = data(3, 256)
    assert calls(check(n_bits(x, bits, 5, block, zeros, 4), {"x": x})).count("relax.round") == rounds


@pytest.mark.parametrize("zeros", [None, "float"])
def test_matmul_n_bits_with_columns_in_another_order(zeros):
    x = data(3, 80)
    proto = n_bits(x, 4, 5, 32, zeros)
    columns = RNG.permutation(np.arange(80) // 32).astype(np.int32)
    proto.graph.initializer.append(numpy_helper.from_array(columns, "columns"))
    names = [*proto.graph.node[0].input, ""][:4]
    proto.graph.node[0].input[:] = [*names, "columns"]
    check(proto, {"x": x})


def test_matmul_n_bits_with_columns_in_another_order_and_packed_zero_points():
    proto = n_bits(data(3, 64), 4, 5, 32, "packed")
    proto.graph.initializer.append(numpy_helper.from_array(np.repeat(np.int32([1, 0]), 32), "columns"))
    proto.graph.node[0].input.append("columns")
    with pytest.raises(UnsupportedError, match="packed zero points"):
        import_model(proto)


def test_matmul_n_bits_with_an_unknown_width():
    with pytest.raises(UnsupportedError, match="MatMulNBits with 3 bits"):
        import_model(n_bits(data(3, 64), 3, 5, 32))


# ---- fused


@pytest.mark.parametrize("trans", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_fused_matmul(trans):
    a, b = data(2, *((4, 3) if trans[0] else (3, 4))), data(*((5, 4) if trans[1] else (4, 5)))
    b3 = np.stack([b, b + 1])
    attributes = dict(domain=DOMAIN, transA=trans[0], transB=trans[1], alpha=0.5)
    check(one("FusedMatMul", {"a": a}, {"b": b3}, **attributes), {"a": a})
    check(one("FusedMatMul", {"a": a, "b": b3}, **attributes), {"a": a, "b": b3})


@pytest.mark.parametrize("activation", [dict(activation="Relu"), dict(activation="LeakyRelu", activation_alpha=0.3)])
def test_fused_gemm(activation):
    a, b, c = data(3, 4), data(5, 4), data(5)
    check(one("FusedGemm", {"a": a}, {"b": b, "c": c}, domain=DOMAIN, transB=1, alpha=0.5, beta=2.0, **activation), {"a": a})


def test_fused_convolution():
    x, w, b = data(1, 3, 6, 6), data(4, 3, 3, 3), data(4)
    given = dict(kernel_shape=[3, 3], activation="Clip", activation_params=[0.0, 1.0])
    check(one("FusedConv", {"x": x}, {"w": w, "b": b}, domain=DOMAIN, **given), {"x": x})
    z = data(1, 4, 4, 4)
    check(
        one("FusedConv", {"x": x, "z": z}, {"w": w, "b": b}, order=["x", "w", "b", "z"], domain=DOMAIN, activation="Relu"), {"x": x, "z": z}
    )


def test_gelu():
    x = data(3, 4)
    check(one("Gelu", {"x": x}, domain=DOMAIN), {"x": x})


# ---- 8-bit levels; scales are powers of two, so that ties are exact and the way of rounding them shows


def levels(kind, *shape):
    limits = np.iinfo(kind)
    return RNG.integers(limits.min, limits.max + 1, shape).astype(kind)


def scale(value, kind, zero):
    return f32(value), np.array(zero, kind)


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul"])
def test_qlinear_arithmetic(op, kind):
    a, b = levels(kind, 2, 3, 8), levels(kind, 3, 1)
    names = ["as", "az", "b", "bs", "bz", "cs", "cz"]
    given = dict(zip(names, [*scale(0.25, kind, 3), b, *scale(0.5, kind, 5), *scale(0.5 if op == "QLinearAdd" else 16.0, kind, 7)]))
    check(yields(kind, op, {"a": a}, given), {"a": a})


@pytest.mark.parametrize("op", ["QLinearLeakyRelu", "QLinearSigmoid"])
def test_qlinear_activation(op):
    x = levels("uint8", 2, 40)
    given = dict(zip(["xs", "xz", "ys", "yz"], [*scale(1 / 16, "uint8", 120), *scale(1 / 64, "uint8", 10)]))
    attributes = {"alpha": 0.25} if op == "QLinearLeakyRelu" else {}
    check(yields("uint8", op, {"x": x}, given, **attributes), {"x": x})


@pytest.mark.parametrize("last", [0, 1])
def test_qlinear_global_average_pool(last):
    x = levels("uint8", 2, 3, 4, 4)
    given = dict(zip(["xs", "xz", "ys", "yz"], [*scale(0.5, "uint8", 4), *scale(0.3, "uint8", 9)]))
    check(yields("uint8", "QLinearGlobalAveragePool", {"x": x}, given, channels_last=last), {"x": x})


def test_qlinear_concat():
    a, b = levels("uint8", 2, 3), levels("uint8", 2, 4)
    given = dict(zip(["ys", "yz", "as", "az", "bs", "bz"], [*scale(0.5, "uint8", 4), *scale(0.25, "uint8", 9), *scale(1.0, "uint8", 100)]))
    order = ["ys", "yz", "a", "as", "az", "b", "bs", "bz"]
    check(yields("uint8", "QLinearConcat", {"a": a, "b": b}, given, order=order, axis=1), {"a": a, "b": b})


@pytest.mark.parametrize("requantised", [False, True])
@pytest.mark.parametrize("trans", [0, 1])
def test_qgemm(requantised, trans):
    a, b = levels("uint8", 3, 6), levels("int8", *((5, 6) if trans else (6, 5)))
    bias = RNG.integers(-300, 300, 5).astype(np.int32)
    parts = [*scale(0.5, "uint8", 7), b, RNG.choice([0.25, 0.5], 5).astype(f32), np.zeros(5, np.int8), bias]
    given = dict(zip(["as", "az", "b", "bs", "bz", "c"], parts))
    given |= dict(zip(["ys", "yz"], scale(64.0, "uint8", 128))) if requantised else {}
    check(yields("uint8" if requantised else "float32", "QGemm", {"a": a}, given, transB=trans, transA=0, alpha=1.0), {"a": a})


def test_matmul_integer_to_float():
    a, b = levels("uint8", 3, 6), levels("int8", 6, 5)
    given = {"b": b, "as": f32(0.1), "bs": RNG.uniform(0.1, 1, 5).astype(f32), "az": np.uint8(3), "bz": levels("int8", 5), "bias": data(5)}
    check(one("MatMulIntegerToFloat", {"a": a}, given, domain=DOMAIN), {"a": a})


@pytest.mark.parametrize("kind", ["uint8", "int8", "uint16", "int16"])
def test_quantise_and_back(kind):
    x = data(3, 4) * 50
    given = dict(zip(["s", "z"], scale(0.25, kind, 3)))
    check(yields(kind, "QuantizeLinear", {"x": x}, given), {"x": x})
    q = levels(kind, 3, 4)
    check(one("DequantizeLinear", {"q": q}, given, domain=DOMAIN), {"q": q})
