"""A plain schedule for whatever TVM's own lowering produced: outer loops in parallel, contiguous inner loops as vectors.

Operators that matter for speed have kernel families of their own; this keeps the rest from being scalar and single-threaded.
"""

import tvm
from tvm import s_tir

VECTOR = 16


def schedule(func):
    """A scheduled copy of a PrimFunc, or the PrimFunc itself where a block's shape does not allow it."""
    sch = s_tir.Schedule(func)
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        try:
            _schedule_block(sch, block)
        except (s_tir.ScheduleError, tvm.error.InternalError, ValueError):
            continue
    return sch.mod["main"].with_attrs(dict(func.attrs) if func.attrs else {})


def _schedule_block(sch, block):
    loops = sch.get_loops(block)
    kinds = [int(v.iter_type) for v in sch.get(block).iter_vars]
    if len(kinds) != len(loops) or len(loops) < 2:
        return
    spatial = [loop for loop, kind in zip(loops, kinds) if kind == 0]
    if len(spatial) == len(loops):
        extent = sch.get(loops[-1]).extent
        if isinstance(extent, tvm.tirx.IntImm) and int(extent) % VECTOR == 0:
            _, inner = sch.split(loops[-1], [None, VECTOR])
            sch.vectorize(inner)
        sch.parallel(sch.fuse(*loops[:-1]))
    elif kinds[: len(spatial)] == [0] * len(spatial) and spatial:
        sch.parallel(sch.fuse(*spatial) if len(spatial) > 1 else spatial[0])


@tvm.transform.module_pass(opt_level=0, name="bnn.ScheduleFallback")
class ScheduleFallback:
    """Schedule every PrimFunc that no kernel family made."""

    def transform_module(self, mod, _context):
        out = {}
        for gvar, func in mod.functions_items():
            loose = isinstance(func, tvm.tirx.PrimFunc) and not (func.attrs and "bnn.kernel" in func.attrs)
            out[gvar] = schedule(func) if loose else func
        return tvm.IRModule(out, attrs=mod.attrs)
