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


@define("bnn_or_octet", "uint32", """
unsigned bnn_or_octet(unsigned v) {
  v |= __shfl_xor_sync(0xffffffffu, v, 1);
  v |= __shfl_xor_sync(0xffffffffu, v, 2);
  return v | __shfl_xor_sync(0xffffffffu, v, 4);
}""")
def _or_octet(threads, v):
    """The bits of eight neighbouring lanes, joined."""
    lanes = threads.by_warp(v, "bnn_or_octet").reshape(-1, 8)
    return np.repeat(np.bitwise_or.reduce(lanes, axis=1), 8)


def _shuffle(dtype, kind):
    @define(f"bnn_shuffle_{dtype}", dtype, f"""
{kind} bnn_shuffle_{dtype}({kind} v, int lane) {{ return __shfl_sync(0xffffffffu, v, lane); }}""")
    def shuffle(threads, v, lane):
        """The value of another lane."""
        lanes, source = threads.by_warp(v, "bnn_shuffle"), threads.spread(lane).reshape(-1, 32)
        return np.take_along_axis(lanes, source % 32, 1).reshape(-1)


_shuffle("int32", "int")
_shuffle("int64", "int64_t")


@define("bnn_add_xor", "int32", "int bnn_add_xor(int v, int distance) { return v + __shfl_xor_sync(0xffffffffu, v, distance); }")
def _add_xor(threads, v, distance):
    """``v`` plus that of the lane ``distance`` away."""
    lanes = threads.by_warp(v, "bnn_add_xor")
    return (lanes + lanes[:, np.arange(32) ^ int(np.max(distance))]).reshape(-1)


# Two neighbouring elements --------------------------------------------------------------------------------------------------------------


@define("bnn_load2", "", """
void bnn_load2(float* dst, const float* src) {
  float2 v = *(const float2*)src;
  dst[0] = v.x;
  dst[1] = v.y;
}""")
def _load2(threads, dst, src):
    if (threads.spread(src.index)[threads.running()] % 2).any():
        raise threads.fault("a pair is not aligned")
    for k in range(2):
        threads.store(dst.memory, dst.index + k, threads.load(src.memory, src.index + k))


def _load16(dtype, kind, count, convert):
    each = "\n    ".join(f"dst[{i}] = {convert.format(f'e[{i}]')};" for i in range(count))
    alone = "\n    ".join(f"dst[{i}] = {convert.format(f'src[{i}]')};" for i in range(count))

    @define(f"bnn_load16_{dtype}", "", f"""
void bnn_load16_{dtype}(float* dst, const {kind}* src) {{
  if (((unsigned long long)src & 15) == 0) {{
    uint4 v = *(const uint4*)src;
    const {kind}* e = (const {kind}*)&v;
    {each}
  }} else {{
    {alone}
  }}
}}""")
    def load16(threads, dst, src):
        """The numbers in 16 bytes, which need not be aligned, as float32."""
        for k in range(count):
            threads.store(dst.memory, dst.index + k, threads.load(src.memory, src.index + k).astype(np.float32))


_load16("float32", "float", 4, "{}")
_load16("float16", "half", 8, "__half2float({})")


def _store2(dtype, kind):
    @define(f"bnn_store2_{dtype}", "", f"""
void bnn_store2_{dtype}({kind}* dst, {kind} a, {kind} b) {{ *({kind}2*)dst = make_{kind}2(a, b); }}""")
    def store2(threads, dst, a, b):
        if (threads.spread(dst.index)[threads.running()] % 2).any():
            raise threads.fault("a pair is not aligned")
        threads.store(dst.memory, dst.index, a)
        threads.store(dst.memory, dst.index + 1, b)


_store2("float32", "float")
_store2("int32", "int")


# Shared memory -------------------------------------------------------------------------------------------------------------------------

_SHARED = "unsigned s = (unsigned)__cvta_generic_to_shared(dst);"


