"""x86-64 instruction-set levels.

Facts: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 14; x86-64 psABI micro-architecture levels.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Isa:
    """One instruction-set level.

    Attributes
    ----------
    name : str
        What a user writes as target.
    mcpu : str
        LLVM's processor name.
    lanes : int
        32-bit lanes of a vector register.
    registers : int
        Vector registers.
    popcount : str
        ``vector`` (vpopcntd/q), ``shuffle`` (vpshufb nibble tables), ``scalar`` (popcnt).
    needs : frozenset of str
        Flags of /proc/cpuinfo that a processor must have to run the code.
    """

    name: str
    mcpu: str
    lanes: int
    registers: int
    popcount: str
    needs: frozenset


_V2 = frozenset({"ssse3", "sse4_1", "sse4_2", "popcnt"})
_V3 = _V2 | {"avx", "avx2", "bmi1", "bmi2", "fma", "f16c"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

#: Best first.
LEVELS = (
    Isa("x86-64-v4-vpopcnt", "icelake-server", 16, 32, "vector", _V4 | {"avx512_vpopcntdq", "avx512_bitalg"}),
    Isa("x86-64-v4", "x86-64-v4", 16, 32, "shuffle", _V4),
    Isa("x86-64-v3", "x86-64-v3", 8, 16, "shuffle", _V3),
    Isa("x86-64-v2", "x86-64-v2", 4, 16, "scalar", _V2),
)
