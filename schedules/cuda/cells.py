"""Kernels whose results are independent of each other: a warp takes a pixel's word of 32 channels, a lane its channel.

That is how packed bits lie, so that a ballot makes a word, and neighbouring lanes read neighbouring addresses. A warp may take several
cells, whose loads are under way together.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import epilogue as tail
from bnntvm.schedules.cuda import simt

WARPS = 8  #: of a block


@dataclass(frozen=True)
class Cell:
    """Where a lane computes a value.

    Attributes
    ----------
    row : int32 expression
        Number of the pixel (or row) among all of the batch.
    image, inside, y, x : int32 expressions
        The image, the pixel's number in it, and its place; only where pixels have a place.
    channel : int32 expression
    exists : bool expression
        Whether there is such a pixel and channel.
    """

    row: object
    image: object
    inside: object
    y: object
    x: object
    channel: object
    exists: object


@dataclass(frozen=True)
class Schedule:
    """``cells``: words of 32 channels that a warp takes."""

    cells: int = 1


def default_schedule(spec, isa):
    """Four cells, whose loads overlap."""
    return Schedule(4)


def space(spec, isa):
    """Counts of cells."""
    return [Schedule(4), Schedule(1), Schedule(2), Schedule(8)]


def build(name, params, emitter, dims, value, cells=1):
    """A kernel.

    Parameters
    ----------
    name : str
    params : list of Buffer
        The anchor's operands.
    emitter : epilogue.Emitter
    dims : tuple
        Dimensions of the result but for its channels: ``(n, height, width)`` or ``(m,)``.
    value : callable
        :class:`Cell` to ``(statements, expression)``: the anchor's value. Nothing may be read where the cell does not exist.
    cells : int
        Cells of a warp.

    Returns
    -------
    tirx.PrimFunc
    """
    rows = _product(dims)
    words, together = emitter.words, WARPS * cells

    def body(block, thread):
        lane, named_lane = simt.bind("lane", tirx.bitwise_and(thread, simt.i32(31)))
        first, named_first = simt.bind("first", (block * WARPS + simt.div(thread, 32)) * cells)
        total, named_total = simt.bind("rows", simt.i32(rows))
        places, values = [], []
        for number in range(cells):
            statements, word, cell = _cell(first + number, words, total, lane, emitter.channels, dims)
            made, result = value(cell)
            bound, named = simt.bind("anchor", result)
            values.append([*statements, *made, named])
            places.append((word, cell, bound))
        out = []
        for word, cell, bound in places:
            pixel = tail.Pixel(simt.wide(cell.row), cell.image, cell.inside, cell.row < total)
            out += emitter.emit([tail.Value(bound, lane)], pixel, word, tail.Ballot(lane))
        return [named_lane, named_first, named_total, *emitter.declarations, *values, *out]

    grid = simt.i32(simt.ceil_div(simt.wide(rows) * words, together))
    return simt.kernel(name, [*params, *emitter.inputs, *emitter.outputs], grid, 32 * WARPS, body)


def _product(dims):
    rows = simt.wide(dims[0])
    for extent in dims[1:]:
        rows = rows * extent
    return rows


def _cell(number, words, rows, lane, channels, dims):
    """``(statements, word, Cell)`` of a cell's number."""
    index, named = simt.bind("cell", number)
    row, named_row = simt.bind("row", simt.div(index, words))
    word, named_word = simt.bind("word", simt.mod(index, words))
    channel, named_channel = simt.bind("channel", word * 32 + lane)
    exists = row < rows
    if channels % 32:
        exists = tirx.And(exists, channel < channels)
    exists, named_exists = simt.bind("exists", exists)
    image = inside = y = x = None
    if len(dims) == 3:
        height, width = (int(d) for d in dims[1:])
        image, inside = simt.div(row, height * width), simt.mod(row, height * width)
        y, x = simt.div(inside, width), simt.mod(inside, width)
    statements = [named, named_row, named_word, named_channel, named_exists]
    return statements, word, Cell(row, image, inside, y, x, channel, exists)


def guarded(condition, array, index, default=0):
    """The element of a flat array where ``condition`` holds, else ``default``, without reading it."""
    return tirx.if_then_else(condition, simt.at(array, index), tir.constant(default, str(array.dtype)))


def within(y, height, x, width):
    """Whether a pixel lies in an image. (One comparison of unsigned numbers would do; TVM's analysis takes offence at negative ones.)"""
    rows, columns = tirx.And(y >= 0, y < height), tirx.And(x >= 0, x < width)
    return tirx.And(rows, columns)
