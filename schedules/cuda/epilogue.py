"""The elementwise tail of a kernel on a GPU: from a thread's scalars to stores.

A thread holds anchor values of one pixel, of channels of one 32-bit word. Float arithmetic goes through device functions that round every
operation (:mod:`.device`), so that results are those of the processors' kernels whatever the compiler is told about contraction. Bits are
joined to words across lanes by a *gatherer*: what it does depends on how the channels of a word lie in the threads of a warp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm import tirx

from bnntvm import spec
from bnntvm.schedules import epilogue as cpu
from bnntvm.schedules import tir
from bnntvm.schedules.cuda import simt

reference, pack, unpack = cpu.reference, cpu.pack, cpu.unpack
input_shape, output_shape, output_dtype = cpu.input_shape, cpu.output_shape, cpu.output_dtype


@dataclass(frozen=True)
class Pixel:
    """Where a thread's values belong.

    Attributes
    ----------
    row : int64 expression
        Number of the pixel among all pixels of the batch (of the row, for ``[M, C]``).
    image, inside : int32 expressions, optional
        Number of the image, and of the pixel in it: for ``image`` operands and ``planar`` outputs.
    exists : bool expression, optional
        Whether there is such a pixel; nothing is read or stored where it is not. All lanes of a warp emit together.
    """

    row: object
    image: object = None
    inside: object = None
    exists: object = None


@dataclass(frozen=True)
class Value:
    """An anchor value and its channel: bit ``bit + place`` of the word, ``bit`` the same for all values that are emitted together."""

    value: object
    bit: object
    place: int = 0


class Ballot:
    """One value in every lane: lane i holds the channel of bit i."""

    in_pairs = False

    def __init__(self, lane):
        self.lane = lane

    def word(self, predicates, values):
        """``(statements, word, where)``: the word, and in which lanes it is to be stored."""
        word, named = simt.bind("word", simt.call("bnn_ballot", predicates[0], dtype="uint32"))
        return [named], word, tirx.EQ(self.lane, simt.i32(0))


class Quad:
    """Four neighbouring lanes hold eight channels of a word each, as the accumulators of tensor cores do: bits ``2 t + place`` of lane t.

    Values come in pairs of neighbouring channels.
    """

    in_pairs = True

    def __init__(self, lane):
        self.lane = lane

    def word(self, predicates, values):
        """As of :class:`Ballot`."""
        bits = [tirx.Select(p, simt.u32(1 << value.place), simt.u32(0)) for p, value in zip(predicates, values)]
        while len(bits) > 1:
            bits = [a | b for a, b in zip(bits[::2], bits[1::2])] + bits[len(bits) // 2 * 2 :]
        quarter = tirx.bitwise_and(self.lane, simt.i32(3))
        own = tirx.shift_left(bits[0], simt.u32(values[0].bit))
        word, named = simt.bind("word", simt.call("bnn_or_quad", own, dtype="uint32"))
        return [named], word, tirx.EQ(quarter, simt.i32(0))


class Emitter:
    """Writes the statements of one epilogue.

    Parameters
    ----------
    epilogue : spec.Epilogue
    channels : int
        True number of channels C of the anchor's result.
    dims : tuple
        Leading and spatial dimensions of the anchor's result, ``(n, height, width)`` or ``(m,)``.
    anchor_dtype : str
        ``int32`` or ``float32`` (``float16``: the anchor of a packing kernel).

    Attributes
    ----------
    inputs, outputs : list of Buffer
        The kernel's parameters for the epilogue, in order.
    declarations : list of statements
        To be placed before the first use of :meth:`emit`.
    """

    def __init__(self, epilogue, channels, dims, anchor_dtype):
        self.epilogue, self.channels, self.anchor_dtype = epilogue, channels, anchor_dtype
        self.inputs = [tir.buffer(f"e{i}", input_shape(e, channels, dims), e.dtype) for i, e in enumerate(epilogue.inputs)]
        self.outputs = [tir.buffer(f"y{i}", output_shape(o, channels, dims), output_dtype(o)) for i, o in enumerate(epilogue.outputs)]
        pairs = [simt.flat(array) for array in (*self.inputs, *self.outputs)]
        self.declarations = [statement for _, statement in pairs]
        flat = [array for array, _ in pairs]
        self._inputs, self._outputs = flat[: len(self.inputs)], flat[len(self.inputs) :]
        self.words = spec.words(channels)
        self._uses, self._spatial = cpu._count_uses(epilogue), int(np.prod([d for d in dims[1:]], dtype=np.int64)) if len(dims) > 1 else 1

    @property
    def needs_image(self):
        """Whether :class:`Pixel` has to say which image it is of."""
        kinds = [one.kind for one in (*self.epilogue.inputs, *self.epilogue.outputs)]
        return "image" in kinds or "planar" in kinds

    def emit(self, values, pixel, word, gatherer, scope=None, word_exists=None):
        """Statements that evaluate and store the epilogue for one pixel and word of channels.

        Parameters
        ----------
        values : list of Value
        pixel : Pixel
        word : int32 expression or int
            Number of the word of 32 channels.
        gatherer : Ballot or Quad
        scope : dict, optional
            Per-channel operands are loaded by the first call with it and reused by the following ones, which must be for the same
            word, in the same block of statements.
        word_exists : bool expression, optional
            Where ``word`` may be past the last one.
        """
        return _Cell(self, values, pixel, word, gatherer, {} if scope is None else scope, word_exists).statements()


class _Cell:
    """One call of :meth:`Emitter.emit`."""

    def __init__(self, emitter, values, pixel, word, gatherer, scope, word_exists):
        self.emitter, self.epilogue, self.pixel, self.gatherer, self.scope = emitter, emitter.epilogue, pixel, gatherer, scope
        self.word, self.word_exists, self.body = simt.i32(word), word_exists, []
        self.values, self.pairs, self.place = values, {}, None
        self.in_pairs = gatherer.in_pairs and emitter.channels % 2 == 0
        self.columns = [self._column(value) for value in values]

    def statements(self):
        for index, output in enumerate(self.epilogue.outputs):
            target = self.emitter._outputs[index]
            (self._store_bits if output.kind == "bits" else self._store_tensor)(output, target)
        return self.body

    def _bind(self, name, value):
        variable, statement = simt.bind(name, value)
        self.body.append(statement)
        return variable

    def _shared(self, key, make):
        if key not in self.scope:
            self.scope[key] = self._bind("c", make())
        return self.scope[key]

    def _first(self):
        """The thread's first channel, int64."""
        return self._shared("first", lambda: simt.wide(self.word * 32 + self.values[0].bit))

    def _channel(self, value):
        return self._first() + value.place if value.place else self._first()

    def _channel_exists(self, value):
        """None for always."""
        if self.emitter.channels % spec.WORD_BITS == 0:
            return self.word_exists
        return self._shared(("exists", value.place), lambda: self._channel(value) < tir.i64(self.emitter.channels))

    def _exists(self, value):
        """Whether the value has a place in tensors; None for always."""
        return _both(self.pixel.exists, self._channel_exists(value))

    def _column(self, value):
        """All values of the epilogue for one anchor value; None for those that nothing uses."""
        uses, found = self.emitter._uses, [self._bind("a", value.value)]
        for index, operand in enumerate(self.epilogue.inputs):
            used = uses[len(found)] and operand.kind != "words"
            found.append(self._load(index, operand, value) if used else None)
        for step in self.epilogue.steps:
            used = uses[len(found)]
            found.append(self._bind("s", apply(step, cpu._operands(step, found, 1))) if used else None)
        return found

    def _load(self, index, operand, value):
        array = self.emitter._inputs[index]
        if operand.kind == "channel":  # padded to whole words
            return self._shared((index, value.place), lambda: _guarded(self.word_exists, array, self._channel(value)))
        if operand.kind == "pixel":
            key = (index, str(self.pixel.row))
            return self._shared(key, lambda: _guarded(self.pixel.exists, array, self.pixel.row))
        row = self.pixel.image if operand.kind == "image" else self.pixel.row
        if operand.times > 1:
            size = tir.i64(self.emitter.channels // operand.times)
            where = simt.wide(row) * size + tirx.floormod(self._channel(value), size)
            return self._bind("t", _guarded(self._exists(value), array, where))
        if self.in_pairs and operand.kind == "tensor" and operand.dtype == "float32":
            return self._load_of_pair(index, array, value)
        where = self._tensor_index(value) if operand.kind == "tensor" else simt.wide(row) * self.emitter.channels + self._channel(value)
        return self._bind("t", _guarded(self._exists(value), array, where))

    def _load_of_pair(self, index, array, value):
        """Two neighbouring channels at once; they exist together."""
        number = self.values.index(value)
        if number % 2 == 0:
            pair, allocate = simt.registers(f"pair_{next(tir._fresh)}", 2, "float32")
            where = self._tensor_index(value)
            exists = self._exists(value)
            load = simt.do("bnn_load2", simt.pointer(pair, 0), simt.pointer(array, where))
            zero = [simt.put(pair, i, tir.constant(0.0, "float32")) for i in range(2)]
            self.body += [allocate, load] if exists is None else [allocate, *zero, tirx.IfThenElse(exists, load, None)]
            self.pairs[index, number] = pair
        return simt.at(self.pairs[index, number - number % 2], number % 2)

    def _tensor_index(self, value):
        """Where a value has its place in a tensor."""
        if self.place is None:
            self.place = self._bind("place", self.pixel.row * self.emitter.channels + self._first())
        return self.place + value.place if value.place else self.place

    def _store_tensor(self, output, target):
        channels, spatial = self.emitter.channels, self.emitter._spatial
        results = [column[output.value] for column in self.columns]
        results = [r if tir.dtype_of(r) == output.dtype else tirx.Cast(output.dtype, r) for r in results]
        if self.in_pairs and output.kind == "tensor" and output.dtype in ("float32", "int32"):
            for value, a, b in zip(self.values[::2], results[::2], results[1::2]):
                to = simt.pointer(target, self._tensor_index(value))
                self._when(self._exists(value), simt.do(f"bnn_store2_{output.dtype}", to, a, b))
            return
        for value, result in zip(self.values, results):
            if output.kind == "planar":
                first = simt.wide(self.pixel.image) * channels + self._channel(value)
                where = first * spatial + simt.wide(self.pixel.inside)
            else:
                where = self._tensor_index(value)
            self._when(self._exists(value), simt.put(target, where, result))

    def _store_bits(self, output, target):
        predicates = []
        for value, column in zip(self.values, self.columns):
            result, exists = column[output.value], self._channel_exists(value)
            if output.flip is None and exists is not None:
                result = tirx.And(exists, result)
            predicates.append(result)
        statements, word, where = self.gatherer.word(predicates, self.values)
        self.body += statements
        if output.flip is not None:
            array = self.emitter._inputs[output.flip - 1]
            flip = self._shared(("flip", output.flip), lambda: _guarded(self.word_exists, array, self.word))
            word = self._without_tail(word ^ flip)
        place = self.pixel.row * self.emitter.words + simt.wide(self.word)
        self._when(_both(where, _both(self.pixel.exists, self.word_exists)), simt.put(target, place, word))

    def _without_tail(self, word):
        left = self.emitter.channels % spec.WORD_BITS
        if left == 0:
            return word
        last = tirx.EQ(self.word, simt.i32(self.emitter.words - 1))
        return tirx.Select(last, word & simt.u32((1 << left) - 1), word)

    def _when(self, condition, statement):
        self.body.append(statement if condition is None else tirx.IfThenElse(condition, statement, None))


def _both(a, b):
    """Conjunction of conditions of which None always holds."""
    if a is None or b is None:
        return b if a is None else a
    return tirx.And(a, b)


def _guarded(condition, array, index):
    """The element where ``condition`` holds, else 0, without reading it."""
    value = simt.at(array, index)
    return value if condition is None else tirx.if_then_else(condition, value, tir.constant(0, str(array.dtype)))


def _f(name, *args):
    return simt.call(name, *args, dtype="float32")


def apply(step, args):
    """One operation on scalars."""
    dtype, op = tir.dtype_of(args[-1]), step.op
    if op == "cast":
        if step.dtype == "bool":
            return args[0] if dtype == "bool" else tirx.NE(args[0], tir.constant(0, dtype))
        return args[0] if dtype == step.dtype else tirx.Cast(step.dtype, args[0])
    if op in _COMPARISONS:
        return _COMPARISONS[op](*args)
    if op in _LOGICAL:
        return _LOGICAL[op](*args)
    if op == "power":
        return _power(*args, step.args[1])
    if dtype == "float32" and op in _FLOAT:
        return _f(_FLOAT[op], *args)
    if dtype == "float32" and op in _FLOAT_COMPOSED:
        return _FLOAT_COMPOSED[op](*args)
    if op in _INTEGER:
        return _INTEGER[op](lambda value: tir.constant(value, dtype), *args)
    raise KeyError(f"no lowering for the epilogue step {step}")


def _power(base, exponent, constant):
    """Squares and cubes as products, as on processors."""
    if constant == 2.0:
        return _f("bnn_mul", base, base)
    if constant == 3.0:
        return _f("bnn_mul", _f("bnn_mul", base, base), base)
    return _f("bnn_pow", base, exponent)


def _zero():
    return tir.constant(0.0, "float32")


def _one():
    return tir.constant(1.0, "float32")


_COMPARISONS = {
    "greater": tirx.GT, "greater_equal": tirx.GE, "less": tirx.LT, "less_equal": tirx.LE, "equal": tirx.EQ, "not_equal": tirx.NE,
}  # fmt: skip
_LOGICAL = {
    "logical_and": tirx.And, "logical_or": tirx.Or, "logical_not": tirx.Not, "logical_xor": tirx.NE,
    "where": lambda c, a, b: tirx.Select(c, a, b),
}  # fmt: skip
_FLOAT = {
    "add": "bnn_add", "subtract": "bnn_sub", "multiply": "bnn_mul", "divide": "bnn_div", "maximum": "bnn_max", "minimum": "bnn_min",
    "abs": "bnn_abs", "sqrt": "bnn_sqrt", "exp": "bnn_exp", "log": "bnn_log", "tanh": "bnn_tanh", "sigmoid": "bnn_sigmoid",
    "erf": "bnn_erf", "floor": "bnn_floor", "ceil": "bnn_ceil", "round": "bnn_round",
}  # fmt: skip
#: Where one operand of a maximum or minimum is a constant it comes first, so that NaN stays NaN.
_FLOAT_COMPOSED = {
    "negative": lambda a: _f("bnn_sub", tir.constant(-0.0, "float32"), a),
    "rsqrt": lambda a: _f("bnn_div", _one(), _f("bnn_sqrt", a)),
    "relu": lambda a: _f("bnn_max", _zero(), a),
    "sign": lambda a: tirx.Select(a > _zero(), _one(), tirx.Select(a < _zero(), tir.constant(-1.0, "float32"), _zero())),
    "prelu": lambda a, slope: tirx.Select(a < _zero(), _f("bnn_mul", a, slope), a),
    "clip": lambda a, low, high: _f("bnn_min", high, _f("bnn_max", low, a)),
}  # fmt: skip
_INTEGER = {
    "add": lambda c, a, b: a + b, "subtract": lambda c, a, b: a - b, "multiply": lambda c, a, b: a * b,
    "maximum": lambda c, a, b: tirx.Max(a, b), "minimum": lambda c, a, b: tirx.Min(a, b),
    "negative": lambda c, a: c(0) - a, "abs": lambda c, a: tirx.Max(a, c(0) - a), "relu": lambda c, a: tirx.Max(c(0), a),
    "sign": lambda c, a: tirx.Select(a > c(0), c(1), tirx.Select(a < c(0), c(-1), c(0))),
    "floor": lambda c, a: a, "ceil": lambda c, a: a, "round": lambda c, a: a,
    "prelu": lambda c, a, slope: tirx.Select(a < c(0), a * slope, a), "clip": lambda c, a, low, high: tirx.Min(high, tirx.Max(low, a)),
}  # fmt: skip
