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
