"""What NEON does better than LLVM would by itself.

Facts: Arm Architecture Reference Manual, chapter C7: ``cnt`` counts the bits of each byte, ``uaddlp`` and ``uadalp`` add neighbours into
lanes of twice the width, ``addp`` adds the neighbours of two vectors. All of these have 32-bit counterparts under other names.
"""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import tir as T

#: Steps of at most 8 set bits per byte that a byte can count.
BYTE_STEPS = 31


def is_neon(isa):
    """Whether code is made for NEON."""
    return isa.popcount == "neon"


def mask_word(masks):
    """The bits of eight bool vectors of four lanes as one uint32, first lane lowest.

    Vectors are narrowed to bytes of all ones or none, ANDed with the bit of each byte, and neighbours are added three times. LLVM's own way
    takes the lanes out one by one.
    """
    order = ", ".join(f"i32 {k}" for k in range(8))
    wide = ", ".join(f"i32 {k}" for k in range(16))
    text = [f"i32 @bnn_neon_mask_word({', '.join(f'<4 x i1> %v{i}' for i in range(8))}) alwaysinline nounwind {{"]
    for i in range(4):
        text += [f"  %h{i} = shufflevector <4 x i1> %v{2 * i}, <4 x i1> %v{2 * i + 1}, <8 x i32> <{order}>"]
    bits = ", ".join(f"i8 {(1 << k) - (256 if k == 7 else 0)}" for k in range(8))
    for i in range(2):
        text += [f"  %q{i} = shufflevector <8 x i1> %h{2 * i}, <8 x i1> %h{2 * i + 1}, <16 x i32> <{wide}>",
                 f"  %s{i} = sext <16 x i1> %q{i} to <16 x i8>",
                 f"  %b{i} = and <16 x i8> %s{i}, <{bits}, {bits}>"]  # fmt: skip
    vectors = ("%b0", "%b1")
    for level in range(3):
        even = ", ".join(f"i32 {2 * k}" for k in range(16))
        odd = ", ".join(f"i32 {2 * k + 1}" for k in range(16))
        a, b = vectors
        text += [f"  %e{level} = shufflevector <16 x i8> {a}, <16 x i8> {b}, <16 x i32> <{even}>",
                 f"  %o{level} = shufflevector <16 x i8> {a}, <16 x i8> {b}, <16 x i32> <{odd}>",
                 f"  %p{level} = add <16 x i8> %e{level}, %o{level}"]  # fmt: skip
        vectors = (f"%p{level}", f"%p{level}")
    text += ["  %w = bitcast <16 x i8> %p2 to <4 x i32>", "  %r = extractelement <4 x i32> %w, i32 0", "  ret i32 %r", "}"]
    return T.extern("bnn_neon_mask_word", "\n".join(text), "uint32", *masks)


def four_sums(counts):
    """``int32x4``: the sums of the bytes of four ``uint8x16`` vectors."""
    return T.extern("bnn_neon_four_sums_8", _four_sums(16, 8), "int32x4", *counts)


def four_wide_sums(counts):
    """``int32x4``: the sums of the lanes of four ``uint16x8`` vectors."""
    return T.extern("bnn_neon_four_sums_16", _four_sums(8, 16), "int32x4", *counts)


