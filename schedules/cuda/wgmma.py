"""Layers of bits on the tensor cores of warpgroups: ``wgmma`` on bits, which read both operands from shared memory (sm_90a).

A block has a warpgroup that brings slabs of K to shared memory, and one or two that multiply. The data come by ``cp.async``, chunk by
chunk, the weights, which lie in memory as they do in shared memory, by bulk copies. Stages of the ring are handed over by barriers in
shared memory: ``full`` once all has arrived, ``empty`` once it was multiplied. Blocks stay and take one tile after the other; slabs of
the next tile arrive while the results of the last one are stored.

Two ways to share the work:

* weights pass through the ring with the data; two warpgroups multiply 64 rows each of a tile of 128 (*together*), which halves the
  traffic of weights;
* all weights of a column tile stay in shared memory where they fit (*resident*): only data pass through the ring, blocks keep to one column
  tile, and the two warpgroups take 64 rows in turns, so that one multiplies while the other one stores its results.

Together, two blocks may form a *cluster*: they have neighbouring row tiles of one column tile, each brings half of every slab of weights,
and the copy engine writes it to both.

The first warpgroup also counts the bits of the data that it has copied, and hands the sums of rows over by barriers of their own.
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
        64 rows, or 128 unless weights are resident; 32 to 256 columns, a slab of 128 bytes; its layer has one product.
    cluster : int
        1 or, unless weights are resident, 2.
    """

    def __init__(self, shape, isa, name, cluster=1):
        self.cluster = cluster
        self.turns = 2 if shape.resident else 1  # warpgroups with tiles of their own
        self.groups = 2 if shape.resident else shape.rows // 64
        super().__init__(shape, (1 + self.groups) * GROUP, isa, name)
        self.pieces(1, shape.columns // 8, 16)
        # A stage is free when the next slab is multiplied, so that one must have been handed over before the stage is waited for.
        self.ahead = min(AHEAD, shape.stages - 2)
        self.steps = len(self.passes) * shape.slabs  # of a tile
        self.warp_column = simt.i32(0)

    # Shared memory: stages, resident weights, sums of rows for each turn, barriers

    @property
    def ring_words(self):
        """Words of the stages and of weights that stay behind them."""
        return self.shape.stages * self.shape.stage_words + (self.shape.tile_weight_words if self.shape.resident else 0)

    @property
    def barrier_words(self):
        """Where the barriers begin."""
        return self.ring_words + self.turns * self.shape.rows

    @property
    def shared_words(self):
        """Words of shared memory."""
        return self.barrier_words + 2 * len(self._arrivals())

    def _arrivals(self):
        """Arrivals that complete a phase of each barrier: full and empty of every stage, full and empty of sums, whose turn it is to
        multiply, full of every slab of resident weights."""
        stages, takers = self.shape.stages, self.groups * GROUP // self.turns
        emptied = takers if self.cluster == 1 else self.cluster * self.groups * 4  # then one lane of each warp speaks for it
        bringers = GROUP if self.shape.resident else GROUP + 1  # one more for the bulk copy
        ring, turns = [bringers] * stages + [emptied] * stages, self.turns
        return ring + [GROUP] * turns + [takers] * turns + [GROUP] * turns + [1] * self.weight_pieces

    def _barrier(self, first, number):
        return simt.pointer(self.memory, simt.i32(number) * 2 + (self.barrier_words + 2 * first))

    def _full(self, stage):
        return self._barrier(0, stage)

    def _empty(self, stage):
        return self._barrier(self.shape.stages, stage)

    def _sums_full(self, turn):
        return self._barrier(2 * self.shape.stages, turn)

    def _sums_empty(self, turn):
        return self._barrier(2 * self.shape.stages + self.turns, turn)

    def _turn(self, turn):
        return self._barrier(2 * self.shape.stages + 2 * self.turns, turn)

    def _weights_full(self, piece):
        return self._barrier(2 * self.shape.stages + 3 * self.turns, piece)

    @property
    def weight_pieces(self):
        """Slabs of resident weights."""
        return self.layer.weight_planes * self.shape.slabs if self.shape.resident else 0

    # Tiles

    def function(self):
        return simt.kernel(self.name, self.params, self._blocks(), self.threads, self._body, 1, self.cluster)

    def _blocks(self):
        """Blocks of the grid: no more than stay at once."""
        if self.shape.resident:
            return tirx.min(self.row_tiles(), simt.i32(self.isa.multiprocessors // self.column_tiles)) * self.column_tiles
        clusters = self.row_tiles(self.cluster) * self.column_tiles
        return tirx.min(clusters, simt.i32(self.isa.multiprocessors // self.cluster)) * self.cluster

    def _count(self, block):
        """How many tiles a block has."""
        if self.shape.resident:
            stride = self.isa.multiprocessors // self.column_tiles
            return simt.div(self.row_tiles() - simt.div(block, self.column_tiles) + (stride - 1), stride)
        stride, first = self.isa.multiprocessors // self.cluster, simt.div(block, self.cluster)
        return simt.div(self.row_tiles(self.cluster) * self.column_tiles - first + (stride - 1), stride)

    def _tile(self, named, block, number):
        """``(row tile, column tile)`` of tile ``number`` of a block."""
        if self.shape.resident:
            stride = self.isa.multiprocessors // self.column_tiles
            return simt.div(block, self.column_tiles) + number * stride, simt.mod(block, self.column_tiles)
        stride = self.isa.multiprocessors // self.cluster
        row_tile, column_tile = self.tile_of(named, simt.div(block, self.cluster) + number * stride, self.cluster)
        return row_tile * self.cluster + simt.mod(block, self.cluster), column_tile

    def _body(self, block, thread):
        body = []
        named = simt.namer(body)
        self.begin(named, body)
        self.memory, allocate = simt.shared(self.shared_words)
        body.append(allocate)
        self.lane, count = named("lane", simt.mod(thread, 32)), named("count", self._count(block))
        init = [simt.do("bnn_barrier_init", self._barrier(0, i), simt.i32(n)) for i, n in enumerate(self._arrivals())]
        init.append(simt.do("bnn_barrier_fence"))
        together = simt.do("bnn_cluster_sync") if self.cluster > 1 else simt.sync()
        self.rank = named("rank", simt.mod(block, self.cluster))
        body += [tirx.IfThenElse(tirx.EQ(thread, simt.i32(0)), tir.seq(init), None), together]
        fewer, more = ([simt.do(f"bnn_registers_{way}")] if self.groups == 2 else [] for way in ("dec56", "inc224"))
        producer = tir.seq(fewer, self._producer(block, thread, count))
        consumer = tir.seq(more, self._consumer(block, thread, count))
        body.append(simt.roles(thread < simt.i32(GROUP), producer, consumer, GROUP))
        return [*body, together] if self.cluster > 1 else body  # nobody writes to a block that has ended

    # Bringing

    def _producer(self, block, thread, count):
        """The slabs of all tiles, one after the other; each is handed over when it has arrived, ``ahead`` steps later."""
        body = []
        named = simt.namer(body)
        rows = self.rows_of_threads(named, thread, GROUP)
        tile, allocate = simt.registers("offset", 1, "int32")
        weights, allocate_weights = simt.registers("weights", 1, "int64")
        body += [*rows.allocate, allocate, allocate_weights]
        if self.shape.resident:
            body.append(tirx.IfThenElse(tirx.EQ(thread, simt.i32(0)), tir.seq(self._bring_weights(block)), None))
        total = named("total", count * self.steps)

        def step(i):
            bring = self._bring(rows, block, thread, i, tile, weights)
            hand_over = [simt.do(f"bnn_copy_wait{self.ahead}"), *self._hand_over(rows, i - self.ahead)]
            return [
                tirx.IfThenElse(i < total, tir.seq(bring), None),
                simt.do("bnn_copy_commit"),
                tirx.IfThenElse(i >= simt.i32(self.ahead), tir.seq(hand_over), None),
            ]

        body.append(simt.loop("step", total + self.ahead, step))
        return body

    def _bring(self, rows, block, thread, i, offset, weights):
        """Copy slab ``i`` of the block."""
        shape, body = self.shape, []
        named = simt.namer(body)
        step, stage = named("step", simt.mod(i, self.steps)), named("stage", simt.mod(i, shape.stages))
        first = []
        row_tile, column_tile = self._tile(simt.namer(first), block, simt.div(i, self.steps))
        first += rows.begin(row_tile)
        first += [simt.put(offset, 0, self.group_offset(column_tile)), simt.put(weights, 0, self.weight_base(column_tile))]
        body.append(tirx.IfThenElse(tirx.EQ(step, simt.i32(0)), tir.seq(first), None))
        wait = "bnn_barrier_wait" if self.cluster == 1 else "bnn_barrier_wait_cluster"
        body.append(simt.do(wait, self._empty(stage), simt.mod(simt.div(i, shape.stages) + 1, 2)))
        for number, one in enumerate(self.passes):
            slab, copy = step - number * shape.slabs, []
            rows.copy(simt.namer(copy), self.memory, self._planes[one.data], simt.at(offset, 0), slab, stage, "bnn_copy_async")
            if not shape.resident:
                copy += self._bring_slab(one, thread, slab, stage, weights)
            inside = tirx.And(slab >= simt.i32(0), slab < simt.i32(shape.slabs))
            body.append(tir.seq(copy) if len(self.passes) == 1 else tirx.IfThenElse(inside, tir.seq(copy), None))
        return body

    def _bring_slab(self, one, thread, slab, stage, weights):
        """The weights of a slab, by one thread."""
        shape = self.shape
        source = simt.at(weights, 0) + simt.wide(slab + one.weights * shape.slabs) * shape.packed_slab_words
        target = stage * shape.stage_words + shape.rows * shape.row_words
        if self.cluster > 1:
            half = self.rank * (shape.slab_weight_words // self.cluster)
            target, source = target + half, source + simt.wide(half)
        bulk = [simt.do("bnn_barrier_expect", self._full(stage), simt.i32(4 * shape.slab_weight_words)),
                self._bulk_copy(target, source, self._full(stage))]  # fmt: skip
        return [tirx.IfThenElse(tirx.EQ(thread, simt.i32(0)), tir.seq(bulk), None)]

    def _bulk_copy(self, target, source, barrier):
        """The weights of one slab."""
        to, since = simt.pointer(self.memory, target), simt.pointer(self.weights, source)
        name = "bnn_bulk_copy" if self.cluster == 1 else "bnn_bulk_copy_both"
        return simt.do(name, to, since, simt.i32(4 * self.shape.slab_weight_words // self.cluster), barrier)

    def _give_back(self, number):
        """The stage of slab ``number`` may be filled again."""
        barrier = self._empty(simt.mod(number, self.shape.stages))
        if self.cluster == 1:
            return simt.do("bnn_barrier_arrive", barrier)
        each = simt.do("bnn_barrier_arrive_other", barrier, self.lane)  # lane r of a warp tells block r
        return tirx.IfThenElse(self.lane < simt.i32(self.cluster), each, None)

    def _bring_weights(self, block):
        """All weights of the block's column tile."""
        shape, body = self.shape, []
        base = simt.namer(body)("weight_base", self.weight_base(simt.mod(block, self.column_tiles)))
        for piece in range(self.weight_pieces):
            target = shape.stages * shape.stage_words + piece * shape.slab_weight_words
            body.append(simt.do("bnn_barrier_expect", self._weights_full(piece), simt.i32(4 * shape.slab_weight_words)))
            body.append(self._bulk_copy(simt.i32(target), base + piece * shape.packed_slab_words, self._weights_full(piece)))
        return body

    def _hand_over(self, rows, i):
        """Slab ``i`` has arrived: count its bits, let it be multiplied; behind the last one of a tile give the sums of its rows."""
        body, shape = [], self.shape
        named = simt.namer(body)
        stage = named("stage", simt.mod(i, shape.stages))
        give = [simt.do("bnn_proxy_fence"), simt.do("bnn_barrier_arrive", self._full(stage))]
        if not self.counts_rows:
            return [*body, *give]
        step, tile = named("step", simt.mod(i, self.steps)), named("tile", simt.div(i, self.steps))
        body.append(tirx.IfThenElse(tirx.EQ(step, simt.i32(0)), tir.seq(rows.clear()), None))
        body += rows.count_bits(self.memory, stage, self._row_factor(named, step)) + give
        turn = simt.mod(tile, self.turns)
        sums = [
            simt.do("bnn_barrier_wait", self._sums_empty(turn), simt.mod(simt.div(tile, self.turns) + 1, 2)),
            *rows.publish(self.memory, turn * shape.rows + self.ring_words),
            simt.do("bnn_barrier_arrive", self._sums_full(turn)),
        ]
        return [*body, tirx.IfThenElse(tirx.EQ(step, simt.i32(self.steps - 1)), tir.seq(sums), None)]

    def _row_factor(self, named, step):
        """What the bits of a step's data count."""
        factors = [one.row_factor for one in self.passes]
        found = simt.i32(factors[-1])
        for number in reversed(range(len(factors) - 1)):
            found = tirx.Select(step < simt.i32((number + 1) * self.shape.slabs), simt.i32(factors[number]), found)
        return found if len(factors) == 1 else named("factor", found)

    # Multiplying

    def _consumer(self, block, thread, count):
        body, shape = [], self.shape
        named = simt.namer(body)
        group, warp = named("group", simt.div(thread, GROUP) - 1), simt.mod(simt.div(thread, 32), 4)
        turn, part = (group, simt.i32(0)) if self.turns == 2 else (simt.i32(0), group)
        self.warp_row = named("warp_row", part * 64 + warp * 16)
        self.sums_begin = named("sums_begin", turn * shape.rows + self.ring_words)
        body += self.allocate_sums()

        def tile(number):
            """The ``number``-th tile of the warpgroup."""
            inner = []
            named = simt.namer(inner)
            of_block = named("of_block", number * self.turns + turn)
            row_tile, column_tile = self._tile(named, block, of_block)
            self.tile_results(named, row_tile, column_tile)
            first = named("first", of_block * self.steps)
            # The other warpgroup's slabs come first: their barriers tell two phases apart, not three.
            wait = [simt.do("bnn_barrier_wait", self._turn(turn), simt.mod(number + 1 - turn, 2))] if self.turns == 2 else []
            inner += wait
            for index, one in enumerate(self.passes):
                last = index == len(self.passes) - 1
                inner += self._multiply_slabs(part, one.weights, first + index * shape.slabs, self._next_turn(turn) if last else [])
                inner += self.fold(one, index == 0)
            return inner + self._store(turn, number)

        own = named("own", simt.div(count - turn + (self.turns - 1), self.turns))
        body.append(simt.loop("tile", own, tile))
        return body

    def _next_turn(self, turn):
        """All products of the tile are under way: the other warpgroup may start its own."""
        return [simt.do("bnn_barrier_arrive", self._turn(simt.i32(1) - turn))] if self.turns == 2 else []

    def _multiply_slabs(self, part, plane, first, then):
        """The products of a pass, from slab ``first`` of the block on; a stage is given back when the next slab is being multiplied."""
        shape, body = self.shape, []
        whole, rest = divmod(shape.layer.taps * shape.layer.group_words * 4, shape.slab)
        if whole:
            step = shape.slab // STEP
            body.append(simt.loop("slab", whole, lambda slab: self._multiply(part, plane, step, first, slab), rolled=True))
        if rest:  # K does not fill the last slab
            body += self._multiply(part, plane, -(-rest // STEP), first, simt.i32(whole))
        last = first + (shape.slabs - 1)
        return [*body, *then, simt.do("bnn_wgmma_wait0"), self._give_back(last)]

    def _multiply(self, part, plane, steps, first, slab):
        shape, body = self.shape, []
        named = simt.namer(body)
        number = named("number", first + slab)
        stage = named("stage", simt.mod(number, shape.stages))
        parity = simt.mod(simt.div(number, shape.stages), 2)
        body.append(simt.do("bnn_barrier_wait", self._full(stage), parity))
        if shape.resident:  # at once, but for the first tile
            body.append(simt.do("bnn_barrier_wait", self._weights_full(slab + plane * shape.slabs), simt.i32(0)))
        body.append(simt.do("bnn_wgmma_fence"))
        base = named("base", stage * shape.stage_words)
        weights = base + shape.rows * shape.row_words
        if shape.resident:
            weights = named("weights", (slab + plane * shape.slabs) * shape.slab_weight_words + shape.stages * shape.stage_words)
        for k in range(steps):
            a = simt.pointer(self.memory, base + part * (64 * shape.row_words) + k * (STEP // 4))
            b = simt.pointer(self.memory, weights + k * (STEP // 4))
            add = simt.i32(1) if k else tirx.Cast("int32", slab > simt.i32(0))
            body.append(simt.do(f"bnn_wgmma{shape.columns}", simt.pointer(self.sums, 0), a, b, add))
        body.append(simt.do("bnn_wgmma_commit"))
        before = [simt.do("bnn_wgmma_wait1"), self._give_back(number - 1)]
        body.append(tirx.IfThenElse(slab > simt.i32(0), tir.seq(before), None))
        return body

    # Results

    def _store(self, turn, number):
        """Look the rows up, give their sums back, store."""
        body = [simt.do("bnn_barrier_wait", self._sums_full(turn), simt.mod(number, 2))] if self.counts_rows else []
        rows, statements = self.read_rows()
        body += statements
        if self.counts_rows:
            body.append(simt.do("bnn_barrier_arrive", self._sums_empty(turn)))
        return body + self.emit(rows)
