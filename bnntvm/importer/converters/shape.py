"""Operators that move elements and compute nothing."""

from math import prod

import numpy as np
import tvm
from tvm import relax

from ..registry import converts
from ..values import Dims, Expanded, broadcast_shape, dtype_of, is_constant, same_dim, shape_of, simplify
from .elementwise import Arithmetic

_FAR = 2**31 - 1  # ends of slices from here on mean "to the end"


def axes_of(ctx, node, value, rank, name="axes"):
    """Axes from the second input or the attribute, none negative; None where neither is there."""
    axes = node.attrs.get(name) if value is None else ctx.ints(value, name)
    return None if axes is None else [int(a) % rank for a in axes]


def reshaped(ctx, x, shape):
    """``x`` with the dimensions ``shape``; itself where that changes nothing."""
    old = shape_of(x)
    if len(old) == len(shape) and all(same_dim(a, b) for a, b in zip(old, shape)):
        return x
    return ctx.emit(relax.op.reshape(ctx.tensor(x), shape))


@converts("Reshape")
def reshape(ctx, node, x, shape=None):
    wanted = list(node.attrs["shape"]) if shape is None else list(ctx.dims(shape, "the new shape"))
    old = shape_of(x)
    if not node.attrs.get("allowzero", 0):
        wanted = [old[i] if isinstance(d, int) and d == 0 else d for i, d in enumerate(wanted)]
    return reshaped(ctx, x, _filled(ctx, old, wanted))


def _filled(ctx, old, wanted):
    """``wanted`` with its -1 replaced by what is left of ``old``."""
    holes = [i for i, d in enumerate(wanted) if isinstance(d, int) and d == -1]
    if len(holes) > 1:
        raise ctx.unsupported("a shape with more than one -1", why=f"{wanted}")
    if holes:
        rest = [d for i, d in enumerate(wanted) if i != holes[0]]
        wanted[holes[0]] = _quotient(list(old), rest)
    wanted = [simplify(d) for d in wanted]
    if any(not isinstance(d, int) for d in wanted[1:]) and not any(not isinstance(d, int) for d in old[1:]):
        raise ctx.unsupported(
            "Reshape moves the dynamic batch away from the first axis",
            why=f"{list(old)} becomes {wanted}",
            hint="export the model with a static batch, or with a Reshape that keeps the batch",
        )
    return wanted


