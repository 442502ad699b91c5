"""Threads for whatever TVM's own lowering produced: one for each element of a result.

Operators that matter for speed have kernel families of their own; this keeps the rest on the device.
"""

from __future__ import annotations

import tvm
from tvm.s_tir import dlight


@tvm.transform.module_pass(opt_level=0, name="bnn.cuda.ScheduleFallback")
class ScheduleFallback:
    """Schedule every PrimFunc that no kernel family made; to be called within the target."""

    def transform_module(self, mod, _context):
        loose = {gvar: f for gvar, f in mod.functions_items() if _is_loose(f)}
        scheduled = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(tvm.IRModule(loose, attrs=mod.attrs)) if loose else {}
        made = {gvar.name_hint: f for gvar, f in scheduled.functions_items()} if loose else {}
        functions = {gvar: made[gvar.name_hint] if gvar in loose else f for gvar, f in mod.functions_items()}
        return tvm.IRModule(functions, attrs=mod.attrs)


def _is_loose(func):
    return isinstance(func, tvm.tirx.PrimFunc) and not (func.attrs and "bnn.kernel" in func.attrs)
