"""Random binarised networks as ONNX, in arithmetic that is exact.

Every number in such a network is a small multiple of a power of two, so that no operation rounds, whatever the order of summation, and
ONNX Runtime's result has to be met bit for bit. The generator follows every tensor with a bound, a grain (all values are multiples of
``2**grain``) and, where they are few, the values that it can hold; a layer that would leave the exact range is not added.

A network is told by a seed and the numbers of its layers: layer ``i`` draws its kind and parameters from ``default_rng([seed, i])`` and
fits itself to the tensor it is put on. So any subset of the layers is a network too, which is what makes minimising a failure simple.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import tests.fuzz.elementwise
import tests.fuzz.families
import tests.fuzz.moves  # noqa: F401  (importing registers the layers, in this order)
from tests.fuzz.graphs import LAYERS, QONNX, Graph, Tensor

OPSETS = (17, 21)


@dataclass(frozen=True)
class Network:
    """A finished network: the model, inputs for it, and what must hold."""

    model: onnx.ModelProto
    feed: dict
    reference: onnx.ModelProto
    binary: frozenset
    low: frozenset
    layers: tuple
    log: tuple


def generate(seed, layers=None):
    """The network of ``seed``; ``layers``: the numbers of the layers to keep (default: all)."""
    start = np.random.default_rng([seed, 1 << 20])
    batch = int(start.integers(1, 4))
    dynamic = bool(start.random() < 0.5)
    graph = Graph(start, "N" if dynamic else batch, opset=OPSETS[seed % len(OPSETS)])
    rank = int(start.choice([2, 3, 4], p=[0.15, 0.1, 0.75]))
    channels = int(start.choice([1, 2, 3, 5, 8, 16, 31, 32, 33, 40, 64, 70, 128, 200]))
    size = [int(start.integers(1, 10 if start.random() < 0.8 or channels > 70 else 24)) for _ in range(rank - 2)]
    x = Tensor("x", (batch, channels, *size), 4.0, -2)
    graph.history.append(x)
    kinds, weights = list(LAYERS), np.array([w for _, w in LAYERS.values()], float)
    drawn = range(int(start.integers(4, 32)))
    layers = tuple(drawn if layers is None else layers)
    for number in layers:
        graph.rng = np.random.default_rng([seed, number])
        kind = kinds[int(graph.rng.choice(len(kinds), p=weights / weights.sum()))]
        made = add(graph, LAYERS[kind][0], x)
        if made is not None:
            graph.log.append(f"{number}: {kind} {list(x.shape)} -> {list(made.shape)} as {made.name}")
            x = made
            graph.history.append(x)
            if graph.chance(0.08) and x.name not in [*graph.outputs, "x"]:
                graph.outputs.append(x.name)
    graph.rng = start
    if x.name == "x":
        x = replace(x, name=graph.op("Identity", [x]))
    outputs = [*[o for o in graph.outputs if o != x.name], x.name]
    feed = {"x": _images(start, batch, channels, size)}
    plain, model = (_model(graph, nodes, dynamic, batch, outputs) for nodes in _nodes(graph))
    return Network(model, feed, plain, frozenset(graph.binary), frozenset(graph.low - graph.binary), layers, tuple(graph.log))


def _nodes(graph):
    """The nodes of the reference, in which custom ones are their definitions, and those of the model, which has no definitions."""
    inner = {at + 1 + i for at, count in graph.plain.items() for i in range(count)}
    return (
        [node for i, node in enumerate(graph.nodes) if i not in graph.plain],
        [node for i, node in enumerate(graph.nodes) if i not in inner],
    )


def add(graph, function, x):
    """Add a layer unless it does not fit or leaves the exact range (then the graph is as before)."""
    nodes, outputs = len(graph.nodes), len(graph.outputs)
    kept = {name: type(getattr(graph, name))(getattr(graph, name)) for name in ("constants", "binary", "low", "plain")}
    made = function(graph, x)
    if made is not None and made.exact and all(d > 0 for d in made.shape):
        return made
    del graph.nodes[nodes:], graph.outputs[outputs:]
    for name, value in kept.items():
        setattr(graph, name, value)
    return None


def _images(rng, batch, channels, size):
    """Multiples of 1/4 in [-4, 4], many exact zeros of both signs."""
    x = rng.integers(-16, 17, (batch, channels, *size)) / 4
    x = np.where(rng.random(x.shape) < 0.15, 0.0, x)
    return np.where(rng.random(x.shape) < 0.05, -0.0, x).astype(np.float32)


def _model(graph, nodes, dynamic, batch, outputs):
    shapes = {t.name: t.shape for t in graph.history}
    shape = ["N" if dynamic else batch, *shapes["x"][1:]]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    results = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
    constants = [numpy_helper.from_array(v, name) if isinstance(v, np.ndarray) else v for name, v in graph.constants.items()]
    made = helper.make_graph(nodes, "fuzz", inputs, results, constants)
    opsets = [helper.make_opsetid("", graph.opset), *[helper.make_opsetid(QONNX, 1)] * any(node.domain for node in nodes)]
    model = helper.make_model(made, opset_imports=opsets)
    model.ir_version = 8 if graph.opset < 21 else 10
    if any(node.domain for node in nodes):
        for mine, name in zip(model.graph.output, outputs):
            mine.CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(shapes.get(name, shapes["x"]))))
        return model
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    for mine, found in zip(model.graph.output, inferred.graph.output):
        mine.CopyFrom(found)
    return model
