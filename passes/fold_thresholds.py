"""Turn every remaining ``bnn.encode`` into comparisons with thresholds on the deepest tensor that decides it.

If the encoded tensor is a step function of a source (an integer accumulator behind scale, bias, BatchNorm, PReLU, ...; or a float
tensor), the plane "value is at one of these levels" is a xor of comparisons ``source < t_k``, one per cut at which membership changes,
with the per-channel thresholds that the analysis found by evaluating the chain itself (Umuroglu et al., FINN, 2017, section 4.2.2, but by
evaluation). The float chain then has no user left unless something else reads it. Channels whose sense is reversed (negative BatchNorm
scale) are flipped by one xor per word.

A comparison behind a max pool is moved before it: ``max(u) < t`` is the conjunction of ``u < t``.

Ordering contract: after PropagateBits.
"""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from bnntvm import ops
from bnntvm.bits import WORD_BITS, pack_bits
from bnntvm.graph import Rewriter, bindings, const, dims, dtype, op_name, uses
from bnntvm.levels import Mono, Step, quantise, threshold_values

from .infer_levels import infer_levels
from .propagate_bits import pool_bits


class _Fold(Rewriter):
    def begin(self):
        self.facts = infer_levels(self.func).facts
        self.producer = {binding.var: binding.value for binding in bindings(self.func)}
        self.uses = uses(self.func)

    def rewrite(self, var, value):
        if op_name(value) != "bnn.encode":
            return super().rewrite(var, value)
        data, groups = value.args[0], int(value.attrs["groups"])
        fact, levels = self.facts[data], [float(v) for v in value.attrs["levels"]]
        if not isinstance(fact, Step):
            return self.by_value(data, levels, groups)
        if groups > 1 and dims(data)[-1] // groups % WORD_BITS:
            return self.grouped(data, fact, levels, groups)
        terms, flip = membership(fact, levels, threshold_dtype(fact.source), dims(data)[-1])
        pooled = self.before_pool(fact, terms, flip, groups)
        return pooled if pooled is not None else self.packed(self.env[fact.source], terms, flip, groups)

    def by_value(self, data, levels, groups):
        """Comparisons with the levels themselves, where the packed layers in between hide what the tensor is a step function of."""
        planes = [self.emit(relax.op.equal(self.env[data], const(np.float32(level)))) for level in levels]
        plane = planes[0]
        for other in planes[1:]:
            plane = self.emit(relax.op.logical_or(plane, other))
        if groups > 1 and dims(data)[-1] // groups % WORD_BITS:
            return self.rows_of_groups(self.emit(relax.op.astype(plane, "float32")), dims(data), groups)
        return self.emit(ops.call(ops.PACK, [plane], groups=groups))

    def packed(self, source, terms, flip, groups):
        """The words of a plane."""
        if by_pixel(terms, flip):
            return self.packed_by_pixel(source, terms, flip, groups)
        plane = self.compare(source, terms)
        words = [const(group_words(flip, groups))] if flip.any() else []
        return self.emit(ops.call(ops.PACK, [plane, *words], groups=groups))

    def packed_by_pixel(self, source, terms, flip, groups):
        """As :meth:`packed` where thresholds differ from pixel to pixel: no epilogue reads such constants, so they are compared outside."""
        plane = self.emit(relax.op.astype(self.compare(source, terms), "float32"))
        if flip.any():
            plane = self.emit(relax.op.abs(self.emit(relax.op.subtract(plane, const(flip.astype(np.float32))))))
        return self.emit(ops.call(ops.PACK, [self.emit(relax.op.greater(plane, const(np.float32(0.5))))], groups=groups))

    def compare(self, source, terms):
        """Xor of ``source < t`` over all thresholds."""
        if dtype(source) != threshold_dtype(source):
            source = self.emit(relax.op.astype(source, "float32"))
        if not terms:
            terms = [np.asarray(_never(dtype(source)))]
        planes = [self.emit(relax.op.less(source, const(t))) for t in terms]
        plane = planes[0]
        for other in planes[1:]:
            plane = self.emit(relax.op.logical_xor(plane, other))
        return plane

    def before_pool(self, fact, terms, flip, groups):
        """The comparison done before a max pool that only feeds this step function."""
        pool = self.producer.get(fact.source)
        if len(terms) != 1 or op_name(pool) != "relax.nn.max_pool2d":
            return None
        if str(pool.attrs["layout"]) != "NHWC" or bool(pool.attrs["ceil_mode"]):
            return None
        if self.uses.get(fact.source, 0) > 1 or by_pixel(terms, flip):
            return None
        inner, threshold = self.facts[pool.args[0]], terms[0]
        if not isinstance(inner, Mono):
            return None
        below_or_not = np.broadcast_to(np.array([1.0, 0.0], np.float32), (*threshold.shape, 2))
        below = quantise(inner, lambda x: (x >= threshold).astype(np.int64), below_or_not)
        inner_terms, inner_flip = membership(below, [1.0], threshold_dtype(inner.source), len(flip))
        words = self.packed(self.env[inner.source], inner_terms, inner_flip, groups)
        words = self.emit(pool_bits(words, pool, "and", len(flip)))
        return self.emit(relax.op.bitwise_xor(words, const(group_words(flip, groups)))) if flip.any() else words

    def grouped(self, data, fact, levels, groups):
        """Groups that do not start at a word: give each its own row, pack, and put the rows side by side."""
        shape = dims(data)
        terms, flip = membership(fact, levels, threshold_dtype(fact.source), shape[-1])
        plane = self.compare(self.env[fact.source], terms)
        value = self.emit(relax.op.where(plane, const(np.float32(1)), const(np.float32(0))))
        if flip.any():
            value = self.emit(relax.op.abs(self.emit(relax.op.subtract(value, const(flip.astype(np.float32))))))
        return self.rows_of_groups(value, shape, groups)

    def rows_of_groups(self, value, shape, groups):
        """The words of a plane of ones and zeros in float32, every group packed as a row of its own."""
        rows = self.emit(relax.op.reshape(value, [*shape[:-2], shape[-2] * groups, shape[-1] // groups]))
        words = self.emit(ops.call(ops.PACK, [self.emit(relax.op.greater(rows, const(np.float32(0.5))))], groups=1))
        return self.emit(relax.op.reshape(words, [*shape[:-1], groups * dims(words)[-1]]))


def by_pixel(terms, flip):
    """Whether thresholds or flips differ from pixel to pixel."""
    return flip.ndim > 1 or any(t.ndim > 1 for t in terms)


def threshold_dtype(source):
    """What a source is compared in: its own dtype if kernels compare in that, else float32."""
    return "int32" if dtype(source) == "int32" else "float32"


def membership(step, levels, kind, channels):
    """Thresholds whose comparisons, xored, tell where a step function is at one of ``levels``.

    Returns
    -------
    (list of np.ndarray, np.ndarray)
        Thresholds t of the source's dtype (scalars or [C]; "source < t"), and bool [C]: channels whose result must be flipped. Both have
        more axes where they differ from pixel to pixel.
    """
    inside = np.isin(step.values + 0, np.asarray(levels).astype(step.values.dtype))
    occupied = step.occupied()
    inside = _spread(inside, occupied)
    changes = inside[..., 1:] != inside[..., :-1]
    thresholds = np.stack([threshold_values(step, k, kind) for k in range(changes.shape[-1])], -1) if changes.size else changes.astype(kind)
    # Channels change at different cuts (a negative scale reverses the levels): the j-th comparison takes each channel's j-th change.
    order = np.argsort(~changes, axis=-1, kind="stable")
    changes, thresholds = np.take_along_axis(changes, order, -1), np.take_along_axis(thresholds, order, -1)
    count = int(changes.sum(-1).max(initial=0))
    terms = [np.where(changes[..., j], thresholds[..., j], _never(kind)) for j in range(count)]
    flip = np.broadcast_to(inside[..., -1], (*inside.shape[:-2], channels) if inside.ndim > 1 else (channels,))
    same = np.all(flip == flip.reshape(-1, channels)[0])
    return [_narrow(t) for t in terms], flip.reshape(-1, channels)[0] if same else flip


def _spread(inside, occupied):
    """Give levels that no value reaches the membership of the level below (above, at the start), so that they cost no comparison."""
    out = inside.copy()
    for k in range(1, out.shape[-1]):
        out[..., k] = np.where(occupied[..., k], out[..., k], out[..., k - 1])
    for k in range(out.shape[-1] - 2, -1, -1):
        reached = occupied[..., : k + 1].any(-1)
        out[..., k] = np.where(reached, out[..., k], out[..., k + 1])
    return out


def _never(kind):
    """A threshold t for which ``x < t`` is never true."""
    return np.asarray(-np.inf, kind) if np.dtype(kind).kind == "f" else np.asarray(np.iinfo(kind).min, kind)


def _narrow(threshold):
    """Per-channel thresholds that are all equal are one scalar."""
    return threshold.reshape(-1)[0].reshape(()) if threshold.size and np.all(threshold == threshold.reshape(-1)[0]) else threshold


def group_words(flip, groups):
    """bool [C] -> the packed words of all groups side by side, uint32[groups * ceil(C / groups / 32)]."""
    return pack_bits(flip.reshape(groups, -1)).reshape(-1)


@tvm.transform.module_pass(opt_level=0, name="bnn.FoldThresholds")
class FoldThresholds:
    """See the module's documentation."""

    def transform_module(self, mod, _context):
        return _Fold().run(mod)