def _four_sums(lanes, bits):
    """LLVM text: neighbours are added into wider lanes, then the vectors' neighbours into one vector, until four sums are left."""
    text = [f"<4 x i32> @bnn_neon_four_sums_{bits}({', '.join(f'<{lanes} x i{bits}> %v{i}' for i in range(4))}) alwaysinline nounwind {{"]
    kind = f"<{lanes // 2} x i{2 * bits}>"
    even, odd = (", ".join(f"i32 {2 * k + j}" for k in range(lanes // 2)) for j in (0, 1))
    vectors = []
    for i in range(4):
        for tag, order in (("e", even), ("o", odd)):
            half = f"%{tag}{i}"
            text += [f"  {half}n = shufflevector <{lanes} x i{bits}> %v{i}, <{lanes} x i{bits}> poison, <{lanes // 2} x i32> <{order}>",
                     f"  {half} = zext <{lanes // 2} x i{bits}> {half}n to {kind}"]  # fmt: skip
        text.append(f"  %l{i} = add {kind} %e{i}, %o{i}")
        vectors.append(f"%l{i}")
    lanes, bits = lanes // 2, 2 * bits

    def pairwise(a, b, name):
        even, odd = (", ".join(f"i32 {2 * k + j}" for k in range(lanes)) for j in (0, 1))
        kind = f"<{lanes} x i{bits}>"
        text.extend([f"  {name}e = shufflevector {kind} {a}, {kind} {b}, <{lanes} x i32> <{even}>",
                     f"  {name}o = shufflevector {kind} {a}, {kind} {b}, <{lanes} x i32> <{odd}>",
                     f"  {name} = add {kind} {name}e, {name}o"])  # fmt: skip
        return name

    joined = pairwise(pairwise(*vectors[:2], "%a"), pairwise(*vectors[2:], "%b"), "%c")
    if bits == 16:
        even, odd = (", ".join(f"i32 {2 * k + j}" for k in range(4)) for j in (0, 1))
        for tag, order in (("x", even), ("y", odd)):
            text += [f"  %{tag}n = shufflevector <8 x i16> {joined}, <8 x i16> poison, <4 x i32> <{order}>",
                     f"  %{tag} = zext <4 x i16> %{tag}n to <4 x i32>"]  # fmt: skip
        text.append("  %r = add <4 x i32> %x, %y")
        joined = "%r"
    text += [f"  ret <4 x i32> {joined}", "}"]
    return "\n".join(text)


def widen(total, counts):
    """``total + `` neighbours of ``counts`` added: ``uint16x8`` and ``uint8x16`` (uadalp)."""
    even, odd = (", ".join(f"i32 {2 * k + j}" for k in range(8)) for j in (0, 1))
    text = ["<8 x i16> @bnn_neon_widen(<8 x i16> %t, <16 x i8> %v) alwaysinline nounwind {"]
    for tag, order in (("x", even), ("y", odd)):
        text += [f"  %{tag}n = shufflevector <16 x i8> %v, <16 x i8> poison, <8 x i32> <{order}>",
                 f"  %{tag} = zext <8 x i8> %{tag}n to <8 x i16>"]  # fmt: skip
    text += ["  %s = add <8 x i16> %x, %y", "  %r = add <8 x i16> %t, %s", "  ret <8 x i16> %r", "}"]
    return T.extern("bnn_neon_widen", "\n".join(text), "uint16x8", total, counts)


def load_bytes(array, indices):
    """Four words of a ``uint32`` array as ``uint8x16``."""
    return tirx.reinterpret("uint8x16", T.load_vector(array, indices, 4))


def rolled():
    """A statement without instructions that keeps LLVM from unrolling the loop it is in: the copies would be interleaved, and spill."""
    text = 'i32 @bnn_neon_rolled() alwaysinline nounwind {\n  call void asm sideeffect "", ""() noduplicate\n  ret i32 0\n}'
    return tirx.Evaluate(T.extern("bnn_neon_rolled", text, "int32"))


def flushes(isa):
    """Whether vector arithmetic takes subnormal numbers for zero: thresholds are such numbers at times (x < 1e-45 says x <= 0)."""
    return isa.machine == "arm"


def compare(node, a, b, bind):
    """A comparison of ``float32`` vectors that tells subnormal numbers apart, by integers.

    Sign and magnitude become an integer of the same order, the same for both zeros. NaN is unlike everything, itself included.
    """
    lanes = T.lanes_of(a)
    magnitude, largest = (T.splat(value, "int32", lanes) for value in (0x7FFFFFFF, 0x7F800000))

    def key(value):
        bits = bind("bits", T.reinterpret("int32", value))
        size, sign = bind("size", bits & magnitude), bind("sign", bits >> T.splat(31, "int32", lanes))
        return size, (size ^ sign) - sign

    (size_a, key_a), (size_b, key_b) = key(a), key(b)
    result, nan = node(key_a, key_b), bind("nan", tirx.GT(tirx.Max(size_a, size_b), largest))
    return tirx.Or(result, nan) if node is tirx.NE else tirx.And(result, tirx.Not(nan))


def hidden(number):
    """``int64``: the number, which LLVM does not know: it counts steps of a loop down then, instead of comparing an address with its end."""
    text = 'i64 @bnn_neon_hidden(i64 %n) alwaysinline nounwind {\n  %r = call i64 asm "", "=r,0"(i64 %n)\n  ret i64 %r\n}'
    return T._extern("bnn_neon_hidden", text, "int64", T.i64(number))
