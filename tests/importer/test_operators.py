"""Every operator against ONNX Runtime, one small model each."""

import numpy as np
import pytest
from onnx import helper

from .helpers import calls, check, constants, model, one

RNG = np.random.default_rng(7)


def data(*shape, low=-3.0, high=3.0):
    return RNG.uniform(low, high, shape).astype(np.float32)


X = data(2, 3, 4, 5)


@pytest.mark.parametrize(
    "op",
    "Abs Ceil Cos Erf Exp Floor Neg Reciprocal Relu Round Sigmoid Sign Sin Softplus Softsign Tan Tanh Identity HardSwish Mish Elu Selu Celu"
    " HardSigmoid LeakyRelu ThresholdedRelu Shrink Sinh Cosh Atan Asinh".split(),
)
def test_unary(op):
    x = np.concatenate([X.reshape(-1), np.array([0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 1, -1], np.float32)])
    if op == "Reciprocal":
        x = x[np.abs(x) > 0.1]
    check(one(op, {"x": x}, opset=18), {"x": x})


@pytest.mark.parametrize("op", ["Log", "Sqrt", "Acosh"])
def test_unary_of_positive(op):
    x = data(3, 4, low=1.1)
    check(one(op, {"x": x}), {"x": x})


@pytest.mark.parametrize("op", ["Asin", "Acos", "Atanh"])
def test_unary_of_small(op):
    x = data(3, 4, low=-0.9, high=0.9)
    check(one(op, {"x": x}), {"x": x})


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate):
    check(one("Gelu", {"x": X}, opset=20, approximate=approximate), {"x": X})


@pytest.mark.parametrize("op", "Add Sub Mul Div Max Min Mean Sum Greater Less Equal GreaterOrEqual LessOrEqual".split())
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 1, 1), (1, 3, 1, 1), (2, 3, 4, 5), (2, 1, 1, 5), (1, 1, 1, 1, 1)])
def test_binary_with_constant_on_either_side(op, shape):
    c = np.round(data(*shape)) + np.float32(0.25)
    x = np.round(X) + np.float32(0.25)
    for order in (["x", "c"], ["c", "x"]):
        check(one(op, {"x": x}, {"c": np.asarray(c, np.float32)}, order=order), {"x": x})


def test_binary_of_two_inputs_broadcasts():
    a, b = data(2, 3, 1, 5), data(4, 1)
    check(one("Mul", {"a": a, "b": b}), {"a": a, "b": b})


@pytest.mark.parametrize("op", ["And", "Or", "Xor"])
def test_logic(op):
    a, b = X > 0, X > 1
    check(one(op, {"a": a, "b": b}), {"a": a, "b": b})
    check(one("Not", {"a": a}), {"a": a})


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Mod"])
def test_integers(op):
    a, b = RNG.integers(-9, 9, (4, 5)).astype(np.int32), np.array([1, -2, 3, -4, 5], np.int32)
    check(one(op, {"a": a}, {"b": b}), {"a": a})
    b = np.abs(b)
    check(one(op, {"a": b}, {"b": b[::-1].copy()}), {"a": b})


@pytest.mark.parametrize("op", ["BitwiseAnd", "BitwiseOr", "BitwiseXor"])
def test_bitwise(op):
    a, b = RNG.integers(0, 255, (4, 5)).astype(np.uint8), np.array([3], np.uint8)
    check(one(op, {"a": a}, {"b": b}, opset=18), {"a": a})
    check(one("BitShift", {"a": a}, {"b": b}, direction="RIGHT"), {"a": a})


@pytest.mark.parametrize("exponent", [2.0, 3.0, 0.5, 1.7, -1.0])
def test_power(exponent):
    x = data(3, 4, low=0.2)
    check(one("Pow", {"x": x}, {"e": np.float32(exponent)}), {"x": x})