def _quotient(old, rest):
    """prod(old) / prod(rest), with symbolic factors that are in both cancelled first."""
    for dim in [d for d in rest if not isinstance(d, int)]:
        match = next((i for i, o in enumerate(old) if not isinstance(o, int) and same_dim(o, dim)), None)
        if match is not None:
            del old[match]
            rest = [d for d in rest if d is not dim]
    symbolic = [d for d in old if not isinstance(d, int)]
    number, divisor = prod(d for d in old if isinstance(d, int)), prod(d for d in rest if isinstance(d, int))
    if all(isinstance(d, int) for d in rest) and divisor and number % divisor == 0:
        result = number // divisor
        for dim in symbolic:
            result = dim * result
        return simplify(result)
    top = bottom = tvm.tirx.IntImm("int64", 1)
    for dim in old:
        top = top * dim
    for dim in rest:
        bottom = bottom * dim
    return simplify(top // bottom)


@converts("Flatten")
def flatten(ctx, node, x):
    shape = shape_of(x)
    axis = node.attrs.get("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return reshaped(ctx, x, [product_of(shape[:axis]), product_of(shape[axis:])])


def product_of(dims):
    """Product of dimensions, 1 for none."""
    result = 1
    for dim in dims:
        result = dim if isinstance(result, int) and result == 1 else result * dim
    return simplify(result)


@converts("Squeeze")
def squeeze(ctx, node, x, axes=None):
    shape = shape_of(x)
    axes = axes_of(ctx, node, axes, len(shape))
    axes = [i for i, d in enumerate(shape) if isinstance(d, int) and d == 1] if axes is None else axes
    return reshaped(ctx, x, [d for i, d in enumerate(shape) if i not in axes])


@converts("Unsqueeze")
def unsqueeze(ctx, node, x, axes=None):
    shape = list(shape_of(x))
    count = len(node.attrs["axes"] if axes is None else ctx.ints(axes, "axes"))
    for axis in sorted(axes_of(ctx, node, axes, len(shape) + count)):
        shape.insert(axis, 1)
    return reshaped(ctx, x, shape)


@converts("Transpose")
def transpose(ctx, node, x):
    rank = len(shape_of(x))
    perm = [int(a) for a in node.attrs.get("perm", range(rank - 1, -1, -1))]
    return x if perm == list(range(rank)) else ctx.emit(relax.op.permute_dims(ctx.tensor(x), perm))


@converts("Concat")
def concat(ctx, node, *xs):
    rank = len(shape_of(xs[0]))
    return xs[0] if len(xs) == 1 else ctx.emit(relax.op.concat([ctx.tensor(x) for x in xs], node.attrs["axis"] % rank))


@converts("Expand")
def expand(ctx, node, x, shape):
    full = broadcast_shape(shape_of(x), ctx.dims(shape, "the new shape"))
    if isinstance(x, (np.ndarray, Expanded)):
        return Expanded(x if is_constant(x) else x.array, full)
    old = shape_of(x)
    if len(old) == len(full) and all(same_dim(a, b) for a, b in zip(old, full)):
        return x
    return ctx.emit(relax.op.broadcast_to(ctx.tensor(x), full))


@converts("ConstantOfShape")
def constant_of_shape(ctx, node, shape):
    value = node.attrs.get("value", np.zeros(1, np.float32)).reshape(())
    return Expanded(value, ctx.dims(shape, "the shape"))


@converts("Tile")
def tile(ctx, node, x, repeats):
    repeats = ctx.ints(repeats, "repeats")
    return x if all(r == 1 for r in repeats) else ctx.emit(relax.op.tile(ctx.tensor(x), repeats))


# ---- parts


def part(ctx, x, axis, begin, end, step=1):
    """``x[begin:end:step]`` along one static axis; a backward step too."""
    size = shape_of(x)[axis]
    if (begin, end, step) == (0, size, 1):
        return x
    if step < 0:
        return take(ctx, x, np.arange(begin, end, step), axis)
    return ctx.emit(relax.op.strided_slice(ctx.tensor(x), [axis], [begin], [end], None if step == 1 else [step]))


def take(ctx, x, indices, axis):
    """``numpy.take`` with constant, valid ``indices``."""
    # The mode "fast" would be right as well, but TVM prints a warning about it.
    return ctx.emit(relax.op.take(ctx.tensor(x), ctx.const(np.asarray(indices, dtype=np.int64)), axis, mode="clip"))


@converts("Slice")
def slice_(ctx, node, x, starts=None, ends=None, axes=None, steps=None):
    shape = shape_of(x)
    if starts is None:
        starts, ends, axes, steps = node.attrs["starts"], node.attrs["ends"], node.attrs.get("axes"), None
    else:
        starts, ends = list(ctx.dims(starts, "starts")), list(ctx.dims(ends, "ends"))
        axes = None if axes is None else ctx.ints(axes, "axes")
        steps = None if steps is None else ctx.ints(steps, "steps")
    axes = range(len(starts)) if axes is None else [int(a) % len(shape) for a in axes]
    for axis, start, end, step in zip(axes, starts, ends, steps or [1] * len(starts)):
        x = _sliced(ctx, x, axis, start, end, int(step))
    return x


def _sliced(ctx, x, axis, start, end, step):
    size = shape_of(x)[axis]
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        begin, stop, step = slice(start, None if step < 0 and end < -size else end, step).indices(size)
        return part(ctx, x, axis, begin, stop, step)
    whole_end = isinstance(end, int) and end >= _FAR or same_dim(end, size)
    if isinstance(start, int) and start == 0 and step == 1 and whole_end:
        return x
    raise ctx.unsupported("Slice of the dynamic batch is not supported", hint="export the model with a static batch")


@converts("Split")
def split(ctx, node, x, sizes=None):
    shape = shape_of(x)
    axis = node.attrs.get("axis", 0) % len(shape)
    if not isinstance(shape[axis], int):
        raise ctx.unsupported("Split of the dynamic batch is not supported", hint="export the model with a static batch")
    sizes = node.attrs.get("split") if sizes is None else ctx.ints(sizes, "the sizes")
    if sizes is None:
        each = -(-shape[axis] // len(node.outputs))
        sizes = [min(each, shape[axis] - i * each) for i in range(len(node.outputs))]
    ends = np.cumsum(sizes).tolist()
    return [part(ctx, x, axis, end - size, end) for size, end in zip(sizes, ends)]


@converts("Gather")
def gather(ctx, node, x, indices):
    shape = shape_of(x)
    axis = node.attrs.get("axis", 0) % len(shape)
    if is_constant(indices):
        if not isinstance(shape[axis], int):
            raise ctx.unsupported("Gather from the dynamic batch is not supported", hint="export the model with a static batch")
        if indices.size and not (-shape[axis] <= indices.min() and indices.max() < shape[axis]):
            raise ctx.unsupported("Gather with an index out of range", why=f"axis {axis} has {shape[axis]} entries")
        return take(ctx, x, indices % shape[axis], axis)
    # Clipped, so that an index out of range reads no foreign memory.
    return ctx.emit(relax.op.take(ctx.tensor(x), _not_negative(ctx, indices, shape[axis]), axis, mode="clip"))


def _not_negative(ctx, indices, size):
    if dtype_of(indices).startswith("uint"):
        return ctx.tensor(indices)
    if not isinstance(size, int):
        raise ctx.unsupported("Gather from the dynamic batch is not supported", hint="export the model with a static batch")
    m = Arithmetic(ctx, indices)
    return ctx.emit(relax.op.where(m.less(indices, 0), *ctx.operands(m.add(indices, size), indices)))


@converts("GatherElements")
def gather_elements(ctx, node, x, indices):
    axis = node.attrs.get("axis", 0) % len(shape_of(x))
    return ctx.emit(relax.op.gather_elements(ctx.tensor(x), _not_negative(ctx, ctx.tensor(indices), shape_of(x)[axis]), axis))


# ---- pads


@converts("Pad")
def pad(ctx, node, x, pads=None, value=None, axes=None):
    rank, mode = len(shape_of(x)), node.attrs.get("mode", "constant")
    given = [int(p) for p in node.attrs["pads"]] if pads is None else ctx.ints(pads, "pads")
    axes = axes_of(ctx, node, axes, rank) or range(rank)
    begins, ends = [0] * rank, [0] * rank
    for i, axis in enumerate(axes):
        begins[axis], ends[axis] = given[i], given[len(axes) + i]
    fill = node.attrs.get("value", 0.0) if value is None else ctx.array(value, "the pad value").item()
    for axis in range(rank):
        if mode != "constant":
            x = _pad_by_parts(ctx, x, axis, begins[axis], ends[axis], mode)
        elif begins[axis] < 0 or ends[axis] < 0:
            size = shape_of(x)[axis]
            x = part(ctx, x, axis, max(-begins[axis], 0), size + min(ends[axis], 0))
    return x if mode != "constant" else padded(ctx, x, [max(b, 0) for b in begins], [max(e, 0) for e in ends], fill)


def padded(ctx, x, begins, ends, value):
    """``x`` with ``value`` around it."""
    if not any(begins) and not any(ends):
        return x
    widths = [w for pair in zip(begins, ends) for w in pair]
    return ctx.emit(relax.op.nn.pad(ctx.tensor(x), widths, "constant", float(value)))


def _pad_by_parts(ctx, x, axis, begin, end, mode):
    """reflect, edge and wrap: ``x`` between slices of itself."""
    if not begin and not end:
        return x
    size = shape_of(x)[axis]
    if not isinstance(size, int):
        raise ctx.unsupported("Pad of the dynamic batch is not supported")
    index = np.pad(np.arange(size), (max(begin, 0), max(end, 0)), mode=mode)
    index = index[max(-begin, 0) : len(index) - max(-end, 0)]
    cuts = [0, *(np.flatnonzero(np.diff(index) != 1) + 1).tolist(), len(index)]
    runs = [(int(index[a]), int(index[b - 1]) + 1) for a, b in zip(cuts, cuts[1:])]
    parts = [part(ctx, x, axis, first, last) for first, last in runs]
    return parts[0] if len(parts) == 1 else ctx.emit(relax.op.concat([ctx.tensor(p) for p in parts], axis))


# ---- blocks


@converts("DepthToSpace")
def depth_to_space(ctx, node, x):
    n, c, h, w = ctx.static(x)
    b = node.attrs["blocksize"]
    crd = node.attrs.get("mode", "DCR") == "CRD"
    x = reshaped(ctx, x, [n, c // b**2, b, b, h, w] if crd else [n, b, b, c // b**2, h, w])
    x = ctx.emit(relax.op.permute_dims(x, [0, 1, 4, 2, 5, 3] if crd else [0, 3, 4, 1, 5, 2]))
    return reshaped(ctx, x, [n, c // b**2, h * b, w * b])


@converts("SpaceToDepth")
def space_to_depth(ctx, node, x):
    n, c, h, w = ctx.static(x)
    b = node.attrs["blocksize"]
    x = reshaped(ctx, x, [n, c, h // b, b, w // b, b])
    x = ctx.emit(relax.op.permute_dims(x, [0, 3, 5, 1, 2, 4]))
    return reshaped(ctx, x, [n, c * b**2, h // b, w // b])


@converts("Trilu")
def trilu(ctx, node, x, k=None):
    shape = ctx.static(x)
    offset = 0 if k is None else ctx.ints(k, "k")[0]
    keep = (np.triu if node.attrs.get("upper", 1) else np.tril)(np.ones(shape[-2:], dtype=bool), offset)
    return ctx.emit(relax.op.where(*ctx.operands(keep, x, np.array(0, dtype_of(x)))))


@converts("Shape", "Size")
def shape_node(ctx, node, x):
    raise ctx.unsupported("the shape of this tensor is not known")  # dims.evaluate answers every Shape that can be


@converts("Range")
def range_(ctx, node, *args):
    why = "its bounds depend on the batch" if any(isinstance(a, Dims) for a in args) else "its bounds are computed at run time"
    raise ctx.unsupported("Range must have constant bounds", why=why, hint="export the model with static shapes")
