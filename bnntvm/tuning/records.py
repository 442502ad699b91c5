"""Tuning records on disk: a folder in the format of MetaSchedule's JSON database, read and mended line by line.

Two files of JSON lines, as ``tvm.s_tir.meta_schedule.database.JSONDatabase`` writes them::

    database_workload.json        [hash, module]                                     one line for each task
    database_tuning_record.json   [workload, [trace, run_secs, target, arguments]]   one line for each measured candidate

``workload`` counts lines of the first file. A trace samples one categorical decision for every field of a schedule and annotates it on the
block ``task``, beside the strings

* ``bnn.task``: sixteen hexadecimal digits, see :func:`task_id`,
* ``bnn.isa``: instruction-set level, ``bnn.threads``: threads it ran on, ``bnn.machine``: processor that measured it,
* ``bnn.place``: of a record of a last comparison. ``network``: the time is that of a call within the network, ``network 17a5...`` with the
  name of the comparison (later ones have greater names); ``alone``, ``board`` and ``device 17a5...``: in turns with the default on this
  machine, a board, or a GPU (:mod:`.gpu_program`). Not there otherwise. Seconds are those of turns then, the same ones for all records of
  a comparison,
* ``bnn.default``: 1 where the schedule was the default, else 0. Older records lack it.

So a record is complete without its workload's line. TVM's reader refuses a whole file because of one bad line; :func:`mend` takes such
lines out first. A candidate that failed has the time 1e10, MetaSchedule's mark of failure.

Nothing here imports TVM's compiler: looking records up is part of every build.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import pathlib
import statistics
from collections import defaultdict
from dataclasses import dataclass, field

from bnntvm.errors import BnnError
from bnntvm.targets.isa import vendor_of
from bnntvm.tuning import turns
from bnntvm.tuning.turns import LEAST_GAIN

WORKLOADS, RECORDS = "database_workload.json", "database_tuning_record.json"
#: Version of what a key means. It is part of every task's id, so records of another version are never found.
FORMAT = 1
FAILED = 1e10


def task_id(key):
    """Sixteen hexadecimal digits of a task's canonical key."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Record:
    """One measured candidate.

    Attributes
    ----------
    task : str
        See :func:`task_id`.
    isa : str
        Name of the instruction-set level.
    threads : int
    machine : str
        Processor that measured it.
    schedule : tuple of (str, value)
        The schedule's fields.
    seconds : tuple of float
        Times of single runs; (1e10,) for a candidate that failed.
    line : list
        The parsed line.
    place : str
        Of a last comparison: ``network ...`` where it ran within its network, ``alone ...``, ``board ...`` or ``device ...`` where it took
        turns with the default without one.
    default : bool or None
        Whether it is of the default schedule; None where the record does not say.
    """

    task: str
    isa: str
    threads: int
    machine: str
    schedule: tuple
    seconds: tuple
    line: list = field(compare=False, hash=False, repr=False)
    place: str = ""
    default: bool | None = field(default=None, compare=False)

    @property
    def compared(self):
        """Whether it is of a last comparison."""
        return bool(self.place)

    @property
    def failed(self):
        return min(self.seconds) >= FAILED

    @property
    def time(self):
        """Seconds: the median of what was stored."""
        return statistics.median(self.seconds)


def encode(name, values):
    """Annotation key of a schedule's field and the integers that stand for ``values`` in its trace."""
    if all(type(v) is int for v in values):
        return f"bnn.field.{name}", list(values)
    return f"bnn.field.{name}:" + "|".join(json.dumps(v) for v in values), list(range(len(values)))


def decode(key, number):
    """Name and value of a schedule's field from its annotation."""
    name, _, values = key.removeprefix("bnn.field.").partition(":")
    return name, _frozen(json.loads(values.split("|")[number])) if values else number


def _frozen(value):
    """JSON's lists as the tuples that they were."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


#: What reading something that is not what it should be may raise.
_BROKEN = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)


def _refuse(text):
    """NaN and Infinity, which Python's reader takes, are no JSON."""
    raise ValueError(text)


