"""What the cost model sees of a candidate for a GPU, beside what it sees of the task (:mod:`.features`).

On tensor cores a tile decides what passes through shared memory for each product, how many blocks fit on a multiprocessor, how many bytes
are under way, and with the batch, how many waves of blocks there are and how full the last one is. Kernels are measured with a small and a
large batch, and many have another tile for the small one, so both are described.
"""

from __future__ import annotations

import math

from bnntvm.schedules.cuda import cores, layers, patches, rows, tf32, tf32_dense
from bnntvm.tuning.features import log, number, sizes
from bnntvm.tuning.gpu_program import BATCHES
from bnntvm.tuning.space import fields

#: Fields of schedules that have a place.
SLOTS = 13
ENGINES = (layers.CORES, layers.MMA, layers.WGMMA)
#: 32-bit registers of a multiprocessor, of every capability; what a thread needs beside its sums.
REGISTERS, OTHER_REGISTERS = 1 << 16, 48


def of(space, schedule):
    """Numbers, as many for every schedule of every task."""
    own, task = dict(fields(schedule)), space.task
    slots = [number(values, own[name]) if name in own else -1.0 for name, values in space.values.items()][:SLOTS]
    engine = own.get("engine")
    on_tensor_cores = engine in (layers.MMA, layers.WGMMA)
    described = _tiles(task, schedule) if on_tensor_cores else _others(task, schedule)
    return slots + [-1.0] * (SLOTS - len(slots)) + [float(engine == one) for one in ENGINES] + described


def _tiles(task, schedule):
    """Of a schedule for tensor cores."""
    layer, isa, found = layers.Layer.of(task.spec), task.isa, []
    choices = layers.footprints(task.spec, schedule, isa)
    for images in BATCHES:
        batch = task.operands[0].at(images)[0]
        pixels = batch * (task.spec.rows if layer.at_run_time else 1 if layer.is_dense else layer.out_pixels)
        one = next(footprint for footprint, limit in choices if limit is None or pixels <= limit)
        blocks = -(-pixels // one.rows) * one.column_tiles * one.split
        registers = one.threads * (one.sums + OTHER_REGISTERS)
        together = max(1, min(isa.shared_bytes // max(one.shared_bytes, 1), REGISTERS // registers, isa.threads // one.threads))
        full = pixels * layer.outputs * layer.groups * one.split / (blocks * one.rows * one.columns)
        work = one.rows * one.columns * one.steps * 8 * schedule.slab
        found += [
            log(one.rows), log(one.columns), one.threads / 512, one.sums / 128, one.shared_bytes / isa.block_shared_bytes,
            one.ahead_bytes * together / isa.shared_bytes, log(one.steps), log(one.fetched_bytes),
            log(work / (one.fetched_bytes * one.steps)), together, *_waves(blocks, together, isa), full, log(blocks * work),
        ]  # fmt: skip
    return found


def _waves(blocks, together, isa):
    """Blocks of a multiprocessor one after the other, how full the last of these waves is, and all of them."""
    places = isa.multiprocessors * together
    waves = -(-blocks // places)
    return log(waves), blocks / (waves * places), log(blocks)


def _others(task, schedule):
    """The same of every other schedule, where it has them."""
    isa, found = task.isa, []
    channels, threads = 32, 256
    own = dict(fields(schedule))
    if isinstance(schedule, (patches.Schedule, tf32.Schedule)):
        pixels, channels = patches.WARP_PIXELS * schedule.warps[0], patches.WORD * schedule.warps[1]
        threads = 32 * schedule.warps[0] * schedule.warps[1]
    elif isinstance(schedule, tf32_dense.Schedule):
        pixels, threads = tf32_dense.ROWS, 32 * schedule.slices
    elif isinstance(schedule, rows.Schedule):
        pixels, threads = schedule.rows, 32 * schedule.warps
    elif isinstance(schedule, layers.Schedule):
        pixels, threads = schedule.rows * cores.WARPS, 32 * cores.WARPS
    else:
        each = next((own[name] for name in ("cells", "words", "unroll") if isinstance(own.get(name), int)), 1)
        threads = own["threads"] if isinstance(own.get("threads"), int) else threads
        pixels = each * threads // 32
    for images in BATCHES:
        all_pixels, _, outputs, depth = sizes(task.spec, task.operands[0].at(images)[0])
        all_pixels *= images if getattr(task.spec, "window", None) is not None or len(getattr(task.spec, "spatial", ())) == 2 else 1
        blocks = -(-all_pixels // pixels) * -(-outputs // channels)
        full = all_pixels * outputs / (blocks * pixels * channels)
        intensity = pixels * channels / (pixels + channels)
        found += [
            log(pixels), log(channels), threads / 512, -1.0, -1.0, -1.0, log(depth), -1.0, log(intensity), isa.threads // threads,
            *_waves(blocks, isa.threads // threads, isa), full, log(math.prod((blocks, pixels, channels, depth))),
        ]  # fmt: skip
    return found
