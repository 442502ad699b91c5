"""The elementwise tail of a kernel: from anchor vectors to stores.

A kernel family computes vectors of 32-bit lanes, consecutive channels of one pixel, and hands them to :meth:`Emitter.emit`, which returns
the statements of all steps and stores of a :class:`bnntvm.spec.Epilogue`. Arithmetic is IEEE float32, one rounding per operation: every
product is fenced, because LLVM would otherwise contract it with an addition.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from tvm import tirx

from bnntvm import spec
from bnntvm.schedules import neon, neon_unflushed, tir, vector_math

_LINE_BYTES = 64
#: Comparisons of the anchor ``K - 2 p`` with t: (comparison of p with the half difference, whether that is rounded up).
_ON_POPCOUNTS = {"less": (tirx.GT, 0), "less_equal": (tirx.GE, 1), "greater": (tirx.LT, 1), "greater_equal": (tirx.LE, 0)}
_MIRRORED = {"less": "greater", "less_equal": "greater_equal", "greater": "less", "greater_equal": "less_equal"}


class Emitter:
    """Writes the statements of one epilogue.

    Parameters
    ----------
    epilogue : spec.Epilogue
    channels : int
        True number of channels C of the anchor's result.
    isa : targets.x86.Isa
        ``isa.lanes`` lanes in every vector.
    dims : tuple
        Leading and spatial dimensions of the anchor's result, ``(n, height, width)`` for NHWC or ``(m,)``; ints or int64 expressions.
    anchor_dtype : str
        Type of the anchor's value: ``int32``, ``uint32`` or ``float32``.
    elementwise : bool
        Whether the anchor's values are the kernel's data. Arithmetic that leads from these, or from integers, to a decision is exact
        for subnormal numbers, too; sums of floats are not to begin with.

    Attributes
    ----------
    inputs, outputs : list of Buffer
        The kernel's parameters for the epilogue, in order.
    strips : dict of int to Buffer
        For every ``planar`` or pooled output by its number, float32 memory that takes the words of channels of a strip of pixels one after
        the other; the kernel sets it and makes the output of it, see :mod:`.strips`.
    """

    def __init__(self, epilogue, channels, isa, dims, anchor_dtype, elementwise=False):
        self.epilogue, self.channels, self.lanes, self.anchor_dtype = epilogue, channels, isa.lanes, anchor_dtype
        self.inputs = [tir.buffer(f"e{i}", input_shape(e, channels, dims), e.dtype) for i, e in enumerate(epilogue.inputs)]
        self.outputs = [tir.buffer(f"y{i}", output_shape(o, channels, dims), output_dtype(o)) for i, o in enumerate(epilogue.outputs)]
        self.mask_word = (lambda masks: neon.mask_word(masks, isa)) if neon.is_neon(isa) else tir.mask_word
        self._exact = neon_unflushed.OPERATIONS if neon.flushes(isa) else {}
        exact = elementwise or anchor_dtype != "float32"
        self._deciding = neon_unflushed.deciding(epilogue) if neon.flushes(isa) and exact else ()
        self._uses, self.strips = _count_uses(epilogue), {}

    def exact(self, number):
        """Operations on floats that the target's arithmetic does not do as step ``number`` has to."""
        return self._exact | neon_unflushed.ARITHMETIC if number in self._deciding else self._exact

    @property
    def vectors_per_word(self):
        """Vectors that hold the channels of one packed word."""
        return spec.WORD_BITS // self.lanes

    def emit(self, values, position, first_channel, scope=None, whole=None, popcounts_of=None, strip=None):
        """Statements that evaluate and store the epilogue for some channels of one pixel.

        Parameters
        ----------
        values : list of expressions
            Anchor vectors of channels ``first_channel, first_channel + 1, ...``: whole 32-bit words of channels (``vectors_per_word``
            vectors each), or fewer vectors where the epilogue has no packed output. Lanes past the last channel may hold anything.
        position : tuple of int64 expressions
            ``(n, y, x)`` or ``(m,)``.
        first_channel : int or expression
            A multiple of 32. If it is not a constant and C % 32 != 0, give one word of channels at a time, or say ``whole``.
        scope : dict, optional
            Created empty by the caller for each (straight-line block of statements, ``first_channel``): per-channel operands are loaded
            by the first call and reused by the following ones. All statements must end up in one block, in order.
        whole : bool, optional
            Promise that all channels of ``values`` exist.
        popcounts_of : int, optional
            K: ``values`` are not the anchor but numbers p of differing bits, and the anchor is ``K - 2 * p``. Comparisons of the anchor
            with per-channel integers are then made on p itself, with thresholds that ``scope`` keeps.
        strip : int64 expression, optional
            Where in ``strips`` the pixel begins.

        Returns
        -------
        list of statements
        """
        scope = {} if scope is None else scope
        return _Tile(self, values, position, first_channel, scope, whole, popcounts_of, strip).statements()

    def prefetch(self, position, first_channel, channels):
        """Statements that ask for the lines of tensors that :meth:`emit` will read and write for ``channels`` channels of one pixel."""
        kinds = [(array, False, operand.times) for array, operand in zip(self.inputs, self.epilogue.inputs) if operand.kind == "tensor"]
        kinds += [(array, True, 1) for array, output in zip(self.outputs, self.epilogue.outputs) if output.kind == "tensor"]

        def place(at, times):
            return first_channel + at if times == 1 else tirx.floormod(first_channel + at, tir.i64(self.channels // times))

        return [
            tir.prefetch(array, [*position, place(at, times)], write)
            for array, write, times in kinds
            for at in range(0, channels, _LINE_BYTES // np.dtype(str(array.dtype)).itemsize)
        ]

    @property
    def by_planes(self):
        """Whether :meth:`emit_planes` can do it: one result in channel order, no operand that has a value for every pixel."""
        kinds = [output.kind for output in self.epilogue.outputs]
        return kinds == ["planar"] and all(operand.kind in ("channel", "image") for operand in self.epilogue.inputs)

    def emit_planes(self, values, image, channel):
        """``(statements, results)``: the one output for vectors of pixels of one channel each.

        Parameters
        ----------
        values : list of expressions
            Anchor vectors of channels ``channel``, ``channel + 1``, ...
        image, channel : int64 expressions
        """
        body = []

        def bind(name, value):
            variable, statement = tir.bind(name, value)
            body.append(statement)
            return variable

        def operand(index, one, number):
            array, last = self.inputs[index], channel + number
            if one.kind == "channel":
                return tir.broadcast(tir.load(array, last), self.lanes)
            inside = (0,) * (len(array.shape) - 2)
            return tir.broadcast(tir.load(array, image, *inside, tirx.min(last, tir.i64(self.channels - 1))), self.lanes)

        results = []
        for number, value in enumerate(values):
            column = [value, *(operand(i, one, number) for i, one in enumerate(self.epilogue.inputs))]
            for number_of_step, step in enumerate(self.epilogue.steps):
                count = self._uses[len(column)]
                result = _apply(step, _operands(step, column, self.lanes), bind, self.exact(number_of_step)) if count else None
                column.append(bind("s", result) if count > 1 else result)
            results.append(bind("plane", column[self.epilogue.outputs[0].value]))
        return body, results

    def compares_anchor(self, step):
        """Whether ``step`` orders the anchor and an integer that is the same for all pixels."""
        if step.op not in _ON_POPCOUNTS or self.anchor_dtype != "int32" or 0 not in step.args:
            return False
        other = step.args[1] if step.args[0] == 0 else step.args[0]
        if isinstance(other, float):
            return other.is_integer()
        return 1 <= other <= len(self.epilogue.inputs) and self.epilogue.inputs[other - 1].kind == "channel"


def half_a_word_is_left(channels, isa):
    """Whether two vectors hold the 32 channels of a word, and the last word of ``channels`` needs one of them only."""
    return 2 * isa.lanes == spec.WORD_BITS and 0 < channels % spec.WORD_BITS <= isa.lanes


def input_shape(operand, channels, dims):
    """Shape of an epilogue input's buffer; ``dims`` as in :class:`Emitter`."""
    padded = spec.words(channels) * spec.WORD_BITS
    shapes = {
        "tensor": (*dims, channels // operand.times),
        "channel": (padded,),
        "image": (dims[0], *(1 for _ in dims[1:]), channels),
        "pixel": (*dims, 1),
        "words": (spec.words(channels),),
    }
    return shapes[operand.kind]


def output_shape(output, channels, dims):
    """Shape of an epilogue output's buffer."""
    if output.kind == "planar":
        return (dims[0], channels, *dims[1:])
    if output.kind in spec.POOLED:
        return (dims[0], *(size // 2 for size in dims[1:]), channels)
    return (*dims, channels if output.kind == "tensor" else spec.words(channels))


def output_dtype(output):
    """Type of an epilogue output's buffer."""
    return "uint32" if output.kind == "bits" else output.dtype


def _count_uses(epilogue):
    """How often each value (anchor, inputs, steps) is used by steps and outputs that matter."""
    first_step = 1 + len(epilogue.inputs)
    uses = [0] * (first_step + len(epilogue.steps))
    for output in epilogue.outputs:
        uses[output.value] += 1
    for index in reversed(range(len(epilogue.steps))):
        if uses[first_step + index]:
            step = epilogue.steps[index]
            for arg in step.args:
                if isinstance(arg, int):
                    uses[arg] += 2 if step.op in _REPEATS else 1
    return uses


#: Operations whose lowering names an argument more than once.
_REPEATS = {"sign", "prelu", "exp", "log", "tanh", "sigmoid", "erf", "power"}


class _Tile:
    """One call of :meth:`Emitter.emit`."""

    def __init__(self, emitter, values, position, first_channel, scope, whole, popcounts_of, strip):
        self.emitter, self.epilogue, self.lanes = emitter, emitter.epilogue, emitter.lanes
        self.position, self.first, self.scope, self.total = tuple(position), first_channel, scope, popcounts_of
        self.body, self.strip = [], strip
        self.static_first = tir.static(first_channel)
        self.whole = emitter.channels % spec.WORD_BITS == 0 if whole is None else whole
        if self.static_first is None and not self.whole and len(values) > emitter.vectors_per_word:
            raise ValueError("emit more than one word at a variable first_channel only where all channels exist")
        self.table = [self._column(v, value) for v, value in enumerate(values) if self._count(v) != 0]

    def statements(self):
        for index, output in enumerate(self.epilogue.outputs):
            target = self.emitter.outputs[index]
            if output.kind == "tensor":
                self._store_tensor(output, target)
            elif index in self.emitter.strips:
                self._store_strip(output, self.emitter.strips[index])
            else:
                self._store_bits(output, target)
        return self.body

    # Which channels of a vector exist

    def _count(self, v):
        """Channels of vector ``v`` that exist, None if that is not known here."""
        if self.static_first is None:
            return self.lanes if self.whole else None
        return int(np.clip(self.emitter.channels - self.static_first - v * self.lanes, 0, self.lanes))

    def _mask(self, v):
        """Bool vector of the channels of vector ``v`` that exist, None for all."""
        count = self._count(v)
        if count == self.lanes:
            return None
        if count is not None:
            return tir.prefix_mask(count, self.lanes)
        return self._shared(("mask", v), lambda: tir.prefix_mask(self._left(), self.lanes, v * self.lanes))

    def _left(self):
        return tir.i64(self.emitter.channels) - self.first

    # Values

    def _bind(self, name, value):
        variable, statement = tir.bind(name, value)
        self.body.append(statement)
        return variable

    def _shared(self, key, make):
        """A value that calls with the same scope share."""
        if key not in self.scope:
            self.scope[key] = self._bind("c", make())
        return self.scope[key]

    def _column(self, v, anchor):
        """All values of the epilogue for vector ``v``; None for those that nothing uses."""
        uses = self.emitter._uses
        values = [self._anchor(anchor)]
        for index, operand in enumerate(self.epilogue.inputs):
            used = uses[len(values)] and operand.kind != "words"
            values.append(self._load(index, operand, v) if used else None)
        for number, step in enumerate(self.epilogue.steps):
            count = uses[len(values)]
            value = None
            if count and self.total is not None and self.emitter.compares_anchor(step):
                value = self._compare_popcount(step, anchor, values, v)
            elif count:
                value = _apply(step, _operands(step, values, self.lanes), self._bind, self.emitter.exact(number))
            values.append(self._bind("s", value) if count > 1 else value)
        return values

    def _anchor(self, value):
        if self.total is None:
            return self._bind("a", value) if self.emitter._uses[0] > 1 else value
        return self._bind("a", tir.splat(self.total, "int32", self.lanes) - (value + value))

    def _compare_popcount(self, step, popcount, values, v):
        """``K - 2 p < t`` as a comparison of p with (K - t) / 2, rounded towards the side that keeps it exact."""
        op = step.op if step.args[0] == 0 else _MIRRORED[step.op]
        other = step.args[1] if step.args[0] == 0 else step.args[0]
        compare, up = _ON_POPCOUNTS[op]
        if isinstance(other, float):
            return compare(popcount, tir.splat((self.total - int(other) + up) // 2, "int32", self.lanes))
        threshold = self._shared(("threshold", other, v, up), lambda: _half_difference(self.total, values[other], up))
        return compare(popcount, threshold)

    def _load(self, index, operand, v):
        array, channel = self.emitter.inputs[index], self.first + v * self.lanes
        if operand.kind == "channel":
            return self._shared((index, v), lambda: tir.load_vector(array, [channel], self.lanes))
        if operand.kind == "pixel":
            pixel = (index, *(str(p) for p in self.position))
            return self._shared(pixel, lambda: tir.broadcast(tir.load(array, *self.position, 0), self.lanes))
        if operand.kind == "image":
            where = (self.position[0], *(0 for _ in self.position[1:]), channel)
            return self._shared((index, v, str(self.position[0])), lambda: self._load_channels(array, where, v))
        if operand.times > 1:
            return self._bind("t", tir.load_vector(array, (*self.position, self._within(operand, v)), self.lanes))
        return self._bind("t", self._load_channels(array, (*self.position, channel), v))

    def _within(self, operand, v):
        """Where vector ``v`` begins in an operand that is read several times; it has whole words of channels."""
        size, (word, rest) = self.emitter.channels // operand.times, divmod(v, self.emitter.vectors_per_word)
        if self.static_first is not None:
            return (self.static_first + v * self.lanes) % size
        first = self._shared(("within", size, word), lambda: tirx.floormod(self.first + word * spec.WORD_BITS, tir.i64(size)))
        return first + rest * self.lanes

    def _load_channels(self, array, where, v):
        mask = self._mask(v)
        return tir.load_vector(array, where, self.lanes) if mask is None else tir.load_masked(array, where, mask)

    # Stores

    def _store_tensor(self, output, target):
        for v, values in enumerate(self.table):
            value, mask = values[output.value], self._mask(v)
            if tir.element_of(tir.dtype_of(value)) != output.dtype:
                value = tirx.Cast(tir.vector_type(output.dtype, self.lanes), value)
            if output.dtype == "bool" and mask is not None:  # memory holds bools as bytes
                value = tirx.Cast(tir.vector_type("uint8", self.lanes), value)
            where = (*self.position, self.first + v * self.lanes)
            self.body.append(tir.store_vector(target, where, value) if mask is None else tir.store_masked(target, where, value, mask))

    def _store_strip(self, output, strip):
        for v, values in enumerate(self.table):
            self.body.append(tir.store_vector(strip, [self.strip + v * self.lanes], values[output.value]))

    def _store_bits(self, output, target):
        per_word = self.emitter.vectors_per_word
        nothing = tir.splat(False, "bool", self.lanes)
        for start in range(0, len(self.table), per_word):
            masks = [values[output.value] for values in self.table[start : start + per_word]]
            word = self.emitter.mask_word(masks + [nothing] * (per_word - len(masks)))
            number, index = start // per_word, self._word_index(start // per_word)
            if output.flip is not None:
                array = self.emitter.inputs[output.flip - 1]
                word = word ^ self._shared(("flip", output.flip, number), lambda: tir.load(array, index))  # noqa: B023
            self.body.append(tir.store(target, self._clear_tail(word, number), *self.position, index))

    def _word_index(self, number):
        if self.static_first is not None:
            return self.static_first // spec.WORD_BITS + number
        return tirx.floordiv(self.first, tir.i64(spec.WORD_BITS)) + number

    def _clear_tail(self, word, number):
        if self.static_first is None and not self.whole:
            left = tirx.Cast("uint32", tirx.min(self._left(), tir.i64(spec.WORD_BITS)))
            ones = tir.constant(0xFFFFFFFF, "uint32")
            return word & (ones >> (tir.constant(spec.WORD_BITS, "uint32") - left))
        left = spec.WORD_BITS if self.static_first is None else self.emitter.channels - self.static_first - number * spec.WORD_BITS
        return word if left >= spec.WORD_BITS else word & tir.constant((1 << left) - 1, "uint32")


def _half_difference(total, vector, up):
    """``(total - vector + up) // 2`` for int32 lanes and ``up`` in {0, 1}, without overflow for any value of the lanes."""

    def number(value):
        return tir.splat(value, "int32", tir.lanes_of(vector))

    odd, half = vector & number(1), number(total >> 1) - (vector >> number(1))
    if up:
        return half + (number(1) - odd) if total & 1 else half
    return half if total & 1 else half - odd


def _operands(step, values, lanes):
    """The step's arguments as vectors; a constant takes the type of its neighbours (of the result for ``where``)."""
    exprs = [values[arg] if isinstance(arg, int) else None for arg in step.args]
    known = [tir.element_of(tir.dtype_of(e)) for e in exprs[1 if step.op == "where" else 0 :] if e is not None]
    dtype = known[0] if known else step.dtype
    if any(k != dtype for k in known):
        raise TypeError(f"operands of {step} have different types: {known}")
    return [tir.splat(_python(arg, dtype), dtype, lanes) if e is None else e for arg, e in zip(step.args, exprs)]


def _python(value, dtype):
    if dtype.startswith(("int", "uint")):
        if value != int(value):
            raise TypeError(f"constant {value} beside a value of type {dtype}")
        return int(value)
    return bool(value) if dtype == "bool" else float(np.float32(value))


def _apply(step, args, bind, exact):
    """One operation on vectors; ``bind(name, value)`` names an intermediate result, ``exact`` holds operations on floats that the target's
    arithmetic does not do as it should."""
    lanes, dtype = tir.lanes_of(args[0]), tir.element_of(tir.dtype_of(args[-1]))
    if step.op in _COMPARISONS and args[0].same_as(args[1]) and dtype != "bool":
        args = [args[0], tir.opaque(args[1])]  # TVM's simplifier fails on vectors that are compared with themselves
    if dtype == "float32" and step.op in exact:
        return exact[step.op](bind, *args)

    def constant(value):
        return tir.splat(_python(value, dtype), dtype, lanes)

    if step.op == "cast" and step.dtype == "bool" and dtype != "bool":
        return _apply(replace(step, op="not_equal"), [args[0], constant(0)], bind, exact)
    if step.op == "cast":
        return args[0] if dtype == step.dtype else tir.opaque(tirx.Cast(tir.vector_type(step.dtype, lanes), args[0]))
    if step.op == "power":
        return _power(*args, step.args[1])
    if step.op in vector_math.FUNCTIONS:
        return vector_math.FUNCTIONS[step.op](args[0], bind)
    if step.op in _INTRINSICS and dtype.startswith("float"):
        return tir.intrinsic(_INTRINSICS[step.op], args[0])
    if step.op in _NODES:
        return _NODES[step.op](*args)
    if step.op in _COMPOSED:
        return _COMPOSED[step.op](constant, *args)
    raise KeyError(f"no lowering for the epilogue step {step}")


def _product(a, b):
    product = tirx.Mul(a, b)
    return tir.fence(product) if tir.dtype_of(product).startswith("float") else product


def _power(base, exponent, constant):
    """ONNX Runtime computes squares and cubes as products; everything else is the C library's powf."""
    if constant == 2.0:
        return _product(base, base)
    if constant == 3.0:
        return _product(_product(base, base), base)
    return tir.intrinsic("llvm.pow", base, exponent)


_COMPARISONS = {
    "greater": tirx.GT, "greater_equal": tirx.GE, "less": tirx.LT, "less_equal": tirx.LE, "equal": tirx.EQ, "not_equal": tirx.NE,
}  # fmt: skip
#: Operations that are one node of TensorIR.
_NODES = {
    **_COMPARISONS,
    "add": tirx.Add, "subtract": tirx.Sub, "divide": tirx.Div, "maximum": tirx.Max, "minimum": tirx.Min,
    "logical_and": tirx.And, "logical_or": tirx.Or, "logical_not": tirx.Not, "where": tir.select,
    "logical_xor": tir.xor_masks,
}  # fmt: skip
#: Operations on floats that are one intrinsic of LLVM.
_INTRINSICS = {"floor": "llvm.floor", "ceil": "llvm.ceil", "round": "llvm.rint", "sqrt": "llvm.sqrt", "abs": "llvm.fabs"}
#: Operations made of several; ``c(value)`` is a constant vector. Where one operand of a maximum or minimum is a constant it comes first,
#: so that NaN stays NaN.
_COMPOSED = {
    "multiply": lambda c, a, b: _product(a, b),
    "negative": lambda c, a: c(-0.0) - a,
    "abs": lambda c, a: tirx.Max(a, c(0) - a),
    "sign": lambda c, a: tir.select(a > c(0), c(1), tir.select(a < c(0), c(-1), c(0))),
    "rsqrt": lambda c, a: tirx.Div(c(1), tir.intrinsic("llvm.sqrt", a)),
    "relu": lambda c, a: tirx.Max(c(0), a),
    "prelu": lambda c, a, slope: tir.prelu(a, slope),
    "clip": lambda c, a, low, high: tirx.Min(high, tirx.Max(low, a)),
}


# Reference ----------------------------------------------------------------------------------------------------------------------------


def _power_reference(x, exponent):
    if np.ndim(exponent) == 0 and exponent in (2, 3):
        return x * x if exponent == 2 else x * x * x
    return np.power(x, exponent)


_NUMPY = {
    "add": np.add, "subtract": np.subtract, "multiply": np.multiply, "divide": np.divide, "maximum": np.maximum, "minimum": np.minimum,
    "power": _power_reference, "greater": np.greater, "greater_equal": np.greater_equal, "less": np.less, "less_equal": np.less_equal,
    "equal": np.equal, "not_equal": np.not_equal, "logical_and": np.logical_and, "logical_or": np.logical_or,
    "logical_not": np.logical_not, "logical_xor": np.logical_xor, "negative": np.negative, "abs": np.abs, "sign": np.sign,
    "sqrt": np.sqrt, "rsqrt": lambda x: np.float32(1) / np.sqrt(x), "exp": lambda x: np.exp(x.astype(np.float64)),
    "log": lambda x: np.log(x.astype(np.float64)), "tanh": lambda x: np.tanh(x.astype(np.float64)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x.astype(np.float64))), "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "floor": np.floor, "ceil": np.ceil, "round": np.rint, "relu": lambda x: np.maximum(x, x.dtype.type(0)), "cast": lambda x: x,
    "prelu": lambda x, s: np.where(x < 0, x * s, x), "clip": lambda x, lo, hi: np.minimum(np.maximum(x, lo), hi), "where": np.where,
}  # fmt: skip


def reference(epilogue, anchor_value, inputs):
    """The epilogue in numpy, operation by operation.

    Parameters
    ----------
    epilogue : spec.Epilogue
    anchor_value : ndarray [..., C]
        The anchor's result, in its own type.
    inputs : list of ndarray
        In the shapes of :func:`input_shape`.

    Returns
    -------
    list of ndarray
        One for each output; packed outputs as ``uint32[..., words(C)]``.
    """
    channels = anchor_value.shape[-1]
    values = [anchor_value]
    for operand, array in zip(epilogue.inputs, inputs):
        values.append(array[:channels] if operand.kind == "channel" else np.concatenate([array] * operand.times, -1))
    with np.errstate(all="ignore"):
        for step in epilogue.steps:
            typed = [values[a].dtype for a in step.args if isinstance(a, int)][-1]
            constant = np.dtype(step.dtype) if step.op == "where" else typed
            args = [values[a] if isinstance(a, int) else constant.type(a) for a in step.args]
            values.append(np.asarray(_NUMPY[step.op](*args)).astype(step.dtype))
    return [_reference_output(o, values, channels, anchor_value.shape) for o in epilogue.outputs]


def _reference_output(output, values, channels, shape):
    value = np.broadcast_to(values[output.value], shape)
    if output.kind != "bits":
        value = value.astype(output.dtype)
        if output.kind in spec.POOLED:
            return _reference_pool(output.kind, value)
        return value if output.kind == "tensor" else np.ascontiguousarray(np.moveaxis(value, -1, 1))
    packed = pack(value)
    if output.flip is not None:
        packed = packed ^ values[output.flip]
    return packed & pack(np.ones(channels, bool))


def _reference_pool(kind, value):
    """2x2 pixels of ``[N, H, W, C]`` made one, added up row by row."""
    first, second, third, fourth = (value[:, y::2, x::2] for y in (0, 1) for x in (0, 1))
    if kind == "max_pool":
        return np.maximum(np.maximum(first, second), np.maximum(third, fourth))
    return (((first + second) + third) + fourth) * np.float32(0.25)


def pack(bits):
    """``uint32[..., words(C)]`` of ``bool[..., C]``: channel c at bit c % 32 of word c // 32, tail bits 0."""
    channels = bits.shape[-1]
    padded = np.zeros((*bits.shape[:-1], spec.words(channels) * spec.WORD_BITS), np.uint8)
    padded[..., :channels] = bits
    return np.packbits(padded, axis=-1, bitorder="little").view("<u4")


def unpack(packed, channels):
    """``bool[..., C]`` of ``uint32[..., words(C)]``."""
    raw = np.ascontiguousarray(packed).view(np.uint8)
    return np.unpackbits(raw, axis=-1, bitorder="little")[..., :channels].astype(bool)