def copied(threads, src, valid, words, aligned):
    """Words of ``src`` where ``valid``, else zeros; a thread without data reads nothing. ``aligned``: pointers to whole copies."""
    for pointer in aligned:
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
        for k, value in enumerate(copied(threads, src, valid, words, (dst, src))):
            threads.store(dst.memory, dst.index + k, value)

    through = "cg" if words == 4 else "ca"

    @define(f"bnn_copy_async{words}", "", f"""
void bnn_copy_async{words}(unsigned* dst, const unsigned* src, bool valid) {{
  {_SHARED}
  asm volatile("cp.async.{through}.shared.global [%0], [%1], {4 * words}, %2;"
               :: "r"(s), "l"(src), "r"(valid ? {4 * words} : 0) : "memory");
}}""", needs=80)
    def copy_async(threads, dst, src, valid):
        values = copied(threads, src, valid, words, (dst, src))

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


def _in_groups(kind, commit, wait, most, needs):
    """``bnn_KIND_commit`` closes a group of asynchronous operations, ``bnn_KIND_waitN`` waits until at most N < ``most`` are open."""

    @define(f"bnn_{kind}_commit", "", f"""
void bnn_{kind}_commit() {{ asm volatile("{commit};" ::: "memory"); }}""", needs=needs)
    def close(threads):
        threads.commit(kind)

    def waiting(left):
        @define(f"bnn_{kind}_wait{left}", "", f"""
void bnn_{kind}_wait{left}() {{ asm volatile("{wait} {left};" ::: "memory"); }}""", needs=needs)
        def wait_for(threads):
            threads.wait(kind, left)

    for left in range(most):
        waiting(left)


_in_groups("copy", "cp.async.commit_group", "cp.async.wait_group", 8, needs=80)


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


def fragment(threads, pointer, count):
    """[warps, 8, 4, count]: words of a fragment by row (or column) and place of the lane in its group."""
    return np.stack([threads.load(pointer.memory, pointer.index + k) for k in range(count)], -1).reshape(-1, 8, 4, count)


def add(threads, acc, products):
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
    a, b = fragment(threads, a, 4), fragment(threads, b, 2)
    rows = np.concatenate([np.concatenate([a[..., h], a[..., 2 + h]], -1) for h in (0, 1)], 1)  # [warps, 16, 8]
    columns = np.concatenate([b[..., 0], b[..., 1]], -1)  # [warps, 8, 8]
    add(threads, d, np.bitwise_count(rows[:, :, None] & columns[:, None]).sum(-1, dtype=np.int32))


@define("bnn_mma_xor", "", """
void bnn_mma_xor(int* d, const unsigned* a, const unsigned* b) {
  asm volatile("mma.sync.aligned.m8n8k128.row.col.s32.b1.b1.s32.xor.popc {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+r"(d[0]), "+r"(d[1]) : "r"(a[0]), "r"(b[0]));
}""")
def _mma_xor(threads, d, a, b):
    """8 x 8 counts of differing bits of 128; lane t of a group has word t."""
    threads.by_warp(a.index, "bnn_mma_xor")
    rows, columns = fragment(threads, a, 1)[..., 0], fragment(threads, b, 1)[..., 0]
    add(threads, d, np.bitwise_count(rows[:, :, None] ^ columns[:, None]).sum(-1, dtype=np.int32))


# Barriers in shared memory (mbarrier) and bulk copies, sm_90 ----------------------------------------------------------------------------


@define("bnn_barrier_init", "", """
void bnn_barrier_init(unsigned* bar, int count) {
  unsigned s = (unsigned)__cvta_generic_to_shared(bar);
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(s), "r"(count) : "memory");
}""", needs=90)
def _barrier_init(threads, bar, count):
    """``count`` arrivals complete a phase; a barrier takes two words."""
    for key in threads.barriers_of(bar):
        threads.barriers[key] = threads.new_barrier(int(count))


@define("bnn_barrier_fence", "", """
void bnn_barrier_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\\nfence.proxy.async.shared::cta;" ::: "memory");
}""", needs=90)
def _barrier_fence(threads):
    """Barriers that were made are seen by the copy engine."""


@define("bnn_proxy_fence", "", """
void bnn_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }""", needs=90)
def _proxy_fence(threads):
    """What the thread has written to shared memory is seen by tensor cores."""
    threads.fenced()


@define("bnn_barrier_arrive", "", """
void bnn_barrier_arrive(unsigned* bar) {
  unsigned s = (unsigned)__cvta_generic_to_shared(bar);
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(s) : "memory");
}""", needs=90)
def _barrier_arrive(threads, bar):
    """One arrival."""
    threads.arrive(bar)


