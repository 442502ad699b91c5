"""Convolution of 8-bit integers: the family of :class:`bnntvm.spec.Int8Conv2d`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from tvm import tirx

from bnntvm.schedules import epilogue, int8_engines
from bnntvm.schedules import tir as T
from bnntvm.schedules.int8_kernel import Kernel
from bnntvm.schedules.int8_layout import Layout, weight_quads
from bnntvm.schedules.int8_tiles import HALVES
from bnntvm.schedules.int8_tiling import MOST_TILES, TILE, Tiling, product_cycles
from bnntvm.spec import Digits, words

#: Bytes of an image that a task goes over again and again, once for each block of output channels: a part of a second-level cache of 1 MiB.
_TASK_BYTES = 384 << 10


@dataclass(frozen=True)
class Schedule:
    """What may be tuned.

    Attributes
    ----------
    cover : int
        Flat pixels that are computed together; where tiles are used 16 times as many as tiles, at most 6.
    task_tiles, task_blocks : int
        Groups of ``cover`` flat pixels and blocks of 32 output channels of one parallel task.
    """

    cover: int
    task_tiles: int
    task_blocks: int


def default_schedule(spec, isa):
    """A schedule that is fast without tuning."""
    if isa.products == "tiles":
        return _tiled_schedule(spec, isa)
    layout = layout_of(spec, isa, 1)
    wide = isa.registers == 32
    most = {"vnni": 12, "pairs": 10 if wide else 4, "matrix": 6, "dot": 5, "long": 4 if wide else 2}[isa.products]
    cover = -(-layout.flat // -(-layout.flat // most))
    cover = cover if cover >= most // 2 or layout.flat < most else most
    layout = layout_of(spec, isa, cover)
    parts = min(layout.tiles, max(-(-layout.bytes // _TASK_BYTES), 8 if layout.tiles >= 32 else 1))
    return Schedule(cover, -(-layout.tiles // parts), _task_blocks(spec, max(1, 8 // parts)))


def _task_blocks(spec, wanted):
    """Blocks of each of about ``wanted`` equal tasks."""
    blocks = words(spec.out_channels)
    return blocks // max(d for d in range(1, wanted + 1) if blocks % d == 0)


#: Bytes of an image that tasks on tiles share: they read few lines for many products, and most of a second-level cache of 2 MiB will do.
_TILED_BYTES = 3 << 19
#: Cycles of the shortest task on tiles: the epilogue of its last job runs beside nothing, 0.3 us. Four threads find work in 200,000.
_TASK_CYCLES = 50_000


def _tiled_schedule(spec, isa):
    """As few groups as possible, their sizes equal; tasks are blocks of channels, whose weights become bytes once, and parts of images."""
    cover = MOST_TILES * TILE
    layout, whole = layout_of(spec, isa, cover), Schedule(cover, 1, 1)
    groups, _, _ = Tiling.of(layout).groups(MOST_TILES)
    wanted = int(max(1, min(8, image_cycles(spec, whole, isa) // _TASK_CYCLES)))
    parts = min(groups, -(-layout.bytes // _TILED_BYTES))
    task_blocks = _task_blocks(spec, max(1, wanted // parts))
    parts = max(parts, min(groups // 4, wanted * task_blocks // words(spec.out_channels)))
    return Schedule(cover, -(-groups // max(parts, 1)), task_blocks)


def tile_cycles(layout, most, tail):
    """Estimated cycles of one block of output channels whose tiles are computed up to ``most`` at a time.

    Measured on an Emerald Rapids processor, in cycles of its usual clock. Beside the products goes the work of the vector units: 25 cycles
    for the weights of a step, and for each pixel 20, two more for each step of the epilogue ``tail`` and five for each tensor it reads or
    stores. A step takes ten cycles on top of its products, a job 300. A line of a plane takes four cycles of the second-level cache.
    """
    tiling = Tiling.of(layout)
    groups, large, _ = tiling.groups(most)
    tensors = sum(operand.kind == "tensor" for operand in (*tail.inputs, *tail.outputs))
    planar = sum(output.kind == "planar" for output in tail.outputs)
    steps, pixels = HALVES * len(layout.runs) * layout.steps, tiling.tiles * tiling.rows
    products = (product_cycles(tiling.rows) * tiling.tiles + 10 * groups) * steps
    vectors = 25 * steps * groups + pixels * (20 + 2 * len(tail.steps) + 5 * tensors)
    return max(products, vectors) + 300 * groups + 8 * planar * pixels


def image_cycles(spec, schedule, isa):
    """Estimated cycles of the whole kernel on tiles, one image: the copy of the input is four for each vector."""
    layout = layout_of(spec, isa, schedule.cover)
    return tile_cycles(layout, schedule.cover // TILE, spec.epilogue) * words(spec.out_channels) + layout.bytes / 16


def space(spec, isa):
    """Schedules worth trying, the default first."""
    first = default_schedule(spec, isa)
    if isa.products == "tiles":
        covers = range(TILE, MOST_TILES * TILE + 1, TILE)
    else:
        covers = range(1, first.cover + 1) if isa.lanes == 4 else range(2, first.cover + 1, 2)
    found = [first, *(replace(first, cover=c) for c in covers)]
    found += [replace(first, task_tiles=t) for t in {first.task_tiles // 2, first.task_tiles // 4} if t]
    return list(dict.fromkeys(found))


def layout_of(spec, isa, cover):
    """The layout of an image in scratch memory."""
    return Layout(spec.window, spec.in_channels, int8_engines.step_bytes(isa), TILE if isa.products == "tiles" else cover)


def pack_weights(spec, schedule, isa, weights):
    """Bring weights into the kernel's layout.

    Parameters
    ----------
    weights : int8[O, kh, kw, I]

    Returns
    -------
    int8[words(O), ...] or uint8[words(O), ...]
        One row for every block of 32 output channels: bytes in the order in which the kernel reads them, see :mod:`.int8_engines`, or
        for every vector of that order one bit plane after the other, bit b of a plane for byte b of the vector.
    """
    return packed(_Conv(spec, schedule, isa), weights)


def packed(kernel, weights):
    """:func:`pack_weights` for any kernel; ``weights`` int8[O, kh, kw, I]."""
    quads, engine, digits = weight_quads(kernel.layout, weights, kernel.lanes), kernel.engine, kernel.spec.weights
    if digits == "int8":
        return np.ascontiguousarray(engine.pad(quads)).reshape(quads.shape[0], -1)
    codes = _codes(digits)[engine.order(quads).astype(np.int64) + 128]
    planes = np.stack([(codes >> j) & 1 for j in range(len(digits.coefficients))], -2)
    return np.packbits(planes.astype(np.uint8), axis=-1, bitorder="little").reshape(quads.shape[0], -1)


def _codes(digits):
    """For value - 128 .. value + 127 the bits that give it; those of no value (in channels that do not exist) are 0."""
    table = np.zeros(256, np.int64)
    for code in range(2 ** len(digits.coefficients)):
        table[digits.base + sum(c for j, c in enumerate(digits.coefficients) if code >> j & 1) + 128] = code
    return table


def reference(spec, operands, epilogue_inputs):
    """The kernel in numpy: slow and plain. ``operands``: data, weights int8[O, kh, kw, I], a mask of the data if it comes last."""
    data, weights = split(spec, operands)
    return epilogue.reference(spec.epilogue, convolve(spec.window, values_of(spec, data, spec.in_channels), weights), epilogue_inputs)


def split(spec, operands):
    """``(data, weights)`` of the operands before those of the epilogue."""
    at = len(operands) - 1 - spec.mask_last
    return [*operands[:at], *operands[at + 1 :]], operands[at]


def values_of(spec, data, channels):
    """The integers int64[..., C] that bytes or packed planes stand for."""
    if not isinstance(spec.data, Digits):
        return data[0].astype(np.int64)
    planes = [epilogue.unpack(p, channels).astype(np.int64) for p in data]
    return spec.data.base + sum(c * p for c, p in zip(spec.data.coefficients, planes))


def convolve(window, values, weights):
    """Plain convolution, ``[N, H, W, I]`` with ``[O, kh, kw, I]``, int32."""
    top, left, bottom, right = window.pads
    padded = np.pad(values, ((0, 0), (top, bottom), (left, right), (0, 0)))
    total = 0
    for r in range(window.kernel[0]):
        for s in range(window.kernel[1]):
            y, x = r * window.dilations[0], s * window.dilations[1]
            rows = slice(y, y + (window.out_height - 1) * window.strides[0] + 1, window.strides[0])
            columns = slice(x, x + (window.out_width - 1) * window.strides[1] + 1, window.strides[1])
            total = total + padded[:, rows, columns] @ weights[:, r, s].astype(np.int64).T
    return total.astype(np.int32)


def stores_planar(spec, isa, kind="tensor"):
    """Whether the kernel can store its one result, of kind ``kind``, in channel order (output kind ``planar``)."""
    pixels = any(operand.kind not in ("channel", "image") for operand in spec.epilogue.inputs)
    return [o.kind for o in spec.epilogue.outputs] == [kind] and not (pixels and isa.products == "tiles")


def build(spec, schedule, isa):
    """The kernel.

    Returns
    -------
    tirx.PrimFunc
        Parameters: data, weights (see :func:`pack_weights`), a mask of the data, epilogue inputs, epilogue outputs. The leading
        dimension is symbolic.
    """
    return _Conv(spec, schedule, isa).build()


class _Conv(Kernel):
    """The kernel of a convolution. Image after image is copied, then computed, each in parallel tasks."""

    def __init__(self, spec, schedule, isa):
        super().__init__(spec, schedule, isa, layout_of(spec, isa, schedule.cover), spec.out_channels)
        self.window = self.layout.window

    def build(self):
        batch, window = tirx.Var("n", "int64"), self.spec.window
        params = self.parameters((batch, window.in_height, window.in_width), (batch, window.out_height, window.out_width))
        name = "int8_conv2d_amx" if self.isa.products == "tiles" else "int8_conv2d"
        return T.function(
            name, params, tirx.For(image := tirx.Var("image", "int64"), T.i64(0), batch, tirx.ForKind.SERIAL, self.image(image))
        )

    def index(self, place):
        """Addresses count, not coordinates: rows may be the pixels of an image."""
        image, y, x = place
        return image, 0, y * self.window.in_width + x

    def image(self, image):
        layout, schedule = self.layout, self.schedule
        self.scratch, allocation = T.memory("image", layout.bytes, self.engine.data_type)
        tile_tasks, block_tasks = -(-self.units // schedule.task_tiles), -(-self.blocks // schedule.task_blocks)

        def task(number):
            first, bind_first = T.bind("first", number // block_tasks * schedule.task_tiles)
            block, bind_block = T.bind("block", number % block_tasks * schedule.task_blocks)
            return [bind_first, bind_block, self.task(image, first, block)]

        self.image_number = image
        numbers = self.number_pixels()
        return T.seq(allocation, self.copy(image), numbers, T.parallel("task", tile_tasks * block_tasks, task))

    def task(self, image, first, block):
        """The tiles from ``first`` on and the blocks of channels from ``block`` on that belong to one task."""
        tiles = _count(self.units, self.schedule.task_tiles, first)
        blocks = _count(self.blocks, self.schedule.task_blocks, block)

        return T.seq(self.work((block, blocks), (first, tiles), lambda pixel: (image, T.i64(0), pixel)))

    def copy(self, image):
        """Statements that copy an image, phase by phase; padding becomes zeros."""
        layout = self.layout
        per_task = max(1, -(-layout.lines // 8))
        tasks = -(-layout.lines // per_task)

        def task(number):
            first = number * per_task
            count = _count(layout.lines, per_task, first)
            return [T.for_("line", count, lambda a, n=n, p=p: self.line(image, first + a, n, p)) for n, p in enumerate(layout.phases)]

        # The last line has its right padding where the next would have its left one.
        ends = [self.fill(T.i64(number * layout.phase_bytes + layout.lines * layout.pitch * layout.pixel), self.window.pads[1])
                for number in range(len(layout.phases))]  # fmt: skip
        return [T.parallel("lines", tasks, task), ends]

    def line(self, image, line, number, phase):
        """One row of a phase."""
        layout, window = self.layout, self.window
        (top, left, _, _), (down, right) = window.pads, window.strides
        y, bind_y = T.bind("y", line * down + (phase[0] - top))
        start, bind_start = T.bind("start", line * (layout.pitch * layout.pixel) + number * layout.phase_bytes)
        skip = -(-max(0, left - phase[1]) // right)  # pixels of the phase that are padding
        count = min(-(-(window.in_width + left - phase[1]) // right), layout.pitch) - skip
        first = phase[1] - left + skip * right
        inside = [
            self.fill(start, skip),
            T.for_("x", count, lambda k: self.pixel((image, y, first + k * right), start + (k + skip) * layout.pixel)),
            self.fill(start + (skip + count) * layout.pixel, layout.pitch - skip - count),
        ]
        last = (layout.lines - 1) * down + phase[0] - top
        if phase[0] >= top and last < window.in_height:
            return [bind_y, bind_start, inside]
        exists = tirx.And(T.i64(0) <= y, y < T.i64(window.in_height))
        return [bind_y, bind_start, T.when(exists, inside, self.fill(start, layout.pitch))]


def _count(total, per_task, first):
    return per_task if total % per_task == 0 else tirx.min(T.i64(per_task), total - first)
