"""Float layers on the tensor cores of warpgroups: ``wgmma`` on tf32, data from registers, weights from shared memory (sm_90a).

The kernel of :mod:`.tf32`, all of whose weights stay in shared memory; a warpgroup has 64 pixels, each of its warps 16 of them, and all
channels of the block. Data are gathered and split in registers, as there. Products of two steps, 16 elements of K, are one asynchronous
group: while tensor cores work on it, the next two steps' data are read and split, and the sums of the group before are added. So there are
two of everything that a group uses, and sums begin at 0 in each group.

What a group uses is tied to the wait for it: nothing may read its sums, or write to its data, before.
"""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules.cuda import epilogue as tail
from bnntvm.schedules.cuda import functions, simt
from bnntvm.schedules.cuda.tf32 import SLAB, STEP, Kernel

TOGETHER = functions.TOGETHER  #: steps of a group
_RUN = 8  # groups of a run, where there are more than two runs


class GroupKernel(Kernel):
    """Writes one kernel; parameters as of :class:`.tf32.Kernel`."""

    def __init__(self, *args):
        super().__init__(*args)
        self.sums_of_thread = self.layout.channels // 2

    def _registers(self):
        self.sums, allocate_sums = simt.registers("sums", self.sums_of_thread, "float32")
        found = [allocate_sums]
        self.parts, self.data = [], []
        for number in range(2):
            part, allocate = simt.registers(f"part_{number}", self.sums_of_thread, "float32")
            data, allocate_data = simt.registers(f"data_{number}", 8 * TOGETHER, "uint32")
            self.parts.append(part)
            self.data.append(data)
            found += [allocate, allocate_data]
        return found

    def _who(self, bind, block, thread):
        """A warpgroup is a row of the block; its warp is a quarter of the 64 pixels."""
        self.thread = thread
        self.lane = bind("lane", tirx.bitwise_and(thread, simt.i32(31)))
        self.group, self.quad = bind("group", simt.div(self.lane, 4)), bind("quad", tirx.bitwise_and(self.lane, simt.i32(3)))
        self.warp_row, self.warp_word = bind("warp_row", simt.div(thread, 128)), simt.i32(0)
        self.quarter = bind("quarter", simt.mod(simt.div(thread, 32), 4))
        self.first_word = bind("first_word", simt.mod(block, self.channel_blocks) * self.schedule.warps[1])

    def _start(self):
        """Tensor cores see what was written to shared memory behind a fence only."""
        first = super()._start()
        return [*first, simt.do("bnn_copy_wait0"), simt.do("bnn_proxy_fence"), simt.sync()]

    def _fragment_places(self, named):
        """Where in the patch a lane's first pixel lies, and how far the second one is; channels last its row of four 8 x 4 matrices."""
        layout, shape = self.layout, self.schedule.shape
        base, offsets = self._patch_places(named)
        far = offsets[1] - offsets[0]
        if self.problem.pointwise:
            own = self.quarter * 16
        else:
            down = layout.columns * self.problem.window.strides[0]
            own = simt.div(self.quarter * 16, shape[1]) * down
            own = own + simt.mod(self.quarter * 16, shape[1]) * self.problem.window.strides[1]
        base = base + own
        if not layout.together:
            self.patch_base, self.offsets = named("row", base), [0, far]
            return
        row, half = simt.mod(self.lane, 8), simt.mod(simt.div(self.lane, 8), 2)
        step = 1 if self.problem.pointwise else self.problem.window.strides[1]
        base = base + (row - self.group) * step + half * far
        self.patch_base = named("row", base * layout.pitch + simt.div(self.lane, 16) * 4)

    # Products

    def _multiply_chunk(self, named, patch, weights):
        """Runs of groups. The compiler keeps products asynchronous in code without jumps only, so nothing is under way between runs."""
        steps, first = self.layout.steps, patch + self.patch_base
        longest = _RUN * TOGETHER
        longest = steps if steps <= 2 * longest else longest
        whole, rest = divmod(steps, longest)
        body = [simt.loop("run", whole, lambda run: self._run(run * longest, longest, first, weights), rolled=True)]
        return body + (self._run(simt.i32(whole * longest), rest, first, weights) if rest else [])

    def _run(self, number, steps, first, weights):
        """Groups by turns, the sums of each added while the next one is under way."""
        body, groups = [], -(-steps // TOGETHER)
        for i in range(groups):
            count = min(TOGETHER, steps - i * TOGETHER)
            body += self._group(i % 2, number + i * TOGETHER, count, first, weights)
            body += self._add((i - 1) % 2, 1) if i else []
        return [*body, *self._add((groups - 1) % 2, 0)]

    def _group(self, which, number, count, first, weights):
        """Read and split the data of ``count`` steps from ``number`` on, and multiply."""
        layout, body = self.layout, []
        named = simt.namer(body)
        part, data = self.parts[which], self.data[which]
        for i in range(count):
            k = named("k", number + i)
            if layout.together:
                where = simt.pointer(self.shared, first + self._far(named, k))
                body.append(simt.do("bnn_load_matrices", simt.pointer(data, 8 * i), where))
            else:
                statements, places = self._places_of_elements(first, k)
                body += statements
                for h in (0, 1):
                    for q in (0, 1):
                        body.append(simt.put(data, 8 * i + 2 * h + q, simt.at(self.shared, places[h] + self.offsets[q])))
            body.append(simt.do("bnn_split_tf32", simt.pointer(data, 8 * i)))
        body.append(simt.do("bnn_wgmma_fence"))
        for i in range(count):
            k = number + i
            at = simt.div(k, SLAB // STEP) * (SLAB * layout.channels) + simt.mod(k, SLAB // STEP) * STEP
            at = named("at", weights + at)
            for first_word, rest in ((4, 0), (0, 1), (0, 0)):
                operands = simt.pointer(data, 8 * i + first_word), simt.pointer(self.shared, at + rest * layout.part_weights)
                add = simt.i32(int(i > 0 or first_word == 0))
                body.append(simt.do(f"bnn_wgmma_tf32_{layout.channels}", simt.pointer(part, 0), *operands, add))
        body.append(simt.do("bnn_wgmma_commit"))
        return body

    def _far(self, named, k):
        """How far from its first pixel the data of a step lie, channels last."""
        layout, window, parts = self.layout, self.problem.window, self.schedule.units // STEP
        tap, u = named("tap", simt.div(k, parts)), simt.mod(k, parts)
        down, across = (d * layout.pitch for d in (window.dilations[0] * layout.columns, window.dilations[1]))
        far = simt.div(tap, window.kernel[1]) * down + simt.mod(tap, window.kernel[1]) * across
        return far + u * STEP

    def _add(self, which, left):
        """Wait until only the last ``left`` groups are under way, and add the sums of that group."""
        part = self.parts[which]
        wait = simt.do(f"bnn_wait_tf32_{self.layout.channels}_{left}", simt.pointer(part, 0), simt.pointer(self.data[which], 0))
        add = [
            simt.put(self.sums, i, simt.call("bnn_add", simt.at(self.sums, i), simt.at(part, i), dtype="float32"))
            for i in range(self.sums_of_thread)
        ]
        return [wait, *add]

    # Results

    def _of_sum(self, number):
        pixel = self.quarter * 2 + simt.mod(simt.div(number, 2), 2)
        return pixel, self.quad * 2 + simt.div(number, 4) * 8 + simt.mod(number, 2)

    def _weight(self, chunk, k, channel):
        layout = self.layout
        begin = simt.wide(self.block * layout.chunks + chunk) * layout.chunk_weights
        inside, sixteen = simt.mod(k, SLAB), simt.div(simt.mod(k, SLAB), 4)
        place = tirx.bitwise_xor(sixteen, simt.mod(channel, 8)) * 4 + simt.mod(inside, 4)
        row = simt.div(k, SLAB) * layout.channels + channel
        return begin + simt.wide(row * SLAB + place), layout.part_weights

    def _finish(self):
        body = []
        named = simt.namer(body)
        partial = self.problem.words % self.schedule.warps[1]
        for w in range(self.schedule.warps[1]):
            word = named("word", self.first_word + w)
            exists = word < self.problem.words if partial else None
            scope = {}
            for half in range(2):
                statements, pixel = self._pixel(self.quarter * 2 + half)
                places = [(16 * w + 4 * j + 2 * half + e, 8 * j + e) for j in range(4) for e in (0, 1)]
                values = [tail.Value(simt.at(self.sums, number), self.quad * 2, place) for number, place in places]
                body += [*statements, *self.emitter.emit(values, pixel, word, tail.Quad(self.lane), scope, exists)]
        return body
