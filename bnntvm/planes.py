"""Decompositions of few-level tensors into bit planes: ``x = scale * sum_p coefficient[p] * plane[p]``.

Activations become one bipolar plane (with a mask of zeros where zero is a level too), two's complement or unsigned planes of an evenly
spaced grid that contains zero (DoReFa-Net, QNN, PACT, LSQ), bipolar planes where they are sums of scaled signs (ABC-Net), or one plane per
level. No decomposition has a constant term, so zero padding contributes zero. Weights become bipolar planes: one for {-c, c}, two for
{-c, 0, c} (c/2 times the sum of two signs), k for an evenly spaced grid of 2**k levels, otherwise one per free scale (TTQ, ABC-Net); the
constant term of the last two multiplies the sum of the activations under the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Grids are recognised up to this relative error: k/3 in float32 is no exact multiple of 1/3.
GRID_ERROR = 2.0**-21
MOST_LEVELS = 16
#: Most levels of an activation that are not on a grid, one plane each.
MOST_SEPARATE = 4
#: Most planes of weights that are not on a grid.
MOST_BASES = 3


@dataclass(frozen=True)
class ActivationPlane:
    """``coefficient * plane``; bit 1 where the value is one of ``ones``. Bipolar unless ``unipolar``; ``zeros``: 0 is a level too."""

    coefficient: float
    ones: tuple
    unipolar: bool = True
    zeros: bool = False


@dataclass(frozen=True)
class ActivationPlanes:
    """``x = scale * sum(coefficient * plane)``."""

    scale: float
    planes: tuple

    @property
    def count(self):
        """Planes that a kernel reads for every weight plane."""
        return sum(2 if p.zeros else 1 for p in self.planes)


@dataclass(frozen=True, eq=False)
class WeightPlanes:
    """``w[o] = scale[o] * sum(coefficient * sign) + offset[o]`` with sign = -1 where the plane is True.

    ``planes``: list of (coefficient: int or float32 [O], bool [O, ...]); ``offset``: float32 [O], or None for zero.
    """

    scale: np.ndarray
    planes: list
    offset: object = None


def activation_planes(levels, assume_nonzero=False):
    """Planes of a tensor that holds the sorted ``levels``, or the reason why it is not taken apart."""
    levels = [float(v) for v in levels]
    if assume_nonzero and len(levels) == 3 and levels[1] == 0:
        levels = [levels[0], levels[2]]
    top, ordered = max(abs(v) for v in levels), sorted(levels)
    if top == 0:
        return "the activation is always zero"
    if ordered in ([-top, top], [top], [-top]):
        return ActivationPlanes(top, (ActivationPlane(1, (-top,), unipolar=False),))
    if ordered == [-top, 0.0, top]:
        return ActivationPlanes(top, (ActivationPlane(1, (-top,), unipolar=False, zeros=True),))
    if len(levels) > MOST_LEVELS:
        return f"the activation holds {len(levels)} levels"
    nonzero = [v for v in levels if v]
    ways = [_digits(nonzero), _signs(ordered), ActivationPlanes(1.0, tuple(ActivationPlane(v, (v,)) for v in nonzero))]
    ways = [way for way in (ways if len(nonzero) <= MOST_SEPARATE else ways[:2]) if way is not None]
    return min(ways, key=lambda way: way.count) if ways else f"the activation holds {len(levels)} levels that are not evenly spaced"


def _digits(nonzero):
    """Unipolar planes of levels on a grid that contains zero, or None."""
    grid = _grid(np.array(nonzero))
    if grid is None:
        return None
    step, numbers = grid
    signed = min(numbers) < 0
    bits = max(max(numbers).bit_length() if max(numbers) > 0 else 0, (-min(numbers) - 1).bit_length() if signed else 0) + signed
    if 2**bits > 2 * MOST_LEVELS or bits > max(len(nonzero), 1):
        return None
    return ActivationPlanes(step, _binary_digits(nonzero, numbers, bits, signed))


def _signs(levels):
    """Bipolar planes of sums of scaled signs (ABC-Net, Lin et al. 2017, eq. 8; also {-3, -1, 1, 3}), or None. Their mean is zero."""
    found = _generators(np.array(levels, np.float64))
    if found is None or abs(levels[0] + sum(found[0]) / 2) > GRID_ERROR * abs(levels[0]):
        return None
    rises, codes = found
    planes = [tuple(level for level, code in zip(levels, codes) if not (int(code) >> j) & 1) for j in range(len(rises))]
    ratios = np.rint(np.array(rises) / min(rises))
    even = np.all(np.abs(ratios * min(rises) - rises) <= GRID_ERROR * max(rises)) and max(ratios) < 2 * MOST_LEVELS
    scale = float(np.float32(max(rises) / max(ratios) / 2)) if even else 1.0
    coefficients = [int(q) for q in ratios] if even else [rise / 2 for rise in rises]
    return ActivationPlanes(scale, tuple(ActivationPlane(c, ones, unipolar=False) for c, ones in zip(coefficients, planes)))


def _binary_digits(levels, numbers, bits, signed):
    """Unipolar planes of integers; the highest digit of signed ones counts negative (two's complement)."""
    planes = []
    for j in range(bits):
        ones = tuple(v for v, n in zip(levels, numbers) if (int(n) >> j) & 1)
        if ones:
            planes.append(ActivationPlane(-(2**j) if signed and j == bits - 1 else 2**j, ones))
    return tuple(planes)


def _grid(values):
    """(step, integers) with values = step * integers as closely as float32 has it, or None."""
    values = np.asarray(values, np.float64)
    gaps = np.diff(np.unique(np.concatenate([values, [0.0]])))
    base, largest = float(gaps.min()), np.argmax(np.abs(values))
    for divisor in (1, 2, 3):  # levels 2 and 3 of a grid have no gap of two steps, but 0, 2, 5 have
        numbers = np.rint(values / base * divisor)
        # A gap between two large levels has the rounding errors of both: the largest level tells the step more closely.
        step = values[largest] / numbers[largest]
        if np.all(np.abs(numbers * step - values) <= GRID_ERROR * np.abs(values)) and np.max(np.abs(numbers)) < 2 * MOST_LEVELS:
            return float(np.float32(step)), [int(n) for n in numbers]
    return None


def weight_planes(weight, tolerance=0.0):
    """Planes of constant weights, or the reason why they are not taken apart.

    Parameters
    ----------
    weight : np.ndarray
        float32 [O, ...].
    tolerance : float
        Relative spread of magnitudes within one output channel that is still taken for one magnitude (their mean).
    """
    flat = np.abs(weight.reshape(weight.shape[0], -1))
    low, high = flat.min(1), flat.max(1)
    if np.array_equal(low, high):
        return WeightPlanes(high, [(1, np.signbit(weight) & (weight != 0))])
    spread = float(np.max((high - low) / np.where(high > 0, high, 1)))
    if spread <= tolerance:
        return WeightPlanes(flat.mean(1, dtype=np.float64).astype(np.float32), [(1, weight < 0)])
    if np.all((flat == high[:, None]) | (flat == 0)):
        return WeightPlanes(high / np.float32(2), [(1, weight < 0), (1, weight <= 0)])
    if spread < 1e-4:
        return f"the weights are binary but for a relative deviation of {spread:.1e}; weight_tolerance={2 * spread:.0e} would take them"
    most = max(len(np.unique(row)) for row in flat * np.sign(weight.reshape(flat.shape)))
    if most > MOST_LEVELS:
        return "the weights are real-valued"
    grid, bases = _weight_grid(weight), _weight_bases(weight)
    if grid is not None and (bases is None or len(grid.planes) <= len(bases.planes)):
        return grid
    return bases or f"the weights hold {most} levels that are not evenly spaced"


def _weight_grid(weight):
    """k bipolar planes and an offset: w = low + step * n = low + step * (2**k - 1) / 2 - step/2 * sum(2**j * sign_j)."""
    rows = weight.reshape(weight.shape[0], -1).astype(np.float64)
    low, numbers, steps = rows.min(1), np.zeros(rows.shape, np.int64), np.ones(len(rows))
    for o, row in enumerate(rows):
        rises = row - low[o]
        gaps = np.diff(np.unique(row))
        if len(gaps) == 0:
            continue
        for parts in range(1, MOST_LEVELS):  # a channel with few weights may lack neighbouring levels: 0, 3, 8
            steps[o] = rises.max() / max(np.rint(rises.max() / gaps.min() * parts), 1)
            numbers[o] = np.rint(rises / steps[o])
            if numbers[o].max() >= 2 * MOST_LEVELS:
                return None
            if np.all(np.abs(numbers[o] * steps[o] - rises) <= GRID_ERROR * np.abs(row).max()):
                break
        else:
            return None
    bits = int(numbers.max()).bit_length()
    planes = [(-(2**j), ((numbers >> j) & 1).astype(bool).reshape(weight.shape)) for j in range(bits)]
    offset = low + steps * (2**bits - 1) / 2
    offset = np.where(np.abs(offset) <= GRID_ERROR * np.abs(rows).max(1), 0, offset)
    return WeightPlanes((steps / 2).astype(np.float32), planes, offset.astype(np.float32) if offset.any() else None)


def _weight_bases(weight):
    """Planes with a free scale each, by output channel: w = l0 + sum(rise_j where plane j) = l0 + sum(rise_j * (1 - sign_j) / 2).

    The levels of a channel are sums of few rises above its lowest one: two for TTQ's three levels, m for ABC-Net's m bases, whose folded
    weights hold 2**m levels.
    """
    rows = weight.reshape(weight.shape[0], -1)
    rises, members = [], []
    for row in rows:
        levels, where = np.unique(row, return_inverse=True)
        found = _generators(levels.astype(np.float64))
        if found is None:
            return None
        rises.append(found[0])
        members.append(found[1][where.reshape(-1)])
    count = max(len(one) for one in rises)
    table = np.array([one + [0.0] * (count - len(one)) for one in rises])
    codes = np.stack(members)
    planes = [((-table[:, j] / 2).astype(np.float32), ((codes >> j) & 1).astype(bool).reshape(weight.shape)) for j in range(count)]
    offset = rows.min(1).astype(np.float64) + table.sum(1) / 2
    offset = np.where(np.abs(offset) <= GRID_ERROR * np.abs(rows).max(1), 0, offset)
    return WeightPlanes(np.ones(len(rows), np.float32), planes, offset.astype(np.float32) if offset.any() else None)


def _generators(levels):
    """(numbers, codes): every level is the lowest plus the sum of the numbers whose bit is set in its code; None if that takes too many."""
    error, sums, numbers, codes = GRID_ERROR * np.abs(levels).max(), {0: 0.0}, [], []
    for rise in levels - levels[0]:
        code = next((c for c, total in sums.items() if abs(total - rise) <= error), None)
        if code is None:
            if len(numbers) == MOST_BASES:
                return None
            code = 1 << len(numbers)
            numbers.append(float(rise))
            sums |= {c | code: total + rise for c, total in sums.items()}
        codes.append(code)
    if len(numbers) == len(levels) - 1:  # nothing is shared: steps from level to level, so that symmetric levels have no constant term
        return np.diff(levels).tolist(), (1 << np.arange(len(levels))) - 1
    return numbers, np.array(codes, np.int64)
