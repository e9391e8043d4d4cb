"""Progress bars for long work, and the news of it.

What always holds: both go to the error stream. Bars show only on a terminal unless asked for, and only once the work
has taken a moment; what is piped or quick shows none, and a bar that was shown is gone when the work ends. News, what
a part logs while a model is loaded (kernels are compiled, say), is a line wherever it goes; who has set up logging of
their own gets it there instead.
"""

from __future__ import annotations

import logging
import sys
import threading
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


LINE_EVERY = 10.0
"""Seconds between two lines of progress, where there is no terminal for a bar."""


@contextmanager
def lines() -> Iterator[Report]:
    """A function to report with that writes a line now and then."""
    started = last = time.monotonic()

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_EVERY or not done:
            return
        last = now
        print(f"slotwise: {what}: {done} of {total} after {now - started:.0f} s", file=sys.stderr, flush=True)

    yield report


_shown: list[Bars] = []


def end_all() -> None:
    """Take all bars away, for a process that is about to end without unwinding."""
    for bars in _shown:
        bars.end()


@contextmanager
def news_for(wanted: bool | None) -> Iterator[None]:
    """Have what parts log as information or worse be a line on the error stream; `wanted` False has it not."""
    with _News.guard:
        is_ours = wanted is not False and (_News.users > 0 or not _logger.hasHandlers())
        if is_ours:
            _News.users += 1
        if is_ours and _News.users == 1:
            _News.level_before = _logger.level
            _logger.addHandler(_news)
            _logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        with _News.guard:
            if is_ours:
                _News.users -= 1
            if is_ours and _News.users == 0:
                _logger.removeHandler(_news)
                _logger.setLevel(_News.level_before)


class _News(logging.Handler):
    """Writes a line above the bar that is shown, if one is."""

    guard = threading.Lock()
    users = 0
    level_before = logging.NOTSET

    def emit(self, record: logging.LogRecord) -> None:
        text = f"slotwise: {record.getMessage()}"
        if not any(bars.write_above(text) for bars in _shown):
            print(text, file=sys.stderr, flush=True)


_logger = logging.getLogger("slotwise")
_news = _News()


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

    def write_above(self, text: str) -> bool:
        """Write a line above the bars; False where none is shown."""
        if self._shown is None:
            return False
        self._shown.console.print(text, markup=False, highlight=False, soft_wrap=True)
        return True

    def end(self) -> None:
        """Take the bars away."""
        if self._shown is not None:
            self._shown.stop()
