"""Which kernel family builds which specification."""

import importlib

from bnntvm import spec as sp

FAMILIES = {
    sp.BinaryConv2d: "binary_conv2d",
    sp.BinaryDense: "binary_dense",
    sp.PlanesConv2d: "bitserial_conv2d",
    sp.PlanesDense: "bitserial_dense",
    sp.BinaryMatmul: "binary_matmul",
    sp.Int8Conv2d: "int8_conv2d",
    sp.BitPool: "bit_pool",
    sp.BitPad: "bit_pad",
    sp.PlanarPack: "planar_pack",
    sp.Transpose: "transpose",
    sp.Map: "map",
    sp.FloatConv2d: "float_conv2d",
    sp.FloatDense: "float_dense",
    sp.WeightConv2d: "weight_conv2d",
    sp.WeightDense: "weight_dense",
    sp.WeightDenseInt8: "weight_dense_int8",
    sp.Pool2d: "pool2d",
    sp.GlobalPool: "reduce",
    sp.Softmax: "reduce",
    sp.Concat: "concat",
    sp.RowExtreme: "row_extreme",
    sp.TopK: "top_k",
    sp.CumSum: "cum_sum",
}
#: The same for convolutions of one input channel per group.
DEPTHWISE = {sp.FloatConv2d: "depthwise_conv2d", sp.WeightConv2d: "weight_depthwise"}


def of(spec, isa=None):
    """The module of the family that owns ``spec``; on a GPU its namesake in :mod:`.cuda`."""
    depthwise = type(spec) in DEPTHWISE and spec.groups == spec.in_channels and spec.groups > 1
    name = (DEPTHWISE if depthwise else FAMILIES)[type(spec)]
    folder = f"{__package__}.cuda" if isa is not None and isa.machine == "cuda" else __package__
    return importlib.import_module(f"{folder}.{name}")