def test_constants_become_as_small_as_broadcasting_allows():
    full = np.ascontiguousarray(np.broadcast_to(data(1, 3, 1, 1), X.shape))
    assert constants(check(one("Add", {"x": X}, {"c": full}), {"x": X}))[0].shape == (1, 3, 1, 1)
    same = np.full(X.shape, 2.0, np.float32)
    assert constants(check(one("Mul", {"x": X}, {"c": same}), {"x": X}))[0].shape == ()
    # Not where the constant makes the result larger.
    small = data(1, 3, 1, 1)
    assert constants(check(one("Add", {"x": small}, {"c": full}), {"x": small}))[0].shape == full.shape
    mixed = np.zeros(X.shape, np.float32)
    mixed[1] = -0.0  # equal by comparison, not by sign
    assert constants(check(one("Add", {"x": X}, {"c": mixed}), {"x": X}))[0].shape == (2, 1, 1, 1)


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (None, 1.0), (0.0, None), (None, None), (-np.inf, 2.0)])
def test_clip(low, high):
    feed = {"x": X}
    bounds = {k: np.float32(v) for k, v in (("low", low), ("high", high)) if v is not None}
    check(one("Clip", feed, bounds, order=["x", "low" if low is not None else "", "high" if high is not None else ""]), feed)
    attributes = {k: float(v) for k, v in (("min", low), ("max", high)) if v is not None}
    check(one("Clip", feed, opset=10, **attributes), feed)


@pytest.mark.parametrize("slope", [(3, 1, 1), (1,), (5,)])
def test_prelu(slope):
    check(one("PRelu", {"x": X}, {"slope": data(*slope)}), {"x": X})


def test_where_of_scalars_and_full_constants():
    nodes = [helper.make_node("Greater", ["x", "zero"], ["c"]), helper.make_node("Where", ["c", "one", "minus"], ["y"])]
    for shape in ((), X.shape):
        consts = {"zero": np.float32(0), "one": np.full(shape, 1, np.float32), "minus": np.full(shape, -1, np.float32)}
        imported = check(model(nodes, {"x": X}, ["y"], consts), {"x": X})
        assert [c.shape for c in constants(imported)] == [(), (), ()]


@pytest.mark.parametrize(
    "source, to", [("float32", 6), ("float32", 9), ("float32", 7), ("int32", 1), ("bool", 1), ("uint8", 1), ("float32", 2)]
)
def test_cast(source, to):
    x = np.abs(X * 20).astype(source) if to == 2 or source == "uint8" else (X * 2).astype(source)
    check(one("Cast", {"x": x}, to=to), {"x": x})


def test_cast_like():
    check(one("CastLike", {"x": X}, {"like": np.zeros(1, np.int32)}), {"x": X})


# ---- layers


@pytest.mark.parametrize(
    "shape, weight, attributes",
    [
        ((2, 3, 9, 8), (4, 3, 3, 3), dict(pads=[1, 1, 1, 1])),
        ((2, 3, 9, 8), (4, 3, 3, 3), dict(pads=[0, 1, 2, 0], strides=[2, 1], dilations=[1, 2])),
        ((2, 4, 9, 8), (8, 1, 3, 2), dict(group=4)),
        ((2, 4, 9, 8), (6, 2, 1, 1), dict(group=2)),
        ((2, 3, 9, 8), (4, 3, 2, 3), dict(auto_pad="SAME_UPPER", strides=[2, 2])),
        ((2, 3, 9, 8), (4, 3, 2, 4), dict(auto_pad="SAME_LOWER", strides=[2, 2])),
        ((2, 3, 9, 8), (4, 3, 3, 3), dict(auto_pad="VALID")),
        ((2, 3, 9), (4, 3, 3), dict(pads=[1, 2], strides=[2])),
        ((2, 3, 5, 6, 7), (4, 3, 3, 2, 1), dict(pads=[1, 0, 0, 1, 1, 0])),
    ],
)
@pytest.mark.parametrize("bias", [None, "zero", "random"])
def test_conv(shape, weight, attributes, bias):
    x, consts = data(*shape), {"w": data(*weight)}
    if bias:
        consts["b"] = data(weight[0]) if bias == "random" else np.zeros(weight[0], np.float32)
    imported = check(one("Conv", {"x": x}, consts, **attributes), {"x": x})
    assert calls(imported) == ["bnn.conv"] + ["relax.add"] * (bias == "random")
    (layer,) = imported.layers
    out = int(np.prod(imported.outputs[0].shape[1:]))
    assert (layer.node, layer.output, layer.op_type) == ("node", "y0", "Conv")
    assert (layer.weight_shape, layer.float_bytes, layer.folded) == (weight, 4 * int(np.prod(weight)), False)
    assert layer.macs == out * int(np.prod(weight[1:]))


