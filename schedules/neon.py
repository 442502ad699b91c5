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


def mask_word(masks, isa):
    """The bits of eight bool vectors of four lanes as one uint32, first lane lowest.

    Vectors are narrowed to bytes of all ones or none, ANDed with the bit of each byte, and neighbours are added three times. LLVM's own way
    takes the lanes out one by one.
    """
    name = f"bnn_neon_mask_word_{isa.machine}"
    text = [f"i32 @{name}({', '.join(f'<4 x i1> %v{i}' for i in range(8))}) alwaysinline nounwind {{"]
    for i in range(4):
        text += [f"  %h{i} = shufflevector <4 x i1> %v{2 * i}, <4 x i1> %v{2 * i + 1}, <8 x i32> <{_order(8)}>"]
    bits = ", ".join(f"i8 {(1 << k) - (256 if k == 7 else 0)}" for k in range(8))
    for i in range(2):
        text += [f"  %q{i} = shufflevector <8 x i1> %h{2 * i}, <8 x i1> %h{2 * i + 1}, <16 x i32> <{_order(16)}>",
                 f"  %s{i} = sext <16 x i1> %q{i} to <16 x i8>", f"  %b{i} = and <16 x i8> %s{i}, <{bits}, {bits}>"]  # fmt: skip
    text += _added_thrice(isa.machine)
    text += ["  %w = bitcast <8 x i8> %sum to <2 x i32>", "  %r = extractelement <2 x i32> %w, i32 0", "  ret i32 %r", "}"]
    if isa.machine == "arm":
        text.append("declare <8 x i8> @llvm.arm.neon.vpadd.v8i8(<8 x i8>, <8 x i8>)")
    return T.extern(name, "\n".join(text), "uint32", *masks)


def _order(count, first=0, step=1):
    return ", ".join(f"i32 {first + step * k}" for k in range(count))


def _added_thrice(machine):
    """Lines that add the neighbours of ``%b0`` and ``%b1`` (16 bytes) three times: the low four bytes of ``%sum`` (eight) are the sums."""
    lines, vectors = [], ["%b0", "%b1"]
    if machine == "arm":  # vpadd takes and gives eight bytes
        for b in vectors:
            for half in (0, 1):
                lines.append(f"  {b}h{half} = shufflevector <16 x i8> {b}, <16 x i8> poison, <8 x i32> <{_order(8, 8 * half)}>")
        call = "call <8 x i8> @llvm.arm.neon.vpadd.v8i8(<8 x i8> {}, <8 x i8> {})"
        pairs = {"%e": ("%b0h0", "%b0h1"), "%o": ("%b1h0", "%b1h1"), "%p": ("%e", "%o"), "%sum": ("%p", "%p")}
        return lines + [f"  {name} = {call.format(*pair)}" for name, pair in pairs.items()]
    for level in range(3):
        a, b = vectors
        lines += [f"  %e{level} = shufflevector <16 x i8> {a}, <16 x i8> {b}, <16 x i32> <{_order(16, 0, 2)}>",
                  f"  %o{level} = shufflevector <16 x i8> {a}, <16 x i8> {b}, <16 x i32> <{_order(16, 1, 2)}>",
                  f"  %p{level} = add <16 x i8> %e{level}, %o{level}"]  # fmt: skip
        vectors = (f"%p{level}", f"%p{level}")
    return [*lines, f"  %sum = shufflevector <16 x i8> %p2, <16 x i8> poison, <8 x i32> <{_order(8)}>"]


