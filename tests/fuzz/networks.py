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

import tests.fuzz.bitnet
import tests.fuzz.elementwise
import tests.fuzz.exporters
import tests.fuzz.families
import tests.fuzz.finn
import tests.fuzz.moves  # noqa: F401  (importing registers the layers)
from tests.fuzz.graphs import LAYERS, Graph, Tensor

#: Opset of a seed: entry ``seed % 8``.
OPSETS = (17, 21, 17, 21, 13, 23, 18, 25)


@dataclass(frozen=True)
class Network:
    """A finished network: the model, inputs for it, and what must hold."""

    seed: int
    model: onnx.ModelProto
    feed: dict
    reference: onnx.ModelProto
    binary: frozenset
    low: frozenset
    packed: frozenset
    layers: tuple
    log: tuple


def generate(seed, layers=None):
    """The network of ``seed``; ``layers``: the numbers of the layers to keep (default: all), or pairs (number, kind).

    A pair stands for the same layer whatever kinds there are later on.
    """
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
        number, kind = number if isinstance(number, tuple) else (number, None)
        graph.rng = np.random.default_rng([seed, number])
        any_kind = kinds[int(graph.rng.choice(len(kinds), p=weights / weights.sum()))]
        kind = kind or any_kind
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
    as_nodes = constant_nodes(graph) if start.random() < 0.3 else []
    plain, model = (
        _model(graph, as_nodes + [n for i, n in enumerate(graph.nodes) if graph.side.get(i, side) == side], dynamic, batch, outputs)
        for side in ("reference", "model")
    )
    low, packed = graph.low - graph.binary, graph.packed - graph.low - graph.binary
    return Network(seed, model, feed, plain, frozenset(graph.binary), frozenset(low), frozenset(packed), layers, tuple(graph.log))


def parse_layers(text):
    """Layers as ``generate`` takes them, from ``3,4`` or ``3:batch_norm,4:dense``."""
    pairs = [part.split(":") for part in text.split(",")]
    return [(int(pair[0]), pair[1]) if len(pair) == 2 else int(pair[0]) for pair in pairs]


def named(network):
    """The layers of a network as :func:`parse_layers` reads them, with their kinds."""
    return ",".join(":".join(line.split()[:2]).replace("::", ":") for line in network.log)


def constant_nodes(graph):
    """Constant nodes, with attributes of every kind, in place of half of the initializers."""
    nodes = []
    for name, value in list(graph.constants.items()):
        if isinstance(value, np.ndarray) and graph.rng.random() < 0.5:
            nodes.append(constant_node(graph.rng, name, value))
            del graph.constants[name]
    return nodes


def constant_node(rng, name, value):
    """A Constant node that holds ``value``, as ``optimize=False``, converters and people write it."""
    sparse = value.dtype == np.float32 and value.ndim in (1, 2) and np.any(value) and not np.signbit(value[value == 0]).any()
    if sparse and rng.random() < 0.2:
        at = np.flatnonzero(value)
        values, indices = numpy_helper.from_array(value.reshape(-1)[at], f"{name}_values"), numpy_helper.from_array(at, f"{name}_at")
        return helper.make_node("Constant", [], [name], sparse_value=helper.make_sparse_tensor(values, indices, value.shape))
    kind = {np.dtype(np.float32): "float", np.dtype(np.int64): "int"}.get(value.dtype)
    if kind is None or value.ndim > 1 or not value.size or rng.random() < 0.3:
        return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value, name))
    if value.ndim:
        return helper.make_node("Constant", [], [name], **{f"value_{kind}s": value.tolist()})
    return helper.make_node("Constant", [], [name], **{f"value_{kind}": value.item()})


#: What a layer that is not added after all may have changed, beside nodes and outputs.
KEPT = ("constants", "binary", "low", "packed", "side", "functions")


def add(graph, function, x):
    """Add a layer unless it does not fit or leaves the exact range (then the graph is as before)."""
    nodes, outputs = len(graph.nodes), len(graph.outputs)
    kept = {name: type(getattr(graph, name))(getattr(graph, name)) for name in KEPT}
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
    domains = {node.domain for node in [*nodes, *(n for f in graph.functions for n in f.node)]} - {""}
    opsets = [helper.make_opsetid("", graph.opset), *[helper.make_opsetid(domain, 1) for domain in sorted(domains)]]
    used = [f for f in graph.functions if f.domain in domains]
    model = helper.make_model(made, opset_imports=opsets, functions=used)
    model.ir_version = 8 if graph.opset < 21 else 10 if graph.opset < 25 else 12
    if domains:
        for mine, name in zip(model.graph.output, outputs):
            mine.CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(shapes.get(name, shapes["x"]))))
        return model
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    for mine, found in zip(model.graph.output, inferred.graph.output):
        mine.CopyFrom(found)
    return model
