"""The walk: folding, dynamic batch, precision, what is reported."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

from bnntvm.errors import UnsupportedError
from bnntvm.importer import converts, import_model, registry
from bnntvm.interpreter import run

from .helpers import calls, check, constants, model, one

RNG = np.random.default_rng(11)


def data(*shape):
    return RNG.uniform(-2, 2, shape).astype(np.float32)


def node(op_type, inputs, outputs, **attributes):
    return helper.make_node(op_type, inputs.split(), outputs.split(), **attributes)


def test_module_shape():
    x, other = data(2, 3), data(2, 3)
    proto = model([node("Add", "a b", "y"), node("Mul", "y a", "z")], {"a": x, "b": other}, ["z", "y"])
    imported = check(proto, {"a": x, "b": other})
    function = imported.mod["main"]
    assert [p.name for p in function.params] == ["a", "b"]
    assert int(function.attrs["num_input"]) == 2
    assert len(function.body.blocks) == 1 and isinstance(function.body.blocks[0], relax.DataflowBlock)
    assert isinstance(function.ret_ty, relax.TupleType) and len(function.ret_ty.fields) == 2
    relax.analysis.well_formed(imported.mod)  # raises where it is not


def test_one_output_is_a_tuple_too():
    imported = import_model(one("Relu", {"x": data(2, 3)}))
    assert isinstance(imported.mod["main"].ret_ty, relax.TupleType)


def test_outputs_may_be_inputs_or_constants():
    x = data(2, 3)
    proto = model([node("Identity", "x", "y"), node("Identity", "c", "z")], {"x": x}, ["y", "z"], {"c": data(4)})
    assert calls(check(proto, {"x": x})) == []


# ---- constants


def test_weight_quantisers_fold_in_float32():
    """alpha * Sign(W), computed in the graph as the legacy exporter of PyTorch leaves it."""
    nodes = [
        node("Abs", "w", "abs"),
        node("ReduceMean", "abs", "alpha", axes=[1, 2, 3], keepdims=1),
        node("Sign", "w", "sign"),
        node("Mul", "alpha sign", "binary"),
        node("Conv", "x binary", "y"),
    ]
    x, w = data(1, 3, 6, 6), data(4, 3, 3, 3)
    imported = check(model(nodes, {"x": x}, ["y"], {"w": w}), {"x": x})
    assert calls(imported) == ["bnn.conv"]
    (folded,) = constants(imported)
    assert folded.dtype == np.float32 and len(np.unique(np.abs(folded[0]))) == 1


def test_shared_weights_are_one_constant():
    nodes = [node("MatMul", "x w", "a"), node("MatMul", "a w", "y")]
    x = data(2, 4)
    imported = check(model(nodes, {"x": x}, ["y"], {"w": data(4, 4)}), {"x": x})
    first, second = (b.value.args[1] for b in imported.mod["main"].body.blocks[0].bindings if isinstance(b.value, relax.Call))
    assert first.same_as(second)


def test_pad_program_of_the_legacy_exporter():
    nodes = [
        node("ConstantOfShape", "count", "zeros", value=numpy_helper.from_array(np.zeros(1, np.int64))),
        node("Concat", "given zeros", "all", axis=0),
        node("Reshape", "all pairs", "matrix"),
        node("Slice", "matrix starts ends axes steps", "backward"),
        node("Transpose", "backward", "turned", perm=[1, 0]),
        node("Reshape", "turned flat", "row"),
        node("Cast", "row", "pads", to=TensorProto.INT64),
        node("Pad", "x pads value", "y"),
    ]
    consts = {
        "count": np.array([4], np.int64),
        "given": np.array([1, 2, 3, 0], np.int64),
        "pairs": np.array([-1, 2], np.int64),
        "starts": np.array([-1], np.int64),
        "ends": np.array([-(2**63) + 1], np.int64),
        "axes": np.array([0], np.int64),
        "steps": np.array([-1], np.int64),
        "flat": np.array([-1], np.int64),
        "value": np.float32(1),
    }
    x = data(1, 2, 4, 4)
    imported = check(model(nodes, {"x": x}, ["y"], consts), {"x": x})
    assert calls(imported) == ["relax.nn.pad"]
    assert imported.outputs[0].shape == (1, 2, 7, 7)


@pytest.mark.parametrize(
    "attribute",
    [dict(value_int=2), dict(value_ints=[1, 2, 3]), dict(value_float=0.5), dict(value_floats=[1.0, 2.0, 3.0])],
)
def test_constant_nodes_of_every_kind(attribute):
    x = data(2, 3) if "float" in next(iter(attribute)) else RNG.integers(0, 9, (2, 3))
    check(model([node("Constant", "", "c", **attribute), node("Add", "x c", "y")], {"x": x}, ["y"]), {"x": x})


@pytest.mark.parametrize("form", ["flat", "coordinates"])
@pytest.mark.parametrize("place", ["node", "initializer"])
def test_sparse_constants(form, place):
    dense = np.where(RNG.random((4, 5)) < 0.5, 0, data(4, 5)).astype(np.float32)
    at = np.flatnonzero(dense) if form == "flat" else np.argwhere(dense)
    values = numpy_helper.from_array(dense[dense != 0], "c")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(at.astype(np.int64), "at"), dense.shape)
    nodes = [node("Constant", "", "c", sparse_value=sparse), node("Add", "x c", "y")]
    feed = {"x": data(4, 5)}
    proto = model(nodes if place == "node" else nodes[1:], feed, ["y"])
    if place == "initializer":
        proto.graph.sparse_initializer.append(sparse)
    np.testing.assert_array_equal(run(import_model(proto).mod, feed)[0], feed["x"] + dense)


def test_nodes_without_converter_fold():
    nodes = [node("ScatterND", "w i u", "v"), node("Add", "x v", "y")]
    consts = {"w": data(4, 3), "i": np.array([[1], [3]], np.int64), "u": data(2, 3)}
    x = data(4, 3)
    check(model(nodes, {"x": x}, ["y"], consts), {"x": x})
    feed = {"x": x, "u": data(2, 3)}
    del consts["u"]
    with pytest.raises(UnsupportedError, match="on constants only"):
        import_model(model(nodes, feed, ["y"], consts))


@pytest.mark.parametrize("kind, low, high", [("INT4", -8, 7), ("UINT4", 0, 15)])
def test_sub_byte_weights(kind, low, high):
    w = RNG.integers(low, high + 1, (5, 7))
    tensor = helper.make_tensor("w", getattr(TensorProto, kind), w.shape, w.reshape(-1).tolist())
    x = data(2, 5)
    proto = model(
        [node("DequantizeLinear", "w s", "f", axis=1), node("MatMul", "x f", "y")], {"x": x}, ["y"], {"s": np.abs(data(7))}, opset=21
    )
    proto.graph.initializer.append(tensor)
    assert calls(check(proto, {"x": x})) == ["bnn.matmul"]


def test_blocked_dequantisation():
    w = RNG.integers(-8, 8, (8, 3)).astype(np.int8)
    x = data(2, 8)
    nodes = [node("DequantizeLinear", "w s", "f", axis=0, block_size=4), node("MatMul", "x f", "y")]
    check(model(nodes, {"x": x}, ["y"], {"w": w, "s": np.abs(data(2, 3))}, opset=21), {"x": x})


def test_initializers_that_are_inputs_too():
    x = data(2, 3)
    proto = model([node("Add", "x c", "y")], {"x": x, "c": np.zeros((2, 3), np.float32)}, ["y"], {"c": data(2, 3)})
    imported = import_model(proto)
    assert [info.name for info in imported.inputs] == ["x"]
    assert list(imported.overridable) == ["c"] and imported.overridable["c"].shape == (2, 3)


# ---- dynamic batch


def dynamic(nodes, inputs, outputs, consts=None, opset=17):
    return model(nodes, {name: (("batch", *shape), "float32") for name, shape in inputs.items()}, outputs, consts, opset)


@pytest.mark.parametrize("batch", [1, 3])
def test_flatten_with_computed_shape(batch):
    """Shape, Gather, Unsqueeze, Concat, Reshape: the way of older exporters."""
    nodes = [
        node("Shape", "x", "shape"),
        node("Gather", "shape zero", "n", axis=0),
        node("Unsqueeze", "n axes", "row"),
        node("Concat", "row rest", "new", axis=0),
        node("Reshape", "x new", "y"),
    ]
    consts = {"zero": np.int64(0), "axes": np.array([0]), "rest": np.array([-1])}
    imported = check(dynamic(nodes, {"x": (3, 4, 5)}, ["y"], consts), {"x": data(batch, 3, 4, 5)})
    assert calls(imported) == ["relax.reshape"]
    assert imported.outputs[0].shape == ("batch", 60)
    assert imported.inputs[0].shape == ("batch", 3, 4, 5)


def test_reshape_to_a_multiple_of_the_batch():
    consts = {"s": np.array([-1, 5]), "t": np.array([-1, 12, 5])}
    proto = dynamic([node("Reshape", "x s", "y"), node("Reshape", "y t", "z")], {"x": (3, 4, 5)}, ["y", "z"], consts)
    imported = check(proto, {"x": data(2, 3, 4, 5)})
    assert [output.shape for output in imported.outputs] == [("n * 12", 5), ("batch", 12, 5)]


def test_reshape_that_bakes_the_batch_is_refused():
    with pytest.raises(UnsupportedError, match="batch away from the first axis"):
        import_model(dynamic([node("Reshape", "x s", "y")], {"x": (3, 4)}, ["y"], {"s": np.array([2, -1])}))


@pytest.mark.parametrize("batch", [1, 2])
def test_bias_expanded_to_the_batch_stays_small(batch):
    nodes = [node("Shape", "x", "shape"), node("Expand", "bias shape", "full"), node("Add", "x full", "y")]
    imported = check(dynamic(nodes, {"x": (3, 4, 5)}, ["y"], {"bias": data(1, 3, 1, 1)}), {"x": data(batch, 3, 4, 5)})
    assert calls(imported) == ["relax.add"]
    assert constants(imported)[0].shape == (1, 3, 1, 1)


def test_ones_like_and_their_negative_are_scalars():
    one_ = numpy_helper.from_array(np.ones(1, np.float32))
    nodes = [
        node("Shape", "x", "shape"),
        node("ConstantOfShape", "shape", "ones", value=one_),
        node("Neg", "ones", "minus"),
        node("GreaterOrEqual", "x zero", "c"),
        node("Where", "c ones minus", "y"),
    ]
    imported = check(dynamic(nodes, {"x": (3, 4)}, ["y"], {"zero": np.float32(0)}), {"x": data(2, 3, 4)})
    assert calls(imported) == ["relax.greater_equal", "relax.where"]
    assert [c.shape for c in constants(imported)] == [(), (), ()]


def test_expanded_constant_where_its_full_shape_matters():
    nodes = [node("Shape", "x", "shape"), node("Expand", "c shape", "full"), node("Concat", "x full", "y", axis=1)]
    check(dynamic(nodes, {"x": (3, 4)}, ["y"], {"c": data(1, 3, 1)}), {"x": data(2, 3, 4)})


def test_expand_shape_with_where_of_legacy_exporter():
    """``expand(-1, ...)``: Where(shape == -1, 1, shape)."""
    nodes = [
        node("Shape", "x", "shape"),
        node("Equal", "shape minus", "is"),
        node("Where", "is ones shape", "wanted"),
        node("Expand", "c wanted", "full"),
        node("Mul", "x full", "y"),
    ]
    consts = {"minus": np.full(3, -1), "ones": np.ones(3, np.int64), "c": data(1, 3, 1)}
    assert calls(check(dynamic(nodes, {"x": (3, 4)}, ["y"], consts), {"x": data(2, 3, 4)})) == ["relax.multiply"]


def test_arithmetic_on_the_batch():
    nodes = [
        node("Shape", "x", "shape"),
        node("Slice", "shape zero one", "n"),
        node("Mul", "n six", "six_n"),
        node("Div", "six_n two", "three_n"),
        node("Sub", "three_n n", "two_n"),
        node("Cast", "two_n", "cast", to=TensorProto.INT64),
        node("Concat", "cast rest", "new", axis=0),
        node("Reshape", "x new", "y"),
    ]
    consts = {"zero": np.array([0]), "one": np.array([1]), "six": np.array([6]), "two": np.array([2]), "rest": np.array([2, 3])}
    check(dynamic(nodes, {"x": (3, 4)}, ["y"], consts), {"x": data(2, 3, 4)})


def test_shape_of_an_output_is_reported():
    check(dynamic([node("Transpose", "x", "y", perm=[0, 2, 1])], {"x": (3, 4)}, ["y"]), {"x": data(2, 3, 4)})


def test_layers_count_one_image():
    nodes = [node("Conv", "x w", "c"), node("Flatten", "c", "f"), node("MatMul", "f v", "y")]
    consts = {"w": data(4, 3, 3, 3), "v": data(16, 10)}
    imported = check(dynamic(nodes, {"x": (3, 4, 4)}, ["y"], consts), {"x": data(2, 3, 4, 4)})
    assert [layer.macs for layer in imported.layers] == [4 * 2 * 2 * 27, 160]
    assert [layer.node for layer in imported.layers] == ["Conv_0", "MatMul_2"]


def test_two_inputs_share_the_batch():
    proto = model([node("Add", "a b", "y")], {"a": (("p", 3), "float32"), "b": (("q", 3), "float32")}, ["y"])
    first, second = (p.ty.shape[0] for p in import_model(proto).mod["main"].params)
    assert first.same_as(second)


def test_other_dynamic_dimensions_are_refused():
    with pytest.raises(UnsupportedError, match="'x'.*\n.*dimension 2 is width"):
        import_model(model([node("Relu", "x", "y")], {"x": ((1, 3, "width"), "float32")}, ["y"]))


# ---- precision


def test_half_precision_is_evaluated_in_float32():
    nodes = [
        node("Cast", "x", "h", to=TensorProto.FLOAT16),
        node("Mul", "h w", "m"),
        node("Cast", "m", "f", to=TensorProto.FLOAT),
        node("Add", "f c", "y"),
    ]
    x, w = data(2, 3).astype(np.float16), data(3).astype(np.float16)
    imported = check(model(nodes, {"x": x}, ["y"], {"w": w, "c": data(3)}), {"x": x}, 2e-3)
    assert imported.inputs[0].dtype == "float16"
    assert str(imported.mod["main"].params[0].ty.dtype) == "float32"
    assert calls(imported) == ["relax.multiply", "relax.add"]


def test_half_precision_outputs_keep_their_name():
    x = data(2, 3).astype(np.float16)
    imported = import_model(one("Relu", {"x": x}))
    assert imported.outputs[0].dtype == "float16"


def test_double_precision_is_refused():
    with pytest.raises(UnsupportedError, match="float64"):
        import_model(one("Relu", {"x": np.zeros((2, 3))}))


# ---- functions, converters from outside


def test_local_functions_are_inlined():
    body = [node("Sign", "a", "s"), node("Mul", "s b", "c")]
    function = helper.make_function("mine", "Scaled", ["a", "b"], ["c"], body, [helper.make_opsetid("", 17)])
    x = data(2, 3)
    call = helper.make_node("Scaled", ["x", "k"], ["y"], domain="mine")
    imported = check(model([call], {"x": x}, ["y"], {"k": np.float32(2)}, domains=["mine"], functions=[function]), {"x": x})
    assert calls(imported) == ["relax.sign", "relax.multiply"]


def test_operators_that_onnx_defines_by_others():
    """No converter: the function body of the ONNX schema takes the operator's place."""
    x = data(2, 3, 4, 4)
    assert registry.lookup("", "MeanVarianceNormalization") is None
    check(one("MeanVarianceNormalization", {"x": x}, axes=[0, 2, 3]), {"x": x})
    feed = {"q": data(1, 4, 8), "k": data(1, 6, 8), "v": data(1, 6, 8)}
    imported = check(one("Attention", feed, opset=23, q_num_heads=2, kv_num_heads=2), feed)
    assert len(imported.layers) == 2


