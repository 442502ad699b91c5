"""Express layers that no kernel family takes (3-D convolutions, kernels that are not constant, products of two activations) in Relax's own
operators.

Ordering contract: after FuseEpilogues, before TVM's LegalizeOps.
"""

import tvm
from tvm import relax

from bnntvm.graph import Rewriter, dims, layer_hint, op_name


class _FloatLayers(Rewriter):
    def rewrite(self, var, value):
        name = op_name(value)
        new = self.substitute(value) if name else value
        if name == "bnn.matmul":
            return self.emit(relax.op.matmul(new.args[0], new.args[1]), layer_hint(str(value.attrs["layer"])))
        if name == "bnn.conv":
            return self.convolution(new)
        if name == "bnn.conv_transpose":
            return self.transposed(new)
        return super().rewrite(var, value)

    def convolution(self, call):
        attrs, rank = call.attrs, len(dims(call.args[0])) - 2
        make = {1: relax.op.nn.conv1d, 2: relax.op.nn.conv2d, 3: relax.op.nn.conv3d}[rank]
        layouts = {}
        if str(attrs["layout"]) == "NHWC":
            layouts = dict(data_layout="NHWC", kernel_layout="OHWI")
        return self.emit(
            make(
                *call.args, strides=_ints(attrs["strides"]), padding=_ints(attrs["pads"]), dilation=_ints(attrs["dilations"]),
                groups=int(attrs["groups"]), **layouts,
            ),
            layer_hint(str(attrs["layer"])),
        )  # fmt: skip

    def transposed(self, call):
        attrs, rank = call.attrs, len(dims(call.args[0])) - 2
        make = {1: relax.op.nn.conv1d_transpose, 2: relax.op.nn.conv2d_transpose}[rank]
        return self.emit(
            make(
                *call.args, strides=_ints(attrs["strides"]), padding=_ints(attrs["pads"]), dilation=_ints(attrs["dilations"]),
                output_padding=_ints(attrs["output_padding"]), groups=int(attrs["groups"]),
            ),
            layer_hint(str(attrs["layer"])),
        )  # fmt: skip


def _ints(attr):
    return [int(v) for v in attr]


@tvm.transform.module_pass(opt_level=0, name="bnn.FloatLayers")
class FloatLayers:
    """See the module's documentation."""

    def transform_module(self, mod, _context):
        return _FloatLayers().run(mod)
