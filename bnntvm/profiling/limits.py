"""What a machine can do at most: kernels whose loops never leave the registers, and one that only reads.

``bits``    xor, popcount, add on independent accumulators: the inner loop of a binary product. Feeding the sum back into the xor keeps the
            compiler from moving anything out of the loop.
``int8``    products of bytes, as the level's kernels make them: TDPBSSD, VPDPBUSD or SDOT.
``float``   float32 multiply-accumulates.
``read``    reading an array with full vectors, for arrays of several sizes: the rates of the caches and of memory.

A thread does the same as every other.
"""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import neon
from bnntvm.schedules import tir as T
from bnntvm.schedules.int8_tiles import TILE, configure, tile

#: Independent chains: more than the latency of any step times the steps that begin at once. Counting without an instruction for it takes
#: registers of its own, and so long that fewer chains do.
_CHAINS, _FEW_CHAINS = 12, 6
_STEPS = 20000
#: Bytes of arrays that are read.
_SIZES = tuple(1 << n for n in (14, 17, 19, 20, 21, 22, 24, 26))


def kernels(isa):
    """The kernels of an instruction-set level, and how they are to be called.

    Returns
    -------
    (dict of str to PrimFunc, list of dict)
        For :func:`bnntvm.profiling.measure.measure`: ``name``, ``function``, ``dtype`` and ``elements`` of a thread's row of the array,
        ``work`` of one thread.
    """
    functions, limits = {}, []
    for name, (function, limit) in {"bits": _bits(isa), "float": _float(isa), "int8": _int8(isa), "read": _read(isa)}.items():
        if function is not None:
            functions[f"limit_{name}"] = function.with_attr("global_symbol", f"limit_{name}")
            limits.append({"name": name, "function": f"limit_{name}", **limit})
    return functions, limits


def _chains(dtype, lanes, step, work, chains=_CHAINS):
    """``sum_i = step(sum_i, a, sum_(i + 1))``, where ``a`` is what the first sum starts with. ``work``: of one step of one chain."""
    threads = tirx.Var("threads", "int64")
    rows = T.buffer("rows", (threads, chains * lanes), dtype)

    def task(thread):
        sums = T.Registers("sums", chains, dtype, lanes)
        a, bind = T.bind("a", T.load_vector(rows, [thread, 0], lanes))
        start = [sums.set(i, T.load_vector(rows, [thread, i * lanes], lanes)) for i in range(chains)]
        loop = T.for_("step", _STEPS, lambda _: [sums.set(i, step(sums.get(i), a, sums.get((i + 1) % chains))) for i in range(chains)])
        return [sums.allocate, bind, start, loop, [T.store_vector(rows, [thread, i * lanes], sums.get(i)) for i in range(chains)]]

    function = T.function("limit", [rows], T.parallel("thread", threads, task))
    return function, {"dtype": dtype, "elements": chains * lanes, "work": _STEPS * chains * work}


def _bits(isa):
    dtype, lanes = ("uint8", 16) if isa.popcount == "neon" else ("uint64", 1 if isa.popcount == "scalar" else isa.lanes // 2)
    width = 8 if dtype == "uint8" else 64
    chains = _CHAINS if isa.popcount in ("vector", "neon") else _FEW_CHAINS
    return _chains(dtype, lanes, lambda s, a, _: s + tirx.popcount(s ^ a), lanes * width, chains)


def _float(isa):
    # Adding to the sum, as fmla does it; the neighbour keeps the product from moving out of the loop.
    return _chains("float32", isa.lanes, lambda s, a, neighbour: s + a * neighbour, isa.lanes)


def _int8(isa):
    """None where the level has no instruction that sums up products of four bytes: its rate is then taken from the level's table."""
    size = 4 * isa.lanes

    def vnni(s, a, _):
        return T.intrinsic("llvm.x86.avx512.vpdpbusd.512", s, *[tirx.reinterpret(f"int8x{size}", x) for x in (a, a)])

    def dot(s, a, _):
        return neon.dot_bytes(s, *[tirx.reinterpret(f"int8x{size}", x) for x in (a, a)], isa)

    if isa.products == "tiles":
        return _tiles()
    if isa.products == "vnni":
        return _chains("int32", isa.lanes, vnni, size)
    if "asimddp" in isa.needs:
        return _chains("int32", isa.lanes, dot, size)
    return None, {}


def _tiles():
    """Four tiles of sums, two of data and two of weights."""
    threads = tirx.Var("threads", "int64")
    rows = T.buffer("rows", (threads, 1024), "int8")

    def task(thread):
        load = [tile("load", t, rows, [thread, T.i64(0)], 64) for t in range(4, 8)]
        loop = T.for_("step", _STEPS, lambda _: [tile("dot_ssd", 2 * i + j, 4 + i, 6 + j) for i in range(2) for j in range(2)])
        return [configure(TILE), [tile("zero", t) for t in range(4)], load, loop, tile("release")]

    return T.function("limit", [rows], T.parallel("thread", threads, task)), {
        "dtype": "int8", "elements": 1024, "work": _STEPS * 4 * 16 * 16 * 64,
    }  # fmt: skip


def _read(isa):
    """Eight vectors at a time, joined by xor; the whole array as often as there are rows to store in."""
    lanes, chains = max(1, isa.lanes // 2), 8
    threads, count, times = (tirx.Var(name, "int64") for name in ("threads", "count", "times"))
    rows = T.buffer("rows", (threads, count, chains * lanes), "uint64")
    out = T.buffer("out", (threads, times, chains * lanes), "uint64")

    def task(thread):
        sums = T.Registers("sums", chains, "uint64", lanes)

        def row(i):
            return [sums.set(c, sums.get(c) ^ T.load_vector(rows, [thread, i, c * lanes], lanes)) for c in range(chains)]

        def once(time):
            store = [T.store_vector(out, [thread, time, c * lanes], sums.get(c)) for c in range(chains)]
            return [sums.fill(T.splat(0, "uint64", lanes)), T.for_("row", count, row), store]

        return [sums.allocate, T.for_("time", times, once)]

    function = T.function("limit", [rows, out], T.parallel("thread", threads, task))
    return function, {"dtype": "uint64", "elements": chains * lanes, "row_bytes": 8 * chains * lanes, "sizes": list(_SIZES)}
