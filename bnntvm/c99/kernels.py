"""C of the kernels: for every specification of :mod:`bnntvm.spec` one plain function.

Most are the same loops, over images, rows, pixels and channels, around one expression: the anchor's value ``v0``; its epilogue follows. A
convolution reads its window where it lies (no im2col), and skips what lies in the padding.

Parameters of every function: ``n`` (images or rows), the anchor's operands, the epilogue's inputs, the results. Weights are those of the
specification, ``[O, kh, kw, words(I / groups)]``: a row of taps is one run of words.
"""

from __future__ import annotations

import contextlib
from functools import singledispatch

from bnntvm import spec as sp

from .cwriter import TYPES, Writer, number, term
from .epilogue import Epilogue
from .rows import Rows


class Anchor:
    """The part of a kernel that makes ``v0``. Subclasses say how.

    Attributes
    ----------
    dtype : str
        Of ``v0``.
    channels : int
    spatial : tuple of int or None
        (height, width) of the result where the loops count rows and pixels, None where they only count pixels.
    pixels : int
        Pixels of an image.
    operands : int
    title : str
        What the function does, for its comment.
    """

    dtype, spatial, pixels, operands = "float32", None, 1, 1

    def __init__(self, spec):
        self.spec = spec

    def names(self):
        """Names of the operands; ``types`` has their C types when the function is written."""
        return ["x"] + [f"w{i}" for i in range(self.operands - 1)]

    def row(self, out):
        """Statements at the head of a row of pixels."""

    def pixel(self, out):
        """Statements at the head of a pixel."""

    def value(self, out):
        """Statements that define ``v0`` for channel ``c``."""
        raise NotImplementedError


def write(name, spec, types):
    """The C function ``name`` for ``spec``; ``types`` are the C types of its pointers."""
    out = Writer()
    if isinstance(spec, Rows):
        _rows(out, name, spec, types)
        return out.text()
    anchor = anchor_of(spec)
    if isinstance(anchor, Anchor):
        _elementwise(out, name, anchor, types)
    else:
        anchor(out, name, spec, types)
    return out.text()


def _elementwise(out, name, anchor, types, kept=None, rows=None):
    """A function around an anchor; with ``rows`` one for a single row, which are all that ``kept``, an output, or the data has."""
    count, anchor.types = anchor.operands, dict(zip(anchor.names(), types))
    tail = Epilogue(anchor.spec.epilogue, anchor.channels, anchor.pixels, anchor.dtype, types[count:], kept)
    parameters = [f"const {kind} *{n}" for kind, n in zip(types, anchor.names())] + tail.parameters
    out(f"/* {anchor.title} */")
    if rows is None:
        with out.function(f"static void {name}(int32_t n, {', '.join(parameters)})"):
            _loops(out, anchor, tail)
    else:
        with out.function(f"static void {name}(int32_t i, int32_t oy, {', '.join(parameters)})"):
            out("(void)i;")
            _row(out, anchor, tail, rows)
    return [p.rsplit("*", 1) for p in parameters]


def _loops(out, anchor, tail):
    if anchor.spatial is None:
        body = Writer()
        with out.loop("at", term("n", anchor.pixels)):
            _channels(body, anchor, tail)
            image = "at" if anchor.pixels == 1 else f"at / {anchor.pixels}"
            out.define(body, i=image, pixel=f"at % {anchor.pixels}")
            out.include(body)
        return
    with out.loop("i", "n"), out.loop("oy", anchor.spatial[0]):
        _row(out, anchor, tail)


def _row(out, anchor, tail, rows=1):
    """The pixels of row ``oy``."""
    (height, width), body = anchor.spatial, Writer()
    anchor.row(out)
    with out.loop("ox", width):
        _channels(body, anchor, tail)
        image = f"({term('i', height)} + oy)"
        slot = f"{term('oy' + f' % {rows}', width)} + ox"
        out.define(body, pixel=f"{term('oy', width)} + ox", at=f"{term(image, width)} + ox", slot=slot)
        out.include(body)


