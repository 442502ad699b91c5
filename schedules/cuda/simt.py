"""A small builder for kernels with explicit threads, on top of :mod:`bnntvm.schedules.tir`.

Numbers of threads, blocks, pixels and channels are int32; offsets into tensors of any size are int64. Statements are plain lists. Shared
memory is one array of 32-bit words for each kernel, which :class:`Shared` hands out.
"""

from __future__ import annotations

import tvm
from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import device
from bnntvm.spec import WORKSPACE

WARP = 32
_NAMED = ("int32", "int64", "uint32", "bool")


def i32(value):
    """``value`` as an int32 expression."""
    if isinstance(value, int):
        return tirx.IntImm("int32", value)
    return value if tir.dtype_of(value) == "int32" else tirx.Cast("int32", value)


def wide(value):
    """``value`` as an int64 expression."""
    if isinstance(value, int):
        return tirx.IntImm("int64", value)
    return value if tir.dtype_of(value) == "int64" else tirx.Cast("int64", value)


def u32(value):
    """``value`` as a uint32 expression."""
    if isinstance(value, int):
        return tir.constant(value & 0xFFFFFFFF, "uint32")
    return value if tir.dtype_of(value) == "uint32" else tirx.Cast("uint32", value)


def div(a, b):
    """Quotient of numbers that are not negative."""
    return tirx.truncdiv(i32(a), i32(b)) if b != 1 else i32(a)


def mod(a, b):
    """Remainder of numbers that are not negative."""
    return tirx.truncmod(i32(a), i32(b)) if b != 1 else i32(0)


def ceil_div(a, b):
    """``a / b``, rounded up; int64 or int32 as ``a`` is."""
    return tirx.truncdiv(a + (b - 1), tirx.IntImm(tir.dtype_of(a), b))


def flat(array):
    """``(array, statement)``: a parameter as one run of elements."""
    size = tir.i64(1)
    for extent in array.shape:
        size = size * extent
    alias = tirx.decl_buffer((size,), str(array.dtype), f"{array.name}_flat", data_alignment=array.data_alignment)
    return alias, tirx.DeclBuffer(alias, data=tirx.buffer_data(array))


def at(array, index):
    """The element ``index`` of a flat array."""
    return tirx.BufferLoad(array, [index if not isinstance(index, int) else i32(index)])


def put(array, index, value):
    """Statement: store into a flat array."""
    return tirx.BufferStore(array, value, [index if not isinstance(index, int) else i32(index)])


def pointer(array, index):
    """The address of an element of a flat array, for device functions."""
    return tirx.address_of(at(array, index))


def registers(name, size, dtype):
    """``(array, statement)``: memory of a thread, to be accessed at constant offsets only."""
    array = tirx.decl_buffer((i32(size),), dtype, name, scope="local")
    return array, tirx.AllocBuffer(array)


def shared(words, name="shared"):
    """``(array, statement)``: the shared memory of a block, uint32, aligned for swizzled tiles."""
    array = tirx.decl_buffer((i32(words),), "uint32", name, scope="shared.dyn", data_alignment=1024)
    return array, tirx.AllocBuffer(array)


def call(name, *args, dtype="void"):
    """A device function of :mod:`.device`; an expression."""
    function = device.FUNCTIONS[name]
    from tvm.backend.cuda.op import cuda_func_call

    return cuda_func_call(name, *args, source_code=function.source, return_type=function.returns or dtype)


def do(name, *args):
    """A device function as a statement."""
    return tirx.Evaluate(call(name, *args))


def sync():
    """Statement: all threads of the block wait for each other."""
    return tirx.Evaluate(tirx.call_intrin("void", "tirx.tvm_storage_sync", "shared"))


def loop(name, extent, body, rolled=False):
    """A loop from 0 over int32; nvcc does not know the number of steps of a ``rolled`` one, and so does not write it out."""
    if isinstance(extent, int) and extent <= 1:
        return [body(i32(i)) for i in range(extent)]
    if rolled:
        extent = call("bnn_unknown", i32(extent))
    variable = tirx.Var(f"{name}_{next(tir._fresh)}", "int32")
    return tirx.For(variable, i32(0), i32(extent), tirx.ForKind.SERIAL, tir.seq(body(variable)))


