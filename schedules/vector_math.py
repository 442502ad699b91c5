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
    x = bind("x", tirx.Min(_splat(89.0, x), tirx.Max(_splat(-105.0, x), x)))  # in this order NaN stays NaN
    n = bind("n", tir.intrinsic("llvm.rint", x * _splat(1.4426950408889634, x)))
    r = bind("r", x - n * _splat(LN2_HIGH, x) - n * _splat(LN2_LOW, x))
    series = _horner(r, [1.0, 1.0, 1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040])
    whole = bind("i", tirx.Cast(_int_vector(x), n))
    half = bind("h", whole >> _int_splat(1, x))
    return series * _power_of_two(half) * _power_of_two(whole - half)


def log(x, bind):
    """Natural logarithm: x = 2 ** e * m with m in [sqrt(1/2), sqrt(2)), and log m = 2 artanh s by its series, s = (m - 1) / (m + 1)."""
    x = bind("x", x)
    tiny = x < _splat(2.0**-126, x)
    normal = bind("n", tir.select(tiny, x * _splat(2.0**23, x), x))
    bits = bind("b", tir.reinterpret("int32", normal))
    e = bind("e", (bits - _int_splat(_SQRT_HALF_BITS, x)) >> _int_splat(23, x))
    m = tir.reinterpret("float32", bits - (e << _int_splat(23, x)))
    exponent = bind("k", tirx.Cast(f"float32x{tir.lanes_of(x)}", e) - tir.select(tiny, _splat(23.0, x), _splat(0.0, x)))
    f = bind("f", m - _splat(1.0, x))
    s = bind("s", f / (f + _splat(2.0, x)))
    z = bind("z", s * s)
    series = z * _horner(z, [2 / 3, 2 / 5, 2 / 7, 2 / 9])
    result = exponent * _splat(LN2_HIGH, x) + (f - (s * (f - series) - exponent * _splat(LN2_LOW, x)))
    result = tir.select(x > _splat(0.0, x), result, tir.select(tirx.EQ(x, _splat(0.0, x)), _splat(-np.inf, x), _splat(np.nan, x)))
    return tir.select(tirx.EQ(x, _splat(np.inf, x)), x, result)


def _with_sign(magnitude, x):
    """``magnitude`` with the sign of ``x``."""
    return tir.select(x < _splat(0.0, x), _splat(0.0, x) - magnitude, magnitude)


def tanh(x, bind):
    """A polynomial near 0, ``1 - 2 / (e ** 2|x| + 1)`` elsewhere."""
    x = bind("x", x)
    size, z = bind("m", tir.intrinsic("llvm.fabs", x)), bind("z", x * x)
    small = x + x * (z * _horner(z, _TANH))
    large = _splat(1.0, x) - _splat(2.0, x) / (exp(size + size, bind) + _splat(1.0, x))
    return tir.select(size < _splat(0.625, x), small, _with_sign(large, x))


def sigmoid(x, bind):
    """``1 / (1 + e ** -x)``"""
    return _splat(1.0, x) / (_splat(1.0, x) + exp(_splat(0.0, x) - x, bind))


def erf(x, bind):
    """A polynomial up to 1, ``1 - e ** -p(|x|)`` beyond, where p approximates ``-log erfc``; 1 from 4 on."""
    x = bind("x", x)
    size, z = bind("m", tirx.Min(_splat(4.0, x), tir.intrinsic("llvm.fabs", x))), bind("z", x * x)
    large = _splat(1.0, x) - exp(_splat(0.0, x) - _horner(size, _MINUS_LOG_ERFC), bind)
    return tir.select(size < _splat(1.0, x), x * _horner(z, _ERF), _with_sign(large, x))


_SQRT_HALF_BITS = int(np.float32(np.sqrt(0.5)).view(np.int32))
# Weighted least squares, iterated towards the minimax polynomial; largest relative error in brackets.
#: (tanh(x) / x - 1) / z in z = x * x up to 0.625 ** 2 (5e-9).
_TANH = [-0.3333333317339596, 0.1333330363224639, -0.05395927148162198, 0.02176899308478355, -0.008344145473079887, 0.002292937907170362]
#: erf(x) / x in z = x * x up to 1 (1.2e-9).
_ERF = [1.1283791657266902, -0.3761262582409101, 0.11283585147006987, -0.026853811868153457, 0.00518832755820205, -0.000801019250458118,
        7.853857651305146e-05]  # fmt: skip
#: -log(erfc(x)) in x from 1 to 4 (absolute error 1.2e-8).
_MINUS_LOG_ERFC = [-0.0002910254182166838, 1.1301197154342413, 0.6320134435582749, 0.10990972701742197, -0.026327522097859157,
                   0.0047276880284670445, -0.0005902031842961273, 4.5298092341730446e-05, -1.5998191542270755e-06]  # fmt: skip

#: Step name -> function(vector, bind).
FUNCTIONS = {"exp": exp, "log": log, "tanh": tanh, "sigmoid": sigmoid, "erf": erf}
