"""Memory of a network on a device: results and everything in between are written where the caller says.

``main`` gets parameters for its results and for a few *storages*, runs of bytes that tensors share which do not live at the same time.
Nothing is allocated while it runs, so that a run can be recorded once as a graph of kernels and replayed; and sizes are linear in the
batch, so that one plan serves every batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax
from tvm.ir.expr import GenericConst
from tvm_ffi import structural_visit

from bnntvm.errors import UnsupportedError
from bnntvm.graph import bindings, dims, op_name, operands

#: Storages begin where a kernel may load 16 bytes at once, and where the device allocates.
ALIGNMENT = 256


@dataclass(frozen=True)
class Bytes:
    """``fixed + per_image * n`` bytes for a batch of n."""

    per_image: int
    fixed: int

    def at(self, batch):
        """Bytes for a batch."""
        return self.fixed + self.per_image * batch


@dataclass
class Plan:
    """What the run time has to bring.

    Attributes
    ----------
    storages : list of list of Bytes
        A storage has as many bytes as the largest of its list.
    recordable : bool
        Whether nothing but planned kernels runs: no tensor is allocated, nothing depends on values.
    results : list of (list of Bytes, str)
        Shape, extents being linear in the batch as bytes are, and type of every result.
    batch : tuple of int, optional
        Number of an input and its axis whose extent is the batch.
    """

    storages: list = field(default_factory=list)
    recordable: bool = True
    results: list = field(default_factory=list)
    batch: tuple | None = None

    def storage_bytes(self, batch):
        """Bytes of all storages for a batch."""
        return sum(max(one.at(batch) for one in storage) for storage in self.storages)


def plan(mod, name="main"):
    """Give ``main`` parameters for what it computes.

    Parameters
    ----------
    mod : tvm.IRModule
        Behind ``CallTIRRewrite``; every result of ``main`` is the memory of one allocation that no other result shares.
    name : str

    Returns
    -------
    (IRModule, Plan)
        ``main(inputs..., results..., storages...)`` returns an empty tuple.

    Raises
    ------
    UnsupportedError
        If more than one dimension is dynamic, or a result's shape is not known from the batch.
    """
    return _Planner(mod, name).run()


class _Planner:
    def __init__(self, mod, name):
        self.mod, self.name, self.func = mod, name, mod[name]
        self.bindings = bindings(self.func)
        self.values = {b.var: b.value for b in self.bindings}
        self.allocations = {b.var: b.value for b in self.bindings if op_name(b.value) == "relax.builtin.alloc_tensor"}
        self.roots = self._roots()
        places = {d: (i, axis) for i, p in enumerate(self.func.params) for axis, d in enumerate(dims(p)) if isinstance(d, tvm.tirx.Var)}
        if len(places) > 1:
            raise UnsupportedError(
                "a network for a GPU has one dynamic dimension at most", why=", ".join(sorted(d.name for d in places)) + " are dynamic",
                hint="give all dimensions but the batch a size",
            )  # fmt: skip
        self.batch = next(iter(places), None)
        self.plan = Plan(recordable=self._only_kernels(), batch=places.get(self.batch))

    def _roots(self):
        """Variable -> the allocation whose memory it is."""
        roots = {}
        for binding in self.bindings:
            value = binding.value
            if binding.var in self.allocations:
                roots[binding.var] = binding.var
            elif isinstance(value, relax.Var) and value in roots:
                roots[binding.var] = roots[value]
            elif op_name(value) == "relax.reshape" and value.args[0] in roots:
                roots[binding.var] = roots[value.args[0]]
            elif isinstance(value, relax.TupleGetItem):
                found = self._field(value)
                if found in roots:
                    roots[binding.var] = roots[found]
        return roots

    def _field(self, item):
        value = self.values.get(item.tuple_value, item.tuple_value)
        return value.fields[item.index] if isinstance(value, relax.Tuple) else None

    def _only_kernels(self):
        """Whether every binding is an allocation, a view, or the call of a kernel."""
        for binding in self.bindings:
            value = binding.value
            known = isinstance(value, (relax.Var, relax.Tuple, relax.TupleGetItem, GenericConst))
            known = known or op_name(value) in ("relax.builtin.alloc_tensor", "relax.reshape")
            if not known and not (isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar)):
                return False
        return not any(allocates(f) for _, f in self.mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc))

    def run(self):
        results = self._results()
        self.plan.results = [(self._shape(r), str(r.ty.dtype)) for r in results]
        outputs = [relax.Var(f"result_{i}", r.ty) for i, r in enumerate(results)]
        written = {self.roots[r]: out for r, out in zip(results, outputs)}
        placed = self._place({root for root in self.allocations if root not in written})
        storages = [_storage_parameter(i) for i in range(len(self.plan.storages))]
        builder, made = relax.BlockBuilder(), []
        for binding in self.bindings:
            value = binding.value
            if binding.var in written:
                value = builder.normalize(relax.op.reshape(written[binding.var], binding.var.ty.shape))
            elif binding.var in placed:
                shape, dtype = value.args[0], str(binding.var.ty.dtype)
                value = builder.normalize(relax.op.memory.view(storages[placed[binding.var]], shape, dtype, relax.prim_value(0)))
            made.append(relax.VarBinding(binding.var, value))
        nothing = relax.Var("nothing", relax.TupleType([]))
        made.append(relax.VarBinding(nothing, builder.normalize(relax.Tuple([]))))
        body = builder.normalize(relax.SeqExpr([relax.BindingBlock(made)], nothing))
        params = [*self.func.params, *outputs, *storages]
        func = relax.Function(params, body, relax.TupleType([]), is_pure=self.func.is_pure, attrs=self.func.attrs)
        out = tvm.IRModule({gv: f for gv, f in self.mod.functions_items() if gv.name_hint != self.name}, attrs=self.mod.attrs)
        out[tvm.ir.GlobalVar(self.name)] = func
        return out, self.plan

    def _results(self):
        """The variables that ``main`` returns."""
        result = self.func.body.body
        while isinstance(result, relax.Var) and isinstance(self.values.get(result), (relax.Var, relax.Tuple)):
            result = self.values[result]
        results = list(result.fields) if isinstance(result, relax.Tuple) else [result]
        assert len({self.roots[r] for r in results}) == len(results), "results share memory"
        return results

    def _place(self, wanted):
        """Allocation -> number of its storage. An allocation whose size is not linear in the batch is left to TVM."""
        last = {}
        for index, binding in enumerate(self.bindings):
            for var in operands(binding.value):
                if var in self.roots:
                    last[self.roots[var]] = index
        placed, free, ending = {}, [], {}
        for index, binding in enumerate(self.bindings):
            if binding.var in wanted:
                size = self._size(self.allocations[binding.var], binding.var)
                if size is None:
                    self.plan.recordable = False
                else:
                    number = self._storage(size, free)
                    placed[binding.var] = number
                    ending.setdefault(last.get(binding.var, index), []).append(number)
            free += ending.pop(index, [])
        return placed

    def _storage(self, size, free):
        """A free storage whose size is nearest, grown if need be, or a new one."""
        if not free:
            self.plan.storages.append([size])
            return len(self.plan.storages) - 1

        def growth(number):
            have = max(one.at(64) for one in self.plan.storages[number])
            return max(0, size.at(64) - have), abs(size.at(64) - have)

        number = min(free, key=growth)
        free.remove(number)
        if not any(one.per_image >= size.per_image and one.fixed >= size.fixed for one in self.plan.storages[number]):
            self.plan.storages[number].append(size)
        return number

    def _size(self, call, var):
        """Bytes of an allocation, None if they are not linear in the batch."""
        count = tvm.tirx.const(np.dtype(str(var.ty.dtype)).itemsize, "int64")
        for extent in call.args[0].values:
            count = count * extent
        return self._linear(count)

    def _shape(self, result):
        """Extents of a result."""
        extents = [Bytes(0, d) if isinstance(d, int) else self._linear(d) for d in dims(result)]
        if None in extents:
            raise UnsupportedError("the shape of a network's result depends on more than the batch", where=str(result.ty), why="its memory "
                                   "is given before it runs", hint='build it for a processor: target="x86"')  # fmt: skip
        return extents

    def _linear(self, count):
        """An integer expression as a function of the batch, None if it is not linear."""
        if self.batch is None:
            value = tvm.sym.Analyzer().simplify(count)
            return Bytes(0, int(value)) if isinstance(value, tvm.tirx.IntImm) else None
        values = []
        for batch in (0, 1, 2, 97):
            analyzer = tvm.sym.Analyzer()
            analyzer.bind(self.batch, tvm.tirx.IntImm("int64", batch))
            value = analyzer.simplify(count)
            if not isinstance(value, tvm.tirx.IntImm):
                return None
            values.append(int(value))
        fixed, slope = values[0], values[1] - values[0]
        linear = values[2] == fixed + 2 * slope and values[3] == fixed + 97 * slope and slope >= 0
        return Bytes(slope, fixed) if linear else None


def _storage_parameter(number):
    """A run of bytes, of any length."""
    length = tvm.tirx.Var(f"bytes_{number}", "int64")
    return relax.Var(f"storage_{number}", relax.TensorType([length], "uint8"))


def allocates(func):
    """Whether a kernel keeps something in the device's global memory while it runs (kernels of TVM's own may)."""
    found = []

    def note(*buffers):
        found.extend(buffer.scope() in ("", "global") for buffer in buffers)

    structural_visit(
        func.body,
        [
            (tvm.tirx.AllocBuffer, lambda node, _visitor: note(node.buffer)),
            (tvm.s_tir.SBlock, lambda node, _visitor: note(*node.alloc_buffers)),
        ],
    )
    return any(found)
