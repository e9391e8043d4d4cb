"""`slotwise plan`: show, diff and verify plans.

What always holds: wherever a plan is asked for, a plan file or a checkpoint folder will do; `verify` exits with 1 and
names the rule when a plan cannot be trusted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from slotwise.cli._options import PLAN_OPTIONS, add_plan_options, plan_values
from slotwise.core.errors import OptionError, nearest
from slotwise.core.graph import Graph
from slotwise.core.printer import format_graph
from slotwise.llm import plan_model
from slotwise.plans.compile import pass_names
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
        description="Compare two plans. Options are both plans', those that begin with --right are the second's alone.",
    )
    diff.add_argument("left", metavar="PLAN", help="a plan file or a checkpoint folder")
    diff.add_argument("right", metavar="PLAN", help="another")
    add_plan_options(diff)
    diff.add_argument("--right-speculate", type=int, metavar="K", help="the second plan's --speculate")
    diff.add_argument("--right-backend", metavar="B", help="the second plan's --backend")
    diff.add_argument("--right-preset", metavar="P", help="the second plan's --preset")
    diff.set_defaults(run=run_diff)
    verify = parts.add_parser("verify", help="check a plan by every rule")
    verify.add_argument("plan", metavar="PLAN", help="a plan file or a checkpoint folder")
    add_plan_options(verify)
    verify.set_defaults(run=run_verify)


def run_show(parsed: argparse.Namespace) -> int:
    """Print or save a plan."""
    wanted = parsed.print_after
    if wanted is not None and wanted not in pass_names():
        known = ", ".join(pass_names())
        raise OptionError(
            f"--print-after {wanted!r}: no such pass{nearest(wanted, pass_names())}; the passes are {', '.join(pass_names())}"
        )

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
            raise OptionError(f"--program {parsed.program!r}: no such program{nearest(parsed.program, programs)}")
        print(show_program(programs[parsed.program], rejections=True))
    elif wanted is None:
        print(show_plan(plan, programs=parsed.programs))
    return 0


def run_diff(parsed: argparse.Namespace) -> int:
    """Print the differences; exit code 0 when there are none, 1 when there are (as diff does)."""
    values = plan_values(parsed)
    changed = argparse.Namespace(**dict.fromkeys(PLAN_OPTIONS))
    for name in ("speculate", "backend", "preset"):
        setattr(changed, name, getattr(parsed, f"right_{name}"))
    left = _plan(parsed.left, values, None)
    right = _plan(parsed.right, {**values, **plan_values(changed)}, None)
    text = left.diff(right)
    if text:
        print(text)
    return 1 if text else 0


def run_verify(parsed: argparse.Namespace) -> int:
    """Verify, and say what was checked."""
    plan = _plan(parsed.plan, plan_values(parsed), None)
    plan.verify()
    print(
        f"verified: {len(plan.programs)} programs, {len(plan.steps)} steps proved in bounds, backends {', '.join(plan.backends)}"
    )
    return 0


def _plan(source: str, values: dict[str, Any], observe: Any) -> Plan:
    """The plan in a file, or of a checkpoint folder with these options."""
    path = Path(source)
    if path.is_file():
        if values:
            raise OptionError(
                f"{source} is a plan file, which has its options in it; leave out {', '.join(sorted(values))}"
            )
        return Plan.load(path)
    return plan_model(source, observe=observe, **values)