def test_conv_with_weight_and_bias_from_inputs():
    feed = {"x": data(2, 3, 6, 6), "w": data(4, 3, 3, 3), "b": data(4)}
    imported = check(one("Conv", feed), feed)
    assert imported.layers[0].weight_shape is None


@pytest.mark.parametrize(
    "shape, weight, attributes",
    [
        ((2, 3, 5, 4), (3, 4, 3, 3), {}),
        ((2, 3, 5, 4), (3, 4, 3, 3), dict(strides=[2, 3], pads=[1, 0, 0, 1], output_padding=[1, 2])),
        ((2, 4, 5, 4), (4, 3, 3, 2), dict(group=2, dilations=[2, 1], strides=[2, 2])),
        ((2, 3, 5, 4), (3, 4, 3, 3), dict(strides=[2, 2], output_shape=[10, 8])),
        ((2, 3, 5, 4), (3, 4, 4, 3), dict(strides=[2, 2], auto_pad="SAME_UPPER")),
        ((2, 3, 5, 4), (3, 4, 4, 3), dict(strides=[2, 2], auto_pad="SAME_LOWER")),
        ((2, 3, 5), (3, 4, 3), dict(strides=[2])),
    ],
)
def test_conv_transpose(shape, weight, attributes):
    x = data(*shape)
    imported = check(
        one("ConvTranspose", {"x": x}, {"w": data(*weight), "b": data(weight[1] * attributes.get("group", 1))}, **attributes), {"x": x}
    )
    assert imported.layers[0].macs == int(np.prod(shape[1:])) * int(np.prod(weight[1:]))


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("c", [None, (), (6,), (1, 6), (4, 1), (4, 6)])
def test_gemm(trans_a, trans_b, c):
    a, b = data(*((5, 4) if trans_a else (4, 5))), data(*((6, 5) if trans_b else (5, 6)))
    consts = {"b": b} | ({} if c is None else {"c": np.asarray(data(*c), np.float32)})
    for alpha, beta in ((1.0, 1.0), (0.5, 2.0), (1.0, 0.0)):
        imported = check(one("Gemm", {"a": a}, consts, transA=trans_a, transB=trans_b, alpha=alpha, beta=beta), {"a": a})
        assert imported.layers[0].macs == 30
        assert imported.layers[0].weight_shape == b.shape
    check(one("Gemm", {"a": a, "b": b}, transA=trans_a, transB=trans_b), {"a": a, "b": b})


@pytest.mark.parametrize(
    "a, b", [((4, 5), (5, 6)), ((2, 3, 4, 5), (5, 6)), ((2, 4, 5), (2, 5, 6)), ((5,), (5, 6)), ((4, 5), (5,)), ((2, 1, 4, 5), (3, 5, 6))]
)
def test_matmul(a, b):
    a, b = data(*a), data(*b)
    check(one("MatMul", {"a": a, "b": b}), {"a": a, "b": b})
    check(one("MatMul", {"a": a}, {"b": b}), {"a": a})
    check(one("MatMul", {"b": b}, {"a": a}, order=["a", "b"]), {"b": b})


def test_a_layer_of_constants_is_folded_and_reported():
    nodes = [helper.make_node("MatMul", ["a", "b"], ["c"], name="inner"), helper.make_node("Add", ["x", "c"], ["y"])]
    x = data(4, 6)
    imported = check(model(nodes, {"x": x}, ["y"], {"a": data(4, 5), "b": data(5, 6)}), {"x": x})
    assert calls(imported) == ["relax.add"]
    assert [(layer.output, layer.folded) for layer in imported.layers] == [("c", True)]


def test_integer_layers():
    a, b = RNG.integers(0, 255, (4, 5)).astype(np.uint8), RNG.integers(-128, 127, (5, 6)).astype(np.int8)
    check(one("MatMulInteger", {"a": a}, {"b": b, "za": np.uint8(128), "zb": np.int8(3)}), {"a": a})
    check(one("MatMulInteger", {"a": a}, {"b": b, "za": np.uint8(128), "zb": RNG.integers(-3, 3, 6).astype(np.int8)}), {"a": a})
    x, w = RNG.integers(0, 255, (1, 3, 6, 6)).astype(np.uint8), RNG.integers(0, 255, (4, 3, 3, 3)).astype(np.uint8)
    imported = check(one("ConvInteger", {"x": x}, {"w": w, "zx": np.uint8(7), "zw": np.uint8(128)}, pads=[1, 1, 1, 1]), {"x": x})
    assert imported.layers[0].op_type == "ConvInteger"


