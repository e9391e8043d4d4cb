"""`slotwise lockstep`: run one plan on two or more backends, op by op, on the same inputs.

What always holds: it exits with 1 at the first op out of tolerance, and prints that op with all that is known of it.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from slotwise.cli._options import add_model_options, add_sampling_options, load, parse_backend
from slotwise.cli._output import write_output
from slotwise.cli._prompts import add_prompt_options, requests_of


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "lockstep",
        help="run one plan on several backends, op by op",
        description="Generate on one backend and run every op on others too, on the same inputs; stop at the first out "
        "of tolerance.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--with",
        dest="followers",
        action="append",
        required=True,
        metavar="B",
        help="a backend that follows, or a preference per op (*=a,attention=b); may be repeated",
    )
    parser.add_argument(
        "--free-run", action="store_true", help="let each follower keep its own values, and show how errors grow"
    )
    add_prompt_options(parser)
    add_sampling_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--html", metavar="F", help="with --free-run, write a page with the growth of errors")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Run and report; exit code 1 when an op is out of tolerance."""
    from slotwise.inspect.lockstep_run import run_lockstep

    llm = load(parsed)
    followers = {name: parse_backend(name) for name in parsed.followers}
    report = run_lockstep(llm, followers, requests_of(parsed, llm), free_run=parsed.free_run)
    if parsed.html:
        write_output("--html", parsed.html, report.to_html())
    print(json.dumps(report.to_data()) if parsed.json else report)
    return 0 if report.passed else 1
