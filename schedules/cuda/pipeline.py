"""How modules with kernels for GPUs are lowered.

Kernels of :mod:`.simt` name their threads, barriers and shared memory themselves, and the values that they use more than once. TVM's
default pipeline would shrink arrays that device functions get by address, add barriers where warps have different roles, and write named
values out wherever they are used. So they take only what leads to CUDA C++; everything else in the module (what families leave to TVM)
takes the default.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.backend.cuda import transforms as cuda_transforms
from tvm.tirx import compilation_pipeline

#: What to give ``tvm.compile`` as ``tir_pipeline``.
NAME = "bnn_simt"
_ATTRIBUTE = "bnn.simt"


def _ours(func):
    return isinstance(func, tirx.PrimFunc) and bool(func.attrs) and _ATTRIBUTE in func.attrs


def _by_kind(ours, others):
    """A pass that treats kernels of this package and other functions differently."""

    @tvm.transform.module_pass(opt_level=0)
    def both(mod, _context):
        made = tvm.IRModule({}, attrs=mod.attrs)
        for wanted, treat in ((True, ours), (False, others)):
            found = {gvar: func for gvar, func in mod.functions_items() if _ours(func) is wanted}
            if found:
                made.update(treat(tvm.IRModule(found, attrs=mod.attrs)))
        return made

    return both


def _pipelines():
    default, host, device = compilation_pipeline.get_tir_pipeline("s_tir")
    plain = tvm.transform.Sequential(
        [
            tirx.transform.LowerTIRx(),
            tvm.s_tir.transform.UnifyThreadBinding(),
            tirx.transform.LowerTIRxOpaque(),
            tirx.transform.FlattenBuffer(),
            tirx.transform.VerifyMemory(),
            tirx.transform.AnnotateEntryFunc(),
            tirx.transform.SplitHostDevice(),
            cuda_transforms.LowerIket(),
            tirx.transform.MakePackedAPI(),
        ]
    )
    return _by_kind(plain, default), host, lambda: _by_kind(tirx.transform.LowerIntrin(), device())


compilation_pipeline.register_tir_pipeline(NAME, _pipelines)