def test_fully_quantised_layers():
    a, b = RNG.integers(0, 255, (4, 5)).astype(np.uint8), RNG.integers(-128, 127, (5, 6)).astype(np.int8)
    scales = {"sa": np.float32(0.02), "za": np.uint8(120), "b": b, "sb": np.float32(0.03), "zb": np.int8(0)}
    consts = scales | {"sy": np.float32(0.25), "zy": np.uint8(128)}
    imported = check(one("QLinearMatMul", {"a": a}, consts), {"a": a})
    assert imported.layers[0].weight_shape == (5, 6)
    x, w = RNG.integers(0, 255, (1, 3, 6, 6)).astype(np.uint8), RNG.integers(-128, 127, (4, 3, 3, 3)).astype(np.int8)
    for per_filter in (False, True):
        w_scale = np.array([0.01, 0.02, 0.03, 0.04], np.float32) if per_filter else np.float32(0.02)
        consts = {"sx": np.float32(0.02), "zx": np.uint8(128), "w": w, "sw": w_scale, "zw": np.zeros(w_scale.shape, np.int8)}
        consts |= {"sy": np.float32(0.3), "zy": np.uint8(100), "b": RNG.integers(-999, 999, 4).astype(np.int32)}
        imported = check(one("QLinearConv", {"x": x}, consts, pads=[1, 1, 1, 1]), {"x": x})
        assert (imported.layers[0].op_type, imported.layers[0].weight_shape) == ("QLinearConv", (4, 3, 3, 3))


def test_dynamic_quantisation():
    check(one("DynamicQuantizeLinear", {"x": X}, outputs=3), {"x": X})


@pytest.mark.parametrize("zero", [None, np.uint8(128), np.int8(-3)])
def test_quantize_and_dequantize(zero):
    consts = {"s": np.float32(0.07)} | ({} if zero is None else {"z": zero})
    x = np.concatenate([X.reshape(-1), np.arange(-300, 300, dtype=np.float32) * np.float32(0.035)])
    check(one("QuantizeLinear", {"x": x}, consts), {"x": x})
    q = RNG.integers(0, 100, (4, 5)).astype(np.uint8 if zero is None else zero.dtype)
    check(one("DequantizeLinear", {"q": q}, consts), {"q": q})


def test_quantize_per_axis():
    consts = {"s": np.array([0.1, 0.2, 0.5], np.float32), "z": np.array([0, 5, -7], np.int8)}
    check(one("QuantizeLinear", {"x": X}, consts, axis=1), {"x": X})
    q = RNG.integers(-100, 100, (2, 3, 4)).astype(np.int8)
    check(one("DequantizeLinear", {"q": q}, consts, axis=1), {"q": q})


