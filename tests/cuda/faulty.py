"""A kernel family for GPUs with bad schedules, to see that a tuner outlives them. What is bad about one, the device that is not there
(:mod:`tests.cuda.tuning_program`) does. Imports no compiler."""

import ctypes
import sys
import time
from dataclasses import dataclass

import numpy as np

from bnntvm.tuning.task import Task

SIZE = 64
KINDS = ("good", "better", "wrong", "no code", "compiler dies", "hangs", "crashes", "refused", "behind", "before", "input")


@dataclass(frozen=True)
class Spec:
    """x + 1 over 64 floats."""


@dataclass(frozen=True)
class Schedule:
    """``kind``: what is the matter with it; ``better`` takes half of the time of ``good``."""

    kind: str


def default_schedule(_spec, _isa):
    return Schedule("good")


def space(_spec, _isa):
    return [Schedule(kind) for kind in KINDS]


def reference(_spec, operands, _inputs):
    return [operands[0] + np.float32(1)]


def build(_spec, schedule, _isa):
    """All have the same code."""
    from tvm import tirx

    from bnntvm.schedules import tir
    from bnntvm.schedules.cuda import simt

    if schedule.kind == "no code":
        raise ValueError("no code for this")
    if schedule.kind == "compiler dies":
        ctypes.string_at(0)
    x, y = tir.buffer("x", (SIZE,), "float32"), tir.buffer("y", (SIZE,), "float32")
    (read, a), (written, b) = simt.flat(x), simt.flat(y)

    def body(_block, thread):
        index = simt.wide(thread)
        return [a, b, simt.put(written, index, simt.at(read, index) + tirx.const(1.0, "float32"))]

    return simt.kernel("faulty", [x, y], simt.i32(1), SIZE, body)


def execute(schedule, addresses):
    """What the device does; the status of the launch. ``addresses``: of x and of y."""
    x, y = (np.frombuffer((ctypes.c_char * 4 * SIZE).from_address(addresses[name]), np.float32) for name in "xy")
    y[:] = x + np.float32(2 if schedule.kind == "wrong" else 1)
    if schedule.kind == "hangs":
        time.sleep(1000)
    if schedule.kind == "crashes":
        ctypes.string_at(0)
    beside = {"behind": addresses["y"] + 4 * SIZE, "before": addresses["y"] - 9, "input": addresses["x"] + 20}.get(schedule.kind)
    if beside is not None:
        ctypes.memset(beside, 5, 8)
    return int(schedule.kind == "refused")


class FaultyTask(Task):
    """A task of this family."""

    @property
    def module(self):
        return sys.modules[__name__]
