"""What the families of layers of bits share on a GPU: their schedules, and which kernel one means."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bnntvm.schedules.cuda import cores, mma, parts, products, simt, tiles, wgmma
from bnntvm.schedules.cuda.layer import Layer
from bnntvm.spec import WORKSPACE

CORES, MMA, WGMMA = "cores", "mma", "wgmma"


@dataclass(frozen=True)
class Schedule:
    """What may be tuned.

    Attributes
    ----------
    engine : str
        ``cores``: population counts, see :mod:`.cores`; ``mma``: tensor cores of single warps, see :mod:`.mma`;
        ``wgmma``: of warpgroups, see :mod:`.wgmma`.
    rows, columns : int
        Pixels and output channels of a block's tile; on CUDA cores pixels of a warp.
    warp_rows, warp_columns : int
        Of a warp's tile.
    slab : int
        Bytes of K in a stage.
    stages : int
    slices : int
        Groups of warps that share the steps along K.
    resident : bool
        Whether all weights of a column tile stay in shared memory (``wgmma``).
    cluster : int
        Blocks that share the weights that they bring (``wgmma``).
    few : int
        Columns of the tile where there are too few rows to give half of the multiprocessors a tile; 0: the same.
    split : int
        Blocks that share K where there are so few rows that all of them find a multiprocessor: on small tiles of single warps.
    in_memory : bool
        Whether the sums of these blocks meet in the device's memory (:mod:`.parts`), and not in a cluster.
    """

    engine: str
    rows: int
    columns: int = 32
    warp_rows: int = 0
    warp_columns: int = 0
    slab: int = 0
    stages: int = 0
    slices: int = 1
    resident: bool = False
    cluster: int = 1
    few: int = 0
    split: int = 1
    in_memory: bool = False


def default_schedule(spec, isa):
    """A schedule that is fast without tuning."""
    layer = Layer.of(spec)
    if not _on_tensor_cores(layer, isa):
        return Schedule(CORES, _core_pixels(layer))
    return next(iter([*_wgmma_schedules(layer, isa), *_mma_schedules(layer, isa)]))


def _core_pixels(layer):
    """Four pixels share each word of weights that is loaded; where there are few of them, a single one keeps more warps busy."""
    return 1 if layer.is_dense or layer.out_pixels < 64 else 4


def _on_tensor_cores(layer, isa):
    """Whether there are any for the layer's sums, and the layer is not too small for them."""
    if not isa.mma or not tiles.fits(layer) or (isa.operation == "xor" and not layer.by_xor):
        return False
    if layer.at_run_time:  # a tile of both operands is small beside its result: half a step along K is enough
        return layer.spec.turned and min(layer.spec.rows, layer.outputs) >= 16 and layer.bits >= 64
    return layer.outputs >= 16 and layer.taps * layer.bits >= 128


#: Tiles: rows, columns, rows and columns of a warp, slices. Large ones first.
_TILES = (
    (128, 128, 64, 64, 1),
    (128, 128, 64, 32, 1),
    (128, 64, 32, 64, 1),
    (64, 64, 32, 32, 1),
    (64, 64, 32, 32, 2),
    (64, 32, 32, 32, 1),
    (64, 32, 32, 32, 4),
    (32, 32, 32, 32, 4),
)


def _mma_schedules(layer, isa):
    """Valid schedules, the default first."""
    found = []
    for rows, columns, warp_rows, warp_columns, slices in _TILES:
        for slab in (128, 64, 32) if layer.at_run_time else (128, 64):
            if slab // mma.INSTRUCTIONS[isa.operation].step % slices:
                continue
            for stages in (4, 3, 2):
                one = Schedule(MMA, rows, columns, warp_rows, warp_columns, slab, stages, slices)
                # Of a product rows and columns are known: the tile is chosen for them.
                few = (0,) if layer.at_run_time or (rows, columns) == _SMALL_TILE else (_SMALL_TILE[1], 0)
                if _fits(layer, one, isa):
                    found += [replace(one, few=f, split=s, in_memory=m) for f in few for s, m in _splits(layer, slab, isa)]
    wanted = _wanted(layer)
    return sorted(found, key=lambda s: wanted(s))


