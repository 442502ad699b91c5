"""Product of two packed run-time tensors (:class:`bnntvm.spec.BinaryMatmul`) on a GPU: tensor cores (:mod:`.products`) or CUDA cores.

Tensor cores take the right operand column by column (``turned``). On CUDA cores a warp computes some rows of 32 columns: where the words of
the right operand of neighbouring columns lie side by side they are read together, those of the left one are the same in all lanes.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.binary_matmul import _counts, _masks, planes, reference
from bnntvm.schedules.cuda import layers, simt
from bnntvm.schedules.cuda.layers import CORES, Schedule

__all__ = ["Schedule", "build", "default_schedule", "reference", "space", "takes_turned"]

WARPS = 4


def takes_turned(spec, isa):
    """Whether the right operand is wanted column by column: by tensor cores."""
    return layers.default_schedule(replace(spec, turned=True), isa).engine != CORES


def default_schedule(spec, isa):
    """Tensor cores where they take it; else as many rows of a warp as there are, up to four."""
    found = layers.default_schedule(spec, isa)
    return found if found.engine != CORES else Schedule(CORES, min(spec.rows, 4))


def space(spec, isa):
    """Tiles of tensor cores; on CUDA cores one to eight rows."""
    on_cores = [Schedule(CORES, min(spec.rows, 4)), *(Schedule(CORES, rows) for rows in (1, 2, 8) if rows <= spec.rows)]
    on_tensor_cores = [s for s in layers.space(spec, isa) if s.engine != CORES]
    return list(dict.fromkeys([*on_tensor_cores, *on_cores]))


def build(spec, schedule, isa):
    """The kernel: parameters as of its namesake for processors."""
    if schedule.engine != CORES:
        return layers.build(spec, schedule, isa, "binary_matmul")
    return _Kernel(spec, schedule).function()


class _Kernel:
    def __init__(self, spec, schedule):
        self.spec, self.rows, self.batch = spec, schedule.rows, tirx.Var("b", "int64")
        self.left = [tir.buffer(f"x{i}", (self.batch, spec.rows, spec.words), "uint32") for i in range(planes(spec.left))]
        shared = 1 if spec.shared else self.batch
        shape = (shared, spec.columns, spec.words) if spec.turned else (shared, spec.words, spec.columns)
        self.right = [tir.buffer(f"w{i}", shape, "uint32") for i in range(planes(spec.right))]
        self.out = tir.buffer("y", (self.batch, spec.rows, spec.columns), "int32" if spec.scale is None else "float32")
        self.column_blocks, self.row_blocks = -(-spec.columns // 32), -(-spec.rows // (schedule.rows * WARPS))

    def function(self):
        blocks = simt.i32(self.batch) * (self.row_blocks * self.column_blocks)
        return simt.kernel("binary_matmul", [*self.left, *self.right, self.out], blocks, WARPS * simt.WARP, self._body)

    def _body(self, block, thread):
        spec, body = self.spec, []

        def named(name, value):
            variable, statement = simt.bind(name, value)
            body.append(statement)
            return variable

        flats = [simt.flat(array) for array in (*self.left, *self.right, self.out)]
        body += [statement for _, statement in flats]
        arrays = [array for array, _ in flats]
        left, right, out = arrays[: len(self.left)], arrays[len(self.left) : -1], arrays[-1]
        column = named("column", simt.mod(block, self.column_blocks) * 32 + simt.mod(thread, 32))
        rest = named("rest", simt.div(block, self.column_blocks))
        image = named("image", simt.div(rest, self.row_blocks))
        first = named("first", (simt.mod(rest, self.row_blocks) * WARPS + simt.div(thread, 32)) * self.rows)
        there = named("there", column < simt.i32(spec.columns))
        used = [simt.registers(f"count{i}", self.rows, "int32") for i in range(2) if _counts(spec)[i]]
        body += [statement for _, statement in used]
        counts = [array for array, _ in used]
        body += [simt.put(array, i, simt.i32(0)) for array in counts for i in range(self.rows)]
        exist = [named("exists", tirx.And(there, first + i < simt.i32(spec.rows))) for i in range(self.rows)]

        def step(k):
            row, place, width = (column, k, spec.words) if spec.turned else (k, column, spec.columns)
            row = simt.wide(row) if spec.shared else simt.wide(image) * (spec.words * spec.columns // width) + simt.wide(row)
            inner, from_right = [], []
            for array in right:
                word = tirx.if_then_else(there, simt.at(array, row * width + simt.wide(place)), simt.u32(0))
                word, statement = simt.bind("w", word)
                from_right.append(word)
                inner.append(statement)
            for i in range(self.rows):
                row = simt.wide(image) * spec.rows + simt.wide(first + i)
                words = []
                for array in left:
                    word = tirx.if_then_else(exist[i], simt.at(array, row * spec.words + simt.wide(k)), simt.u32(0))
                    word, statement = simt.bind("a", word)
                    words.append(word)
                    inner.append(statement)
                found = [m for m in _masks(spec, words, from_right) if m is not None]
                for array, mask in zip(counts, found):
                    inner.append(simt.put(array, i, simt.at(array, i) + tirx.Cast("int32", tirx.popcount(mask))))
            return inner

        body.append(simt.loop("k", spec.words, step))
        for i in range(self.rows):
            row = simt.wide(image) * spec.rows + simt.wide(first + i)
            value = self._result([simt.at(array, i) for array in counts])
            store = simt.put(out, row * spec.columns + simt.wide(column), value)
            body.append(tirx.IfThenElse(exist[i], store, None))
        return body

    def _result(self, counts):
        """The dot product, scaled, from what was counted."""
        spec = self.spec
        if "unipolar" in (spec.left, spec.right):
            total = counts[0] if len(counts) == 1 else counts[0] - counts[1] * 2
        else:
            present = simt.i32(spec.features) - counts[0] if len(counts) == 2 else simt.i32(spec.features)
            total = present - counts[-1] * 2
        if spec.scale is None:
            return total
        value = tirx.Cast("float32", total)
        return value if spec.scale == 1 else simt.call("bnn_mul", value, tir.constant(spec.scale, "float32"))
