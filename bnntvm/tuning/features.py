"""What the cost model sees of a candidate.

MetaSchedule's own features count loads, stores and arithmetic of TensorIR loops; in a popcount kernel those look the same for every tile.
Here the features are what decides: instructions for each vector of binary multiply-accumulates, how full the registers are, what a tile
loads for each of its sums, which of its data stay in which cache, and how much of a row is computed twice. What decides on a GPU
is in :mod:`.gpu_features`.
"""

from __future__ import annotations

import math

import numpy as np
import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from bnntvm.schedules.families import FAMILIES
from bnntvm.spec import words
from bnntvm.tuning.space import fields

#: Instructions for one vector of binary multiply-accumulates, by the name of an adder (``adder`` of a schedule).
INSTRUCTIONS = {"plain": 3.0, "carry_save": 2.5, "tables": 1.8}
#: Accumulator registers of one sum.
REGISTERS = {"plain": 1, "carry_save": 2, "tables": 1}
#: Without an instruction that counts bits, nibbles are looked up: that many instructions instead.
LOOK_UP = 8.0
LEVEL1_BYTES, LEVEL2_BYTES = 32 << 10, 1 << 20
SLOTS = 9
_NAMES = sorted(set(FAMILIES.values()) | {"depthwise_conv2d"})


def log(value):
    """Logarithm to base 2 of what is not negative."""
    return math.log2(max(float(value), 1e-3))


def sizes(spec, rows):
    """(output pixels of an image, pixels of a row, output channels, multiply-accumulates of an output, bits of one operand)."""
    window = getattr(spec, "window", None)
    channels = getattr(spec, "in_channels", getattr(spec, "in_features", getattr(spec, "channels", 1)))
    channels = sum(channels) if isinstance(channels, tuple) else channels
    out = getattr(spec, "out_channels", getattr(spec, "out_features", channels))
    if window is not None:
        taps = window.kernel[0] * window.kernel[1]
        return window.out_height * window.out_width, window.out_width, out, taps * channels // getattr(spec, "groups", 1)
    spatial = getattr(spec, "spatial", ()) or (1, rows)
    pixels = spatial[0] * spatial[-1]
    return pixels * (rows if len(spatial) != 2 else 1), spatial[-1], out, channels


def task_features(task):
    """Features of the task alone."""
    spec, isa = task.spec, task.isa
    pixels, row, out, depth = sizes(spec, task.operands[0].shape[0])
    epilogue = getattr(spec, "epilogue", None)
    ends = (len(epilogue.inputs), len(epilogue.steps), sum(o.kind == "bits" for o in epilogue.outputs)) if epilogue else (0, 0, 0)
    return [
        _NAMES.index(task.family) if task.family in _NAMES else -1, isa.lanes, isa.registers, isa.popcount == "vector",
        log(pixels), log(row), log(out), log(depth), log(pixels * out * depth), *ends, task.operands[0].dtype == "uint32",
    ]  # fmt: skip


def schedule_features(space, schedule):
    """Features of a schedule of a task."""
    if space.task.isa.machine == "cuda":
        from bnntvm.tuning import gpu_features

        return gpu_features.of(space, schedule)
    task, own = space.task, dict(fields(schedule))
    slots = [number(space.values[name], value) for name, value in own.items()][:SLOTS]
    return slots + [-1.0] * (SLOTS - len(slots)) + _derived(task, own)


def number(values, value):
    """A field's value as a number."""
    return float(value) if isinstance(value, (int, float)) else float(values.index(value))


def _derived(task, own):
    isa, bits = task.isa, task.operands[0].dtype == "uint32"
    pixels, row, out, depth = sizes(task.spec, task.operands[0].shape[0])
    across = max(1, int(own.get("pixels", own.get("rows", 1))))
    down = max(1, int(own.get("vectors", own.get("words", 1) * 32 // isa.lanes if bits else 1)))
    adder = own.get("adder", "plain")
    held = across * down * REGISTERS.get(adder, 1)
    counting = INSTRUCTIONS.get(adder, 3.0)
    if bits and isa.popcount != "vector" and adder != "tables":
        counting += LOOK_UP
    loads = 1 / across + 1 / down
    element = 1 / 8 if bits else 4
    covered = -(-row // across) * across
    tile_weights, tile_data = down * isa.lanes * depth * element, across * depth * element
    blocks = max(1, -(-out // (down * isa.lanes)))
    work = covered / row * pixels * blocks * depth / (32 if bits else 1)
    tasks = -(-pixels // max(1, row * int(own.get("task_rows", own.get("rows", 1) if "pixels" in own else 1)))) * max(
        1, words(out) // max(1, int(own.get("task_blocks", words(out))))
    )
    return [
        held, (held + down + 1) / isa.registers, loads, counting, counting + loads, covered / row, log(work * (counting + loads)),
        tile_weights / LEVEL1_BYTES, tile_data / LEVEL1_BYTES, tile_weights * blocks / LEVEL2_BYTES, log(tasks), log(work / tasks),
        out % (down * isa.lanes) / (down * isa.lanes),
    ]  # fmt: skip


@derived_object
class Extractor(ms.feature_extractor.PyFeatureExtractor):
    """Features for MetaSchedule's cost model.

    Parameters
    ----------
    spaces : dict
        Task id, which is the name of the tuning context, to Space.
    """

    def __init__(self, spaces):
        super().__init__()
        self.spaces, self.known = spaces, {}

    def vector(self, space, schedule):
        """float32[1, features]."""
        key = space.task.id, schedule
        if key not in self.known:
            self.known[key] = np.array([[*task_features(space.task), *schedule_features(space, schedule)]], np.float32)
        return self.known[key]

    def extract_from(self, context, candidates):
        space = self.spaces[str(context.task_name)]
        return [tvm.runtime.tensor(self.vector(space, space.schedule_of(c.sch.mod))) for c in candidates]