def test_a_converter_from_outside(monkeypatch):
    monkeypatch.setattr(registry, "CONVERTERS", dict(registry.CONVERTERS))

    @converts("Twice", domains=("test.domain",))
    def twice(ctx, node_, x):
        return ctx.emit(relax.op.add(x, x))

    imported = import_model(one("Twice", {"x": data(2, 3)}, domain="test.domain"))
    assert calls(imported) == ["relax.add"]
    assert "test.domain::Twice" in registry.supported()


def test_entry_points_are_loaded(monkeypatch):
    called = []

    class Entry:
        def load(self):
            return lambda: called.append("yes")

    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: [Entry()] if group == "bnntvm.importer" else [])
    registry.load_all.cache_clear()
    registry.load_all()
    assert called == ["yes"]


# ---- random chains


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_random_elementwise_chains(draw):
    """Chains of elementwise operators whose constants have random broadcast shapes."""
    shape = tuple(draw.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    nodes, consts, value = [], {}, "x"
    for i in range(draw.draw(st.integers(1, 5))):
        op = draw.draw(st.sampled_from(["Add", "Sub", "Mul", "Max", "Relu", "Sign", "Where"]))
        dims = tuple(draw.draw(st.sampled_from([1, d])) for d in shape)[draw.draw(st.integers(0, len(shape))) :]
        consts[f"c{i}"] = np.asarray(RNG.integers(-3, 4, dims), np.float32)
        if op in ("Relu", "Sign"):
            nodes.append(node(op, value, f"v{i}"))
        elif op == "Where":
            nodes += [node("Less", f"{value} c{i}", f"b{i}"), node("Where", f"b{i} c{i} {value}", f"v{i}")]
        else:
            operands = [value, f"c{i}"] if draw.draw(st.booleans()) else [f"c{i}", value]
            nodes.append(node(op, " ".join(operands), f"v{i}"))
        value = f"v{i}"
    x = RNG.integers(-3, 4, shape).astype(np.float32)
    check(model(nodes, {"x": x}, [value], consts), {"x": x}, 0)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_convolutions(draw):
    integer = lambda low, high: draw.draw(st.integers(low, high))  # noqa: E731
    groups, spatial = integer(1, 3), integer(1, 2)
    channels, outputs = groups * integer(1, 3), groups * integer(1, 3)
    kernel, strides, dilations = ([integer(1, 3) for _ in range(spatial)] for _ in range(3))
    attributes = dict(strides=strides, dilations=dilations, group=groups)
    mode = draw.draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if mode == "NOTSET":
        attributes["pads"] = [integer(0, 2) for _ in range(2 * spatial)]
    else:
        attributes["auto_pad"] = mode
        if mode != "VALID":  # ONNX Runtime takes dilated SAME pads for itself only in part
            attributes["dilations"] = [1] * spatial
    sizes = [integer(7, 9) for _ in range(spatial)]
    x = RNG.integers(-2, 3, (integer(1, 2), channels, *sizes)).astype(np.float32)
    w = RNG.integers(-1, 2, (outputs, channels // groups, *kernel)).astype(np.float32)
    check(one("Conv", {"x": x}, {"w": w}, **attributes), {"x": x}, 0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_pools(draw):
    integer = lambda low, high: draw.draw(st.integers(low, high))  # noqa: E731
    kernel, strides = ([integer(1, 4) for _ in range(2)] for _ in range(2))
    pads = [integer(0, k - 1) for k in kernel * 2]
    op = draw.draw(st.sampled_from(["MaxPool", "AveragePool"]))
    attributes = dict(kernel_shape=kernel, strides=strides, pads=pads, ceil_mode=integer(0, 1))
    if op == "AveragePool":
        attributes["count_include_pad"] = integer(0, 1)
    x = RNG.uniform(-2, 2, (1, 2, integer(4, 9), integer(4, 9))).astype(np.float32)
    check(one(op, {"x": x}, opset=19, **attributes), {"x": x})


def test_opsets_from_seven_to_the_newest():
    x = data(2, 3, 4, 4)
    for opset in range(7, onnx.defs.onnx_opset_version() + 1):
        imported = import_model(model([node("Relu", "x", "a"), node("Conv", "a w", "y")], {"x": x}, ["y"], {"w": data(2, 3, 1, 1)}, opset))
        assert calls(imported) == ["relax.nn.relu", "bnn.conv"]
