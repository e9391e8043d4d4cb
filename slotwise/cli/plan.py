"""`slotwise plan`: show, diff and verify plans.

What always holds: wherever a plan is asked for, a plan file or a checkpoint folder will do; `verify` exits with 1 and
names the rule when a plan cannot be trusted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from slotwise.cli._options import add_plan_options, plan_values
from slotwise.core.errors import OptionError, nearest
from slotwise.core.graph import Graph
from slotwise.core.printer import format_graph
from slotwise.planning import plan_model
from slotwise.plans.compile import Observer, pass_names
from slotwise.plans.plan import Plan
from slotwise.plans.show import show_plan, show_program


def add_parser(commands: Any) -> None:
    """Add the command and its parts."""
    parser = commands.add_parser("plan", help="show, diff and verify plans", description=__doc__.partition("\n")[0])
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    show = parts.add_parser("show", help="print a plan")
    show.add_argument("plan", metavar="PLAN", help="a plan file or a checkpoint folder")
    show.add_argument("--programs", action="store_true", help="print every call of every program")
    show.add_argument("--program", metavar="NAME", help="print one program (target.decode.1, say) and why its kernels")
    show.add_argument("--json", action="store_true", help="print the JSON form")
    show.add_argument("--save", metavar="F", help="write the JSON form to a file")
    show.add_argument("--print-after", metavar="PASS", help="print each graph after this pass")
    add_plan_options(show)
    show.set_defaults(run=run_show)
    diff = parts.add_parser(
        "diff",
        help="compare two plans",
        description="Compare two plans: two files or folders, or one folder planned in two ways. Options hold for both "
        "plans; those after --against change the second: plan diff MODEL --draft D --against --speculate 0",
    )
    diff.add_argument("left", metavar="PLAN", help="a plan file or a checkpoint folder")
    diff.add_argument("right", metavar="PLAN", nargs="?", help="another (default: the same)")
    add_plan_options(diff)
    diff.add_argument(
        "--against", nargs=argparse.REMAINDER, default=[], metavar="...", help="the second plan's options"
    )
    diff.set_defaults(run=run_diff)
    verify = parts.add_parser("verify", help="check a plan by every rule")
    verify.add_argument("plan", metavar="PLAN", help="a plan file or a checkpoint folder")
    add_plan_options(verify)
    verify.set_defaults(run=run_verify)


def run_show(parsed: argparse.Namespace) -> int:
    """Print or save a plan."""
    wanted, known = parsed.print_after, pass_names()
    if wanted is not None and wanted not in known:
        raise OptionError(
            f"--print-after {wanted!r}: no such pass{nearest(wanted, known)}; the passes are {', '.join(known)}"
        )
    if wanted is not None and Path(parsed.plan).is_file():
        raise OptionError(f"--print-after needs a checkpoint folder to compile; {parsed.plan} is a finished plan")

    def observe(name: str, where: str, graph: Graph) -> None:
        if name == wanted:
            print(f"after {name}, {where}:\n{format_graph(graph)}\n")

    plan = _plan(parsed.plan, plan_values(parsed), observe if wanted is not None else None)
    if parsed.save:
        try:
            plan.save(parsed.save)
        except OSError as error:
            raise OptionError(f"--save {parsed.save}: cannot be written: {error}") from error
        print(f"saved to {parsed.save}", file=sys.stderr)
    if parsed.json:
        print(plan.to_json(), end="")
    elif parsed.program is not None:
        programs = {program.name: program for program in plan.programs}
        if parsed.program not in programs:
            raise OptionError(
                f"--program {parsed.program!r}: no such program{nearest(parsed.program, programs)}; "
                f"there are {', '.join(programs)}"
            )
        print(show_program(programs[parsed.program], rejections=True))
    elif wanted is None:
        print(show_plan(plan, programs=parsed.programs))
    return 0


def run_diff(parsed: argparse.Namespace) -> int:
    """Print the differences; exit code 0 when there are none, 1 when there are (as diff does)."""
    second = argparse.ArgumentParser("slotwise plan diff PLAN --against", allow_abbrev=False)
    add_plan_options(second)
    values, changes = plan_values(parsed), plan_values(second.parse_args(parsed.against))
    left = _plan(parsed.left, values)
    right = _plan(parsed.right or parsed.left, {**values, **changes})
    text = left.diff(right)
    if not text:
        print("the plans are equal", file=sys.stderr)
        return 0
    print(text)
    return 1


def run_verify(parsed: argparse.Namespace) -> int:
    """Verify, and say what was checked."""
    plan = _plan(parsed.plan, plan_values(parsed))
    plan.verify()
    print(
        f"verified: {len(plan.programs)} programs, {len(plan.steps)} steps proved in bounds, "
        f"backends {', '.join(plan.backends)}"
    )
    return 0


def _plan(source: str, values: dict[str, Any], observe: Observer | None = None) -> Plan:
    """The plan in a file, or of a checkpoint folder with these options."""
    path = Path(source)
    if path.is_file():
        if values:
            raise OptionError(
                f"{source} is a plan file, which has its options in it; leave out {', '.join(sorted(values))}"
            )
        return Plan.load(path)
    if not path.exists():
        raise OptionError(f"{source} does not exist; give a plan file or a checkpoint folder")
    return plan_model(source, observe=observe, **values)