def apart(body):
    """Statements that the compiler does not mix with those around: a loop of one step, as far as it knows of any number."""
    variable = tirx.Var(f"once_{next(tir._fresh)}", "int32")
    return tirx.For(variable, i32(0), call("bnn_unknown", i32(1)), tirx.ForKind.SERIAL, tir.seq(body))


def bind(name, value):
    """``(variable, statement)``: a name for a value.

    Integers pass through a function: TVM would write what it can look into out again at every use.
    """
    dtype = tir.dtype_of(value)
    if dtype in _NAMED and not isinstance(value, (tirx.Var, tirx.IntImm)):
        value = call(f"bnn_named_{dtype}", value)
    variable = tirx.Var(f"{name}_{next(tir._fresh)}", tir.dtype_of(value))
    return variable, tirx.Bind(variable, value)


def namer(statements):
    """A function of (name, value) that names a value in ``statements``; its ``append`` adds a statement there."""

    def named(name, value):
        variable, statement = bind(name, value)
        statements.append(statement)
        return variable

    named.append = statements.append
    return named


def roles(condition, then, otherwise, group=WARP):
    """Statement: threads with different jobs, which wait for each other at barriers in shared memory only.

    ``group``: threads that run together; groups of one branch may be at different places too.
    """
    branch = tirx.IfThenElse(condition, then, otherwise)
    return tirx.AttrStmt(i32(0), "bnn.roles", i32(group), branch)


def either(condition, first, second):
    """A PrimFunc that starts one kernel or another; they have the same parameters, on which ``condition`` depends."""
    body = tirx.IfThenElse(condition, first.body, second.body)
    attributes = ("global_symbol", "tirx.noalias", "bnn.simt")
    made = tirx.PrimFunc(list(first.params), body)
    for name in attributes:
        made = made.with_attr(name, first.attrs[name])
    return made


def both(first, second):
    """A PrimFunc that starts two kernels with the same parameters, one after the other."""
    return first.with_body(tirx.SeqStmt([first.body, second.body]))


def workspace(function):
    """``(elements, type)`` of a kernel's workspace, None if it has none."""
    size = (function.attrs or {}).get(WORKSPACE)
    return None if size is None else (int(size), "int32")


def kernel(name, params, blocks, threads, body, blocks_of_multiprocessor=None, cluster=1):
    """A kernel.

    Parameters
    ----------
    name : str
    params : list of Buffer
    blocks : int or expression
        The grid, one axis.
    threads : int
        Threads of a block, a multiple of 32.
    body : function of (block, thread)
        Returns statements; both are int32.
    blocks_of_multiprocessor : int, optional
        So many are to fit at once: fixes the number of registers that a thread gets.
    cluster : int
        Blocks that run together and reach each other's shared memory; divides the number of blocks.

    Returns
    -------
    tirx.PrimFunc
    """
    block, thread = tirx.Var("block", "int32"), tirx.Var("thread", "int32")
    inner = tir.seq(body(block, thread))
    if blocks_of_multiprocessor:
        inner = tirx.AttrStmt(i32(0), "tirx.launch_bounds_min_blocks_per_sm", i32(blocks_of_multiprocessor), inner)
    axes = [(thread, "threadIdx.x", threads), (block, "blockIdx.x", blocks)]
    if cluster > 1:
        axes.insert(1, (tirx.Var("cluster", "int32"), "clusterCtaIdx.x", cluster))
    for variable, tag, extent in axes:
        axis = tirx.IterVar(tvm.ir.Range(i32(0), i32(extent)), variable, tirx.IterVar.ThreadIndex, tag)
        inner = tirx.AttrStmt(axis, "thread_extent", i32(extent), inner)
    made = tirx.PrimFunc(list(params), inner).with_attr("global_symbol", name)
    return made.with_attr("tirx.noalias", True).with_attr("bnn.simt", True)
