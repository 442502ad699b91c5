"""Packing of rows of floats (:class:`bnntvm.spec.Map` with packed outputs only) on a GPU: a ballot for each word.

Data may be float32 or float16 (every float16 is a float32, so comparisons are the same). A warp takes some words that follow one another
in the tensor; all of their loads are under way before the first ballot.

Where rows are whole words and the epilogue has no operands, a row is as good as another: every thread reads 16 bytes, and four or eight
neighbours join their bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tvm import tirx

from bnntvm import spec as specs
from bnntvm.schedules import epilogue as cpu
from bnntvm.schedules import tir
from bnntvm.schedules.cuda import simt
from bnntvm.schedules.cuda.epilogue import Ballot, Emitter, Pixel, Value, apply

WARPS = 8


@dataclass(frozen=True)
class Schedule:
    """``words``: words of a warp, or where threads read 16 bytes, such reads of a thread."""

    words: int


def claims(spec):
    """Whether the kernel can build ``spec``, a :class:`bnntvm.spec.Map`."""
    outputs = spec.epilogue.outputs
    return spec.dtype in ("float32", "float16") and bool(outputs) and all(o.kind == "bits" for o in outputs)


def default_schedule(spec, isa):
    """Four words: 16 bytes under way in every thread."""
    return Schedule(4)


def space(spec, isa):
    """Words of a warp."""
    return [Schedule(count) for count in (4, 1, 2, 8, 16)]


def reference(spec, operands, epilogue_inputs):
    """The epilogue of the data as float32; ``operands`` is ``[data]``."""
    return cpu.reference(spec.epilogue, operands[0].astype("float32"), epilogue_inputs)


def build(spec, schedule, isa):
    """The kernel: parameters data ``[n, H, W, C]`` or ``[m, C]``, then the epilogue's."""
    return (_build_runs if spec.channels % specs.WORD_BITS == 0 and not spec.epilogue.inputs else _build_words)(spec, schedule)


def _build_runs(spec, schedule):
    """The tensor as one run of numbers."""
    batch, spatial = tirx.Var("n", "int64"), spec.spatial if spec.rank == 4 else ()
    data = tir.buffer("data", (batch, *spatial, spec.channels), spec.dtype)
    emitter = Emitter(spec.epilogue, spec.channels, (batch, *spatial), "float32")
    count = 8 if spec.dtype == "float16" else 4  # numbers in 16 bytes
    lanes, join = specs.WORD_BITS // count, "bnn_or_quad" if spec.dtype == "float16" else "bnn_or_octet"
    total = simt.wide(batch) * (prod(spatial) * spec.channels // count)
    threads = WARPS * simt.WARP
    x, declare = simt.flat(data)

    def body(block, thread):
        statements, loads, joins = [declare, *emitter.declarations], [], []
        named = simt.namer(statements)
        first = named("first", simt.wide(block) * (threads * schedule.words) + simt.wide(thread))
        place = named("place", simt.mod(thread, lanes))
        for i in range(schedule.words):
            number = named("number", first + i * threads)
            exists = named("exists", number < total)
            values, allocate = simt.registers(f"x{i}", count, "float32")
            zero = [simt.put(values, k, tir.constant(0.0, "float32")) for k in range(count)]
            load = simt.do(f"bnn_load16_{spec.dtype}", simt.pointer(values, 0), simt.pointer(x, number * count))
            loads += [allocate, *zero, tirx.IfThenElse(exists, load, None)]
            joins += _joined(spec.epilogue, emitter, values, count, (number, exists, place), join, lanes)
        return [*statements, *loads, *joins]

    blocks = tirx.Cast("int32", simt.ceil_div(total, schedule.words * threads))
    return simt.kernel("pack", [data, *emitter.outputs], blocks, threads, body)


def _joined(epilogue, emitter, numbers, count, where, join, lanes):
    """Statements that make bits of a thread's numbers, join them with those of its neighbours, and store the word."""
    body, bits, (number, exists, place) = [], [[] for _ in epilogue.outputs], where
    named = simt.namer(body)
    for k in range(count):
        values = [named("x", simt.at(numbers, k))]
        for step in epilogue.steps:
            values.append(named("s", apply(step, cpu._operands(step, values, 1))))
        for own, output in zip(bits, epilogue.outputs):
            own.append(tirx.Select(values[output.value], simt.u32(1 << k), simt.u32(0)))
    for own, target in zip(bits, emitter._outputs):
        word = own[0]
        for bit in own[1:]:
            word = word | bit
        word = named("word", simt.call(join, tirx.shift_left(word, simt.u32(place * count)), dtype="uint32"))
        store = simt.put(target, tirx.truncdiv(number, tir.i64(lanes)), word)
        body.append(tirx.IfThenElse(tirx.And(exists, tirx.EQ(place, simt.i32(0))), store, None))
    return body


def _build_words(spec, schedule):
    """A ballot for each word of a row."""
    batch, spatial = tirx.Var("n", "int64"), spec.spatial if spec.rank == 4 else ()
    dims, pixels, count = (batch, *spatial), prod(spatial), specs.words(spec.channels)
    data = tir.buffer("data", (*dims, spec.channels), spec.dtype)
    emitter = Emitter(spec.epilogue, spec.channels, dims, "float32")
    total = simt.wide(batch) * (pixels * count)
    x, declare = simt.flat(data)

    def body(block, thread):
        lane, bind_lane = simt.bind("lane", simt.mod(thread, 32))
        first, bind_first = simt.bind("first", (simt.wide(block) * WARPS + simt.wide(simt.div(thread, 32))) * schedule.words)
        loads, tails = [], []
        for i in range(schedule.words):
            number, bind_number = simt.bind("number", first + i)
            exists, bind_exists = simt.bind("exists", number < total)
            row, bind_row = simt.bind("row", tirx.truncdiv(number, tir.i64(count)))
            word, bind_word = simt.bind("word", tirx.Cast("int32", tirx.truncmod(number, tir.i64(count))))
            channel = word * 32 + lane
            there = exists if spec.channels % 32 == 0 else tirx.And(exists, channel < simt.i32(spec.channels))
            value = tirx.if_then_else(there, simt.at(x, row * spec.channels + simt.wide(channel)), tir.constant(0, spec.dtype))
            value, bind_value = simt.bind("x", tirx.Cast("float32", value) if spec.dtype != "float32" else value)
            loads += [bind_number, bind_exists, bind_row, bind_word, bind_value]
            image = tirx.Cast("int32", tirx.truncdiv(row, tir.i64(pixels))) if emitter.needs_image else None
            pixel = Pixel(row, image, None, exists)
            tails += emitter.emit([Value(value, lane)], pixel, word, Ballot(lane), None, None)
        return [declare, *emitter.declarations, bind_lane, bind_first, *loads, *tails]

    blocks = tirx.Cast("int32", simt.ceil_div(total, schedule.words * WARPS))
    return simt.kernel("pack", [data, *emitter.inputs, *emitter.outputs], blocks, WARPS * simt.WARP, body)
