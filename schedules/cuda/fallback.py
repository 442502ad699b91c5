"""Threads for whatever TVM's own lowering produced: one for each element of a result.

Operators that matter for speed have kernel families of their own; this keeps the rest on the device. Where there is one result, a thread
computes all that its element needs, sums and maxima too, in registers: one kernel, and no memory between two. Anything else takes TVM's
fallback rule, a kernel for each stage.
"""

from __future__ import annotations

import tvm
from tvm import s_tir
from tvm.s_tir import dlight

THREADS = 128


@tvm.transform.module_pass(opt_level=0, name="bnn.cuda.ScheduleFallback")
class ScheduleFallback:
    """Schedule every PrimFunc that no kernel family made; to be called within the target."""

    def transform_module(self, mod, _context):
        functions = {gvar: schedule(f) if _is_loose(f) else f for gvar, f in mod.functions_items()}
        return tvm.IRModule(functions, attrs=mod.attrs)


def _is_loose(func):
    return isinstance(func, tvm.tirx.PrimFunc) and not (func.attrs and "bnn.kernel" in func.attrs)


def schedule(func):
    """A PrimFunc of TVM's with threads."""
    try:
        made = _by_elements(func)
    except (s_tir.ScheduleError, tvm.error.InternalError, ValueError, IndexError):
        made = _by_stages(func)
    return made.with_attrs(dict(func.attrs) if func.attrs else {})


def _by_stages(func):
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(mod)["main"].without_attr("global_symbol")


def _by_elements(func):
    sch = s_tir.Schedule(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}))
    *before, last = sch.get_child_blocks(sch.get_sblock("root"))
    if any(not sch.get_consumers(block) for block in before):
        raise ValueError("more than one result")
    reductions = []
    for block in before:
        if _is_reduction(sch, block):
            reductions.append(block)
        else:
            sch.compute_inline(block)
    loops = sch.get_loops(last)
    if not loops:  # one number
        loops = [sch.add_unit_loop(last)]
    kinds = [int(v.iter_type) for v in sch.get(last).iter_vars]
    spatial = [loop for loop, kind in zip(loops, kinds or [0], strict=True) if kind == 0]
    if not spatial or loops[: len(spatial)] != spatial:
        raise ValueError("no element to give to a thread")
    block_loop, thread_loop = sch.split(sch.fuse(*spatial) if len(spatial) > 1 else spatial[0], [None, THREADS])
    sch.bind(block_loop, "blockIdx.x")
    sch.bind(thread_loop, "threadIdx.x")
    for block in reversed(reductions):
        for number in range(len(sch.get(block).writes)):
            sch.set_scope(block, number, "local")
        sch.compute_at(block, thread_loop)
    return sch.mod["main"].without_attr("global_symbol")


def _is_reduction(sch, block):
    return any(int(v.iter_type) != 0 for v in sch.get(block).iter_vars)
