"""The command line: `slotwise COMMAND`.

Owns the parser and the way errors end. What always holds: wrong use is one line on the error stream and exit code 2,
whether the parser finds it or a value makes no sense further in (OptionError); any other SlotwiseError is one sentence
and exit code 1; Ctrl-C a clean end with exit code 130; results go to the output stream, all else to the error stream.
A command is a module here with `add_parser` and `run`, found by looking at the folder; it imports what takes time in
`run`, so that help and a mistyped word are there at once.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import slotwise
from slotwise.cli._interrupt import INTERRUPTED, leave_at_once
from slotwise.cli._parser import Parser
from slotwise.core.errors import OptionError, SlotwiseError

if TYPE_CHECKING:
    import argparse


def build_parser() -> Parser:
    """The parser with every command in this folder."""
    parser = Parser(
        prog="slotwise",
        description="Compile a language model to a plan in which every KV-cache slot is accounted for, and run it.",
    )
    parser.add_argument("--version", action="version", version=f"slotwise {slotwise.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for info in pkgutil.iter_modules(__path__):
        if not info.name.startswith("_"):
            importlib.import_module(f"{__name__}.{info.name}").add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Without `arguments` the process is the command's own, and Ctrl-C too."""
    if arguments is None:
        leave_at_once()
    # A stream that the caller closed is None: what would be written there is meant for nobody.
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what this terminal's encoding lacks
    name = "slotwise"
    try:
        parsed = _parse(arguments)
        name = f"slotwise {parsed.command}"
        return _run(parsed)
    except BrokenPipeError:
        # The reader has gone (`| head`): nothing is wrong, and nothing more can be written.
        _write_no_more()
        return 141
    except OSError as error:
        _write_no_more()
        what = error if error.filename is not None else f"the output cannot be written: {error}"
        print(f"{name}: error: {what}", file=sys.stderr)
        return 1
    finally:
        if arguments is None:
            leave_at_once()  # Python takes a moment to end, and nothing of it is worth a traceback.


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    try:
        return build_parser().parse_args(arguments)
    except SystemExit:
        sys.stdout.flush()  # help may be piped to a reader that leaves
        raise


def _run(parsed: argparse.Namespace) -> int:
    from slotwise.progress import news_for

    try:
        with news_for(None):
            code: int = parsed.run(parsed)
    except SlotwiseError as error:
        sys.stdout.flush()
        print(f"slotwise {parsed.command}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, OptionError) else 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    sys.stdout.flush()
    return code


def _nowhere() -> io.TextIOWrapper:
    return open(os.devnull, "w", encoding="utf-8")


def _write_no_more() -> None:
    """Have what is still buffered for the output stream go nowhere."""
    with contextlib.suppress(OSError):  # a stream of the caller's own may be no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