def _wgmma_schedules(layer, isa):
    """Valid schedules, the default first: all columns of the layer, if they are 256 at most, and 128 rows."""
    if not isa.wgmma or layer.scaled or layer.at_run_time or layer.outputs < 32 or layer.taps * layer.group_words * 4 < 64:
        return []
    most = 256 if len(tiles.passes(layer, False)) == 1 else 128
    columns = [c for c in (256, 192, 128, 96, 64, 32) if c <= most]
    wanted = next((c for c in reversed(columns) if c >= layer.outputs), most)
    columns.sort(key=lambda c: (c != wanted, -c))
    ways = ((True, 64, 1), (False, 128, 1), (False, 128, 2), (False, 64, 1))
    found = [Schedule(WGMMA, rows, c, 64, c, 128, stages, 1, resident, cluster, few, split, in_memory)
             for c in columns for resident, rows, cluster in ways for stages in (6, 5, 4, 3)
             for few in dict.fromkeys((_narrow(c), 0)) for split, in_memory in _splits(layer, 128, isa)]  # fmt: skip
    return [s for s in found if _wgmma_fits(_kernel(layer, s, isa, ""), isa)]


def _narrow(columns):
    """Columns of the tile for few rows."""
    return 32 if columns in (64, 96, 128) else 64 if columns in (192, 256) else 0


#: Rows and columns of a tile of a single warp, whose slices share a slab: for few rows.
_SMALL_TILE = 32, 32
#: Steps along K that take as long as starting a second kernel and reading what the first one has left: a microsecond or two, and with three
#: slabs under way a step of a lonely block takes a third of the time that memory needs to answer. (Not measured.)
_LAUNCH_STEPS = 8


