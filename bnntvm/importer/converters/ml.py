"""Operators of ``ai.onnx.ml`` that exports of scikit-learn have around a network."""

import numpy as np
from tvm import relax

from ..registry import converts
from ..values import is_constant, shape_of
from .elementwise import Arithmetic, to_type
from .layers import product
from .shape import product_of, reshaped

DOMAIN = ("ai.onnx.ml",)


@converts("Binarizer", domains=DOMAIN)
def binarizer(ctx, node, x):
    """1 above the threshold, 0 at it and below."""
    m = Arithmetic(ctx, x)
    return to_type(ctx, m.greater(x, float(node.attrs.get("threshold", 0.0))), m.dtype)


@converts("Scaler", domains=DOMAIN)
def scaler(ctx, node, x):
    x = to_type(ctx, x, "float32")
    m = Arithmetic(ctx, x)
    offset, scale = (np.array(node.attrs.get(key, [default]), np.float32) for key, default in (("offset", 0), ("scale", 1)))
    return m.multiply(m.subtract(x, offset), scale)


@converts("Normalizer", domains=DOMAIN)
def normalizer(ctx, node, x):
    """Rows divided by their maximum, their sum of magnitudes or their length; unchanged where that is 0."""
    x, kind = to_type(ctx, x, "float32"), node.attrs.get("norm", "MAX")
    m, last = Arithmetic(ctx, x), [len(shape_of(x)) - 1]
    if kind == "MAX":
        size = ctx.emit(relax.op.max(ctx.tensor(x), last, keepdims=True))
    else:
        size = ctx.emit(relax.op.sum(ctx.tensor(m.abs(x) if kind == "L1" else m.multiply(x, x)), last, keepdims=True))
        size = m.sqrt(size) if kind == "L2" else size
    return m.divide(x, m.where(m.equal(size, 0.0), 1.0, size))


@converts("ArrayFeatureExtractor", domains=DOMAIN)
def array_feature_extractor(ctx, node, x, indices):
    """Entries of the last axis; a vector counts as one row."""
    shape, count = shape_of(x), product_of(shape_of(indices))
    if is_constant(x) and is_constant(indices):
        picked = np.take(x, indices.reshape(-1), -1)
    else:
        flat = indices.reshape(-1) if is_constant(indices) else reshaped(ctx, indices, [count])
        picked = ctx.emit(relax.op.take(ctx.tensor(x), ctx.tensor(flat), len(shape) - 1, mode="clip"))
    if len(shape) > 1:
        return picked
    return picked.reshape(1, -1) if is_constant(picked) else reshaped(ctx, picked, [1, count])


@converts("LinearRegressor", domains=DOMAIN)
def linear_regressor(ctx, node, x):
    return _transformed(ctx, node, _scores(ctx, node, x, int(node.attrs.get("targets", 1))))


@converts("LinearClassifier", domains=DOMAIN)
def linear_classifier(ctx, node, x):
    """The class with the highest score, and the scores after ``post_transform``. Two classes may share one row of coefficients."""
    labels = node.attrs.get("classlabels_ints")
    if labels is None and node.used[0]:
        raise ctx.unsupported("classes with names are not supported", hint="use the scores, or train with integer classes")
    count = len(labels or node.attrs["classlabels_strings"])
    rows = len(node.attrs["coefficients"]) // shape_of(x)[-1]
    scores = _scores(ctx, node, x, rows)
    m = Arithmetic(ctx, scores)
    if rows == 1 and count == 2:
        chosen = to_type(ctx, m.greater(scores, 0.0), "int64")
        positive = m.sigmoid(scores) if node.attrs.get("post_transform") == "LOGISTIC" else scores
        chosen = reshaped(ctx, chosen, shape_of(chosen)[:1])
        both = ctx.emit(relax.op.concat([m.subtract(1.0, positive), positive], 1))
        return _named(ctx, labels, chosen), both
    chosen = ctx.emit(relax.op.argmax(scores, 1))
    return _named(ctx, labels, chosen), _transformed(ctx, node, scores)


def _named(ctx, labels, index):
    """The label of each class number; None where the labels are strings."""
    if labels is None or labels == list(range(len(labels))):
        return index if labels else None
    return ctx.emit(relax.op.take(ctx.const(np.array(labels, np.int64)), index, 0, mode="clip"))


def _scores(ctx, node, x, rows):
    """``x`` [N, C] by the node's coefficients [rows, C], plus its intercepts."""
    x = to_type(ctx, x, "float32")
    weight = np.array(node.attrs["coefficients"], np.float32).reshape(rows, -1)
    result = product(ctx, node, x, np.ascontiguousarray(weight.T), weight)
    intercepts = np.array(node.attrs.get("intercepts") or [0.0], np.float32)
    return Arithmetic(ctx, result).add(result, intercepts) if intercepts.any() else result


def _transformed(ctx, node, scores):
    kind = node.attrs.get("post_transform", "NONE")
    if kind == "NONE":
        return scores
    if kind == "SOFTMAX":
        return ctx.emit(relax.op.nn.softmax(scores, 1))
    if kind == "LOGISTIC":
        return ctx.emit(relax.op.sigmoid(scores))
    raise ctx.unsupported(f"{node.op_type} with the transform {kind} is not supported")


@converts("ZipMap", domains=DOMAIN)
def zip_map(ctx, node, x):
    raise ctx.unsupported("dictionaries are not supported", hint="export with skl2onnx's options={'zipmap': False}")