def four_sums(counts, most, isa, pairs_more=()):
    """The sums of the lanes of each of four vectors, as ``int32x4``.

    Parameters
    ----------
    counts : list of four expressions
        ``uint8x16`` or ``uint16x8``.
    most : int
        Largest value of a lane: as long as sums fit into lanes, neighbours are added without widening (addp), for two vectors at a time.
    isa : Isa
    pairs_more : list of two expressions, optional
        ``uint8x16``: what to add once neighbours are, eight lanes for the first two vectors' sums each, and for the others'. ``most``
        includes it.
    """
    bits = 128 // T.lanes_of(counts[0])
    pairs = 0
    while pairs < 2 and most * 2 ** (pairs + 1) < 1 << bits:
        pairs += 1
    text = _Text(isa.machine)
    vectors, lanes, left = [f"%v{i}" for i in range(4)], 128 // bits, bits
    while len(vectors) > 1 or left < 32:
        if len(vectors) > 1 and (pairs > 0 or left > 8 and most * 2 < 1 << left):
            vectors = [text.pairwise(a, b, lanes, left) for a, b in zip(vectors[::2], vectors[1::2])]
            if pairs_more and len(vectors) == 2:
                vectors = [text.added(v, f"%v{4 + i}", lanes, left) for i, v in enumerate(vectors)]
            pairs, most = pairs - 1, most * 2
        else:
            vectors = [text.widened(v, lanes, left) for v in vectors]
            lanes, left, most = lanes // 2, left * 2, most * 2
    name = f"bnn_neon_four_sums_{bits}_{len(text.lines)}_{isa.machine}"
    params = ", ".join(f"<{128 // bits} x i{bits}> %v{i}" for i in range(4 + len(pairs_more)))
    body = "\n".join([f"<4 x i32> @{name}({params}) alwaysinline nounwind {{", *text.lines, f"  ret <4 x i32> {vectors[0]}", "}"])
    return T.extern(name, "\n".join([body, *sorted(text.declared)]), "int32x4", *counts, *pairs_more)


class _Text:
    """Lines of an LLVM function that adds neighbours."""

    def __init__(self, machine):
        self.wide = {"aarch64": "llvm.aarch64.neon.uaddlp", "arm": "llvm.arm.neon.vpaddlu"}[machine]
        self.lines, self.declared = [], set()

    def _name(self):
        return f"%t{len(self.lines)}"

    def pairwise(self, a, b, lanes, bits):
        """Sums of neighbours of a, then of b (addp)."""
        kind, halves = f"<{lanes} x i{bits}>", []
        for odd in (0, 1):
            order = ", ".join(f"i32 {2 * k + odd}" for k in range(lanes))
            halves.append(self._name())
            self.lines.append(f"  {halves[-1]} = shufflevector {kind} {a}, {kind} {b}, <{lanes} x i32> <{order}>")
        name = self._name()
        self.lines.append(f"  {name} = add {kind} {halves[0]}, {halves[1]}")
        return name

    def added(self, a, b, lanes, bits):
        """Sums of lanes."""
        name = self._name()
        self.lines.append(f"  {name} = add <{lanes} x i{bits}> {a}, {b}")
        return name

    def widened(self, a, lanes, bits):
        """Sums of neighbours in lanes of twice the width (uaddlp)."""
        source, target = f"v{lanes}i{bits}", f"v{lanes // 2}i{2 * bits}"
        name, kind = self._name(), f"<{lanes // 2} x i{2 * bits}>"
        self.lines.append(f"  {name} = call {kind} @{self.wide}.{target}.{source}(<{lanes} x i{bits}> {a})")
        self.declared.add(f"declare {kind} @{self.wide}.{target}.{source}(<{lanes} x i{bits}>)")
        return name


def widen(total, counts, isa):
    """``total + `` neighbours of ``counts`` added: ``uint16x8`` and ``uint8x16`` (uadalp)."""
    text = _Text(isa.machine)
    text.widened("%v", 16, 8)
    name = f"bnn_neon_widen_{isa.machine}"
    lines = [f"<8 x i16> @{name}(<8 x i16> %t, <16 x i8> %v) alwaysinline nounwind {{", *text.lines,
             "  %r = add <8 x i16> %t, %t0", "  ret <8 x i16> %r", "}", *text.declared]  # fmt: skip
    return T.extern(name, "\n".join(lines), "uint16x8", total, counts)


