"""The systems under measurement, each behind the same two steps: prepare a model once, then run it many times.

A system that is not installed raises ImportError from `prepare`; the harness leaves it out with a note.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx


@dataclass(frozen=True)
class Prepared:
    """A model ready to run.

    Attributes
    ----------
    run : callable
        Runs it once on the input it was prepared with.
    outputs : list of np.ndarray
        What it gave for that input; empty for a kernel without a model.
    macs : int
        Multiply-accumulates of one run, where the system knows better than the model; else 0.
    note : str
        Facts worth printing, such as how many layers run on bits.
    limit_seconds : float
        What one run would take if every kernel were at its limit (:func:`bnntvm.profile`); 0 where that is not known.
    """

    run: Callable[[], object]
    outputs: list[np.ndarray]
    macs: int = 0
    note: str = ""
    limit_seconds: float = 0.0


def prepare_bnntvm(model: onnx.ModelProto, feed: dict[str, np.ndarray], threads: int, tuning: bool | None = None) -> Prepared:
    """This project through its public interface, with the tuning records that are part of it, or (``tuning=False``) without."""
    import bnntvm

    module = bnntvm.build(model, target="x86", threads=threads, tuning=tuning)
    outputs = [np.asarray(y) for y in module.run(feed).values()]
    kinds = [layer.kind for layer in module.report.layers]
    stored = 32 * sum(x.weight_bytes for x in module.report.layers) / max(1, sum(x.float_bytes for x in module.report.layers))
    note = f"{kinds.count('binary')} of {len(kinds)} layers on bits, {stored:.2f} bits a weight"
    limit = sum(call.limit_us for call in bnntvm.profile(module, seconds=0.2).calls) / 1e6 if tuning is False else 0.0
    return Prepared(lambda: module.run(feed), outputs, note=note, limit_seconds=limit)


def prepare_default(model: onnx.ModelProto, feed: dict[str, np.ndarray], threads: int) -> Prepared:
    """This project with default schedules everywhere."""
    return prepare_bnntvm(model, feed, threads, tuning=False)


def _session(model: bytes | str, threads: int):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def prepare_ort(model: onnx.ModelProto, feed: dict[str, np.ndarray], threads: int) -> Prepared:
    """ONNX Runtime in float32, all graph optimisations."""
    session = _session(model.SerializeToString(), threads)
    return Prepared(lambda: session.run(None, feed), session.run(None, feed))


def quantise_u8s8(model: onnx.ModelProto, feed: dict[str, np.ndarray], path: Path) -> None:
    """Static 8-bit quantisation of Conv, MatMul and Gemm, weights per channel, calibrated on the one feed; written to ``path``."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class OneFeed(CalibrationDataReader):
        def __init__(self):
            self.feeds = iter([feed])

        def get_next(self):
            return next(self.feeds, None)

    # It recommends a pre-processing step that would not change these models.
    logging.getLogger().setLevel(logging.ERROR)
    quantize_static(
        model,
        path,
        OneFeed(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": False},
    )


def prepare_ort_u8s8(model: onnx.ModelProto, feed: dict[str, np.ndarray], threads: int) -> Prepared:
    """ONNX Runtime in 8 bits: unsigned activations, signed weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "u8s8.onnx"
        quantise_u8s8(model, feed, path)
        session = _session(str(path), threads)
    return Prepared(lambda: session.run(None, feed), session.run(None, feed))


def prepare_openvino(model: onnx.ModelProto, feed: dict[str, np.ndarray], threads: int) -> Prepared:
    """OpenVINO with every binary layer rewritten to BinaryConvolution."""
    import openvino

    from .openvino_binary import compile_model

    (array,) = feed.values()
    compiled = compile_model(model, array.shape, threads)
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(array))
    request.infer()
    outputs = [request.get_output_tensor(i).data.copy() for i in range(len(compiled.outputs))]
    # The closure keeps `compiled`, and with it the packed weights, alive.
    return Prepared(lambda: (request.infer(), compiled)[0], outputs, note=f"{compiled.binary_layers} layers on bits")


def prepare_limit(_model: onnx.ModelProto, _feed: dict[str, np.ndarray], _threads: int) -> Prepared:
    """The register-resident xor+popcount+add kernel."""
    from .limit import xor_popcount

    kernel = xor_popcount()
    return Prepared(kernel.call, [], macs=kernel.macs, note=", ".join(f"{n} {op}" for op, n in kernel.inner_loop().most_common(3)))


def prepare_stream(_model: onnx.ModelProto, feed: dict[str, np.ndarray], _threads: int) -> Prepared:
    """Reading the bytes of the feed."""
    from .limit import stream

    (array,) = feed.values()
    return Prepared(stream(array), [])


@dataclass(frozen=True)
class System:
    """One system under measurement.

    Attributes
    ----------
    title : str
        Column heading.
    package : str
        Distribution whose version is recorded.
    prepare : callable
        (model, feed, threads) to `Prepared`.
    """

    title: str
    package: str
    prepare: Callable[[onnx.ModelProto, dict[str, np.ndarray], int], Prepared]


SYSTEMS = {
    "bnntvm": System("bnntvm", "bnntvm", prepare_bnntvm),
    "default": System("bnntvm, default schedules", "bnntvm", prepare_default),
    "ort": System("ONNX Runtime fp32", "onnxruntime", prepare_ort),
    "ort-u8s8": System("ONNX Runtime u8s8", "onnxruntime", prepare_ort_u8s8),
    "openvino": System("OpenVINO binary", "openvino", prepare_openvino),
    "limit": System("limit", "apache-tvm", prepare_limit),
}
#: Measured in rows about packed weights only.
FOR_WEIGHTS = {
    "ort-2bit": System("MatMulNBits, 2 bits", "onnxruntime", prepare_ort),
    "stream": System("reading the weights", "apache-tvm", prepare_stream),
}
