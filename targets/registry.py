"""All targets, and how the name that a user writes finds one."""

from __future__ import annotations

from bnntvm.targets import aarch64, armv7, cuda, x86
from bnntvm.targets.isa import Isa

ARCHITECTURES = (aarch64, armv7, cuda, x86)


def resolve(target):
    """The instruction-set level that ``target`` means, or None."""
    if not isinstance(target, (str, dict, Isa)):
        return None
    return next((isa for isa in (one.resolve(target) for one in ARCHITECTURES) if isa is not None), None)


def names():
    """What a user may write, processors' names aside."""
    return [level.name for one in (x86, aarch64, armv7, cuda) for level in one.LEVELS]
