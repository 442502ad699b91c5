"""How modules with kernels for GPUs are lowered.

Kernels of :mod:`.simt` name their threads, barriers and shared memory themselves. TVM's default pipeline would shrink arrays that device
functions get by address and add barriers where warps have different roles, so they take TVM's plain one; everything else in the module
(what families leave to TVM) takes the default.
"""

from __future__ import annotations

import tvm
from tvm.tirx import compilation_pipeline

#: What to give ``tvm.compile`` as ``tir_pipeline``.
NAME = "bnn_simt"


def _pipelines():
    plain, host, device = compilation_pipeline.tirx_pipeline()
    default, _, _ = compilation_pipeline.get_tir_pipeline("s_tir")

    @tvm.transform.module_pass(opt_level=0)
    def lower(mod, _context):
        ours = {gvar: f for gvar, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc) and f.attrs and "bnn.simt" in f.attrs}
        others = {gvar: f for gvar, f in mod.functions_items() if gvar not in ours}
        made = default(tvm.IRModule(others, attrs=mod.attrs)) if others else tvm.IRModule({}, attrs=mod.attrs)
        if ours:
            made.update(plain(tvm.IRModule(ours, attrs=mod.attrs)))
        return made

    return lower, host, device


compilation_pipeline.register_tir_pipeline(NAME, _pipelines)
