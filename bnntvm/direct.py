"""A network of fixed shapes as one function of machine code: its kernels one after the other, on memory planned beforehand.

TVM's virtual machine makes a tensor of everything that a kernel reads or writes, on every run, and goes through tables for every call.
Once kernels have driven all that from the processor's caches, a call costs a microsecond or two, which is most of a small network's time.
Where shapes are known there is nothing to decide while a network runs. :func:`add` turns every entry point that is so (``main_1``,
``main_checked_1``, or ``main``) into a function of its own, beside the one of the virtual machine, which stays for those who watch its
calls (profiles, the tuner)::

    main_1_direct(workspace, constants, inputs..., outputs...)

``workspace``, uint8 ``[bytes]``, aligned to 64 bytes, is one piece of memory for everything between inputs and outputs. ``constants``,
int64 ``[n]``, has the addresses of the tensors that ``main_constants`` returns, or one 0 where there are none. Inputs may lie where the
entry point's own inputs may; outputs may lie anywhere if kernels of ours fill them, else they are aligned to 64 bytes. The function checks
the sizes and types of all that it is given. What a kernel raises, it raises.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.ir.expr import GenericConst

from bnntvm.graph import bindings, dims, dtype, op_name
from bnntvm.schedules import tir

#: Alignment of what lies in the workspace: what kernels may assume of every buffer.
_ALIGNMENT = 64
CONSTANTS = "main_constants"
#: Entry points that may have a direct function; those of dynamic shapes do not get one.
ENTRIES = ("main", "main_checked", "main_1", "main_checked_1")


def direct_name(entry):
    """The name of the direct function of an entry point."""
    return f"{entry}_direct"


@dataclass
class Direct:
    """What the run time has to know of a module's direct functions.

    Attributes
    ----------
    entries : list of str
        The entry points that have one.
    workspace_bytes : int
    outputs : list of (list of int, str, bool)
        Shape and dtype of every output, and whether it may lie at any address that suits its elements.
    """

    entries: list = field(default_factory=list)
    workspace_bytes: int = 0
    outputs: list = field(default_factory=list)


class _NotStraight(Exception):
    """Something that only the virtual machine can do."""


def add(mod):
    """Add direct functions to a module whose memory is planned (StaticPlanBlockMemory) and whose kernels are called on it.

    Parameters
    ----------
    mod : tvm.IRModule
        Changed in place.

    Returns
    -------
    Direct
        Entry points are left out where shapes are dynamic, or where outputs are inputs, constants, or twice the same tensor.
    """
    plans, names = {}, [gvar.name_hint for gvar in mod.get_global_vars()]
    for name in ENTRIES:
        if name in names:
            with contextlib.suppress(_NotStraight):
                plans[name] = _Plan(mod, name)
    if not plans:
        return Direct()
    size, constants = max(_ALIGNMENT, *(plan.size for plan in plans.values())), _Constants(plans.values())
    for name, plan in plans.items():
        mod[direct_name(name)] = plan.function(direct_name(name), size, constants)
    mod[CONSTANTS] = constants.function()
    outputs = [[list(o.shape), o.dtype, o.anywhere] for o in next(iter(plans.values())).outputs]
    return Direct(list(plans), size, outputs)


@dataclass(eq=False)
class _Memory:
    """A piece of memory: of the workspace (``offset`` bytes from its start), or a tensor that the function is given (``buffer``).

    ``first``, ``last``: numbers of the calls between which it is in use. ``anywhere``: whether nothing but kernels of ours touches it;
    TVM's take every buffer for aligned.
    """

    shape: tuple
    dtype: str
    offset: int | None = None
    buffer: object = None
    first: int = sys.maxsize
    last: int = -1
    anywhere: bool = True

    @property
    def size(self):
        """Bytes, up to a multiple of the alignment."""
        size = int(np.prod(self.shape, dtype=np.int64)) * -(-tvm.DataType(self.dtype).bits // 8)
        return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class _Tensor:
    """A tensor: all of a _Memory, or a GenericConst, in some shape."""

    memory: object
    shape: tuple


def _memory(operand):
    """The _Memory of an operand; None for constants and sizes."""
    return operand.memory if isinstance(operand, _Tensor) and isinstance(operand.memory, _Memory) else None


def _place(memories):
    """Give every piece of memory its place in the workspace. Returns the workspace's size.

    The largest first, each at the lowest address that is free while it is in use: "greedy by size for offset calculation" of Pisarchyk and
    Lee, Efficient Memory Management for Deep Neural Net Inference (2020).
    """
    placed = []
    for memory in sorted(memories, key=lambda m: -m.size):
        start = 0
        for other in sorted((o for o in placed if o.first <= memory.last and memory.first <= o.last), key=lambda o: o.offset):
            if start + memory.size <= other.offset:
                break
            start = max(start, other.offset + other.size)
        memory.offset = start
        placed.append(memory)
    return max((memory.offset + memory.size for memory in placed), default=0)


class _Plan:
    """Which kernels an entry point calls, on which tensors.

    Parameters
    ----------
    mod : tvm.IRModule
    name : str
        The entry point.

    Attributes
    ----------
    size : int
        Bytes of workspace.
    inputs, outputs : list of _Memory
    calls : list of (str, list)
        A kernel's name, and its operands: _Tensor, or int for a size.
    """

    def __init__(self, mod, name):
        func = mod[name]
        self.calls, self.values = [], {}
        self.inputs = [_Memory(_static(p), dtype(p)) for p in func.params]
        self.values.update((p, _Tensor(m, m.shape)) for p, m in zip(func.params, self.inputs))
        for binding in bindings(func):
            self.values[binding.var] = self._value(binding.value)
        self.outputs = self._outputs(self._of(func.body.body))
        if any(0 in memory.shape for memory in [*self.inputs, *self.outputs]):
            raise _NotStraight  # numpy cannot lend arrays without elements
        self._note_uses(mod)
        self.size = _place([memory for memory in self._made() if memory not in self.outputs])

    def _value(self, value):
        """What a binding stands for: a _Tensor, or a list of them; None for a call, and for storage, which is shared out anew."""
        name = op_name(value)
        if name == "relax.memory.alloc_storage":
            return None
        if name in ("relax.memory.alloc_tensor", "relax.builtin.alloc_tensor"):
            shape, kind = value.args[2:4] if name == "relax.memory.alloc_tensor" else value.args[:2]
            memory = _Memory(tuple(map(_integer, shape.values)), str(kind.value))
            return _Tensor(memory, memory.shape)
        if name == "relax.reshape":
            return _Tensor(self._of(value.args[0]).memory, _static(value))
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
            self.calls.append((value.op.name_hint, [self._of(arg) for arg in value.args]))
            return None
        return self._of(value)

    def _of(self, expr):
        """What an operand stands for."""
        if isinstance(expr, relax.Var):
            return self.values[expr]
        if isinstance(expr, GenericConst):
            return _Tensor(expr, _static(expr))
        if isinstance(expr, relax.Tuple):
            return [self._of(own) for own in expr.fields]
        if isinstance(expr, relax.TupleGetItem):
            return self._of(expr.tuple_value)[expr.index]
        return _integer(expr)

    def _made(self):
        """The memory that calls fill, in their order."""
        found = {id(own): own for _, operands in self.calls for own in map(_memory, operands) if own and own not in self.inputs}
        return list(found.values())

    def _outputs(self, results):
        """The memory of the results; they are filled by kernels, each of its own."""
        results = results if isinstance(results, list) else [results]
        found, made = [_memory(result) for result in results], self._made()
        if not all(memory in made for memory in found) or len(set(map(id, found))) != len(found):
            raise _NotStraight
        for memory, result in zip(found, results):
            memory.shape = result.shape
        return found

    def _note_uses(self, mod):
        """When memory is in use, and by whom."""
        for number, (kernel, operands) in enumerate(self.calls):
            own = "bnn.kernel" in (mod[kernel].attrs or {})
            for memory in filter(None, map(_memory, operands)):
                memory.first, memory.last = min(memory.first, number), max(memory.last, number)
                memory.anywhere &= own

    def function(self, name, size, constants):
        """The direct function.

        Parameters
        ----------
        size : int
            Bytes of workspace.
        constants : _Constants
        """
        workspace = tir.buffer("workspace", (size,), "uint8", _ALIGNMENT)
        for kind, memories in (("input", self.inputs), ("output", self.outputs)):
            for i, memory in enumerate(memories):
                alignment = None if memory.anywhere else _ALIGNMENT
                memory.buffer = tir.buffer(f"{kind}_{i}", memory.shape, memory.dtype, alignment)
        operands = [[self._operand(operand, workspace, constants) for operand in operands] for _, operands in self.calls]
        body = [tirx.Evaluate(tirx.call_cpacked(kernel, *own)) for (kernel, _), own in zip(self.calls, operands)]
        params = [workspace, constants.table, *(memory.buffer for memory in [*self.inputs, *self.outputs])]
        return tir.function(name, params, body)

    def _operand(self, operand, workspace, constants):
        """An operand as an argument of a packed call."""
        if isinstance(operand, int):
            return tir.i64(operand)
        memory = operand.memory
        if isinstance(memory, GenericConst):
            data = constants.address(memory)
        elif memory.buffer is not None:
            data = tirx.buffer_data(memory.buffer)
        else:
            data = tirx.address_of(workspace[memory.offset])
        return _packed(data, operand.shape, dtype(memory) if isinstance(memory, GenericConst) else memory.dtype)


class _Constants:
    """The constants of all direct functions, each once, and the table of their addresses."""

    def __init__(self, plans):
        self.values, self.numbers = [], {}
        for plan in plans:
            for _, operands in plan.calls:
                for operand in operands:
                    if isinstance(operand, _Tensor) and isinstance(operand.memory, GenericConst):
                        self._note(operand.memory)
        self.table = tir.buffer("constants", (max(1, len(self.values)),), "int64")  # numpy cannot lend an array without elements

    def _note(self, constant):
        if self.numbers.setdefault(_identity(constant), len(self.values)) == len(self.values):
            self.values.append(constant)

    def address(self, constant):
        """Where a constant lies, as an expression."""
        return tirx.reinterpret("handle", self.table[self.numbers[_identity(constant)]])

    def function(self):
        """``main_constants``: all of them, as a tuple."""
        builder = relax.BlockBuilder()
        with builder.function(CONSTANTS, []):
            builder.emit_func_output(builder.emit(relax.Tuple(self.values)))
        return builder.finalize()[CONSTANTS]


def _identity(constant):
    return constant.value.data_ptr(), _static(constant), dtype(constant)


def _packed(data, shape, kind):
    """A tensor at an address as an argument of a packed call; it is made on the stack."""
    dimensions = tvm.ir.Call(
        "tirx.tvm_stack_make_shape", list(map(tir.i64, shape)), ret_ty=tvm.ir.PointerType(tvm.ir.PrimType("int64"))
    )
    return tvm.ir.Call("tirx.tvm_stack_make_array", [data, dimensions, 0, len(shape), tirx.const(0, kind), tir.i64(0)], ret_ty="handle")


def _static(expr):
    return tuple(map(_integer, dims(expr)))


def _integer(expr):
    """A size that is known."""
    value = getattr(expr, "value", expr)
    value = getattr(value, "value", value)
    if not isinstance(value, int):
        raise _NotStraight
    return value