def load_bytes(array, indices):
    """Four words of a ``uint32`` array as ``uint8x16``."""
    return tirx.reinterpret("uint8x16", T.load_vector(array, indices, 4))


def rolled():
    """A statement without instructions that keeps LLVM from unrolling the loop it is in: the copies would be interleaved, and spill."""
    text = 'i32 @bnn_neon_rolled() alwaysinline nounwind {\n  call void asm sideeffect "", ""() noduplicate\n  ret i32 0\n}'
    return tirx.Evaluate(T.extern("bnn_neon_rolled", text, "int32"))


def flushes(isa):
    """Whether vector arithmetic takes subnormal numbers for zero; see :mod:`.neon_unflushed`."""
    return isa.machine == "arm"


def hidden(number):
    """``int64``: the number, which LLVM does not know: it counts a loop's steps down then, instead of comparing addresses with an end."""
    text = 'i64 @bnn_neon_hidden(i64 %n) alwaysinline nounwind {\n  %r = call i64 asm "", "=r,0"(i64 %n)\n  ret i64 %r\n}'
    return T.extern("bnn_neon_hidden", text, "int64", T.i64(number))


def digits(words, base, coefficients, dtype="int8", valid=None, otherwise=0):
    """As :func:`.tir.digits`: each byte of the words is repeated eight times, and a bit of each tested (cmtst)."""
    lanes = int(T.dtype_of(words[0])[4:])
    octets, order = lanes // 8, ", ".join(f"i32 {lane // 8}" for lane in range(lanes))
    bits = ", ".join(f"i8 {(1 << lane % 8) - (256 if lane % 8 == 7 else 0)}" for lane in range(lanes))
    vector = f"<{lanes} x i8>"

    def step(j, last, coefficient):
        return [f"  %v{j} = bitcast i{lanes} %w{j} to <{octets} x i8>",
                f"  %e{j} = shufflevector <{octets} x i8> %v{j}, <{octets} x i8> poison, <{lanes} x i32> <{order}>",
                f"  %b{j} = and {vector} %e{j}, <{bits}>", f"  %m{j} = icmp ne {vector} %b{j}, zeroinitializer",
                f"  %c{j} = select <{lanes} x i1> %m{j}, {vector} {coefficient}, {vector} zeroinitializer",
                f"  %s{j} = add {vector} {last}, %c{j}"]  # fmt: skip

    return T.digits_by("bnn_neon_digits", step, words, base, coefficients, dtype, valid, otherwise)


def dot_bytes(total, codes, data, isa):
    """``total`` plus, in each of four lanes, the products of four bytes of ``codes`` (0 to 127) with four signed ones of ``data``.

    One instruction (sdot) where the processor has it; else products of 16 bits, two of whose sums have to fit 16 bits.
    """
    if "asimddp" in isa.needs:
        kind = "<4 x i32> @llvm.aarch64.neon.sdot.v4i32.v16i8(<4 x i32>{}, <16 x i8>{}, <16 x i8>{})"
        lines = [f"  %r = call {kind.format(' %t', ' %c', ' %d')}"]
        declared = ["declare " + kind.format("", "", "")]
    else:
        even, odd = (", ".join(f"i32 {2 * k + j}" for k in range(8)) for j in (0, 1))
        name = {"aarch64": "llvm.aarch64.neon.saddlp", "arm": "llvm.arm.neon.vpaddls"}[isa.machine] + ".v4i32.v8i16"
        lines = ["  %a = sext <16 x i8> %c to <16 x i16>", "  %b = sext <16 x i8> %d to <16 x i16>", "  %p = mul <16 x i16> %a, %b",
                 f"  %e = shufflevector <16 x i16> %p, <16 x i16> poison, <8 x i32> <{even}>",
                 f"  %o = shufflevector <16 x i16> %p, <16 x i16> poison, <8 x i32> <{odd}>",
                 "  %s = add <8 x i16> %e, %o", f"  %w = call <4 x i32> @{name}(<8 x i16> %s)", "  %r = add <4 x i32> %t, %w"]  # fmt: skip
        declared = [f"declare <4 x i32> @{name}(<8 x i16>)"]
    function = f"bnn_neon_dot_{isa.machine}_{'dot' if 'asimddp' in isa.needs else 'long'}"
    head = f"<4 x i32> @{function}(<4 x i32> %t, <16 x i8> %c, <16 x i8> %d) alwaysinline nounwind {{"
    return T.extern(function, "\n".join([head, *lines, "  ret <4 x i32> %r", "}", *declared]), T.dtype_of(total), total, codes, data)


