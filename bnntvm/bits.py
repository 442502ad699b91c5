"""What a bit means, in numpy: packing and unpacking of planes.

Channel c of a plane is bit c % 32 of word c // 32 of the last axis (bit c % 8 of byte c // 8 on a little-endian machine); tail bits are 0.
Bipolar planes: bit 1 <-> -1, bit 0 <-> +1. Unipolar planes: the bit is the value.
"""

import numpy as np

WORD_BITS = 32


def dense_groups(channels, groups):
    """Whether the words of a grouped convolution's data are packed without regard to groups: several groups share a word then."""
    size = channels // groups
    return groups > 1 and size < WORD_BITS and WORD_BITS % size == 0


def pack_bits(plane):
    """bool [..., C] -> uint32 [..., ceil(C / 32)]."""
    plane = np.asarray(plane, bool)
    tail = -plane.shape[-1] % WORD_BITS
    plane = np.concatenate([plane, np.zeros((*plane.shape[:-1], tail), bool)], -1)
    return np.ascontiguousarray(np.packbits(plane, axis=-1, bitorder="little")).view("<u4")


def unpack_bits(words, channels):
    """uint32 [..., W] -> bool [..., channels]."""
    octets = np.ascontiguousarray(words, "<u4").view(np.uint8)
    return np.unpackbits(octets, axis=-1, bitorder="little")[..., :channels].astype(bool)
