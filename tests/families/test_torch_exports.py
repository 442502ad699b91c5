"""Every quantiser of ``torch_modules`` through both exporters of PyTorch: all layers on bits, results those of ONNX Runtime.

``BNNTVM_EXPORTS=all`` tries every pair of exporter and opset; otherwise each quantiser meets one of them.
"""

import logging
import os
import zlib

import numpy as np
import onnx
import pytest
import torch

import bnntvm.interpreter.packed  # noqa: F401  (teaches the interpreter the packed operators)
from bnntvm.importer import import_model
from bnntvm.interpreter import run
from bnntvm.pipeline import passes
from tests.families import torch_modules as modules
from tests.importer.helpers import reference

EXPORTERS = [(True, 18), (True, 21), (False, 11), (False, 13), (False, 17), (False, 20)]
ALL = os.environ.get("BNNTVM_EXPORTS") == "all"
CASES = [(name, "sign_weight") for name in modules.ACTIVATIONS]
CASES += [(name, weight) for weight in modules.WEIGHTS if weight != "sign_weight" for name in (("binarynet", "lsq") if ALL else ("lsq",))]


def chosen(case):
    """The exporters that a case is tried with."""
    return EXPORTERS if ALL else [EXPORTERS[zlib.crc32(repr(case).encode()) % len(EXPORTERS)]]


def exported(net, x, dynamo, opset, path):
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.onnx.export(net.eval(), (x,), path, dynamo=dynamo, opset_version=opset, verbose=False)
    return onnx.load(path)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_lands_on_bits(case, tmp_path):
    activation, weight = modules.ACTIVATIONS[case[0]], modules.WEIGHTS[case[1]]
    for dynamo, opset in chosen(case):
        torch.manual_seed(3)
        net = modules.Chain(activation, weight, react=case[1] != "sign_weight")
        x = torch.randn(2, 24, 7, 7) * 1.5
        proto = exported(net, x, dynamo, opset, tmp_path / "net.onnx")
        imported, decisions = import_model(proto), {}
        mod = imported.mod
        for one in passes(decisions):
            mod = one(mod)
        assert [d.kind in ("binary", "bitserial", "int8") for d in decisions.values()] == [True, True], decisions
        feed = {imported.inputs[0].name: x.numpy()}
        got, want = run(mod, feed)[0], reference(proto, feed)[0]
        wrong = np.abs(got - want) > 1e-4 * np.abs(want).max()
        assert wrong.mean() < 0.01, "more than what one level decision next to a threshold changes"