def parse(line):
    """A :class:`Record` from a line of text.

    Raises
    ------
    ValueError
        If the line is not a complete record of this project.
    """
    try:
        entry = json.loads(line, parse_constant=_refuse)
        number, (trace, seconds, _target, _arguments) = entry
        instructions, decisions = trace
        values, fields, texts = {}, {}, {}
        chosen = {int(at): value for at, value in decisions}
        for at, (kind, inputs, attributes, outputs) in enumerate(instructions):
            if kind == "SampleCategorical":
                values[outputs[0]] = attributes[0][chosen[at]]
            elif kind == "Annotate" and attributes[0].startswith("bnn.field."):
                name, value = decode(attributes[0], values.get(inputs[1], inputs[1]))
                fields[name] = value
            elif kind == "Annotate":
                texts[attributes[0]] = json.loads(inputs[1]) if isinstance(inputs[1], str) else inputs[1]
        seconds = tuple(float(s) for s in seconds)
        names = [texts["bnn.task"], texts["bnn.isa"], texts.get("bnn.machine", ""), texts.get("bnn.place", "")]
        if type(number) is not int or number < 0 or not seconds or not all(0 < s < math.inf for s in seconds):
            raise ValueError("no time or no workload")
        if not all(isinstance(name, str) for name in names):
            raise ValueError("no names")
        task, isa, machine, place = names
        default = bool(texts["bnn.default"]) if "bnn.default" in texts else None
        record = Record(task, isa, int(texts["bnn.threads"]), machine, tuple(fields.items()), seconds, entry, place, default)
        hash(record)  # values are what schedules have, not lists or objects
        return record
    except _BROKEN as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _lines(path):
    try:
        return path.read_bytes().decode("utf-8", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise BnnError("the tuning records cannot be read", where=str(path), why=error.strerror) from error


def read(folder):
    """All records of a folder that can be read, in the order in which they were measured.

    Returns
    -------
    (list of Record, list of int)
        And the numbers of the lines that are no records, from 1.
    """
    found, bad = [], []
    for number, line in enumerate(_lines(pathlib.Path(folder, RECORDS)), 1):
        try:
            found.append(parse(line))
        except ValueError:
            bad.append(number)
    return found, bad


def workloads(folder):
    """Keys of the tasks by line of the workload file; None where a line cannot be read or is a placeholder."""
    found = []
    for line in _lines(pathlib.Path(folder, WORKLOADS)):
        try:
            _, text = json.loads(line)
            # Length (eight bytes), then JSON: the module as a list of nodes, one of which is the attribute's string.
            nodes = json.loads(base64.b64decode(text, validate=True)[8:])["nodes"]
            texts = [n.get("data") for n in nodes if n.get("type") == "ffi.String"]
            found.append(next((t for t in texts if isinstance(t, str) and t.startswith('{"family"')), None))
        except _BROKEN:
            found.append(None)
    return found


def damage(folder):
    """What cannot be read in a folder, in words.

    Returns
    -------
    list of str
        File and lines, and what that costs; empty if all is sound.
    """
    found, bad = read(folder)
    entries = _lines(pathlib.Path(folder, WORKLOADS))
    missing = sorted({record.line[0] + 1 for record in found} - set(range(len(entries) + 1)))
    unreadable = [number for number, line in enumerate(entries, 1) if not _is_workload(line)]
    told = []
    for name, numbers, what, cost in (
        (RECORDS, bad, "cannot be read", "these measurements are left out"),
        (WORKLOADS, unreadable, "cannot be read", "the records count, but their kernels have no name"),
        (WORKLOADS, missing, "missing", "the records count, but their kernels have no name"),
    ):
        if numbers:
            which = ", ".join(map(str, numbers[:10])) + (f" and {len(numbers) - 10} more" if len(numbers) > 10 else "")
            told.append(f"{pathlib.Path(folder, name)}: line{'s' * (len(numbers) > 1)} {which} {what}; {cost}")
    return told


def keys(folder):
    """Task id -> canonical key, of the tasks that a folder describes."""
    return {task_id(key): key for key in workloads(folder) if key}


def mend(folder, placeholder, *, whole=parse):
    """Make a folder readable for TVM: lines that are none move to ``*.damaged`` files, missing workloads become placeholders.

    Parameters
    ----------
    placeholder : callable
        Line of the workload file for the task of an id, without line end.
    whole : callable
        Raises ValueError for a line that is no record.

    Returns
    -------
    int
        Number of damaged lines.
    """
    folder = pathlib.Path(folder)
    kept, damaged, entries = [], [], _lines(folder / WORKLOADS)
    for line in _lines(folder / RECORDS):
        try:
            kept.append((whole(line), line))
        except ValueError:
            damaged.append(line)
    unreadable = [i for i, line in enumerate(entries) if not _is_workload(line)]
    owners = {record.line[0]: record.task for record, _ in kept}
    lost = {i: len(entries) + n for n, i in enumerate(sorted(i for i in owners if i >= len(entries)))}  # whose line is not there at all
    if not (damaged or unreadable or lost):
        return 0
    _append(folder / (RECORDS + ".damaged"), damaged)
    _append(folder / (WORKLOADS + ".damaged"), [entries[i] for i in unreadable])
    for i in unreadable:
        entries[i] = placeholder(owners.get(i, "unknown"))
    _replace(folder / WORKLOADS, [*entries, *(placeholder(owners[i]) for i in lost)])
    _replace(folder / RECORDS, [_numbered(lost[r.line[0]], r) if r.line[0] in lost else line for r, line in kept])
    return len(damaged) + len(unreadable) + len(lost)


def _numbered(number, record):
    """A record's line, of the workload in another line."""
    return json.dumps([number, record.line[1]], separators=(",", ":"))


def _is_workload(line):
    try:
        _, text = json.loads(line)
        json.loads(base64.b64decode(text, validate=True)[8:])
        return True
    except _BROKEN:
        return False


def _append(path, lines):
    if lines:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)