def dot_lane(total, bytes_, data, lane):
    """``total`` plus, in each of four lanes, the products of four signed bytes with those of lane ``lane`` of ``data`` (sdot by element).

    All vectors have 16 bytes; ``total`` is ``int32x4``.
    """
    order = ", ".join([f"i32 {lane}"] * 4)
    kind = "<4 x i32> @llvm.aarch64.neon.sdot.v4i32.v16i8(<4 x i32>{}, <16 x i8>{}, <16 x i8>{})"
    name = f"bnn_neon_dot_lane_{lane}"
    text = "\n".join([
        f"<4 x i32> @{name}(<4 x i32> %t, <16 x i8> %w, <16 x i8> %x) alwaysinline nounwind {{",
        "  %i = bitcast <16 x i8> %x to <4 x i32>", f"  %s = shufflevector <4 x i32> %i, <4 x i32> poison, <4 x i32> <{order}>",
        "  %b = bitcast <4 x i32> %s to <16 x i8>", f"  %r = call {kind.format(' %t', ' %w', ' %b')}", "  ret <4 x i32> %r", "}",
        "declare " + kind.format("", "", ""),
    ])  # fmt: skip
    return T.extern(name, text, "int32x4", total, bytes_, data)


def multiply_matrix(total, rows, columns):
    """``total``, 2 x 2 in an ``int32x4``, plus the products of two rows of eight signed bytes with two columns of them (smmla)."""
    kind = "<4 x i32> @llvm.aarch64.neon.smmla.v4i32.v16i8(<4 x i32>{}, <16 x i8>{}, <16 x i8>{})"
    text = (f"<4 x i32> @bnn_neon_matrix(<4 x i32> %t, <16 x i8> %a, <16 x i8> %b) alwaysinline nounwind {{\n"
            f"  %r = call {kind.format(' %t', ' %a', ' %b')}\n  ret <4 x i32> %r\n}}\ndeclare {kind.format('', '', '')}")  # fmt: skip
    return T.extern("bnn_neon_matrix", text, "int32x4", total, rows, columns)


def multiply_long(total, bytes_, data, half):
    """The products, ``int16x8``, of the low (``half`` 0) or high eight signed bytes of two vectors, plus ``total`` (smull, smlal)."""
    order = ", ".join(f"i32 {8 * half + k}" for k in range(8))
    name = f"bnn_neon_long_{half}" + ("" if total is None else "_add")
    lines = [f"<8 x i16> @{name}({'' if total is None else '<8 x i16> %t, '}<16 x i8> %a, <16 x i8> %b) alwaysinline nounwind {{"]
    for operand in "ab":
        lines += [f"  %h{operand} = shufflevector <16 x i8> %{operand}, <16 x i8> poison, <8 x i32> <{order}>",
                  f"  %w{operand} = sext <8 x i8> %h{operand} to <8 x i16>"]  # fmt: skip
    lines.append("  %p = mul <8 x i16> %wa, %wb")
    lines += ["  ret <8 x i16> %p", "}"] if total is None else ["  %r = add <8 x i16> %p, %t", "  ret <8 x i16> %r", "}"]
    return T.extern(name, "\n".join(lines), "int16x8", *([] if total is None else [total]), bytes_, data)


