"""What a kernel computes, as plain data: the language between the passes and the kernel families.

A fused kernel is an *anchor* (a convolution, a dense layer, a pool, or the identity) followed by an *epilogue*: elementwise steps on the
anchor's result, and one or more stores. Specifications are frozen and hashable, so equal kernels are generated once and shared.

Conventions
-----------
* Activations are NHWC (convolutions, pools) or [M, C] (dense). The leading dimension may be dynamic; it is never part of a specification.
* Packed bits: ``uint32[..., ceil(C / 32)]``, channel c at bit c % 32 of word c // 32 (on little-endian machines: bit c % 8 of byte c // 8).
  Bipolar planes: bit 1 <-> -1, bit 0 <-> +1. Unipolar planes: the bit is the value. Tail bits are 0.
* PrimFunc parameters, in this order: the anchor's operands, the epilogue's inputs, the epilogue's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

WORD_BITS = 32
#: Attribute of a kernel's function: elements of its last parameter, int32, memory for itself that is garbage before and after.
WORKSPACE = "bnn.workspace"


def words(channels):
    """Number of 32-bit words that hold one bit for each of ``channels`` channels."""
    return -(-channels // WORD_BITS)


def join_layers(outputs):
    """The value of ``layer`` of one layer that computes several of the network's."""
    return "\n".join(outputs)


def split_layers(layer):
    """The names that :func:`join_layers` joined."""
    return layer.split("\n")


@dataclass(frozen=True)
class EpilogueInput:
    """One operand of the epilogue.

    Attributes
    ----------
    kind : str
        ``tensor``: same shape as the anchor's result, or, where ``times`` is more than 1, of C / times channels, whole words of them, read
        so many times side by side: channel c of the result meets channel ``c % (C / times)``.
        ``channel``: one value per channel, ``[words(C) * 32]`` (padded so that whole vectors may be loaded; padding is zeros).
        ``image``: one value per image and channel, ``[N, 1, 1, C]`` (or ``[M, C]`` never needs it).
        ``pixel``: one value per pixel, ``[N, H, W, 1]`` (or ``[M, 1]``).
        ``words``: ``uint32[words(C)]``, a constant xored onto a packed output.
    dtype : str
        ``float32``, ``int32`` or ``uint32``.
    times : int
    """

    kind: str
    dtype: str = "float32"
    times: int = 1


@dataclass(frozen=True)
class Step:
    """One elementwise operation. ``args`` are value numbers (ints) or float constants (floats): value 0 is the anchor's result, then come
    the epilogue's inputs, then the steps. See ``OPERATIONS`` for the names. ``dtype`` is the result's (``bool`` for comparisons)."""

    op: str
    args: tuple
    dtype: str = "float32"


@dataclass(frozen=True)
class Output:
    """One store. ``tensor`` stores value ``value`` as ``dtype`` [..., C]; ``planar`` (of convolutions of bits) stores float32 in
    the order of an ONNX file, [N, C, H, W]; ``max_pool`` and ``avg_pool`` (of BinaryConv2d) store the largest and the mean of 2x2 pixels,
    float32 [N, H / 2, W / 2, C]; ``bits`` packs a bool value to ``uint32[..., words(C)]`` and, if ``flip`` is the number of a
    ``words`` input, xors each word with it. Tail bits (channels >= C) are 0 whatever the value says."""

    kind: str
    value: int
    dtype: str = "float32"
    flip: int | None = None


#: Kinds of Output that make one pixel of 2x2.
POOLED = ("max_pool", "avg_pool")

#: Names of Step.op and their arity. Float arithmetic is IEEE float32, one rounding per operation, never contracted; round is half to even;
#: prelu(x, slope) = where(x < 0, x * slope, x); clip is min(max(x, lo), hi); cast goes to Step.dtype; where(bool, x, y).
OPERATIONS = {
    "add": 2, "subtract": 2, "multiply": 2, "divide": 2, "maximum": 2, "minimum": 2, "power": 2,
    "greater": 2, "greater_equal": 2, "less": 2, "less_equal": 2, "equal": 2, "not_equal": 2,
    "logical_and": 2, "logical_or": 2, "logical_not": 1, "logical_xor": 2,
    "negative": 1, "abs": 1, "sign": 1, "sqrt": 1, "rsqrt": 1, "exp": 1, "log": 1, "tanh": 1, "sigmoid": 1, "erf": 1,
    "floor": 1, "ceil": 1, "round": 1, "relu": 1, "cast": 1, "prelu": 2, "clip": 3, "where": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Epilogue:
    """Elementwise tail of a kernel. The default stores nothing; see :func:`store` for the plainest one."""

    inputs: tuple[EpilogueInput, ...] = ()
    steps: tuple[Step, ...] = ()
    outputs: tuple[Output, ...] = ()


def store(dtype="float32", anchor_dtype="float32"):
    """An epilogue that stores the anchor's result, converted to ``dtype``."""
    if dtype == anchor_dtype:
        return Epilogue(outputs=(Output("tensor", 0, dtype),))
    return Epilogue(steps=(Step("cast", (0,), dtype),), outputs=(Output("tensor", 1, dtype),))


@dataclass(frozen=True)
class Window:
    """A sliding window over an NHWC image: input size, kernel, strides, zero pads (top, left, bottom, right), dilations."""

    in_height: int
    in_width: int
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)

    @property
    def out_height(self):
        reach = self.dilations[0] * (self.kernel[0] - 1) + 1
        return (self.in_height + self.pads[0] + self.pads[2] - reach) // self.strides[0] + 1

    @property
    def out_width(self):
        reach = self.dilations[1] * (self.kernel[1] - 1) + 1
        return (self.in_width + self.pads[1] + self.pads[3] - reach) // self.strides[1] + 1


