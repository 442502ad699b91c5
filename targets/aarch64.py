"""64-bit ARM with NEON.

Facts: Arm Architecture Reference Manual for A-profile, chapter C7 (cnt, eor, uadalp, addp), and the software optimisation guides of the
processors named below. Advanced SIMD is part of every ARMv8-A processor that runs Linux; only the 8-bit dot products are optional.
"""

from __future__ import annotations

import platform
from dataclasses import replace

from bnntvm.targets.isa import Isa, host_flags

_TRIPLE = "aarch64-unknown-linux-gnu"
_BASE = frozenset({"asimd"})
_DOT = _BASE | {"asimddp"}
_I8MM = _DOT | {"i8mm"}


def _level(name, needs, *features):
    products, int8_macs = ("matrix", 45) if "i8mm" in needs else ("dot", 28) if "asimddp" in needs else ("long", 8)
    # LLVM orders code for an in-order processor if it is told nothing, and spills what it hoists.
    return Isa(
        name, "cortex-a72", 4, 32, "neon", needs, "aarch64", _TRIPLE, ("+neon", *features),
        products=products, bit_macs=85, int8_macs=int8_macs,
    )  # fmt: skip


#: Best first. Rates are those of two 128-bit units: eor, cnt and add for 128 bits; smmla; sdot; smlal twice and half a sadalp for 16
#: bytes, where a Cortex-A72 has one unit that multiplies.
LEVELS = (
    _level("aarch64-i8mm", _I8MM, "+dotprod", "+i8mm"),
    _level("aarch64-dotprod", _DOT, "+dotprod"),
    _level("aarch64", _BASE),
)

_V82 = {"atomics", "asimdrdm", "fphp", "asimdhp"}
#: Processors whose instruction order LLVM knows: name -> (level, flags of the instructions that LLVM may use beyond the level's). What a
#: maker leaves out (the crypto extension on the Raspberry Pi 4) is not among them: no code is made of it.
PROCESSORS = {
    "cortex-a53": ("aarch64", frozenset()),
    "cortex-a57": ("aarch64", frozenset()),
    "cortex-a72": ("aarch64", frozenset()),
    "cortex-a73": ("aarch64", frozenset()),
    "cortex-a55": ("aarch64-dotprod", frozenset(_V82)),
    "cortex-a76": ("aarch64-dotprod", frozenset(_V82)),
    "cortex-a78": ("aarch64-dotprod", frozenset(_V82)),
    "neoverse-n1": ("aarch64-dotprod", frozenset(_V82)),
    "apple-m1": ("aarch64-dotprod", frozenset(_V82 | {"sha3", "asimdfhm", "flagm", "jscvt", "fcma"})),
}


def _processor(name):
    level, more = PROCESSORS[name]
    base = next(one for one in LEVELS if one.name == level)
    # The processor's name brings its features, dot products among them.
    return replace(base, name=name, mcpu=name, needs=base.needs | more, features=("+neon",))


def host_level():
    """The best level that this machine runs; the baseline if it tells nothing."""
    flags = host_flags()
    return next((level for level in LEVELS if level.needs <= flags), LEVELS[-1])


def resolve(target):
    """The level that ``target`` means, or None if it is none of this architecture's.

    Parameters
    ----------
    target : str or dict
        "aarch64" or "arm64" (any 64-bit ARM processor), another level's name, a processor's name, "native" on such a machine, or a TVM
        target of kind llvm with ``mtriple`` aarch64-... and perhaps ``mcpu``.
    """
    if isinstance(target, Isa):
        return target if target.machine == "aarch64" else None
    if isinstance(target, dict):
        triple = str(target.get("mtriple", ""))
        if target.get("kind") != "llvm" or not triple.startswith(("aarch64", "arm64")) or "linux" not in triple:
            return None
        target = target.get("mcpu", "aarch64")
        target = "aarch64" if target == "generic" else target
    if target == "native" and platform.machine() in ("aarch64", "arm64"):
        return host_level()
    if target in PROCESSORS:
        return _processor(target)
    return next((level for level in LEVELS if target == level.name or target == "arm64" and level.name == "aarch64"), None)
