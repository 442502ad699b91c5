"""Device functions: what TensorIR has no word for, in CUDA and, beside it, as executable semantics in numpy.

A description gets the arguments as :mod:`.emulate` holds them: numpy arrays with one element for each thread (or scalars where all threads
agree), :class:`.emulate.Pointer` for addresses, and first the :class:`.emulate.Threads` that call. It is what the tests run instead of the
device; what the hardware does beyond it (timing, alignment) is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: name -> Function.
FUNCTIONS = {}


@dataclass(frozen=True)
class Function:
    """``source``: CUDA. ``returns``: type of the result, empty for none. ``describe``: the same in numpy. ``needs``: least architecture."""

    name: str
    source: str
    returns: str
    describe: object
    needs: int = 75


def define(name, returns, source, needs=75):
    """Decorator of a description: registers a device function."""

    def register(describe):
        text = f"\n__device__ __forceinline__ {source.strip()}\n"
        FUNCTIONS[name] = Function(name, text, returns, describe, needs)
        return describe

    return register


# Float arithmetic: one rounding for each operation, whatever nvcc's -fmad says ---------------------------------------------------------


def _float(name, source, describe, count=1):
    params = ", ".join(f"float {v}" for v in "abc"[:count])
    define(name, "float32", f"float {name}({params}) {{ return {source}; }}")(describe)


_F = np.float32
_float("bnn_mul", "__fmul_rn(a, b)", lambda _, a, b: np.multiply(a, b, dtype=_F), 2)
_float("bnn_add", "__fadd_rn(a, b)", lambda _, a, b: np.add(a, b, dtype=_F), 2)
_float("bnn_sub", "__fsub_rn(a, b)", lambda _, a, b: np.subtract(a, b, dtype=_F), 2)
_float("bnn_div", "__fdiv_rn(a, b)", lambda _, a, b: np.divide(a, b, dtype=_F), 2)
_float("bnn_sqrt", "__fsqrt_rn(a)", lambda _, a: np.sqrt(a, dtype=_F))
_float("bnn_floor", "floorf(a)", lambda _, a: np.floor(a))
_float("bnn_ceil", "ceilf(a)", lambda _, a: np.ceil(a))
_float("bnn_round", "rintf(a)", lambda _, a: np.rint(a))
_float("bnn_abs", "fabsf(a)", lambda _, a: np.abs(a))
_float("bnn_max", "a > b ? a : b", lambda _, a, b: np.where(a > b, a, b), 2)
_float("bnn_min", "a < b ? a : b", lambda _, a, b: np.where(a < b, a, b), 2)
_float("bnn_exp", "expf(a)", lambda _, a: np.exp(np.float64(a)).astype(_F))
_float("bnn_log", "logf(a)", lambda _, a: np.log(np.float64(a)).astype(_F))
_float("bnn_tanh", "tanhf(a)", lambda _, a: np.tanh(np.float64(a)).astype(_F))
_float("bnn_pow", "powf(a, b)", lambda _, a, b: np.power(np.float64(a), np.float64(b)).astype(_F), 2)
_float("bnn_sigmoid", "__fdiv_rn(1.0f, __fadd_rn(1.0f, expf(-a)))", lambda _, a: (1 / (1 + np.exp(-np.float64(a)))).astype(_F))


@define("bnn_erf", "float32", "float bnn_erf(float a) { return erff(a); }")
def _erf(_threads, a):
    from math import erf

    return np.vectorize(erf, otypes=[np.float32])(a)


# Names ----------------------------------------------------------------------------------------------------------------------------------


def _named(dtype, kind):
    @define(f"bnn_named_{dtype}", dtype, f"{kind} bnn_named_{dtype}({kind} v) {{ return v; }}")
    def same(_threads, v):
        return v


for _dtype, _kind in (("int32", "int"), ("int64", "int64_t"), ("uint32", "unsigned"), ("bool", "bool")):
    _named(_dtype, _kind)


@define("bnn_unknown", "int32", """int bnn_unknown(int v) { asm("" : "+r"(v)); return v; }""")
def _unknown(_threads, v):
    """``v``, of which the compiler knows nothing."""
    return v


# Warps ----------------------------------------------------------------------------------------------------------------------------------


@define("bnn_ballot", "uint32", "unsigned bnn_ballot(bool p) { return __ballot_sync(0xffffffffu, p); }")
def _ballot(threads, p):
    """Bit i of the result: whether ``p`` holds in lane i."""
    lanes = threads.by_warp(p, "bnn_ballot")
    words = np.packbits(lanes.astype(np.uint8), axis=1, bitorder="little").view("<u4")
    return np.repeat(words[:, 0], 32)


@define("bnn_or_quad", "uint32", """
unsigned bnn_or_quad(unsigned v) {
  v |= __shfl_xor_sync(0xffffffffu, v, 1);
  return v | __shfl_xor_sync(0xffffffffu, v, 2);
}""")
def _or_quad(threads, v):
    """The bits of four neighbouring lanes, joined."""
    lanes = threads.by_warp(v, "bnn_or_quad").reshape(-1, 4)
    return np.repeat(np.bitwise_or.reduce(lanes, axis=1), 4)


@define("bnn_add_xor", "int32", "int bnn_add_xor(int v, int distance) { return v + __shfl_xor_sync(0xffffffffu, v, distance); }")
def _add_xor(threads, v, distance):
    """``v`` plus that of the lane ``distance`` away."""
    lanes = threads.by_warp(v, "bnn_add_xor")
    return (lanes + lanes[:, np.arange(32) ^ int(np.max(distance))]).reshape(-1)


# Shared memory -------------------------------------------------------------------------------------------------------------------------

_SHARED = "unsigned s = (unsigned)__cvta_generic_to_shared(dst);"


def _copied(threads, dst, src, valid, words):
    """Words of ``src`` where ``valid``, else zeros; a thread without data reads nothing."""
    for pointer in (dst, src):
        if (threads.spread(pointer.index)[threads.running()] % words).any():
            raise threads.fault("a copy is not aligned")
    outer, found = threads.active, []
    valid = threads.spread(valid).astype(bool)
    threads.active = valid if outer is None else valid & outer
    for k in range(words):
        found.append(threads.load(src.memory, src.index + k) if threads.active.any() else np.zeros(threads.count, np.uint32))
    threads.active = outer
    return found


def _copy(words):
    kind = {4: "uint4", 2: "uint2", 1: "unsigned"}[words]
    zero = {4: "make_uint4(0, 0, 0, 0)", 2: "make_uint2(0, 0)", 1: "0u"}[words]

    @define(f"bnn_copy{words}", "", f"""
