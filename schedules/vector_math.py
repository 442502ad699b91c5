"""Transcendental functions on float32 vectors, written out as polynomials.

LLVM has no vector library to call on x86 and would call the C library once per lane. Every function here takes a vector and
``bind(name, value)``, which names an intermediate result, and returns an expression. Relative errors are below 4e-7 (about 3 units in the
last place); infinities, zeros and (for exp) subnormal results come out as IEEE says.
"""

from __future__ import annotations

import numpy as np
from tvm import tirx

from bnntvm.schedules import tir

LN2_HIGH = 0.693359375  # nine bits: its product with an exponent is exact
LN2_LOW = float(np.log(2.0)) - LN2_HIGH


def _splat(value, like):
    return tir.splat(float(np.float32(value)), "float32", tir.lanes_of(like))


def _int_splat(value, like):
    return tir.splat(value, "int32", tir.lanes_of(like))


def _int_vector(like):
    return tir.vector_type("int32", tir.lanes_of(like))


def _horner(x, coefficients):
    """``coefficients[0] + coefficients[1] * x + ...``"""
    result = _splat(coefficients[-1], x)
    for c in reversed(coefficients[:-1]):
        result = result * x + _splat(c, x)
    return result


def _power_of_two(exponent):
    """``2 ** exponent`` for int32 lanes in [-126, 127]."""
    bits = (exponent + _int_splat(127, exponent)) << _int_splat(23, exponent)
    return tir.reinterpret("float32", bits)


def exp(x, bind):
    """e ** x: x = n ln 2 + r, Taylor's series for e ** r, and two steps to scale by 2 ** n, so that neither overflows early."""
    x = bind("x", tirx.Min(tirx.Max(x, _splat(-105.0, x)), _splat(89.0, x)))
    n = bind("n", tir.intrinsic("llvm.rint", x * _splat(1.4426950408889634, x)))
    r = bind("r", x - n * _splat(LN2_HIGH, x) - n * _splat(LN2_LOW, x))
    series = _horner(r, [1.0, 1.0, 1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040])
    whole = bind("i", tirx.Cast(_int_vector(x), n))
    half = bind("h", whole >> _int_splat(1, x))
    return series * _power_of_two(half) * _power_of_two(whole - half)


FUNCTIONS = {"exp": exp}
