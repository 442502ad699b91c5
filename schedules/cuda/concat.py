"""Joining tensors along their channels on a GPU: :class:`bnntvm.spec.Concat`. See :mod:`.cells`."""

from __future__ import annotations

from itertools import accumulate

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.concat import reference
from bnntvm.schedules.cuda import cells, simt
from bnntvm.schedules.cuda import epilogue as tail
from bnntvm.schedules.cuda.cells import Schedule, default_schedule, space

__all__ = ["Schedule", "build", "default_schedule", "reference", "space"]


def build(spec, schedule, isa):
    """The kernel: the parts, then the epilogue's inputs and outputs. The leading dimension is dynamic."""
    dims = (tirx.Var("n", "int64"), *spec.spatial)
    parts = [tir.buffer(f"x{i}", (*dims, c), spec.dtype) for i, c in enumerate(spec.channels)]
    flat = [simt.flat(part) for part in parts]
    emitter = tail.Emitter(spec.epilogue, sum(spec.channels), dims, spec.dtype)
    emitter.declarations[:0] = [declared for _, declared in flat]
    starts = [0, *accumulate(spec.channels)][:-1]

    def value(cell):
        """Each part is read where the channel is one of its own; the others add nothing."""
        found = tir.constant(0, spec.dtype)
        for (array, _), start, count in reversed(list(zip(flat, starts, spec.channels))):
            inside = tirx.And(cell.exists, tirx.And(cell.channel >= start, cell.channel < start + count))
            index = simt.wide(cell.row) * count + simt.wide(cell.channel - start)
            found = tirx.if_then_else(inside, simt.at(array, index), found)
        return [], found

    return cells.build("concat", parts, emitter, dims, value, schedule.cells)
