"""Layers of bits on the tensor cores of warpgroups: ``wgmma`` on bits, which read both operands from shared memory (sm_90a).

A block has three warpgroups. The first one brings slabs of K to shared memory: the data by ``cp.async``, chunk by chunk, the weights, which
lie in memory as they do in shared memory, by one bulk copy. The others multiply, 64 rows of the tile each. Stages of the ring are handed over
by barriers in shared memory: ``full`` once all has arrived, ``empty`` once it was multiplied. Blocks stay and take one tile after the other,
so that the next tile arrives while the results of the last one are stored.

Where the weights of a column tile fit beside the stages they stay: blocks keep to one column tile, and only data pass through the ring.

The first warpgroup also counts the bits of the data that it has copied, and hands the sums of rows over by a third pair of barriers.
"""

from __future__ import annotations

from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.schedules.cuda import simt
from bnntvm.schedules.cuda.fragments import FragmentKernel

GROUP = 128
#: Most slabs that are under way before the oldest one is waited for.
AHEAD = 4
STEP = 32  # bytes of K of a product


class WgmmaKernel(FragmentKernel):
    """The kernel.

    Parameters
    ----------
    shape : tiles.Shape
        64 or 128 rows, 32 to 256 columns, a slab of 128 bytes; its layer has one product.
    """

    def __init__(self, shape, isa, name):
        self.groups = shape.rows // 64
        super().__init__(shape, (1 + self.groups) * GROUP, isa, name)
        self.pieces(1, shape.columns // 8, 16)
        # A stage is free when the next slab is multiplied, so that one must have been handed over before the stage is waited for.
        self.ahead = min(AHEAD, shape.stages - 2)
        self.warp_column = simt.i32(0)

    @property
    def resident_words(self):
        """Words of the weights that stay, in front of which are the stages."""
        return self.shape.tile_weight_words if self.shape.resident else 0

    @property
    def ring_words(self):
        """Words of the stages and of weights that stay."""
        return self.shape.stages * self.shape.stage_words + self.resident_words

    @property
    def barrier_words(self):
        """Where the barriers begin: full and empty of every stage, full and empty of the sums of rows, full of the weights that stay."""
        return self.ring_words + self.shape.rows

    @property
    def shared_words(self):
        """Words of shared memory."""
        return self.barrier_words + 4 * self.shape.stages + 6

    def _barrier(self, number):
        return simt.pointer(self.memory, simt.i32(number) * 2 + self.barrier_words)

    def _full(self, stage):
        return self._barrier(stage)

    def _empty(self, stage):
        return self._barrier(stage + self.shape.stages)

    @property
    def _rows_full(self):
        return self._barrier(2 * self.shape.stages)

    @property
    def _rows_empty(self):
        return self._barrier(2 * self.shape.stages + 1)

    @property
    def _weights_full(self):
        return self._barrier(2 * self.shape.stages + 2)

    def function(self):
        return simt.kernel(self.name, self.params, self._blocks(), self.threads, self._body, 1)

    def _blocks(self):
        """Blocks of the grid: no more than stay at once."""
        if self.shape.resident:
            return tirx.min(self.row_tiles(), simt.i32(self.isa.multiprocessors // self.column_tiles)) * self.column_tiles
        return tirx.min(self.row_tiles() * self.column_tiles, simt.i32(self.isa.multiprocessors))

    def _schedule(self, named, block):
        """How many tiles a block has."""
        if self.shape.resident:
            self.stride, first = self.isa.multiprocessors // self.column_tiles, simt.div(block, self.column_tiles)
            return named("count", simt.div(self.row_tiles() - first + (self.stride - 1), self.stride))
        self.stride = self.isa.multiprocessors
        return named("count", simt.div(self.row_tiles() * self.column_tiles - block + (self.stride - 1), self.stride))

    def _tile(self, named, block, number):
        """``(row tile, column tile)`` of tile ``number`` of a block."""
        if self.shape.resident:
            return simt.div(block, self.column_tiles) + number * self.stride, simt.mod(block, self.column_tiles)
        return self.tile_of(named, block + number * self.stride)

    def _body(self, block, thread):
        body = []
        named = simt.namer(body)
        self.begin(named, body)
        self.memory, allocate = simt.shared(self.shared_words)
        body.append(allocate)
        self.lane = named("lane", simt.mod(thread, 32))
        count = self._schedule(named, block)
        body += [tirx.IfThenElse(tirx.EQ(thread, simt.i32(0)), tir.seq(self._init()), None), simt.sync()]
        fewer, more = ([simt.do(f"bnn_registers_{way}")] if self.groups == 2 else [] for way in ("dec56", "inc224"))
        producer = tir.seq(fewer, self._producer(block, thread, count))
        consumer = tir.seq(more, self._consumer(block, thread, count))
        body.append(simt.roles(thread < simt.i32(GROUP), producer, consumer))
        return body

    def _init(self):
        stages = self.shape.stages
        arrivals = GROUP if self.shape.resident else GROUP + 1
        counts = [arrivals] * stages + [self.groups * GROUP] * stages + [GROUP, self.groups * GROUP, 1]
        return [*(simt.do("bnn_barrier_init", self._barrier(i), simt.i32(count)) for i, count in enumerate(counts)),
                simt.do("bnn_barrier_fence")]  # fmt: skip

    # Bringing

    def _producer(self, block, thread, count):
        """Copies of all tiles; what was copied is handed over ``ahead`` slabs later, when it has arrived."""
        body = []
        self.state, allocate = simt.registers("state", 2, "int32")  # slabs that were copied, and handed over, so far
        body += [allocate, simt.put(self.state, 0, simt.i32(0)), simt.put(self.state, 1, simt.i32(0))]
        if self.shape.resident:
            body.append(tirx.IfThenElse(tirx.EQ(thread, simt.i32(0)), tir.seq(self._bring_weights(block)), None))

        def tile(number):
            inner = []
            named = simt.namer(inner)
            row_tile, column_tile = self._tile(named, block, number)
            self.tile_operands(named, column_tile)
            rows = self.rows_of_threads(named, thread, GROUP, row_tile)
            inner += rows.allocate + rows.clear()
            for one in self.passes:
                inner += rows.clear_counts(one)
                steps = self.shape.slabs + self.ahead
                inner.append(simt.loop("slab", steps, lambda slab, one=one: self._step(rows, one, thread, slab), rolled=True))
                inner += rows.add_counts(one)
            if self.counts_rows:
                inner.append(simt.do("bnn_barrier_wait", self._rows_empty, simt.mod(number + 1, 2)))
                inner += rows.publish(self.memory, self.ring_words)
                inner.append(simt.do("bnn_barrier_arrive", self._rows_full))
            return inner

        body.append(simt.loop("tile", count, tile))
        return body

    def _step(self, rows, one, thread, slab):
        """Copy one slab, if there is another one, and hand over the one that was copied ``ahead`` steps before."""
        new, old = slab < simt.i32(self.shape.slabs), slab >= simt.i32(self.ahead)
        hand_over = [simt.do(f"bnn_copy_wait{self.ahead}"), *self._hand_over(rows, one)]
        return [
            tirx.IfThenElse(new, tir.seq(self._bring(rows, one, thread, slab)), None),
            simt.do("bnn_copy_commit"),
            tirx.IfThenElse(old, tir.seq(hand_over), None),
        ]

    def _bring(self, rows, one, thread, slab):
        """Copy one slab."""
        shape, body = self.shape, []
        named = simt.namer(body)
        number = named("number", simt.at(self.state, 0))
        stage = named("stage", simt.mod(number, shape.stages))
        turn = named("turn", simt.div(number, shape.stages))
        body.append(simt.do("bnn_barrier_wait", self._empty(stage), simt.mod(turn + 1, 2)))
        rows.copy(named, self.memory, self._planes[one.data], self.offset, slab, stage, "bnn_copy_async")
        if not shape.resident:
            source = self.weight_base + simt.wide(slab + one.weights * shape.slabs) * shape.slab_weight_words
            target = stage * shape.stage_words + shape.rows * shape.row_words
            bulk = [simt.do("bnn_barrier_expect", self._full(stage), simt.i32(4 * shape.slab_weight_words)),
                    self._bulk_copy(target, source, self._full(stage))]  # fmt: skip
            body.append(tirx.IfThenElse(tirx.EQ(thread, simt.i32(0)), tir.seq(bulk), None))
        return [*body, simt.put(self.state, 0, number + 1)]

    def _bulk_copy(self, target, source, barrier):
        """The weights of one slab."""
        to, since = simt.pointer(self.memory, target), simt.pointer(self.weights, source)
        return simt.do("bnn_bulk_copy", to, since, simt.i32(4 * self.shape.slab_weight_words), barrier)

    def _bring_weights(self, block):
        """All weights of the block's column tile."""
        shape, body = self.shape, []
        base = simt.namer(body)("weight_base", simt.wide(simt.mod(block, self.column_tiles)) * shape.tile_weight_words)
        body.append(simt.do("bnn_barrier_expect", self._weights_full, simt.i32(4 * shape.tile_weight_words)))
        for piece in range(shape.tile_weight_words // shape.slab_weight_words):
            target = shape.stages * shape.stage_words + piece * shape.slab_weight_words
            body.append(self._bulk_copy(simt.i32(target), base + piece * shape.slab_weight_words, self._weights_full))
        return body

    def _hand_over(self, rows, one):
        """A slab has arrived: count its bits, and let it be multiplied."""
        body = []
        named = simt.namer(body)
        number = named("number", simt.at(self.state, 1))
        stage = named("stage", simt.mod(number, self.shape.stages))
        body += rows.count_bits(self.memory, stage, one)
        body += [simt.do("bnn_proxy_fence"), simt.do("bnn_barrier_arrive", self._full(stage))]
        return [*body, simt.put(self.state, 1, number + 1)]

    # Multiplying

    def _consumer(self, block, thread, count):
        body, shape = [], self.shape
        named = simt.namer(body)
        group = named("group", simt.div(thread, GROUP) - 1)
        self.warp_row = named("warp_row", group * 64 + simt.mod(simt.div(thread, 32), 4) * 16)
        self.state, allocate = simt.registers("taken", 1, "int32")
        body += [allocate, simt.put(self.state, 0, simt.i32(0))]
        body += self.allocate_sums()
        if shape.resident:
            body.append(simt.do("bnn_barrier_wait", self._weights_full, simt.i32(0)))
        whole, rest = divmod(shape.layer.taps * shape.layer.group_words * 4, shape.slab)
        rest = -(-rest // STEP)  # steps of the last slab, which K does not fill

        def tile(number):
            inner = []
            named = simt.namer(inner)
            row_tile, column_tile = self._tile(named, block, number)
            self.tile_results(named, row_tile, column_tile)
            for index, one in enumerate(self.passes):
                inner += self._multiply_slabs(group, one.weights, whole, rest)
                inner += self.fold(one, index == 0)
            return inner + self._store(number)

        body.append(simt.loop("tile", count, tile))
        return body

    def _multiply_slabs(self, group, plane, whole, rest):
        """The products of a pass; a stage is given back when the products of the next slab are under way."""
        steps, body = self.shape.slab // STEP, []
        if whole:
            body.append(simt.loop("slab", whole, lambda slab: self._multiply(group, plane, steps, slab), rolled=True))
        if rest:
            body += self._multiply(group, plane, rest, simt.i32(whole))
        body.append(simt.do("bnn_wgmma_wait0"))
        last = simt.at(self.state, 0) - 1
        body.append(simt.do("bnn_barrier_arrive", self._empty(simt.mod(last, self.shape.stages))))
        return body

    def _multiply(self, group, plane, steps, slab):
        shape, body = self.shape, []
        named = simt.namer(body)
        number = named("number", simt.at(self.state, 0))
        stage, turn = named("stage", simt.mod(number, shape.stages)), simt.div(number, shape.stages)
        body += [simt.do("bnn_barrier_wait", self._full(stage), simt.mod(turn, 2)), simt.do("bnn_wgmma_fence")]
        base = named("base", stage * shape.stage_words)
        weights = base + shape.rows * shape.row_words
        if shape.resident:
            weights = named("weights", (slab + plane * shape.slabs) * shape.slab_weight_words + shape.stages * shape.stage_words)
        for k in range(steps):
            a = simt.pointer(self.memory, base + group * (64 * shape.row_words) + k * (STEP // 4))
            b = simt.pointer(self.memory, weights + k * (STEP // 4))
            add = simt.i32(1) if k else tirx.Cast("int32", slab > simt.i32(0))
            body.append(simt.do(f"bnn_wgmma{shape.columns}", simt.pointer(self.sums, 0), a, b, add))
        body.append(simt.do("bnn_wgmma_commit"))
        before = [simt.do("bnn_wgmma_wait1"), simt.do("bnn_barrier_arrive", self._empty(simt.mod(number - 1, shape.stages)))]
        body.append(tirx.IfThenElse(slab > simt.i32(0), tir.seq(before), None))
        body.append(simt.put(self.state, 0, number + 1))
        return body

    # Results

    def _store(self, number):
        """Look the rows up, give their sums back, store."""
        body = [simt.do("bnn_barrier_wait", self._rows_full, simt.mod(number, 2))] if self.counts_rows else []
        rows, statements = self.read_rows()
        body += statements
        if self.counts_rows:
            body.append(simt.do("bnn_barrier_arrive", self._rows_empty))
        return body + self.emit(rows)
