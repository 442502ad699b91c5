"""x86-64 instruction-set levels.

Facts: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 14; x86-64 psABI micro-architecture levels.
"""

from __future__ import annotations

from dataclasses import replace

from bnntvm.targets.isa import Isa, host_facts, host_flags, vendor_of
from bnntvm.targets.tile_permission import tile_permission

_V2 = frozenset({"ssse3", "sse4_1", "sse4_2", "popcnt"})
_V3 = _V2 | {"avx", "avx2", "bmi1", "bmi2", "fma", "f16c"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

_POPCNT = _V4 | {"avx512_vpopcntdq", "avx512_bitalg", "avx512_vnni", "avx512vbmi"}
_AMX = _POPCNT | {"amx_tile", "amx_int8", "avx512_fp16", "avx_vnni"}

#: Best first. Rates are those of this project's kernels: 512-bit units issue xor, popcount and addition 1.5 times per cycle, vpdpbusd once
#: (Zen 4) or twice (Intel); TDPBSSD takes 16 cycles for 16 x 16 x 64 products, and loads and stores leave a little more than half of that.
LEVELS = (
    Isa("x86-64-v4-amx", "sapphirerapids", 16, 32, "vector", _AMX, products="tiles", bit_macs=330, int8_macs=550),
    Isa("x86-64-v4-vpopcnt", "icelake-server", 16, 32, "vector", _POPCNT, products="vnni", bit_macs=330, int8_macs=64),
    Isa("x86-64-v4", "x86-64-v4", 16, 32, "shuffle", _V4, products="pairs", bit_macs=150, int8_macs=40),
    Isa("x86-64-v3", "x86-64-v3", 8, 16, "shuffle", _V3, products="pairs", bit_macs=130, int8_macs=20),
    Isa("x86-64-v2", "x86-64-v2", 4, 16, "scalar", _V2, products="pairs", bit_macs=60, int8_macs=10),
)


def host_level():
    """The best level that this machine runs; the baseline if it tells nothing."""
    flags = host_flags()
    return next((level for level in LEVELS if level.needs <= flags and permitted(level)), LEVELS[-1])


def permitted(level):
    """Whether the operating system lets this process use the registers of a level that its processor has."""
    return level.products != "tiles" or tile_permission()


#: Processor names that users write as ``mcpu``, by level.
PROCESSORS = {
    "x86-64-v4-amx": ("sapphirerapids", "emeraldrapids", "graniterapids", "graniterapids-d"),
    "x86-64-v4-vpopcnt": ("znver4", "znver5", "icelake-client", "icelake-server", "tigerlake"),
    "x86-64-v4": ("skylake-avx512", "cascadelake", "cooperlake", "cannonlake"),
    "x86-64-v3": ("haswell", "broadwell", "skylake", "znver1", "znver2", "znver3", "alderlake", "core-avx2"),
    "x86-64-v2": ("nehalem", "westmere", "sandybridge", "ivybridge", "x86-64"),
}  # fmt: skip


#: Processor names of LLVM's that are levels in truth.
_LEVEL_NAMES = ("x86-64", "x86-64-v2", "x86-64-v3", "x86-64-v4")


def resolve(target):
    """The level that ``target`` means, or None if it is none of x86's.

    Parameters
    ----------
    target : str or dict
        "x86" or "native" (this machine), a level's name, a processor's name as LLVM writes it, or a TVM target of kind llvm with ``mcpu``.
    """
    if isinstance(target, Isa):
        return target if target.machine == "x86_64" else None
    if isinstance(target, dict):
        if target.get("kind") != "llvm" or not str(target.get("mtriple", "x86_64")).startswith("x86_64"):
            return None
        target = target.get("mcpu", "native")
    if target in ("x86", "native", "llvm"):
        return replace(host_level(), vendor=vendor_of(host_facts().get("model name", "")))
    for level in LEVELS:
        if target == level.name:
            return level
        if target == level.mcpu or target in PROCESSORS[level.name]:
            return replace(level, vendor="AMD" if str(target).startswith("znver") else "Intel" if target not in _LEVEL_NAMES else "")
    return None
