"""How the pixels of an image are cut into tile registers of AMX, and tiles into groups that share weights.

A tile register takes up to 16 pixels that lie at equal distances in scratch memory. Rows of an image that are long enough are cut into
equal tiles, which hold nothing but pixels of the result; short rows are walked as flat pixels (see :mod:`.int8_layout`), those between the
rows included.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from bnntvm.schedules.int8_layout import Layout

TILE = 16  #: rows of a tile register
MOST_TILES = 6  #: tiles of a group: as many registers of sums
_LEAST_ROWS = 4


@dataclass(frozen=True)
class Tiling:
    """The tiles of an image, in order.

    Attributes
    ----------
    layout : Layout
    rows : int
        Pixels of a tile.
    along : int
        Tiles that cover a line of the result, 0 where tiles are cut from flat pixels. A line is a row, or all rows if nothing lies
        between them. The last tile of a line overlaps its neighbour if tiles are not a divisor of the line: both give the same results.
    """

    layout: Layout
    rows: int
    along: int

    @cached_property
    def line(self):
        """Pixels of a line."""
        window = self.layout.window
        return window.out_width * (window.out_height if self.layout.pitch == window.out_width else 1)

    @cached_property
    def lines(self):
        window = self.layout.window
        return window.out_height * window.out_width // self.line

    @property
    def tiles(self):
        return self.lines * self.along if self.along else -(-self.layout.flat // self.rows)

    @property
    def dense(self):
        """Whether tile after tile holds pixel after pixel of the result."""
        return bool(self.along) and self.along * self.rows == self.line

    def groups(self, most):
        """(groups, tiles of a large group, number of large groups): the others have one tile less."""
        groups = -(-self.tiles // most)
        large = -(-self.tiles // groups)
        return groups, large, self.tiles - groups * (large - 1)

    @staticmethod
    def of(layout):
        """The tiling that is estimated to take least time."""
        return min(_candidates(layout), key=lambda t: t.tiles * product_cycles(t.rows) * (1 if t.along else _FLAT))


#: Pixels between rows cost a little more than the products: they are taken out of the results.
_FLAT = 1.15


def _candidates(layout):
    line = Tiling(layout, 1, 1).line
    along = -(-line // TILE)
    found = [Tiling(layout, -(-line // along), along)]
    return found + [Tiling(layout, rows, 0) for rows in range(_LEAST_ROWS, TILE + 1)]


def product_cycles(rows):
    """Cycles of a product of tiles of ``rows`` pixels with its loads, measured in cycles of the usual clock.

    The product of 16 rows takes 16 cycles; where neither factor is mostly 0 the clock is slower by a fifth.
    """
    return 14.8 + 0.3 * rows
