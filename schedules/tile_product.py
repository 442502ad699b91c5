"""1x1 convolutions of bit planes whose result is stored in channel order, as products of bytes in tile registers (AMX).

``float32[O, pixels] = weights[O, K] x data[K, pixels]``: rows of a tile of sums are output channels and its columns pixels, so that a row
is stored to its plane as it is. Nothing is transposed but the packed input, word by word.

* Data: nibbles of words, of 16 pixels each, become four bytes by one look-up in a register (VPERMD): 16 quads of channels are the
  right operand of a product. The bytes of a group of pixels stay in the first-level cache while all channels are computed.
* Weights: 64 bits of an output channel are a row of the left operand. They become bytes some steps before they are used.

Vector units unpack weights and store the results of the job before while tiles are multiplied. Both together need little of the first-level
cache: what comes from the second-level cache competes with the results on their way there.
"""

from __future__ import annotations

import numpy as np
from tvm import tirx

from bnntvm.schedules import epilogue as tail
from bnntvm.schedules import tir as T
from bnntvm.schedules.int8_tiles import TILE, TILE_BYTES, configure, tile
from bnntvm.schedules.transpose import square
from bnntvm.spec import words

#: ``Schedule.adder`` of this way to count; then ``vectors`` and ``pixels`` are the tiles of channels and of pixels of a job, and
#: ``task_rows`` the groups of so many tiles of pixels that belong to a task, which has all channels.
ADDER = "planes"
_QUADS = 8  #: quads of channels in a word
#: Steps between the unpacking of weights and their use, and steps of which weights are kept: a tile cannot be loaded from stores that wait
#: for products before them, and what is kept shares the first-level cache with the data.
LEAD, RING = 3, 4


def claims(spec, isa):
    """Whether the kernel can do it: planar results of a plain 1x1 kernel, whole tiles of channels, no operand but per channel."""
    window, outputs = spec.window, spec.epilogue.outputs
    plain = window.kernel == (1, 1) and window.strides == (1, 1) and not any(window.pads) and spec.groups == 1 and not spec.plus_one
    whole = spec.in_channels % TILE_BYTES == 0 and spec.out_channels % (2 * TILE) == 0
    planar = [o.kind for o in outputs] == ["planar"] and all(i.kind == "channel" for i in spec.epilogue.inputs)
    return isa.products == "tiles" and plain and whole and planar


def wins(spec, isa):
    """Whether it is expected to be faster than counting bits."""
    return claims(spec, isa) and _cycles(spec) < _counting_cycles(spec)


