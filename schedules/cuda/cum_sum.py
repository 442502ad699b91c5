"""Running sums along an axis on a GPU: :class:`bnntvm.spec.CumSum`. A thread walks along the axis, its neighbours beside it."""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import simt
from bnntvm.schedules.cum_sum import Schedule, arrays, default_schedule, reference, space

__all__ = ["Schedule", "build", "default_schedule", "reference", "space"]

_THREADS = 64


def build(spec, schedule, isa):
    """The kernel: data and sums ``dtype[M, size, inner]``; M is dynamic."""
    size, inner, data, sums = arrays(spec)
    (read, a), (written, b) = simt.flat(data), simt.flat(sums)
    walks = data.shape[0] * inner

    def body(block, thread):
        number, named = simt.bind("number", simt.wide(block) * _THREADS + simt.wide(thread))
        group = tirx.truncdiv(number, inner)
        begin, named_begin = simt.bind("begin", group * size * inner + tirx.truncmod(number, inner))
        total, allocate = simt.registers("total", 1, spec.dtype)

        def step(k):
            at = begin + (size - 1 - simt.wide(k) if spec.backward else simt.wide(k)) * inner
            place, named_place = simt.bind("place", at)
            value = _sum(simt.at(total, 0), simt.at(read, place), spec.dtype)
            add, store = simt.put(total, 0, value), simt.put(written, place, simt.at(total, 0))
            return [named_place, *([store, add] if spec.exclusive else [add, store])]

        # The sum of no floats is -0.0: it leaves a first number of -0.0 as it is.
        nothing = tir.constant(-0.0 if spec.dtype.startswith("float") and not spec.exclusive else 0, spec.dtype)
        walk = [simt.put(total, 0, nothing), *_as_list(simt.loop("k", simt.i32(size), step))]
        return [a, b, named, named_begin, allocate, tirx.IfThenElse(number < walks, tir.seq(walk), None)]

    return simt.kernel("cum_sum", [data, sums], simt.i32(simt.ceil_div(walks, _THREADS)), _THREADS, body)


def _sum(a, b, dtype):
    return simt.call("bnn_add", a, b, dtype="float32") if dtype == "float32" else a + b


def _as_list(statements):
    return statements if isinstance(statements, list) else [statements]