def _rows(out, name, spec, types):
    """Two functions for a row each, and one that calls them in turns (:class:`.rows.Rows`)."""
    first, second = anchor_of(spec.producer), anchor_of(spec.consumer)
    second.kept_rows = spec.rows
    reads = first.operands + len(spec.producer.epilogue.inputs), second.operands - 1 + len(spec.consumer.epilogue.inputs)
    writes = len(spec.producer.epilogue.outputs) - 1, len(spec.consumer.epilogue.outputs)
    parts, at = [], 0
    for count in (*reads, *writes):
        parts.append(types[at : at + count])
        at += count
    made = (*parts[0], *parts[2][: spec.output], types[-1], *parts[2][spec.output :])
    above = _elementwise(out, f"{name}_above", first, made, spec.output, spec.rows)
    below = _elementwise(out, f"{name}_below", second, (types[-1], *parts[1], *parts[3]), None, spec.rows)
    row = reads[0] + spec.output  # of the rows that are kept, among the parameters of the first
    ours = [("a", p) for p in above[: reads[0]]] + [("b", p) for p in below[1 : 1 + reads[1]]]
    ours += [("a", p) for i, p in enumerate(above) if i >= reads[0] and i != row] + [("b", p) for p in below[1 + reads[1] :]]
    parameters = [f"{kind}*{prefix}_{n}" for prefix, (kind, n) in ours] + [f"{types[-1]} *rows"]
    arguments = ["rows" if i == row else f"a_{n}" for i, (_, n) in enumerate(above)], ["rows", *(f"b_{n}" for _, n in below[1:])]
    window, height = spec.consumer.window, spec.producer.window.out_height
    out(f"/* Both, row by row: {spec.rows} of {height} rows between them are kept. */")
    with out.function(f"static void {name}(int32_t n, {', '.join(parameters)})"):
        with out.loop("i", "n"):
            out("int32_t ready = 0;")
            with out.loop("oy", window.out_height):
                out(f"const int32_t wanted = {term('oy', window.strides[0])} + {spec.reach - window.pads[0]};")
                with out.block(f"for (; ready < {height} && ready < wanted; ready++)"):
                    out(f"{name}_above(i, ready, {', '.join(arguments[0])});")
                out(f"{name}_below(i, oy, {', '.join(arguments[1])});")
            if writes[0]:
                with out.block(f"for (; ready < {height}; ready++)"):
                    out(f"{name}_above(i, ready, {', '.join(arguments[0])});")


def _channels(out, anchor, tail):
    anchor.pixel(out)
    tail.before_channels(out)
    with out.loop("c", anchor.channels):
        anchor.value(out)
        tail.per_channel(out)


# -------------------------------------------------------------------------------------------------------------------- windows


class Windowed(Anchor):
    """An anchor with a :class:`bnntvm.spec.Window`: ``top``, ``left`` are where it begins, taps ``[r0, r1)`` x ``[s0, s1)`` lie inside.

    ``kept_rows``: of the data there are only so many rows, row y in slot ``y % kept_rows``, of one image.
    """

    kept_rows = None

    def __init__(self, spec):
        super().__init__(spec)
        self.window = w = spec.window
        self.spatial = w.out_height, w.out_width
        self.pixels = w.out_height * w.out_width
        self.inside = self._fits(0), self._fits(1)

    def _fits(self, axis):
        """Whether no window leaves the image along an axis."""
        w = self.window
        size, count = (w.in_height, w.out_height) if axis == 0 else (w.in_width, w.out_width)
        reach = w.dilations[axis] * (w.kernel[axis] - 1)
        return w.pads[axis] == 0 and (count - 1) * w.strides[axis] + reach < size

    def describe(self):
        w = self.window
        extra = f", pads {' '.join(map(str, w.pads))}" if any(w.pads) else ""
        extra += f", dilation {w.dilations[0]}x{w.dilations[1]}" if w.dilations != (1, 1) else ""
        return f"{w.kernel[0]}x{w.kernel[1]}, stride {w.strides[0]}x{w.strides[1]}{extra}"

    def _range(self, out, axis):
        w, (start, place, first, last) = self.window, (("top", "oy", "r0", "r1"), ("left", "ox", "s0", "s1"))[axis]
        pad = f" - {w.pads[axis]}" if w.pads[axis] else ""
        out(f"const int32_t {start} = {term(place, w.strides[axis])}{pad};")
        if not self.inside[axis]:
            size, taps, step = (w.in_height, w.in_width)[axis], w.kernel[axis], w.dilations[axis]
            out(f"const int32_t {first} = bnn_first({start}, {step}, {taps});")
            out(f"const int32_t {last} = bnn_last({start}, {step}, {taps}, {size}, {first});")

    def row(self, out):
        self._range(out, 0)

    def pixel(self, out):
        self._range(out, 1)

    def taps(self, axis):
        """(first tap, behind the last, their number) as expressions."""
        first, last = (("r0", "r1"), ("s0", "s1"))[axis]
        if self.inside[axis]:
            return "0", str(self.window.kernel[axis]), str(self.window.kernel[axis])
        return first, last, f"({last} - {first})"

    @contextlib.contextmanager
    def tap_loops(self, out, axes=(0, 1)):
        """Loops ``r`` and ``s`` over the taps that lie inside; yields their names. An axis of one tap that always does has none: "0"."""
        with contextlib.ExitStack() as stack:
            names = []
            for axis in axes:
                first, last, count = self.taps(axis)
                names.append("0" if count == "1" else "rs"[axis])
                if count != "1":
                    stack.enter_context(out.loop(names[-1], last, first))
            yield names

    def place(self, tap_row, tap_column):
        """Number of the input pixel under a tap, among those that are kept."""
        w = self.window
        row = "top" if tap_row == "0" else f"top + {term(tap_row, w.dilations[0])}"
        column = "left" if tap_column == "0" else f"left + {term(tap_column, w.dilations[1])}"
        line = f"({term('i', w.in_height)} + {row})" if self.kept_rows is None else f"(({row}) % {self.kept_rows})"
        return f"{term(line, w.in_width)} + {column}"

    def weight_place(self, tap_row, tap_column):
        """Number of the weight of channel ``c`` under a tap."""
        text = "c"
        for tap, size in zip((tap_row, tap_column), self.window.kernel):
            text = text if size == 1 else f"{text} * {size}" if " " not in text else f"({text}) * {size}"
            text = text if tap == "0" else f"{text} + {tap}"
        return text


