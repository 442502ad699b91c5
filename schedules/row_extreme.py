"""The largest or least value of each row: the family of :class:`bnntvm.spec.RowExtreme`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx

from . import tir


@dataclass(frozen=True)
class Schedule:
    """What may be tuned.

    Attributes
    ----------
    vectors : int
        Vectors of a row that are combined side by side.
    """

    vectors: int


def default_schedule(spec, isa):
    """A schedule that is fast without tuning."""
    return space(spec, isa)[0]


def space(spec, isa):
    """Valid schedules, the default one first."""
    return [Schedule(8), Schedule(4)]


def build(spec, schedule, isa):
    """The kernel: data ``float32[M, C]``, result ``float32[M, 1]``. M is dynamic.

    Returns
    -------
    tirx.PrimFunc
    """
    rows, lanes, vectors = tirx.Var("m", "int64"), isa.lanes, schedule.vectors
    data, output = tir.buffer("x", (rows, spec.channels), "float32"), tir.buffer("y", (rows, 1), "float32")
    combine, identity = (tirx.Max, float("-inf")) if spec.op == "max" else (tirx.Min, float("inf"))
    whole, rest = divmod(spec.channels, lanes)
    start = tir.splat(identity, "float32", lanes)

    def row(m):
        found = tir.Registers("found", vectors, "float32", lanes)

        def take(slot, value):
            return found.set(slot, combine(found.get(slot), value))

        def step(i):
            return [take(v, tir.load_vector(data, [m, (i * vectors + v) * lanes], lanes)) for v in range(vectors)]

        body = [*found.allocate, *found.fill(start)]
        body += [tir.for_("i", whole // vectors, step)] if whole // vectors else []
        body += [take(v, tir.load_vector(data, [m, (whole - whole % vectors + v) * lanes], lanes)) for v in range(whole % vectors)]
        if rest:
            mask = tir.prefix_mask(rest, lanes)
            body.append(take(0, tirx.Select(mask, tir.load_masked(data, [m, whole * lanes], mask), start)))
        body += [take(0, found.get(v)) for v in range(1, vectors)]
        values = [tir.load(found.arrays[0], lane) for lane in range(lanes)]
        while len(values) > 1:
            values = [combine(a, b) for a, b in zip(values[::2], values[1::2])]
        return [*body, tir.store(output, values[0], m, 0)]

    return tir.function("row_extreme", [data, output], tir.parallel("row", rows, row))


def reference(spec, operands, _epilogue_inputs):
    """In numpy: data float32 ``[M, C]``."""
    return [(np.max if spec.op == "max" else np.min)(operands[0], axis=1, keepdims=True)]
