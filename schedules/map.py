"""Elementwise kernels (:class:`bnntvm.spec.Map`): read a tensor once, run the epilogue, write its outputs. With a packed output this is the
packing kernel.

The tensor is seen as rows of C channels. Two ways to walk it:

* row by row, in words of 32 channels; a row's last vector may be partial;
* where no output is packed and C does not fill vectors, several rows at once: ``lcm(C, 32)`` elements are a row of whole vectors, for
  which per-channel operands are repeated in scratch memory. The rows that are left over go one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm, prod

from tvm import tirx

from bnntvm import spec as specs
from bnntvm.schedules import epilogue as tail
from bnntvm.schedules import tir
from bnntvm.schedules.finite import Watch

#: Longest joined row for which per-channel operands are repeated (elements).
LONGEST_JOINED_ROW = 4096


#: Fields of a schedule that cut the work into parallel tasks.
GRAIN = ("chunk",)


@dataclass(frozen=True)
class Schedule:
    """How the tensor is walked.

    Attributes
    ----------
    chunk : int
        Elements that a thread takes at a time, about.
    words : int
        32-channel words in one step of the inner loop.
    """

    chunk: int
    words: int


def default_schedule(spec, isa):
    """Chunks of 64 KiB, and four words of packed bits (or one vector chain per register) in a step."""
    return Schedule(16384, 4 if isa.lanes == 16 else 2)


def space(spec, isa):
    """Chunk sizes and widths of the inner loop."""
    return [Schedule(chunk, words) for chunk in (4096, 16384, 65536) for words in (1, 2, 4, 8)]


def reference(spec, operands, epilogue_inputs):
    """The epilogue of the data itself; ``operands`` is ``[data]``."""
    return tail.reference(spec.epilogue, operands[0], epilogue_inputs)


def build(spec, schedule, isa, finite=False):
    """The kernel: parameters data ``[n, H, W, C]`` or ``[m, C]``, then the epilogue's.

    ``finite``: NaN and infinity in float32 data are an error, see :class:`.finite.Watch`.
    """
    return _Kernel(spec, schedule, isa, finite).function()


class _Kernel:
    def __init__(self, spec, schedule, isa, finite):
        self.spec, self.schedule, self.isa, self.lanes = spec, schedule, isa, isa.lanes
        self.watch = Watch(self.lanes, finite)
        self.leading = tirx.Var("n", "int64")
        self.pixels = prod(spec.spatial) if spec.rank == 4 else 1
        dims = (self.leading, *(spec.spatial if spec.rank == 4 else ()))
        self.data = tir.buffer("data", (*dims, spec.channels), spec.dtype)
        self.emitter = tail.Emitter(spec.epilogue, spec.channels, isa, dims, spec.dtype, elementwise=True)

    def function(self):
        params = [self.data, *self.emitter.inputs, *self.emitter.outputs]
        body = self._joined() if self._joins() else self._rows_in_chunks(tir.i64(0))
        return tir.function("map", params, self.watch.kernel(body))

    def _position(self, row):
        """Indices of a row: rows lie one after another, so the last of the leading indices may run past its end."""
        if self.spec.rank == 2:
            return (row,)
        if any(e.kind == "image" for e in self.spec.epilogue.inputs):
            return (tirx.floordiv(row, tir.i64(self.pixels)), tir.i64(0), tirx.floormod(row, tir.i64(self.pixels)))
        return (tir.i64(0), tir.i64(0), row)

    # Row by row

    def _rows_in_chunks(self, begin):
        """Rows from ``begin`` to the end, shared among threads."""
        chunk, rows = max(1, self.schedule.chunk // self.spec.channels), self.leading * self.pixels - begin

        def body(number):
            first = begin + number * chunk
            count = tirx.min(tir.i64(chunk), rows - number * chunk)
            return self.watch.task(lambda: tir.for_("row", count, lambda r: self._row(self._position(first + r))))

        return tir.parallel("chunk", tirx.floordiv(rows + (chunk - 1), tir.i64(chunk)), body)

    def _row(self, position):
        whole, step = self.spec.channels // specs.WORD_BITS, self.schedule.words
        body, done = [], 0
        if whole > 2 * step:  # a loop over whole words, then the rest written out
            done = whole - whole % step
            body.append(tir.for_("word", whole // step, lambda w: self._words(self.emitter, position, w * (step * specs.WORD_BITS), step)))
        for word in range(done, specs.words(self.spec.channels), step):
            count = min(step, specs.words(self.spec.channels) - word)
            body.append(self._words(self.emitter, position, word * specs.WORD_BITS, count))
        return body

    def _words(self, emitter, position, first, count):
        """``count`` words of channels from ``first`` on, which is a number where some of the channels may not exist."""
        values, named, exact = [], [], tir.static(first)
        for v in range(count * specs.WORD_BITS // self.lanes):
            channel = first + v * self.lanes
            exist = self.lanes if exact is None else min(self.lanes, emitter.channels - channel)
            if exist <= 0:
                break
            where = (*position, channel)
            if exist == self.lanes:
                value = tir.load_vector(self.data, where, self.lanes)
            else:
                value = tir.load_masked(self.data, where, tir.prefix_mask(exist, self.lanes))
            value, statement = tir.bind("x", value)
            values.append(value)
            named += [statement, *self.watch.see(value)]
        return named + emitter.emit(values, position, first, whole=exact is None or None)

    # Several rows at once

    def _joins(self):
        """Whether rows are joined: only elementwise stores, partial vectors otherwise, and operands that repeat with the channels."""
        channels, epilogue = self.spec.channels, self.spec.epilogue
        if channels % self.lanes == 0 or any(o.kind == "bits" for o in epilogue.outputs):
            return False
        per_channel = any(e.kind == "channel" for e in epilogue.inputs)
        if any(e.kind in ("pixel", "image") for e in epilogue.inputs):
            return False
        return not per_channel or lcm(channels, specs.WORD_BITS) <= LONGEST_JOINED_ROW

    def _joined(self):
        length = lcm(self.spec.channels, specs.WORD_BITS)
        together = length // self.spec.channels
        wide, prepare = self._wide_emitter(length, together)
        groups = tirx.floordiv(self.leading * self.pixels, tir.i64(together))
        chunk = max(1, self.schedule.chunk // length)

        def row(position):
            return tir.for_("word", length // specs.WORD_BITS, lambda w: self._words(wide, position, w * specs.WORD_BITS, 1))

        def body(number):
            count = tirx.min(tir.i64(chunk), groups - number * chunk)
            return self.watch.task(lambda: tir.for_("group", count, lambda g: row(self._position((number * chunk + g) * together))))

        return [
            *prepare,
            tir.parallel("chunk", tirx.floordiv(groups + (chunk - 1), tir.i64(chunk)), body),
            self._rows_in_chunks(groups * together),
        ]

    def _wide_emitter(self, length, together):
        """An emitter for rows of ``length`` channels on the same memory, and the statements that repeat the per-channel operands."""
        wide, prepare = tail.Emitter(self.spec.epilogue, length, self.isa, (1,), self.spec.dtype, True), []
        wide.outputs, wide.inputs = self.emitter.outputs, list(self.emitter.inputs)
        for index, operand in enumerate(self.spec.epilogue.inputs):
            if operand.kind == "channel":
                wide.inputs[index], statements = self._repeated(self.emitter.inputs[index], together)
                prepare += statements
        return wide, prepare

    def _repeated(self, source, together):
        """``(buffer, statements)``: a per-channel operand, repeated in scratch memory."""
        channels = self.spec.channels
        array, allocate = tir.scratch(f"{source.name}_repeated", (channels * together,), str(source.dtype))

        def copy(r):
            return tir.for_("c", channels, lambda c: tir.store(array, tir.load(source, c), r * channels + c))

        return array, [allocate, tir.for_("r", together, copy)]
