"""Ctrl-C on the command line, before anything runs that deserves an orderly end.

What always holds: while parts are imported and a model is loaded, Ctrl-C ends the process at once, with one line and
exit code 130. An exception would not do: whoever is imported may turn it into another, swallow it in a callback or
leave half a module behind. There is nothing to lose then: no request runs, and files are written whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130


def leave_at_once() -> None:
    """From now on, have Ctrl-C end the process; not where the caller has it ignored or handles it otherwise."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def leave_in_order() -> None:
    """From now on, have Ctrl-C raise KeyboardInterrupt, as usual."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    progress = sys.modules.get("slotwise.progress")
    if progress is not None:
        progress.end_all()
    with contextlib.suppress(OSError):  # whoever reads the error stream may have gone
        os.write(2, b"\ninterrupted\n")
    os._exit(INTERRUPTED)
