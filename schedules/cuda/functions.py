"""Device functions of the families that are not about bits; see :mod:`.device`."""

from __future__ import annotations

import numpy as np

from bnntvm.schedules.cuda import device

SIDE = 8  #: rows and columns of a thread's tile


def _fma(_threads, a, b, c):
    """One rounding (of a float64 that is exact for all but extreme exponents)."""
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)


device.define("bnn_fma", "float32", "float bnn_fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }")(_fma)


@device.define("bnn_exchange", "float32", "float bnn_exchange(float v, int d) { return __shfl_xor_sync(0xffffffffu, v, d); }")
def _exchange(threads, v, distance):
    """``v`` of the lane whose number differs in the bits of ``distance``."""
    return threads.by_warp(v, "bnn_exchange")[:, np.arange(32) ^ int(np.max(distance))].reshape(-1)


@device.define("bnn_exchange_int", "int32", "int bnn_exchange_int(int v, int d) { return __shfl_xor_sync(0xffffffffu, v, d); }")
def _exchange_int(threads, v, distance):
    """The same for integers."""
    return threads.by_warp(v, "bnn_exchange_int")[:, np.arange(32) ^ int(np.max(distance))].reshape(-1)


def _rows(threads, pointer, count):
    """``(who, rows, columns)``: where ``count`` elements from a pointer on lie, for the active threads."""
    who = threads.running()
    owners = pointer.memory.owners[who] if pointer.memory.owners is not None else np.zeros(len(who), np.int64)
    first = threads.spread(pointer.index)[who]
    return who, owners[:, None], first[:, None] + np.arange(count)


@device.define(
    "bnn_load4",
    "",
    """
void bnn_load4(unsigned* r, const unsigned* s) {
  const uint4 v = *reinterpret_cast<const uint4*>(s);
  r[0] = v.x; r[1] = v.y; r[2] = v.z; r[3] = v.w;
}""",
)
def _load4(threads, registers, source):
    """Four words of shared memory, at a multiple of 16 bytes."""
    if (threads.spread(source.index)[threads.running()] % 4).any():
        from bnntvm.schedules.cuda.emulate import Fault

        raise Fault("bnn_load4: the address is no multiple of 16 bytes")
    for i in range(4):
        threads.store(registers.memory, registers.index + i, threads.load(source.memory, source.index + i))


@device.define(
    "bnn_outer",
    "",
    f"""
void bnn_outer(float* sums, const unsigned* x, const unsigned* w) {{
#pragma unroll
  for (int i = 0; i < {SIDE}; ++i)
#pragma unroll
    for (int j = 0; j < {SIDE}; ++j)
      sums[{SIDE} * i + j] = __fmaf_rn(__uint_as_float(x[i]), __uint_as_float(w[j]), sums[{SIDE} * i + j]);
}}""",
)
def _outer(threads, sums, x, w):
    """sums[i, j] += x[i] * w[j], floats, contracted."""
    _, row, at = _rows(threads, sums, SIDE * SIDE)
    a, b = _floats(threads, x).astype(np.float64)[:, :, None], _floats(threads, w).astype(np.float64)[:, None, :]
    total = (a * b).reshape(len(at), -1) + sums.memory.data[row, at].astype(np.float64)
    sums.memory.data[row, at] = total.astype(np.float32)


def _words(threads, pointer):
    _, row, at = _rows(threads, pointer, SIDE)
    if not pointer.memory.written[row, at].all():
        from bnntvm.schedules.cuda.emulate import Fault

        raise Fault(f"{pointer.memory.name} is read before it is written")
    return np.ascontiguousarray(pointer.memory.data[row, at])


def _floats(threads, pointer):
    return _words(threads, pointer).view(np.float32)


def _quads(signed):
    """Sums of products of four bytes each; ``signed`` data, or unsigned, weights are signed."""
    name, kind = ("bnn_dots", "s32") if signed else ("bnn_dots_unsigned", "u32")
    source = f"""
void {name}(int* sums, const unsigned* x, const unsigned* w) {{
#pragma unroll
  for (int i = 0; i < {SIDE}; ++i)
#pragma unroll
    for (int j = 0; j < {SIDE}; ++j)
      asm("dp4a.{kind}.s32 %0, %1, %2, %0;" : "+r"(sums[{SIDE} * i + j]) : "r"(x[i]), "r"(w[j]));
}}"""

    @device.define(name, "", source)
    def dots(threads, sums, x, w):
        _, row, at = _rows(threads, sums, SIDE * SIDE)
        a = _words(threads, x).view(np.int8 if signed else np.uint8).reshape(len(at), SIDE, 4).astype(np.int64)
        b = _words(threads, w).view(np.int8).reshape(len(at), SIDE, 4).astype(np.int64)
        sums.memory.data[row, at] += np.einsum("tik,tjk->tij", a, b).reshape(len(at), -1).astype(np.int32)


_quads(True)
_quads(False)


