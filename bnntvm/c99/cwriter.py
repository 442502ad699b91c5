"""Small helpers to write C: types, literals, indented text."""

from __future__ import annotations

import contextlib
import math
import re

import numpy as np

#: dtype -> C type.
TYPES = {
    "float32": "float", "float64": "double", "bool": "uint8_t", "int8": "int8_t", "uint8": "uint8_t", "int16": "int16_t",
    "uint16": "uint16_t", "int32": "int32_t", "uint32": "uint32_t", "int64": "int64_t", "uint64": "uint64_t",
}  # fmt: skip

#: Of C and C++, which may include the header.
_KEYWORDS = set(
    "auto break case char const continue default do double else enum extern float for goto if inline int long register restrict return "
    "short signed sizeof static struct switch typedef union unsigned void volatile while "
    "alignas alignof and asm bool catch char16_t char32_t class compl concept const_cast constexpr decltype delete dynamic_cast explicit "
    "export false friend mutable namespace new noexcept not nullptr operator or private protected public reinterpret_cast requires "
    "static_assert static_cast template this thread_local throw true try typeid typename using virtual wchar_t xor".split()
)


#: Function calls are no constants: definitions of their own, of the compiler or of C99's <math.h>, for the few that are not finite.
NOT_FINITE = """\
#if defined(__GNUC__)
#define BNN_INFINITY __builtin_inff()
#define BNN_NAN __builtin_nanf("")
#else
#include <math.h>
#define BNN_INFINITY INFINITY
#define BNN_NAN NAN
#endif
"""


def number(value, dtype="float32"):
    """A literal with exactly this value."""
    kind = np.dtype(dtype).kind
    if kind == "b":
        return str(int(bool(value)))
    if kind == "f":
        return _floating(float(value), dtype == "float64")
    value = int(value)
    if dtype == "uint64":
        return f"{value}ull"
    if dtype == "int64":
        return "INT64_MIN" if value == -(2**63) else f"{value}ll" if abs(value) >= 2**31 else str(value)
    if dtype == "uint32":
        return f"{value}u"
    return "INT32_MIN" if value == -(2**31) else str(value)


def _floating(value, double):
    suffix = "" if double else "f"
    if math.isnan(value):
        return "BNN_NAN"
    if math.isinf(value):
        return "BNN_INFINITY" if value > 0 else "-BNN_INFINITY"
    text = f"{value:.17g}" if double else f"{np.float32(value):.9g}"
    short = repr(value) if double else str(np.float32(value))
    text = short if len(short) < len(text) else text
    return (text if any(c in text for c in ".e") else text + ".0") + suffix


def identifier(name, taken=()):
    """A C identifier like ``name`` that is not in ``taken``."""
    text = "".join(c if c.isascii() and c.isalnum() else "_" for c in name) or "_"
    text = "_" + text if text[0].isdigit() or text in _KEYWORDS else text
    made, count = text, 1
    while made in taken:
        count += 1
        made = f"{text}_{count}"
    return made


def comment(text):
    """``text`` as it may stand in a comment: printable, no ends or beginnings of comments, no trigraphs."""
    text = "".join(c if " " <= c <= "~" else "?" for c in text)
    for bad in ("*/", "/*", "??"):
        text = text.replace(bad, f"{bad[0]} {bad[1]}")
    return text.rstrip("\\")


class Writer:
    """Lines of C with the indentation of the block they are in."""

    def __init__(self):
        self.lines, self.depth = [], 0

    def __call__(self, *lines):
        for line in lines:
            self.lines.append("    " * self.depth + line if line else "")

    @contextlib.contextmanager
    def block(self, head):
        """``head { ... }``"""
        self(head + " {")
        self.depth += 1
        yield
        self.depth -= 1
        self("}")

    @contextlib.contextmanager
    def function(self, head):
        """A function: its braces stand alone."""
        self(head, "{")
        self.depth += 1
        yield
        self.depth -= 1
        self("}", "")

    def loop(self, name, stop, start=0):
        """``for (int32_t name = start; name < stop; name++) { ... }``"""
        return self.block(f"for (int32_t {name} = {start}; {name} < {stop}; {name}++)")

    def include(self, other):
        """The lines of another writer, here."""
        self(*other.lines)

    def define(self, body, **names):
        """int32 constants, each only if ``body`` reads it."""
        text = body.text()
        for name, value in names.items():
            if re.search(rf"\b{name}\b", text):
                self(f"const int32_t {name} = {value};")

    def text(self):
        return "\n".join(self.lines) + "\n"


def wrapping(a, operator, b, dtype):
    """Sum, difference or product of integers modulo 2^bits, as ONNX has it: overflow of signed integers is undefined in C.

    Narrow operands are first promoted to int, which wraps nowhere: their result is cut as well.
    """
    if dtype in ("uint32", "uint64"):
        return f"({a} {operator} {b})"
    unsigned = "uint64_t" if dtype == "int64" else "uint32_t"
    return f"(({TYPES[dtype]})(({unsigned}){a} {operator} ({unsigned}){b}))"


def term(base, factor):
    """``base * factor`` without a factor of 1."""
    return base if factor == 1 else f"{base} * {factor}"


def array(data, per_line=8):
    """The values of a constant array, in lines."""
    flat = np.ascontiguousarray(data).reshape(-1)
    if flat.dtype == np.uint32:
        values = [f"0x{v:08x}u" for v in flat.tolist()]
    else:
        values = [number(v, str(flat.dtype)) for v in flat.tolist()]
        per_line = 16 if flat.dtype.itemsize < 4 else per_line
    return [", ".join(values[i : i + per_line]) + "," for i in range(0, len(values), per_line)]
