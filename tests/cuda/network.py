"""Whole networks for a GPU on a CPU: every kernel by the emulator, in the order in which the network calls them.

Kernels that TVM's lowering left (:mod:`bnntvm.schedules.cuda.fallback` gives them threads) are not written for the emulator: they run as
code for the CPU.
"""

import pathlib

import numpy as np
import tvm
from onnx import TensorProto, helper, numpy_helper

from bnntvm.cuda.backend import device_target, legalise, own_results
from bnntvm.schedules.cuda import emulate, finite
from tests.walk import Walk


class Network(Walk):
    """A network, compiled for a GPU up to its kernels; parameters as of :class:`tests.walk.Walk`.

    Attributes
    ----------
    calls : list of (str, list, bool)
        After a run: the kernels that were called, shapes and types of their parameters, whether the emulator ran them.
    """

    def __init__(self, model, target):
        super().__init__(model, target)
        self.kernels[finite.NAME] = finite.build(self.isa)
        self.on_processor = {}

    def legalised(self, mod):
        with device_target(self.isa):
            return own_results(legalise(mod))

    def run(self, feed):
        self.calls = []
        return super().run(feed)

    def call(self, name, arrays, outputs):
        params = [*arrays, *outputs]
        self.calls.append((name, [(a.shape, a.dtype) for a in params], self.emulated(name)))
        self.execute(name, params)
        return outputs

    def emulated(self, name):
        """Whether the emulator runs a kernel."""
        return "bnn.simt" in (self.kernels[name].attrs or {})

    def launches(self, name, shapes):
        """How many kernels a call starts for parameters of these ``(shape, type)``."""
        return emulate.launches(self.kernels[name], shapes) if self.emulated(name) else 1

    def execute(self, name, params):
        """Run a kernel on arrays, which it writes in place."""
        if self.emulated(name):
            emulate.run(self.kernels[name], params)
            return
        if name not in self.on_processor:
            func = self.kernels[name].with_attr("global_symbol", name)
            self.on_processor[name] = tvm.compile(tvm.IRModule({name: func}), target=tvm.target.Target("llvm"))[name]
        tensors = [tvm.runtime.tensor(a) for a in params]
        self.on_processor[name](*tensors)
        for array, tensor in zip(params, tensors):
            array[...] = tensor.numpy()


def long_layers():
    """Signs of [n, 16384] times +-1, twice, of few columns: what has K in parts that meet in memory; the second layer is short."""
    rng, nodes, tensors, name = np.random.default_rng(3), [], [], "x"
    for number, (rows, columns) in enumerate(((16384, 40), (40, 24))):
        tensors += [numpy_helper.from_array(rng.choice(np.float32([-1, 1]), (rows, columns)), f"w{number}")]
        nodes += [
            helper.make_node("GreaterOrEqual", [name, "zero"], [f"p{number}"]),
            helper.make_node("Where", [f"p{number}", "one", "minus"], [f"s{number}"]),
            helper.make_node("MatMul", [f"s{number}", f"w{number}"], [f"y{number}"]),
        ]
        name = f"y{number}"
    tensors += [numpy_helper.from_array(np.float32(value), text) for text, value in (("zero", 0), ("one", 1), ("minus", -1))]
    kinds = {
        text: helper.make_tensor_value_info(text, TensorProto.FLOAT, ["n", size]) for text, size in (("x", 16384), ("y0", 40), ("y1", 24))
    }
    graph = helper.make_graph(nodes, "long", [kinds.pop("x")], list(kinds.values()), tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


_HERE = pathlib.Path(__file__)
#: Small networks with tensors that share memory.
DIGITS_LIKE = [_HERE.parents[2] / "tutorials" / "data" / "digits_bnn.onnx", _HERE.with_name("data") / "exact_resnet.onnx"]
