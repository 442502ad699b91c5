"""A family's schedules as a MetaSchedule design space.

Kernels are generated from a schedule, they are not rewritten step by step. So the module that MetaSchedule sees of a task is one empty
block that carries the task's key, and a candidate is that block with one annotation for every field of its schedule, each a sampled
categorical decision. Not every combination of decisions is a valid schedule: which are is up to the family's ``space``.
"""

from __future__ import annotations

import dataclasses
import functools
import platform

import tvm
from tvm import s_tir, tirx
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from bnntvm.targets.isa import host_facts
from bnntvm.tuning.records import decode, encode
from bnntvm.tuning.workload import made_of


def workload_module(key):
    """The module that stands for a task.

    Parameters
    ----------
    key : str
        See :mod:`.workload`.
    """
    block = s_tir.SBlock([], [], [], "task", tirx.Evaluate(tirx.const(0, "int32")))
    func = tirx.PrimFunc([], s_tir.SBlockRealize([], tirx.const(True, "bool"), block))
    return tvm.IRModule({"main": func.with_attr("global_symbol", "main").with_attr("bnn.workload", key)})


def schedules(task, threads):
    """The schedules to choose from, the default first.

    Fields that only cut the work into parallel tasks (the family's ``GRAIN``) show no merit on one thread: there the work is never cut more
    coarsely than by default, or a schedule tuned on one thread would leave the others idle.
    """
    default = task.module.default_schedule(task.spec, task.isa)
    grain = getattr(task.module, "GRAIN", ())
    found = dict.fromkeys([default, *task.module.space(task.spec, task.isa)])
    if threads == 1:
        found = {s: None for s in found if all(getattr(s, name) <= getattr(default, name) for name in grain)}
    return list(found)


def fields(schedule):
    """A schedule as a tuple of (name, value)."""
    return tuple((f.name, getattr(schedule, f.name)) for f in dataclasses.fields(schedule))


class Space:
    """Schedules of a task and their traces.

    Parameters
    ----------
    task : Task
    threads : int
    machine : str, optional
        What measures; default: this machine's processor.

    A family may have schedules of several classes, one for each way in which it computes: a candidate then has the fields of its own.
    """

    def __init__(self, task, threads, machine=None):
        self.task, self.threads, self.machine = task, threads, machine or processor()
        self.schedules = schedules(task, threads)
        self.default = self.schedules[0]
        self.values = {name: self._values(name) for name in dict.fromkeys(n for s in self.schedules for n, _ in fields(s))}
        self.module = workload_module(task.key)
        self.by_fields = {frozenset(fields(s)): s for s in self.schedules}

    def _values(self, name):
        values = dict.fromkeys(getattr(s, name) for s in self.schedules if hasattr(s, name))
        return sorted(values) if all(type(v) is int for v in values) else list(values)

    def trace(self, schedule, place=""):
        """The module with the decisions of ``schedule``; ``place``: see :class:`.records.Record`.

        Returns
        -------
        tvm.s_tir.Schedule
        """
        made = s_tir.Schedule(self.module)
        block = made.get_sblock("task")
        texts = dict(task=self.task.id, isa=self.task.isa.name, threads=self.threads, machine=self.machine)
        texts["default"] = int(schedule == self.default)
        for name, value in (texts | ({"place": place} if place else {})).items():
            made.annotate(block, f"bnn.{name}", value)
        for name, value in fields(schedule):
            key, numbers = encode(name, self.values[name])
            chosen = made.sample_categorical(numbers, [1 / len(numbers)] * len(numbers), decision=self.values[name].index(value))
            made.annotate(block, key, chosen)
        return made

    def schedule_of(self, module):
        """The schedule that a traced module stands for."""
        found = {}
        for key, number in module["main"].body.block.annotations.items():
            if key.startswith("bnn.field."):
                name, value = decode(key, int(number))
                found[name] = value
        return self.by_fields[frozenset(found.items())]

    def schedule_from(self, values):
        """The schedule with these fields, those that it lacks at their defaults; None if it is not in the space (any more)."""
        return made_of(values, self.schedules)

    def neighbours(self, schedule):
        """Schedules that differ from ``schedule`` in one field."""
        own = fields(schedule)
        return [s for s in self.schedules if type(s) is type(schedule) and sum(a != b for a, b in zip(own, fields(s))) == 1]


@functools.lru_cache(maxsize=1)
def processor():
    """The processor that measures: its name and, as names of virtual machines say little, its family, model and stepping."""
    facts = host_facts()
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    numbers = [facts[name] for name in ("cpu family", "model", "stepping") if name in facts]
    return facts["model name"] + (f" ({'/'.join(numbers)})" if numbers else "")


@derived_object
class SpaceGenerator(ms.space_generator.PySpaceGenerator):
    """Offers MetaSchedule one design space, whose decisions are those of the default schedule."""

    def __init__(self, space):
        self.space, self.sch_rules, self.postprocs, self.mutator_probs = space, [], [], {}

    def _initialize_with_tune_context(self, context):
        pass

    def generate_design_space(self, _mod):
        return [self.space.trace(self.space.default)]

    def clone(self):
        return SpaceGenerator(self.space)
