"""Running `slotwise` commands: in this process, and as a shell does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code and both streams."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def start(*arguments: object, terminal: int | None = None, cache: Path | None = None) -> subprocess.Popen[str]:
    """A command in a process of its own, with pipes for all streams; `terminal` takes its output streams instead.

    `cache` is where it keeps compiled kernels.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "TERM": "xterm", "COLUMNS": "80"}
    if cache is not None:
        environment["SLOTWISE_CACHE"] = str(cache)
    words = [sys.executable, "-m", "slotwise", *map(str, arguments)]
    shown = subprocess.PIPE if terminal is None else terminal
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=shown, stderr=shown, text=True, env=environment)


def pipe(stream: IO[str] | None) -> IO[str]:
    """A process's stream, which is there because `start` made it a pipe."""
    if stream is None:
        raise ValueError("the process was started without this pipe")
    return stream
