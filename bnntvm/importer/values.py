"""The values that flow along the edges of an ONNX graph while it is imported.

========================  ====================================================================================================
``numpy.ndarray``         a constant
:class:`Dims`             integers that depend on the batch: the result of Shape and of arithmetic on it
:class:`Expanded`         a constant broadcast to a shape that depends on the batch
``relax.Expr``            a tensor computed at run time: a variable of the function under construction
:class:`Unfolded`         the windows of an image, not made before something other than a matrix product reads them
========================  ====================================================================================================
"""

from dataclasses import dataclass

import numpy as np
from tvm import relax, tirx
from tvm.sym import Analyzer

_ANALYZER = Analyzer()


@dataclass(frozen=True)
class Dims:
    """An integer tensor with symbolic entries.

    Attributes
    ----------
    array : numpy.ndarray of object
        Each entry an int or an int64 TIR expression.
    """

    array: np.ndarray


@dataclass(frozen=True)
class Expanded:
    """``array`` broadcast to ``shape``, whose dimensions are ints or TIR expressions."""

    array: np.ndarray
    shape: tuple


@dataclass(frozen=True, eq=False)
class Unfolded:
    """The windows of an image as rows: [N, H', W', kh * kw * C].

    Attributes
    ----------
    image : relax.Expr
        float32[N, H, W, C].
    kernel, strides, dilations : tuple of int
        Two each.
    pads : tuple of int
        Begins, then ends.
    fill : float
        Value of the pixels around the image.
    shape : tuple
    """

    image: relax.Expr
    kernel: tuple
    strides: tuple
    dilations: tuple
    pads: tuple
    fill: float
    shape: tuple


def simplify(dim):
    """An int where ``dim`` is one, else the simplified TIR expression."""
    if isinstance(dim, (int, np.integer)):
        return int(dim)
    dim = _ANALYZER.simplify(dim)
    return int(dim) if isinstance(dim, tirx.IntImm) else dim


def same_dim(left, right):
    """Whether two dimensions are provably equal."""
    difference = simplify(left - right)
    return isinstance(difference, int) and difference == 0


def dims_value(array):
    """``array`` of ints and TIR expressions as a value: a constant of int64 where nothing is symbolic."""
    flat = np.empty(array.size, dtype=object)
    for i, entry in enumerate(array.reshape(-1)):
        flat[i] = simplify(entry)
    if all(isinstance(entry, int) for entry in flat):
        return flat.astype(np.int64).reshape(array.shape)
    return Dims(flat.reshape(array.shape))


def vector(dims):
    """The dimensions ``dims`` as a 1-D value."""
    array = np.empty(len(dims), dtype=object)
    for i, dim in enumerate(dims):
        array[i] = dim
    return dims_value(array)


def objects(value):
    """The entries of a :class:`Dims` or of an integer constant as an object array of ints and TIR expressions."""
    if isinstance(value, Dims):
        return value.array
    array = np.empty(value.shape, dtype=object)
    array[...] = value.astype(object)
    return array


def is_constant(value):
    return isinstance(value, np.ndarray)


def shape_of(value):
    """Shape of a value: a tuple of ints and TIR expressions."""
    if isinstance(value, relax.Expr):
        return tuple(simplify(d) for d in value.ty.shape)
    if isinstance(value, (Expanded, Unfolded)):
        return value.shape
    return value.array.shape if isinstance(value, Dims) else value.shape


def dtype_of(value):
    """numpy's name of a value's element type."""
    if isinstance(value, (relax.Expr, Unfolded)):
        return str((value.image if isinstance(value, Unfolded) else value).ty.dtype)
    return "int64" if isinstance(value, Dims) else str((value.array if isinstance(value, Expanded) else value).dtype)


def broadcast_shape(*shapes):
    """The shape that numpy's rules give; a symbolic dimension is taken to equal what it meets unless that is 1.

    Raises
    ------
    ValueError
        If two dimensions are different ints, neither of them 1.
    """
    rank = max(len(s) for s in shapes)
    result = []
    for dims in zip(*[(1,) * (rank - len(s)) + tuple(s) for s in shapes]):
        chosen = 1
        for dim in dims:
            if isinstance(dim, int) and dim == 1:
                continue
            if isinstance(dim, int) and isinstance(chosen, int) and chosen not in (1, dim):
                raise ValueError(f"shapes {', '.join(map(str, shapes))} do not broadcast")
            if not isinstance(dim, int) or not isinstance(chosen, int) or chosen == 1:
                chosen = dim if isinstance(chosen, int) else chosen
        result.append(chosen)
    return tuple(result)
