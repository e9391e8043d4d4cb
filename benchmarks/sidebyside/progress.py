"""What is being done, for whoever watches: one line that changes on a terminal, a line now and then elsewhere.

What always holds: it goes to the error stream, so that results can be piped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

EVERY = 20.0
"""Seconds between lines where there is no terminal."""


@contextmanager
def saying() -> Iterator[Callable[[str], None]]:
    """`with saying() as say:` `say(what)` shows what is being done now."""
    if sys.stderr.isatty():
        with Console(stderr=True).status("") as status:
            yield status.update
        return
    last = -EVERY

    def say(what: str) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            print(what, file=sys.stderr, flush=True)

    yield say