def _replace(path, lines):
    """Write a file as a whole or not at all."""
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def merge(sources, target):
    """Put the records of several folders into one. What is there already, or twice, is kept once.

    Parameters
    ----------
    sources : list of path
    target : path
        Made if it does not exist.

    Returns
    -------
    (int, int)
        Records in the target, and lines of the sources that could not be read.

    Raises
    ------
    BnnError
        Where there are no records, the target cannot be written, or a tuner is writing to it.
    """
    target = pathlib.Path(target)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with only_writer(target):
            return _merge(sources, target)
    except OSError as error:
        raise BnnError("the tuning database cannot be written", where=str(target), why=error.strerror or str(error)) from error


@contextlib.contextmanager
def only_writer(folder):
    """Hold the folder's lock, which ends with the process; another one's is a BnnError."""
    with open(pathlib.Path(folder, ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BnnError("another tuner writes to this database", where=str(folder), hint="give each a folder, and merge them") from error
        yield


def _merge(sources, target):
    bad, seen, described = 0, {}, {}
    for folder in [*([target] if (target / RECORDS).exists() else []), *sources]:
        folder = pathlib.Path(folder)
        if not (folder / RECORDS).exists():
            raise no_records(folder)
        found, unreadable = read(folder)
        bad += len(unreadable)
        if folder == target:  # it is written anew: what cannot be read is not thrown away
            texts = _lines(folder / RECORDS)
            _append(folder / (RECORDS + ".damaged"), [texts[number - 1] for number in unreadable])
        lines, known = _lines(folder / WORKLOADS), workloads(folder)
        for record in found:
            at = record.line[0]
            if at < len(lines) and _is_workload(lines[at]) and (known[at] is not None or record.task not in described):
                described[record.task] = lines[at]
            seen[record] = record
    numbers = {task: number for number, task in enumerate(dict.fromkeys(record.task for record in seen))}
    _replace(target / WORKLOADS, [described.get(task) or _placeholder(task) for task in numbers])
    _replace(target / RECORDS, [_numbered(numbers[r.task], r) for r in seen.values()])
    return len(seen), bad


def _placeholder(task):
    """A line of the workload file for a task whose own line is lost: its records are as good as before."""
    from bnntvm.tuning.store import placeholder

    return placeholder(task)


def by_task(found):
    """Records grouped: (task, isa, threads) -> schedule -> its records."""
    groups = defaultdict(lambda: defaultdict(list))
    for record in found:
        groups[record.task, record.isa, record.threads][record.schedule].append(record)
    return groups


def comparisons(schedules):
    """What is known of a task's schedules, by occasion.

    Parameters
    ----------
    schedules : dict
        Schedule to its records, as in :func:`by_task`.

    Returns
    -------
    list of (str, dict)
        Place, and schedule to seconds: the last comparison first; behind them, with an empty place, what was measured alone, for one
        machine after the other. Times of different occasions cannot be compared: kernels that run alone, on another machine, or on another
        day, take another time. A schedule that failed once is left out; where one was measured twice, the last record counts.
    """
    groups = defaultdict(dict)
    for schedule, own in schedules.items():
        for record in own if not any(one.failed for one in own) else ():
            groups[record.place, "" if record.place else record.machine][schedule] = record.seconds
    return [(place, groups[place, machine]) for place, machine in sorted(groups, key=lambda one: one[0], reverse=True)]


def judge(place, schedules, default):
    """The :class:`.turns.Judged` of what was measured on one occasion, ``schedules``: schedule to seconds."""
    if place:
        return turns.judge(schedules, default)
    seconds = {schedule: statistics.median(own) for schedule, own in schedules.items()}
    best = min(seconds, key=seconds.get)
    if seconds[best] * LEAST_GAIN >= seconds[default]:
        best = default
    return turns.Judged(best, seconds[default], seconds[default] / seconds[best], False)


def verdict(occasions, default):
    """What the last comparison that can be judged says; where none can, what was measured alone.

    Parameters
    ----------
    occasions : list of (str, dict)
        See :func:`comparisons`.
    default : object
        The default schedule.

    Returns
    -------
    (turns.Judged or None, str)
        None where the default was never measured; and the place.

    Notes
    -----
    A comparison whose record of the default is lost still says which of its schedules was fastest. That one counts if it was faster than
    the default on another occasion.
    """
    lost = noisy = None
    for place, schedules in occasions:
        if noisy and not place:
            break  # a comparison that could not be judged is no reason to believe what was measured alone
        if place and set(schedules) == {default}:
            continue  # the tuner was killed before it had recorded the others
        if default in schedules and (lost is None or lost in schedules):
            kept = schedules if lost is None else {one: schedules[one] for one in (default, lost)}
            found = judge(place, kept, default), place
            if not found[0].noisy:
                return found
            noisy = noisy or found
        elif place and lost is None and default not in schedules:
            lost = min(schedules, key=lambda one: statistics.median(schedules[one]))
    return noisy or (None, "")


class Tuned:
    """Best schedules of one or several folders.

    Parameters
    ----------
    folders : list of path
        The first that knows a task decides.
    shipped : path, optional
        One more, whose records count only beside a record of the default schedule: a default that has changed since may well be faster.
    """

    def __init__(self, folders, shipped=None):
        self.own, self.shipped = [_occasions(pathlib.Path(folder), _stamp(folder)) for folder in folders], shipped

    def schedule(self, task, levels, threads, valid, default, vendor=""):
        """The schedule to use.

        Parameters
        ----------
        task : str
            See :func:`task_id`.
        levels : list of str
            The instruction-set level, then others with the same registers, whose records serve where it has none of its own and where they
            agree about the default.
        threads : int
            Records for as many threads are preferred; else those for one are used.
        valid : callable
            Makes a schedule from a dict of fields; None if it is not in the family's space (any more).
        default : Schedule
        vendor : str
            Take only those shipped records that were measured on a processor of this maker's; empty for all.

        Returns
        -------
        Schedule
        """
        shipped = [_occasions(pathlib.Path(self.shipped), _stamp(self.shipped), vendor)] if self.shipped else []
        for groups, trusted in [(one, True) for one in self.own] + [(one, False) for one in shipped]:
            for level in levels:
                for key in dict.fromkeys([(task, level, threads), (task, level, 1)]):
                    if key in groups:
                        return _choose(groups[key], valid, default, trusted and level == levels[0])
        return default


def _choose(occasions, valid, default, own):
    """The fastest valid schedule, if it is sufficiently faster than the default was, where the default was measured (as it must have been
    where the records are not the user's ``own``, of this level)."""
    made = [(place, _valid(schedules, valid)) for place, schedules in occasions]
    made = [(place, schedules) for place, schedules in made if schedules]
    found, _ = verdict(made, default)
    if found is None and own and made and not any(default in schedules for _, schedules in made):
        return min(made[0][1], key=lambda one: statistics.median(made[0][1][one]))
    return found.schedule if found else default


def _valid(schedules, valid):
    """Schedule to seconds, of those fields to seconds that are a schedule (still)."""
    found = {valid(dict(fields)): seconds for fields, seconds in schedules.items()}
    found.pop(None, None)
    return found


def _stamp(folder):
    """What changes whenever the records of a folder do."""
    try:
        facts = os.stat(pathlib.Path(folder, RECORDS))
    except OSError as error:
        raise no_records(folder, error) from error
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


def no_records(folder, error=None):
    """The BnnError for a folder in which there are none; ``error``: the OSError that said so."""
    folder = pathlib.Path(folder)
    if not folder.exists():
        why = "there is no such folder"
    elif not folder.is_dir():
        why = "this is a file, records are a folder"
    elif error is not None and not isinstance(error, FileNotFoundError):
        why = error.strerror
    else:
        why = f"the folder {'has no file ' + RECORDS if any(folder.iterdir()) else 'is empty'}"
    hint = "give a folder that `bnntvm tune MODEL --database DIR` wrote; a session that measured nothing leaves no records"
    return BnnError("no tuning records here", where=str(folder), why=why, hint=hint)


@functools.lru_cache(maxsize=8)
def _occasions(folder, _modified, vendor=""):
    """(task, isa, threads) -> :func:`comparisons`, of records that ``vendor``'s processors measured."""
    found = [record for record in read(folder)[0] if vendor in ("", vendor_of(record.machine))]
    return {key: comparisons(schedules) for key, schedules in by_task(found).items()}


def shipped():
    """The folder of records that is part of the package, or None."""
    folder = pathlib.Path(__file__).parent.parent / "records"
    return folder if (folder / RECORDS).exists() else None
