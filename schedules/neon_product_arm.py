"""The inner loop of binary layers on 32-bit ARM: what :class:`.neon_product.Product` does, in assembly.

NEON has sixteen registers of 128 bits here. Eight count the bits of two rows times four channels, four hold the channels' words, and four
the row's word and what becomes of it. A step is 24 operations, two loads of channels and two of rows; four steps and the loop's two
instructions are 3.56 for 128 binary multiply-accumulates. (``vldmia`` would load all channels at once, 3.5, but takes several times the
cycles in LLVM's model of a Cortex-A57.) LLVM's own loop takes 4.9 and more: addresses are moved one by one, and registers run out. A half
step at the end takes 10 instructions for two rows after one load.
"""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import neon
from bnntvm.schedules import tir as T

#: Channels of a tile, words of a step.
_QUAD, _WORDS = 4, 4
_FIRST_COUNTER = 8
#: Steps of a turn of the loop.
_UNROLL = 4


_DECLARED = (
    "<8 x i8> @llvm.arm.neon.vpadd.v8i8(<8 x i8>, <8 x i8>)",
    "<4 x i16> @llvm.arm.neon.vpadd.v4i16(<4 x i16>, <4 x i16>)",
    "<8 x i16> @llvm.arm.neon.vpaddlu.v8i16.v16i8(<16 x i8>)",
    "<4 x i32> @llvm.arm.neon.vpaddlu.v4i32.v8i16(<8 x i16>)",
)


class ArmProduct:
    """Counts of a tile of one or two rows times four channels; parameters as of :class:`.neon_product.Product`."""

    def __init__(self, rows, depth, row, weight, zeros=None, unipolar=False, half=False):
        if rows > 2 or zeros is not None and rows > 1:
            raise ValueError(f"no tile of {rows} rows")
        self.rows, self.depth, self.row, self.weight, self.zeros, self.unipolar = rows, depth, row, weight, zeros, unipolar
        self.half = half
        self.lanes = _QUAD * rows
        self.totals = T.Registers("totals", 1, "int32", self.lanes)

    def statements(self):
        """Statements that count, to be placed before the use of :meth:`sums`."""
        chunks, rest = divmod(self.depth, neon.BYTE_STEPS)
        if not chunks or self.depth == neon.BYTE_STEPS:
            return [self.totals.allocate, self.totals.set(0, self._count(T.i64(0), self.depth))]

        def add(begin, steps):
            return self.totals.set(0, self.totals.get(0) + self._count(begin, steps))

        body = [self.totals.allocate, self.totals.fill(T.splat(0, "int32", self.lanes))]
        body.append(T.for_("chunk", chunks, lambda c: add(c * neon.BYTE_STEPS, neon.BYTE_STEPS)))
        return [*body, add(T.i64(chunks * neon.BYTE_STEPS), rest) if rest else []]

    def sums(self, r, quad):
        """``int32x4``: counts of row r and the channels of a quad, of which there is one."""
        if quad:
            raise ValueError("a tile has four channels")
        return T.shuffle([self.totals.get(0)], range(_QUAD * r, _QUAD * r + _QUAD))

    def _count(self, begin, steps):
        """The counts of ``steps`` steps, at most 31, from step ``begin`` on: ``int32x4`` of every row."""
        places = [self.weight(0, 0, begin), *(self.row(r, begin) for r in range(self.rows))]
        places += [self.zeros(0, begin)] if self.zeros else []
        addresses = [tirx.address_of(T.load(array, *indices)) for array, indices in places]
        kind = f"{'_half' if self.half else ''}{'_and' if self.unipolar else ''}{'_masked' if self.zeros else ''}"
        name = f"bnn_neon_count_{self.rows}_{steps}{kind}"
        return T.extern(name, _Function(name, self, steps).text(), f"int32x{self.lanes}", *addresses)