def _small_tile(schedule, isa, **more):
    """A schedule for a small tile, of weights that are packed for ``schedule``."""
    return Schedule(MMA, *_SMALL_TILE * 2, schedule.slab, 4, schedule.slab // mma.INSTRUCTIONS[isa.operation].step, **more)


def _few_rows(layer, schedule, isa):
    """Most rows that are too few, and a schedule for them."""
    tiles_of_row = _shape(layer, schedule).column_tiles * layer.groups
    limit = isa.multiprocessors // 2 // tiles_of_row * schedule.rows
    if schedule.engine == MMA:
        return limit, _small_tile(schedule, isa)
    own = replace(schedule, rows=64, columns=schedule.few, warp_columns=schedule.few, few=0, resident=False, cluster=1, split=1)
    return limit, replace(own, in_memory=False)


def _small_tiles(layer):
    """``(rows, small tiles)`` of what is never cut further: an image, a row, or a product of the batch."""
    rows = layer.spec.rows if layer.at_run_time and not layer.spec.shared else layer.out_pixels
    height, width = _SMALL_TILE
    return rows, -(-rows // height) * -(-layer.outputs // width) * layer.groups


def _splits(layer, slab, isa):
    """``(parts of K, whether they meet in memory)``, the best first.

    The tiles of one image (of one row, of one product) must leave multiprocessors idle, and a block keeps two slabs: less is over before
    the sums of other blocks are there. Clusters come first, where there are any. Parts that meet in memory cost a launch: they are the
    default where each block is spared more steps than that takes.
    """
    shape = tiles.Shape(layer, *_SMALL_TILE, slab, 2)
    most = min(shape.slabs // 2, isa.multiprocessors // _small_tiles(layer)[1])
    clusters = [] if layer.at_run_time else [(parts, False) for parts in (8, 4, 2) if parts <= min(most, isa.cluster)][:1]
    memory = [(parts, True) for parts in (16, 12, 8, 6, 4, 3, 2) if parts <= most][: 1 if isa.cluster > 1 else 2]
    spared = shape.slabs - -(-shape.slabs // memory[0][0]) if memory and not clusters else 0
    pays = spared * len(tiles.passes(layer, isa.operation == "xor")) > _LAUNCH_STEPS
    return [*clusters, *memory, (1, False)] if pays else [*clusters, (1, False), *memory]


def _split_rows(layer, schedule, isa):
    """Most rows whose tiles all have their ``split`` blocks on multiprocessors of their own, and a schedule for them."""
    own = _small_tile(schedule, isa, split=schedule.split, in_memory=schedule.in_memory)
    together = isa.multiprocessors // schedule.split
    if layer.at_run_time and not layer.spec.shared:  # whole products
        rows, count = _small_tiles(layer)
        return together // count * rows, own
    return together // (_shape(layer, own).column_tiles * layer.groups) * own.rows, own


def _for_few_rows(layer, schedule, isa):
    """``(most rows, schedule)`` of the kernels for fewer rows than the whole one is for, the most rows first."""
    found = []
    for wanted, of in ((schedule.few, _few_rows), (schedule.split > 1, _split_rows)):
        limit, own = of(layer, schedule, isa) if wanted else (0, None)
        if limit:
            found = [(most, one) for most, one in found if most > limit] + [(limit, own)]
    return found


def _wgmma_fits(kernel, isa):
    """Whether shared memory suffices, and where weights stay, there is a block for every column tile."""
    blocks = not kernel.shape.resident or kernel.column_tiles <= isa.multiprocessors
    return blocks and 4 * kernel.shared_words <= isa.block_shared_bytes


def _wanted(layer):
    """What orders schedules: columns that are all used, a large tile where there are many pixels, a slab that K fills."""
    kernel_bytes = layer.taps * layer.group_words * 4
    columns = next(c for c in (32, 64, 128) if c >= min(layer.outputs, 128))
    rows = 128 if layer.is_dense or layer.out_pixels >= 784 else 64
    slab = 128 if kernel_bytes >= 256 else 64
    if layer.at_run_time:  # each product of the batch has tiles of its own: small ones fit better
        most = 128 if min(layer.spec.rows, layer.outputs) >= 784 else 64
        rows, columns = next(r for r in (32, 64, 128) if r >= min(layer.spec.rows, most)), min(columns, most)
        slab = slab if kernel_bytes > 32 else 32

    def key(s):
        return abs(s.columns - columns), abs(s.rows - rows), s.slices, abs(s.slab - slab), abs(s.stages - 3), -s.warp_rows * s.warp_columns

    return key


def _fits(layer, schedule, isa):
    """Whether shared memory and registers suffice."""
    kernel = _kernel(layer, schedule, isa, "")
    several = 1 + (len(kernel.passes) > 1) + layer.scaled
    copied = -(-schedule.rows // (kernel.threads // kernel.shape.chunks))  # rows that a thread copies, and counts
    registers = kernel.sums_of_thread * several + copied
    return 4 * kernel.shared_words <= isa.block_shared_bytes and registers < 160 and kernel.threads <= 512


def _shape(layer, schedule, packed=0):
    return tiles.Shape(layer, schedule.rows, schedule.columns, schedule.slab, schedule.stages, schedule.resident, packed)


def _kernel(layer, schedule, isa, name):
    """The kernel for any number of rows."""
    shape = _shape(layer, schedule)
    if schedule.engine == WGMMA:
        return wgmma.WgmmaKernel(shape, isa, name, schedule.cluster)
    kind = products.ProductKernel if layer.at_run_time else mma.MmaKernel
    return kind(shape, schedule.warp_rows, schedule.warp_columns, schedule.slices, isa, name)


def _kernel_for_few(layer, schedule, isa, name, packed, limit):
    """The kernel for ``limit`` rows at most; ``packed``: columns of the tiles that weights were packed for."""
    shape = _shape(layer, schedule, packed)
    if schedule.engine == WGMMA:
        return wgmma.WgmmaKernel(shape, isa, name, schedule.cluster)
    arguments = shape, schedule.warp_rows, schedule.warp_columns, schedule.slices, isa, name, schedule.split
    if schedule.in_memory:
        return (parts.ProductParts if layer.at_run_time else parts.Parts)(*arguments, limit=limit)
    return (products.ProductKernel if layer.at_run_time else mma.MmaKernel)(*arguments)


def space(spec, isa):
    """Schedules worth trying, the default first."""
    layer = Layer.of(spec)
    found = [default_schedule(spec, isa), *(Schedule(CORES, p) for p in (1, 2, 4, 8))]
    if _on_tensor_cores(layer, isa):
        found += [*_wgmma_schedules(layer, isa), *_mma_schedules(layer, isa)]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Footprint:
    """What a block of a tensor-core kernel takes, and what it does.

    Attributes
    ----------
    threads, shared_bytes : int
    sums : int
        Accumulators of a thread that multiplies.
    rows, columns : int
        Of the tile: pixels and output channels.
    column_tiles : int
        Of all groups.
    steps : int
        Slabs that the block multiplies for a tile, all passes counted.
    fetched_bytes : int
        Of a slab, that pass through the ring: of data, and of weights unless they are resident.
    ahead_bytes : int
        Of the stages of the ring.
    split : int
        Blocks that share a tile.
    """

    threads: int
    shared_bytes: int
    sums: int
    rows: int
    columns: int
    column_tiles: int
    steps: int
    fetched_bytes: int
    ahead_bytes: int
    split: int


def footprints(spec, schedule, isa):
    """Of a schedule for tensor cores: ``(footprint, most rows)``, those of kernels for few rows first; None: any number."""
    layer, found = Layer.of(spec), []
    for limit, own in _for_few_rows(layer, schedule, isa):
        found.insert(0, (_footprint(layer, _kernel_for_few(layer, own, isa, "", schedule.columns, limit)), limit))
    return [*found, (_footprint(layer, _kernel(layer, schedule, isa, "")), None)]


def _footprint(layer, kernel):
    shape, split = kernel.shape, getattr(kernel, "split", 1)
    return Footprint(
        kernel.threads, 4 * kernel.shared_words, kernel.sums_of_thread, shape.rows, shape.columns, shape.column_tiles * layer.groups,
        -(-shape.slabs // split) * len(kernel.passes), 4 * shape.stage_words, 4 * shape.stage_words * shape.stages,
        split,
    )  # fmt: skip


def pack_weights(spec, schedule, isa, weights):
    """Weights in the kernel's layout, with the constants that belong to them; ``weights`` is uint32[Q', O, kh, kw, words]."""
    layer = Layer.of(spec)
    if schedule.engine == CORES:
        return cores.pack_weights(layer, weights)
    return tiles.pack_weights(_shape(layer, schedule), weights, isa.operation == "xor")


def build(spec, schedule, isa, name):
    """The kernel."""
    layer = Layer.of(spec)
    if schedule.engine == CORES:
        return cores.Kernel(layer, schedule.rows, name).function()
    kernel, few = _kernel(layer, schedule, isa, name), _for_few_rows(layer, schedule, isa)
    shared = next((parts.workspace(layer, own.split, limit) for limit, own in few if own.in_memory), None)
    kernel.workspace = shared
    function = kernel.function()
    for limit, own in few:
        small = _kernel_for_few(layer, own, isa, name, schedule.columns, limit)
        small.share(kernel)
        function = simt.either(kernel.all_rows() <= simt.i32(limit), small.function(), function)
    return function if shared is None else function.with_attr(WORKSPACE, int(shared.shape[0]))
