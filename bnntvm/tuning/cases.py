"""Data to run a task's candidates on, and what they must compute: the family's numpy reference."""

from __future__ import annotations

import numpy as np

from bnntvm.spec import WORD_BITS, words

#: Steps whose result is rounded differently by numpy and by a kernel.
_INEXACT = {"exp", "log", "tanh", "sigmoid", "erf", "power", "rsqrt", "sqrt", "divide"}


def make(task, seed=0, images=1):
    """A case of a task.

    Parameters
    ----------
    images : int
        How many, where the batch is dynamic.

    Returns
    -------
    (operands, weights, expected)
        Arrays of all operands (None at the place of the weights), the canonical weights (or None), and the reference's outputs.
    """
    rng = np.random.default_rng(seed)
    arrays = [_array(rng, task.spec, operand, operand.at(images)) for operand in task.operands]
    anchor = len(arrays) - len(_inputs(task.spec))
    weights = next((a for a, o in zip(arrays, task.operands) if o.weights), None)
    _clear_signs_of_zeros(task, arrays[:anchor])
    with np.errstate(all="ignore"):
        expected = task.module.reference(task.spec, arrays[:anchor], arrays[anchor:])
    operands = [None if o.weights else np.ascontiguousarray(a) for a, o in zip(arrays, task.operands)]
    return operands, weights, [np.ascontiguousarray(e) for e in expected]


def _inputs(spec):
    return spec.epilogue.inputs if hasattr(spec, "epilogue") else ()


def _array(rng, spec, operand, shape):
    """Values of an operand: the network's where they are known, but small integers for float weights, whose sums are exact in any order."""
    if operand.weights and operand.dtype == "float32":
        return rng.integers(-4, 4, shape, endpoint=True).astype(np.float32)
    if operand.array is not None:
        return operand.array
    if operand.dtype == "uint32":
        return rng.integers(0, 2**32, shape, dtype=np.uint32) & _tails(spec, shape[-1])
    if operand.dtype == "float32":
        return rng.integers(-4, 4, shape, endpoint=True).astype(np.float32)
    info = np.iinfo(operand.dtype)
    return rng.integers(max(info.min, -128), min(info.max, 127), shape, endpoint=True).astype(operand.dtype)


def resized(operand, array, images):
    """``array``, of an operand or output of a task that is batched, for so many images: those that it has, again and again."""
    if array is None or not operand.batched:
        return array
    return array[np.arange(operand.at(images)[0]) % len(array)]


def _tails(spec, count):
    """Mask of ``count`` words that keeps the bits of channels, where the specification says how many there are."""
    channels = getattr(spec, "in_channels", getattr(spec, "in_features", getattr(spec, "channels", None)))
    if not isinstance(channels, int):
        return np.full(count, 2**32 - 1, np.uint32)
    # Two groups of 24 channels take two words, packed densely or not.
    dense = getattr(spec, "dense_groups", words(channels) == count)
    groups = 1 if dense else spec.groups
    each = channels // groups
    bits = np.zeros((groups, words(each) * WORD_BITS), np.uint8)
    bits[:, :each] = 1
    mask = np.packbits(bits.reshape(-1), bitorder="little").view(np.uint32)
    return mask if len(mask) == count else np.full(count, 2**32 - 1, np.uint32)


def _clear_signs_of_zeros(task, operands):
    """Where an activation is zero, as the mask behind the weights says, its sign bit is 0."""
    mask = mask_of_zeros(task)
    if mask is not None:
        operands[mask] &= np.uint32(0x11111111)
        operands[0] &= ~operands[mask]


def mask_of_zeros(task):
    """Number of the operand that says which activations are zero, or None.

    Candidates are checked on data with zeros and timed on data without: a kernel takes another way where there are some, and as a rule
    there are none.
    """
    if not getattr(task.spec, "zeros", False):
        return None
    return next((i for i, o in enumerate(task.operands) if i and o.array is None and not o.weights and o.dtype == "uint32"), None)


def differs(task, got, expected):
    """Why ``got`` are not the ``expected`` outputs, or None.

    Integers and bits are exact where no step of the kernel is a transcendental function. Floats may differ by rounding.
    """
    steps = task.spec.epilogue.steps if hasattr(task.spec, "epilogue") else ()
    # Sums of float weights are exact here, those of averages and scaled planes are not.
    exact = not any(step.op in _INEXACT for step in steps) and task.operands[0].dtype != "float32"
    if len(got) != len(expected):
        return f"{len(got)} outputs instead of {len(expected)}"
    for number, (actual, right) in enumerate(zip(got, expected)):
        if actual.dtype.kind == "f":
            scale = np.max(np.abs(right[np.isfinite(right)]), initial=1e-30)
            bad = ~(np.abs(actual - right) <= 1e-4 * scale) & ~(actual == right) & ~(np.isnan(actual) & np.isnan(right))
        else:
            bad = actual != right
            if not exact and bad.mean() < 1e-3:
                continue
        if bad.any():
            return f"output {number}: {int(bad.sum())} of {bad.size} elements are wrong"
    return None
