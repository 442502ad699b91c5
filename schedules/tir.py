"""A small builder over TensorIR nodes, shared by the kernel families.

Kernels are written as explicit vector code: every value in a hot loop is a vector of ``isa.lanes`` 32-bit lanes, every register tile an
array in scope ``local`` that is accessed at constant offsets only, so that LLVM keeps it in registers. What TensorIR cannot say (a bool
vector as a word of bits, partial loads and stores) is said by one-line LLVM functions, which :func:`function` links into the kernel.

Index arithmetic is int64. Statements are plain lists; :func:`seq` joins them.
"""

from __future__ import annotations

import itertools
import re

import tvm
from tvm import tirx
from tvm_ffi import structural_visit

_fresh = itertools.count()
_HELPERS = {}
_LLVM_TYPES = {"float32": "float", "float64": "double", "float16": "half", "int8": "i8", "uint8": "i8", "int16": "i16", "uint16": "i16",
               "int32": "i32", "uint32": "i32", "int64": "i64", "uint64": "i64", "bool": "i1"}  # fmt: skip


# Scalars and vectors ------------------------------------------------------------------------------------------------------------------


def i64(value):
    """``value`` as an int64 expression; expressions pass through."""
    return tirx.IntImm("int64", value) if isinstance(value, int) else value


def constant(value, dtype):
    """A scalar constant of type ``dtype``."""
    return tirx.const(value, dtype)


def dtype_of(value):
    """The type of an expression as a string, such as ``float32x16``."""
    return str(value.ty.dtype)


def element_of(dtype):
    """``float32`` of ``float32x16``."""
    return re.sub(r"(?<=\d|l)x\d+$", "", dtype)


def vector_type(dtype, lanes):
    """``float32x16`` of ``float32`` and 16."""
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def broadcast(value, lanes):
    """A vector with the same scalar in every lane."""
    return tirx.Broadcast(value, lanes) if lanes > 1 else value


def splat(value, dtype, lanes):
    """A constant vector."""
    return broadcast(constant(value, dtype), lanes)


def lane_numbers(lanes, first=0):
    """``int32[lanes]``: first, first + 1, ..."""
    return tirx.Ramp(constant(first, "int32"), constant(1, "int32"), lanes)


def static(value):
    """The int behind a constant expression, else None."""
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, tirx.IntImm) else None


# Memory -------------------------------------------------------------------------------------------------------------------------------