# ---- pooling and reductions


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(
    "shape, attributes",
    [
        ((2, 3, 7, 8), dict(kernel_shape=[2, 2], strides=[2, 2])),
        ((2, 3, 7, 8), dict(kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])),
        ((2, 3, 7, 8), dict(kernel_shape=[3, 3], strides=[2, 2], pads=[1, 0, 0, 1])),
        ((2, 3, 7, 8), dict(kernel_shape=[2, 3], strides=[2, 2], ceil_mode=1)),
        ((2, 3, 7, 8), dict(kernel_shape=[3, 3], strides=[3, 2], ceil_mode=1, pads=[1, 1, 1, 1])),
        ((1, 1, 4, 4), dict(kernel_shape=[1, 1], strides=[2, 2], ceil_mode=1, pads=[0, 0, 0, 0])),
        ((1, 1, 2, 2), dict(kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1, pads=[1, 1, 1, 1])),
        ((2, 3, 7, 8), dict(kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER")),
        ((2, 3, 7, 8), dict(kernel_shape=[2, 4], strides=[2, 2], auto_pad="SAME_LOWER")),
        ((2, 3, 7, 8), dict(kernel_shape=[2, 2], auto_pad="VALID")),
        ((2, 3, 9), dict(kernel_shape=[3], strides=[2], pads=[1, 1])),
        ((2, 3, 5, 6, 4), dict(kernel_shape=[3, 2, 2], strides=[2, 2, 1])),
    ],
)
def test_pool(op, shape, attributes):
    x = data(*shape)
    variants = [{}] if op == "MaxPool" else [{}, dict(count_include_pad=1)]
    for variant in variants:
        if op == "AveragePool":
            check(one(op, {"x": x}, opset=19, **attributes, **variant), {"x": x})
        else:
            check(one(op, {"x": x}, **attributes), {"x": x})


def test_dilated_pool():
    check(one("MaxPool", {"x": X}, kernel_shape=[2, 2], dilations=[2, 3]), {"x": X})
    check(one("AveragePool", {"x": X}, opset=19, kernel_shape=[2, 2], dilations=[2, 3], pads=[1, 1, 0, 0]), {"x": X})


@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool"])
def test_global_pool(op):
    check(one(op, {"x": X}), {"x": X})


@pytest.mark.parametrize(
    "op", "ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSumExp".split()
)
@pytest.mark.parametrize("axes", [None, [1], [-1, 1], [0, 2, 3]])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reduce(op, axes, keepdims):
    attributes = dict(keepdims=keepdims)
    if op == "ReduceSum":
        consts, opset = ({} if axes is None else {"axes": np.array(axes, np.int64)}), 13
    else:
        consts, opset, attributes = {}, 12, attributes | ({} if axes is None else dict(axes=axes))
    check(one(op, {"x": X}, consts, opset=opset, **attributes), {"x": X})
    consts = {} if axes is None else {"axes": np.array(axes, np.int64)}
    check(one(op, {"x": X}, consts, opset=18, keepdims=keepdims), {"x": X})


def test_reduce_of_no_axes_is_nothing():
    imported = check(one("ReduceSum", {"x": X}, {"axes": np.zeros(0, np.int64)}, noop_with_empty_axes=1), {"x": X})
    assert calls(imported) == []


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1])
def test_softmax(op, opset, axis):
    check(one(op, {"x": X}, opset=opset, **({} if axis is None else dict(axis=axis))), {"x": X})


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_arg(op, last, keepdims):
    x = np.round(X)
    check(one(op, {"x": x}, axis=2, keepdims=keepdims, select_last_index=last), {"x": x})


@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("exclusive", [0, 1])
def test_cumsum(reverse, exclusive):
    check(one("CumSum", {"x": X}, {"axis": np.int64(2)}, reverse=reverse, exclusive=exclusive), {"x": X})


def test_top_k():
    check(one("TopK", {"x": X}, {"k": np.array([2], np.int64)}, outputs=2, axis=1), {"x": X})
    check(one("TopK", {"x": X}, {"k": np.array([3], np.int64)}, outputs=2, largest=0), {"x": X})


def test_einsum():
    a, b = data(2, 3, 4), data(2, 4, 5)
    check(one("Einsum", {"a": a, "b": b}, equation="bij,bjk->bik"), {"a": a, "b": b})


@pytest.mark.parametrize(
    "equation, left, right",
    [
        ("bct,cd->btd", (2, 3, 4), (3, 5)),
        ("btc,dc->btd", (2, 3, 4), (5, 4)),
        ("bhqd,bhkd->bhqk", (2, 3, 4, 5), (2, 3, 6, 5)),
        ("bqhd,bkhd->bhqk", (2, 4, 3, 5), (2, 6, 3, 5)),
        ("bhqk,bkhd->bqhd", (2, 3, 4, 6), (2, 6, 3, 5)),
        ("bchw,oc->bohw", (2, 3, 4, 5), (6, 3)),
        ("bij,ijk->bk", (2, 3, 4), (3, 4, 5)),
        ("bk,bk->b", (2, 5), (2, 5)),
        ("bnc,c->bn", (2, 3, 4), (4,)),
        ("bnc,chd->bnhd", (2, 3, 4), (4, 2, 5)),
        ("bij,bkj->ki", (2, 3, 4), (2, 5, 4)),
    ],
)
@pytest.mark.parametrize("constant", [None, "a", "b"])
def test_einsum_of_two_is_a_product(equation, left, right, constant):
    given = {"a": data(*left), "b": data(*right)}
    consts = {constant: given[constant]} if constant else {}
    feed = {name: value for name, value in given.items() if name not in consts}
    imported = check(one("Einsum", feed, consts, order=["a", "b"], equation=equation), feed)
    (layer,) = imported.layers
    assert layer.op_type == "Einsum"
    assert "bnn.matmul" in calls(imported)


