"""The check of every pass: silent on a right pipeline, and it names the pass that is wrong."""

import numpy as np
import pytest
import tvm
from tvm import relax

import bnntvm
from bnntvm import pipeline
from bnntvm.graph import Rewriter, const, op_name
from tests.fuzz.networks import generate


@pytest.mark.parametrize("seed", range(3))
def test_random_networks_pass(seed):
    network = generate(seed)
    bnntvm.build(network.model, threads=1, verify=True).run(network.feed)


def test_rows_of_images_of_any_number():
    """Dense layers on each pixel of a batch of any size: kernels whose first dimension is a multiple of the batch."""
    network = generate(7, [(1, "token_dense")])
    assert network.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    bnntvm.build(network.model, threads=1, verify=True).run(network.feed)


class _Doubler(Rewriter):
    """Doubles what every layer gives."""

    def rewrite(self, var, value):
        out = super().rewrite(var, value)
        return self.emit(relax.op.multiply(out, const(np.float32(2)))) if op_name(value) in ("bnn.conv", "bnn.matmul") else out


@tvm.transform.module_pass(opt_level=0, name="test.Wrong")
class Wrong:
    def transform_module(self, mod, _context):
        return _Doubler().run(mod)


def test_the_pass_that_is_wrong_is_named(monkeypatch):
    right = pipeline.passes
    monkeypatch.setattr(pipeline, "passes", lambda *args, **options: [Wrong(), *right(*args, **options)])
    network = next(n for n in map(generate, range(50)) if n.binary)
    with pytest.raises(bnntvm.BnnError, match="Wrong changed the network's result"):
        bnntvm.build(network.model, threads=1, verify=True)
