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
