"""Kernels in which a warp takes a row of a matrix: reductions along it."""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import functions, simt

WARPS, WORD = 4, 32
assert functions.SIDE  # bnn_exchange is defined there


def build(name, params, rows, declarations, body):
    """A kernel.

    Parameters
    ----------
    rows : expression
        Their number.
    body : callable
        ``body(row, exists, lane)``, int32, bool, int32; returns statements. All lanes of a warp have the same row.
    """

    def block_body(block, thread):
        lane, named_lane = simt.bind("lane", tirx.bitwise_and(thread, simt.i32(31)))
        row, named_row = simt.bind("row", block * WARPS + simt.div(thread, 32))
        exists, named_exists = simt.bind("exists", row < simt.i32(rows))
        return [named_lane, named_row, named_exists, *declarations, *body(row, exists, lane)]

    return simt.kernel(name, params, simt.i32(simt.ceil_div(simt.wide(rows), WARPS)), 32 * WARPS, block_body)


def reduce(combine, value):
    """``(statements, variable)``: the values of all lanes of a warp combined, in all lanes."""
    statements = []
    for distance in (16, 8, 4, 2, 1):
        other = simt.call("bnn_exchange", value, simt.i32(distance), dtype="float32")
        value, named = simt.bind("joined", combine(value, other))
        statements.append(named)
    return statements, value


def along(size, lane, body):
    """``body(channel)`` for the channels of a lane: every 32nd; some of the last step may not exist."""
    return simt.loop("step", -(-size // WORD), lambda i: body(i * WORD + lane))


def zero():
    """0.0"""
    return tir.constant(0.0, "float32")
