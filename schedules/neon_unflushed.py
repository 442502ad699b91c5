"""Operations on ``float32`` vectors that tell subnormal numbers from zero, for 32-bit NEON, whose arithmetic does not.

Comparisons decide bits, and what they compare may be that small: in an input, or as a threshold (x < 1e-45 says x <= 0). So everything that
picks one of its operands, or compares them, is done on bits (:data:`OPERATIONS`). Sums and products of subnormal numbers remain what NEON
makes of them, but for :data:`ARITHMETIC`: the scalar unit takes four instructions for one, and knows all numbers.

Sign and magnitude become an integer (:func:`key`) of the same order, the same for both zeros. A number other than zero that is not
subnormal itself compares with others as it should without that: next to it a subnormal number may as well be zero.
"""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import tir as T

_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000
_SMALLEST_NORMAL = 2.0**-126


def _splat(value, like, dtype="int32"):
    return T.splat(value, dtype, T.lanes_of(like))


def key(value, bind):
    """``(magnitude, key)`` as ``int32``. A magnitude beyond infinity's is NaN."""
    bits = bind("bits", T.reinterpret("int32", value))
    size, sign = bind("size", bits & _splat(_MAGNITUDE, bits)), bind("sign", bits >> _splat(31, bits))
    return size, (size ^ sign) - sign


def compare(node, a, b, bind):
    """A comparison; NaN is unlike everything, itself included."""
    (size_a, key_a), (size_b, key_b) = key(a, bind), key(b, bind)
    nan = bind("nan", tirx.GT(tirx.Max(size_a, size_b), _splat(_INFINITY, size_a)))
    result = node(key_a, key_b)
    return tirx.Or(result, nan) if node is tirx.NE else tirx.And(result, tirx.Not(nan))


def sign(a, bind):
    """1 with the sign of a; 0 for zeros and NaN."""
    bits = bind("bits", T.reinterpret("int32", a))
    size = bind("size", bits & _splat(_MAGNITUDE, bits))
    one = T.reinterpret("float32", (bits ^ size) | _splat(0x3F800000, bits))
    nonzero = tirx.And(tirx.GT(size, _splat(0, bits)), tirx.LE(size, _splat(_INFINITY, bits)))
    return T.select(nonzero, one, _splat(0.0, bits, "float32"))


def relu(a, bind):
    """0 for numbers whose sign bit is set. NaN stays NaN."""
    bits = bind("bits", T.reinterpret("int32", a))
    negative = tirx.LE(bits, _splat(_INFINITY - 2**31, bits))  # as integers, negative NaN lies above
    return T.select(negative, _splat(0.0, bits, "float32"), a)


def prelu(a, slope, bind, product=lambda a, b: T.fence(a * b)):
    """``a * slope`` where a is negative."""
    a = bind("a", a)
    return T.select(tirx.LT(T.reinterpret("int32", a), _splat(0, a)), product(a, slope), a)


def negative(a):
    """The other sign bit."""
    bits = T.reinterpret("int32", a)
    return T.reinterpret("float32", bits ^ _splat(-(2**31), bits))


def extreme(node, a, b, bind):
    """``maximum`` (``node`` is GT) or ``minimum`` (LT). NaN stays NaN."""
    for one, other in ((a, b), (b, a)):
        constant = _constant(one)
        if constant is not None and abs(constant) >= _SMALLEST_NORMAL:
            other = bind("a", other)
            return T.select(node(one, other), one, other)  # not so beside NaN, which is therefore chosen
        if constant == 0 and node is tirx.GT:
            return relu(bind("a", other), bind)
    a, b = bind("a", a), bind("b", b)
    (size_a, key_a), (_, key_b) = key(a, bind), key(b, bind)
    size_b = T.reinterpret("int32", b) & _splat(_MAGNITUDE, a)
    chosen = bind("chosen", T.select(node(key_a, key_b), a, b))
    for number, size in ((a, size_a), (b, size_b)):
        chosen = bind("chosen", T.select(tirx.GT(size, _splat(_INFINITY, a)), number, chosen))
    return chosen


def _constant(vector):
    """The number that all lanes of a vector are, if it is known."""
    value = vector.value if isinstance(vector, tirx.Broadcast) else None
    return float(value.value) if isinstance(value, tirx.FloatImm) else None


def _comparison(node):
    return lambda bind, a, b: compare(node, a, b, bind)


#: Step of an epilogue -> ``function(bind, *operands)``; ``bind(name, value)`` names an intermediate result.
OPERATIONS = {
    "greater": _comparison(tirx.GT), "greater_equal": _comparison(tirx.GE), "less": _comparison(tirx.LT),
    "less_equal": _comparison(tirx.LE), "equal": _comparison(tirx.EQ), "not_equal": _comparison(tirx.NE),
    "sign": lambda bind, a: sign(a, bind),
    "relu": lambda bind, a: relu(a, bind),
    "prelu": lambda bind, a, slope: prelu(a, slope, bind),
    "negative": lambda bind, a: negative(a),
    "maximum": lambda bind, a, b: extreme(tirx.GT, a, b, bind),
    "minimum": lambda bind, a, b: extreme(tirx.LT, a, b, bind),
    "clip": lambda bind, a, low, high: extreme(tirx.LT, bind("low", extreme(tirx.GT, a, low, bind)), high, bind),
}  # fmt: skip


def scalar(instruction, a, b):
    """The four results of ``vadd``, ``vsub`` or ``vmul`` of numbers, not vectors. LLVM would make a vector of plain operations again."""
    name, kind = f"bnn_arm_{instruction}", "<4 x float>"
    lines, last = [f"{kind} @{name}({kind} %a, {kind} %b) alwaysinline nounwind {{"], "poison"
    for i in range(4):
        lines += [f"  %{x}{i} = extractelement {kind} %{x}, i32 {i}" for x in "ab"]
        lines += [f'  %c{i} = call float asm "{instruction}.f32 $0, $1, $2", "=t,t,t"(float %a{i}, float %b{i})',
                  f"  %r{i} = insertelement {kind} {last}, float %c{i}, i32 {i}"]  # fmt: skip
        last = f"%r{i}"
    return T.extern(name, "\n".join([*lines, f"  ret {kind} {last}", "}"]), "float32x4", a, b)


#: For steps that lead to a decision.
ARITHMETIC = {
    "add": lambda bind, a, b: scalar("vadd", a, b),
    "subtract": lambda bind, a, b: scalar("vsub", a, b),
    "multiply": lambda bind, a, b: scalar("vmul", a, b),
    "prelu": lambda bind, a, slope: prelu(a, slope, bind, lambda a, b: scalar("vmul", a, b)),
}
#: Steps that decide.
DECIDING = {"greater", "greater_equal", "less", "less_equal", "equal", "not_equal", "sign", "floor", "ceil", "round", "cast"}


def deciding(epilogue):
    """Numbers of the steps whose values reach one that decides."""
    found, first = set(), 1 + len(epilogue.inputs)
    for number in reversed(range(len(epilogue.steps))):
        step = epilogue.steps[number]
        if number in found or step.op in DECIDING:
            found |= {arg - first for arg in step.args if isinstance(arg, int) and arg >= first}
    return found
