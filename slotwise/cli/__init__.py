"""The command line: `slotwise COMMAND`.

Owns the parser and the way errors end. What always holds: a SlotwiseError is one sentence on the error stream and exit
code 1, a wrong use exit code 2, Ctrl-C a clean end with exit code 130; results go to the output stream, all else to the
error stream. A command is a module here with `add_parser` and `run`, found by looking at the folder.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import pkgutil
import sys
from collections.abc import Sequence

import slotwise
from slotwise.core.errors import SlotwiseError


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command in this folder."""
    parser = argparse.ArgumentParser(
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
    """Run a command; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what this terminal's encoding lacks
    parsed = build_parser().parse_args(arguments)
    try:
        return _run(parsed)
    except BrokenPipeError:
        # The reader has gone (`| head`): nothing is wrong, and nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"slotwise {parsed.command}: error: the output cannot be written: {error}", file=sys.stderr)
        return 1


def _run(parsed: argparse.Namespace) -> int:
    try:
        code: int = parsed.run(parsed)
    except SlotwiseError as error:
        sys.stdout.flush()
        print(f"slotwise {parsed.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    sys.stdout.flush()
    return code
