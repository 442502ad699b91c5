"""Products of two packed run-time tensors are stored as float32, times their scale, where nothing reads their integers.

``astype(matmul_bits(...), "float32") * c`` becomes one kernel: the result of attention scores is far larger than what it is made from, and
each operator on its own would read and write it once more.

Ordering contract: after FoldThresholds, which compares the integers.
"""

from __future__ import annotations

import numpy as np
import tvm

from bnntvm import ops
from bnntvm.graph import Rewriter, bindings, constant, dtype, op_name, uses


class _Scale(Rewriter):
    def begin(self):
        self.producer, self.uses = {binding.var: binding.value for binding in bindings(self.func)}, uses(self.func)

    def rewrite(self, var, value):
        product, scale = self.scaled(var)
        if product is None:
            return super().rewrite(var, value)
        attrs = {key: str(product.attrs[key]) for key in ("layer", "left", "right")}
        reachable = [int(v) for v in product.attrs["reachable"]]
        new = self.substitute(product)
        attrs |= dict(features=int(product.attrs["features"]), reachable=reachable, scale=[scale])
        return self.emit(ops.call(ops.MATMUL_BITS, new.args, **attrs))

    def scaled(self, var):
        """``(product, scale)`` of a variable that is the product as float32 times a number; the product is None if it is not."""
        value = self.producer.get(var)
        if op_name(value) == "relax.astype" and dtype(var) == "float32":
            product = self.producer.get(value.args[0])
            return (product if op_name(product) == "bnn.matmul_bits" and self.uses[value.args[0]] == 1 else None), 1.0
        if op_name(value) == "relax.multiply":
            for data, factor in (tuple(value.args), tuple(reversed(value.args))):
                number = constant(factor)
                if number is not None and number.size == 1 and op_name(self.producer.get(data)) == "relax.astype" and self.uses[data] == 1:
                    return self.scaled(data)[0], float(np.float32(number.reshape(())))
        return None, 1.0


@tvm.transform.module_pass(opt_level=0, name="bnn.ScaleProducts")
class ScaleProducts:
    """See the module's documentation."""

    def transform_module(self, mod, _context):
        return _Scale().run(mod)
