"""Whether an array holds neither NaN nor infinity, on a GPU: the check of a network's inputs. See :mod:`bnntvm.schedules.finite`.

It is a kernel of its own, unlike on processors, where kernels that pack an input watch it on the way. In a recorded graph it is one more
node, and a run that checks waits for the device and fetches the flag, which takes longer. What reads the inputs of published networks is a
convolution, not a packing kernel (all of ``benchmarks/zoo.py``): blocks share its pixels, so each would be looked at several times. To
watch in packing kernels alone would take a second entry point and a second set of graphs, for networks whose inputs are small.
"""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import simt
from bnntvm.schedules.finite import NAME

_THREADS, _EACH = 256, 8
_EXPONENT = 0x7F800000


def build(isa):
    """The kernel: float32 ``[n]``, int32 ``[1]``, which becomes 1 where an element is not finite and is left alone otherwise."""
    size = tirx.Var("n", "int64")
    data, flag = tir.buffer("x", (size,), "float32"), tir.buffer("found", (1,), "int32")
    (read, declared), (written, declared_too) = simt.flat(data), simt.flat(flag)

    def body(block, thread):
        loads, some = [], tirx.const(False, "bool")
        for i in range(_EACH):
            index, named = simt.bind("index", (simt.wide(block) * _EACH + i) * _THREADS + simt.wide(thread))
            value = tirx.if_then_else(index < size, tirx.reinterpret("uint32", simt.at(read, index)), simt.u32(0))
            value, named_value = simt.bind("bits", value)
            loads += [named, named_value]
            some = tirx.Or(some, tirx.EQ(value & simt.u32(_EXPONENT), simt.u32(_EXPONENT)))
        return [declared, declared_too, *loads, tirx.IfThenElse(some, simt.put(written, 0, simt.i32(1)), None)]

    grid = simt.i32(simt.ceil_div(size, _THREADS * _EACH))
    return simt.kernel(NAME, [data, flag], grid, _THREADS, body)
