"""Unipolar data, and padding with +1, in the kernel for bipolar data.

With a in {0, 1} and w in {-1, +1} (bit 1 <-> -1) the sum of a * w is popc(a ^ w) - popc(w): a word with a = 1 adds 1 where w has no bit
set and -1 where it has, one with a = 0 adds nothing. So the inner loop is that of bipolar data, carry-save adder included, and what is
left is popc(w) over the taps inside the image. It depends on the channel, the row and the kind of column: it is counted once for each
block of channels and task, which costs as much as one pixel, and summed up once for each row and kind of column.

Bipolar data that are padded with +1 need the same over the taps outside the image: each of them adds C - 2 popc(w).
"""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import tir as T
from bnntvm.schedules.binary_conv2d_adders import memory, popcount
from bnntvm.spec import WORD_BITS

BLOCK = WORD_BITS


class WeightCounts:
    """Minus the number of set weight bits of the 32 channels of a block, for taps and for sums of taps.

    Parameters
    ----------
    kernel : binary_conv2d_kernel.Kernel
    encoded : bool
        Whether the weights are those of the carry-save adder.
    """

    def __init__(self, kernel, encoded):
        self.kernel, self.encoded = kernel, encoded
        self.height, self.width = kernel.geometry.kernel
        intervals = {interval for pattern in kernel.plan.patterns for interval in pattern}
        self.slots = {interval: self.height * self.width + i for i, interval in enumerate(sorted(intervals))}
        self.point_slot = self.height * self.width + len(self.slots)
        self.total_slot = self.point_slot + 1
        self.array, self.allocation = memory("weight_counts", (self.total_slot + 1) * BLOCK, "int32")

    def count(self, block):
        """Statements that count the bits of every tap."""
        k = self.kernel
        counts, allocation = T.local("count", k.step, "int32")
        tap_words = k.geometry.group_words

        def tap(part, number):
            base = part * (k.kernel_words * k.step) + number * (tap_words * k.step)
            lanes = range(0, k.step, k.lanes)
            target = number * BLOCK + part * k.step
            return [
                [T.store_vector(counts, [lane], T.splat(0, "int32", k.lanes)) for lane in lanes],
                self._tap(lambda c, lane: T.load_vector(k.weights, [block, base + c * k.step + lane], k.lanes), counts),
                [T.store_vector(self.array, [target + lane], T.load_vector(counts, [lane], k.lanes)) for lane in lanes],
            ]

        taps = T.for_("part", k.parts, lambda part: T.for_("tap", self.height * self.width, lambda number: tap(part, number)))
        return [allocation, taps]

    def _tap(self, weights, counts):
        k = self.kernel

        def take(lane, word):
            count = tirx.Cast(T.vector_type("int32", k.lanes), popcount(word))
            return T.store_vector(counts, [lane], T.load_vector(counts, [lane], k.lanes) - count)

        def pair(c):
            first = [weights(2 * c, lane) for lane in range(0, k.step, k.lanes)]
            second = [weights(2 * c + 1, lane) for lane in range(0, k.step, k.lanes)]
            return [[take(i * k.lanes, a), take(i * k.lanes, a ^ b)] for i, (a, b) in enumerate(zip(first, second))]

        def single(c):
            return [take(lane, weights(c, lane)) for lane in range(0, k.step, k.lanes)]

        words = k.geometry.group_words
        if not self.encoded:
            return T.for_("c", words, single)
        return [T.for_("c", words // 2, pair), single(words - 1) if words % 2 else []]

    def row(self, first_row, last_row):
        """Statements that sum up taps ``first_row`` <= r < ``last_row`` for every kind of pixel that tiles have."""
        return [self._sum(slot, first_row, last_row, *interval) for interval, slot in self.slots.items()]

    def total(self):
        """Statements that sum up all taps, for :meth:`skipped`."""
        return self._sum(self.total_slot, 0, self.height, 0, self.width)

    def skipped(self, interval, lane):
        """Minus the bits of the taps outside the image for a pixel with the columns ``interval``, for the lanes from ``lane`` on."""
        return T.load_vector(self.array, [self.total_slot * BLOCK + lane], self.kernel.lanes) - self.load(interval, lane)

    def point(self, first_row, last_row, first, last):
        """The same for a pixel whose columns are known at run time only."""
        return self._sum(self.point_slot, first_row, last_row, first, last)

    def _sum(self, slot, first_row, last_row, first, last):
        lanes = range(0, BLOCK, self.kernel.lanes)
        size = self.kernel.lanes
        counts, allocation = T.local("sum", BLOCK, "int32")

        def add(r, s):
            tap = ((first_row + r) * self.width + first + s) * BLOCK
            return [
                T.store_vector(counts, [lane], T.load_vector(counts, [lane], size) + T.load_vector(self.array, [tap + lane], size))
                for lane in lanes
            ]

        return [
            allocation,
            [T.store_vector(counts, [lane], T.splat(0, "int32", size)) for lane in lanes],
            T.for_("r", last_row - first_row, lambda r: T.for_("s", last - first, lambda s: add(r, s))),
            [T.store_vector(self.array, [slot * BLOCK + lane], T.load_vector(counts, [lane], size)) for lane in lanes],
        ]

    def load(self, interval, lane):
        """The sum for a pixel with the columns ``interval``, for the lanes from ``lane`` on."""
        return T.load_vector(self.array, [self.slots.get(interval, self.point_slot) * BLOCK + lane], self.kernel.lanes)
