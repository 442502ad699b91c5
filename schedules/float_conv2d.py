"""float32 convolution, NHWC: the family of :class:`bnntvm.spec.FloatConv2d` except its depthwise case.

A direct convolution. The register tile is ``pixels`` neighbours of an output row times ``vectors`` vectors of output channels; each step of
the reduction broadcasts one input value per pixel against a row of packed weights. Neighbouring taps of a kernel row are neighbours in
memory, so (s, c) is one loop of kw * I steps. Multiplications contract with additions here (one rounding), in the reduction only.

Where the windows of neighbouring pixels overlap and the weights of a whole kernel row (one input channel) fit in registers beside a smaller
tile, ``shared`` schedules load each input value once for all the products of the tile that it belongs to. That takes fewer loads than steps
of multiplication and reaches the multipliers' limit with short reductions, too.

A grouped convolution is the same with, for each block of output channels, only the input channels of the groups that the block touches;
weights between unrelated groups inside a block are zero. Where a vector holds several whole groups, each lane takes the input channel of
its own group instead of a broadcast one, so that no weight is zero; see :class:`_Gather`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from tvm import tirx

from . import epilogue as epilogues
from . import float_neon, tir, windows

#: Bytes of weights up to which all of them are expected to stay in the level-2 cache while a row is computed.
_RESIDENT_BYTES = 1 << 20


#: Steps of the reduction that weights are asked for ahead.
_AHEAD = (0, 8, 24)
#: Whole vectors of channels up to which half vectors for the rest are faster on Zen 4.
_FEW_VECTORS = 4
#: Fields of a schedule that cut the work into parallel tasks.
GRAIN = ("rows",)


@dataclass(frozen=True)
class Schedule:
    """What may be tuned.

    Attributes
    ----------
    pixels : int
        Pixels of an output row in the register tile.
    vectors : int
        Vectors of output channels in the register tile; a whole 32-bit word of channels if the epilogue packs bits.
    rows : int
        Output rows of one parallel task (a task is an image, a block of output channels and ``rows`` rows).
    shared : bool
        Keep the weights of a kernel row in registers and load each input value once.
    ahead : int
        Ask for the weights that are so many steps of the reduction ahead; 0 leaves that to the processor.
    paired : bool
        Input channels in pairs, for certain groups: see :mod:`.float_conv2d_paired`.
    half : bool
        Vectors of half the length, where the last whole one would be at most half full.
    """

    pixels: int
    vectors: int
    rows: int
    shared: bool
    ahead: int = 0
    paired: bool = False
    half: bool = False


def default_schedule(spec, isa):
    """A schedule that is fast without tuning.

    Returns
    -------
    Schedule
    """
    return space(spec, isa)[0]


def space(spec, isa):
    """Valid schedules, the default one first."""
    whole = of_length(spec, isa)
    if not _may_halve(spec, isa):
        return whole
    halves = [replace(schedule, half=True) for schedule in of_length(spec, _isa(isa, half=True))]
    # Half a vector's worth of channels takes no longer in half a vector anywhere, and Zen 4 multiplies two of them at a time: then a vector
    # that is not computed outweighs that data are read for fewer channels at once, up to some four of them.
    few = spec.out_channels <= isa.lanes // 2 or isa.vendor == "AMD" and spec.out_channels <= _FEW_VECTORS * isa.lanes + isa.lanes // 2
    return halves + whole if few else whole + halves


def _may_halve(spec, isa):
    """Whether vectors of half the length would leave fewer lanes empty."""
    return isa.lanes == 16 and spec.groups == 1 and 0 < spec.out_channels % isa.lanes <= isa.lanes // 2


def _isa(isa, half):
    """The instruction set with vectors of half the length, if that is wanted."""
    return replace(isa, lanes=isa.lanes // 2) if half else isa


def _is_half(isa):
    """Whether an instruction set is AVX-512 with vectors of half the length, as :func:`_isa` makes it."""
    return isa.machine == "x86_64" and isa.registers == 32 and isa.lanes == 8


def of_length(spec, isa):
    """Valid schedules on vectors as long as they are, the default one first."""
    vectors = _vectors(spec, isa)
    large = most_pixels(vectors, isa) - (vectors == 3)  # LLVM needs another register for tiles of three
    if float_neon.by_element(isa) and contiguous(spec):
        large, vectors = float_neon.tile(spec.out_channels, spec.epilogue)
    planar = float_neon.planar_tile(spec) if float_neon.by_element(isa) else None
    vectors = planar[1] if planar else vectors
    window = flattened(spec.window, most_pixels(vectors, isa))
    if _Gather.of(spec, isa):
        return _gathering(spec, window, vectors, isa)
    tiles = [(pixels, False) for pixels in (large, large // 2 + 1)]
    shared = _shared_pixels(window, vectors, isa)
    if float_neon.by_element(isa) and contiguous(spec):
        tiles[:0] = [(large, False)]
    elif planar:
        tiles[:0] = [(planar[0], True)]
    elif shared:
        tiles[:0] = [(shared, True), (shared // 2 + 1, True)]
    if vectors == 1 and shared and isa.vendor == "AMD" and isa.lanes == 16 and contiguous(spec):
        # One multiplication of whole vectors a cycle leaves time to load an operand for each: 1 to 10 % faster than shared ones, the more
        # channels the more.
        tiles[:0] = [(shared, False)]
    first = _task_rows(spec, window)
    rows = dict.fromkeys([first, min(4, window.out_height), window.out_height])
    found = [Schedule(windows.even_tile(window.out_width, most), vectors, r, share) for r in rows for most, share in tiles]
    found = dict.fromkeys([*found, *_every_tile(spec, vectors, isa, first)])
    return [replace(s, ahead=ahead) for ahead in _AHEAD for s in found if not (ahead and s.shared)]


def vector_counts(out_channels, isa):
    """Vectors of a register tile where no bits are packed: whole tiles cover the channels, padded to words, and nothing behind them."""
    padded = -(-out_channels // 32) * 32
    most = 4 if out_channels % 32 == 0 else 32 // isa.lanes
    return [v for v in range(1, min(most, -(-out_channels // isa.lanes)) + 1) if padded % (v * isa.lanes) == 0]


def contiguous(spec):
    """Whether the channels of a pixel, which all are multiplied, lie side by side."""
    return spec.groups == 1 and not spec.planar


def _every_tile(spec, vectors, isa, first):
    """Schedules of all tiles whose accumulators fit in the registers, on ``vectors`` vectors or, where no bits are packed, others."""
    for count in dict.fromkeys([*_one_block(spec, isa), *_counts(spec, vectors, isa)]):
        large = most_pixels(count, isa)
        window = flattened(spec.window, large)
        pixels = dict.fromkeys(windows.even_tile(window.out_width, most) for most in range(1, large + 1))
        for rows in dict.fromkeys(r for r in (first, 1, 2, 4, 8, window.out_height) if r <= window.out_height):
            for pixel in pixels:
                yield Schedule(pixel, count, rows, False)
                fits = (pixel + window.kernel[1]) * count + 2 <= isa.registers
                if fits and window.strides[1] < window.kernel[1]:
                    yield Schedule(pixel, count, rows, True)


def _counts(spec, vectors, isa):
    """Numbers of vectors of a tile, ``vectors`` by default; only whole words where bits are packed."""
    if windows.has_bits(spec.epilogue) or spec.groups > 1 and vectors == 1:
        return [vectors]
    return vector_counts(spec.out_channels, isa)


def _one_block(spec, isa):
    """Three vectors where these are all of the channels, 33 to 48 with AVX-512, 17 to 24 in half vectors: two blocks of two would compute
    one for nothing."""
    count = -(-spec.out_channels // isa.lanes)
    return [count] if isa.machine == "x86_64" and isa.registers == 32 and spec.groups == 1 and count == 3 else []


def _gathering(spec, window, vectors, isa):
    """Valid schedules of a kernel whose lanes take channels of their own: weights of a kernel row beside the sums.

    Input channels in pairs come first where they can be: merging channels of two groups would cost as much as multiplying them.
    """
    most = max(1, min(16, (isa.registers - 2) // vectors - window.kernel[1]))
    pixels = [windows.even_tile(window.out_width, count) for count in dict.fromkeys((most, max(1, most // 2)))]
    rows = dict.fromkeys([1, min(4, window.out_height), window.out_height])
    found = [Schedule(count, vectors, r, True) for r in rows for count in dict.fromkeys(pixels)]
    return _paired().schedules(spec, window, vectors, isa) + found if _paired().fits(spec, isa) else found


def _paired():
    """The kernel with input channels in pairs, which is made from this one."""
    from . import float_conv2d_paired

    return float_conv2d_paired


def _vectors(spec, isa):
    """Vectors of a register tile; one where two would hold unrelated groups, or where the second of the last block would hold nothing."""
    per_out = spec.out_channels // spec.groups
    if spec.groups > 1 and per_out % (2 * isa.lanes) and not windows.has_bits(spec.epilogue):
        return 1
    if one := _one_block(spec, isa):
        return one[0]
    if _second_is_empty(spec, isa) and spec.groups == 1 and not windows.has_bits(spec.epilogue):
        return 1
    return tile_vectors(spec.out_channels, spec.epilogue, isa)


def _second_is_empty(spec, isa):
    """Whether the second vector of the last tile of two would hold no channel; in half vectors, too."""
    return _is_half(isa) and -(-spec.out_channels // isa.lanes) % 2 == 1 or epilogues.half_a_word_is_left(spec.out_channels, isa)


def tile_vectors(out_channels, epilogue, isa):
    """Vectors of output channels in a register tile: two, or a word's worth where bits are packed, or fewer if there are no more."""
    most = 32 // isa.lanes if windows.has_bits(epilogue) else 2
    return min(most, -(-out_channels // isa.lanes))


def _shared_pixels(window, vectors, isa):
    """Pixels of a tile that loads each input value once: enough independent sums to keep the multipliers busy. 0 where that cannot be."""
    # Half vectors: two multiplications a cycle, with as many registers.
    pixels = (20 if _is_half(isa) else 14 if isa.registers == 32 else 8) // vectors
    fits = (pixels + window.kernel[1]) * vectors + 2 <= isa.registers
    return pixels if fits and window.strides[1] < window.kernel[1] else 0


def most_pixels(vectors, isa):
    """Pixels of the largest tile whose accumulators, weights (or broadcasts) and one temporary fit in the registers."""
    most = max(p for p in range(1, isa.registers) if p == 1 or p * vectors + min(p, vectors) + 1 <= isa.registers)
    return min(most, 28)


def _task_rows(spec, window):
    weights = 4 * spec.out_channels * window.kernel[0] * window.kernel[1] * spec.in_channels // spec.groups
    return 1 if weights <= _RESIDENT_BYTES else window.out_height


def flattened(window, most):
    """The window that a kernel really runs over: a 1x1 convolution sees the image as fewer, longer rows where that makes tiles fit better.

    Returns
    -------
    Window
        ``window`` itself, or one with ``in_height * in_width`` unchanged and ``in_width`` a multiple of the old one.
    """
    if (window.kernel, window.strides, window.pads) != ((1, 1), (1, 1), (0, 0, 0, 0)):
        return window

    def computed(rows_joined):
        width = window.in_width * rows_joined
        return len(windows.tile_starts(width, windows.even_tile(width, most))) * windows.even_tile(width, most) / width

    choices = [d for d in range(1, window.in_height + 1) if window.in_height % d == 0]
    best = min(choices, key=lambda d: (round(computed(d), 2), d))
    if window.in_width * best < min(most, 8):
        best = window.in_height
    return replace(window, in_height=window.in_height // best, in_width=window.in_width * best)


# Weights ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blocks:
    """Blocks of output channels and the input channels that each of them reads.

    ``count`` blocks of ``size`` output channels; block b reads ``depth`` input channels from ``first[b]`` on.
    """

    size: int
    count: int
    depth: int
    first: tuple[int, ...]


@dataclass(frozen=True)
class _Gather:
    """Lanes that take channels of their own: a vector of outputs holds ``groups`` groups of ``per_out`` outputs and ``per_in`` inputs.

    In step c of the reduction, lane l takes the input channel ``l // per_out * per_in + c``.
    """

    groups: int
    per_in: int
    per_out: int

    @staticmethod
    def of(spec, isa):
        """None where a vector does not hold several whole groups."""
        per_out, per_in = spec.out_channels // spec.groups, spec.in_channels // spec.groups
        if spec.groups == 1 or per_out >= isa.lanes or isa.lanes % per_out:
            return None
        return _Gather(isa.lanes // per_out, per_in, per_out)

    @property
    def span(self):
        return self.groups * self.per_in


def _blocks(spec, schedule, isa):
    size = schedule.vectors * isa.lanes
    count = -(-spec.out_channels // size)
    if spec.groups == 1:
        return _Blocks(size, count, spec.in_channels, (0,) * count)
    per_out, per_in = spec.out_channels // spec.groups, spec.in_channels // spec.groups
    if gather := _Gather.of(spec, isa):
        return _Blocks(size, count, per_in, tuple(b * schedule.vectors * gather.span for b in range(count)))
    low = [b * size // per_out for b in range(count)]
    high = [(min((b + 1) * size, spec.out_channels) - 1) // per_out for b in range(count)]
    depth = max((h - g + 1) * per_in for g, h in zip(low, high))
    return _Blocks(size, count, depth, tuple(min(g * per_in, spec.in_channels - depth) for g in low))


def pack_weights(spec, schedule, isa, weights):
    """Weights in the order in which the kernel reads them.

    Parameters
    ----------
    weights : ndarray
        float32 ``[O, kh, kw, I / groups]``; any other type is kept.

    Returns
    -------
    ndarray
        float32 ``[blocks, kh, kw, depth, block]``, output channels padded with zeros to whole blocks; see :class:`_Blocks`.
    """
    if schedule.paired:
        return _paired().pack_weights(spec, schedule, isa, weights)
    blocks = _blocks(spec, schedule, _isa(isa, schedule.half))
    packed = np.zeros((blocks.count, *weights.shape[1:3], blocks.depth, blocks.size), weights.dtype)
    per_out, per_in = spec.out_channels // spec.groups, spec.in_channels // spec.groups
    for o in range(spec.out_channels):
        block = o // blocks.size
        start = 0 if _Gather.of(spec, isa) else o // per_out * per_in - blocks.first[block]
        packed[block, :, :, start : start + per_in, o % blocks.size] = weights[o]
    return packed


# Kernel -------------------------------------------------------------------------------------------------------------------------------


def build(spec, schedule, isa):
    """The kernel: data ``float32[N, H, W, I]`` (``[N, I, H, W]`` if planar), packed weights, the epilogue's inputs and outputs.

    N is dynamic.

    Returns
    -------
    tirx.PrimFunc
    """
    return (_paired().Kernel if schedule.paired else Kernel)(spec, schedule, isa).function()


class Kernel:
    """Writes one convolution."""

    name = "float_conv2d"

    def __init__(self, spec, schedule, isa):
        isa = _isa(isa, schedule.half)
        self.spec, self.schedule, self.isa, self.lanes = spec, schedule, isa, isa.lanes
        window = spec.window
        self.window = flattened(window, most_pixels(schedule.vectors, isa))
        self.flat = self.window is not window
        self.blocks, self.gather = _blocks(spec, schedule, isa), _Gather.of(spec, isa)
        self.batch = tirx.Var("n", "int64")
        image = (window.in_height, window.in_width)
        shape = (spec.in_channels, *image) if spec.planar else (*image, spec.in_channels)
        self.data = tir.buffer("x", (self.batch, *shape), "float32")
        shape = (self.blocks.count, *window.kernel, self.blocks.depth, self.blocks.size)
        self.weights = tir.buffer("w", shape, "float32")
        self.operands = [self.data, self.weights]
        dims = (self.batch, window.out_height, window.out_width)
        self.emitter = epilogues.Emitter(spec.epilogue, spec.out_channels, isa, dims, "float32")

    def function(self):
        height, rows = self.window.out_height, self.schedule.rows
        chunks = -(-height // rows)

        def task(number):
            block, rest = tirx.floormod(number, self.blocks.count), tirx.floordiv(number, self.blocks.count)
            block = tir.i64(0) if self.blocks.count == 1 else block
            image, first = tirx.floordiv(rest, chunks), tirx.floormod(rest, chunks) * rows
            count = rows if height % rows == 0 else tirx.min(tir.i64(rows), height - first)
            return self._task(image, block, first, count)

        body = tir.parallel("task", self.batch * (chunks * self.blocks.count), task)
        return tir.function(self.name, [*self.operands, *self.emitter.inputs, *self.emitter.outputs], body)

    def _task(self, image, block, first_row, count):
        depth_start, bind_start = self._first_channel(block)

        def row(i):
            y, bind_y = tir.bind("row", first_row + i)
            taps_first, taps_count = windows.row_taps(self.window, y)
            first, bind_first = tir.bind("first", tir.i64(taps_first))
            count, bind_count = tir.bind("count", tir.i64(taps_count)) if tir.static(taps_count) is None else (taps_count, [])
            at = _Place(image, y, block, first, count, depth_start)
            return [bind_y, bind_first, bind_count, [self._run(at, run) for run in windows.column_runs(self.window, self.schedule.pixels)]]

        return [bind_start, tir.for_("y", count, row)]

    def _first_channel(self, block):
        """First input channel of a block: a linear function of the block where there is one, else a chain of selects."""
        first = self.blocks.first
        step = first[1] - first[0] if len(first) > 1 else 0
        if all(value == first[0] + b * step for b, value in enumerate(first)):
            return tir.bind("channel", block * step + first[0])
        value = tir.i64(first[-1])
        for b in reversed(range(len(first) - 1)):
            value = tirx.Select(block <= b, tir.i64(first[b]), value)
        return tir.bind("channel", value)

    def _run(self, at, run):
        return tir.for_("tile", run.count, lambda number: self._tile(at, run.first_pixel(number), run.taps))

    def _tile(self, at, x, taps):
        pixels, vectors, lanes = self.schedule.pixels, self.schedule.vectors, self.lanes
        sums = tir.Registers("sum", pixels * vectors, "float32", lanes)
        clear = sums.fill(tir.splat(0.0, "float32", lanes))
        reduce = tir.for_("r", at.count, lambda r: self._row_of_taps(at, x, at.first + r, taps, sums)) if taps else []
        scope, finish = {}, []
        for p in range(pixels):
            values = [sums.get(p * vectors + v) for v in range(vectors)]
            position = (at.image, *self._pixel(at.row, x + p))
            finish.append(self.emitter.emit(values, position, at.block * self.blocks.size, scope))
        return [sums.allocate, clear, reduce, finish]

    def _pixel(self, y, x):
        """Row and column in the buffers; a flattened image is addressed as one row."""
        return (tir.i64(0), y * self.window.in_width + x) if self.flat else (y, x)

    def _row_of_taps(self, at, x, r, taps, sums):
        """All products of tap row ``r``."""
        if self.schedule.shared:
            return tir.for_("c", self.blocks.depth, lambda c: self._shared_columns(at, x, r, c, taps, sums))
        return [self._separate_columns(at, x, r, group, sums) for group in taps]

    def _value(self, at, x, r, column, c):
        array, indices = self._place(at, x, r, column, c)
        return tir.load(array, *indices)

    def _place(self, at, x, r, column, c):
        """Array and indices of the input value at row of taps ``r``, ``column`` columns from the first tap of output column ``x``."""
        window = self.window
        y = at.row * window.strides[0] - window.pads[0] + r * window.dilations[0]
        pixel, channel = self._pixel(y, x * window.strides[1] - window.pads[1] + column), at.channel + c
        return self.data, [at.image, *((channel, *pixel) if self.spec.planar else (*pixel, channel))]

    def _weight(self, at, r, s, c, v):
        """Vector ``v`` of the weights of tap (r, s) and the block's input channel ``c``."""
        return tir.load_vector(self.weights, [at.block, r, s, c, v * self.lanes], self.lanes)

    def _shared_columns(self, at, x, r, c, taps, sums):
        """Products of input channel ``c``, each value loaded once."""
        body, weights, vectors, lanes = [], {}, self.schedule.vectors, self.lanes
        for s in sorted({s for group in taps for s in range(group.first, group.stop)}):
            for v in range(vectors):
                weights[s, v], statement = tir.bind("w", self._weight(at, r, s, c, v))
                body.append(statement)
        used = windows.column_uses(self.window, taps)
        lanes_of = self._columns(at, x, r, c, sorted(used), body) if self.spec.planar and float_neon.by_element(self.isa) else {}
        for column, uses in used.items():
            if self.gather:
                values = [self._gathered(at, x, r, column, c, v) for v in range(vectors)]
            elif column in lanes_of:
                values = [lanes_of[column]]
            else:
                values = [tir.broadcast(self._value(at, x, r, column, c), lanes)]
            named = [(value, []) if column in lanes_of else tir.bind("x", value) for value in values]
            body += [statement for _, statement in named]
            for p, s in uses:
                for v in range(vectors):
                    index = p * vectors + v
                    body.append(sums.set(index, sums.get(index) + named[v % len(named)][0] * weights[s, v]))
        return body

    def _columns(self, at, x, r, c, columns, body):
        """Columns of a planar row, which lie side by side, four in a register; statements that load them go to ``body``."""
        found = {}
        for first in range(columns[0], columns[-1] - 2, 4):
            array, indices = self._place(at, x, r, first, c)
            value, bind = tir.bind("x", tir.load_vector(array, indices, 4))
            body.append(bind)
            found.update({first + lane: tir.shuffle([value], [lane] * self.lanes) for lane in range(4)})
        return found

    def _gathered(self, at, x, r, column, c, v):
        """Channel ``c`` of each lane's group, for vector ``v`` of the block: broadcasts, merged."""
        value, lanes = None, self.lanes
        for group in range(self.gather.groups):
            channel = c + (v * self.gather.span + group * self.gather.per_in)
            if self.spec.out_channels % self.blocks.size:  # the last block has groups that do not exist
                channel = tirx.min(channel, self.spec.in_channels - 1 - at.channel)
            one = tir.broadcast(self._value(at, x, r, column, channel), lanes)
            value = one if value is None else tirx.Select(tir.prefix_mask(group * self.gather.per_out, lanes), value, one)
        return value

    def _separate_columns(self, at, x, r, group, sums):
        """Products of the taps of ``group``, which all meet the same pixels."""
        window, depth, vectors, ahead = self.window, self.blocks.depth, self.schedule.vectors, self.schedule.ahead

        def step(s, c):
            def value(p):
                return self._value(at, x, r, p * window.strides[1] + s * window.dilations[1], c)

            def weight(v):
                return self._weight(at, r, s, c, v)

            fetch = [tir.prefetch(self.weights, [at.block, r, s, c + ahead, v * self.lanes]) for v in range(vectors) if ahead]
            return [fetch, multiply_add(sums, range(group.low, group.high), vectors, value, weight)]

        taps = group.stop - group.first
        if contiguous(self.spec) and (window.dilations[1] == 1 or taps == 1):  # taps are neighbours: run on through the channels
            first = tir.i64(group.first)
            if float_neon.by_element(self.isa):

                def data(p, k):
                    return self._place(at, x, r, p * window.strides[1] + first * window.dilations[1], k)

                def vector(k, v):
                    return self._weight(at, r, first, k, v)

                rows, vectors = range(group.low, group.high), self.schedule.vectors
                return float_neon.reduction(sums, rows, vectors, data, vector, taps * depth, lambda k: step(first, k))
            return tir.for_("k", taps * depth, lambda k: step(tir.i64(group.first), k))
        return tir.for_("s", taps, lambda s: tir.for_("c", depth, lambda c: step(group.first + s, c)))


@dataclass(frozen=True)
class _Place:
    """Where a row of tiles is: image, output row, block of output channels, first row of taps and their number, first input channel."""

    image: tirx.Var
    row: tirx.Var
    block: object
    first: object
    count: object
    channel: object


def multiply_add(sums, pixels, vectors, value, weight):
    """One step of a reduction: ``sums[p, v] += value(p) * weight(v)``.

    Parameters
    ----------
    sums : tir.Registers
        P * vectors float32 vectors.
    pixels : range
        The p that take part.
    value, weight : functions
        ``value(p)`` is a scalar expression, ``weight(v)`` a vector.

    Returns
    -------
    list of statements
    """
    body = []

    def name(prefix, expression):
        variable, statement = tir.bind(prefix, expression)
        body.append(statement)
        return variable

    def accumulate(p, v, a, w):
        index = p * vectors + v
        body.append(sums.set(index, sums.get(index) + a * w))

    if vectors <= len(pixels):  # the fewer operands stay in registers, the others pass through
        weights = [name("w", weight(v)) for v in range(vectors)]
        for p in pixels:
            a = name("x", tir.broadcast(value(p), sums.lanes))
            for v in range(vectors):
                accumulate(p, v, a, weights[v])
    else:
        values = {p: name("x", tir.broadcast(value(p), sums.lanes)) for p in pixels}
        for v in range(vectors):
            w = name("w", weight(v))
            for p in pixels:
                accumulate(p, v, values[p], w)
    return body


# Reference ----------------------------------------------------------------------------------------------------------------------------


def reference(spec, operands, epilogue_inputs):
    """The layer in numpy.

    Parameters
    ----------
    operands : list
        data float32 ``[N, H, W, I]``, weights float32 ``[O, kh, kw, I / groups]``.
    epilogue_inputs : list of ndarray

    Returns
    -------
    list of ndarray
        One for each output of the epilogue.
    """
    data, weights = (np.asarray(a, np.float64) for a in operands)
    window, groups = spec.window, spec.groups
    top, left, bottom, right = window.pads
    data = data.transpose(0, 2, 3, 1) if spec.planar else data
    padded = np.pad(data, ((0, 0), (top, bottom), (left, right), (0, 0)))
    height, width = window.out_height, window.out_width
    per_in, per_out = spec.in_channels // groups, spec.out_channels // groups
    result = np.zeros((len(data), height, width, spec.out_channels))
    for r in range(window.kernel[0]):
        for s in range(window.kernel[1]):
            y, x = r * window.dilations[0], s * window.dilations[1]
            taps = padded[:, y : y + (height - 1) * window.strides[0] + 1 : window.strides[0]]
            taps = taps[:, :, x : x + (width - 1) * window.strides[1] + 1 : window.strides[1]]
            for g in range(groups):
                out = slice(g * per_out, (g + 1) * per_out)
                result[..., out] += taps[..., g * per_in : (g + 1) * per_in] @ weights[out, r, s].T
    return epilogues.reference(spec.epilogue, result.astype(np.float32), epilogue_inputs)