def buffer(name, shape, dtype, alignment=None):
    """A parameter buffer, dense and row-major, aligned to ``alignment`` bytes, by default to an element: a network's inputs lie where the
    caller has them."""
    return tirx.decl_buffer(tuple(i64(d) for d in shape), dtype, name, data_alignment=alignment or max(1, _bits(dtype) // 8))


#: TVM puts arrays of scope ``global`` on the stack if they are smaller than this, and everything else on a workspace heap.
STACK_BYTES = 1024


def local(name, size, dtype):
    """``(buffer, statement)``: an array of ``size`` elements for registers, to be accessed at constant offsets only.

    LLVM keeps it in registers if it is smaller than ``STACK_BYTES``; for more, see :class:`Registers`.
    """
    return scratch(f"{name}_{next(_fresh)}", (size,), dtype)


def scratch(name, shape, dtype):
    """``(buffer, statement)``: memory of the kernel's own, of any size. TVM shrinks it to the part that it sees used."""
    array = tirx.decl_buffer(tuple(i64(d) for d in shape), dtype, name)
    return array, tirx.AllocBuffer(array)


#: Ends the names of allocations that are accessed through an alias only.
_HIDDEN = "_hidden"


def memory(name, size, dtype):
    """``(array, statements)``: memory of a kernel that is too large for registers.

    The array is an alias of what is allocated: TVM shrinks an allocation to the union of all accesses, and with the many accesses of an
    unrolled tile it computes that union for ever. Its StorageRewrite does not see accesses through an alias, and would give the memory to
    other arrays of that size; so :func:`seq` uses the address once more behind the last statement that may access the array, which costs
    no instruction.
    """
    allocated = tirx.decl_buffer((i64(size),), dtype, name + _HIDDEN)
    array = tirx.decl_buffer(allocated.shape, dtype, name)
    return array, [tirx.AllocBuffer(allocated), _use(allocated), tirx.DeclBuffer(array, data=tirx.buffer_data(allocated))]


def _use(allocated):
    """A statement that uses the address of an allocation and does nothing."""
    return tirx.Evaluate(tirx.isnullptr(tirx.buffer_data(allocated)))


class Registers:
    """Vectors that are written more than once, such as the accumulators of a register tile.

    Parameters
    ----------
    name : str
    count : int
        Number of vectors.
    dtype : str
        Element type.
    lanes : int

    Attributes
    ----------
    allocate : list of statements
        To be placed before the first use, in the innermost block that covers all uses.
    """

    def __init__(self, name, count, dtype, lanes):
        self.lanes = lanes
        pairs = [local(name, lanes, dtype) for _ in range(count)]
        self.arrays, self.allocate = [p[0] for p in pairs], [p[1] for p in pairs]

    def get(self, index):
        """The vector ``index`` (a Python int)."""
        return load_vector(self.arrays[index], [0], self.lanes)

    def set(self, index, value):
        """Statement that replaces the vector ``index``."""
        return store_vector(self.arrays[index], [0], value)

    def fill(self, value):
        """Statements that set every vector to ``value``."""
        return [self.set(i, value) for i in range(len(self.arrays))]


def _indices(indices, lanes):
    indices = [i64(i) for i in indices]
    if lanes > 1:
        indices[-1] = tirx.Ramp(indices[-1], i64(1), lanes)
    return indices


def load_vector(array, indices, lanes):
    """``lanes`` consecutive elements along the last axis, from ``indices`` on; a scalar for one lane."""
    return tirx.BufferLoad(array, _indices(indices, lanes))


def load(array, *indices):
    """One element."""
    return load_vector(array, indices, 1)


def store_vector(array, indices, value):
    """Store a vector along the last axis, from ``indices`` on. Returns a statement."""
    _WIDEST[0] = max(_WIDEST[0], lanes_of(value) * _bits(element_of(dtype_of(value))) // 8)
    return tirx.BufferStore(array, value, _indices(indices, lanes_of(value)))


def store(array, value, *indices):
    """Store one element. Returns a statement."""
    return tirx.BufferStore(array, value, [i64(i) for i in indices])


def lanes_of(value):
    """Number of lanes of an expression, 1 for a scalar."""
    match = re.search(r"(?<=\d|l)x(\d+)$", dtype_of(value))
    return int(match[1]) if match else 1


# Linked-in LLVM functions -------------------------------------------------------------------------------------------------------------


def extern(name, text, dtype, *args):
    # weak_odr: every kernel of a module brings its own copy, the linker keeps one; all calls are inlined.
    _HELPERS[name] = f"define weak_odr hidden {text}"
    return tirx.call_extern(dtype, name, *args)


def _llvm_vector(dtype, lanes):
    return f"<{lanes} x {_LLVM_TYPES[dtype]}>" if lanes > 1 else _LLVM_TYPES[dtype]


def mask_word(masks):
    """The bits of bool vectors, first lane lowest, as one unsigned integer.

    Parameters
    ----------
    masks : list of bool vectors of L lanes
        Their total number of lanes is the width of the result: 8, 16, 32 or 64.

    Returns
    -------
    uint8, uint16, uint32 or uint64 expression
    """
    lanes, width = lanes_of(masks[0]), lanes_of(masks[0]) * len(masks)
    vectors = [(f"%v{i}", lanes) for i in range(len(masks))]
    lines = []
    while len(vectors) > 1:  # join neighbours until one vector is left
        joined = []
        for (a, n), (b, _) in zip(vectors[::2], vectors[1::2]):
            order = ", ".join(f"i32 {k}" for k in range(2 * n))
            name = f"%j{len(lines)}"
            lines.append(f"  {name} = shufflevector <{n} x i1> {a}, <{n} x i1> {b}, <{2 * n} x i32> <{order}>")
            joined.append((name, 2 * n))
        vectors = joined
    name = f"bnn_mask_word_{lanes}_{width}"
    params = ", ".join(f"<{lanes} x i1> %v{i}" for i in range(len(masks)))
    text = "\n".join([f"i{width} @{name}({params}) alwaysinline nounwind {{", *lines,
                      f"  %r = bitcast <{width} x i1> {vectors[0][0]} to i{width}", f"  ret i{width} %r", "}"])  # fmt: skip
    return extern(name, text, f"uint{width}", *masks)


def expand_mask(word, lanes):
    """The inverse of :func:`mask_word` for one vector: ``uint<lanes>`` word to a bool vector of ``lanes`` lanes.

    For 4 lanes the word is a uint8 whose upper half is ignored.
    """
    width = max(lanes, 8)
    name = f"bnn_expand_mask_{lanes}"
    lines = [f"<{lanes} x i1> @{name}(i{width} %w) alwaysinline nounwind {{", f"  %v = bitcast i{width} %w to <{width} x i1>"]
    if width != lanes:
        order = ", ".join(f"i32 {k}" for k in range(lanes))
        lines.append(f"  %r = shufflevector <{width} x i1> %v, <{width} x i1> poison, <{lanes} x i32> <{order}>")
    lines += [f"  ret <{lanes} x i1> {'%v' if width == lanes else '%r'}", "}"]
    return extern(name, "\n".join(lines), f"boolx{lanes}", word)


def digits(words, base, coefficients, dtype="int8", valid=None, otherwise=0):
    """``base + sum(coefficients[j] * bit_j)`` for the bits of words, one byte for each.

    Parameters
    ----------
    words : list of uint16, uint32 or uint64 expressions
    base : int
    coefficients : list of int
    dtype : str
        ``int8`` or ``uint8``.
    valid : int, optional
        Number of bits whose byte is wanted; the others become ``otherwise``.

    Returns
    -------
    vector of ``dtype`` with a lane for every bit
    """
    lanes = int(dtype_of(words[0])[4:])
    vector = f"<{lanes} x i8>"

    def step(j, last, coefficient):
        return [f"  %m{j} = bitcast i{lanes} %w{j} to <{lanes} x i1>", f"  %a{j} = add {vector} {last}, {coefficient}",
                f"  %s{j} = select <{lanes} x i1> %m{j}, {vector} %a{j}, {vector} {last}"]  # fmt: skip

    return digits_by("bnn_digits", step, words, base, coefficients, dtype, valid, otherwise)


def digits_by(name, step, words, base, coefficients, dtype, valid, otherwise):
    """:func:`digits` by a processor's own way to add a coefficient where a bit is set.

    ``step(j, last, coefficient)``: lines of LLVM that name the vector ``%s<j>``: ``last`` plus the vector ``coefficient`` in the lanes
    whose bits are set in the word ``%w<j>``. ``name`` begins the function's name.
    """
    lanes = int(dtype_of(words[0])[4:])
    vector = f"<{lanes} x i8>"

    def splat_of(value):
        return f"<{', '.join([f'i8 {_byte(value)}'] * lanes)}>"

    lines, last = [], splat_of(base)
    for j, coefficient in enumerate(coefficients):
        lines += step(j, last, splat_of(coefficient))
        last = f"%s{j}"
    if valid is not None:
        keep = ", ".join(f"i1 {int(lane < valid)}" for lane in range(lanes))
        lines.append(f"  %r = select <{lanes} x i1> <{keep}>, {vector} {last}, {vector} {splat_of(otherwise)}")
        last = "%r"
    key = "_".join(str(v).replace("-", "m") for v in (lanes, base, *coefficients, valid, otherwise))
    params = ", ".join(f"i{lanes} %w{j}" for j in range(len(words)))
    text = "\n".join([f"{vector} @{name}_{key}({params}) alwaysinline nounwind {{", *lines, f"  ret {vector} {last}", "}"])
    return extern(f"{name}_{key}", text, f"{dtype}x{lanes}", *words)


def _byte(value):
    """``value`` as LLVM writes an i8."""
    return (value + 128) % 256 - 128


def byte_cast(value, dtype, offset):
    """Bytes as another 8-bit type, ``offset`` added modulo 256."""
    cast = tirx.reinterpret(vector_type(dtype, lanes_of(value)), value)
    return cast + splat(offset, dtype, lanes_of(value)) if offset else cast


def xor_masks(a, b):
    """Where exactly one of two bool vectors is set. (TVM has no such node, and one made of others doubles with every term of a chain.)"""
    lanes = lanes_of(a)
    name, kind = f"bnn_xor_mask_{lanes}", _llvm_vector("bool", lanes)
    text = f"{kind} @{name}({kind} %a, {kind} %b) alwaysinline nounwind {{\n  %r = xor {kind} %a, %b\n  ret {kind} %r\n}}"
    return extern(name, text, vector_type("bool", lanes), a, b)


def select(condition, yes, no):
    """``yes`` where ``condition`` holds, else ``no``; all vectors, or scalars.

    TVM's simplifier assumes the condition of its own Select in both branches, which takes exponential time where selections are nested.
    """
    lanes = lanes_of(yes)
    if lanes == 1:
        return tirx.Select(condition, yes, no)
    dtype = element_of(dtype_of(yes))
    name, kind = f"bnn_select_{_LLVM_TYPES[dtype]}x{lanes}", _llvm_vector(dtype, lanes)
    text = (f"{kind} @{name}(<{lanes} x i1> %c, {kind} %a, {kind} %b) alwaysinline nounwind {{\n"
            f"  %r = select <{lanes} x i1> %c, {kind} %a, {kind} %b\n  ret {kind} %r\n}}")  # fmt: skip
    return extern(name, text, dtype_of(yes), condition, yes, no)


def prefix_mask(count, lanes, first=0):
    """Bool vector: lane i is set where ``first + i < count``. ``count`` is an int or an integer expression."""
    limit = tirx.Broadcast(tirx.Cast("int32", i64(count)) if static(count) is None else constant(static(count), "int32"), lanes)
    return lane_numbers(lanes, first) < limit


def _bits(dtype):
    """Bits of an element in memory."""
    return 8 if dtype == "bool" else int(re.search(r"\d+", dtype)[0])


def _masked(kind, dtype, lanes):
    vector, bits = _llvm_vector(dtype, lanes), _bits(dtype)
    suffix = {"float16": "f16", "float32": "f32", "float64": "f64"}.get(dtype, f"i{bits}")
    intrinsic, align = f"@llvm.masked.{kind}.v{lanes}{suffix}.p0", bits // 8
    name = f"bnn_masked_{kind}_{suffix}x{lanes}"
    address = f"  %p = getelementptr {_LLVM_TYPES[dtype]}, ptr %base, i64 %offset\n"
    if kind == "load":
        text = (f"{vector} @{name}(ptr %base, i64 %offset, <{lanes} x i1> %m) alwaysinline nounwind {{\n{address}"
                f"  %r = call {vector} {intrinsic}(ptr %p, i32 {align}, <{lanes} x i1> %m, {vector} zeroinitializer)\n"
                f"  ret {vector} %r\n}}\n"
                f"declare {vector} {intrinsic}(ptr, i32, <{lanes} x i1>, {vector})")  # fmt: skip
    else:
        text = (f"i32 @{name}(ptr %base, i64 %offset, {vector} %x, <{lanes} x i1> %m) alwaysinline nounwind {{\n{address}"
                f"  call void {intrinsic}({vector} %x, ptr %p, i32 {align}, <{lanes} x i1> %m)\n"
                f"  ret i32 0\n}}\n"
                f"declare void {intrinsic}({vector}, ptr, i32, <{lanes} x i1>)")  # fmt: skip
    return name, text


def _address(array, indices):
    """Base pointer and offset in elements."""
    offset = i64(0)
    for size, index in zip(array.shape, indices, strict=True):
        offset = offset * size + i64(index)
    return tirx.buffer_data(array), offset


def load_masked(array, indices, mask):
    """A vector of which only the lanes set in ``mask`` are read; the others are 0 and their memory is not touched.

    ``array`` is a parameter of the kernel: TVM may change the element type of arrays inside the kernel without seeing this access.
    """
    lanes, dtype = lanes_of(mask), element_of(str(array.dtype))
    name, text = _masked("load", dtype, lanes)
    return extern(name, text, vector_type(dtype, lanes), *_address(array, indices), mask)


def misaligned_by(array, lanes):
    """int64: how many elements of four bytes the array begins past a multiple of a vector, in memory."""
    text = "i64 @bnn_address(ptr %base) alwaysinline nounwind {\n  %r = ptrtoint ptr %base to i64\n  ret i64 %r\n}"
    address = extern("bnn_address", text, "int64", tirx.buffer_data(array))
    return tirx.bitwise_and(tirx.shift_right(address, i64(2)), i64(lanes - 1))


def store_masked(array, indices, value, mask):
    """Store only the lanes set in ``mask``; ``array`` is a parameter of the kernel. Returns a statement."""
    name, text = _masked("store", element_of(dtype_of(value)), lanes_of(mask))
    return tirx.Evaluate(extern(name, text, "int32", *_address(array, indices), value, mask))


def prefetch(array, indices, write=False):
    """Statement that asks for the cache line of an element, to read or to ``write``; it need not exist: nothing is read."""
    name = f"bnn_prefetch_{'write_' * write}" + _LLVM_TYPES[element_of(str(array.dtype))]
    text = (f"i32 @{name}(ptr %base, i64 %offset) alwaysinline nounwind {{\n"
            f"  %p = getelementptr {_LLVM_TYPES[element_of(str(array.dtype))]}, ptr %base, i64 %offset\n"
            f"  call void @llvm.prefetch.p0(ptr %p, i32 {int(write)}, i32 3, i32 1)\n  ret i32 0\n}}\n"
            "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")  # fmt: skip
    return tirx.Evaluate(extern(name, text, "int32", *_address(array, indices)))


def fence(value):
    """``value``, out of reach of floating-point contraction: a product that is fenced is rounded before it is added."""
    return tirx.call_llvm_pure_intrin(dtype_of(value), "llvm.arithmetic.fence", value)


def prelu(value, slope):
    """``value * slope`` where ``value < 0``, else ``value``.

    The product needs no fence, as nothing adds to it: LLVM then makes one masked multiplication of it, where the processor has that.
    """
    lanes = lanes_of(value)
    if element_of(dtype_of(value)) != "float32":
        return select(value < splat(0, element_of(dtype_of(value)), lanes), value * slope, value)
    name, kind, bit = f"bnn_prelu_{lanes}", _llvm_vector("float32", lanes), f"<{lanes} x i1>" if lanes > 1 else "i1"
    text = (f"{kind} @{name}({kind} %v, {kind} %s) alwaysinline nounwind {{\n  %p = fmul {kind} %v, %s\n"
            f"  %c = fcmp olt {kind} %v, zeroinitializer\n  %r = select {bit} %c, {kind} %p, {kind} %v\n  ret {kind} %r\n}}")  # fmt: skip
    return extern(name, text, dtype_of(value), value, slope)


def zero_if_finite(value):
    """``value - value``: 0 where a float is finite, NaN where it is not. (TVM would simplify the subtraction itself.)"""
    lanes = lanes_of(value)
    name, kind = f"bnn_zero_if_finite_{lanes}", _llvm_vector("float32", lanes)
    text = f"{kind} @{name}({kind} %v) alwaysinline nounwind {{\n  %r = fsub {kind} %v, %v\n  ret {kind} %r\n}}"
    return extern(name, text, dtype_of(value), value)


def add_zero_if_finite(total, value):
    """``total + 0 * value``: NaN from the first lane on that is NaN or infinite; one instruction where there is a fused one."""
    lanes = lanes_of(value)
    name, kind = f"bnn_add_zero_if_finite_{lanes}", _llvm_vector("float32", lanes)
    text = (f"{kind} @{name}({kind} %t, {kind} %v) alwaysinline nounwind {{\n  %p = fmul contract {kind} %v, zeroinitializer\n"
            f"  %r = fadd contract {kind} %t, %p\n  ret {kind} %r\n}}")  # fmt: skip
    return extern(name, text, dtype_of(value), total, value)


def opaque(value):
    """``value``, hidden from TVM's integer analysis, which fails on some vector expressions (float comparisons, casts)."""
    dtype, lanes = element_of(dtype_of(value)), lanes_of(value)
    name, kind = f"bnn_value_{_LLVM_TYPES[dtype]}x{lanes}", _llvm_vector(dtype, lanes)
    return extern(name, f"{kind} @{name}({kind} %v) alwaysinline nounwind {{\n  ret {kind} %v\n}}", dtype_of(value), value)


def runtime(value):
    """An int64 whose value LLVM does not know: a loop to it is not unrolled."""
    text = 'i64 @bnn_runtime(i64 %v) alwaysinline nounwind {\n  %r = call i64 asm "", "=r,0"(i64 %v)\n  ret i64 %r\n}'
    return extern("bnn_runtime", text, "int64", i64(value))


def shuffle(vectors, lanes):
    """A vector of the given lanes of a list of vectors, counted through all of them."""
    return tirx.Shuffle(vectors, [constant(lane, "int32") for lane in lanes])


def compress(value, mask):
    """The lanes of a float32 vector that are set in ``mask``, one after the other from the first on; the others are 0 (AVX-512)."""
    kind = _llvm_vector("float32", lanes := lanes_of(value))
    name, call = f"bnn_compress_{lanes}", f"@llvm.x86.avx512.mask.compress.v{lanes}f32"
    text = (f"{kind} @{name}({kind} %v, <{lanes} x i1> %m) alwaysinline nounwind {{\n"
            f"  %r = call {kind} {call}({kind} %v, {kind} zeroinitializer, <{lanes} x i1> %m)\n  ret {kind} %r\n}}\n"
            f"declare {kind} {call}({kind}, {kind}, <{lanes} x i1>)")  # fmt: skip
    return extern(name, text, dtype_of(value), value, mask)


def reinterpret(dtype, value):
    """The bits of a vector as another element type of the same width."""
    return tirx.reinterpret(vector_type(dtype, lanes_of(value)), value)


def sum_lanes(value):
    """The scalar sum of an int32 vector."""
    lanes = lanes_of(value)
    name = f"bnn_sum_{lanes}"
    text = (f"i32 @{name}(<{lanes} x i32> %v) alwaysinline nounwind {{\n"
            f"  %r = call i32 @llvm.vector.reduce.add.v{lanes}i32(<{lanes} x i32> %v)\n  ret i32 %r\n}}\n"
            f"declare i32 @llvm.vector.reduce.add.v{lanes}i32(<{lanes} x i32>)")  # fmt: skip
    return extern(name, text, "int32", value)


def intrinsic(name, *args):
    """An LLVM intrinsic that returns the type of its first argument."""
    return tirx.call_llvm_pure_intrin(dtype_of(args[0]), name, *args)


# Statements ---------------------------------------------------------------------------------------------------------------------------


def seq(*statements):
    """One statement of statements and (nested) lists of them, which may be empty. What is allocated in it lives to its end."""
    flat = []

    def visit(item):
        if isinstance(item, (list, tuple)):
            for part in item:
                visit(part)
        elif isinstance(item, tirx.SeqStmt):
            visit(list(item.seq))
        else:
            flat.append(item)

    visit(statements)
    flat += [_use(item.buffer) for item in flat if isinstance(item, tirx.AllocBuffer) and item.buffer.name.endswith(_HIDDEN)]
    if not flat:
        return tirx.Evaluate(i64(0))
    return flat[0] if len(flat) == 1 else tirx.SeqStmt(flat)


#: Names in an expression, with each replaced by what it stands for, above which a value is named through memory.
UNFOLDED_LIMIT = 100


def bind(name, value):
    """``(expression, statement)``: a name for a value, visible in the statements that follow in the same block.

    TVM's simplifier and its code generator replace names by their values where they analyse an expression. In a chain of steps that read
    the step before several times that takes exponential time, so a vector that would become too large is stored to an array of its own,
    which LLVM keeps in registers. Casts and comparisons are hidden from an analysis that fails on them.
    """
    lanes, size = lanes_of(value), _unfolded_size(value)
    if lanes > 1 and size > UNFOLDED_LIMIT and not dtype_of(value).startswith("bool"):
        array, allocate = local(name, lanes, element_of(dtype_of(value)))
        return load_vector(array, [0], lanes), seq([allocate, store_vector(array, [0], value)])
    if lanes > 1 and (dtype_of(value).startswith("bool") or isinstance(value, tirx.Cast)):
        value = opaque(value)
    variable = tirx.Var(f"{name}_{next(_fresh)}", dtype_of(value))
    _UNFOLDED[variable.name] = size
    return variable, tirx.Bind(variable, value)


#: Sizes of the values behind the names of the kernel in work; no kernel reads another's names.
_UNFOLDED = {}


def _unfolded_size(value):
    """Names in an expression once every one that :func:`bind` made is replaced by its value."""
    total = 0

    def visit(variable, _visitor):
        nonlocal total
        total += _UNFOLDED.get(variable.name, 1)

    structural_visit(value, [(tirx.Var, visit)])
    return max(total, 1)


def for_(name, extent, body, kind=tirx.ForKind.SERIAL):
    """A loop from 0. ``body(variable)`` returns a statement or a (nested) list of statements; a loop of one step is its body."""
    if static(extent) == 1:
        return seq(body(i64(0)))
    variable = tirx.Var(f"{name}_{next(_fresh)}", "int64")
    return tirx.For(variable, i64(0), i64(extent), kind, seq(body(variable)))


def parallel(name, extent, body):
    """A loop whose steps are shared out among the threads of TVM's pool."""
    return for_(name, extent, _aligned(body), tirx.ForKind.PARALLEL)


#: Bytes that every ABI aligns the stack to, of the lines that vectors in it should not cross, and of the widest vector that the kernel
#: which is being made has stored so far.
_STACK_ALIGNMENT, _STACK_LINE, _WIDEST = 16, 64, [0]


def _aligned(body):
    """The body of a loop that is a function of its own, or may be, with its stack aligned where it has wide vectors."""

    def aligned(i):
        statements = body(i)  # first: that shows the vectors
        return [_align_stack() if _WIDEST[0] > _STACK_ALIGNMENT else [], statements]

    return aligned


def _align_stack():
    """A statement that has LLVM align the stack of the function that it ends up in.

    LLVM decides that before it knows what does not fit into registers, so vectors that are spilled lie across two lines of the cache in
    every other process, as chance places its stack: a float convolution took 12 % longer there.
    """
    text = (f"void @bnn_align_stack() alwaysinline nounwind {{\n  %p = alloca [{_STACK_LINE} x i8], align {_STACK_LINE}\n"
            '  call void asm sideeffect "", "r"(ptr %p)\n  ret void\n}')  # fmt: skip
    return tirx.Evaluate(extern("bnn_align_stack", text, "void"))


#: Bytes that a thread moves in the time in which a pool's threads are woken and waited for, with the caches that they then miss.
SERIAL_BYTES = 1 << 19


def parallel_if_large(name, per_image, images, bytes_per_image, body):
    """As :func:`parallel` over ``per_image * images`` steps, but one after the other where they touch little memory altogether.

    Parameters
    ----------
    per_image : int
        Steps for one image.
    images : int64 expression
    bytes_per_image : int
        Memory that the steps of one image read and write.
    body : function
        Called twice; arrays that its statements allocate must be made there.
    """
    shared = parallel(name, images * per_image, body)
    if bytes_per_image >= SERIAL_BYTES:
        return shared
    return when(images * bytes_per_image < SERIAL_BYTES, for_(name, images * per_image, _aligned(body)), shared)


def unrolled(extent, body):
    """The statements ``body(0)``, ``body(1)``, ... as a list; unrolled here, not by the compiler."""
    return [body(i) for i in range(extent)]


def when(condition, then, otherwise=None):
    """If, of statements or lists of them; decided here where ``condition`` is a Python bool."""
    if isinstance(condition, bool):
        return seq(then if condition else otherwise or [])
    return tirx.IfThenElse(condition, seq(then), None if otherwise is None else seq(otherwise))


def function(name, params, body):
    """A kernel: parameters are buffers, which do not overlap. LLVM helpers that the body calls are linked in.

    Parameters
    ----------
    name : str
        Global symbol.
    params : list of Buffer
    body : statement or (nested) list of statements

    Returns
    -------
    tirx.PrimFunc
    """
    body = seq(body)
    _UNFOLDED.clear()
    _WIDEST[0] = 0
    used = set()

    def visit(string, _visitor):
        if string.value in _HELPERS:
            used.add(string.value)

    structural_visit(body, [(tvm.ir.StringImm, visit)])
    if used:
        lines = "\n".join(_HELPERS[key] for key in sorted(used)).split("\n")
        declared = sorted({line for line in lines if line.startswith("declare")})
        text = "\n".join([line for line in lines if not line.startswith("declare")] + declared)
        body = tirx.AttrStmt(tirx.IntImm("int32", 0), "pragma_import_llvm", tvm.ir.StringImm(text), body)
    return tirx.PrimFunc(list(params), body).with_attr("global_symbol", name).with_attr("tirx.noalias", True)
