"""Operators of ``ai.onnx.ml`` against ONNX Runtime."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from bnntvm.errors import UnsupportedError
from bnntvm.importer import import_model

from .helpers import calls, check, constants, model, one

DOMAIN = "ai.onnx.ml"
RNG = np.random.default_rng(31)
f32 = np.float32
X = np.array([[1, -2, 3], [0, 0, 0], [-1, -2, -3], [4, 0.25, -5], [0, -0.5, 0]], f32)


def ml(op_type, x, outputs=1, kinds=(), **attributes):
    """A model of one operator; ``kinds`` are the element types of its outputs where they are not float32."""
    proto = one(op_type, {"x": x}, outputs=outputs, domain=DOMAIN, **attributes)
    for output, kind in zip(proto.graph.output, kinds):
        output.type.tensor_type.elem_type = kind
    return proto


@pytest.mark.parametrize("threshold", [None, 0.25, -2.0])
def test_binarizer_is_strict(threshold):
    check(ml("Binarizer", X, **({} if threshold is None else {"threshold": threshold})), {"x": X})


def test_binarizer_of_constants_folds():
    nodes = [helper.make_node("Binarizer", ["w"], ["b"], domain=DOMAIN), helper.make_node("MatMul", ["x", "b"], ["y"])]
    imported = check(model(nodes, {"x": X}, ["y"], {"w": RNG.normal(size=(3, 4)).astype(f32)}, domains=[DOMAIN]), {"x": X})
    assert calls(imported) == ["bnn.matmul"]
    assert set(np.unique(constants(imported)[0])) == {0, 1}


@pytest.mark.parametrize("norm", ["MAX", "L1", "L2"])
def test_normalizer_leaves_rows_of_size_0(norm):
    check(ml("Normalizer", X, norm=norm), {"x": X})


@pytest.mark.parametrize("count", [1, 3])
def test_scaler(count):
    check(ml("Scaler", X, offset=[0.5, 1.0, -1.0][:count], scale=[2.0, 0.25, -3.0][:count]), {"x": X})


@pytest.mark.parametrize("transform", ["NONE", "SOFTMAX", "LOGISTIC"])
@pytest.mark.parametrize("labels, rows", [([5, 7, 9], 3), ([0, 1, 2], 3), ([5, 7], 2), ([5, 7], 1)])
def test_linear_classifier(transform, labels, rows):
    given = dict(
        coefficients=RNG.normal(size=3 * rows).tolist(),
        intercepts=RNG.normal(size=rows).tolist(),
        classlabels_ints=labels,
        post_transform=transform,
    )
    kinds = [TensorProto.INT64, TensorProto.FLOAT]
    proto = ml("LinearClassifier", X, 2, kinds, **given)
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y0", TensorProto.INT64, [None]))
    imported = check(proto, {"x": X})
    (layer,) = imported.layers
    assert (layer.output, layer.op_type, layer.weight_shape, layer.macs) == ("y0", "LinearClassifier", (rows, 3), 3 * rows)


def test_linear_classifier_with_named_classes():
    given = dict(coefficients=RNG.normal(size=6).tolist(), intercepts=[0.0, 1.0], classlabels_strings=["no", "yes"])
    node = helper.make_node("LinearClassifier", ["x"], ["label", "scores"], name="node", domain=DOMAIN, **given)
    with pytest.raises(UnsupportedError, match="classes with names"):
        import_model(model([node], {"x": X}, ["label", "scores"], domains=[DOMAIN], types={"label": TensorProto.STRING}))
    check(model([node], {"x": X}, ["scores"], domains=[DOMAIN]), {"x": X})


@pytest.mark.parametrize("targets", [1, 2])
def test_linear_regressor(targets):
    given = dict(coefficients=RNG.normal(size=3 * targets).tolist(), targets=targets)
    check(ml("LinearRegressor", X, **given), {"x": X})
    check(ml("LinearRegressor", X, **given, intercepts=[0.5, 1.0][:targets]), {"x": X})


def test_array_feature_extractor():
    columns = {"i": np.array([2, 0], np.int64)}
    check(one("ArrayFeatureExtractor", {"x": X}, columns, domain=DOMAIN), {"x": X})
    # The class of each row, as scikit-learn's exporter looks it up.
    rows = np.array([[2], [0], [1]], np.int64)
    nodes = [
        helper.make_node("ArrayFeatureExtractor", ["classes", "i"], ["picked"], domain=DOMAIN),
        helper.make_node("Reshape", ["picked", "shape"], ["y"]),
    ]
    given = {"classes": np.array([10, 20, 30], np.int64), "shape": np.array([-1], np.int64)}
    proto = model(nodes, {"i": (("n", 1), "int64")}, ["y"], given, domains=[DOMAIN], types={"y": TensorProto.INT64})
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.INT64, [None]))
    check(proto, {"i": rows})


def test_dictionaries_are_refused_with_the_way_out():
    node = helper.make_node("ZipMap", ["x"], ["y"], domain=DOMAIN, classlabels_int64s=[0, 1, 2])
    with pytest.raises(UnsupportedError, match="'zipmap': False"):
        import_model(model([node], {"x": X}, ["y"], domains=[DOMAIN]))
