"""Layers of bits, dense or convolution, one plane or several, as one kind of sum.

A value is an affine function of bits: bipolar ``1 - 2 a``, with zeros ``1 - 2 a - m`` (the sign a is 0 where the mask m is 1), unipolar
``a``; a ternary weight is ``m - 2 s``. So is a sum of planes with coefficients. The product of ``d0 + sum(d[i] * a[i])`` and ``w0 +
sum(w[j] * b[j])``, summed over the taps and channels of a pixel, is

    sum(d[i] * w[j] * popc(a[i] & b[j])) + sum(w0 * d[i] * popc(a[i])) + d0 * (w0 * bits + sum(w[j] * popc(b[j])))

where ``bits`` and the last popcounts go over the taps inside the image: a constant of the output channel and of the *class* of the pixel
(which taps it has). Outside the image the words of the data are 0, which adds nothing to the first two terms. With xor instead of and, by
``2 popc(a & b) = popc(a) + popc(b) - popc(a ^ b)``, factors are halved and change their sign, and with bipolar weights the second term
vanishes; ``popc(b)`` then goes over all taps, because a word that is 0 is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bnntvm import spec as specs
from bnntvm.spec import WORD_BITS, Window, words


@dataclass(frozen=True)
class Product:
    """``(d0 + sum(d[i] * a[i])) * (w0 + sum(w[j] * b[j]))``; ``data`` and ``weights`` are pairs (plane of words, coefficient)."""

    data: tuple[tuple[int, int], ...]
    data_constant: int
    weights: tuple[tuple[int, int], ...]
    weight_constant: int

    @property
    def pairs(self):
        """``(data plane, weight plane, factor)`` of every popcount."""
        return [(i, j, d * w) for i, d in self.data for j, w in self.weights]

    def row_factors(self, xor=False):
        """Pairs of a data plane and what its own popcount counts beside the pairs of planes."""
        return _alone(self.data, self.weight_constant, self.weights, xor)

    def column_factors(self, xor=False):
        """The same of the weight planes."""
        return _alone(self.weights, self.data_constant, self.data, xor)

    @property
    def even(self):
        """Whether differing bits can be counted: half of every factor is a whole number."""
        return all(factor % 2 == 0 for _, _, factor in self.pairs)


def _alone(planes, other_constant, others, xor):
    """``2 popc(a & b) = popc(a) + popc(b) - popc(a ^ b)``: with xor half of each pair's factor goes to the planes themselves."""
    halves = sum(c for _, c in others) if xor else 0
    found = [(i, c * (2 * other_constant + halves) // 2) for i, c in planes]
    return [(i, factor) for i, factor in found if factor]


@dataclass(frozen=True)
class Layer:
    """What the specifications of layers have in common.

    Attributes
    ----------
    window : Window
        Of a dense layer: one pixel, one tap.
    bits, outputs : int
        Input and output channels of a group.
    data_planes : int
        Operands in front of the weights.
    zeros : bool
        Whether a mask follows the weights; it is data plane ``data_planes``.
    weight_planes : int
        Planes of words of the weights.
    products : tuple of Product
        One; for ``scaled`` one for each pair of planes.
    """

    spec: object
    window: Window
    bits: int
    outputs: int
    groups: int
    dense_groups: bool
    data_planes: int
    zeros: bool
    weight_planes: int
    products: tuple[Product, ...]
    scaled: bool
    all_taps: bool

    @staticmethod
    def of(spec):
        if isinstance(spec, specs.BinaryMatmul):
            return _of_matmul(spec)
        if isinstance(spec, (specs.BinaryConv2d, specs.PlanesConv2d)):
            shape = (spec.window, spec.in_channels // spec.groups, spec.out_channels // spec.groups, spec.groups, spec.dense_groups)
        else:
            shape = (Window(1, 1, (1, 1)), spec.in_features, spec.out_features, 1, False)
        if isinstance(spec, (specs.PlanesConv2d, specs.PlanesDense)):
            planes = spec.planes
            products = _products(planes, spec.zeros)
            counts = len(planes.data), spec.zeros, len(planes.weights) * planes.words_per_weight
            return Layer(spec, *shape, *counts, products, planes.scaled, False)
        data = ((0, 1),) if spec.unipolar else ((0, -2), (1, -1)) if spec.zeros else ((0, -2),)
        product = Product(data, 0 if spec.unipolar else 1, ((0, -2),), 1)
        return Layer(spec, *shape, 1, spec.zeros, 1, (product,), False, getattr(spec, "plus_one", False))

    @property
    def is_dense(self):
        """Whether operands are rows, not images."""
        return isinstance(self.spec, (specs.BinaryDense, specs.PlanesDense, specs.BinaryMatmul))

    @property
    def at_run_time(self):
        """Whether the weights are an activation too: what they count is not known before."""
        return isinstance(self.spec, specs.BinaryMatmul)

    @property
    def channels(self):
        """Output channels of all groups."""
        return self.outputs * self.groups

    @property
    def group_words(self):
        """Words of a group in one pixel."""
        return words(self.bits)

    @property
    def pixel_words(self):
        """Words of a pixel."""
        return words(self.bits * self.groups) if self.dense_groups else self.groups * self.group_words

    @property
    def taps(self):
        """Taps of the kernel."""
        return self.window.kernel[0] * self.window.kernel[1]

    @property
    def out_pixels(self):
        """Pixels of a result."""
        return self.window.out_height * self.window.out_width

    @property
    def operands(self):
        """Names of the operands, in order."""
        data = [f"x{i}" for i in range(self.data_planes)]
        return [*data, "w", *(["z"] if self.zeros else []), *(["scales"] if self.scaled else [])]

    @property
    def by_xor(self):
        """Whether every product can be counted by xor, with nothing left to count of the data alone, unless the weights are counted too."""
        return all(product.even and (self.at_run_time or not product.row_factors(True)) for product in self.products)

    # Classes of pixels

    def classes(self, axis):
        """``(classes, class of each position)``: the intervals of taps inside the image along an axis."""
        size = (self.window.out_height, self.window.out_width)[axis]
        kernel = self.window.kernel[axis]
        intervals = [(0, kernel) if self.all_taps else self._taps(axis, i) for i in range(size)]
        found = list(dict.fromkeys(intervals))
        return found, [found.index(interval) for interval in intervals]

    def _taps(self, axis, position):
        window = self.window
        size, kernel = (window.in_height, window.in_width)[axis], window.kernel[axis]
        origin = position * window.strides[axis] - window.pads[axis]
        inside = [k for k in range(kernel) if 0 <= origin + k * window.dilations[axis] < size]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)

    @cached_property
    def class_count(self):
        """Classes of pixels."""
        return len(self.classes(0)[0]) * len(self.classes(1)[0])

    def constants(self, weights, xor):
        """int32[products, classes, words(O) * 32]: what the popcounts do not count.

        Parameters
        ----------
        weights : uint32[Q', O, kh, kw, words]
        xor : bool
            Whether differing bits are counted.
        """
        counts = np.bitwise_count(weights).sum(-1, dtype=np.int64)  # [Q', O, kh, kw]
        rows, columns = self.classes(0)[0], self.classes(1)[0]
        result = np.zeros((len(self.products), len(rows), len(columns), words(self.channels) * WORD_BITS), np.int64)
        for number, product in enumerate(self.products):
            weighted = sum((w * counts[j] for j, w in product.weights), np.zeros(counts.shape[1:], np.int64))
            of_taps = product.data_constant * (product.weight_constant * self.bits + weighted)
            everywhere = sum(f // 2 * counts[j].sum((-1, -2)) for _, j, f in product.pairs) if xor else 0
            for y, (top, bottom) in enumerate(rows):
                for x, (left, right) in enumerate(columns):
                    inside = of_taps[:, top:bottom, left:right].sum((-1, -2))
                    result[number, y, x, : self.channels] = inside + everywhere
        return result.reshape(len(self.products), -1, result.shape[-1]).astype(np.int32)

    def tail(self, weights, xor):
        """uint32: what follows the weights in the packed operand: constants, then the class of each row and of each column."""
        constants = self.constants(weights, xor).reshape(-1)
        columns = len(self.classes(1)[0])
        numbers = [np.asarray(self.classes(0)[1], np.int32) * columns, np.asarray(self.classes(1)[1], np.int32)]
        return np.concatenate([constants, *numbers]).astype(np.int32).view(np.uint32)

    @property
    def tail_size(self):
        """Elements of :meth:`tail`."""
        constants = len(self.products) * self.class_count * words(self.channels) * WORD_BITS
        return constants + self.window.out_height + self.window.out_width


def _of_matmul(spec):
    """The right operand in the place of the weights: its columns are output channels. ``bits`` are those of all words."""
    values = {"bipolar": (((0, -2),), 1), "unipolar": (((0, 1),), 0), "ternary": (((0, -2), (1, -1)), 1)}
    product = Product(*values[spec.left], *values[spec.right])
    planes = len(product.data), False, len(product.weights)
    return Layer(spec, Window(1, 1, (1, 1)), spec.words * WORD_BITS, spec.columns, 1, False, *planes, (product,), False, False)


def _products(planes, zeros):
    step = planes.words_per_weight

    def data(p, coefficient):
        """Planes and constant of data plane p."""
        if planes.data_kind == "unipolar":
            return [(p, coefficient)], 0
        mask = [(len(planes.data), -coefficient)] if zeros else []
        return [(p, -2 * coefficient), *mask], coefficient

    def weight(q, coefficient):
        if planes.weight_kind == "ternary":  # signs, mask
            return [(step * q, -2 * coefficient), (step * q + 1, coefficient)], 0
        if planes.weight_kind == "unipolar":
            return [(q, coefficient)], 0
        return [(q, -2 * coefficient)], coefficient

    def product(lefts, rights):
        d, w = [pair for pairs, _ in lefts for pair in pairs], [pair for pairs, _ in rights for pair in pairs]
        return Product(tuple(d), sum(c for _, c in lefts), tuple(w), sum(c for _, c in rights))

    if planes.scaled:
        pairs = [(p, q) for p in range(len(planes.data)) for q in range(len(planes.weights))]
        return tuple(product([data(p, 1)], [weight(q, 1)]) for p, q in pairs)
    lefts = [data(p, c) for p, c in enumerate(planes.data)]
    return (product(lefts, [weight(q, c) for q, c in enumerate(planes.weights)]),)
