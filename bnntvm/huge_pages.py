"""Large pages for weights and workspaces (Linux).

A run reads megabytes of weights and images once, page after page, and on a virtual machine every 4 kB page that has dropped out of the
translation cache costs a walk through two tables. In pages of 2 MB there is next to nothing to look up.

The kernel gives large pages where a program asks for them: ``MADV_COLLAPSE`` (Linux 6.1) moves what lies in 2 MB of memory into one page,
at once and without a lasting setting; see ``madvise(2)``. That takes whole 2 MB of one mapping. The C library maps blocks of some hundred
kilobytes one by one, and pages of different mappings cannot be joined; :func:`gather` has it take them from its heap.

Everything here is an attempt: where it fails, networks run as they do on small pages. ``BNNTVM_HUGE_PAGES=0`` leaves it out.
"""

import ctypes
import errno
import functools
import os
import sys

#: Bytes of a large page, of x86-64 and of 64-bit ARM with pages of 4 kB.
SIZE = 1 << 21
_PAGE = 1 << 12
_PAGES = SIZE // _PAGE
_MADV_COLLAPSE = 25
_TRIES = 4
#: The largest block whose release moves glibc's limit between heap and mappings: DEFAULT_MMAP_THRESHOLD_MAX, less what malloc adds.
_LARGEST = (1 << 25) - (1 << 16)
#: Mappings above this size are not looked at: they hold somebody else's data, and a look takes a millisecond for every 100 MB.
_MOST = 1 << 30


def wanted():
    """Whether this process can ask for large pages and is meant to."""
    return os.environ.get("BNNTVM_HUGE_PAGES", "1") != "0" and _libc() is not None


@functools.cache
def _libc():
    """The C library, if it is glibc on a 64-bit Linux with pages of 4 kB."""
    if sys.platform != "linux" or sys.maxsize < 1 << 32 or os.sysconf("SC_PAGESIZE") != _PAGE:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "gnu_get_libc_version"):
        return None
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.madvise.argtypes, libc.madvise.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return libc


def gather():
    """Have the C library put blocks of up to 32 MB on its heap, side by side, from now on.

    glibc raises that limit by itself when a mapped block is given back, to the size of the block (``mallopt(3)``, M_MMAP_THRESHOLD).
    Who has set the limit keeps it.
    """
    if wanted():
        _libc().free(_libc().malloc(_LARGEST))  # never touched


def trim():
    """Have the C library give back what is free on its heap, such as the file's contents that weights were read from."""
    if wanted():
        _libc().malloc_trim(0)


class Watch:
    """The memory that a process comes to use from the making of this object on."""

    def __init__(self):
        self.before = _used() if wanted() else None

    def collapse(self):
        """Move into large pages what came into use since.

        Returns
        -------
        int
            Large pages that there are now.
        """
        if self.before is None:
            return 0
        found = [start for start, pages in _used().items() if pages - self.before.get(start, 0) > _PAGES // 4]
        return sum(_collapsed(start) for start in found)


def _collapsed(start):
    """Whether 2 MB lie in a large page now. The kernel may be busy with some of them (EAGAIN), for a moment."""
    for _ in range(_TRIES):
        if _libc().madvise(start, SIZE, _MADV_COLLAPSE) == 0:
            return True
        if ctypes.get_errno() != errno.EAGAIN:
            return False
    return False


def _used():
    """Start of every 2 MB that lie in one private mapping -> how many of its small pages have memory behind them.

    A page's entry in ``/proc/self/pagemap`` is 8 bytes, bit 63 says that it is there: ``proc(5)``.
    """
    found = {}
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            for low, high in _private():
                first = -(-low // SIZE) * SIZE
                pagemap.seek(first // _PAGE * 8)
                for start in range(first, high - SIZE + 1, SIZE):
                    entries = pagemap.read(_PAGES * 8)
                    found[start] = sum(byte >> 7 for byte in entries[7::8])
    except OSError:
        return {}
    return found


def _private():
    """``(start, end)`` of the process's anonymous memory that it may write."""
    with open("/proc/self/maps") as lines:
        for line in lines:
            fields = line.split(None, 5)
            low, high = (int(end, 16) for end in fields[0].split("-"))
            if fields[1] == "rw-p" and (len(fields) == 5 or fields[5].strip() == "[heap]") and SIZE <= high - low <= _MOST:
                yield low, high
