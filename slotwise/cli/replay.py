"""`slotwise replay`: run a recording again and name the first difference.

What always holds: it exits with 0 when the run was the recorded one, and with 1 when anything differed.
"""

from __future__ import annotations

import argparse
from typing import Any

from slotwise.cli._options import parse_backend


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "replay",
        help="run a recording again and compare",
        description="Run a recording (generate --record F) again, with its seeds, and compare every step; on another "
        "backend, compare tokens and say whether they part at a near-tie.",
    )
    parser.add_argument("recording", metavar="FILE", help="a recording, whole or cut short")
    parser.add_argument("--model", metavar="M", help="the checkpoint's folder, where the recorded one has moved")
    parser.add_argument("--draft", metavar="D", help="the draft model's folder, likewise")
    parser.add_argument("--backend", metavar="B", help="run on other backends: a,b, or per op: *=a,attention=b")
    parser.add_argument("--threads", type=int, metavar="N", help="PyTorch's threads (default: as recorded)")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Replay and say what came of it."""
    from slotwise.inspect.replay import replay

    backend = None if parsed.backend is None else parse_backend(parsed.backend)
    found = replay(parsed.recording, model=parsed.model, draft=parsed.draft, backend=backend, threads=parsed.threads)
    print(found)
    return 0 if found.is_same else 1
