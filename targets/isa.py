"""What every target says about itself, and what this machine says about its processor."""

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
        How 8-bit integers are multiplied: ``tiles`` (AMX), ``vnni`` (vpdpbusd), ``pairs`` (pmaddubsw, pmaddwd), ``dot`` (sdot),
        ``long`` (smull, smlal); empty where no kernel does.
    bit_macs, int8_macs : int
        Multiply-accumulates per cycle and core of 1 by 1 bit and of 8 by 8 bits, in kernels that are not bound by memory.
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


def host_flags():
    """Flags of this machine's processor, as /proc/cpuinfo names them ("flags" on x86, "Features" on ARM)."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()
