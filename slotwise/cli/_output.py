"""Files that commands write because an option names them.

What always holds: a file that cannot be written is an OutputError that names option and path; one that was is told on
the error stream.
"""

from __future__ import annotations

import sys
from pathlib import Path

from slotwise.core.errors import OutputError


def write_output(option: str, path: str, text: str) -> None:
    """Write a file that an option names, and say so; raises OutputError when it cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{option} {path}: cannot be written: {error}") from error
    print(f"saved to {path}", file=sys.stderr)