@pytest.mark.parametrize("equation, left, right", [("ij,ij->ij", (3, 4), (3, 4)), ("ij,k->ik", (3, 4), (5,)), ("i,j->ij", (3,), (4,))])
def test_einsum_of_another_kind(equation, left, right):
    feed = {"a": data(*left), "b": data(*right)}
    assert not check(one("Einsum", feed, equation=equation), feed).layers


# ---- normalisations


def test_batch_normalization():
    consts = {k: data(3) for k in ("g", "b", "m")} | {"v": data(3, low=0.5)}
    imported = check(one("BatchNormalization", {"x": X}, consts, epsilon=1e-3), {"x": X})
    assert calls(imported) == ["relax.multiply", "relax.add"]
    scale = consts["g"] / np.sqrt(consts["v"] + np.float32(1e-3))
    got_scale, got_shift = constants(imported)
    assert got_scale.shape == (1, 3, 1, 1)
    assert got_scale.tobytes() == scale.tobytes()
    assert got_shift.tobytes() == (consts["b"] - consts["m"] * scale).tobytes()
    x = data(4, 3)
    check(one("BatchNormalization", {"x": x}, consts), {"x": x})
    feed = {"x": x, **consts}
    check(one("BatchNormalization", feed), feed)


def test_instance_group_and_layer_normalization():
    consts = {"s": data(4), "b": data(4)}
    x = data(2, 4, 5, 3)
    check(one("InstanceNormalization", {"x": x}, consts), {"x": x})
    check(one("GroupNormalization", {"x": x}, consts, opset=21, num_groups=2), {"x": x})
    check(one("LayerNormalization", {"x": x}, {"s": data(3), "b": data(3)}), {"x": x}, 1e-4)
    check(one("LayerNormalization", {"x": x}, {"s": data(5, 3)}, axis=2), {"x": x}, 1e-4)
    check(one("RMSNormalization", {"x": x}, {"s": data(3)}, opset=23), {"x": x}, 1e-4)
    check(one("LpNormalization", {"x": x}, axis=1, p=2), {"x": x})
    check(one("LRN", {"x": x}, size=3, alpha=0.1), {"x": x})


# ---- shapes


@pytest.mark.parametrize("shape", [(6, 20), (2, -1), (0, -1), (0, 0, 20), (-1,), (1, 2, 3, 20)])
def test_reshape(shape):
    check(one("Reshape", {"x": X}, {"s": np.array(shape, np.int64)}), {"x": X})


@pytest.mark.parametrize("axis", [0, 1, 2, 4, -1])
def test_flatten(axis):
    check(one("Flatten", {"x": X}, axis=axis), {"x": X})


def test_squeeze_and_unsqueeze():
    x = data(2, 1, 3, 1)
    check(one("Squeeze", {"x": x}), {"x": x})
    check(one("Squeeze", {"x": x}, {"a": np.array([-1], np.int64)}), {"x": x})
    check(one("Squeeze", {"x": x}, opset=11, axes=[1]), {"x": x})
    check(one("Unsqueeze", {"x": x}, {"a": np.array([0, -1], np.int64)}), {"x": x})
    check(one("Unsqueeze", {"x": x}, opset=11, axes=[2, 0]), {"x": x})


def test_transpose_concat_tile_expand():
    check(one("Transpose", {"x": X}), {"x": X})
    check(one("Transpose", {"x": X}, perm=[0, 2, 3, 1]), {"x": X})
    a, b = data(2, 3), data(2, 4)
    check(one("Concat", {"a": a, "b": b}, axis=-1), {"a": a, "b": b})
    check(one("Concat", {"a": a}, {"b": b}, axis=1), {"a": a})
    check(one("Tile", {"a": a}, {"r": np.array([2, 3], np.int64)}), {"a": a})
    check(one("Expand", {"a": a}, {"s": np.array([4, 1, 3], np.int64)}), {"a": a})


@pytest.mark.parametrize(
    "starts, ends, axes, steps",
    [
        ([1], [3], [2], None),
        ([0, 1], [2, 100], [0, 3], [1, 2]),
        ([-1], [-100], [3], [-1]),
        ([3], [0], [3], [-2]),
        ([-3], [-1], [-1], None),
        ([0, 0, 0, 1], [2, 3, 4, 2**63 - 1], None, None),
    ],
)
def test_slice(starts, ends, axes, steps):
    consts = {
        "s": np.array(starts),
        "e": np.array(ends),
        "a": None if axes is None else np.array(axes),
        "t": None if steps is None else np.array(steps),
    }
    given = {k: v for k, v in consts.items() if v is not None}
    check(one("Slice", {"x": X}, given, order=["x", *[k if v is not None else "" for k, v in consts.items()]][: 2 + 3]), {"x": X})
    if steps is None:
        check(one("Slice", {"x": X}, opset=9, starts=starts, ends=ends, **({} if axes is None else dict(axes=axes))), {"x": X})


