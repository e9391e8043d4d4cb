"""Progress bars for long work.

What always holds: they go to the error stream, only to a terminal unless asked for, and only once the work has taken a
moment; what is piped or quick shows nothing, and a bar that was shown is gone when the work ends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

Report = Callable[[str, int, int], None]
"""Called as (what, done, total)."""

PATIENCE = 0.5
"""Seconds before a bar appears."""


@contextmanager
def progress_for(wanted: bool | None) -> Iterator[Report | None]:
    """A function to report with, or None where nothing is to be shown; `wanted` None means on a terminal only."""
    if wanted is False or (wanted is None and not sys.stderr.isatty()):
        yield None
        return
    bars = Bars()
    _shown.append(bars)
    try:
        yield bars.report
    finally:
        _shown.remove(bars)
        bars.end()


_shown: list[Bars] = []


def end_all() -> None:
    """Take all bars away, for a process that is about to end without unwinding."""
    for bars in _shown:
        bars.end()


class Bars:
    """One bar for each kind of work reported; the terminal is not touched before the first."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._tasks: dict[str, TaskID] = {}
        self._shown: Progress | None = None

    def report(self, what: str, done: int, total: int) -> None:
        """Say how far `what` is; see `Report`."""
        if time.monotonic() - self._started < PATIENCE or not total:
            return
        if self._shown is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self._shown = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
            self._shown.start()
        if what not in self._tasks:
            self._tasks[what] = self._shown.add_task(what, total=total)
        self._shown.update(self._tasks[what], completed=done, total=total, visible=done < total)

    def end(self) -> None:
        """Take the bars away."""
        if self._shown is not None:
            self._shown.stop()
