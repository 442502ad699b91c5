"""Convolutions by tiles in shared memory: what the float and the 8-bit families have in common.

A block computes a tile of pixels by 32-bit words of output channels. It walks the input channels in chunks: the patch of the image that the
tile's windows cover and the chunk's weights are brought to shared memory, then every thread adds the products of its 8 pixels and 8
channels, all taps of them. So an input value is read from memory once for all taps, and index arithmetic stays out of the inner loop.

A *unit* is what one multiplication takes of a pixel: a float of one channel, or the bytes of four channels.

Layouts
-------
A warp has 64 pixels and a word of channels. Lane 4 g + t has the pixels g, g + 8, ..., g + 56 of the warp's and of the word's channels 4
t to 4 t + 3 and 16 + 4 t to 16 + 4 t + 3: what the lanes of a warp read of the patch at once lies side by side, and so do the weights.

Shared memory: the patch ``[units][rows][columns]``, planes an odd number of words apart; the weights ``[taps][units][channels of the
block]``.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import cells, functions, simt
from bnntvm.schedules.cuda import epilogue as tail

WARP_PIXELS, WORD, SIDE = 64, 32, functions.SIDE
#: Shared memory of a block, so that several fit on a multiprocessor.
_SHARED_WORDS = 10 << 10
_CHUNKS = (32, 16, 8, 4, 2, 1)
_TOGETHER = 8  # loads of a thread that are under way at a time


@dataclass(frozen=True)
class Schedule:
    """What may be tuned.

    Attributes
    ----------
    warps : tuple of int
        Warps along the pixels and along the channels of a block's tile.
    shape : tuple of int
        Rows and columns of a warp's 64 pixels; ``(0, 64)``: pixels are counted through all images (1x1 kernels without padding).
    units : int
        Units of a chunk.
    """

    warps: tuple[int, int]
    shape: tuple[int, int]
    units: int


@dataclass(frozen=True)
class Problem:
    """A convolution as tiles see it.

    Attributes
    ----------
    window : spec.Window
    units : int
        Units of a pixel.
    out_channels : int
    channels_last : bool
        Whether neighbouring units of a pixel, else neighbouring pixels of a unit lie side by side.
    """

    window: object
    units: int
    out_channels: int
    channels_last: bool

    @property
    def pointwise(self):
        """Whether a tile needs no patch."""
        return self.window.kernel == (1, 1) and not any(self.window.pads)

    @property
    def taps(self):
        return self.window.kernel[0] * self.window.kernel[1]

    @property
    def words(self):
        return -(-self.out_channels // WORD)


def schedules(problem):
    """Valid schedules, a good one first; none where not even one unit of a tile fits in shared memory."""
    warps = [(2, 4), (4, 2), (8, 1)]
    first = 0 if problem.words >= 4 else 1 if problem.words >= 2 else 2
    found = []
    for pair in [warps[first], *warps[:first], *warps[first + 1 :]]:
        if pair[1] > 1 and pair[1] >= 2 * problem.words:
            continue
        for shape in [(0, WARP_PIXELS)] if problem.pointwise else shapes(problem.window, pair[0]):
            fitting = [u for u in _CHUNKS if u <= 2 * problem.units and _shared_words(problem, pair, shape, u) <= _SHARED_WORDS]
            for units in fitting[:2]:
                found.append(Schedule(pair, shape, units))
    return found


def shapes(window, rows_of_warps):
    """Shapes of a warp's pixels, the one that computes the fewest that do not exist first."""

    def computed(shape):
        high, wide = shape[0] * rows_of_warps, shape[1]
        return -(-window.out_height // high) * high * (-(-window.out_width // wide) * wide)

    return sorted([(8, 8), (4, 16), (2, 32), (1, 64)], key=computed)[:2]


def patch(problem, warps, shape):
    """Rows, columns, and words of a unit's plane of the patch."""
    window = problem.window
    if problem.pointwise:
        size = WARP_PIXELS * warps[0]
        return 1, size, size | 1
    rows = (shape[0] * warps[0] - 1) * window.strides[0] + (window.kernel[0] - 1) * window.dilations[0] + 1
    columns = (shape[1] - 1) * window.strides[1] + (window.kernel[1] - 1) * window.dilations[1] + 1
    return rows, columns, (rows * columns) | 1


def _shared_words(problem, warps, shape, units):
    return -(-units * patch(problem, warps, shape)[2] // 4) * 4 + problem.taps * units * warps[1] * WORD


def padded(problem, schedule):
    """``(units, channels)`` of the weights' array: whole chunks and blocks."""
    units = -(-problem.units // schedule.units) * schedule.units
    block = schedule.warps[1] * WORD
    return units, -(-problem.out_channels // block) * block


class Kernel:
    """Writes one convolution.

    Parameters
    ----------
    name : str
    problem : Problem
    schedule : Schedule
    emitter : epilogue.Emitter
    params : list of Buffer
        The anchor's operands.
    batch : int64 expression
    load_unit, load_weight : callable
        ``load_unit(image, y, x, unit, exists)`` and ``load_weight(tap, unit, channel)``: the 32 bits that a multiplication takes; both
        return ``(statements, expression)``. A unit may be one past the last, of a pixel that is not there, or not exist: it is 0 then.
        ``weight``s are asked for up to :func:`padded`.
    products : str
        The device function that multiplies: ``bnn_outer`` or one of the ``bnn_dots``.
    dtype : str
        Of the sums.
    """

    def __init__(self, name, problem, schedule, emitter, params, batch, load_unit, load_weight, products="bnn_outer", dtype="float32"):
        self.name, self.problem, self.schedule, self.emitter, self.params = name, problem, schedule, emitter, params
        self.batch, self.load_unit, self.load_weight = batch, load_unit, load_weight
        self.products, self.dtype = products, dtype
        self.rows, self.columns, self.plane = patch(problem, schedule.warps, schedule.shape)
        self.threads = 32 * schedule.warps[0] * schedule.warps[1]
        self.block_channels = schedule.warps[1] * WORD
        self.weights_at = -(-schedule.units * self.plane // 4) * 4
        self.lead = 0  # columns of the patch in front of those that windows cover

    def function(self):
        grid = simt.i32(self._tiles() * self.channel_blocks)
        params = [*self.params, *self.emitter.inputs, *self.emitter.outputs]
        return _two_blocks(simt.kernel(self.name, params, grid, self.threads, self._body))

    @property
    def channel_blocks(self):
        """Blocks along the output channels."""
        return -(-self.problem.words // self.schedule.warps[1])

    def _tiles(self):
        """Tiles of pixels, an int64 expression."""
        window, shape = self.problem.window, self.schedule.shape
        if self.problem.pointwise:
            return simt.ceil_div(simt.wide(self.batch) * (window.out_height * window.out_width), self.columns)
        self.high, self.wide = shape[0] * self.schedule.warps[0], shape[1]
        self.down, self.across = -(-window.out_height // self.high), -(-window.out_width // self.wide)
        return simt.wide(self.batch) * (self.down * self.across)

    # Where a thread is

    def _body(self, block, thread):
        words = self.weights_at + self.problem.taps * self.schedule.units * self.block_channels
        self.shared, allocate = simt.shared(words)
        self.sums, allocate_sums = simt.registers("sums", SIDE * SIDE, self.dtype)
        self.x, allocate_x = simt.registers("tile_x", SIDE, "uint32")
        self.w, allocate_w = simt.registers("tile_w", SIDE, "uint32")
        named = []
        bind = simt.namer(named)
        self._who(bind, block, thread)
        self._where(bind, bind("tile", simt.div(block, self.channel_blocks)))
        self.patch_base, self.offsets = self._patch_places(bind)
        clear = [simt.put(self.sums, i, tir.constant(0, self.dtype)) for i in range(SIDE * SIDE)]
        chunks = padded(self.problem, self.schedule)[0] // self.schedule.units
        walk = simt.loop("chunk", chunks, self._chunk, rolled=True)
        allocations = [allocate, allocate_sums, allocate_x, allocate_w]
        return [*allocations, *self.emitter.declarations, *named, *clear, walk, *self._finish()]

    def _who(self, bind, block, thread):
        """Names for the thread's place in its warp and the warp's in the block, and the block's first word of channels."""
        self.thread = thread
        lane, warp = bind("lane", tirx.bitwise_and(thread, simt.i32(31))), simt.div(thread, 32)
        self.lane, self.group, self.quad = lane, bind("group", simt.div(lane, 4)), bind("quad", tirx.bitwise_and(lane, simt.i32(3)))
        self.warp_row = bind("warp_row", simt.div(warp, self.schedule.warps[1]))
        self.warp_word = bind("warp_word", simt.mod(warp, self.schedule.warps[1]))
        self.first_word = bind("first_word", simt.mod(block, self.channel_blocks) * self.schedule.warps[1])

    def _where(self, bind, tile):
        """Names for the place of a tile: its first pixel of all, or its image and place there."""
        if self.problem.pointwise:
            self.first_pixel = bind("first_pixel", tile * self.columns)
            self.total = bind("pixels", simt.i32(simt.wide(self.batch) * (self.problem.window.out_height * self.problem.window.out_width)))
            return
        self.image = bind("image", simt.div(tile, self.down * self.across))
        place = bind("place", simt.mod(tile, self.down * self.across))
        self.top, self.left = (
            bind("top", simt.div(place, self.across) * self.high),
            bind("left", simt.mod(place, self.across) * self.wide),
        )

    def _patch_places(self, bind):
        """``(expression, ints)``: where the patch's words for the thread's first pixel begin, and how much further the others are."""
        window, shape = self.problem.window, self.schedule.shape
        if self.problem.pointwise:
            return bind("base", self.warp_row * WARP_PIXELS + self.group), [8 * j for j in range(SIDE)]
        down = self.columns * window.strides[0]
        base = bind("base", self.warp_row * (shape[0] * down) + self.group * window.strides[1] + self.lead)
        return base, [8 * j // shape[1] * down + 8 * j % shape[1] * window.strides[1] for j in range(SIDE)]

    # One chunk of input channels

    def _chunk(self, chunk):
        first, named = simt.bind("unit", chunk * self.schedule.units)
        return [named, simt.sync(), *self._bring_patch(first), *self._bring_weights(first), simt.sync(), self._multiply()]

    def _each(self, count, body):
        """Bring ``count`` words to shared memory: ``body(index)`` is ``(statements, place, word)``.

        A few words of a thread are under way together; more would take the registers of the sums.
        """
        steps = -(-count // self.threads)
        together = -(-steps // -(-steps // _TOGETHER))
        partial = count % (self.threads * together)

        def step(i):
            loads, stores = [], []
            for number in range(together):
                index, named = simt.bind("index", (i * together + number) * self.threads + self.thread)
                # A thread that has no word left reads the last one once more.
                safe, named_safe = simt.bind("safe", tirx.min(index, simt.i32(count - 1))) if partial else (index, [])
                statements, place, value = body(safe)
                value, named_value = simt.bind("word", value)
                store = simt.put(self.shared, place, value)
                loads.append([named, named_safe, *statements, named_value])
                stores.append(tirx.IfThenElse(index < count, store, None) if partial else store)
            return [*loads, *stores]

        return simt.loop("step", -(-steps // together), step, rolled=True)

    def _bring_patch(self, first):
        units, size = self.schedule.units, self.rows * self.columns

        def one(index):
            if self.problem.channels_last:
                unit, at = simt.mod(index, units), simt.div(index, units)
            else:
                unit, at = simt.div(index, size), simt.mod(index, size)
            unit, named_unit = simt.bind("u", unit)
            at, named_at = simt.bind("at", at)
            statements, value = self._patch_value(first + unit, at)
            return [named_unit, named_at, *statements], unit * self.plane + at, value

        return [self._each(units * size, one)]

    def _patch_value(self, unit, at):
        body = []
        image, y, x, exists = self._source(simt.namer(body), at)
        statements, value = self.load_unit(image, y, x, unit, self._unit_exists(unit, exists))
        return [*body, *statements], value

    def _source(self, bind, at):
        """``(image, y, x, whether there is such a pixel)`` of place ``at`` of the patch."""
        window = self.problem.window
        if self.problem.pointwise:
            pixel = bind("pixel", self.first_pixel + at)
            inside, image = simt.mod(pixel, window.out_height * window.out_width), simt.div(pixel, window.out_height * window.out_width)
            y, x = simt.div(inside, window.out_width) * window.strides[0], simt.mod(inside, window.out_width) * window.strides[1]
            return image, y, x, pixel < self.total
        y = bind("y", self.top * window.strides[0] - window.pads[0] + simt.div(at, self.columns))
        x = bind("x", self.left * window.strides[1] - (window.pads[1] + self.lead) + simt.mod(at, self.columns))
        return self.image, y, x, cells.within(y, window.in_height, x, window.in_width)

    def _unit_exists(self, unit, exists):
        return exists if self.problem.units % self.schedule.units == 0 else tirx.And(exists, unit < self.problem.units)

    def _bring_weights(self, first):
        units, channels = self.schedule.units, self.block_channels

        def one(index):
            row, column = simt.div(index, channels), simt.mod(index, channels)
            statements, value = self.load_weight(simt.div(row, units), first + simt.mod(row, units), self.first_word * WORD + column)
            return statements, self.weights_at + index, value

        return [self._each(self.problem.taps * units * channels, one)]

    def _multiply(self):
        window, units = self.problem.window, self.schedule.units
        word, column = self.warp_word * WORD, self.quad * 4

        def unit(r, u):
            body, tap_row = [], r * window.kernel[1]
            for s in range(window.kernel[1]):
                at = u * self.plane + self.patch_base + (r * (window.dilations[0] * self.columns) + s * window.dilations[1])
                at, named = simt.bind("from", at)
                body.append(named)
                body += [simt.put(self.x, j, simt.at(self.shared, at + offset)) for j, offset in enumerate(self.offsets)]
                row, named = simt.bind("weights", ((tap_row + s) * units + u) * self.block_channels + (word + column + self.weights_at))
                body.append(named)
                body += [simt.do("bnn_load4", simt.pointer(self.w, 4 * h), simt.pointer(self.shared, row + 16 * h)) for h in (0, 1)]
                arrays = [simt.pointer(array, 0) for array in (self.sums, self.x, self.w)]
                body.append(simt.do(self.products, *arrays))
            return body

        return simt.loop("r", window.kernel[0], lambda r: simt.loop("u", units, lambda u: unit(r, u)))

    # Results

    def _finish(self):
        word, named = simt.bind("word", self.first_word + self.warp_word)
        exists = None if self.problem.words % self.schedule.warps[1] == 0 else word < self.problem.words
        scope, body = {}, [named]
        many = sum(one.kind == "channel" for one in self.emitter.epilogue.inputs) > 1  # too many to stay in registers for all pixels
        for j in range(SIDE):
            statements, pixel = self._pixel(j)
            values = []
            for i in range(SIDE):
                values.append(tail.Value(simt.at(self.sums, SIDE * j + i), self.quad * 4, i % 4 + 16 * (i // 4)))
            body += [*statements, *self.emitter.emit(values, pixel, word, tail.Quad(self.lane), {} if many else scope, exists)]
        return body

    def _pixel(self, j):
        """``(statements, Pixel)`` of a thread's pixel j, an int or an expression."""
        window, shape = self.problem.window, self.schedule.shape
        down, across = divmod(8 * j, shape[1]) if isinstance(j, int) else (simt.div(8 * j, shape[1]), simt.mod(8 * j, shape[1]))
        area = window.out_height * window.out_width
        if self.problem.pointwise:
            number, named = simt.bind("row", self.first_pixel + self.warp_row * WARP_PIXELS + self.group + 8 * j)
            return [named], tail.Pixel(simt.wide(number), simt.div(number, area), simt.mod(number, area), number < self.total)
        y, named_y = simt.bind("y", self.top + self.warp_row * shape[0] + down)
        x, named_x = simt.bind("x", self.left + self.group + across)
        exists, named = simt.bind("exists", tirx.And(y < window.out_height, x < window.out_width))
        inside = y * window.out_width + x
        row = simt.wide(self.image) * area + simt.wide(inside)
        return [named_y, named_x, named], tail.Pixel(row, self.image, inside, exists)


def _two_blocks(function):
    """A kernel of which two blocks have to fit on a multiprocessor: one brings a chunk while the other multiplies.

    The compiler would give long epilogues more registers than that leaves.
    """
    outer, inner = function.body, function.body.body
    body = tirx.AttrStmt(tir.constant(0, "int32"), "tirx.launch_bounds_min_blocks_per_sm", tir.constant(2, "int32"), inner.body)
    inner = tirx.AttrStmt(inner.node, inner.attr_key, inner.value, body)
    return function.with_body(tirx.AttrStmt(outer.node, outer.attr_key, outer.value, inner))
