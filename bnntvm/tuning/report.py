"""What a database of records says: the best schedules, their gain, and how the search went."""

from __future__ import annotations

import json
import pathlib
import statistics
from dataclasses import dataclass, field

from bnntvm.errors import BnnError
from bnntvm.tuning import records


@dataclass
class TaskSummary:
    """One task on one level of one machine.

    Attributes
    ----------
    task, isa, threads, machine
        See :class:`.records.Record`.
    name : str
    measured, failed : int
        Candidates; how often they were compared afterwards does not count.
    default_us : float or None
        Microseconds with the default schedule; None if it was not measured.
    best_us : float or None
        With the schedule that builds use; None if every candidate failed.
    compared : str
        Where it was compared with the default: ``network``, ``alone``, ``board`` or ``device``; ``too noisy`` where the machine was too
        busy to tell, and the default stays; ``-`` where there is nothing to compare; empty where it was not yet.
    schedule : dict
        The best one's fields.
    curve : list of float
        Best microseconds so far, after each candidate, failed ones included.
    """

    task: str
    isa: str
    threads: int
    machine: str
    name: str
    measured: int
    failed: int
    default_us: float | None
    best_us: float | None
    compared: str
    schedule: dict
    curve: list = field(default_factory=list)

    @property
    def gain(self):
        """Time with the default schedule over time with the best; None where one is unknown."""
        return self.default_us / self.best_us if self.default_us and self.best_us else None


def title(key):
    """A short name from a task's key."""
    content = json.loads(key)
    spec, rows = content["spec"], content["rows"]
    window = spec.get("window")
    channels = spec.get("in_channels", spec.get("in_features", spec.get("channels")))
    out = spec.get("out_channels", spec.get("out_features"))
    parts = [content["family"]]
    if window:
        parts.append("x".join(map(str, window["kernel"])))
        parts.append(f"{window['in_height']}x{window['in_width']}")
    elif spec.get("spatial"):
        parts.append("x".join(map(str, spec["spatial"])))
    elif rows > 1:
        parts.append(f"{rows} rows")
    if channels is not None:
        parts.append(("+".join(map(str, channels)) if isinstance(channels, list) else str(channels)) + (f"-{out}" if out else ""))
    if window and window.get("strides", [1, 1]) != [1, 1]:
        parts.append(f"/{window['strides'][0]}")
    return " ".join(parts)


def _title(key, task):
    """:func:`title`, or the task's id where another version wrote the key."""
    try:
        return title(key)
    except (LookupError, TypeError, AttributeError, ValueError):
        return task


def summarise(folder):
    """Every task of a folder.

    Returns
    -------
    (list of TaskSummary, list of int)
        Longest with default schedules first; and the numbers of lines that could not be read.
    """
    found, bad = records.read(folder)
    names = {task: _title(key, task) for task, key in records.keys(folder).items()}
    groups = {}
    for record in found:
        groups.setdefault((record.task, record.isa, record.threads, record.machine), []).append(record)
    summaries = [_summary(key, own, names.get(key[0], key[0])) for key, own in groups.items()]
    return sorted(summaries, key=lambda s: -(s.default_us or s.best_us or 0)), bad


def _summary(key, own, name):
    curve, best = [], float("inf")
    for record in (one for one in own if not one.compared):
        best = min(best, record.time if not record.failed else float("inf"))
        curve.append(best * 1e6)
    failed = {r.schedule for r in own if r.failed}
    measured = {r.schedule for r in own} - failed
    default_us, best_us, schedule, compared = _outcome(own)
    return TaskSummary(*key, name, len(measured), len(failed), default_us, best_us, compared, dict(schedule), curve)


def _outcome(own):
    """(microseconds with the default, with the best schedule, that schedule, where they were compared) of a task's records."""
    (schedules,) = records.by_task(own).values()
    occasions = records.comparisons(schedules)
    marked = any(r.default is not None for r in own)  # older records do not say which is the default: it is measured first
    default = next((r.schedule for r in own if r.default), None) if marked else own[0].schedule
    judged, place = records.verdict(occasions, default)
    if judged:
        compared = "-" if len(schedules) == 1 else "too noisy" if judged.noisy else place.partition(" ")[0]
        return judged.default * 1e6, judged.seconds * 1e6, judged.schedule, compared
    known = {s: statistics.median(seconds) for s, seconds in occasions[0][1].items()} if occasions else {}
    best = min(known, key=known.get, default=())
    return None, known[best] * 1e6 if known else None, best, ""


def table(summaries):
    """Text: for each machine, level and number of threads a head and one line for each task."""
    groups = {}
    for s in summaries:
        groups.setdefault((s.machine, s.isa, s.threads), []).append(s)
    return "\n\n".join(_table(*key, own) for key, own in groups.items())


def _table(machine, isa, threads, summaries):
    lines = [
        f"{machine or 'a machine that the records do not name'}, {isa}, {threads} thread{'s' * (threads > 1)}",
        f"{'task':<44} {'measured':>8} {'failed':>6} {'default':>11} {'best':>11} {'gain':>7}  {'compared':<9}  schedule",
    ]
    for s in summaries:
        choice = ", ".join(f"{name}={value}" for name, value in s.schedule.items())
        lines.append(
            f"{s.name:<44} {s.measured:>8} {s.failed:>6} {_us(s.default_us):>11} {_us(s.best_us):>11} "
            f"{_gain(s):>7}  {s.compared or 'not yet':<9}  {choice}"
        )
    return "\n".join(lines)


def _gain(summary):
    """In parentheses where the candidates were timed one by one only."""
    text = f"{summary.gain:.2f}x" if summary.gain else "-"
    return text if summary.compared or not summary.gain else f"({text})"


def _us(value):
    return "-" if value is None else f"{value:.1f} us"


def plot(summaries, path):
    """A picture: for each task the best time so far over candidates, and time before and after for each task.

    Parameters
    ----------
    path : path
        .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5 + 0.16 * len(summaries)), layout="constrained")
    left, right = figure.subplots(1, 2)
    for s in summaries:
        base = s.default_us or next((v for v in s.curve if v < float("inf")), 1.0)
        left.step(range(1, len(s.curve) + 1), [base / v for v in s.curve], where="post", label=s.name, linewidth=1)
    left.set(xlabel="measured candidates", ylabel="speed relative to the default schedule", title="best so far")
    if len(summaries) <= 12:
        left.legend(fontsize=7)
    names = [s.name for s in summaries][::-1]
    for offset, (label, values) in enumerate(
        (("default", [s.default_us or 0 for s in summaries]), ("tuned", [s.best_us or 0 for s in summaries]))
    ):
        right.barh([i + 0.2 - 0.4 * offset for i in range(len(names))], values[::-1], height=0.4, label=label)
    right.set_yticks(range(len(names)), names, fontsize=7)
    right.set(xlabel="microseconds", title="before and after")
    right.legend()
    try:
        figure.savefig(pathlib.Path(path))
    except (OSError, ValueError) as error:
        raise BnnError("the picture could not be written", where=str(path), why=str(error), hint="give a path of .svg or .png") from error