def add_pairs(total, shorts, isa):
    """``total`` (``int32x4``) plus the neighbours of ``shorts`` (``int16x8``) added (sadalp)."""
    if isa.machine == "arm":  # LLVM does not make one instruction of two here
        return tirx.call_llvm_pure_intrin("int32x4", "llvm.arm.neon.vpadals.v4i32.v8i16", total, shorts)
    kind = "llvm.aarch64.neon.saddlp.v4i32.v8i16"
    text = (f"<4 x i32> @bnn_neon_add_pairs(<4 x i32> %t, <8 x i16> %s) alwaysinline nounwind {{\n"
            f"  %p = call <4 x i32> @{kind}(<8 x i16> %s)\n  %r = add <4 x i32> %t, %p\n  ret <4 x i32> %r\n}}\n"
            f"declare <4 x i32> @{kind}(<8 x i16>)")  # fmt: skip
    return T.extern("bnn_neon_add_pairs", text, "int32x4", total, shorts)


def pairs_of(low, high):
    """Sums of neighbours of ``low``, then of ``high``, all ``int32x4`` (addp)."""
    even, odd = (", ".join(f"i32 {2 * k + j}" for k in range(4)) for j in (0, 1))
    text = (f"<4 x i32> @bnn_neon_pairs_of(<4 x i32> %a, <4 x i32> %b) alwaysinline nounwind {{\n"
            f"  %e = shufflevector <4 x i32> %a, <4 x i32> %b, <4 x i32> <{even}>\n"
            f"  %o = shufflevector <4 x i32> %a, <4 x i32> %b, <4 x i32> <{odd}>\n"
            "  %r = add <4 x i32> %e, %o\n  ret <4 x i32> %r\n}")  # fmt: skip
    return T.extern("bnn_neon_pairs_of", text, "int32x4", low, high)


def look_up(table, indices, isa):
    """The bytes of ``table`` (``uint8x16``) at 32 indices from 0 to 15 (``uint8x32``), with tbl."""
    if isa.machine == "aarch64":
        kind = "<16 x i8> @llvm.aarch64.neon.tbl1.v16i8(<16 x i8>{}, <16 x i8>{})"
        parts, calls = 2, [kind.format(" %t", f" %i{k}") for k in range(2)]
    else:  # the table is two registers of eight bytes there
        kind = "<8 x i8> @llvm.arm.neon.vtbl2(<8 x i8>{}, <8 x i8>{}, <8 x i8>{})"
        parts, calls = 4, [kind.format(" %low", " %high", f" %i{k}") for k in range(4)]
    size = 32 // parts
    lines = [f"<32 x i8> @bnn_neon_look_up_{isa.machine}(<16 x i8> %t, <32 x i8> %i) alwaysinline nounwind {{"]

    def part(name, source, width, first, count):
        order = ", ".join(f"i32 {first + k}" for k in range(count))
        lines.append(f"  {name} = shufflevector <{width} x i8> {source}, <{width} x i8> poison, <{count} x i32> <{order}>")

    if parts == 4:
        part("%low", "%t", 16, 0, 8)
        part("%high", "%t", 16, 8, 8)
    for k, call in enumerate(calls):
        part(f"%i{k}", "%i", 32, k * size, size)
        lines.append(f"  %r{k} = call {call}")
    names = [f"%r{k}" for k in range(parts)]
    while len(names) > 1:
        joined = []
        for a, b in zip(names[::2], names[1::2]):
            order = ", ".join(f"i32 {k}" for k in range(2 * size))
            lines.append(f"  {a}j = shufflevector <{size} x i8> {a}, <{size} x i8> {b}, <{2 * size} x i32> <{order}>")
            joined.append(f"{a}j")
        names, size = joined, 2 * size
    lines += [f"  ret <32 x i8> {names[0]}", "}", "declare " + kind.format("", "", "")]
    return T.extern(f"bnn_neon_look_up_{isa.machine}", "\n".join(lines), "uint8x32", table, indices)
