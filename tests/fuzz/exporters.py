"""What exporters and their tools write beside plain operators: sub-byte types in blocks, fused and integer operators, functions, halves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tests.fuzz.families import _grid, as_written, expect, few_levels
from tests.fuzz.graphs import MAX_ELEMENTS, Tensor, layer
from tests.fuzz.layers import draw_weights, draw_window, product
from tests.fuzz.published import any_quantiser
from tests.fuzz.quantisers import QUANTISERS, larq, quantise, unipolar

MICROSOFT = "com.microsoft"
FUNCTIONS = "fuzz.functions"

# ---- weights in blocks


def small_types(opset):
    """(ONNX type, lowest, highest) of the types below a byte that an opset has for QuantizeLinear."""
    types = []
    if opset >= 21:
        types += [(TensorProto.INT4, -8, 7), (TensorProto.UINT4, 0, 15)]
    if opset >= 25:
        types += [(TensorProto.INT2, -2, 1), (TensorProto.UINT2, 0, 3)]
    return types


@layer(4)
def blocked(g, x):
    """A dense layer on weights of 2 or 4 bits, a scale for each block of inputs, each output or the tensor; binary ones among them."""
    if x.rank != 2 or g.opset < 21:
        return None
    x = any_quantiser(g, x) if g.chance(0.7) else x
    if x is None:
        return None
    kind, low, high = g.pick(*small_types(g.opset))
    count, outputs = x.channels, int(g.rng.integers(1, 50))
    content = g.pick("binary", "ternary", "all")
    zero = int(g.rng.integers(low, high + 1)) if content == "all" and g.chance(0.4) else 0 if low < 0 else 1
    if content == "all":
        codes = g.rng.integers(low, high + 1, (count, outputs))
    else:
        codes = zero + g.rng.choice([-1, 1] if content == "binary" and (low < -1 or zero) else [-1, 0, 1], (count, outputs))
    block = g.pick(0, 16, 32)
    blocks = -(-count // block) if block else 1
    per = g.pick("tensor", "output", "block") if block else g.pick("tensor", "output")
    shape = {"tensor": (), "output": (outputs,), "block": (blocks, outputs)}[per]
    if block:
        shape = (blocks, outputs)
    draw = 2.0 ** g.rng.integers(-2, 1, {"tensor": (1, 1), "output": (1, outputs), "block": (blocks, outputs)}[per])
    scales = np.broadcast_to(draw.reshape(()) if not shape else draw.reshape(-1) if len(shape) == 1 else draw, shape).astype(np.float32)
    operands = [g.small_const(codes.reshape(-1).tolist(), kind, codes.shape), scales]
    if zero or g.chance(0.5):
        operands.append(g.small_const([zero] * max(int(np.prod(shape)), 1), kind, shape))
    attributes = dict(axis=0, block_size=block) if block else dict(axis=1)
    weight = g.op("DequantizeLinear", operands, **attributes)
    name = g.op("MatMul", [x, weight]) if g.chance(0.5) else g.op("Gemm", [x, weight])
    if per != "block":
        planes = {"binary": 1 if np.all(codes != zero) else 2, "ternary": 2}.get(content, 4 if high - low > 3 else 2)
        expect(g, x, name, planes)
        if planes <= 2 and content != "all":
            g.packed.add(name)
    return Tensor(name, (x.shape[0], outputs), x.bound * 16 * count, x.grain - 2)


@layer(2)
def matmul_n_bits(g, x):
    """ONNX Runtime's dense layer on weights of 2, 4 or 8 bits in blocks."""
    if x.rank != 2:
        return None
    x = any_quantiser(g, x) if g.chance(0.6) else x
    if x is None:
        return None
    bits, block, count, outputs = g.pick(2, 4, 8), g.pick(16, 32), x.channels, int(g.rng.integers(1, 40))
    blocks = -(-count // block)
    codes = g.rng.integers(0, 256, (outputs, blocks, block * bits // 8)).astype(np.uint8)
    scales = 2.0 ** (g.rng.integers(-2, 1, (outputs, blocks)) if g.chance(0.5) else np.full((outputs, blocks), -1))
    operands = [x, codes, scales.astype(np.float32)]
    if g.chance(0.4):
        operands.append(g.rng.integers(0, 256, (outputs, -(-blocks * bits // 8))).astype(np.uint8))
    name = g.op("MatMulNBits", operands, domain=MICROSOFT, K=count, N=outputs, bits=bits, block_size=block)
    return Tensor(name, (x.shape[0], outputs), x.bound * 2.0**bits * count, x.grain - 2)


# ---- fused and integer operators


@layer(3)
def fused_convolution(g, x):
    """What ONNX Runtime's offline optimiser makes of a convolution and its activation."""
    window = draw_window(g, x) if x.rank == 4 else None
    if window is None:
        return None
    kernel, strides, pads, dilations, out = window
    x = quantise(g, x) if g.chance(0.8) else x
    outputs = int(g.rng.integers(1, 48))
    if outputs * int(np.prod(out)) > MAX_ELEMENTS:
        return None
    weights = draw_weights(g, (outputs, x.channels, *kernel))
    bias = (g.rng.integers(-8, 9, outputs) / 2).astype(np.float32)
    kind = g.pick("Relu", "Clip", "LeakyRelu")
    parameters = {"Clip": dict(activation_params=[-1.0, 2.0]), "LeakyRelu": dict(activation_params=[0.25])}.get(kind, {})
    form = dict(kernel_shape=kernel, strides=strides, pads=pads, dilations=dilations)
    name = g.op("FusedConv", [x, weights[0], bias], domain=MICROSOFT, activation=kind, **parameters, **form)
    made = product(g, x, name, (x.shape[0], outputs, *out), weights, x.channels * int(np.prod(kernel)))
    return replace(made, bound=made.bound + 4, grain=min(made.grain, -1) - 2)


def _bytes(g, x):
    """``x`` as uint8 levels: (name, zero point, lowest and highest level less the zero point)."""
    kind = g.pick("bits", "signs", "codes", "all")
    if kind == "bits":
        return g.op("Cast", [unipolar(g, x)], to=TensorProto.UINT8), 0, 0, 1
    if kind == "signs":
        return g.op("Cast", [g.op("Add", [g.pick(larq, selected_signs)(g, x), g.f(1)])], to=TensorProto.UINT8), 1, -1, 1
    zero = int(g.pick(0, 0, 1, 2) if kind == "codes" else g.pick(0, 128))
    q = g.op("QuantizeLinear", [x, g.f(0.5), np.array(zero, np.uint8)])
    if kind == "codes":
        return g.op("Clip", [q, np.array(0, np.uint8), np.array(3, np.uint8)]), zero, -zero, 3 - zero
    return q, zero, -zero, 255 - zero


def selected_signs(g, x):
    """+1 from 0 on, else -1."""
    return replace(x, name=g.op("Where", [g.op("GreaterOrEqual", [x, g.f(0)]), g.f(1), g.f(-1)]))


def _byte_weights(g, shape):
    """(array, zero point, largest magnitude, planes; None: many levels)."""
    kind = g.pick("signs", "signs", "shifted", "ternary", "codes", "all")
    if kind == "shifted":
        return (g.rng.integers(0, 2, shape) * 2).astype(np.uint8), 1, 1, 1
    if kind == "all":
        return g.rng.integers(-100, 101, shape).astype(np.int8), 0, 100, None
    levels, planes = {"signs": ([-1, 1], 1), "ternary": ([-1, 0, 1], 2), "codes": ([-2, -1, 0, 1], 2)}[kind]
    return g.rng.choice(levels, shape).astype(np.int8), 0, 2, planes


@layer(5)
def integer_layer(g, x):
    """ConvInteger, MatMulInteger, QLinearConv or QLinearMatMul, with content of few bits."""
    if x.rank not in (2, 4) or x.bound > 2.0**16:
        return None
    window = draw_window(g, x) if x.rank == 4 else None
    if x.rank == 4 and (window is None or 40 * int(np.prod(window[4])) > MAX_ELEMENTS):
        return None
    data, zero, low, high = _bytes(g, x)
    outputs, linear = int(g.rng.integers(1, 40)), g.chance(0.4)
    kernel = window[0] if window else []
    shape = (outputs, x.channels, *kernel) if window else (x.channels, outputs)
    weights, weight_zero, largest, planes = _byte_weights(g, shape)
    count = x.channels * int(np.prod(kernel))
    zeros = [np.array(zero, np.uint8), np.array(weight_zero, weights.dtype)]
    form, out = {}, ()
    if window:
        _, strides, pads, dilations, out = window
        form = dict(kernel_shape=kernel, strides=strides, pads=pads, dilations=dilations)
    result = (x.shape[0], outputs, *out)
    if linear:
        # ONNX Runtime's results have the type of the left operand
        scale = 2.0 ** int(g.rng.integers(0, 4))
        operands = [data, g.f(0.5), zeros[0], weights, g.f(0.25), zeros[1], g.f(scale), np.array(g.pick(0, 3), np.uint8)]
        name = g.op("QLinearConv" if window else "QLinearMatMul", operands, **form)
        made = Tensor(g.op("DequantizeLinear", [name, g.f(scale), operands[-1]]), result, 255 * scale, int(np.log2(scale)))
    else:
        operands = [data, weights, *(zeros if zero or weight_zero or g.chance(0.5) else [])]
        name = g.op("ConvInteger" if window else "MatMulInteger", operands, **form)
        made = Tensor(g.op("Cast", [name], to=TensorProto.FLOAT), result, 255.0 * largest * count, 0)
    if planes and high - low < 4:
        step = 2 if low == -1 and high == 1 else 1
        if planes * (1 if step == 2 or high - low == 1 else 2) <= 9:
            g.low.add(name)
    return made


@layer(1)
def binarizer(g, x):
    """Scikit-learn's strict comparison."""
    name = g.op("Binarizer", [x], domain="ai.onnx.ml", threshold=float(g.pick(0, 0.5, -1)))
    return Tensor(name, x.shape, 1.0, 0, frozenset({0.0, 1.0}))


# ---- forms of a graph


@layer(3)
def local_function(g, x):
    """A quantiser, alone or with a dense layer, as a function of the model."""
    at, known = len(g.nodes), set(g.constants)
    made = g.pick(*QUANTISERS)(g, x)
    nodes, produced = g.nodes[at:], {o for n in g.nodes[at:] for o in n.output}
    if any(n.domain for n in nodes) or any(i in g.side for i in range(at, len(g.nodes))):
        return made
    read = list(dict.fromkeys(i for n in nodes for i in n.input if i and i not in produced))
    inner = [i for i in read if isinstance(g.constants.get(i), np.ndarray) and g.chance(0.7)]
    outer = [i for i in read if i not in inner]
    constants = [helper.make_node("Constant", [], [i], value=numpy_helper.from_array(g.constants[i], i)) for i in inner]
    name, used = f"function{len(g.functions)}", {made.name}
    opsets = [helper.make_opsetid("", g.opset)]
    g.functions = [*g.functions, helper.make_function(FUNCTIONS, name, outer, sorted(used), [*constants, *nodes], opsets)]
    for i in set(g.constants) - known:
        if i not in outer and not any(i in n.input for n in g.nodes[:at]):
            del g.constants[i]
    del g.nodes[at:]
    outputs = [f"v{at}"]
    g.nodes.append(helper.make_node(name, outer, outputs, name=f"{name}_{at}", domain=FUNCTIONS))
    return replace(made, name=outputs[0])


@layer(3)
def half(g, x):
    """A stretch in float16 or bfloat16, in numbers that these types have. ONNX Runtime lacks bfloat16: there it is left out."""
    kind, digits = g.pick((TensorProto.FLOAT16, 11), (TensorProto.FLOAT16, 11), (TensorProto.BFLOAT16, 8))
    inside = clipped = x
    if x.bound > 2.0 ** (x.grain + digits - 1) or x.bound > 2.0**14 or x.grain < -8:
        clipped = replace(x, name=g.op("Round", [g.op("Clip", [x, g.f(-4), g.f(4)])]), bound=4.0, grain=0, levels=None)
    dtype = np.float16 if kind == TensorProto.FLOAT16 else None

    def const(value):
        if dtype:
            return np.array(value, dtype)
        return g.small_const(np.ravel(value).tolist(), kind, np.shape(value))

    outputs = int(g.rng.integers(1, 30))
    weights = np.where(g.rng.random((x.channels, outputs)) < 0.5, np.float32(-1), np.float32(1))
    dense, way = x.rank == 2 and x.channels < 2.0 ** (digits - 2), g.pick("sign", "select", "round")

    def body(cast, const, back):
        inside = cast(clipped.name)
        if way == "sign":
            q = g.op("Sign", [inside])
        elif way == "select":
            q = g.op("Where", [g.op("Greater", [inside, const(0.5)]), const(1.0), const(-1.0)])
        else:
            q = g.op("Round", [g.op("Clip", [inside, const(0.0), const(1.0)])])
        if dense:
            q = g.op("MatMul", [q, const(weights)])
            names.append(q)
        return back(q)

    names = []
    there = lambda name: g.op("Cast", [name], to=kind)  # noqa: E731
    home = lambda name: g.op("Cast", [name], to=TensorProto.FLOAT)  # noqa: E731
    if dtype:
        name = body(there, const, home)
    else:
        same = lambda name: g.op("Identity", [name])  # noqa: E731
        name = g.either(lambda: body(there, const, home), lambda: body(same, lambda v: np.array(v, np.float32), same))
    g.binary.update(names[-1:])
    levels = None if dense else frozenset({"sign": (-1.0, 0.0, 1.0), "select": (-1.0, 1.0), "round": (0.0, 1.0)}[way])
    shape = (x.shape[0], outputs) if dense else inside.shape
    return Tensor(name, shape, float(x.channels) if dense else 1.0, 0, levels)


@layer(2)
def computed_pads(g, x):
    """``F.pad`` of the older PyTorch exporter: the pads are turned round by a program over integers."""
    if x.rank not in (3, 4):
        return None
    spatial, value = x.rank - 2, float(g.pick(0, 1, -1))
    widths = [int(v) for v in g.rng.integers(0, 3, 2 * spatial)]  # last axis first: begin, end
    missing = g.op("ConstantOfShape", [np.array([4], np.int64)], value=helper.make_tensor("zero", TensorProto.INT64, [1], [0]))
    flat = g.op("Concat", [np.array(widths, np.int64), missing], axis=0)
    pairs = g.op("Reshape", [flat, np.array([-1, 2], np.int64)])
    turned = g.op("Slice", [pairs, *(np.array([v], np.int64) for v in (-1, -(2**63) + 1, 0, -1))])
    pads = g.op("Reshape", [g.op("Transpose", [turned], perm=[1, 0]), np.array([-1], np.int64)])
    pads = g.op("Cast", [pads], to=TensorProto.INT64)
    begins, ends = widths[0::2][::-1], widths[1::2][::-1]
    shape = (*x.shape[:2], *(s + a + b for s, a, b in zip(x.shape[2:], begins, ends)))
    if int(np.prod(shape[1:])) > MAX_ELEMENTS:
        return None
    levels = None if x.levels is None else x.levels | ({value} if sum(widths) else set())
    return Tensor(g.op("Pad", [x, pads, g.f(value)]), shape, max(x.bound, abs(value)), min(x.grain, 0), levels)


@layer(2)
def expanded(g, x):
    """A constant per channel expanded to the shape of the tensor in the graph, then added (``expand_as``)."""
    bias = (g.rng.integers(-8, 9, (1, x.channels, *[1] * (x.rank - 2))) / 2).astype(np.float32)
    full = g.op("Expand", [bias, g.op("Shape", [x])])
    return Tensor(g.op("Add", [x, full]), x.shape, x.bound + 4, min(x.grain, -1))


@layer(3)
def quantised_pair(g, x):
    """QuantizeLinear and DequantizeLinear on both operands of a convolution, the weights with a scale for each filter."""
    if x.rank != 4:
        return None
    q = g.op("QuantizeLinear", [x, g.f(0.5), np.array(0, np.int8)])
    low, high = g.pick((-1, 1), (-2, 1), (0, 3), (-128, 127))
    if high < 127:
        q = g.op("Clip", [q, np.array(low, np.int8), np.array(high, np.int8)])
    x = _grid(x, g.op("DequantizeLinear", [q, g.f(0.5), np.array(0, np.int8)]), low, high, 0.5)
    x = replace(x, levels=x.levels if high < 127 else None)
    outputs = int(g.rng.integers(1, 40))
    shape = (outputs, x.channels, 1, 1)
    if outputs * int(np.prod(x.shape[2:])) > MAX_ELEMENTS:
        return None
    weights, largest, grain, planes = few_levels(g, shape)
    scales = 2.0 ** g.rng.integers(-2, 1, outputs)
    if np.all(weights == np.rint(weights)) and np.abs(weights).max() < 128:
        weight = g.op("DequantizeLinear", [weights.astype(np.int8), scales.astype(np.float32), np.zeros(outputs, np.int8)], axis=0)
    else:
        weight = as_written(g, weights)
    name = g.op("Conv", [x, weight])
    expect(g, x, name, planes)
    return Tensor(name, (x.shape[0], outputs, *x.shape[2:]), x.bound * largest * x.channels, x.grain + grain - 2)
