"""A kernel family with bad schedules, to see that a tuner outlives them."""

import ctypes
import time
import types
from dataclasses import dataclass

import numpy as np
from tvm import tirx

from bnntvm.schedules import tir
from bnntvm.tuning.tasks import Task

SIZE = 64
KINDS = ("good", "better", "wrong", "no code", "compiler dies", "hangs", "crashes", "behind", "before", "input")


@dataclass(frozen=True)
class Spec:
    """x + 1 over 64 floats."""


@dataclass(frozen=True)
class Schedule:
    """``kind``: what is the matter with it; ``better`` does not compute its sums 4000 times.

    ``behind`` and ``before`` compute the right sums and store beside their output as well; ``input`` overwrites its input at last.
    """

    kind: str


def build(_spec, schedule, _isa):
    if schedule.kind == "no code":
        raise ValueError("no code for this")
    if schedule.kind == "compiler dies":
        ctypes.string_at(0)
    if schedule.kind == "hangs":
        time.sleep(1000)
    x, y = tir.buffer("x", (SIZE,), "float32"), tir.buffer("y", (SIZE,), "float32")
    add = 2.0 if schedule.kind == "wrong" else 1.0
    # Far outside of everything that is mapped.
    offset = 1 << 50 if schedule.kind == "crashes" else 0
    times = 1 if schedule.kind in ("better", "wrong") else 4000

    def one(_repeat):
        return tir.for_("i", SIZE, lambda i: tir.store(y, tir.load(x, i + offset) + tirx.const(add, "float32"), i))

    beside = {"behind": SIZE, "before": -9, "input": 5}.get(schedule.kind)
    more = (
        []
        if beside is None
        else [tir.store(x if schedule.kind == "input" else y, tirx.const(5.0, "float32"), i) for i in (beside, beside + 1)]
    )
    return tir.function("faulty", [x, y], [tir.for_("r", times, one), *more])


def reference(_spec, operands, _inputs):
    return [operands[0] + np.float32(1)]


family = types.SimpleNamespace(
    __name__="faulty",
    Schedule=Schedule,
    build=build,
    reference=reference,
    default_schedule=lambda spec, isa: Schedule("good"),
    space=lambda spec, isa: [Schedule(kind) for kind in KINDS],
)


class FaultyTask(Task):
    """A task of this family."""

    @property
    def module(self):
        return family
