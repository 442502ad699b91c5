"""Elementwise kernels of :class:`bnntvm.spec.Map` on a GPU; with a packed output this is the packing kernel. See :mod:`.cells`."""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import cells, simt
from bnntvm.schedules.cuda import epilogue as tail
from bnntvm.schedules.cuda.cells import Schedule, default_schedule, space
from bnntvm.schedules.map import reference

__all__ = ["Schedule", "build", "default_schedule", "reference", "space"]


def build(spec, schedule, isa):
    """The kernel: parameters data ``[n, H, W, C]`` or ``[m, C]``, then the epilogue's."""
    dims = (tirx.Var("n", "int64"), *(spec.spatial if spec.rank == 4 else ()))
    data = tir.buffer("data", (*dims, spec.channels), spec.dtype)
    source, declared = simt.flat(data)
    emitter = tail.Emitter(spec.epilogue, spec.channels, dims, spec.dtype)
    emitter.declarations.insert(0, declared)

    def value(cell):
        return [], cells.guarded(cell.exists, source, simt.wide(cell.row) * spec.channels + simt.wide(cell.channel))

    return cells.build("map", [data], emitter, dims, value, schedule.cells)