def test_split():
    x = data(2, 7)
    check(one("Split", {"x": x}, {"s": np.array([3, 4], np.int64)}, outputs=2, axis=1), {"x": x})
    check(one("Split", {"x": x}, outputs=2, opset=11, axis=1, split=[5, 2]), {"x": x})
    check(one("Split", {"x": x}, outputs=3, opset=18, axis=1, num_outputs=3), {"x": x})


@pytest.mark.parametrize("indices", [1, -1, [0, -1], [[2, 1], [0, 0]]])
def test_gather(indices):
    check(one("Gather", {"x": X}, {"i": np.array(indices, np.int64)}, axis=1), {"x": X})
    table, i = data(3, 4), np.array(indices, np.int64)
    check(one("Gather", {"i": i}, {"t": table}, order=["t", "i"]), {"i": i})


def test_gather_elements():
    i = RNG.integers(-4, 4, (2, 3, 2, 5))
    check(one("GatherElements", {"x": X}, {"i": i}, axis=2), {"x": X})


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize("pads", [[0, 0, 1, 2, 0, 0, 2, 1], [0, 0, 3, 0, 0, 0, 0, 3], [0, 1, 0, 0, 0, 0, 0, 0]])
def test_pad(mode, pads):
    opset = 19 if mode == "wrap" else 13
    consts = {"p": np.array(pads, np.int64)} | ({"v": np.float32(-1.5)} if mode == "constant" else {})
    check(one("Pad", {"x": X}, consts, opset=opset, mode=mode), {"x": X})
    if mode != "wrap":
        check(one("Pad", {"x": X}, opset=10, mode=mode, pads=pads), {"x": X})


def test_pad_with_axes_and_negative_pads():
    consts = {"p": np.array([1, -1, 0, 2], np.int64), "v": np.float32(1), "a": np.array([3, 2], np.int64)}
    check(one("Pad", {"x": X}, consts, opset=18), {"x": X})


def test_blocks():
    x = data(2, 8, 4, 6)
    for mode in ("DCR", "CRD"):
        check(one("DepthToSpace", {"x": x}, blocksize=2, mode=mode), {"x": x})
    check(one("SpaceToDepth", {"x": x}, blocksize=2), {"x": x})


@pytest.mark.parametrize("coordinates", ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("scales", [(2, 2), (0.5, 1.5), (1, 3)])
def test_resize_nearest(coordinates, rounding, scales):
    consts = {"scales": np.array([1, 1, *scales], np.float32)}
    attributes = dict(mode="nearest", coordinate_transformation_mode=coordinates, nearest_mode=rounding)
    check(one("Resize", {"x": X}, consts, order=["x", "", "scales"], **attributes), {"x": X})


@pytest.mark.parametrize("coordinates", ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
@pytest.mark.parametrize("sizes", [(8, 10), (2, 5), (12, 15)])
def test_resize_linear(coordinates, sizes):
    consts = {"sizes": np.array([2, 3, *sizes], np.int64)}
    attributes = dict(mode="linear", coordinate_transformation_mode=coordinates)
    check(one("Resize", {"x": X}, consts, order=["x", "", "", "sizes"], **attributes), {"x": X})


def test_upsample():
    check(one("Upsample", {"x": X}, {"s": np.array([1, 1, 2, 3], np.float32)}, opset=9), {"x": X})


def test_fused_conv():
    consts = {"w": data(3, 3, 3, 3), "b": data(3)}
    for activation, parameters in (("Relu", None), ("Clip", [-0.5, 0.75]), ("Tanh", None), ("LeakyRelu", [0.1])):
        attributes = dict(activation=activation, pads=[1, 1, 1, 1]) | ({} if parameters is None else dict(activation_params=parameters))
        imported = check(one("FusedConv", {"x": X}, consts, domain="com.microsoft", **attributes), {"x": X})
        assert imported.layers[0].op_type == "FusedConv"