@define("bnn_barrier_expect", "", """
void bnn_barrier_expect(unsigned* bar, int bytes) {
  unsigned s = (unsigned)__cvta_generic_to_shared(bar);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(s), "r"(bytes) : "memory");
}""", needs=90)
def _barrier_expect(threads, bar, size):
    """Arrive, and let the phase wait for ``size`` bytes of bulk copies too."""
    threads.arrive(bar, int(size))


@define("bnn_barrier_wait_cluster", "", """
void bnn_barrier_wait_cluster(unsigned* bar, int parity) {
  unsigned s = (unsigned)__cvta_generic_to_shared(bar);
  asm volatile("{\\n.reg .pred p;\\nBNN_WAIT_%=:\\n"
               "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\\n"
               "@p bra BNN_DONE_%=;\\nbra BNN_WAIT_%=;\\nBNN_DONE_%=:\\n}"
               :: "r"(s), "r"(parity) : "memory");
}""", needs=90)
def _barrier_wait_cluster(threads, bar, parity):
    """As ``bnn_barrier_wait``, where threads of the other block arrive too."""
    yield from threads.wait_for(bar, parity)


_barrier_wait_cluster.waits = True


@define("bnn_barrier_wait", "", """
void bnn_barrier_wait(unsigned* bar, int parity) {
  unsigned s = (unsigned)__cvta_generic_to_shared(bar);
  asm volatile("{\\n.reg .pred p;\\nBNN_WAIT_%=:\\n"
               "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\\n@p bra BNN_DONE_%=;\\nbra BNN_WAIT_%=;\\nBNN_DONE_%=:\\n}"
               :: "r"(s), "r"(parity) : "memory");
}""", needs=90)
def _barrier_wait(threads, bar, parity):
    """Until the phase of that parity is over (the phase before the first one has parity 1 and is over)."""
    yield from threads.wait_for(bar, parity)


_barrier_wait.waits = True


@define("bnn_bulk_copy", "", """
void bnn_bulk_copy(unsigned* dst, const unsigned* src, int bytes, unsigned* bar) {
  unsigned d = (unsigned)__cvta_generic_to_shared(dst), b = (unsigned)__cvta_generic_to_shared(bar);
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(d), "l"(src), "r"(bytes), "r"(b) : "memory");
}""", needs=90)
def _bulk_copy(threads, dst, src, size, bar):
    """Copy ``size`` bytes some time before the phase of the barrier completes that waits for them."""
    size = int(size)
    for key, numbers in threads.barriers_of(bar).items():
        (k,) = (key[0] * threads.per_block + number for number in numbers)
        to, begin = int(threads.spread(dst.index)[k]), int(threads.spread(src.index)[k])
        if to % 4 or begin % 4 or size % 16:
            raise threads.fault("a bulk copy is not aligned")
        threads.barriers[key].pending.append(threads.bulk(dst.memory, src.memory, k, to, begin, size))


# Clusters of blocks, sm_90 --------------------------------------------------------------------------------------------------------------


@define("bnn_cluster_sync", "", """
void bnn_cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}""", needs=90)
def _cluster_sync(threads):
    """All threads of all blocks of the cluster wait for each other."""
    yield from threads.cluster_barrier()


_cluster_sync.waits = True


@define("bnn_load_other", "uint32", """
unsigned bnn_load_other(const unsigned* src, int rank) {
  unsigned s = (unsigned)__cvta_generic_to_shared(src), v;
  asm volatile("{\\n.reg .b32 r;\\nmapa.shared::cluster.u32 r, %1, %2;\\nld.shared::cluster.u32 %0, [r];\\n}"
               : "=r"(v) : "r"(s), "r"(rank) : "memory");
  return v;
}""", needs=90)
def _load_other(threads, src, rank):
    """A word of the shared memory of block ``rank`` of the cluster, at the place where ``src`` is here."""
    return threads.load_other(src.memory, src.index, rank)


@define("bnn_barrier_arrive_other", "", """
void bnn_barrier_arrive_other(unsigned* bar, int rank) {
  unsigned s = (unsigned)__cvta_generic_to_shared(bar);
  asm volatile("{\\n.reg .b32 r;\\nmapa.shared::cluster.u32 r, %0, %1;\\nmbarrier.arrive.release.cluster.shared::cluster.b64 _, [r];\\n}"
               :: "r"(s), "r"(rank) : "memory");
}""", needs=90)
def _barrier_arrive_other(threads, bar, rank):
    """Arrive at the same barrier of block ``rank`` of the cluster."""
    threads.arrive_other(bar, threads.spread(rank))


