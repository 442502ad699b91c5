"""bnn.h's functions against numpy in double precision, and its square root and rounding against what IEEE 754 says, bit for bit."""

import ctypes

import numpy as np
import pytest
from scipy import special

from bnntvm.c99 import kernels
from tests.c99.native import STRICT, run

HEADER = kernels.__file__.replace("kernels.py", "templates")
UNARY = ("sqrt", "round", "floor", "ceil", "trunc", "exp", "log", "tanh", "sigmoid", "erf", "sign", "abs")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("math")
    code = ['#include "bnn.h"']
    for name in UNARY:
        code += [
            f"void map_{name}(int32_t n, const float *x, float *y)",
            "{ for (int32_t i = 0; i < n; i++)",
            f"y[i] = bnn_{name}(x[i]); }}",
        ]
    code += ["void power(int32_t n, const float *x, const float *y, float *z)", "{ for (int32_t i = 0; i < n; i++)"]
    code += ["z[i] = bnn_power(x[i], y[i]); }", "void integers(int32_t n, const float *x, int32_t *y)"]
    code += ["{ for (int32_t i = 0; i < n; i++)", "y[i] = bnn_int32(x[i]); }"]
    code += ["int32_t count(const uint32_t *a, int32_t n) { return bnn_count(a, n); }"]
    (folder / "math.c").write_text("\n".join(code) + "\n")
    checks = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    run(["gcc", *STRICT, "-O2", "-fPIC", "-shared", *checks, "-I", HEADER, "math.c", "-o", "math.so"], folder)
    return ctypes.CDLL(str(folder / "math.so"))


def call(function, *arrays, result=np.float32):
    out = np.full(arrays[0].shape, 77, result)
    function(ctypes.c_int32(out.size), *[a.ctypes.data_as(ctypes.c_void_p) for a in (*arrays, out)])
    return out


def floats():
    """Every kind of float32: all exponents, both signs, halves and their neighbours, zeros, subnormals, infinities, NaN."""
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    halves = (np.arange(-4000, 4000) / 2).astype(np.float32)
    special_ones = np.float32([0.0, -0.0, 1e-45, -1e-45, 1.17549435e-38, 3.4e38, np.inf, -np.inf, np.nan, 2**23, 2**24, 2**31, -(2**31)])
    return np.concatenate([bits.view(np.float32), halves, np.nextafter(halves, np.float32(9e9)), special_ones, 1 + special_ones])


@pytest.mark.parametrize("name", ["sqrt", "round", "floor", "ceil", "trunc", "sign", "abs"])
def test_exact(library, name):
    """The same bits as numpy's, which are those of IEEE 754; the sign of a zero may differ for floor and ceil."""
    x = floats()
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(call(library[f"map_{name}"], x), getattr(np, name)(x))


@pytest.mark.parametrize("name", ["exp", "log", "tanh", "sigmoid", "erf"])
def test_close(library, name):
    """Relative error below 4e-7, as the header says, and the right infinities, zeros and NaN."""
    x = np.concatenate([floats(), np.linspace(-110, 95, 200_001, dtype=np.float32), np.linspace(-5, 5, 100_001, dtype=np.float32)])
    functions = dict(exp=np.exp, log=np.log, tanh=np.tanh, sigmoid=special.expit, erf=special.erf)
    with np.errstate(all="ignore"):
        wanted = functions[name](x.astype(np.float64))
        wanted = wanted.astype(np.float32)
    tiny = 1.2e-38 if name == "sigmoid" else 2e-45  # subnormal results of sigmoid are 0
    np.testing.assert_allclose(call(library[f"map_{name}"], x), wanted, rtol=4e-7, atol=tiny)


def test_power(library):
    """Whole exponents of either sign, and real ones of positive numbers."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-4, 4, 20_000).astype(np.float32), rng.integers(-9, 10, 20_000).astype(np.float32)
    np.testing.assert_allclose(call(library.power, x, y), x.astype(np.float64) ** y, rtol=2e-6)
    x, y = np.abs(x) + np.float32(0.1), rng.uniform(-4, 4, 20_000).astype(np.float32)
    np.testing.assert_allclose(call(library.power, x, y), x.astype(np.float64) ** y, rtol=5e-6)


def test_integers(library):
    """Towards zero, saturated; NaN is the least."""
    x = floats()
    with np.errstate(all="ignore"):
        wanted = np.where(np.isnan(x), -(2.0**31), np.clip(np.trunc(x.astype(np.float64)), -(2.0**31), 2.0**31 - 1))
    np.testing.assert_array_equal(call(library.integers, x, result=np.int32), wanted.astype(np.int64).astype(np.int32))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 29, 30, 31, 33, 100, 3001])
def test_count(library, n):
    """Runs of any length, full of ones too: the counters in between must not overflow."""
    for words in (np.full(n, 2**32 - 1, np.uint32), np.random.default_rng(n).integers(0, 2**32, n, dtype=np.uint64).astype(np.uint32)):
        assert library.count(words.ctypes.data_as(ctypes.c_void_p), n) == sum(bin(w).count("1") for w in words.tolist())
