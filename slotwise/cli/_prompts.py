"""Prompts on the command line, for commands that run requests themselves.

What always holds: every request has a seed, so that a second run is the same run.
"""

from __future__ import annotations

import argparse
import codecs
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from slotwise.cli._options import sampling_of
from slotwise.core.errors import OptionError, RequestError

if TYPE_CHECKING:
    from slotwise.engine.request import Request
    from slotwise.llm import LLM


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """--prompt and --prompt-file, each as often as wanted."""
    group = parser.add_argument_group("prompt (one or more)")
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt (may be repeated)")
    group.add_argument(
        "--prompt-file",
        action="append",
        default=[],
        metavar="F",
        help="a file with a prompt, its last line end left out; - for standard input",
    )


def prompts_of(parsed: argparse.Namespace) -> list[str]:
    """The prompts given; raises OptionError when there is none."""
    prompts = [*parsed.prompt, *(_read(name) for name in parsed.prompt_file)]
    if not prompts:
        raise OptionError("there is nothing to complete; give --prompt TEXT or --prompt-file F")
    return prompts


def requests_of(parsed: argparse.Namespace, llm: LLM) -> list[Request]:
    """A request for each prompt, with the sampling options; seed 0 where none is given."""
    sampling = sampling_of(parsed, llm)
    sampling = replace(sampling, seed=0) if sampling.seed is None else sampling
    return [llm.requests.request(prompt, sampling) for prompt in prompts_of(parsed)]


def _read(name: str) -> str:
    """A file's text without its byte order mark and its last line end, whose line ends are all `\\n`."""
    try:
        raw = _standard_input() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise RequestError(f"prompt file {name} cannot be read: {error}; give a file of UTF-8 text") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = " (it begins as UTF-16 does)" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ""
        raise RequestError(
            f"prompt file {name} is not UTF-8 text{kind}: {error.reason} 0x{raw[error.start]:02x} at byte "
            f"{error.start}; give a file of UTF-8 text"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def _standard_input() -> bytes:
    """All of standard input; raises OSError where it is closed."""
    if sys.stdin is None:
        raise OSError("standard input is closed")
    return sys.stdin.buffer.read()
