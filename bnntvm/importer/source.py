"""Reading an ONNX model and refusing what is not one."""

import os
from pathlib import Path

import numpy as np
import onnx
import onnx.checker
import onnx.inliner
import onnx.shape_inference
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper

from ..errors import ModelError, UnsupportedError

OLDEST_OPSET = 7
_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
#: Operators that ONNX Runtime has in the domain of ONNX, which does not know them.
_MISPLACED = {"SimplifiedLayerNormalization"}


def load(source):
    """A checked model with its external data loaded and its local functions inlined.

    Parameters
    ----------
    source : str, os.PathLike, bytes or onnx.ModelProto

    Returns
    -------
    onnx.ModelProto
        Not the caller's object wherever something had to be changed.
    """
    model, where, folder = _read(source)
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise ModelError("the model has no graph", where=where, hint="export it again; the file may be cut off or not be ONNX")
    _check_opsets(model, where)
    model, renamed = _in_own_domain(model)
    external = [t for t in _all_tensors(model) if t.data_location == TensorProto.EXTERNAL]
    if external:
        _check_external(external, folder, where)
    if not renamed:
        # The checker looks for external data beside the file: it needs the path then.
        _check_graph(model, where if external else model, where)
    if external:
        loaded = onnx.ModelProto()
        loaded.CopyFrom(model)
        try:
            onnx.load_external_data_for_model(loaded, str(folder))
        except Exception as error:
            raise ModelError("external data cannot be read", where=where, why=_first_line(error)) from error
        model = loaded
    if renamed:
        _check_graph(model, model, where)
    if model.functions:
        try:
            model = onnx.inliner.inline_local_functions(model)
        except Exception as error:
            raise ModelError("the model's local functions cannot be inlined", where=where, why=_first_line(error)) from error
    return model


def _in_own_domain(model):
    """The model with operators that ONNX Runtime's optimiser writes into ONNX's domain moved to its own, and whether there are any."""
    if not any(node.op_type in _MISPLACED and node.domain in ("", "ai.onnx") for node in model.graph.node):
        return model, False
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for node in result.graph.node:
        if node.op_type in _MISPLACED:
            node.domain = "com.microsoft"
    if all(opset.domain != "com.microsoft" for opset in result.opset_import):
        result.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return result, True


def _read(source):
    """(model, name for messages, folder of its external data or None)."""
    if isinstance(source, onnx.ModelProto):
        return source, "the given ModelProto", None
    if isinstance(source, (bytes, bytearray, memoryview)):
        data, where, folder = bytes(source), "the given bytes", None
    else:
        try:
            path = Path(os.fsdecode(source))
        except TypeError as error:
            raise ModelError(
                "not an ONNX model", why=f"got {type(source).__name__}", hint="give a path, bytes or an onnx.ModelProto"
            ) from error
        where, folder = str(path), path.parent
        try:
            data = path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            why = getattr(error, "strerror", None) or str(error)
            raise ModelError("the model cannot be read", where=where, why=why, hint="check the path and the rights") from error
    if not data:
        raise ModelError("the model is empty", where=where)
    try:
        return onnx.load_model_from_string(data), where, folder
    except (DecodeError, ValueError) as error:
        raise ModelError(
            "not an ONNX model", where=where, why=_first_line(error), hint="the file may be cut off, or be of another format"
        ) from error


def _check_opsets(model, where):
    newest = onnx.defs.onnx_opset_version()
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and not OLDEST_OPSET <= opset.version <= newest:
            raise UnsupportedError(
                f"opset {opset.version} is not supported",
                where=where,
                why=f"supported are {OLDEST_OPSET} to {newest} (the installed onnx package knows no newer one)",
                hint="onnx.version_converter.convert_version converts between opsets" if opset.version < OLDEST_OPSET else "update onnx",
            )


