"""What converters see: the ONNX node in work and the module under construction."""

from dataclasses import dataclass
from math import prod

import numpy as np
import tvm
from tvm import relax

from ..errors import ModelError, UnsupportedError
from .model import LayerInfo
from .values import Dims, Expanded, Unfolded, broadcast_shape, is_constant, same_dim, shape_of


@dataclass
class Node:
    """An ONNX node with its attributes as Python values.

    Attributes
    ----------
    proto : onnx.NodeProto
    name : str
        Never empty.
    domain, op_type : str
    opset : int
        Version of the node's domain in this model.
    attrs : dict
        Tensors as numpy arrays, strings decoded, the rest as onnx.helper gives it.
    inputs, outputs : list of str
    used : list of bool
        Which outputs something reads.
    """

    proto: object
    name: str
    domain: str
    op_type: str
    opset: int
    attrs: dict
    inputs: list
    outputs: list
    used: list

    @property
    def where(self):
        return f"node '{self.name}' ({self.domain + '::' if self.domain else ''}{self.op_type})"


class Context:
    """What converters build with: the Relax bindings made so far and the constants.

    Every tensor in half precision has become float32 before a converter sees it.

    Attributes
    ----------
    batch : tirx.Var
        The dynamic batch.
    element_types : dict of str to int
        ONNX element type of each initializer, as the file has it.
    bindings : list of relax.VarBinding
    layers : list of LayerInfo
    node : Node
        The one being converted.
    args : list
        Its inputs' values.
    """

    def __init__(self, batch, element_types=()):
        self.batch, self.element_types = batch, dict(element_types)
        self.bindings, self.layers = [], []
        self.node, self.args = None, []
        self._builder = relax.BlockBuilder()
        self._constants = {}
        self._unfolded = {}
        self._names = set()

    # ---- building

    def emit(self, expr, hint=None):
        """Bind ``expr``, whose arguments are variables and constants, to a new variable and return that."""
        expr = self._builder.normalize(expr)
        if isinstance(expr.ty, relax.TensorType):
            if not isinstance(expr.ty.shape, relax.ShapeExpr):
                raise self.unsupported("the shape of a result depends on the batch in a way that cannot be followed")
            if any(isinstance(d, int) and d == 0 for d in shape_of(expr)):
                raise self.unsupported("a tensor has no elements", why=f"its shape is {list(shape_of(expr))}")
        var = relax.DataflowVar(self._fresh(hint or (self.node.outputs[0] if self.node else "value")), expr.ty)
        self.bindings.append(relax.VarBinding(var, expr))
        return var

    def _fresh(self, hint):
        stem = "".join(c if c.isalnum() else "_" for c in hint) or "value"
        stem = stem if not stem[0].isdigit() else f"v{stem}"
        name, i = stem, 0
        while name in self._names:
            i += 1
            name = f"{stem}_{i}"
        self._names.add(name)
        return name

    def const(self, array):
        """A Relax constant; one object for one array, so that shared weights stay shared."""
        found = self._constants.get(id(array))
        if found is None:
            if array.size == 0:  # TVM writes it into the library and cannot read it back
                where = self.node.where if self.node else None
                raise UnsupportedError("a constant has no elements", where=where, why=f"its shape is {list(array.shape)}")
            kept = array  # the dictionary holds the array too: its id stays its own
            found = self._constants[id(array)] = (relax.const(np.ascontiguousarray(kept).reshape(kept.shape), str(kept.dtype)), kept)
        return found[0]

    def tensor(self, value):
        """A value as a Relax expression of its full shape."""
        if isinstance(value, relax.Expr):
            return value
        if isinstance(value, Expanded):
            return self.emit(relax.op.broadcast_to(self.const(value.array), value.shape))
        if isinstance(value, Unfolded):
            return self.unfolded(value)
        if isinstance(value, Dims):
            raise self.unsupported("a shape that depends on the batch is used as a tensor", hint="export the model with a static batch")
        return self.const(value)

    def unfolded(self, windows):
        """The windows of an image (:class:`Unfolded`) as a Relax expression: shifted slices of the image side by side."""
        found = self._unfolded.get(windows)
        if found is None:
            top, left, bottom, right = windows.pads
            image = windows.image
            if any(windows.pads):
                image = self.emit(relax.op.nn.pad(image, [0, 0, top, bottom, left, right, 0, 0], "constant", windows.fill))
            reach = [(out - 1) * stride + 1 for out, stride in zip(windows.shape[1:3], windows.strides)]
            starts = [tuple(t * d for t, d in zip(tap, windows.dilations)) for tap in np.ndindex(*windows.kernel)]
            taps = [
                self.emit(relax.op.strided_slice(image, [1, 2], start, [s + r for s, r in zip(start, reach)], windows.strides))
                for start in starts
            ]
            found = self._unfolded[windows] = taps[0] if len(taps) == 1 else self.emit(relax.op.concat(taps, 3))
        return found

    def operands(self, *values):
        """Values for an elementwise operator as Relax expressions.

        Constants become the smallest that broadcast to the same result: an axis along which the data repeat and which a run-time operand
        has too is shrunk to 1, single numbers to rank 0, all others are reshaped to the rank of the result.
        """
        values = [self.unfolded(v) if isinstance(v, Unfolded) else v for v in values]
        runtime = [shape_of(v) for v in values if isinstance(v, relax.Expr)]
        if not runtime:
            return [self.tensor(v) for v in values]
        full = broadcast_shape(*map(shape_of, values))
        covered = [any(len(s) >= i and same_dim(s[-i], full[-i]) for s in runtime) for i in range(len(full), 0, -1)]
        results = []
        for value in values:
            if isinstance(value, Expanded) and all(covered):
                value = value.array
            results.append(self.const(self._shrunk(value, covered)) if is_constant(value) else self.tensor(value))
        return results

    def _shrunk(self, array, covered):
        offset = len(covered) - array.ndim
        small = array
        for axis in range(array.ndim):
            if covered[offset + axis] and array.shape[axis] > 1:
                first = np.ascontiguousarray(small.take([0], axis))
                if np.ascontiguousarray(np.broadcast_to(first, small.shape)).tobytes() == np.ascontiguousarray(small).tobytes():
                    small = first
        if array.ndim == 0 or small.size == 1 and all(covered):
            return small.reshape(())
        if small is array and offset == 0:
            return array
        return small.reshape((1,) * offset + small.shape)

    # ---- reading

    def array(self, value, what):
        """``value`` as a numpy array; an error naming ``what`` where it is not constant."""
        if is_constant(value):
            return value
        raise self.unsupported(f"{what} must be constant", why="it is computed at run time")

    def ints(self, value, what):
        """``value`` as a list of ints."""
        return [int(v) for v in self.array(value, what).reshape(-1)]

    def dims(self, value, what):
        """``value`` as a tuple of ints and TIR expressions."""
        return tuple(value.array.reshape(-1)) if isinstance(value, Dims) else tuple(self.ints(value, what))

    def static(self, value, what="the shape"):
        """Shape of ``value`` behind the first axis as ints."""
        shape = shape_of(value)
        if any(not isinstance(d, int) for d in shape[1:]):
            raise self.unsupported(f"{what} must be static behind its first axis", why=f"it is {shape}")
        return shape

    def unsupported(self, what, why=None, hint=None):
        """An UnsupportedError at the node in work."""
        return UnsupportedError(what, where=self.node.where, why=why, hint=hint)

    def add_layer(self, output_shape, reduction, weight, folded=False, batch_first=True):
        """Report the node in work as a layer with ``reduction`` multiply-accumulates for each output element."""
        node = self.node
        sizes = [d if isinstance(d, int) else 1 for d in output_shape]
        if batch_first and sizes:
            sizes[0] = 1
        if weight is not None and weight.dtype.kind == "f" and not np.isfinite(weight).all():
            name = next((name for name, arg in zip(node.inputs, self.args) if arg is weight), node.inputs[-1])
            raise ModelError(
                "the weights of a layer hold NaN or infinity",
                where=node.where,
                why=f"'{name}' is not finite",
                hint="train or export the model again",
            )
        size = 0 if weight is None else weight.size
        shape = None if weight is None else tuple(weight.shape)
        self.layers.append(LayerInfo(node.name, node.outputs[0], node.op_type, prod(sizes) * reduction, shape, 4 * size, folded))

    def module(self, parameters, results):
        """The module whose ``main`` has ``parameters`` and returns ``results`` as a tuple."""
        result = self._builder.normalize(relax.Tuple(results))
        output = relax.Var("outputs", result.ty)
        block = relax.DataflowBlock([*self.bindings, relax.VarBinding(output, result)])
        body = self._builder.normalize(relax.SeqExpr([block], output))
        function = relax.Function(parameters, body, output.ty, is_pure=True)
        function = function.with_attr("global_symbol", "main").with_attr("num_input", len(parameters))
        return tvm.IRModule({"main": function})
