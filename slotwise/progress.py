"""Progress bars for long work.

What always holds: they go to the error stream, only to a terminal unless asked for, and only once the work has taken a
moment; what is piped or quick shows nothing.
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
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}
        started = time.monotonic()

        def report(what: str, done: int, total: int) -> None:
            if time.monotonic() - started < PATIENCE or not total:
                return
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total, visible=done < total)

        yield report