def _quad(signed):
    """One sum of four products."""
    name, kind = ("bnn_dot", "s32") if signed else ("bnn_dot_unsigned", "u32")
    source = f"""
int {name}(int sum, unsigned x, unsigned w) {{
  asm("dp4a.{kind}.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(x), "r"(w));
  return sum;
}}"""

    @device.define(name, "int32", source)
    def dot(threads, total, x, w):
        x, w = (np.ascontiguousarray(threads.spread(v)) for v in (x, w))
        a = x.view(np.int8 if signed else np.uint8).reshape(-1, 4).astype(np.int64)
        return (total + (a * w.view(np.int8).reshape(-1, 4)).sum(1)).astype(np.int32)


_quad(True)
_quad(False)


# Floats on tensor cores: three products of tf32 (:mod:`.tf32`) ------------------------------------------------------------------------

#: What of a float32 is a tf32: sign, exponent and 10 bits of the significand.
TF32 = 0xFFFFE000


def truncated(values):
    """float32 without the bits that tensor cores do not read."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) & np.uint32(TF32)).view(np.float32)


def _fetch(count):
    """Floats to shared memory, asynchronously, or zeros: ``cp.async`` where they are aligned to their size, one by one elsewhere."""
    kind = "cg" if count == 4 else "ca"
    alone = "".join(
        f"""
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(s + {4 * i}), "l"(src + {i}), "r"(valid ? 4 : 0) : "memory");"""
        for i in range(count)
    )
    source = f"""
void bnn_fetch{count}(unsigned* dst, const float* src, bool valid) {{
  unsigned s = (unsigned)__cvta_generic_to_shared(dst);
  if (((unsigned long long)src & {4 * count - 1}) == 0)
    asm volatile("cp.async.{kind}.shared.global [%0], [%1], {4 * count}, %2;"
                 :: "r"(s), "l"(src), "r"(valid ? {4 * count} : 0) : "memory");
  else {{{alone}
  }}
}}"""
    if count == 1:  # a float always is
        source = f"""
void bnn_fetch1(unsigned* dst, const float* src, bool valid) {{
  unsigned s = (unsigned)__cvta_generic_to_shared(dst);{alone}
}}"""

    @device.define(f"bnn_fetch{count}", "", source, needs=80)
    def fetch(threads, dst, src, valid):
        found = device.copied(threads, src, valid, count, (dst,))

        def arrive():
            for k, value in enumerate(found):
                threads.store(dst.memory, dst.index + k, np.ascontiguousarray(value).view(np.uint32))

        threads.claim(dst.memory, dst.index, count)
        threads.later("copy", arrive)


_fetch(1)
_fetch(4)


def _split(name, count):
    source = f"""