# ---------------------------------------------------------------------------------------------------------------- bits: products

#: (kind of data, kind of weights) -> (function and operands that count the taps where the product is not 0, or None: all of them;
#: those that count where it is -1, or None: nowhere). The value is the first less twice the second.
PRODUCTS = {
    ("bipolar", "bipolar"): (None, ("bnn_count_xor", "ab")),
    ("zeros", "bipolar"): (("bnn_count", "z"), ("bnn_count_xor_not", "abz")),
    ("unipolar", "bipolar"): (("bnn_count", "a"), ("bnn_count_and", "ab")),
    ("unipolar", "unipolar"): (("bnn_count_and", "ab"), None),
    ("bipolar", "unipolar"): (("bnn_count", "b"), ("bnn_count_and", "ab")),
    ("zeros", "unipolar"): (("bnn_count_and_not", "bz"), ("bnn_count_and_and_not", "abz")),
    ("bipolar", "ternary"): (("bnn_count", "m"), ("bnn_count_xor_and", "abm")),
    ("unipolar", "ternary"): (("bnn_count_and", "am"), ("bnn_count_and", "ab")),
    ("zeros", "ternary"): (("bnn_count_and_not", "mz"), ("bnn_count_xor_and_not", "abmz")),
}


def _product(data, weights, words):
    """Expression of one run's value, without the number of taps that a product of two planes of signs begins with."""
    taps, negative = PRODUCTS[data, weights]
    parts = [f"{name}({', '.join(operands)}, {words})" for name, operands in (p for p in (taps, negative) if p)]
    if taps is None:
        return f"-2 * {parts[0]}"
    sign = "-" if (data, weights) == ("zeros", "bipolar") else ""
    return f"{sign}{parts[0]}" + (f" - 2 * {parts[1]}" if negative else "")


def _starts_full(data, weights):
    """Whether the value begins with the number of true taps times channels."""
    return weights == "bipolar" and data in ("bipolar", "zeros")


