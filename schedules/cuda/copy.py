"""A copy of a tensor: results of a network that are an input, a constant or another result need memory of their own."""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import simt

_THREADS, _EACH = 256, 4


def build(dtype):
    """The kernel: data ``dtype[n]``, result ``dtype[n]``."""
    size = tirx.Var("n", "int64")
    source, target = tir.buffer("x", (size,), dtype), tir.buffer("y", (size,), dtype)
    (read, declared), (written, declared_too) = simt.flat(source), simt.flat(target)

    def body(block, thread):
        moves = []
        for i in range(_EACH):
            index, named = simt.bind("index", (simt.wide(block) * _EACH + i) * _THREADS + simt.wide(thread))
            moves += [named, tirx.IfThenElse(index < size, simt.put(written, index, simt.at(read, index)), None)]
        return [declared, declared_too, *moves]

    grid = simt.i32(simt.ceil_div(size, _THREADS * _EACH))
    return simt.kernel(f"copy_{dtype}", [source, target], grid, _THREADS, body)
