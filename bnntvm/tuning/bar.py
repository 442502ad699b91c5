"""The progress bar of a tuning session, on standard error."""

from __future__ import annotations

import contextlib
import sys
import time


class _Shown:
    """Counts candidates; shows them if there is a bar."""

    def __init__(self, trials, bar):
        self.trials, self.bar, self.task, self.tuner, self.begin, self.count, self.failed = trials, bar, None, None, time.monotonic(), 0, 0

    def start(self, tuner):
        """Called once, with the session."""
        self.tuner = tuner
        if self.bar:
            self.task = self.bar.add_task("profile", total=self.trials, completed=sum(len(p.measured) for p in tuner.progress.values()))

    def note(self, space, _schedule, seconds):
        """One candidate was measured or failed."""
        self.count += 1
        self.failed += not seconds
        if self.bar:
            rate = self.count / (time.monotonic() - self.begin)
            self.bar.update(
                self.task, advance=1, description=f"{space.task.name}  {rate:.1f}/s" + (f"  {self.failed} failed" if self.failed else "")
            )


@contextlib.contextmanager
def bar(trials, wanted):
    """A bar where standard error is a terminal and one is wanted."""
    if not wanted or not sys.stderr.isatty():
        yield _Shown(trials, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        yield _Shown(trials, shown)