class Bits(Windowed):
    """Convolutions and dense layers of bit planes; a dense layer is a convolution of one pixel."""

    dtype = "int32"

    def __init__(self, spec, planes, dense=False):
        super().__init__(spec)
        self.planes, self.groups, self.dense = planes, spec.groups, dense
        self.spatial = None if dense else self.spatial
        self.data_kind = "zeros" if spec.zeros else planes.data_kind
        self.depth = spec.in_channels // spec.groups  # channels of a group
        self.words = sp.words(self.depth)
        self.channels = spec.out_channels
        self.packed_together = spec.dense_groups
        self.pixel_words = sp.words(spec.in_channels) if spec.dense_groups else spec.groups * self.words
        self.pairs = len(planes.data) * len(planes.weights)
        self.dtype = "float32" if planes.scaled else "int32"
        self.run = spec.groups == 1 and spec.window.dilations[1] == 1
        self.plus_one = getattr(spec, "plus_one", False)
        self.operands = len(planes.data) + 1 + spec.zeros + planes.scaled

    @property
    def title(self):
        spec, p = self.spec, self.planes
        what = f"{self.data_kind} x {p.weight_kind}" + (f", {len(p.data)} x {len(p.weights)} planes" if self.pairs > 1 else "")
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        layer = "Dense layer" if self.dense else "Convolution"
        window = "" if self.dense else f" {self.describe()}{groups}"
        return f"{layer} of bits ({what}){window}: {spec.in_channels} to {spec.out_channels} channels."

    def row(self, out):
        if not self.dense:
            super().row(out)

    def pixel(self, out):
        if not self.dense:
            super().pixel(out)

    def place(self, tap_row, tap_column):
        return "at" if self.dense else super().place(tap_row, tap_column)

    def names(self):
        data = ["x"] if len(self.planes.data) == 1 else [f"x{i}" for i in range(len(self.planes.data))]
        return [*data, "w", *["zeros"] * self.spec.zeros, *["scales"] * self.planes.scaled]

    def value(self, out):
        if self.pairs == 1 and not self.planes.scaled:
            out("int32_t v0 = 0;")
            self.dot(out, "v0", "x", "w")
            coefficient = self.planes.data[0] * self.planes.weights[0]
            self.finish(out, "v0")
            if coefficient != 1:
                out(f"v0 *= {coefficient};")
            return
        self.pairs_of_planes(out)

    def pairs_of_planes(self, out):
        """The sum over pairs of planes, a loop each."""
        p, q, planes = len(self.planes.data), len(self.planes.weights), self.planes
        scalar = "float" if planes.scaled else "int32_t"
        out(f"const uint32_t *const data[{p}] = {{{', '.join(self.names()[:p])}}};")
        if not planes.scaled:
            rows = ", ".join("{" + ", ".join(str(a * b) for b in planes.weights) + "}" for a in planes.data)
            out(f"static const int32_t factors[{p}][{q}] = {{{rows}}};")
        out(f"{scalar} v0 = 0;")
        size = self.channels * self.window.kernel[0] * self.window.kernel[1] * self.words * planes.words_per_weight
        with out.loop("p", p), out.loop("q", q):
            out("const uint32_t *const x = data[p];", f"const {self.types['w']} *const kernel = w + q * {size};", "int32_t dot = 0;")
            self.dot(out, "dot", "x", "kernel")
            self.finish(out, "dot")
            if planes.scaled:
                out(f"v0 += (float)dot * scales[({term('p', q)} + q) * {self.channels} + c];")
            else:
                out("v0 += factors[p][q] * dot;")

    def finish(self, out, total):
        if _starts_full(self.data_kind, self.planes.weight_kind):
            rows, columns = (self.taps(axis)[2] for axis in (0, 1))
            if self.plus_one:
                rows, columns = map(str, self.window.kernel)
            out(f"{total} += {' * '.join(f for f in (rows, columns, str(self.depth)) if f != '1') or '1'};")

    def dot(self, out, total, data, weights):
        """Add the product of one data plane and one weight plane to ``total``."""
        if self.plus_one:
            return self.padded_dot(out, total, data, weights)
        if self.run:
            start, _, count = self.taps(1)
            with self.tap_loops(out, (0,)) as (row,):
                self.operands_of_run(out, data, weights, row, start)
                out(f"{total} += {_product(self.data_kind, self.planes.weight_kind, self.run_words(count))};")
            return
        with self.tap_loops(out) as (row, column):
            self.operands_of_run(out, data, weights, row, column)
            out(f"{total} += {_product(self.data_kind, self.planes.weight_kind, self.words)};")

    def run_words(self, count):
        return str(int(count) * self.words) if count.isdigit() else term(count, self.words)

    def operands_of_run(self, out, data, weights, row, column):
        """Pointers a, b (m, z) to the words of a run that begins at a tap."""
        place, kernel = self.place(row, column), _grouped(self.weight_place(row, column))
        planes = [("a", data), *([("z", "zeros")] if self.spec.zeros else [])]
        if self.packed_together:
            group = f"c / {self.channels // self.groups} * {self.depth}"
            out(f"const int32_t at_word = ({place}) * {self.pixel_words} + ({group}) / 32, shift = ({group}) % 32;")
            for name, plane in planes:
                out(f"const uint32_t {name}[1] = {{({plane}[at_word] >> shift) & {(1 << self.depth) - 1}u}};")
        else:
            group = f" + c / {self.channels // self.groups} * {self.words}" if self.groups > 1 else ""
            for name, plane in planes:
                out(f"const uint32_t *const {name} = {plane} + {term(_grouped(place), self.pixel_words)}{group};")
        plane = self.channels * self.window.kernel[0] * self.window.kernel[1] * self.words
        if self.types["w"] == "uint32_t":
            out(f"const uint32_t *const b = {weights} + {term(kernel, self.words)};")
            mask = f"*const m = b + {plane}"
        else:
            out(f"const uint32_t b[1] = {{{weights}[{kernel}]}};")
            mask = f"m[1] = {{{weights}[{kernel} + {plane}]}}"
        if self.planes.weight_kind == "ternary":
            out(f"const uint32_t {mask};")

    def padded_dot(self, out, total, data, weights):
        """The same where the padding holds +1, whose bits are 0: weights differ from it where they are -1."""
        row, kw = self.window.kernel[1] * self.words, self.window.kernel[1]
        r0, r1, _ = self.taps(0)
        s0, s1, count = self.taps(1)
        with out.loop("r", self.window.kernel[0]):
            out(f"const uint32_t *const b = {weights} + (c * {self.window.kernel[0]} + r) * {row};")
            with out.block(f"if (r < {r0} || r >= {r1})"):
                out(f"{total} -= 2 * bnn_count(b, {row});", "continue;")
            start, here = term(s0, self.words), term(_grouped(self.place("r", s0)), self.pixel_words)
            out(
                f"{total} -= 2 * bnn_count(b, {start});",
                f"{total} -= 2 * bnn_count_xor({data} + {here}, b + {start}, {self.run_words(count)});",
                f"{total} -= 2 * bnn_count(b + {term(s1, self.words)}, {term(f'({kw} - {s1})', self.words)});",
            )


def _grouped(text):
    """``text`` as a factor."""
    return f"({text})" if " " in text else text


# --------------------------------------------------------------------------------------------------------------- float anchors


