"""Where a candidate runs: memory that shows what it writes beside its outputs, and caches as its network would leave them.

A kernel that runs again and again finds its weights in the level-1 cache; in a network, other kernels have run in between. Timed hot,
tiles that read weights many times look better than they are. So between two timed runs the ballast is read, which evicts everything from
the caches (the last one, too: other cores share it, and a run of a network is long enough for them to fill it), and then the activations
are touched, which the kernels before have just written (or, as workspace, used).

Every tensor lies between guard bytes. All functions here are TVM global functions, too, so that a tuner can call them on a board
(:mod:`bnntvm.remote.server` imports this file, nothing of the compiler). What they know belongs to their process, and that ends with the
candidate.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
import zlib

import numpy as np
import tvm_ffi

#: Bytes on either side of a tensor, and their pattern. Whole cache lines.
GUARD_BYTES, PATTERN = 4096, 0xA5
#: Bytes of ballast, at least and at most: more than a level-2 cache (2 MiB on Xeons, 1 MiB on Zen), and what is read in two milliseconds.
LEAST_BALLAST, MOST_BALLAST = 3 << 20, 48 << 20
_ALIGNMENT = 64

_placed: dict[int, _Place] = {}
_ballast = np.zeros(0, np.uint64)


class _Place:
    """A tensor and the guards around it. ``role``: ``constant`` (weights, parameters), ``input`` (an activation) or ``output``."""

    def __init__(self, shape, dtype, role):
        dtype = np.dtype(dtype)
        size = dtype.itemsize * math.prod(shape)
        end = GUARD_BYTES + -(-size // _ALIGNMENT) * _ALIGNMENT
        memory = np.full(end + GUARD_BYTES + _ALIGNMENT, PATTERN, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        self.before = memory[start : start + GUARD_BYTES]
        self.bytes = memory[start + GUARD_BYTES : start + GUARD_BYTES + size]
        self.behind = memory[start + GUARD_BYTES + size : start + end + GUARD_BYTES]
        self.values, self.role, self.sum = self.bytes.view(dtype).reshape(shape), role, 0

    def fault(self):
        """What was written where nothing should be; empty if nothing was."""
        for name, guard in (("before", self.before), ("behind", self.behind)):
            written = int((guard != PATTERN).sum())
            if written:
                return f"{written} bytes {name} an {self.role} are overwritten"
        return f"an {self.role} is overwritten" if self.role != "output" and zlib.crc32(self.bytes) != self.sum else ""


@tvm_ffi.register_global_func("bnntvm.tuning.place")
def place(role, dtype, *shape):
    """Memory between guards.

    Parameters
    ----------
    role : str
        ``constant``, ``input`` or ``output``.
    dtype : str
    *shape : int

    Returns
    -------
    Tensor
    """
    made = _Place(tuple(map(int, shape)), str(dtype), str(role))
    _placed[made.values.ctypes.data] = made
    return tvm_ffi.from_dlpack(made.values)


@tvm_ffi.register_global_func("bnntvm.tuning.seal")
def seal():
    """All tensors are filled: what is neither an output nor filled again before the next seal must not change any more."""
    for one in _placed.values():
        one.sum = zlib.crc32(one.bytes)


@tvm_ffi.register_global_func("bnntvm.tuning.fault")
def fault():
    """What candidates have written where they should not; empty if nothing."""
    return next((text for text in (one.fault() for one in _placed.values()) if text), "")


def last_level_bytes():
    """Size of the largest cache of this machine's first processor; 0 where it is not told."""
    sizes = [0]
    for path in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            text = path.read_text().strip()
            sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes)


@tvm_ffi.register_global_func("bnntvm.tuning.between")
def between(*tensors):
    """Leave the caches as other kernels would: called before every timed run with the arguments of the kernel."""
    global _ballast
    if not len(_ballast):
        _ballast = np.ones(min(max(LEAST_BALLAST, last_level_bytes()), MOST_BALLAST) // 8, np.uint64)
    _ballast.sum()
    for tensor in reversed(tensors):  # inputs, which come first, were written last
        one = _placed.get(tensor.data_ptr())
        if one is not None and one.role != "constant":
            whole = one.bytes[: one.bytes.size // 8 * 8].view(np.uint64)
            np.bitwise_or(whole, 0, out=whole)