def _all_tensors(model):
    """Every TensorProto of a model: of its graph, subgraphs and local functions."""
    yield from model.graph.initializer
    yield from (sparse.values for sparse in model.graph.sparse_initializer)
    yield from _node_tensors(model.graph.node)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _node_tensors(nodes):
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("sparse_tensor"):
                yield attribute.sparse_tensor.values
            yield from attribute.tensors
            for graph in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                yield from graph.initializer
                yield from _node_tensors(graph.node)


def _check_external(tensors, folder, where):
    """Refuse external data that is missing or lies outside the model's folder, before anything is opened."""
    if folder is None:
        raise ModelError(
            "the model's weights are in files of their own",
            where=where,
            why=f"'{tensors[0].name}' is external data and no folder is known",
            hint="give the path of the model file",
        )
    root = folder.resolve()
    for tensor in tensors:
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        place = f"{where}, tensor '{tensor.name}'"
        if not location:
            raise ModelError("external data without a location", where=place)
        path = Path(location)
        try:
            target = (root / path).resolve()
            found = target.is_file()
        except (OSError, ValueError) as error:
            raise ModelError("external data cannot be read", where=place, why=str(error)[:200], hint="export the model again") from error
        if path.is_absolute() or ".." in path.parts or not target.is_relative_to(root):
            linked = "" if path.is_absolute() or ".." in path.parts else f", a link to '{target}'"
            raise ModelError(
                "external data outside the model's folder is refused",
                where=place,
                why=f"location is '{location}'{linked}",
                hint="put the data file itself beside the model and save the model with a relative location",
            )
        if not found:
            raise ModelError("external data is missing", where=place, why=f"no file '{location}'", hint="copy it beside the model")


def _check_graph(model, checked, where):
    names = [tensor.name for tensor in model.graph.input]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ModelError("two graph inputs have the same name", where=where, why=f"'{twice[0]}'")
    if model.ir_version > onnx.IR_VERSION:
        raise UnsupportedError(
            f"IR version {model.ir_version} is not supported",
            where=where,
            why=f"the installed onnx package knows none above {onnx.IR_VERSION}",
            hint="update onnx",
        )
    untyped = [
        value.name for value in model.graph.output if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape")
    ]
    if untyped:
        raise ModelError(
            "a graph output has no shape",
            where=where,
            why=f"'{untyped[0]}': the format asks for one, if only of unnamed dimensions",
            hint="onnx.shape_inference.infer_shapes(model) adds it",
        )
    try:
        onnx.checker.check_model(checked)
    except Exception as error:  # the checker raises ValidationError, ValueError and RuntimeError, by onnx version
        raise ModelError(
            "the ONNX model is not valid",
            where=where,
            why="; ".join(line.strip() for line in str(error).splitlines() if line.strip()),
            hint="export it again",
        ) from error


def check_shapes(model):
    """Raise ModelError for a graph in which the shapes of operands cannot go together, by ONNX's own rules.

    A declared shape or type ("existing") that is not the inferred one is no reason: runtimes go by the inferred one.
    """
    if model.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:  # more than onnx can look at
        return
    try:
        onnx.shape_inference.infer_shapes(model, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        lines = [line.strip() for line in str(error).splitlines() if "op_type" in line]
        wrong = [line for line in lines if "existing" not in line]
        if wrong:
            raise ModelError("the shapes of the graph do not fit together", why="; ".join(wrong[:3]), hint="export it again") from error


def without_half(model):
    """The model with float16 and bfloat16 replaced by float32 in constants and in the attributes that name a type.

    ONNX Runtime's CPU provider evaluates half-precision graphs in float32; rounding after each operator would be another network.
    """
    found = any(t.data_type in _HALF for t in _all_tensors(model)) or any(
        a.name in ("to", "dtype") and a.i in _HALF for node in model.graph.node for a in node.attribute
    )
    if not found:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for tensor in _all_tensors(result):
        if tensor.data_type in _HALF:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in result.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in _HALF:
                attribute.i = TensorProto.FLOAT
    return result


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