class FloatWindow(Windowed):
    """float32 convolutions, weights float or packed. Sums run over rows, columns, channels of the window, in this order."""

    def __init__(self, spec):
        super().__init__(spec)
        self.channels, self.depth = spec.out_channels, spec.in_channels // spec.groups
        self.coding = getattr(spec, "coding", None)
        self.operands = 3 if self.coding and self.coding.kind == "levels" else 2

    @property
    def title(self):
        spec = self.spec
        groups = f", {spec.groups} groups" if spec.groups > 1 else ""
        coded = f", {self.coding.kind} weights" if self.coding else ""
        return f"float convolution {self.describe()}{groups}{coded}: {spec.in_channels} to {spec.out_channels} channels."

    def names(self):
        return ["x", "w", "levels"][: self.operands]

    def value(self, out):
        spec, w = self.spec, self.window
        out("float v0 = 0.0f;")
        group = f"c / {self.channels // spec.groups} * {self.depth}"
        per_weight = sp.words(self.depth) if self.coding else self.depth
        with self.tap_loops(out) as (r, s):
            if spec.planar:
                size = w.in_height * w.in_width
                base = f"{term('i', spec.in_channels)} + {group}" if spec.groups > 1 else term("i", spec.in_channels)
                row, column = term(r, w.dilations[0]), term(s, w.dilations[1])
                out(f"const float *const a = x + ({base}) * {size} + (top + {row}) * {w.in_width} + left + {column};")
                step = size
            else:
                group = f" + {group}" if spec.groups > 1 else ""
                out(f"const float *const a = x + {term(_grouped(self.place(r, s)), spec.in_channels)}{group};")
                step = 1
            kernel = _grouped(self.weight_place(r, s))
            out(f"const {self.types['w']} *const b = w + {term(kernel, per_weight)};")
            plane = self.channels * w.kernel[0] * w.kernel[1] * per_weight
            with out.loop("k", self.depth):
                out(multiply_add(self.coding, f"a[{term('k', step)}]", plane, self.channels))


def multiply_add(coding, a, plane, channels):
    """``v0 += a * weight k``; packed weights lie at ``b``, their second plane ``plane`` words behind."""
    if coding is None:
        return f"v0 += {a} * b[k];"
    first = "(b[k >> 5] >> (k & 31) & 1)"
    second = f"(b[{plane} + (k >> 5)] >> (k & 31) & 1)"
    if coding.kind == "sign":
        return f"v0 += {first} ? -{a} : {a};"
    if coding.kind == "ternary":
        return f"v0 += {first} ? {a} : {second} ? -{a} : 0.0f;"
    level = first if coding.planes == 1 else f"({first} + 2 * {second})"
    return f"v0 += {a} * levels[{level} * {channels} + c];"


class FloatRows(Anchor):
    """float32 dense layers, weights float or packed."""

    def __init__(self, spec):
        super().__init__(spec)
        self.channels, self.coding = spec.out_features, getattr(spec, "coding", None)
        self.integer = isinstance(spec, sp.WeightDenseInt8)
        self.dtype = "int32" if self.integer else "float32"
        self.operands = 3 if self.coding and self.coding.kind == "levels" else 2
        coded = f", {self.coding.kind} weights" if self.coding else ""
        self.title = f"Dense layer on {'bytes held in floats' if self.integer else 'floats'}{coded}: {spec.in_features} to {self.channels}."

    def names(self):
        return ["x", "w", "levels"][: self.operands]

    def value(self, out):
        depth = self.spec.in_features
        words = sp.words(depth) if self.coding else depth
        out(f"{TYPES[self.dtype]} v0 = 0;", f"const float *const a = x + at * {depth};")
        out(f"const {'uint32_t' if self.coding else 'float'} *const b = w + {term('c', words)};")
        with out.loop("k", depth):
            a = "a[k]"
            if self.integer:
                out("const int32_t value = (int32_t)a[k];")
                a = "value"
            line = multiply_add(self.coding, a, self.channels * words, self.channels)
            out(line.replace("0.0f", "0") if self.integer else line)


class ByteWindow(Windowed):
    """Convolutions of bytes held in floats; weights ``uint32[bits, O, kh, kw, words(I)]``, see :func:`.weights.bits_of_weights`."""

    dtype = "int32"

    def __init__(self, spec):
        super().__init__(spec)
        self.channels, self.operands = spec.out_channels, 2
        bits, sizes = len(spec.weights.coefficients), f"{spec.in_channels} to {spec.out_channels} channels"
        self.title = f"Convolution of bytes held in floats {self.describe()}, {bits}-bit weights: {sizes}."

    def names(self):
        return ["x", "w"]

    def value(self, out):
        spec, w = self.spec, self.window
        words = sp.words(spec.in_channels)
        plane = self.channels * w.kernel[0] * w.kernel[1] * words
        out("int32_t v0 = 0;")
        with self.tap_loops(out) as (r, s):
            out(f"const float *const a = x + {term(_grouped(self.place(r, s)), spec.in_channels)};")
            out(f"const uint32_t *const b = w + {term(_grouped(self.weight_place(r, s)), words)};")
            with out.loop("k", spec.in_channels):
                bits = [f"{c} * (int32_t)(b[{f'{plane * j} + ' if j else ''}(k >> 5)] >> (k & 31) & 1)"
                        for j, c in enumerate(spec.weights.coefficients)]  # fmt: skip
                out(f"v0 += (int32_t)a[k] * ({' + '.join([str(spec.weights.base), *bits])});")


