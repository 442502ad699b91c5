"""Products of two tensors that are both made at run time: attention, and weights that are an input of the network.

Both are taken apart into planes as activations are (:mod:`bnntvm.planes`), packed along the summed axis, and multiplied plane by plane:
for x = s * sum_i a_i X_i and y = t * sum_j b_j Y_j, x @ y = s * t * sum_ij a_i b_j (X_i @ Y_j). A convolution gathers the words under
its window first (im2col on bits); its padding is a level like any other then.

Part of :mod:`passes.binarise`.
"""

from __future__ import annotations

import numpy as np
from tvm import relax

from bnntvm import ops
from bnntvm.graph import const, dims, dtype, op_name, same_dims
from bnntvm.levels import Step
from bnntvm.planes import activation_planes

from .decision import Decision

#: More plane pairs than this cost more than float32 arithmetic.
MOST_PAIRS = 16


class RunTimeProduct:
    """One layer whose operands are both variables.

    Parameters
    ----------
    rewriter : passes.binarise._Binarise
        Where bindings go, and what is known about tensors.
    call : relax.Call
        ``bnn.matmul`` or ``bnn.conv``.
    """

    def __init__(self, rewriter, call):
        self.rewriter, self.call, self.emit = rewriter, call, rewriter.emit

    def matmul(self):
        """The product of tensors [..., M, K] and [..., K, N] (or [K, N]), or the reason why it stays float."""
        left, right = self.call.args
        a, b = dims(left), dims(right)
        if min(len(a), len(b)) < 2 or not all(isinstance(d, int) for d in (*a[-1:], *b[-2:])):
            return "both operands are activations of unknown size"
        if len(b) > 2 and not same_dims(a[:-2], b[:-2]):
            return "both operands are activations, and one of them is repeated"
        found = self.planes(left, right)
        if isinstance(found, str):
            return found
        rows = a[-2] if len(a) > 2 or isinstance(a[0], int) else 1
        if not isinstance(rows, int):
            return "both operands are activations of unknown size"
        batch = _product(a[:-2]) if len(a) > 2 or isinstance(a[0], int) else a[0]
        turned = self.turned(right)

        def packed_left(plane):
            return [self.emit(relax.op.reshape(w, [batch, rows, dims(w)[-1]])) for w in self.words(left, plane)]

        def packed_right(plane):
            words = [self.emit(relax.op.reshape(w, [_product(b[:-2]), *dims(w)[-2:]])) for w in self.words(turned, plane)]
            return [self.emit(relax.op.permute_dims(w, [0, 2, 1])) for w in words]

        out = self.total(*found, packed_left, packed_right, a[-1])
        return self.emit(relax.op.reshape(out, [*a[:-1], b[-1]]))

    def turned(self, var):
        """A tensor with its last two axes exchanged: what it was before, where it is made by such an exchange (keys of attention)."""
        rank = len(dims(var))
        order = [*range(rank - 2), rank - 1, rank - 2]
        made = self.rewriter.builder.lookup_binding(var) if isinstance(var, relax.Var) else None
        if op_name(made) == "relax.permute_dims" and made.attrs["axes"] is not None and [int(a) for a in made.attrs["axes"]] == order:
            return made.args[0]
        return self.emit(relax.op.permute_dims(var, order))

    def convolution(self):
        """A two-dimensional convolution with weights [O, C, kh, kw], or the reason why it stays float."""
        data, weight = self.call.args
        attrs = {key: [int(v) for v in self.call.attrs[key]] for key in ("strides", "pads", "dilations")}
        if str(self.call.attrs["layout"]) != "NCHW" or len(dims(weight)) != 4 or int(self.call.attrs["groups"]) != 1:
            return "the weights are not constant"
        if not all(isinstance(d, int) for d in (*dims(data)[1:], *dims(weight))):
            return "the weights are not constant"
        if isinstance(found := self.planes(data, weight), str):
            return found
        image = self.emit(relax.op.permute_dims(data, [0, 2, 3, 1]))
        if any(attrs["pads"]):
            top, left, bottom, right = attrs["pads"]
            image = self.emit(relax.op.nn.pad(image, [0, 0, top, bottom, left, right, 0, 0], "constant", 0.0))
        if isinstance(found := self.planes(image, weight), str):
            return found
        outputs, channels, height, width = dims(weight)
        kernels = self.emit(relax.op.permute_dims(weight, [0, 2, 3, 1]))
        shape = self.out_shape(dims(image), (height, width), attrs)

        def packed_left(plane):
            return [self.windows(w, (height, width), shape, attrs) for w in self.words(image, plane)]

        def packed_right(plane):
            flat = [self.emit(relax.op.reshape(w, [1, outputs, height * width * dims(w)[-1]])) for w in self.words(kernels, plane)]
            return [self.emit(relax.op.permute_dims(w, [0, 2, 1])) for w in flat]

        out = self.total(*found, packed_left, packed_right, channels * height * width)
        out = self.emit(relax.op.reshape(out, [dims(data)[0], *shape, outputs]))
        return self.emit(relax.op.permute_dims(out, [0, 3, 1, 2]))

    def out_shape(self, shape, kernel, attrs):
        sizes = zip(shape[1:3], kernel, attrs["strides"], attrs["dilations"])
        return [ops.conv_out_dim(size, k, stride, 0, 0, dilation) for size, k, stride, dilation in sizes]

    def windows(self, words, kernel, out, attrs):
        """Words [N, H, W, Cw] -> the words under every window, [N, OH * OW, kh * kw * Cw]."""
        taps = []
        for r in range(kernel[0]):
            for s in range(kernel[1]):
                begin = [r * attrs["dilations"][0], s * attrs["dilations"][1]]
                end = [b + (o - 1) * stride + 1 for b, o, stride in zip(begin, out, attrs["strides"])]
                taps.append(self.emit(relax.op.strided_slice(words, [1, 2], begin, end, attrs["strides"])))
        joined = self.emit(relax.op.concat(taps, 3)) if len(taps) > 1 else taps[0]
        return self.emit(relax.op.reshape(joined, [dims(words)[0], out[0] * out[1], dims(joined)[-1]]))

    def planes(self, left, right):
        """Planes of both operands, or the reason why one has none."""
        found = []
        for data in (left, right):
            fact = self.rewriter.analysis.facts.get(data)
            if dtype(data) != "float32" or not isinstance(fact, Step):
                return "both operands are activations, and one of them is real-valued"
            planes = activation_planes(fact.levels(), self.rewriter.assume_nonzero)
            if isinstance(planes, str):
                return planes
            found.append(planes)
        pairs = len(found[0].planes) * len(found[1].planes)
        return found if pairs <= MOST_PAIRS else f"{pairs} pairs of planes are more work than float arithmetic"

    def words(self, data, plane):
        """The packed plane of a tensor, and the one of its zeros where it has them."""
        return self.rewriter.encode(data, plane, 1)

    def total(self, left, right, packed_left, packed_right, features):
        """The sum over plane pairs, float32 [B, M, N]."""
        layer = str(self.call.attrs["layer"])
        pairs = [(a, b) for a in left.planes for b in right.planes]
        kind = "binary" if len(pairs) == 1 else "bitserial"
        self.rewriter.decisions[layer] = Decision(kind, "both operands are packed at run time", f"{left.count}x{right.count}")
        words = {(0, a): packed_left(a) for a in left.planes} | {(1, b): packed_right(b) for b in right.planes}
        terms = []
        for a, b in pairs:
            step = 2 if _kind(a) == _kind(b) == "bipolar" else 1
            attrs = dict(layer=layer, features=features, left=_kind(a), right=_kind(b), reachable=[-features, features, step], scale=[])
            terms.append((a.coefficient * b.coefficient, self.emit(ops.call(ops.MATMUL_BITS, words[0, a] + words[1, b], **attrs))))
        scale = np.float32(left.scale) * np.float32(right.scale)
        sums = self.rewriter.integer_or_float_sum(terms)
        return sums if scale == 1 else self.emit(relax.op.multiply(sums, const(scale)))


def _kind(plane):
    return "unipolar" if plane.unipolar else "ternary" if plane.zeros else "bipolar"


def _product(shape):
    """The number of elements of a tensor of this shape."""
    out = 1
    for d in shape:
        out = out * d
    return out