void {name}(unsigned* a) {{
#pragma unroll
  for (int i = 0; i < {count}; ++i) {{
    const unsigned big = a[i] & {TF32:#x}u;
    a[{count} + i] = __float_as_uint(__fsub_rn(__uint_as_float(a[i]), __uint_as_float(big)));
    a[i] = big;
  }}
}}"""

    @device.define(name, "", source, needs=80)
    def split(threads, words):
        """Floats as a tf32 each, and behind them what that leaves: exact, but NaN of an infinity."""
        for i in range(count):
            value = np.ascontiguousarray(threads.load(words.memory, words.index + i)).view(np.float32)
            big = truncated(value)
            threads.store(words.memory, words.index + count + i, np.subtract(value, big, dtype=np.float32).view(np.uint32))
            threads.store(words.memory, words.index + i, big.view(np.uint32))


_split("bnn_split_tf32", 4)
_split("bnn_split_pair_tf32", 2)


_MMA_TF32 = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"


@device.define(
    "bnn_mma_tf32",
    "",
    f"""
void bnn_mma_tf32(float* d, const unsigned* a, const unsigned* b) {{
  float t[4];
  asm volatile("{_MMA_TF32} {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%10, %10, %10, %10}};"
               : "=f"(t[0]), "=f"(t[1]), "=f"(t[2]), "=f"(t[3])
               : "r"(a[4]), "r"(a[5]), "r"(a[6]), "r"(a[7]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
  asm volatile("{_MMA_TF32} {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};"
               : "+f"(t[0]), "+f"(t[1]), "+f"(t[2]), "+f"(t[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2]), "r"(b[3]));
  asm volatile("{_MMA_TF32} {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};"
               : "+f"(t[0]), "+f"(t[1]), "+f"(t[2]), "+f"(t[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#pragma unroll
  for (int e = 0; e < 4; ++e) d[e] = __fadd_rn(d[e], t[e]);
}}""",
    needs=80,
)
def _mma_tf32(threads, d, a, b):
    """Add 16 x 8 sums of eight products of float32, each as three products of tf32: a[4:] b[:2] + a[:4] b[2:] + a[:4] b[:2].

    Tensor cores begin at 0, so what they cut off (they round their sums towards zero) is a part of these eight products; the sum of all
    is rounded to nearest. Lane 4 g + t has of A rows g, g + 8 of column t, then of column t + 4; of B column g of rows t, t + 4.
    """
    threads.by_warp(a.index, "bnn_mma_tf32")
    a, b = device.fragment(threads, a, 8), device.fragment(threads, b, 4)
    rows = [np.concatenate([_columns(a[..., i + h], a[..., i + 2 + h]) for h in (0, 1)], 1) for i in (0, 4)]  # big, small [warps, 16, 8]
    others = [_columns(b[..., i], b[..., i + 1]) for i in (0, 2)]
    total = np.zeros((len(a), 16, 8), np.float32)
    for left, right in ((1, 0), (0, 1), (0, 0)):
        total = _towards_zero(rows[left] @ others[right].transpose(0, 2, 1) + total)
    device.add(threads, d, total)


def _columns(low, high):
    """float64[warps, 8, 8] of words that tensor cores read: places t and t + 4 of each row."""
    return truncated(np.concatenate([low, high], -1).view(np.float32)).astype(np.float64)


def _towards_zero(exact):
    """float32 of float64, rounded as tensor cores do."""
    nearest = exact.astype(np.float32)
    return np.where(np.abs(nearest) > np.abs(exact), np.nextafter(nearest, np.float32(0)), nearest)


def _finite_ones(count):
    @device.define(f"bnn_all_finite{count}", "bool", f"""
bool bnn_all_finite{count}(const float* v) {{
  float t = 0x1p127f;
#pragma unroll
  for (int i = 0; i < {count}; ++i) t = __fadd_rn(t, fabsf(v[i]));
  return t < __int_as_float(0x7f800000);
}}""")  # fmt: skip
    def all_finite(threads, v):
        """Whether the numbers are finite and not near the end of float32, where sums are cut off; many large ones may be taken for that."""
        total = np.full(threads.count, np.float32(2.0**127))
        for i in range(count):
            total = np.add(total, np.abs(threads.load(v.memory, v.index + i)), dtype=np.float32)
        return total < np.inf


for _count in (1, 16, 32, 64):
    _finite_ones(_count)


#: Steps of eight elements of K that are one group of asynchronous products.
TOGETHER = 2


def _wgmma_tf32(columns):
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    data = ", ".join(f"%{count + i}" for i in range(4))

    @device.define(f"bnn_wgmma_tf32_{columns}", "", f"""
void bnn_wgmma_tf32_{columns}(float* d, const unsigned* a, const unsigned* b, int add) {{
  // Rows of 128 bytes, eight of them a swizzled kilobyte: stride 1024 bytes, 128-byte swizzle.
  const unsigned long long fixed = (1ull << 62) | (64ull << 32) | (1ull << 16);
  unsigned long long db = fixed | (((unsigned)__cvta_generic_to_shared(b) & 0x3ffff) >> 4);
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 5}, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n{columns}k8.f32.tf32.tf32 {{{registers}}}, {{{data}}}, %{count + 4}, p, 1, 1;\\n}}"
               : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(db), "r"(add));
}}""", needs=90)  # fmt: skip
    def multiply(threads, d, a, b, add):
        """64 rows in registers times ``columns`` rows in shared memory, eight elements each, by four warps; done when waited for.

        Lane 4 g + t of warp w has of A rows 16 w + g, 16 w + g + 8 of column t, then of t + 4. Without ``add`` sums start at 0.
        """
        threads.by_warpgroup(b.index, f"bnn_wgmma_tf32_{columns}")
        groups = threads.running().reshape(-1, 128)
        add = np.broadcast_to(add, (threads.count,))[groups[:, 0]].astype(bool)

        def run():
            for group, more in zip(groups, add):
                at = a.index[group][:, None] + np.arange(4)
                words = a.memory.data[group[:, None], at].reshape(4, 8, 4, 4)  # warp, g, t, word
                rows = np.stack([_columns(words[..., h], words[..., 2 + h]) for h in (0, 1)], 1).reshape(64, 8)
                others = truncated(threads.swizzled(b, group, columns).view(np.float32)).astype(np.float64)
                begin = d.index[group][:, None] + np.arange(count)
                before = d.memory.data[group[:, None], begin] if more else np.zeros((128, count), np.float32)
                tile = (rows @ others.T).reshape(4, 2, 8, columns // 8, 4, 2)  # warp, half, g, piece, t, e
                lanes = tile.transpose(0, 2, 4, 3, 1, 5).reshape(128, -1)  # lane 4 g + t; piece, half, e
                d.memory.data[group[:, None], begin] = _towards_zero(lanes + before)
                d.memory.written[group[:, None], begin] = True

        threads.later("wgmma", run)

    def waiting(left):
        words = 8 * TOGETHER
        tied = ", ".join([*(f'"+f"(d[{i}])' for i in range(count)), *(f'"+r"(a[{i}])' for i in range(words))])

        @device.define(f"bnn_wait_tf32_{columns}_{left}", "", f"""
void bnn_wait_tf32_{columns}_{left}(float* d, unsigned* a) {{
  asm volatile("wgmma.wait_group.sync.aligned {left};" : {tied} :: "memory");
}}""", needs=90)  # fmt: skip
        def wait_for(threads, d, a):
            """Until at most so many groups are under way; what the oldest one wrote and read is there from here on."""
            threads.wait("wgmma", left)

    waiting(0)
    waiting(1)


for _count in (32, 64):
    _wgmma_tf32(_count)
