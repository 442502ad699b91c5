"""Joining tensors along their channels: the family of :class:`bnntvm.spec.Concat`.

Without an epilogue this copies, vector by vector. With one, words of 32 channels go through the epilogue as they are read; where parts do
not begin at a word, a pixel's channels are first joined in scratch memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from tvm import tirx

from bnntvm import spec as specs

from . import epilogue as epilogues
from . import tir


@dataclass(frozen=True)
class Schedule:
    """What may be tuned.

    Attributes
    ----------
    unroll : int
        Vectors of one part that are copied without a loop.
    ahead : int
        Ask for the lines of the pixel that is so many pixels ahead; 0 leaves that to the processor.
    """

    unroll: int
    ahead: int = 0


def default_schedule(spec, isa):
    """A schedule that is fast without tuning."""
    return Schedule(16)


def space(spec, isa):
    """Valid schedules, the default one first."""
    return [Schedule(unroll, ahead) for ahead in (0, 2, 4, 8) for unroll in (16, 4, 8, 32)]


def build(spec, schedule, isa):
    """The kernel: the parts, then the epilogue's inputs and outputs. The leading dimension is dynamic.

    Returns
    -------
    tirx.PrimFunc
    """
    return _Kernel(spec, schedule, isa).function()


class _Kernel:
    """Writes one concatenation."""

    def __init__(self, spec, schedule, isa):
        self.spec, self.schedule, self.lanes = spec, schedule, isa.lanes
        self.total = sum(spec.channels)
        self.starts = [0, *accumulate(spec.channels)][:-1]
        self.leading = tirx.Var("n", "int64")
        dims = (self.leading, *spec.spatial)
        self.parts = [tir.buffer(f"x{i}", (*dims, c), spec.dtype) for i, c in enumerate(spec.channels)]
        self.emitter = epilogues.Emitter(spec.epilogue, self.total, isa, dims, spec.dtype, elementwise=True)

    def function(self):
        if self.spec.epilogue == specs.store(self.spec.dtype, self.spec.dtype):
            pixel = self._copy_pixel
        elif all(c % specs.WORD_BITS == 0 for c in self.spec.channels[:-1]):
            pixel = self._aligned_pixel
        else:
            pixel = self._joined_pixel
        return tir.function("concat", [*self.parts, *self.emitter.inputs, *self.emitter.outputs], self._pixels(pixel))

    def _pixels(self, pixel):
        """``pixel(position)`` for all pixels, one task for each image row (or row of a matrix)."""
        if self.spec.rank == 2:
            return tir.parallel("row", self.leading, lambda row: pixel((row,)))
        height, width = self.spec.spatial

        def task(number):
            image, y = tirx.floordiv(number, height), tirx.floormod(number, height)
            return tir.for_("x", width, lambda x: [self._fetch((image, y, x + self.schedule.ahead)), pixel((image, y, x))])

        return tir.parallel_if_large("row", height, self.leading, 8 * height * width * self.total, task)

    def _fetch(self, position):
        """Statements that ask for the lines of a pixel: the processor's own look ahead ends with a page."""
        if not self.schedule.ahead:
            return []
        lines = [tir.prefetch(part, [*position, first]) for part in self.parts for first in range(0, tir.static(part.shape[-1]), 16)]
        return [lines, self.emitter.prefetch(position, 0, self.total)]

    def _copy_pixel(self, position):
        output = self.emitter.outputs[0]
        return [self._copy(part, position, output, (*position,), start) for part, start in zip(self.parts, self.starts)]

    def _copy(self, source, position, target, where, start):
        """Copy the channels of ``source`` at ``position`` to ``target[(*where, start...)]``."""
        channels, lanes, unroll = tir.static(source.shape[-1]), self.lanes, self.schedule.unroll

        def move(first, width):
            return tir.store_vector(target, [*where, first + start], tir.load_vector(source, [*position, first], width))

        body, done = [], 0
        if channels > unroll * lanes:
            steps = channels // (unroll * lanes)
            body.append(tir.for_("c", steps, lambda i: [move(i * (unroll * lanes) + v * lanes, lanes) for v in range(unroll)]))
            done = steps * unroll * lanes
        while channels - done >= lanes:
            body.append(move(tir.i64(done), lanes))
            done += lanes
        if done < channels and channels >= lanes:  # the last vector overlaps its neighbour
            body.append(move(tir.i64(channels - lanes), lanes))
            done = channels
        while done < channels:
            width = 1 << ((channels - done).bit_length() - 1)
            body.append(move(tir.i64(done), width))
            done += width
        return body

    def _word(self, array, where, position, first, count, whole):
        """Load up to a word of channels at ``where`` and run the epilogue; ``count`` of its channels exist."""
        values, lanes = [], self.lanes
        for v in range(-(-count // lanes)):
            index, left = (*where[:-1], where[-1] + v * lanes), count - v * lanes
            full = tir.load_vector(array, index, lanes) if left >= lanes else None
            values.append(full if full is not None else tir.load_masked(array, index, tir.prefix_mask(left, lanes)))
        return self.emitter.emit(values, position, first, whole=whole)

    def _words(self, array, position_in, position, start, channels):
        """The epilogue for ``channels`` channels of an array that become the channels from ``start``, a multiple of 32, on."""
        whole, rest = divmod(channels, specs.WORD_BITS)
        size = specs.WORD_BITS
        body = []
        if whole:
            body.append(
                tir.for_("word", whole, lambda i: self._word(array, (*position_in, i * size), position, start + i * size, size, True))
            )
        if rest:
            first = tir.i64(whole * size)
            body.append(self._word(array, (*position_in, first), position, start + first, rest, None))
        return body

    def _aligned_pixel(self, position):
        """All parts but the last are whole words."""
        return [
            self._words(part, position, position, start, channels)
            for part, start, channels in zip(self.parts, self.starts, self.spec.channels)
        ]

    def _joined_pixel(self, position):
        joined, allocate = tir.local("joined", specs.words(self.total) * specs.WORD_BITS, "float32")
        copies = [self._copy(part, position, joined, (), start) for part, start in zip(self.parts, self.starts)]
        return [allocate, copies, self._words(joined, (), position, 0, self.total)]


def reference(spec, operands, epilogue_inputs):
    """The concatenation in numpy.

    Parameters
    ----------
    operands : list
        The parts, float32 ``[N, H, W, channels[i]]`` or ``[M, channels[i]]``.
    epilogue_inputs : list of ndarray

    Returns
    -------
    list of ndarray
        One for each output of the epilogue.
    """
    return epilogues.reference(spec.epilogue, np.concatenate(operands, axis=-1), epilogue_inputs)