def _cycles(spec):
    """Estimated cycles for an image, from times on an Emerald Rapids processor: 64 for a step of two by two tiles, 40 for one of a single
    column, 3.3 for 16 pixels of a channel on their way out and 2 for as many quads of channels on their way in."""
    tiles, steps = -(-spec.window.in_height * spec.window.in_width // TILE), spec.in_channels // TILE_BYTES
    products = (64 * (tiles // 2) + 40 * (tiles % 2)) * steps * spec.out_channels // (2 * TILE)
    return products + 3.3 * tiles * spec.out_channels + 2 * tiles * steps * TILE


def _counting_cycles(spec):
    """The same for the kernel that counts bits."""
    pixels = spec.window.in_height * spec.window.in_width
    return pixels * spec.out_channels * (spec.in_channels / 412 + 3 / TILE)


#: Cycles of a task that are worth starting one: it begins and ends with vectors and tiles in turn.
_TASK_CYCLES = 40000


def numbers(spec):
    """``(pixels, vectors, task_rows)`` of the default schedule: two by two tiles, each loaded once for two products."""
    groups = -(-spec.window.in_height * spec.window.in_width // (2 * TILE))
    tasks = max(1, min(8, groups, int(_cycles(spec) / _TASK_CYCLES)))
    return 2, 2, -(-groups // tasks)


def space(spec):
    """The same of the schedules worth trying."""
    found = []
    for pixels, channels in ((2, 2), (1, 2), (1, 4), (3, 1)):
        if spec.out_channels % (channels * TILE) == 0:
            groups = -(-spec.window.in_height * spec.window.in_width // (pixels * TILE))
            found += [(pixels, channels, -(-groups // tasks)) for tasks in (1, 2, 4, 8)]
    return list(dict.fromkeys([numbers(spec), *found]))


def pack_weights(spec, weights):
    """uint8[O / 16, K / 64 * 16 * 8] from ``uint32[O, 1, 1, words(K)]``: for 64 input channels after 64 the bits of 16 output channels."""
    bits = np.ascontiguousarray(weights.reshape(spec.out_channels, -1), "<u4").view(np.uint8)
    bits = bits.reshape(spec.out_channels // TILE, TILE, spec.in_channels // TILE_BYTES, TILE_BYTES // 8)
    return np.ascontiguousarray(bits.swapaxes(1, 2)).reshape(len(bits), -1)


class Kernel:
    """Builds one PrimFunc.

    Parameters
    ----------
    spec : BinaryConv2d
    schedule : binary_conv2d.Schedule
    isa : Isa
    """

    def __init__(self, spec, schedule, isa):
        self.spec, self.schedule, self.isa, self.lanes = spec, schedule, isa, isa.lanes
        self.down, self.across = schedule.vectors, schedule.pixels  # tiles of a job
        self.rows = self.down * TILE
        self.blocks = spec.out_channels // self.rows
        self.steps, self.words = spec.in_channels // TILE_BYTES, words(spec.in_channels)
        self.pixels = spec.window.in_height * spec.window.in_width
        self.tiles = -(-self.pixels // TILE)
        self.groups = -(-self.tiles // self.across)

    def build(self):
        spec, batch = self.spec, tirx.Var("n", "int64")
        dims = (batch, spec.window.in_height, spec.window.in_width)
        self.planes = [T.buffer(name, (*dims, self.words), "uint32") for name in ["data", *(["zeros"] if spec.zeros else [])]]
        self.weights = T.buffer("weights", (spec.out_channels // TILE, self.steps * TILE * TILE_BYTES // 8), "uint8")
        self.emitter = tail.Emitter(spec.epilogue, spec.out_channels, self.isa, dims, "int32")
        params = [self.planes[0], self.weights, *self.planes[1:], *self.emitter.inputs, *self.emitter.outputs]
        image = tirx.Var("image", "int64")
        return T.function("binary_conv2d_tiles", params, tirx.For(image, T.i64(0), batch, tirx.ForKind.SERIAL, self.image(image)))

    def image(self, image):
        """Tasks of some groups of pixels."""
        self.image_number = image
        each = self.schedule.task_rows
        return T.parallel("task", -(-self.groups // each), lambda number: self.task(number * each))

    # Data -----------------------------------------------------------------------------------------------------------------------------

    def data_tiles(self, group):
        """Statements that write the bytes of a group's pixels; those behind the last one are copies of it."""

        def one(j):
            rows = [T.bind("pixel", tirx.min((group * self.across + j) * TILE + row, T.i64(self.pixels - 1))) for row in range(TILE)]
            at, bind_at = T.bind("at", j * (self.steps * TILE * TILE_BYTES))
            pixels, binds = zip(*rows)
            whole, rest = divmod(self.words, TILE)
            parts = [T.for_("part", whole, lambda part: self.data_words(pixels, at, part * TILE, TILE))] if whole else []
            return [binds, bind_at, parts, self.data_words(pixels, at, T.i64(whole * TILE), rest) if rest else []]

        return T.for_("tile", tirx.min(T.i64(self.across), self.tiles - group * self.across), one)

    def data_words(self, pixels, at, word, count):
        """The bytes of ``count`` words of 16 pixels."""
        columns, body = zip(*(self.columns(plane, pixels, word, count) for plane in self.planes))
        low, high = (0, 1) if self.spec.unipolar else (1, -1)
        stores = []
        for i in range(count):
            for quad in range(_QUADS):
                shift = T.splat(quad * 4, "uint32", TILE)
                value = nibble_bytes(columns[0][i] >> shift, low, high)
                if self.spec.zeros:
                    value = value & nibble_bytes(columns[1][i] >> shift, -1, 0)
                place = at + ((word + i) * _QUADS + quad) * TILE_BYTES
                stores.append(T.store_vector(self.right, [place], tirx.reinterpret(T.vector_type("int8", TILE_BYTES), value)))
        return [*body, stores]

    def columns(self, plane, pixels, word, count):
        """``(vectors, statements)``: words ``word ... word + count - 1`` of 16 pixels, a vector for each word."""

        def load(row, column, size):
            return T.load_vector(plane, [self.image_number, 0, pixels[row], word + column], size)

        if count == TILE:
            body, vectors = square(lambda i, j: tirx.reinterpret("float32x4", load(i, j, 4)), TILE)
            return [tirx.reinterpret(T.vector_type("uint32", TILE), v) for v in vectors], body
        vectors, body = [], []
        for column in range(count):
            spill, allocate = T.local("column", TILE, "uint32")
            body += [allocate, [T.store(spill, load(row, column, 1), row) for row in range(TILE)]]
            vectors.append(T.load_vector(spill, [0], TILE))
        return vectors, body

    # Products -------------------------------------------------------------------------------------------------------------------------

    def task(self, first_group):
        """The groups of pixels of a task, each with all blocks of channels."""
        self.right, right = T.memory("right", self.across * self.steps * TILE * TILE_BYTES, "int8")
        self.left, left = T.memory("left", RING * self.rows * TILE_BYTES, "int8")
        self.results, results = T.memory("results", self.rows * self.pitch, "int32")
        groups = _count(self.groups, self.schedule.task_rows, first_group)
        jobs, bind_jobs = T.bind("jobs", groups * self.blocks)

        def job(number):
            group, bind_group = T.bind("group", first_group + number // self.blocks)
            block, bind_block = T.bind("block", number % self.blocks)
            return [bind_group, bind_block, T.when(block == 0, self.data_tiles(group)), self.job(number, group, block)]

        last = first_group + groups - 1
        drain = T.for_("row", self.rows, lambda row: self.result(row, T.i64(self.blocks - 1), last))
        ahead = [self.unpack(T.i64(step // self.steps % self.blocks), T.i64(step % self.steps), T.i64(step)) for step in range(LEAD)]
        return [right, left, results, bind_jobs, configure(TILE), ahead, T.for_("job", jobs, job), drain, tile("release")]

    def job(self, number, group, block):
        """``down`` tiles of channels times ``across`` tiles of pixels."""
        last_block, bind_block = T.bind("last", tirx.Select(block == 0, T.i64(self.blocks - 1), block - 1))
        last_group, bind_group = T.bind("last", tirx.Select(block == 0, group - 1, group))
        done, bind_done = T.bind("done", number * self.steps)
        binds = [bind_block, bind_group, bind_done]

        def beside(step):
            share = -(-self.rows // self.steps)

            def row(i):
                r = step * share + i
                body = self.result(r, last_block, last_group)
                return T.when(r < self.rows, body) if share * self.steps > self.rows else body

            return [T.when(number > 0, T.for_("row", share, row)), self.unpack_ahead(block, step, done)]

        rest = self.tiles - (self.groups - 1) * self.across
        body = self.products(done, self.across, beside)
        if rest < self.across:
            body = T.when(group < self.groups - 1, body, self.products(done, rest, beside))
        return [binds, body]

    def products(self, done, across, beside):
        """The sums of a job of ``across`` tiles of pixels."""
        size = TILE * TILE_BYTES
        sums = [(i, j, i * across + j) for i in range(self.down) for j in range(across)]
        right = [len(sums) + j for j in range(across)]
        left = range(len(sums) + across, 8)

        def step(k):
            at, bind = T.bind("left", (done + k) % RING * (self.down * size))
            body = [bind]
            body += [tile("load", r, self.right, [(j * self.steps + k) * size], TILE_BYTES) for j, r in enumerate(right)]
            for i in range(self.down):
                register = left[i % len(left)]
                body.append(tile("load", register, self.left, [at + i * size], TILE_BYTES))
                body += [tile("dot_ssd", n, register, right[j]) for row, j, n in sums if row == i]
            return [body, beside(k)]

        start = [tile("zero", n) for *_, n in sums]
        keep = [tile("store", n, self.results, [i * TILE * self.pitch + j * TILE], 4 * self.pitch) for i, j, n in sums]
        return [start, T.for_("step", T.runtime(self.steps), step), keep]

    def unpack_ahead(self, block, step, done):
        """Statements that unpack the weights of a later step, of the next blocks too; behind the last block comes the first again."""
        later, bind = T.bind("later", block * self.steps + step + LEAD)
        total = self.blocks * self.steps
        later, bind_wrapped = T.bind("later", tirx.Select(later >= total, later - total, later) if total >= LEAD else later % total)
        return [bind, bind_wrapped, self.unpack(later // self.steps, later % self.steps, done + step + LEAD)]

    def unpack(self, block, step, number):
        """Statements that write the bytes of a step of a block's weights, the task's ``number``-th."""
        to, bind = T.bind("to", number % RING * (self.rows * TILE_BYTES))

        def vector(i):
            size = TILE_BYTES // 8
            where = [block * self.down + i // TILE, (step * TILE + i % TILE) * size]
            bits = tirx.reinterpret(f"uint{TILE_BYTES}", T.load_vector(self.weights, where, size))
            return T.store_vector(self.left, [to + i * TILE_BYTES], T.digits([bits], 1, (-2,)))

        return [bind, [vector(i) for i in range(self.rows)]]

    # Results --------------------------------------------------------------------------------------------------------------------------

    @property
    def pitch(self):
        """Elements of a row of results."""
        return self.across * TILE

    def result(self, row, block, group):
        """Statements that store what a job has of a channel."""
        channel, bind = T.bind("channel", block * self.rows + row)
        operands = [T.broadcast(T.load(array, channel), TILE) for array in self.emitter.inputs]
        at, bind_at = T.bind("at", row * self.pitch)
        last, body = self.tiles - (self.groups - 1) * self.across, [bind, bind_at]  # tiles of the last group
        for j in range(self.across):
            value, more = self.evaluate(T.load_vector(self.results, [at + j * TILE], TILE), operands)
            pixel = (group * self.across + j) * TILE
            where = [self.image_number, channel, 0, pixel]
            store = T.store_vector(self.emitter.outputs[0], where, value)
            if j >= last or j == last - 1 and self.pixels % TILE:
                masked = T.store_masked(self.emitter.outputs[0], where, value, T.prefix_mask(self.pixels - pixel, TILE))
                store = T.when(group < self.groups - 1, store, masked if j < last else None)
            body += [more, store]
        return body

    def evaluate(self, value, operands):
        """``(value of the output, statements)`` of the epilogue on a vector of sums of one channel."""
        body = []

        def bind(name, made):
            variable, statement = T.bind(name, made)
            body.append(statement)
            return variable

        values = [bind("sums", value), *operands]
        for number, one in enumerate(self.spec.epilogue.steps):
            values.append(bind("step", tail._apply(one, tail._operands(one, values, TILE), bind, self.emitter.exact(number))))
        return values[self.spec.epilogue.outputs[0].value], body


def _count(total, each, first):
    return T.i64(each) if total % each == 0 else tirx.min(T.i64(each), total - first)


def nibble_bytes(numbers, low, high):
    """uint32 lanes of four bytes: ``high`` for every set bit of the lowest four of a lane of ``numbers``, ``low`` for the others."""
    table = [sum(((high if n >> b & 1 else low) % 256) << (8 * b) for b in range(4)) for n in range(16)]
    name = f"bnn_nibble_bytes_{low % 256}_{high % 256}"
    entries = ", ".join(f"i32 {(v + 2**31) % 2**32 - 2**31}" for v in table)
    text = (f"<16 x i32> @{name}(<16 x i32> %n) alwaysinline nounwind {{\n"
            f"  %r = call <16 x i32> @llvm.x86.avx512.permvar.si.512(<16 x i32> <{entries}>, <16 x i32> %n)\n  ret <16 x i32> %r\n}}\n"
            "declare <16 x i32> @llvm.x86.avx512.permvar.si.512(<16 x i32>, <16 x i32>)")  # fmt: skip
    return T.extern(name, text, "uint32x16", numbers)
