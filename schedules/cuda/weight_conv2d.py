"""float32 convolution with packed weights on a GPU: :class:`bnntvm.spec.WeightConv2d` except its depthwise case.

The convolution of :mod:`.float_conv2d`; weights are decoded on their way to shared memory.
"""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules.cuda import coding, float_conv2d
from bnntvm.schedules.weight_conv2d import reference

__all__ = ["build", "default_schedule", "pack_weights", "reference", "space"]


def default_schedule(spec, isa):
    """A schedule that is fast without tuning."""
    return space(spec, isa)[0]


def space(spec, isa):
    """Valid schedules, the default one first: on CUDA cores."""
    return float_conv2d.on_cores(spec)


def pack_weights(spec, schedule, isa, weights):
    """uint32 ``[planes, kh * kw, I', words(O')]`` from ``[planes, O, kh, kw, words(I / groups)]``, see :mod:`.coding`."""
    flat = weights.reshape(len(weights), spec.out_channels, -1, weights.shape[-1])
    units, channels = float_conv2d.sizes(spec, schedule)
    return coding.pack(flat, units, channels)


def build(spec, schedule, isa):
    """The kernel: data as in :func:`.float_conv2d.build`, packed weights, levels if any, the epilogue's inputs and outputs."""
    units, channels = float_conv2d.sizes(spec, schedule)
    shape = (spec.coding.planes, spec.window.kernel[0] * spec.window.kernel[1], units, -(-channels // 32))
    arrays, declared, decoder = coding.operands(spec.coding, shape, spec.out_channels)

    def weight(tap, unit, channel):
        statements, value = decoder.weight(tap, unit, channel)
        return statements, tirx.reinterpret("uint32", value)

    return float_conv2d.convolution("weight_conv2d", spec, schedule, arrays, declared, weight)
