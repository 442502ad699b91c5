"""Sliding windows that keep channels apart: the common part of depthwise convolution and pooling.

The register tile is ``pixels`` neighbours of an output row times ``vectors`` vectors of channels. For each row of taps, every input vector
that the tile needs is loaded once and combined into all pixels it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from . import epilogue as epilogues
from . import tir, windows


@dataclass(frozen=True)
class Schedule:
    """What may be tuned.

    Attributes
    ----------
    pixels : int
        Pixels of an output row in the register tile.
    vectors : int
        Vectors of channels in the register tile; a whole 32-bit word of channels if the epilogue packs bits.
    ahead : int
        Ask for the lines of the tile that is so many tiles ahead in the row; 0 leaves that to the processor.
    """

    pixels: int
    vectors: int
    ahead: int = 0


def default_schedule(window, channels, epilogue, isa, extra):
    """A tile that fits in the registers beside ``extra`` operands."""
    return space(window, channels, epilogue, isa, extra)[0]


def space(window, channels, epilogue, isa, extra):
    """Valid schedules, the default one first."""
    if windows.has_bits(epilogue):
        counts = [min(32 // isa.lanes, -(-channels // isa.lanes))]
    else:
        counts = [v for v in (1, 2) if v == 1 or v * isa.lanes <= channels]
    found = []
    for vectors in counts:
        most = max(1, (isa.registers - extra - 1) // vectors)
        for limit in (8, 14, 4):
            found.append(Schedule(windows.even_tile(window.out_width, min(most, limit)), vectors))
    for vectors in counts if windows.has_bits(epilogue) else [v for v in (1, 2, 3, 4) if v == 1 or v * isa.lanes <= channels]:
        most = max(1, (isa.registers - extra - 1) // vectors)
        found += [Schedule(windows.even_tile(window.out_width, pixels), vectors) for pixels in range(1, min(most, 16) + 1)]
    return [Schedule(s.pixels, s.vectors, ahead) for ahead in (0, 1, 2) for s in dict.fromkeys(found)]


@dataclass(frozen=True)
class Place:
    """Where a tile is.

    Image, output row, first row of taps and their number (an int if it is the same everywhere), first output column, taps of the tile,
    first channel, mask of the last vector's channels (or None), number of vectors.
    """

    image: object
    row: object
    first: object
    count: object
    column: object = None
    taps: tuple = ()
    channel: object = None
    mask: object = None
    vectors: int = 0


class Kernel:
    """Writes one kernel; subclasses say what is combined.

    Parameters
    ----------
    name : str
        Global symbol.
    window : bnntvm.spec.Window
    in_channels, channels : int
        Channels of the data and of the result.
    epilogue : bnntvm.spec.Epilogue
    schedule : Schedule
    isa : bnntvm.targets.x86.Isa
    """

    #: Value that changes nothing when it is combined.
    identity = 0.0

    def __init__(self, name, window, in_channels, channels, epilogue, schedule, isa):
        self.name, self.window, self.channels, self.schedule, self.lanes = name, window, channels, schedule, isa.lanes
        self.batch = tirx.Var("n", "int64")
        self.data = tir.buffer("x", (self.batch, window.in_height, window.in_width, in_channels), "float32")
        self.operands = [self.data]
        dims = (self.batch, window.out_height, window.out_width)
        self.emitter = epilogues.Emitter(epilogue, channels, isa, dims, "float32")

    # What subclasses define

    def load(self, at, y, x, vector):
        """Input vector that meets channels ``at.channel + vector * lanes, ...`` at input row y, column x."""
        where = [at.image, y, x, at.channel + vector * self.lanes]
        if at.mask is not None and vector == at.vectors - 1:
            return tir.load_masked(self.data, where, at.mask)
        return tir.load_vector(self.data, where, self.lanes)

    def weights(self, at, r, vector):
        """What the taps of row ``r`` are combined with: ``(statements, {s: expression})``."""
        return [], {}

    def combine(self, total, value, weight):
        """One tap."""
        raise NotImplementedError

    def result(self, at, pixel, total):
        """The anchor's value from the combined taps of a pixel of the tile."""
        return total

    # Loops

    def function(self):
        """The kernel, with one task for each output row."""
        window, height = self.window, self.window.out_height
        size = 4 * self.channels * (window.in_height * window.in_width + height * window.out_width)

        def row(number):
            return self._row(tirx.floordiv(number, height), tirx.floormod(number, height))

        body = tir.parallel_if_large("row", height, self.batch, size, row)
        return tir.function(self.name, [*self.operands, *self.emitter.inputs, *self.emitter.outputs], body)

    def _row(self, image, y):
        first, count = windows.row_taps(self.window, y)
        first, bind_first = tir.bind("first", tir.i64(first))
        count, bind_count = tir.bind("count", count) if tir.static(count) is None else (count, [])
        at = Place(image, y, first, count)
        return [bind_first, bind_count, [self._run(at, run) for run in windows.column_runs(self.window, self.schedule.pixels)]]

    def _run(self, at, run):
        return tir.for_("tile", run.count, lambda number: self._columns(at, run.first_pixel(number), run.taps))

    def _columns(self, at, x, taps):
        """All channels of a tile: a loop of whole blocks, then what is left."""
        block = self.schedule.vectors * self.lanes
        whole, rest = divmod(self.channels, block)

        def tile(channel, vectors, mask):
            place = Place(at.image, at.row, at.first, at.count, x, taps, channel, mask, vectors)
            return self._tile(place, whole=mask is None)

        body = [tir.for_("block", whole, lambda b: tile(b * block, self.schedule.vectors, None))] if whole else []
        if rest:
            mask = tir.prefix_mask(rest % self.lanes, self.lanes) if rest % self.lanes else None
            body.append(tile(tir.i64(whole * block), -(-rest // self.lanes), mask))
        return body

    def _tile(self, at, whole):
        pixels, lanes = self.schedule.pixels, self.lanes
        sums = tir.Registers("sum", pixels * at.vectors, "float32", lanes)
        clear = sums.fill(tir.splat(self.identity, "float32", lanes))
        rows = tir.for_("r", at.count, lambda r: [self._taps(at, at.first + r, v, sums) for v in range(at.vectors)]) if at.taps else []
        scope, finish = {}, []
        for p in range(pixels):
            totals = [sums.get(p * at.vectors + v) for v in range(at.vectors)]
            values = [self.result(at, p, total) for total in totals]
            finish.append(self.emitter.emit(values, (at.image, at.row, at.column + p), at.channel, scope, whole=whole))
        return [self._fetch(at), sums.allocate, clear, rows, finish]

    def _fetch(self, at):
        """Statements that ask for the lines of a tile further on in the row: the processor's own look ahead ends with a page."""
        schedule, window = self.schedule, self.window
        if not schedule.ahead:
            return []
        x = at.column + schedule.pixels * schedule.ahead
        top, left = at.row * window.strides[0] - window.pads[0], x * window.strides[1] - window.pads[1]
        columns, lanes = range(schedule.pixels * window.strides[1]), range(0, at.vectors * self.lanes, 16)

        def row(r):
            y = top + (at.first + r) * window.dilations[0]
            return [tir.prefetch(self.data, [at.image, y, left + c, at.channel + lane]) for c in columns for lane in lanes]

        results = [self.emitter.prefetch((at.image, at.row, x + p), at.channel, at.vectors * self.lanes) for p in range(schedule.pixels)]
        return [tir.for_("r", at.count, row), results]

    def _taps(self, at, r, vector, sums):
        """Combine tap row ``r`` into one vector of channels of every pixel of the tile."""
        window = self.window
        body, weights = self.weights(at, r, vector)
        y = at.row * window.strides[0] - window.pads[0] + r * window.dilations[0]
        left = at.column * window.strides[1] - window.pads[1]
        for column, uses in windows.column_uses(window, at.taps).items():
            value, statement = tir.bind("x", self.load(at, y, left + column, vector))
            body.append(statement)
            for p, s in uses:
                index = p * at.vectors + vector
                body.append(sums.set(index, self.combine(sums.get(index), value, weights.get(s))))
        return body