class _Function:
    """The LLVM function that counts."""

    def __init__(self, name, product, steps):
        self.name, self.steps, self.rows, self.masked = name, steps - product.half, product.rows, product.zeros is not None
        self.logic, self.half = "vand" if product.unipolar else "veor", product.half
        self.counters = [f"q{_FIRST_COUNTER + i}" for i in range(self.rows * _QUAD)]
        #: Counts of the half step: channels 0 and 1 of a row, 2 and 3.
        self.tails = ["q2", "q3", "q5", "q4"][: 2 * self.rows] if self.half else []
        self.turns, self.rest = divmod(self.steps - 1, _UNROLL)
        # Outputs come first: counts, then the addresses and, where there is a loop, the number of turns, which are inputs as well.
        first = len(self.counters) + len(self.tails)
        self.pointers = [f"${first + i}" for i in range(1 + self.rows + self.masked)]
        self.left = f"${first + len(self.pointers)}"

    def step(self, first):
        """Instructions of a step; ``first``: the counters are set."""
        lines = [f"vld1.32 {{{registers}}}, [{self.pointers[0]}]!" for registers in ("d0-d3", "d4-d7")]
        for r in range(self.rows):
            lines.append(f"vld1.32 {{d8, d9}}, [{self.pointers[1 + r]}]!")
            lines += [f"vld1.32 {{d24, d25}}, [{self.pointers[-1]}]!"] if self.masked else []
            # The last product takes the place of the row's word.
            products = ["q5", "q6", "q7", "q4"]
            lines += [f"{self.logic} {q}, q4, q{c}" for c, q in enumerate(products)]
            lines += [f"vbic {q}, {q}, q12" for q in products] if self.masked else []
            counters = self.counters[r * _QUAD : (r + 1) * _QUAD]
            lines += [f"vcnt.8 {counter if first else q}, {q}" for counter, q in zip(counters, products)]
            lines += [] if first else [f"vadd.i8 {counter}, {counter}, {q}" for counter, q in zip(counters, products)]
        return lines

    def half_step(self):
        """The last 64 bits: two channels fill a register, and the row's word lies there twice."""
        lines = [f"vld1.32 {{d0-d3}}, [{self.pointers[0]}]!"]
        for r in range(self.rows):
            tails = self.tails[2 * r : 2 * r + 2]
            lines.append(f"vld1.32 {{d8, d9}}, [{self.pointers[1 + r]}]!")
            lines += [f"{self.logic} {tail}, q4, q{pair}" for pair, tail in enumerate(tails)]
            lines += [f"vcnt.8 {tail}, {tail}" for tail in tails]
        return lines

    def assembly(self):
        """The first step, the others some at a time in a loop, and those that are left."""
        lines = self.step(True)
        if self.turns > 1:
            lines += [".Lbnn${:uid}:", f"subs {self.left}, {self.left}, #1", *(self.step(False) * _UNROLL), "bne .Lbnn${:uid}"]
        else:
            lines += self.step(False) * (_UNROLL * self.turns)
        return "\\0A".join([*lines, *(self.step(False) * self.rest), *(self.half_step() if self.half else [])])

    def text(self):
        count, counted, addresses = len(self.counters), [*self.counters, *self.tails], len(self.pointers)
        numbers = addresses + (self.turns > 1)
        kinds = ", ".join(["<16 x i8>"] * len(counted) + ["ptr"] * addresses + ["i32"] * (numbers - addresses))
        outputs = [f"={{{q}}}" for q in counted] + ["=&r"] * numbers
        inputs = [str(len(counted) + i) for i in range(numbers)]
        free = [q for q in (*(f"q{i}" for i in range(8)), *(["q12"] if self.masked else [])) if q not in counted]
        constraints = ",".join([*outputs, *inputs, *(f"~{{{name}}}" for name in (*free, "cc", "memory"))])
        params = ", ".join(f"ptr %p{i}" for i in range(addresses))
        given = f"{params}, i32 {self.turns}" if self.turns > 1 else params
        call = f'asm sideeffect "{self.assembly()}", "{constraints}"({given})'
        lines = [f"<{count} x i32> @{self.name}({params}) alwaysinline nounwind {{", f"  %a = call {{ {kinds} }} {call}"]
        lines += [f"  %c{i} = extractvalue {{ {kinds} }} %a, {i}" for i in range(len(counted))]
        sums = [self.quad(lines, r) for r in range(self.rows)]
        if len(sums) == 2:
            lines.append(f"  %r = shufflevector <4 x i32> {sums[0]}, <4 x i32> {sums[1]}, <8 x i32> <{_order(0, 8)}>")
            sums = ["%r"]
        return "\n".join([*lines, f"  ret <{count} x i32> {sums[0]}", "}", *(f"declare {one}" for one in _DECLARED)])

    def quad(self, lines, r):
        """Add the lines that sum up the four counters of a row; the name of the result. Neighbours are added in bytes if those hold it."""
        most, tail = 8 * self.steps, 8 * self.half
        vectors = [f"%c{r * _QUAD + c}" for c in range(_QUAD)]

        def name():
            return f"%s{len(lines)}"

        def halves(vector, size, bits):
            """A vector of 128 bits with the sums of neighbours of two: as many lanes as one had."""
            found = []
            for first in (0, size // 2):
                kind = f"<{size} x i{bits}>"
                lines.append(f"  {name()} = shufflevector {kind} {vector}, {kind} poison, <{size // 2} x i32> <{_order(first, size // 2)}>")
                found.append(f"%s{len(lines) - 1}")
            kind = f"<{size // 2} x i{bits}>"
            lines.append(f"  {name()} = call {kind} @llvm.arm.neon.vpadd.v{size // 2}i{bits}({kind} {found[0]}, {kind} {found[1]})")
            return f"%s{len(lines) - 1}"

        def joined(a, b, size, bits):
            kind = f"<{size} x i{bits}>"
            lines.append(f"  {name()} = shufflevector {kind} {a}, {kind} {b}, <{2 * size} x i32> <{_order(0, 2 * size)}>")
            return f"%s{len(lines) - 1}"

        def widened(vector, size, bits):
            wide = f"<{size // 2} x i{2 * bits}>"
            kind = f"v{size // 2}i{2 * bits}.v{size}i{bits}"
            lines.append(f"  {name()} = call {wide} @llvm.arm.neon.vpaddlu.{kind}(<{size} x i{bits}> {vector})")
            return f"%s{len(lines) - 1}"

        def added(vector, pair):
            if not self.half:
                return vector
            lines.append(f"  {name()} = add <16 x i8> {vector}, %c{len(self.counters) + 2 * r + pair}")
            return f"%s{len(lines) - 1}"

        if 2 * most + tail < 256:
            vectors = [halves(v, 16, 8) for v in vectors]
            vectors = [added(joined(a, b, 8, 8), pair) for pair, (a, b) in enumerate(zip(vectors[::2], vectors[1::2]))]
            if 4 * most + 2 * tail < 256:
                low, high = (halves(v, 16, 8) for v in vectors)
                return widened(widened(joined(low, high, 8, 8), 16, 8), 8, 16)
            vectors = [widened(v, 16, 8) for v in vectors]
        else:
            vectors = [halves(widened(v, 16, 8), 8, 16) for v in vectors]
            vectors = [joined(a, b, 4, 16) for a, b in zip(vectors[::2], vectors[1::2])]
        low, high = (halves(v, 8, 16) for v in vectors)
        return widened(joined(low, high, 4, 16), 8, 16)


def _order(first, count):
    return ", ".join(f"i32 {first + k}" for k in range(count))
