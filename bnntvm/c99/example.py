"""The example program and its test vectors.

The inputs are made by a small generator that C and numpy share, so that only what the network should answer is stored.
"""

from __future__ import annotations

import numpy as np

import bnntvm.interpreter.packed  # noqa: F401  (teaches the interpreter the packed operators)
from bnntvm import interpreter

from .cwriter import NOT_FINITE, TYPES, Writer, array

#: state = MULTIPLIER * state + INCREMENT modulo 2 ** 32 (Numerical Recipes' quick generator).
MULTIPLIER, INCREMENT, SEED = 1664525, 1013904223, 1
#: Values of an output that are stored and compared.
STORED = 4096


def inputs(tensors):
    """What the example feeds: floats k / 32 and bytes k with random 8-bit k, other integers 0 or 1.

    Parameters
    ----------
    tensors : list of .emit.Tensor

    Returns
    -------
    list of ndarray
    """
    states = _states(sum(t.size for t in tensors))
    out, at = [], 0
    for t in tensors:
        out.append(_values(states[at : at + t.size], np.dtype(t.dtype)).reshape(t.shape))
        at += t.size
    return out


def _states(count):
    """uint32 [count]: the generator's states behind the seed."""
    powers = np.multiply.accumulate(np.full(count + 1, MULTIPLIER, np.uint32), dtype=np.uint32)
    sums = np.cumsum(np.r_[np.uint32(1), powers[: max(count - 1, 0)]], dtype=np.uint32)[:count]
    return powers[:count] * np.uint32(SEED) + sums * np.uint32(INCREMENT)


def _values(states, dtype):
    octets = (states >> np.uint32(24)).astype(np.int64)
    if dtype.kind == "f":
        return ((octets - 128) / 32).astype(dtype)
    if dtype in (np.uint8, np.int8):
        return octets.astype(np.uint8).view(dtype)
    return (octets >> 7).astype(dtype)


def _c_value(dtype):
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return f"({TYPES[dtype]})((int32_t)(state >> 24) - 128) / 32"
    if dtype in ("uint8", "int8"):
        return f"({TYPES[dtype]})(state >> 24)" if dtype == "uint8" else "(int8_t)((int32_t)(state >> 24) - ((state >> 31) ? 256 : 0))"
    return f"({TYPES[dtype]})(state >> 31)"


def files(source, mod):
    """``main.c`` and ``NAME_test.h``; without ``mod`` nothing is expected of the outputs."""
    try:
        expected = interpreter.run(mod, inputs(source.inputs)) if mod is not None else None
    except NotImplementedError:  # an operator that the interpreter does not know
        expected = None
    return {"main.c": _main(source, expected), f"{source.name}_test.h": _vectors(source, expected)}


def _vectors(source, expected):
    out, guard = Writer(), f"{source.name.upper()}_TEST_H"
    out("/* What the network answers to the example's inputs, as the numpy interpreter has it. */")
    out(f"#ifndef {guard}", f"#define {guard}", "", "#include <stdint.h>", "")
    if any(not np.isfinite(np.asarray(data, np.float64)).all() for data in expected or ()):
        out(*NOT_FINITE.split("\n"))
    for t, data in zip(source.outputs, expected or ()):
        part = np.asarray(data).reshape(-1)[:STORED].astype(t.dtype)
        out(f"static const {TYPES[t.dtype]} expected_{t.parameter}[{max(part.size, 1)}] = {{")
        out(*["    " + line for line in array(part)], "};", "")
    out("#endif")
    return out.text()


_HEAD = """\
/* Runs the network on made-up inputs, compares what it answers with {name}_test.h, and prints a hash of the outputs' bytes, which is the
 * same on every little-endian machine. Nothing but this file needs a C library. */
#include <inttypes.h>
#include <stdio.h>

#include "{name}.h"
#include "{name}_test.h"

static uint32_t hash(const void *data, uint32_t bytes)
{{
    const unsigned char *p = data;
    uint32_t value = 2166136261u; /* FNV-1a */
    while (bytes--)
        value = (value ^ *p++) * 16777619u;
    return value;
}}
"""


def _main(source, expected):
    out = Writer()
    out(*_HEAD.format(name=source.name).split("\n"))
    for t in (*source.inputs, *source.outputs):
        out(f"static {TYPES[t.dtype]} tensor_{t.parameter}[{t.macro}];")
    out("")
    with out.function("int main(void)"):
        out(f"uint32_t state = {SEED}u;", "int status, wrong = 0;")
        for t in source.inputs:
            with out.block(f"for (int32_t i = 0; i < {t.macro}; i++)"):
                out(f"state = state * {MULTIPLIER}u + {INCREMENT}u;", f"tensor_{t.parameter}[i] = {_c_value(t.dtype)};")
        arguments = ", ".join(f"tensor_{t.parameter}" for t in (*source.inputs, *source.outputs))
        out(f"status = {source.name}_run({arguments});")
        with out.block(f"if (status != {source.name.upper()}_OK)"):
            out('printf("status %d\\n", status);', "return 1;")
        for t, data in zip(source.outputs, expected or [None] * len(source.outputs)):
            _compare(out, t, data)
        out('puts(wrong ? "WRONG" : "ok");' if expected else 'puts("nothing to compare with");', "return wrong;")
    return out.text().rstrip("\n") + "\n"


def _compare(out, t, data):
    """Integers must be equal; floats within 1e-4 of the largest, which sums in another order may cost."""
    out(f'printf("{t.parameter} %08" PRIx32 "\\n", hash(tensor_{t.parameter}, sizeof tensor_{t.parameter}));')
    if data is None:
        return
    count, scale = min(t.size, STORED), float(np.max(np.abs(_finite(data)), initial=0.0))
    with out.block(f"for (int32_t i = 0; i < {count}; i++)"):
        if np.dtype(t.dtype).kind == "f":
            out(f"const double got = tensor_{t.parameter}[i], wanted = expected_{t.parameter}[i], error = got - wanted;")
            out(f"wrong |= got != wanted && !(error <= {1e-4 * scale + 1e-30:.6g} && error >= -{1e-4 * scale + 1e-30:.6g});")
        else:
            out(f"wrong |= tensor_{t.parameter}[i] != expected_{t.parameter}[i];")


def _finite(data):
    """The finite elements of an array, float64."""
    flat = np.asarray(data, np.float64).reshape(-1)
    return flat[np.isfinite(flat)]
