"""Elementwise kernels of :class:`bnntvm.spec.Map` on a GPU, see :mod:`.cells`; those that only pack are :mod:`.pack`'s."""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import cells, pack, simt
from bnntvm.schedules.cuda import epilogue as tail
from bnntvm.schedules.map import reference

__all__ = ["build", "default_schedule", "reference", "space"]


def default_schedule(spec, isa):
    """Four cells, or words, whose loads overlap."""
    return pack.default_schedule(spec, isa) if pack.claims(spec) else cells.Schedule(4)


def space(spec, isa):
    """Counts of cells or words."""
    return pack.space(spec, isa) if pack.claims(spec) else cells.space(spec, isa)


def build(spec, schedule, isa):
    """The kernel: parameters data ``[n, H, W, C]`` or ``[m, C]``, then the epilogue's."""
    if isinstance(schedule, pack.Schedule):
        return pack.build(spec, schedule, isa)
    dims = (tirx.Var("n", "int64"), *(spec.spatial if spec.rank == 4 else ()))
    data = tir.buffer("data", (*dims, spec.channels), spec.dtype)
    source, declared = simt.flat(data)
    emitter = tail.Emitter(spec.epilogue, spec.channels, dims, spec.dtype)
    emitter.declarations.insert(0, declared)

    def value(cell):
        return [], cells.guarded(cell.exists, source, simt.wide(cell.row) * spec.channels + simt.wide(cell.channel))

    return cells.build("map", [data], emitter, dims, value, schedule.cells)
