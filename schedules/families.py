"""Which kernel family builds which specification."""

from bnntvm import spec as sp

from . import binary_conv2d, binary_dense, bit_pool, depthwise_conv2d, float_conv2d, float_dense, map, pool2d, reduce  # noqa: A004

FAMILIES = {
    sp.BinaryConv2d: binary_conv2d,
    sp.BinaryDense: binary_dense,
    sp.BitPool: bit_pool,
    sp.Map: map,
    sp.FloatDense: float_dense,
    sp.Pool2d: pool2d,
}


def of(spec):
    """The module of the family that owns ``spec``."""
    if isinstance(spec, sp.FloatConv2d):
        depthwise = spec.groups == spec.in_channels and spec.groups > 1
        return depthwise_conv2d if depthwise else float_conv2d
    if hasattr(sp, "GlobalPool") and isinstance(spec, sp.GlobalPool):
        return reduce
    return FAMILIES[type(spec)]