class PoolWindow(Windowed):
    """float32 pools."""

    def __init__(self, spec):
        super().__init__(spec)
        self.channels = spec.channels
        self.title = f"{spec.op} pool {self.describe()} of {spec.channels} channels."

    def value(self, out):
        rows, columns = self.taps(0)[2], self.taps(1)[2]
        largest = self.spec.op == "max"
        out(f"float v0 = {'-BNN_INFINITY' if largest else '0.0f'};")
        with self.tap_loops(out) as (r, s):
            item = f"x[{term(_grouped(self.place(r, s)), self.channels)} + c]"
            out(f"v0 = bnn_max(v0, {item});" if largest else f"v0 += {item};")
        if self.spec.op == "avg":
            out(f"v0 /= (float)({rows} * {columns});")
        elif self.spec.op == "avg_pad":
            out(f"v0 /= {number(self.window.kernel[0] * self.window.kernel[1])};")


class WholeImage(Anchor):
    """Pool over all pixels."""

    def __init__(self, spec):
        super().__init__(spec)
        self.channels, self.size = spec.channels, spec.spatial[0] * spec.spatial[1]
        self.title = f"{spec.op} of whole images of {self.size} pixels, {self.channels} channels."

    def value(self, out):
        item = f"x[(at * {self.size} + k) * {self.channels} + c]"
        out(f"float v0 = {'-BNN_INFINITY' if self.spec.op == 'max' else '0.0f'};")
        with out.loop("k", self.size):
            out(f"v0 = bnn_max(v0, {item});" if self.spec.op == "max" else f"v0 += {item};")
        if self.spec.op == "avg":
            out(f"v0 /= {number(self.size)};")


class Identity(Anchor):
    """A tensor itself."""

    def __init__(self, spec):
        super().__init__(spec)
        self.channels, self.pixels = spec.channels, spec.spatial[0] * spec.spatial[1]
        self.planar = isinstance(spec, sp.PlanarPack)
        self.dtype = "float32" if self.planar else spec.dtype
        self.title = f"Elementwise, {self.channels} channels{', data in channel order' if self.planar else ''}."

    def value(self, out):
        place = f"{term('at', self.channels)} + c"
        if self.planar:
            channel = f"({term('i', self.channels)} + c)"
            place = f"{term(channel, self.pixels)} + pixel"
        out(f"const {TYPES[self.dtype]} v0 = x[{place}];")


class Join(Anchor):
    """Tensors joined along their channels."""

    def __init__(self, spec):
        super().__init__(spec)
        self.operands, self.channels, self.dtype = len(spec.channels), sum(spec.channels), spec.dtype
        self.pixels = spec.spatial[0] * spec.spatial[1] if spec.spatial else 1
        self.title = f"Join of {' + '.join(map(str, spec.channels))} channels."

    def names(self):
        return [f"x{i}" for i in range(self.operands)]

    def value(self, out):
        parts, start = [], 0
        for i, size in enumerate(self.spec.channels):
            offset = "" if start == 0 else f" - {start}"
            parts.append((start + size, f"x{i}[{term('at', size)} + c{offset}]"))
            start += size
        text = " : ".join([f"c < {end} ? {item}" for end, item in parts[:-1]] + [parts[-1][1]])
        out(f"const {TYPES[self.dtype]} v0 = {text};")


class SoftmaxRows(Anchor):
    """Softmax of rows: exponentials are computed twice instead of being kept."""

    def __init__(self, spec):
        super().__init__(spec)
        self.channels = spec.classes
        self.title = f"Softmax of {spec.classes} classes."

    def pixel(self, out):
        item = f"x[at * {self.channels} + k]"
        out("float top = -BNN_INFINITY, sum = 0.0f;")
        with out.loop("k", self.channels):
            out(f"top = bnn_max(top, {item});")
        with out.loop("k", self.channels):
            out(f"sum += bnn_exp({item} - top);")

    def value(self, out):
        out(f"const float v0 = bnn_exp(x[at * {self.channels} + c] - top) / sum;")


# ----------------------------------------------------------------------------------------------------- kernels without an epilogue


def _pointers(types, names, results):
    reads = len(names) - results
    return ", ".join(f"{'const ' * (i < reads)}{kind} *{name}" for i, (kind, name) in enumerate(zip(types, names)))


