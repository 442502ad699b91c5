"""Sums of products of floats on NEON: multiplication by one lane of another register.

Four steps of a reduction whose data lie side by side take one load for each row of a tile, where broadcasts take four and, on most
processors, a unit that could multiply. (Arm Architecture Reference Manual, C7: ``fmla`` by element. 32-bit NEON has no such fused one.)
"""

from __future__ import annotations

from bnntvm.schedules import neon, tir, windows

#: Steps that a register of data holds.
STEPS = 4


def by_element(isa):
    """Whether a processor multiplies by a lane."""
    return neon.is_neon(isa) and isa.machine == "aarch64"


def tile(channels, epilogue):
    """``(rows, vectors)`` of a register tile: sums, a register of data for each row, and a vector or two of weights."""
    if windows.has_bits(epilogue):
        return 2, 8
    padded = -(-channels // 4)
    return {1: (12, 1), 2: (8, 2), 3: (6, 3)}.get(padded) or ((5, 4) if padded % 4 == 0 else (8, 2) if padded % 2 == 0 else (6, 3))


def planar_tile(spec):
    """``(pixels, vectors)`` of a tile that keeps the weights of a kernel row in registers, for data in channel order; None where none fits.

    Columns, which lie side by side there, are lanes.
    """
    taps = spec.window.kernel[1]
    if not spec.planar or spec.groups > 1 or windows.has_bits(spec.epilogue) or spec.window.strides[1] >= taps:
        return None
    fitting = [(min(8, 30 // v - taps), v) for v in (4, 2, 1) if -(-spec.out_channels // 4) % v == 0]
    return next((tile for tile in fitting if tile[0] >= 4), None)


def reduction(sums, rows, vectors, data, weight, length, step):
    """Statements of a reduction of ``length`` steps: ``sums[p, v] += data(p, k) * weight(k, v)``.

    Parameters
    ----------
    sums : tir.Registers
    rows : range
        The p that take part.
    vectors : int
    data : function
        ``data(p, k)``: array and indices of the value of step k; those of the next steps follow it.
    weight : function
        ``weight(k, v)``: a vector.
    length : int
    step : function
        ``step(k)``: the statements of a single step.
    """
    whole, rest = divmod(length, STEPS)

    def four(k):
        body, loaded = [neon.rolled()], []
        for p in rows:
            array, indices = data(p, k)
            x, bind = tir.bind("x", tir.load_vector(array, indices, STEPS))
            loaded.append((p, x))
            body.append(bind)
        for lane in range(STEPS):
            for v in range(vectors):
                w, bind = tir.bind("w", weight(k + lane, v))
                body.append(bind)
                for p, x in loaded:
                    index = p * vectors + v
                    body.append(sums.set(index, sums.get(index) + tir.shuffle([x], [lane] * STEPS) * w))
        return body

    loop = tir.for_("k", neon.hidden(whole), lambda k: four(k * STEPS)) if whole else []
    return [loop, [step(tir.i64(k)) for k in range(whole * STEPS, length)] if rest else []]
