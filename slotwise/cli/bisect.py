"""`slotwise bisect`: find the first step and op at which two generations part.

What always holds: it exits with 0 when the tokens are the same, and with 1 when they differ, for whatever reason.
"""

from __future__ import annotations

import argparse
from typing import Any

from slotwise.cli._options import add_model_options, add_plan_options, add_sampling_options, plan_values
from slotwise.cli._parser import Parser
from slotwise.cli._prompts import add_prompt_options, requests_of
from slotwise.core.errors import OptionError


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "bisect",
        help="find where two generations part",
        description="Generate twice, as the options say and as those after --against change them, and find the first "
        "token, step and op that differ: bisect MODEL --prompt TEXT --backend a --against --backend b",
    )
    add_model_options(parser)
    add_prompt_options(parser)
    add_sampling_options(parser)
    parser.add_argument(
        "--against", nargs=argparse.REMAINDER, default=[], metavar="...", help="the second run's options"
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Bisect and report."""
    from slotwise.inspect.bisect import bisect
    from slotwise.llm import LLM

    if parsed.plan is not None:
        raise OptionError("bisect compiles both plans from options; leave out --plan")
    second = Parser("slotwise bisect MODEL --against", allow_abbrev=False)
    add_plan_options(second)
    values, changes = plan_values(parsed), plan_values(second.parse_args(parsed.against))
    if not changes:
        raise OptionError("there is nothing to compare with; say what differs after --against (--backend b, say)")

    def load_left() -> LLM:
        return LLM(parsed.model, threads=parsed.threads, progress=False, **values)

    def load_right() -> LLM:
        return LLM(parsed.model, threads=parsed.threads, progress=False, **{**values, **changes})

    found = bisect(load_left, load_right, requests_of(parsed, load_left()))
    print(found)
    return 0 if found.verdict == "same" else 1
