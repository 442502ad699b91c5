"""Who may touch a word: races, found for :mod:`.emulate`.

In shared memory by vector clocks: every thread has a clock, and has *seen* other threads up to some time of theirs: what they did before
the last barrier that both took part in. An access of another thread that this one has not seen yet may happen at the same time; if one of
the two writes, that is a race.

In the device's memory nothing orders the blocks of a launch: what one writes no other may touch before the next launch, unless both write
the same.
"""

from __future__ import annotations

import numpy as np

_SLOT = 128  # threads of which the last reader of a word is remembered


class Trace:
    """The last accesses of every word of a memory [rows, size]."""

    def __init__(self, shape, per_block):
        slots = -(-per_block // _SLOT)
        self.writer, self.written = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
        self.reader, self.read = np.full((*shape, slots), -1, np.int32), np.zeros((*shape, slots), np.int32)
        self.elsewhere = np.full(shape, -1, np.int32)  # meeting of the cluster behind which a thread of another block has read it last


class Launch:
    """Which blocks have touched the elements of an array of the device's memory in one launch."""

    _NOBODY, _SEVERAL = -1, -2

    def __init__(self, size):
        self.writer, self.reader = (np.full(size, self._NOBODY, np.int64) for _ in range(2))

    def reads(self, blocks, index):
        """Note reads of ``blocks``; the block that each races with, -1 for none."""
        writer, reader = self.writer[index], self.reader[index]
        new = (reader == self._NOBODY) | (reader == blocks)
        self.reader[index] = np.where(new, blocks, self._SEVERAL)
        new &= self.reader[index] == blocks  # two of these at once
        self.reader[index[~new]] = self._SEVERAL
        return np.where(writer != blocks, writer, self._NOBODY)

    def writes(self, blocks, index, before, after):
        """Note writes of values ``after``, where values ``before`` are; as :meth:`reads`."""
        writer, reader = self.writer[index], self.reader[index]
        other = np.where((writer != blocks) & (before != after), writer, self._NOBODY)
        other = np.where((reader != blocks) & (reader != self._NOBODY), np.maximum(reader, 0), other)
        self.writer[index] = blocks
        return other


class Clocks:
    """Clocks of the threads of some blocks."""

    def __init__(self, blocks, per_block):
        self.now = np.ones((blocks, per_block), np.int32)
        self.seen = np.zeros((blocks, per_block, per_block), np.int32)
        self.meetings = np.zeros(blocks, np.int32)  # of all threads of the cluster
        self.met = np.zeros((blocks, per_block), np.int32)  # each thread's time at the last one

    def block_barrier(self, rows):
        """All threads of blocks have waited for each other."""
        self.seen[rows] = self.now[rows][:, None, :]
        self.now[rows] += 1

    def cluster_barrier(self, rows):
        """All threads of all blocks of clusters have waited for each other."""
        self.met[rows] = self.now[rows]
        self.meetings[rows] += 1
        self.block_barrier(rows)

    def reads_elsewhere(self, trace, rows, index):
        """Note reads of the memory of other blocks, ``rows``; the thread there that each races with, -1 for none."""
        writer = trace.writer[rows, index]
        bad = (writer >= 0) & (trace.written[rows, index] > self.met[rows, np.maximum(writer, 0)])
        trace.elsewhere[rows, index] = self.meetings[rows]
        return np.where(bad, writer, -1)

    def left_open(self, trace):
        """Rows of blocks whose memory others have read since the last time that the cluster met: they must not end."""
        return np.flatnonzero((trace.elsewhere == self.meetings[:, None]).any(1))

    def release(self, row, threads):
        """What a barrier learns from threads that arrive: [threads of the block]."""
        known = self.seen[row, threads].max(0)
        known[threads] = np.maximum(known[threads], self.now[row, threads])
        self.now[row, threads] += 1
        return known

    def acquire(self, row, threads, known):
        """Threads have waited for a barrier that knows that much."""
        self.seen[row, threads] = np.maximum(self.seen[row, threads], known)

    def _unseen(self, rows, threads, other, when):
        """Where ``other`` has done something at ``when`` that the thread has not seen."""
        return (other >= 0) & (other != threads) & (when > self.seen[rows, threads, np.maximum(other, 0)])

    def reads(self, trace, rows, threads, index):
        """Note reads; the thread that each races with, -1 for none."""
        writer = trace.writer[rows, index]
        bad = self._unseen(rows, threads, writer, trace.written[rows, index])
        trace.reader[rows, index, threads // _SLOT] = threads
        trace.read[rows, index, threads // _SLOT] = self.now[rows, threads]
        return np.where(bad, writer, -1)

    def writes(self, trace, rows, threads, index):
        """Note writes; as :meth:`reads`."""
        found = np.where(trace.elsewhere[rows, index] == self.meetings[rows], threads, -1)
        readers = [(trace.reader[..., s], trace.read[..., s]) for s in range(trace.reader.shape[-1])]
        for other, when in [(trace.writer, trace.written), *readers]:
            other = other[rows, index]
            found = np.where(self._unseen(rows, threads, other, when[rows, index]), other, found)
        trace.writer[rows, index], trace.written[rows, index] = threads, self.now[rows, threads]
        last = trace.writer[rows, index]
        trace.reader[rows, index] = -1
        return np.where(last != threads, last, found)  # two threads at once

    @staticmethod
    def forget(trace, row, begin, end):
        """Words were written by a copy that a barrier orders."""
        trace.writer[row, begin:end] = -1
