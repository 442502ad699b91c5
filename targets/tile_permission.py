"""The operating system's leave to use the tile registers of AMX.

Linux gives a thread's 8 kB of tile data only to processes that have asked for them, once, before the first tile instruction
(https://docs.kernel.org/arch/x86/xstate.html). Threads share the permission and a fork inherits it.
"""

import ctypes
import functools
import platform

_ARCH_PRCTL, _REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18  # x86-64's system call, its operation, the state component


@functools.cache
def tile_permission():
    """Ask for the tile registers; whether this process may use them. Cheap after the first call."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.argtypes, syscall.restype = [ctypes.c_long] * 3, ctypes.c_long
    return syscall(_ARCH_PRCTL, _REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0