void bnn_copy{words}(unsigned* dst, const unsigned* src, bool valid) {{
  *({kind}*)dst = valid ? *(const {kind}*)src : {zero};
}}""")
    def copy(threads, dst, src, valid):
        for k, value in enumerate(_copied(threads, dst, src, valid, words)):
            threads.store(dst.memory, dst.index + k, value)

    through = "cg" if words == 4 else "ca"

    @define(f"bnn_copy_async{words}", "", f"""
void bnn_copy_async{words}(unsigned* dst, const unsigned* src, bool valid) {{
  {_SHARED}
  asm volatile("cp.async.{through}.shared.global [%0], [%1], {4 * words}, %2;" :: "r"(s), "l"(src), "r"(valid ? {4 * words} : 0) : "memory");
}}""", needs=80)
    def copy_async(threads, dst, src, valid):
        values = _copied(threads, dst, src, valid, words)

        def arrive():
            for k, value in enumerate(values):
                threads.store(dst.memory, dst.index + k, value)

        threads.claim(dst.memory, dst.index, words)
        threads.later("copy", arrive)

    @define(f"bnn_popc{words}", "int32", f"""
int bnn_popc{words}(const unsigned* src) {{
  {kind} v = *(const {kind}*)src;
  return {" + ".join(f"__popc(v.{c})" for c in "xyzw"[:words]) if words > 1 else "__popc(v)"};
}}""")
    def popc(threads, src):
        """Set bits of some words."""
        return sum(np.bitwise_count(threads.load(src.memory, src.index + k)).astype(np.int32) for k in range(words))


for _words in (1, 2, 4):
    _copy(_words)


@define("bnn_copy_commit", "", """
void bnn_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }""", needs=80)
def _copy_commit(threads):
    threads.commit("copy")


def _copy_wait(left):
    @define(f"bnn_copy_wait{left}", "", f"""