@dataclass(frozen=True)
class BinaryConv2d:
    """Convolution of bit planes. The anchor's value is the exact dot product, int32.

    Operands: data ``uint32[N, H, W, groups * words(in_channels / groups)]`` (each group starts at a word; with ``dense_groups``
    ``uint32[N, H, W, words(in_channels)]``, and in_channels / groups divides 32), weights (kernel layout of the family's choice, made by
    its ``pack_weights`` from ``uint32[O, kh, kw, words(in_channels / groups)]``, bipolar), and for ``zeros`` a third operand ``uint32``
    like data: a mask plane, bit 1 where the activation is 0 (the sign bit is 0 there).

    ``unipolar``: data bits are values {0, 1} instead of bipolar.
    Zero padding contributes 0 (not +-1): padded taps are skipped or corrected. ``plus_one``: the padding holds +1 (bipolar data, one group,
    no zeros; only where the family's ``pads_with_ones`` says so).
    """

    window: Window
    in_channels: int
    out_channels: int
    groups: int = 1
    unipolar: bool = False
    zeros: bool = False
    epilogue: Epilogue = field(default_factory=Epilogue)
    dense_groups: bool = False
    plus_one: bool = False


@dataclass(frozen=True)
class BinaryDense:
    """Dense layer of bit planes: data ``uint32[M, words(K)]``, weights from ``uint32[N, words(K)]``, as BinaryConv2d otherwise."""

    in_features: int
    out_features: int
    unipolar: bool = False
    zeros: bool = False
    epilogue: Epilogue = field(default_factory=Epilogue)


@dataclass(frozen=True)
class PlaneSum:
    """The products of several activation planes with several weight planes, summed up:
    ``sum(data[p] * weights[q] * dot(data plane p, weight plane q))``, int32.

    Attributes
    ----------
    data, weights : tuple of int
        Coefficients of the planes; powers of two as a rule, the highest negative for two's complement.
    data_kind : str
        ``bipolar`` or ``unipolar``, for all planes.
    weight_kind : str
        ``bipolar``, ``unipolar`` or ``ternary``. A ternary plane is two planes of words, first the signs, then the mask: its value is
        ``mask * (1 - 2 * sign)``, and the sign is 0 where the mask is.
    scaled : bool
        The coefficients are floats, one for each pair of planes and output channel: the kernel gets the operand ``float32[P * Q, words(O) *
        32]``, pair (p, q) in row p * Q + q, and its value is the float32 sum over pairs, in this order, of ``float(dot) * scale``, every
        operation rounded. ``data`` and ``weights`` are ones then.
    """

    data: tuple[int, ...]
    weights: tuple[int, ...]
    data_kind: str
    weight_kind: str
    scaled: bool = False

    @property
    def words_per_weight(self):
        """Planes of words that one weight plane takes."""
        return 2 if self.weight_kind == "ternary" else 1


@dataclass(frozen=True)
class PlanesConv2d:
    """Convolution of sums of bit planes.

    Operands: one ``uint32[N, H, W, ...]`` for each data plane (layout as BinaryConv2d); weights (kernel layout, from
    ``uint32[Q', O, kh, kw, words(in_channels / groups)]``, Q' planes of words); for ``zeros``, which needs a single bipolar data plane, the
    mask plane as in BinaryConv2d; for ``planes.scaled`` the scales. Zero padding contributes 0.
    """

    window: Window
    in_channels: int
    out_channels: int
    planes: PlaneSum
    groups: int = 1
    zeros: bool = False
    epilogue: Epilogue = field(default_factory=Epilogue)
    dense_groups: bool = False


