"""32-bit ARM with NEON (ARMv7-A, hard-float).

Facts: ARM Architecture Reference Manual, ARMv7-A and ARMv7-R edition, chapter A8 (vcnt, veor, vpadal, vpadd). NEON has 16 registers of 128
bits here, its float32 arithmetic flushes subnormal numbers to zero, and it has no division, square root or rounding: those are scalar.
"""

from __future__ import annotations

import platform
from dataclasses import replace

from bnntvm.targets.isa import Isa

#: Any processor with NEON, VFPv4 and division (Cortex-A7, A12, A15, A17; ARMv8 processors in 32-bit mode), code ordered for a Cortex-A15.
LEVELS = (
    Isa(
        "armv7",
        "cortex-a15",
        4,
        16,
        "neon",
        frozenset({"neon", "vfpv4", "idiva"}),
        "arm",
        "armv7a-unknown-linux-gnueabihf",
        # LLVM orders vector code for these processors without counting registers otherwise, and spills.
        ("+neon", "+vfp4", "+use-misched"),
        products="long",
        bit_macs=60,
        int8_macs=5,
    ),
)
PROCESSORS = ("cortex-a7", "cortex-a15", "cortex-a17")


def resolve(target):
    """The level that ``target`` means, or None if it is none of this architecture's.

    Parameters
    ----------
    target : str or dict
        "armv7", a processor's name, or a TVM target of kind llvm with ``mtriple`` armv7....
    """
    level = LEVELS[0]
    if isinstance(target, Isa):
        return target if target.machine == "arm" else None
    if isinstance(target, dict):
        if target.get("kind") != "llvm" or not str(target.get("mtriple", "")).startswith("armv7"):
            return None
        target = target.get("mcpu", "armv7")
        target = "armv7" if target == "generic" else target
    if target in PROCESSORS:
        return replace(level, name=target, mcpu=target)
    return level if target in ("armv7", "armv7l") or target == "native" and platform.machine() == "armv7l" else None
