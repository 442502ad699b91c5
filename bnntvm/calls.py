"""What a network calls, in order: which kernel, for which layer, on how many bytes. A profile matches its times with it."""

from __future__ import annotations

import numpy as np
from tvm import relax

from bnntvm.graph import bindings, dims, layer_of, op_name
from bnntvm.spec import WORKSPACE


def kernel_calls(mod):
    """The calls of kernels in ``main``, in the order in which a virtual machine makes them.

    Parameters
    ----------
    mod : tvm.IRModule
        Legalised: kernels are called by ``call_tir``; with ``main_1`` where there is one dynamic dimension.

    Returns
    -------
    list of dict
        ``kernel``; ``own``, whether it is of one of our families, and not TVM's; ``layer``, the name of the first output of the ONNX node
        that it computes, or None; ``bytes`` and ``bytes_per_image``: what it reads and writes, each tensor once, is the first plus the
        second times the batch.
    """
    names = [gvar.name_hint for gvar in mod.get_global_vars()]
    every, single = (_calls(mod[name]) for name in ("main", "main_1" if "main_1" in names else "main"))
    own, private = (
        {gvar.name_hint for gvar, func in mod.functions_items() if name in (func.attrs or {})} for name in ("bnn.kernel", WORKSPACE)
    )
    calls = [_call(binding, one, private) for binding, one in zip(every, single, strict=True)]
    return [call | {"own": call["kernel"] in own} for call in calls]


def _calls(func):
    return [binding for binding in bindings(func) if op_name(binding.value) == "relax.call_tir"]


def _call(binding, one, private):
    sizes = [0, 0]  # of tensors that are the same for every batch, and for one image
    end = -1 if binding.value.args[0].name_hint in private else None  # a workspace is no tensor of the network
    for general, tensor in zip(_tensors(binding)[:end], _tensors(one)[:end], strict=True):
        shape = dims(tensor)
        dynamic = not all(isinstance(d, int) for d in dims(general))
        if all(isinstance(d, int) for d in shape):  # several dynamic dimensions: unknown
            sizes[dynamic] += int(np.prod(shape, dtype=np.int64)) * np.dtype(str(tensor.dtype)).itemsize
    layer = layer_of(binding.var)
    return {"kernel": binding.value.args[0].name_hint, "layer": layer, "bytes": sizes[0], "bytes_per_image": sizes[1]}


def _tensors(binding):
    """Types of the tensors among the operands and of the results of a call; sizes are operands too."""
    result = binding.value.ty
    operands = [field.ty for field in binding.value.args[1].fields if isinstance(field.ty, relax.TensorType)]
    return [*operands, *([result] if isinstance(result, relax.TensorType) else result.fields)]