@dataclass(frozen=True)
class PlanesDense:
    """Dense layer of sums of bit planes: data ``uint32[M, words(K)]`` for each plane, weights from ``uint32[Q', N, words(K)]``, as
    PlanesConv2d otherwise."""

    in_features: int
    out_features: int
    planes: PlaneSum
    zeros: bool = False
    epilogue: Epilogue = field(default_factory=Epilogue)


@dataclass(frozen=True)
class BinaryMatmul:
    """Product of two packed run-time tensors, exact int32 ``[B, rows, columns]``; with a ``scale`` float32, times that.

    ``left``, ``right``: what an operand's words mean, "bipolar" (signs), "unipolar" ({0, 1}) or "ternary" (signs, then a mask of zeros,
    where the sign bit is 0). Operands: the left one's planes ``uint32[B, rows, words]``, the right one's ``uint32[B, words, columns]``, or
    with ``shared`` ``uint32[1, words, columns]``, the same for every B. The ``features`` bits that count lie anywhere in the words, in both
    operands at the same places; the others are 0. ``turned``: the right operand's words lie ``[B or 1, columns, words]``.
    """

    rows: int
    columns: int
    features: int
    words: int
    left: str = "bipolar"
    right: str = "bipolar"
    shared: bool = False
    scale: float | None = None
    turned: bool = False


@dataclass(frozen=True)
class Digits:
    """Small integers made of bits: ``base + sum(coefficients[j] * bit[j])``. Bipolar bits are ``Digits(1, (-2,))``."""

    base: int
    coefficients: tuple[int, ...]

    @property
    def low(self):
        """The least value."""
        return self.base + sum(c for c in self.coefficients if c < 0)

    @property
    def high(self):
        """The greatest value."""
        return self.base + sum(c for c in self.coefficients if c > 0)


@dataclass(frozen=True)
class Int8Conv2d:
    """Convolution of 8-bit integers. The anchor's value is the exact dot product, int32.

    Operands: data, weights (kernel layout of the family's choice, made by its ``pack_weights`` from ``int8[O, kh, kw, I]``), or for several
    planes of data these first.

    ``data``: "int8" or "uint8" for a tensor ``[N, H, W, I]`` of that type, or :class:`Digits` of planes ``uint32[N, H, W, words(I)]``.
    ``weights``: "int8", or :class:`Digits` of which every weight is a value: they are stored at one bit for each coefficient.
    ``mask_last``: the last data plane is a mask, its operand comes behind the weights, as in BinaryConv2d.
    ``floats``: the tensor is float32 and holds integers that ``data`` ("int8" or "uint8") has room for.
    Zero padding contributes 0.
    """

    window: Window
    in_channels: int
    out_channels: int
    data: str | Digits = "int8"
    weights: str | Digits = "int8"
    epilogue: Epilogue = field(default_factory=Epilogue)
    mask_last: bool = False
    floats: bool = False


@dataclass(frozen=True)
class BitPool:
    """Pool of a packed plane: ``op`` "and" or "or" over the window; padded positions are the identity. Output ``uint32[N, OH, OW, words]``.
    (Max pool of bipolar bits is "and", of unipolar bits "or"; min pool the other way.)"""

    window: Window
    channels: int
    op: str


@dataclass(frozen=True)
class Map:
    """The identity as anchor: data float32 [..., C] seen as rows of C channels, ``[N, H, W, C]`` (rank 4) or ``[M, C]`` (rank 2). With a
    ``bits`` output this is the packing kernel."""

    rank: int
    spatial: tuple[int, int]
    channels: int
    dtype: str = "float32"
    epilogue: Epilogue = field(default_factory=Epilogue)


@dataclass(frozen=True)
class FloatConv2d:
    """float32 convolution, NHWC, zero padding; weights from ``float32[O, kh, kw, I / groups]``. groups == in_channels is depthwise.

    ``planar``: the data are ``float32[N, I, H, W]``, a network's input in the order of the ONNX file (not for depthwise)."""

    window: Window
    in_channels: int
    out_channels: int
    groups: int = 1
    epilogue: Epilogue = field(default_factory=Epilogue)
    planar: bool = False


@dataclass(frozen=True)
class FloatDense:
    """float32 data ``[M, K]`` times constant weights from ``float32[N, K]``."""

    in_features: int
    out_features: int
    epilogue: Epilogue = field(default_factory=Epilogue)


@dataclass(frozen=True)
class WeightCoding:
    """How weights of two or three levels per output channel are stored: ``planes`` planes of one bit each, the float data stay float.

    Attributes
    ----------
    kind : str
        ``sign``: one plane, bit 1 <-> -1, bit 0 <-> +1.
        ``ternary``: two planes, which never share a bit: weights that are +1 and weights that are -1; the others are 0.
        ``levels``: one or two planes that never share a bit. Each output channel has levels of its own: a weight without a bit is at
        level 0, one with a bit in plane p at level p + 1.
    planes : int
    offset : bool
        ``levels`` only: level 0 is not 0 in all channels.
    """

    kind: str
    planes: int
    offset: bool = False


