"""`slotwise xval`: every kernel against the float64 oracle, and backends against each other.

What always holds: it exits with 1 when anything is out of its declared tolerance, or passes where a waiver says that it
cannot; what is wrong is printed in full whatever else was asked for; how many trials there are and about how long
they take is said before they begin.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from slotwise.cli._output import write_output
from slotwise.core.errors import OptionError


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "xval",
        help="validate every kernel against its oracle",
        description="Run every op's kernels on its cases, in every dtype, between guard zones, against the op's "
        "definition in float64 and against each other.",
    )
    parser.add_argument("--plan", metavar="F", help="validate exactly the calls of this saved plan")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument(
        "--quick",
        action="store_true",
        help="every kernel and dtype once, about two minutes (the default without --plan and --case)",
    )
    extent.add_argument("--all", action="store_true", help="every case")
    many = parser.add_argument_group("filters (each may be repeated; op and case are patterns, * for any)")
    many.add_argument("--op", action="append", metavar="OP")
    many.add_argument("--backend", action="append", metavar="B")
    many.add_argument("--dtype", action="append", metavar="T")
    many.add_argument("--case", action="append", metavar="C")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="draws other inputs (default 0)")
    parser.add_argument("--waivers", metavar="F", help="a TOML file of failures that are known, each with its reason")
    parser.add_argument("--no-time", dest="timed", action="store_false", help="do not time the kernels")
    output = parser.add_argument_group("output")
    output.add_argument("--every-case", action="store_true", help="a line for each case, not for each kernel and dtype")
    output.add_argument("--json", action="store_true", help="print JSON instead of tables")
    output.add_argument("--html", metavar="F", help="write a page that needs nothing else")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Validate and report; exit code 1 when something is wrong."""
    from rich.console import Console

    from slotwise.inspect.crossvalidate import crossvalidate
    from slotwise.inspect.crossvalidate_report import show
    from slotwise.plans.plan import Plan
    from slotwise.progress import lines, progress_for

    if parsed.quick and (parsed.plan or parsed.case):
        raise OptionError("--quick chooses cases itself; leave it out with --plan and --case, which name them")
    with progress_for(None) if sys.stderr.isatty() else lines() as report:
        found = crossvalidate(
            None if parsed.plan is None else Plan.load(parsed.plan),
            backends=parsed.backend,
            ops=parsed.op,
            dtypes=parsed.dtype,
            cases=parsed.case,
            quick=not parsed.all,
            seed=parsed.seed,
            waivers=parsed.waivers or (),
            timed=parsed.timed,
            progress=report,
            announce=lambda text: print(f"slotwise: {text}", file=sys.stderr, flush=True),
        )
    if parsed.html:
        write_output("--html", parsed.html, found.to_html())
    if parsed.json:
        print(found.to_json(), end="")
    else:
        is_terminal = sys.stdout.isatty()
        show(found, Console(width=None if is_terminal else 160), every_case=parsed.every_case)
    return 0 if found.passed else 1
