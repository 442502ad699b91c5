"""The text of ``NAME.c``, ``NAME.h`` and the weights: kernels, the workspace, and one call after the other."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from bnntvm.errors import UnsupportedError

from . import kernels, tir
from .cwriter import NOT_FINITE, TYPES, Writer, array, comment, identifier
from .plan import plan
from .program import Buffer, Loose
from .rows import Rows

#: Characters of a tensor's name that its parameter keeps: C99 promises to tell names apart by the first 63.
_LONGEST = 40
#: Names that may be macros, types or functions where a parameter stands.
_OTHERS = re.compile(r"_*[A-Z][A-Z0-9_]+$|_[A-Z_]|u?int\w*_t$|finite_|(linux|unix|i386|arm)$")


@dataclass
class Tensor:
    """An input or output as the C function has it: parameter, macro of its size, ONNX name, shape, dtype, dtype in the ONNX file."""

    parameter: str
    macro: str
    name: str
    shape: tuple
    dtype: str
    declared: str

    @property
    def size(self):
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bytes(self):
        return self.size * np.dtype(self.dtype).itemsize


@dataclass
class Source:
    """What was written: text of each file, and facts for the report."""

    name: str
    inputs: list
    outputs: list
    files: dict = field(default_factory=dict)
    constants: list = field(default_factory=list)  # (C name, array)
    plan: object = None
    calls: list = field(default_factory=list)  # one name for each step


class Emitter:
    """Writes one program.

    Parameters
    ----------
    program : .program.Program
    name : str
        Prefix of everything that other files see; a C identifier.
    inputs, outputs : list
        What the model says of them: ``name``, ``dtype``.
    origin : str
        Where the network comes from, for comments.
    """

    def __init__(self, program, name, inputs, outputs, origin):
        self.program, self.name, self.origin = program, name, origin
        self.functions, self.texts, self.constants, self.scratch = {}, [], {}, {}
        taken = {name, "workspace", "AT"}
        self.inputs = [self.tensor(b, i, taken) for b, i in zip(program.inputs, inputs)]
        self.outputs = [self.tensor(b, o, taken) for b, o in zip(program.outputs, outputs)]
        self.places = {b: t.parameter for b, t in zip([*program.inputs, *program.outputs], [*self.inputs, *self.outputs])}

    def tensor(self, buffer, info, taken):
        parameter = identifier(info.name[:_LONGEST], taken)
        if _OTHERS.match(parameter):
            parameter = identifier(f"t_{parameter}", taken)
        macro = identifier(f"{self.name}_{parameter}_SIZE".upper(), taken)
        taken |= {parameter, macro}
        return Tensor(parameter, macro, info.name, buffer.shape, buffer.dtype, str(info.dtype))

    def source(self):
        """Everything.

        Returns
        -------
        Source
        """
        calls = [self.call(step) for step in self.program.steps]
        out = Source(self.name, self.inputs, self.outputs, plan=plan(self.program.steps), calls=[name for name, _ in calls])
        out.files = {
            f"{self.name}.h": self.header(out.plan), f"{self.name}.c": self.code(out.plan, calls),
            f"{self.name}_weights.h": self.weights_header(), f"{self.name}_weights.c": self.weights(),
        }  # fmt: skip
        out.constants = list(self.constants.values())
        return out

    # Kernels

    def call(self, step):
        """(name of the kernel, its arguments: numbers, Buffers) of a step."""
        if step.what == "copy":
            return self.copied(step)
        if isinstance(step.what, Loose):
            return self.loose(step)
        reads = self.stored(step)
        types = tuple(TYPES[b.dtype] for b in (*reads, *step.writes, *step.scratch))
        if (step.what, types) not in self.functions:
            name = self.fresh(_snake(type(step.what).__name__))
            try:
                self.texts.append(kernels.write(name, step.what, types))
            except NotImplementedError as error:
                raise self.refusal(step, error) from error
            self.functions[step.what, types] = name
        return self.functions[step.what, types], [str(step.writes[-1].shape[0]), *reads, *step.writes, *step.scratch]

    def stored(self, step):
        """What a step reads, constants in the types in which they are stored."""
        reads, specs = [self.narrowed(b) for b in step.reads], [step.what]
        if isinstance(step.what, Rows):
            specs = [step.what.producer, step.what.consumer]
        start = 0
        for k, spec in enumerate(specs):
            if kernels.weights_of_any_type(spec):
                at = start + kernels.anchor_of(spec).names().index("w") - k  # the second reads its data from the first
                reads[at] = self.narrow_words(reads[at])
            start += kernels.anchor_of(spec).operands + len(spec.epilogue.inputs) if len(specs) > 1 else 0
        return reads

    def loose(self, step):
        if step.what not in self.functions:
            name = self.fresh(step.what.name)
            try:
                printer = tir.Printer(tir.flatten(step.what.function), len(step.writes))
                self.texts.append(printer.write(name, step.origin.removeprefix("relax.")))
            except NotImplementedError as error:
                raise self.refusal(step, error) from error
            self.functions[step.what], self.scratch[step.what] = name, printer.scratch
        step.scratch = [Buffer((count,), kind) for _, kind, count in self.scratch[step.what]]
        return self.functions[step.what], [*step.reads, *step.writes, *step.scratch]

    def copied(self, step):
        kind = TYPES[step.reads[0].dtype]
        if ("copy", kind) not in self.functions:
            name, out = self.fresh(f"copy_{kind}"), Writer()
            with out.function(f"static void {name}(int32_t n, const {kind} *x, {kind} *y)"):
                with out.loop("i", "n"):
                    out("y[i] = x[i];")
            self.texts.append(out.text())
            self.functions["copy", kind] = name
        return self.functions["copy", kind], [str(int(np.prod(step.reads[0].shape, dtype=np.int64))), *step.reads, *step.writes]

    def refusal(self, step, error):
        return UnsupportedError(
            f"standalone C has no operator {step.origin.removeprefix('relax.')}", why=str(error),
            hint="bnntvm.build compiles it; bnntvm.package makes a bundle with TVM's runtime",
        )  # fmt: skip

    def fresh(self, name):
        return identifier(f"{name}_{len(self.texts)}", self.places.values())

    def narrowed(self, buffer):
        """A constant of int32 in the smallest type that holds it."""
        if buffer.role != "constant" or buffer.dtype != "int32":
            return buffer
        low, high = int(buffer.data.min(initial=0)), int(buffer.data.max(initial=0))
        kind = next(k for k in ("int8", "int16", "int32") if np.iinfo(k).min <= low and high <= np.iinfo(k).max)
        return Buffer(buffer.shape, kind, "constant", buffer.data.astype(kind))

    @staticmethod
    def narrow_words(buffer):
        """Words of which 8 or 16 bits are used as uint8 or uint16."""
        highest = int(buffer.data.max(initial=0))
        kind = next(k for k in ("uint8", "uint16", "uint32") if highest <= np.iinfo(k).max)
        return Buffer(buffer.shape, kind, "constant", buffer.data.astype(kind))

    # Places

    def place(self, buffer, offsets):
        """A buffer as an argument."""
        if buffer in self.places:
            return self.places[buffer]
        if buffer.role == "constant":
            key = buffer.shape, buffer.dtype, buffer.data.tobytes()
            if key not in self.constants:
                self.constants[key] = f"{self.name}_c{len(self.constants)}", buffer.data
            return self.constants[key][0]
        return f"AT({TYPES[buffer.dtype]}, {offsets[buffer]})"

    # Files

    def code(self, placed, calls):
        out = Writer()
        out(f"/* {self.origin}. See {self.name}.h. */", "")
        out('#include "bnn.h"', f'#include "{self.name}.h"', f'#include "{self.name}_weights.h"', "")
        for text in self.texts:
            out(*text.rstrip("\n").split("\n"), "")
        if placed.bytes:
            wide = any(b.dtype in ("float64", "int64", "uint64") for b in placed.offsets)
            word = 8 if wide else 4
            out("/* Tensors between the kernels; which lie where, and when, is in size.txt. */")
            out(f"static uint{8 * word}_t workspace[{placed.bytes // word}];")
            out("#define AT(type, byte) ((type *)(void *)((unsigned char *)workspace + (byte)))", "")
        checked = [t for t in self.inputs if t.dtype in ("float32", "float64")]
        self.finite(out, checked)
        with out.function(self.prototype()):
            out("#ifndef BNN_NO_CHECK_FINITE")
            for t in checked:
                out(f"if (!finite_{TYPES[t.dtype]}({t.parameter}, {t.macro}))", f"    return {self.name.upper()}_NOT_FINITE;")
            out("#endif")
            for t in self.inputs:
                out(f"(void){t.parameter};")
            for name, arguments in calls:
                out(f"{name}({', '.join(a if isinstance(a, str) else self.place(a, placed.offsets) for a in arguments)});")
                out("BNN_FENCE();")
            out(f"return {self.name.upper()}_OK;")
        return re.sub(r"^ +#", "#", out.text(), flags=re.MULTILINE).rstrip("\n") + "\n"

    @staticmethod
    def finite(out, tensors):
        """Functions that look for NaN and infinity: x - x is 0 for all other numbers."""
        if not tensors:
            return
        out("#ifndef BNN_NO_CHECK_FINITE")
        for kind in sorted({TYPES[t.dtype] for t in tensors}):
            with out.function(f"static int finite_{kind}(const {kind} *x, int32_t n)"):
                with out.loop("i", "n"):
                    out("if (x[i] - x[i] != 0)", "    return 0;")
                out("return 1;")
        out("#endif", "")

    def prototype(self):
        inputs = [f"const {TYPES[t.dtype]} *{t.parameter}" for t in self.inputs]
        return f"int {self.name}_run({', '.join(inputs + [f'{TYPES[t.dtype]} *{t.parameter}' for t in self.outputs])})"

    def header(self, placed):
        guard, upper, out = f"{self.name.upper()}_H", self.name.upper(), Writer()
        out("/** @file", f" * {self.origin}.", " *")
        out(" * C99, no library, no allocation. All tensors are dense, in the order of the ONNX file (the last axis is contiguous).", " */")
        out(f"#ifndef {guard}", f"#define {guard}", "", "#include <stdint.h>", "")
        out("#ifdef __cplusplus", 'extern "C" {', "#endif", "")
        for side, tensors in (("Input", self.inputs), ("Output", self.outputs)):
            for t in tensors:
                declared = "" if t.declared == t.dtype else f" ({t.declared} in the ONNX file)"
                shape = f"[{', '.join(map(str, t.shape))}]"
                out(f'/** {side} "{comment(t.name)}": {TYPES[t.dtype]} {shape}{declared}; number of elements. */')
                out(f"#define {t.macro} {t.size}", "")
        out("/** Bytes of the static workspace in this library; inputs and outputs are the caller's. */")
        out(f"#define {upper}_WORKSPACE_BYTES {placed.bytes}", "")
        out(f"/** What {self.name}_run returns. */")
        out(f"enum {{ {upper}_OK = 0, {upper}_NOT_FINITE = 1 }};", "")
        out("/** Run the network once. Not reentrant: there is one workspace.", " *")
        for t in self.inputs:
            out(f" * @param {t.parameter} {t.macro} elements, read only.")
        for t in self.outputs:
            out(f" * @param {t.parameter} {t.macro} elements; must not overlap anything else.")
        out(f" * @return {upper}_OK, or {upper}_NOT_FINITE where an input holds NaN or infinity; then the outputs are unchanged. Compiled")
        out(" * with -DBNN_NO_CHECK_FINITE, nothing looks for them.", " */", self.prototype() + ";", "")
        out("#ifdef __cplusplus", "}", "#endif", "", "#endif")
        return out.text()

    def weights_header(self):
        guard, out = f"{self.name.upper()}_WEIGHTS_H", Writer()
        out(
            "/* Constants. Channel c is bit c % 32 of word c / 32; weights are [planes, output channel, row, column, words of channels]. */"
        )
        out(f"#ifndef {guard}", f"#define {guard}", "", "#include <stdint.h>", "")
        for name, data in self.constants.values():
            out(f"extern const {TYPES[str(data.dtype)]} {name}[{data.size}]; /* {list(data.shape)} */")
        out("", "#endif")
        return out.text()

    def weights(self):
        out = Writer()
        out(f'#include "{self.name}_weights.h"', "")
        if self.odd():
            out(*NOT_FINITE.split("\n"))
        for name, data in self.constants.values():
            out(f"const {TYPES[str(data.dtype)]} {name}[{data.size}] = {{")
            out(*["    " + line for line in array(data)], "};", "")
        return out.text()

    def odd(self):
        """Whether a float constant is infinite or NaN."""
        return any(data.dtype.kind == "f" and not np.isfinite(data).all() for _, data in self.constants.values())


def _snake(name):
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