void bnn_copy_wait{left}() {{ asm volatile("cp.async.wait_group {left};" ::: "memory"); }}""", needs=80)
    def wait(threads):
        threads.wait("copy", left)


for _left in range(8):
    _copy_wait(_left)


@define("bnn_load_matrices", "", """
void bnn_load_matrices(unsigned* d, const unsigned* row) {
  unsigned s = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(s) : "memory");
}""")
def _load_matrices(threads, dst, row):
    """Four matrices of 8 rows of 16 bytes; lane 8 m + i has the address of row i of matrix m, lane l gets word l % 4 of row l / 4."""
    rows = threads.by_warp(row.index, "bnn_load_matrices")
    if (rows % 4).any():
        raise threads.fault("a row of a matrix is not aligned")
    lanes = np.arange(32)
    for m in range(4):
        index = (rows[:, 8 * m + lanes // 4] + lanes % 4).reshape(-1)
        threads.store(dst.memory, dst.index + m, threads.load(row.memory, index))


# Products of bits on tensor cores ---------------------------------------------------------------------------------------------------------


def _fragment(threads, pointer, count):
    """[warps, 8, 4, count]: words of a fragment by row (or column) and place of the lane in its group."""
    return np.stack([threads.load(pointer.memory, pointer.index + k) for k in range(count)], -1).reshape(-1, 8, 4, count)


def _add(threads, acc, products):
    """Add [warps, rows, 8] to accumulators: lane 4 g + t has columns 2 t and 2 t + 1 of rows g, g + 8, ..."""
    for e in range(products.shape[1] // 4):
        part = products[:, 8 * (e // 2) : 8 * (e // 2) + 8].reshape(len(products), 8, 4, 2)[..., e % 2].reshape(-1)
        threads.store(acc.memory, acc.index + e, threads.load(acc.memory, acc.index + e) + part)


@define("bnn_mma_and", "", """
void bnn_mma_and(int* d, const unsigned* a, const unsigned* b) {
  asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}""", needs=80)
def _mma_and(threads, d, a, b):
    """16 x 8 sums over 256 bits; words of a row of A (a column of B): lane t of a group has words t and t + 4."""
    threads.by_warp(a.index, "bnn_mma_and")
    a, b = _fragment(threads, a, 4), _fragment(threads, b, 2)
    rows = np.concatenate([np.concatenate([a[..., h], a[..., 2 + h]], -1) for h in (0, 1)], 1)  # [warps, 16, 8]
    columns = np.concatenate([b[..., 0], b[..., 1]], -1)  # [warps, 8, 8]
    _add(threads, d, np.bitwise_count(rows[:, :, None] & columns[:, None]).sum(-1, dtype=np.int32))


@define("bnn_mma_xor", "", """
void bnn_mma_xor(int* d, const unsigned* a, const unsigned* b) {
  asm volatile("mma.sync.aligned.m8n8k128.row.col.s32.b1.b1.s32.xor.popc {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+r"(d[0]), "+r"(d[1]) : "r"(a[0]), "r"(b[0]));
}""")
def _mma_xor(threads, d, a, b):
    """8 x 8 counts of differing bits of 128; lane t of a group has word t."""
    threads.by_warp(a.index, "bnn_mma_xor")
    rows, columns = _fragment(threads, a, 1)[..., 0], _fragment(threads, b, 1)[..., 0]
    _add(threads, d, np.bitwise_count(rows[:, :, None] ^ columns[:, None]).sum(-1, dtype=np.int32))