def bit_pool(out, name, spec, types):
    """Pool of packed planes."""
    window, words = Windowed(spec), sp.words(spec.channels)
    out(f"/* Pool of bits ({spec.op}) {window.describe()}, {spec.channels} channels. */")
    with out.function(f"static void {name}(int32_t n, {_pointers(types, ['x', 'y'], 1)})"):
        with out.loop("i", "n"), out.loop("oy", window.spatial[0]):
            window.row(out)
            with out.loop("ox", window.spatial[1]):
                window.pixel(out)
                with out.loop("k", words):
                    out(f"uint32_t word = {_every_bit(spec.channels) if spec.op == 'and' else '0'};")
                    with window.tap_loops(out) as (r, s):
                        out(f"word {'&=' if spec.op == 'and' else '|='} x[{term(_grouped(window.place(r, s)), words)} + k];")
                    pixel = f"((i * {window.spatial[0]} + oy) * {window.spatial[1]} + ox)"
                    out(f"y[{term(pixel, words)} + k] = word;")


def _every_bit(channels):
    """Word ``k`` of a pixel whose bits are all 1: there are none behind the last channel."""
    whole, rest = divmod(channels, sp.WORD_BITS)
    if rest == 0:
        return "0xffffffffu"
    last = f"0x{(1 << rest) - 1:08x}u"
    return f"k < {whole} ? 0xffffffffu : {last}" if whole else last


def bit_pad(out, name, spec, types):
    """Constant padding of packed images."""
    (height, width), (top, left, bottom, right), words = spec.spatial, spec.pads, spec.words
    tall, wide = height + top + bottom, width + left + right
    out(f"/* Padding of {height}x{width} pixels of {words} words with 0x{spec.value:08x}. */")
    with out.function(f"static void {name}(int32_t n, {_pointers(types, ['x', 'y'], 1)})"):
        with out.loop("i", "n"), out.loop("oy", tall), out.loop("ox", wide):
            out(f"const int32_t row = oy - {top}, column = ox - {left};")
            out(f"const int inside = row >= 0 && row < {height} && column >= 0 && column < {width};")
            with out.loop("k", words):
                source = f"x[((i * {height} + row) * {width} + column) * {words} + k]"
                out(f"y[((i * {tall} + oy) * {wide} + ox) * {words} + k] = inside ? {source} : 0x{spec.value & 0xFFFFFFFF:08x}u;")


def transpose(out, name, spec, types):
    """Exchange of the two inner axes."""
    out(f"/* Transpose of {spec.rows} x {spec.columns}. */")
    with out.function(f"static void {name}(int32_t n, {_pointers(types, ['x', 'y'], 1)})"):
        with out.loop("i", "n"), out.loop("c", spec.columns), out.loop("r", spec.rows):
            out(f"y[(i * {spec.columns} + c) * {spec.rows} + r] = x[(i * {spec.rows} + r) * {spec.columns} + c];")


def row_extreme(out, name, spec, types):
    """Largest or least value of each row."""
    out(f"/* The {spec.op} of rows of {spec.channels}. */")
    with out.function(f"static void {name}(int32_t n, {_pointers(types, ['x', 'y'], 1)})"):
        with out.loop("i", "n"):
            out(f"float best = x[i * {spec.channels}];")
            with out.loop("k", spec.channels, 1):
                out(f"best = bnn_{spec.op}(best, x[i * {spec.channels} + k]);")
            out("y[i] = best;")


def top_k(out, name, spec, types):
    """The best of each row in order: each search finds the best that comes behind the last one."""
    better = ">" if spec.largest else "<"
    out(f"/* The {spec.count} {'largest' if spec.largest else 'least'} of rows of {spec.size}; among equals the first. */")
    with out.function(f"static void {name}(int32_t n, {_pointers(types, ['x', 'values', 'indices'], 2)})"):
        with out.loop("i", "n"):
            out(f"const {types[0]} *const row = x + i * {spec.size};")
            with out.loop("rank", spec.count):
                out(f"const int32_t at = i * {spec.count} + rank;", "int32_t best = -1;")
                with out.loop("k", spec.size):
                    out(f"const int behind = rank == 0 || values[at - 1] {better} row[k] ||")
                    out("                   (values[at - 1] == row[k] && indices[at - 1] < k);")
                    out(f"if (behind && (best < 0 || row[k] {better} row[best]))", "    best = k;")
                out("values[at] = row[best < 0 ? 0 : best];", "indices[at] = best;")


def cum_sum(out, name, spec, types):
    """Running sums."""
    if spec.size is None or spec.inner is None:
        raise NotImplementedError("running sums along or before a dynamic axis")
    out(f"/* Running sums of {spec.size}{', from the end' * spec.backward}{', without the element itself' * spec.exclusive}. */")
    with out.function(f"static void {name}(int32_t n, {_pointers(types, ['x', 'y'], 1)})"):
        with out.loop("i", "n"), out.loop("j", spec.inner):
            out(f"{types[0]} sum = 0;")
            with out.loop("k", spec.size):
                row = f"i * {spec.size} + " + (f"{spec.size - 1} - k" if spec.backward else "k")
                out(f"const int32_t at = ({row}) * {spec.inner} + j;")
                add = "sum += x[at];" if spec.exclusive else "sum = k == 0 ? x[at] : sum + x[at];"
                out(*(["y[at] = sum;", add] if spec.exclusive else [add, "y[at] = sum;"]))


