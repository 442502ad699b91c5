"""NVIDIA GPUs: what each compute capability can do with bits.

Facts, by the document that they come from:

* CUDA C++ Programming Guide, "Compute Capabilities", tables of technical specifications and of arithmetic throughput: shared memory and
  registers, threads of a multiprocessor, population counts per cycle (16 on every row below).
* PTX ISA, "mma" and "wgmma.mma_async", target notes: ``mma.m8n8k128`` on one bit with ``.xor.popc`` from sm_75, ``m16n8k128`` and
  ``m16n8k256`` with ``.xor.popc`` or ``.and.popc`` from sm_80, ``wgmma.m64nNk256`` with ``.and.popc`` on sm_90a; ``cp.async`` from sm_80,
  ``cp.async.bulk.tensor`` from sm_90.
* PTX ISA, "mma", target notes: ``mma.m16n8k8`` on ``.tf32`` from sm_80 on, on every later architecture too.
* White papers, peak rates of TF32 without sparsity and of FP32, in TFLOPS: A100 156 and 19.5; H100 SXM 494.7 and 66.9; GeForce RTX 3090
  35.6 and 35.6 (GA102); GeForce RTX 4090 82.6 and 82.6 (AD102). On sm_90 ``mma`` reaches about 0.6 of what ``wgmma`` does: taken from
  published microbenchmarks, not measured here.
* CUDA C++ Programming Guide, "Thread Block Clusters": eight blocks are portable, from compute capability 9.0 on.
* CUDA C++ Programming Guide, "Sub-byte Operations": the tensor cores have no xor from compute capability 9.0 on.

What is newer than the last row has no row of its own: it is taken to have no tensor cores for bits until that was measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from dataclasses import dataclass, replace

from bnntvm.targets.isa import Isa


@dataclass(frozen=True)
class CudaIsa(Isa):
    """A compute capability.

    Attributes
    ----------
    lanes : int
        Threads of a warp.
    registers : int
        32-bit registers that a thread may have.
    mcpu : str
        What nvcc and TVM call ``arch``: ``sm_80``, ``sm_90a``.
    mma : tuple of int
        Rows, columns and bits of the one-bit ``mma`` that kernels use; empty where there is none.
    operation : str
        What it counts: ``xor`` or ``and``; empty where there is none.
    wgmma : bool
        Whether warpgroups multiply bits in shared memory: ``wgmma.m64nNk256``, ``and``.
    async_copy, tensor_copy : bool
        ``cp.async``; ``cp.async.bulk.tensor``.
    block_shared_bytes, shared_bytes : int
        Shared memory that one block may have, and that a multiprocessor has.
    threads : int
        Threads that a multiprocessor holds.
    multiprocessors : int
        Of the usual device with it; blocks that stay are as many.
    cluster : int
        Most blocks of a cluster, which reach each other's shared memory, on every device; 1: there are no clusters.
    popcounts : int
        32-bit population counts of a multiprocessor per cycle.
    tf32 : bool
        Whether ``mma`` multiplies tf32.
    tf32_rate : float
        How many of these products ``mma`` makes in the time of one on CUDA cores; 0: not known.
    """

    mma: tuple[int, ...] = ()
    operation: str = ""
    wgmma: bool = False
    async_copy: bool = True
    tensor_copy: bool = False
    block_shared_bytes: int = 48 << 10
    shared_bytes: int = 64 << 10
    threads: int = 1024
    multiprocessors: int = 108
    cluster: int = 1
    popcounts: int = 16
    tf32: bool = True
    tf32_rate: float = 0.0


def _level(arch, block_shared, shared, threads, mma=(), operation="", **more):
    return CudaIsa(
        arch, arch, 32, 255, "cuda", frozenset(), "cuda", "nvptx64-nvidia-cuda", mma=mma, operation=operation,
        block_shared_bytes=block_shared << 10, shared_bytes=shared << 10, threads=threads, bit_macs=16 * 32, **more,
    )  # fmt: skip


#: Best first.
LEVELS = (
    _level("sm_90a", 227, 228, 2048, (16, 8, 256), "and", wgmma=True, tensor_copy=True, multiprocessors=132, cluster=8, tf32_rate=4.5),
    _level("sm_90", 227, 228, 2048, (16, 8, 256), "and", tensor_copy=True, multiprocessors=132, cluster=8, tf32_rate=4.5),
    _level("sm_89", 99, 100, 1536, (16, 8, 256), "and", tf32_rate=1.0),
    _level("sm_87", 163, 164, 1536, (16, 8, 256), "and"),
    _level("sm_86", 99, 100, 1536, (16, 8, 256), "and", tf32_rate=1.0),
    _level("sm_80", 163, 164, 2048, (16, 8, 256), "and", tf32_rate=8.0),
    _level("sm_75", 64, 64, 1024, (8, 8, 128), "xor", async_copy=False, tf32=False),
)

#: Where no device is at hand: its machine code runs on 8.0, 8.6, 8.7 and 8.9, its PTX on everything newer.
DEFAULT = "sm_80"


def newer(arch):
    """The row of a compute capability above the last one: CUDA cores only, with what every capability since 8.6 has at least."""
    return replace(level("sm_86"), name=arch, mcpu=arch, mma=(), operation="", tf32_rate=0.0)


def level(name):
    """The row ``name``, None if there is none."""
    return next((one for one in LEVELS if one.name == name), None)


@functools.lru_cache(maxsize=1)
def device_arch():
    """``sm_90a`` for the first device of this machine, as its driver says; None if there is no driver or no device."""
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        device, numbers = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
        if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
            return None
        for number, attribute in zip(numbers, (75, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
                return None
        major, minor = (number.value for number in numbers)
        return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"
    return None


def resolve(target):
    """The row that ``target`` means, or None if it is no CUDA target.

    Parameters
    ----------
    target : str or dict
        "cuda" (the first device of this machine, else ``DEFAULT``), an architecture such as "sm_80", or a TVM target of kind cuda with
        ``arch``.
    """
    if isinstance(target, Isa):
        return target if target.machine == "cuda" else None
    if isinstance(target, dict):
        if target.get("kind") != "cuda":
            return None
        target = target.get("arch", "cuda")
    if target == "cuda":
        target = device_arch() or DEFAULT
    return level(target) or _unlisted(target)


def _unlisted(target):
    """The row of an architecture that has none of its own; whether there is such a one, its compiler knows. Behind 9.0 came 10.0."""
    found = re.fullmatch(r"sm_(\d{2,3})([af]?)", target)
    number = int(found[1]) if found else 0
    if number >= 100:
        return newer(target)
    below = [one for one in LEVELS if not one.wgmma and int(one.name[3:]) <= number <= 90]
    return replace(below[0], name=target, mcpu=target) if below and not found[2] else None