@dataclass(frozen=True)
class WeightDense:
    """float32 data ``[M, K]`` times packed weights, made by ``pack_weights`` from ``uint32[planes, N, words(K)]``, tail bits 0.

    For ``levels`` a third operand: ``float32[planes + 1, words(N) * 32]``, the levels of each output channel, padded with zeros.
    """

    in_features: int
    out_features: int
    coding: WeightCoding
    epilogue: Epilogue = field(default_factory=Epilogue)


@dataclass(frozen=True)
class WeightDenseInt8:
    """Data of 8 bits times packed weights; the anchor's value is the exact dot product, int32.

    Operands: data ``float32[M, K]`` that hold integers from -128 to 127, weights as for :class:`WeightDense`, ``sign`` or ``ternary``.
    """

    in_features: int
    out_features: int
    coding: WeightCoding
    epilogue: Epilogue = field(default_factory=Epilogue)


@dataclass(frozen=True)
class WeightConv2d(FloatConv2d):
    """:class:`FloatConv2d` with packed weights, from ``uint32[planes, O, kh, kw, words(I / groups)]``; levels as in WeightDense."""

    coding: WeightCoding = WeightCoding("sign", 1)


@dataclass(frozen=True)
class Pool2d:
    """float32 pooling, NHWC. ``op``: "max", "avg" (padding not counted) or "avg_pad" (padding counted)."""

    window: Window
    channels: int
    op: str
    epilogue: Epilogue = field(default_factory=Epilogue)


@dataclass(frozen=True)
class GlobalPool:
    """float32 pooling over a whole NHWC image, ``[N, H, W, C]`` to ``[N, 1, 1, C]``. ``op``: "avg" or "max"; ``spatial`` is (H, W)."""

    op: str
    spatial: tuple[int, int]
    channels: int
    epilogue: Epilogue = field(default_factory=Epilogue)


@dataclass(frozen=True)
class Softmax:
    """float32 softmax over the last axis of ``[M, classes]``."""

    classes: int
    epilogue: Epilogue = field(default_factory=store)


@dataclass(frozen=True)
class Concat:
    """Tensors joined along the channels: operand i is ``[N, H, W, channels[i]]`` (rank 4) or ``[M, channels[i]]`` (rank 2, with an
    empty ``spatial``). ``dtype``: float32, or uint32 (packed words, without an epilogue: ``channels`` counts words)."""

    rank: int
    spatial: tuple[int, ...]
    channels: tuple[int, ...]
    epilogue: Epilogue = field(default_factory=store)
    dtype: str = "float32"


@dataclass(frozen=True)
class BitPad:
    """Constant padding of packed images ``uint32[N, H, W, words]``: ``pads`` (top, left, bottom, right) pixels of the word ``value``."""

    spatial: tuple[int, int]
    words: int
    pads: tuple[int, int, int, int]
    value: int = 0


@dataclass(frozen=True)
class PlanarPack:
    """Packing of an image in channel order: data ``float32[N, C, H, W]``; the epilogue's outputs are all ``bits``, ``uint32[N, H, W,
    words(C)]``, its inputs ``channel`` or ``words``."""

    spatial: tuple[int, int]
    channels: int
    epilogue: Epilogue = field(default_factory=Epilogue)


@dataclass(frozen=True)
class Transpose:
    """Exchange of the two inner axes: float32 ``[N, rows, columns]`` to ``[N, columns, rows]``; images count their pixels as one axis.

    ``shapes``: the operand's and the result's shape without N, for example ((H, W, C), (C, H, W))."""

    rows: int
    columns: int
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class RowExtreme:
    """The largest (``op`` "max") or least ("min") value of each row of float32 ``[M, C]``: float32 ``[M, 1]``."""

    op: str
    channels: int


@dataclass(frozen=True)
class TopK:
    """The ``count`` largest (or smallest) elements of each row of ``dtype[M, size]``, in order, and their int64 indices."""

    size: int
    count: int
    largest: bool
    dtype: str = "float32"


@dataclass(frozen=True)
class CumSum:
    """Running sums along the second axis of ``dtype[M, size, inner]``, added one by one.

    ``exclusive``: of the elements before; ``backward``: from the end on. ``size``, ``inner``: None where they are dynamic.
    """

    size: int | None
    inner: int | None
    dtype: str = "float32"
    exclusive: bool = False
    backward: bool = False
