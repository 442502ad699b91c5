"""What an import yields."""

from dataclasses import dataclass, field

import numpy as np
import tvm


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of the network as its ONNX file declares it.

    Attributes
    ----------
    name : str
    shape : tuple of int or str
        A string is a dynamic dimension's name.
    dtype : str
        numpy's name of the type in the file. ``float16`` and ``bfloat16`` tensors are ``float32`` in the Relax module.
    """

    name: str
    shape: tuple
    dtype: str


@dataclass(frozen=True)
class LayerInfo:
    """One Conv, ConvTranspose, Gemm or MatMul of the network.

    Attributes
    ----------
    node : str
        Name of the ONNX node, or ``<op_type>_<index>`` where it has none.
    output : str
        Name of the node's first output.
    op_type : str
    macs : int
        Multiply-accumulates for batch 1.
    weight_shape : tuple of int or None
        Shape of the constant operand as the file has it; None when both operands are computed at run time.
    float_bytes : int
        Bytes of the weights as float32.
    folded : bool
        The operands are all constants: the layer is gone, only its result is left.
    """

    node: str
    output: str
    op_type: str
    macs: int
    weight_shape: tuple | None
    float_bytes: int
    folded: bool = False


@dataclass
class Imported:
    """A network as Relax.

    Attributes
    ----------
    mod : tvm.IRModule
        ``main``: one dataflow block in ONNX layouts, parameters as ``inputs``, result a tuple as ``outputs``.
    inputs, outputs : list of TensorInfo
    layers : list of LayerInfo
        In the order of the graph.
    overridable : dict of str to numpy.ndarray
        Initializers that are graph inputs too; compiled in as constants.
    """

    mod: tvm.IRModule
    inputs: list
    outputs: list
    layers: list
    overridable: dict[str, np.ndarray] = field(default_factory=dict)
