"""What every target says about itself, and what this machine says about its processor."""

from __future__ import annotations

import contextlib
import ctypes
import platform
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
        ``vector`` (vpopcntd/q), ``shuffle`` (vpshufb nibble tables), ``scalar`` (popcnt), ``neon`` (cnt on bytes).
    needs : frozenset of str
        Flags of /proc/cpuinfo that a processor must have to run the code.
    machine : str
        The architecture as ``platform.machine()`` and the ELF header name it: ``x86_64``, ``aarch64``, ``arm``.
    triple : str
        LLVM's target triple, in full: LLVM guesses nothing that is left out, the calling convention neither.
    features : tuple of str
        LLVM's features on top of those of ``mcpu``, such as ``+dotprod``.
    products : str
        How 8-bit integers are multiplied: ``tiles`` (AMX), ``vnni`` (vpdpbusd), ``pairs`` (pmaddubsw, pmaddwd), ``matrix`` (smmla),
        ``dot`` (sdot), ``long`` (smull, smlal); empty where no kernel does.
    bit_macs, int8_macs : int
        Multiply-accumulates per cycle and core of 1 by 1 bit and of 8 by 8 bits, in kernels that are not bound by memory.
    vendor : str
        Maker of the processor where a user named one, such as ``AMD``: default schedules may go by it, and of the records in the package
        only those count that were measured on one of theirs. Empty for a level, which is for all that have it.
    """

    name: str
    mcpu: str
    lanes: int
    registers: int
    popcount: str
    needs: frozenset
    machine: str = "x86_64"
    triple: str = "x86_64-linux-gnu"
    features: tuple = ()
    products: str = ""
    bit_macs: int = 64
    int8_macs: int = 0
    vendor: str = ""


#: Names, as in /proc/cpuinfo, of the bits of AT_HWCAP and AT_HWCAP2 from bit 0 on (Linux, arch/arm64/include/uapi/asm/hwcap.h).
_HWCAP = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 sm4 asimddp sha512 sve "
    "asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg",
    "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16 dgh rng bti mte",
)


def vendor_of(processor):
    """Maker of a processor, from its name in /proc/cpuinfo; empty for one that is none of x86's two."""
    return next((name for name in ("AMD", "Intel") if processor.startswith(name)), "")


def host_flags():
    """Flags of this machine's processor, as /proc/cpuinfo names them ("flags" on x86, "Features" on ARM).

    On 64-bit ARM the kernel is asked directly: under user-mode emulation /proc/cpuinfo is that of the machine below.
    """
    if platform.machine() == "aarch64" and platform.system() == "Linux":
        return _hardware_capabilities()
    facts = host_facts()
    return frozenset(facts.get("flags", facts.get("Features", "")).split())


def host_facts():
    """What /proc/cpuinfo says of this machine's first processor; empty where there is none."""
    facts = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        for line in file:
            name, separator, value = line.partition(":")
            if separator:
                facts.setdefault(name.strip(), value.strip())
    return facts


def _hardware_capabilities():
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
    words = [getauxval(number) for number in (16, 26)]  # AT_HWCAP, AT_HWCAP2
    return frozenset(name for names, word in zip(_HWCAP, words) for bit, name in enumerate(names.split()) if word >> bit & 1)
