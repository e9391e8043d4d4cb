"""Whether a command that is only named would be understood: its parser takes every option and value.

`slotwise` commands go through the command line's own parser, `python FILE` through whatever parser the file makes when
it is run, up to the moment at which it has parsed; a script without options runs whole. A command named without its
arguments (`slotwise plan show`) is understood when all that it does name is.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import sys
from collections.abc import Sequence
from typing import NoReturn
from unittest import mock

import pytest

from slotwise.cli import build_parser
from slotwise.core import backend

from .pages import REPOSITORY

LEFT_OPEN = re.compile(r"the following arguments are required|invalid \w+ value: '[A-Z]+'|'[A-Z]+' is not known")
"""Complaints about what a page leaves to its reader: arguments left out, and words in capitals for values."""


class Parsed(BaseException):
    """The script under test has read its arguments; not an `Exception`, so that no script catches it."""


class Refused(Exception):
    """An argument parser's complaint."""


def _leave(_: argparse.ArgumentParser, status: int = 0, message: str | None = None) -> NoReturn:
    if status:
        raise Refused(message)
    raise Parsed


def _check_options(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Every option among the words is one that the (innermost) parser names in full."""
    for word in words:
        inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if inner and word in inner[0].choices:
            parser = inner[0].choices[word]
        elif re.match(r"--?[a-z]", word) and word.partition("=")[0] not in parser._option_string_actions:
            raise Refused(f"{parser.prog}: it has no option {word}")


def refusal(words: Sequence[str]) -> str:
    """Why the parser of a command does not understand it; empty when it does.

    `words` begins with `slotwise`, or with `python` and a script of the repository.
    """
    try:
        if words[0] == "slotwise":
            parser = build_parser()
            _check_options(parser, words[1:])
            with mock.patch.object(argparse.ArgumentParser, "exit", _leave):
                parser.parse_args(words[1:])
        else:
            _run_until_parsed(words[1:])
    except Refused as error:
        return "" if LEFT_OPEN.search(str(error)) else str(error)
    except Parsed:  # a script that has parsed; --help and --version
        return ""
    return ""


def _run_until_parsed(words: Sequence[str]) -> None:
    script = REPOSITORY / words[0]
    if not script.is_file():
        raise Refused(f"there is no file {words[0]}")
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, _: object = None) -> None:
        _check_options(parser, words[1:])
        parse(parser)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *words[1:]])
        patch.syspath_prepend(str(script.parent))
        patch.setattr(backend, "register_backend", lambda _: None)
        patch.setattr(argparse.ArgumentParser, "exit", _leave)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(script), run_name="__main__")
    if words[1:]:
        raise Refused(f"{words[0]} takes no arguments")
