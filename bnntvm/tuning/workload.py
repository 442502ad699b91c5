"""What a tuning task is called: the canonical text of a specification, free of everything that does not decide how fast a kernel is.

A record that was made for one network serves every network with the same layer. So constants of an epilogue, which come from a model's
training, are left out of the key, and so are names and positions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import operator
import os

from tvm import tirx

from bnntvm import spec as specs
from bnntvm.errors import BnnError
from bnntvm.targets import x86
from bnntvm.tuning import records
from bnntvm.tuning.records import FORMAT, task_id


def family_name(family):
    """Name of a kernel family's module."""
    return family.__name__.rsplit(".", 1)[-1]


def key_of(family, spec, rows):
    """The canonical key of a task.

    Parameters
    ----------
    family : module
        Kernel family. Its ``VERSION`` (1 if it has none) changes when its schedules change their meaning.
    spec : dataclass
    rows : int
        Extent of the leading dimension for a batch of one: more than 1 where tokens or pixels have become rows.

    Returns
    -------
    str
        JSON with sorted keys.
    """
    content = dict(family=family_name(family), version=getattr(family, "VERSION", 1), format=FORMAT, rows=rows, spec=plain(spec))
    # "family" comes first, and so marks the string in a workload's module.
    return json.dumps(content, sort_keys=False, separators=(",", ":"))


def plain(value):
    """A specification as nested lists and dicts; floats, which are constants of a step, become "c".

    Fields that have their default value are left out: a specification that gets a new field keeps the keys of what does not use it.
    """
    if isinstance(value, specs.Step):
        return [value.op, [arg if isinstance(arg, int) else "c" for arg in value.args], value.dtype]
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if getattr(value, f.name) != _default(f)}
        return {"type": type(value).__name__, **{name: plain(own) for name, own in fields.items()}}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return value


def _default(field):
    """A field's default value; MISSING if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def rows_of(shape, images=1):
    """Extent of a shape's first dimension where every dynamic dimension is ``images``."""
    return shape[0] if isinstance(shape[0], int) else _extent(shape[0], images)


#: What dimensions are made of. TVM 0.27 exposes no visitor of scalar expressions to Python.
_ARITHMETIC = {
    tirx.Add: operator.add, tirx.Sub: operator.sub, tirx.Mul: operator.mul, tirx.FloorDiv: operator.floordiv,
    tirx.FloorMod: operator.mod, tirx.Max: max, tirx.Min: min,
}  # fmt: skip


def _extent(expr, images):
    if isinstance(expr, tirx.IntImm):
        return int(expr.value)
    if isinstance(expr, tirx.Var):
        return images
    return _ARITHMETIC[type(expr)](_extent(expr.a, images), _extent(expr.b, images))


def chooser(tuning, threads):
    """What :class:`bnntvm.lower.Lower` asks for schedules.

    Parameters
    ----------
    tuning : str, path, list of those, function, False or None
        See :func:`bnntvm.build`.
    threads : int
        Threads that the network will run on.
    """
    if callable(tuning):
        return tuning if getattr(tuning, "trusted", False) else _checked(tuning)
    if tuning not in (None, False) and (isinstance(tuning, (bool, bytes)) or not isinstance(tuning, (str, os.PathLike, list, tuple))):
        raise BnnError(f"tuning must be folders of records, a function or False, not {tuning!r}"[:200])
    own = [] if tuning in (None, False) else [tuning] if isinstance(tuning, (str, os.PathLike)) else list(tuning)
    package = None if tuning is False else records.shipped()
    if not own and not package:
        return None
    tuned = records.Tuned(own, package)
    return lambda family, spec, isa, shape: tuned_schedule(tuned, threads, family, spec, isa, rows_of(shape))


def _checked(function):
    """A user's function, whose mistakes are told as such."""

    def choose(family, spec, isa, shape):
        where = family_name(family)
        try:
            schedule = function(family, spec, isa, shape)
        except BnnError:
            raise
        except Exception as error:
            hint = "it is called with a kernel family, a specification, an instruction-set level and the shape of the first operand"
            raise BnnError("the tuning function failed", where=where, why=f"{type(error).__name__}: {error}", hint=hint) from error
        default = family.default_schedule(spec, isa)
        if schedule != default and (type(schedule) is not type(default) or schedule not in family.space(spec, isa)):
            hint = "return one of family.space(spec, isa)"
            what = "the tuning function returned no schedule of the family's space"
            raise BnnError(what, where=where, why=repr(schedule)[:120], hint=hint)
        return schedule

    return choose


def tuned_schedule(tuned, threads, family, spec, isa, rows):
    """The schedule to build with: the best of the records, or the default where they know nothing (valid)."""
    default = family.default_schedule(spec, isa)
    space = None

    def valid(fields):
        nonlocal space
        space = {default, *family.space(spec, isa)} if space is None else space
        return made_of(fields, space)

    return tuned.schedule(task_id(key_of(family, spec, rows)), levels(isa), threads, valid, default, isa.vendor)


def made_of(values, space):
    """The schedule of ``space``, whose schedules may be of several classes, with these fields; those that it lacks are at their defaults.
    None if there is none (any more)."""
    for kind in dict.fromkeys(map(type, space)):
        with contextlib.suppress(TypeError):  # fields of another class, or of another version
            made = kind(**values)
            if made in space:
                return made
    return None


def levels(isa):
    """Names of a level and of those that differ from it in other instructions than a schedule is about."""

    def shape(level):
        return level.machine, level.lanes, level.registers, level.popcount

    return [isa.name, *(one.name for one in x86.LEVELS if shape(one) == shape(isa) and one.name != isa.name)]