@define("bnn_bulk_copy_both", "", """
void bnn_bulk_copy_both(unsigned* dst, const unsigned* src, int bytes, unsigned* bar) {
  unsigned d = (unsigned)__cvta_generic_to_shared(dst), b = (unsigned)__cvta_generic_to_shared(bar);
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
               :: "r"(d), "l"(src), "r"(bytes), "r"(b), "h"((unsigned short)3) : "memory");
}""", needs=90)
def _bulk_copy_both(threads, dst, src, size, bar):
    """As ``bnn_bulk_copy``, to the same place of both blocks, each of whose barriers counts the bytes."""
    size = int(size)
    for key, numbers in threads.barriers_of(bar).items():
        (k,) = (key[0] * threads.per_block + number for number in numbers)
        to, begin = int(threads.spread(dst.index)[k]), int(threads.spread(src.index)[k])
        if to % 4 or begin % 4 or size % 16:
            raise threads.fault("a bulk copy is not aligned")
        for row in (key[0], key[0] ^ 1):
            copy = threads.bulk(dst.memory, src.memory, k, to, begin, size, row)
            threads.barriers[row, key[1]].pending.append(copy)


# Products of warpgroups, sm_90a -----------------------------------------------------------------------------------------------------------


@define("bnn_wgmma_fence", "", """
void bnn_wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }""", needs=90)
def _wgmma_fence(threads):
    """Registers that were written are seen by products that follow."""


_in_groups("wgmma", "wgmma.commit_group.sync.aligned", "wgmma.wait_group.sync.aligned", 2, needs=90)


def _wgmma(columns):
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+r"(d[{i}])' for i in range(count))

    @define(f"bnn_wgmma{columns}", "", f"""
void bnn_wgmma{columns}(int* d, const unsigned* a, const unsigned* b, int add) {{
  // Rows of 128 bytes, eight of them a swizzled kilobyte: stride 1024 bytes, 128-byte swizzle.
  const unsigned long long fixed = (1ull << 62) | (64ull << 32) | (1ull << 16);
  unsigned long long da = fixed | (((unsigned)__cvta_generic_to_shared(a) & 0x3ffff) >> 4);
  unsigned long long db = fixed | (((unsigned)__cvta_generic_to_shared(b) & 0x3ffff) >> 4);
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n{columns}k256.s32.b1.b1.and.popc {{{registers}}}, %{count}, %{count + 1}, p;\\n}}"
               : {outputs} : "l"(da), "l"(db), "r"(add));
}}""", needs=90)
    def multiply(threads, d, a, b, add):
        """64 rows times ``columns`` over 256 bits, by four warps, done when waited for; without ``add`` accumulators start at 0."""
        threads.by_warpgroup(a.index, f"bnn_wgmma{columns}")
        groups = threads.running().reshape(-1, 128)
        add = np.broadcast_to(add, (threads.count,))[groups[:, 0]].astype(bool)

        def run():
            for group, more in zip(groups, add):
                rows = threads.swizzled(a, group, 64)
                products = np.zeros((64, columns), np.int32)
                others = threads.swizzled(b, group, columns)
                for k in range(8):
                    products += np.bitwise_count(rows[:, None, k] & others[None, :, k])
                tile = products.reshape(4, 2, 8, columns // 8, 4, 2)  # warp, half, g, piece, t, e
                lanes = tile.transpose(0, 2, 4, 3, 1, 5).reshape(128, -1)  # lane 4 g + t; piece, half, e
                begin = d.index[group][:, None] + np.arange(count)
                lanes = lanes + d.memory.data[group[:, None], begin] if more else lanes
                d.memory.data[group[:, None], begin] = lanes
                d.memory.written[group[:, None], begin] = True

        threads.later("wgmma", run)


for _columns in (32, 64, 96, 128, 192, 256):
    _wgmma(_columns)


def _registers(way, count):
    @define(f"bnn_registers_{way}{count}", "", f"""
void bnn_registers_{way}{count}() {{ asm volatile("setmaxnreg.{way}.sync.aligned.u32 {count};"); }}""", needs=90)
    def change(threads):
        """The registers of the threads of a warpgroup from here on."""


_registers("dec", 56)
_registers("inc", 224)