def binary_matmul(out, name, spec, types):
    """Product of two packed run-time tensors."""
    left, right = ["a", "az"][: 1 + (spec.left == "ternary")], ["b", "bz"][: 1 + (spec.right == "ternary")]
    out(f"/* Product of {spec.left} and {spec.right} bits: {spec.rows} x {spec.features} x {spec.columns}. */")
    with out.function(f"static void {name}(int32_t n, {_pointers(types, [*left, *right, 'y'], 1)})"):
        result = "dot" if spec.scale is None else f"(float)dot * {number(spec.scale)}"
        with out.loop("i", "n"), out.loop("r", spec.rows), out.loop("c", spec.columns):
            unsigned = "unipolar" in (spec.left, spec.right)
            out(f"int32_t dot = {0 if unsigned else spec.features - 32 * spec.words};")
            with out.loop("k", spec.words):
                batch = "" if spec.shared else f"i * {spec.words} + "
                out(f"const int32_t p = (i * {spec.rows} + r) * {spec.words} + k, q = ({batch}k) * {spec.columns} + c;")
                present = {"unipolar": "{0}[{1}]", "ternary": "~{0}z[{1}]", "bipolar": ""}
                sides = [present[kind].format(v, at) for kind, v, at in ((spec.left, "a", "p"), (spec.right, "b", "q"))]
                signs = [f"{v}[{at}]" for kind, v, at in ((spec.left, "a", "p"), (spec.right, "b", "q")) if kind != "unipolar"]
                there = " & ".join(s for s in sides if s)
                out(f"const uint32_t there = {there or '0xffffffffu'};")
                out("dot += bnn_popcount(there);")
                if signs:
                    out(f"dot -= 2 * bnn_popcount(({' ^ '.join(signs)}) & there);")
            out(f"y[(i * {spec.rows} + r) * {spec.columns} + c] = {result};")


# ------------------------------------------------------------------------------------------------------------------- dispatch


def weights_of_any_type(spec):
    """Whether the kernel for ``spec`` reads its weights one by one, so that words of few bits may be stored as bytes."""
    grouped = isinstance(spec, (sp.BinaryConv2d, sp.PlanesConv2d)) and spec.groups > 1
    return (grouped or isinstance(spec, sp.WeightConv2d)) and sp.words(spec.in_channels // spec.groups) == 1


def _sum_of_one(spec):
    return sp.PlaneSum((1,), (1,), "unipolar" if spec.unipolar else "bipolar", "bipolar")


def _as_convolution(spec):
    """A dense layer of bits as a convolution of one pixel."""
    planes = spec.planes if isinstance(spec, sp.PlanesDense) else _sum_of_one(spec)
    return sp.PlanesConv2d(sp.Window(1, 1, (1, 1)), spec.in_features, spec.out_features, planes, 1, spec.zeros, spec.epilogue)


@singledispatch
def anchor_of(spec):
    """How ``spec`` is written: an :class:`Anchor`, or a function (out, name, spec, types); a NotImplementedError names what is missing."""
    raise NotImplementedError(type(spec).__name__)


anchor_of.register(sp.BinaryConv2d, lambda spec: Bits(spec, _sum_of_one(spec)))
anchor_of.register(sp.PlanesConv2d, lambda spec: Bits(spec, spec.planes))
anchor_of.register(sp.BinaryDense, lambda spec: Bits(_as_convolution(spec), _sum_of_one(spec), True))
anchor_of.register(sp.PlanesDense, lambda spec: Bits(_as_convolution(spec), spec.planes, True))
anchor_of.register(sp.FloatConv2d, FloatWindow)
anchor_of.register(sp.FloatDense, FloatRows)
anchor_of.register(sp.WeightDense, FloatRows)
anchor_of.register(sp.WeightDenseInt8, FloatRows)
anchor_of.register(sp.Int8Conv2d, ByteWindow)
anchor_of.register(sp.Pool2d, PoolWindow)
anchor_of.register(sp.GlobalPool, WholeImage)
anchor_of.register(sp.Map, Identity)
anchor_of.register(sp.PlanarPack, Identity)
anchor_of.register(sp.Concat, Join)
anchor_of.register(sp.Softmax, SoftmaxRows)
anchor_of.register(sp.BitPool, lambda spec: bit_pool)
anchor_of.register(sp.BitPad, lambda spec: bit_pad)
anchor_of.register(sp.Transpose, lambda spec: transpose)
anchor_of.register(sp.RowExtreme, lambda spec: row_extreme)
anchor_of.register(sp.TopK, lambda spec: top_k)
anchor_of.register(sp.CumSum, lambda spec: cum_sum)
anchor_of.register(sp.BinaryMatmul, lambda spec: binary_matmul)
