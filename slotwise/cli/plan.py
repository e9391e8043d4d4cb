"""`slotwise plan`: show, diff, verify, fit and view plans, and recordings with the plans in them.

What always holds: wherever a plan is asked for, a plan file or a checkpoint folder will do, for `diff` and `view` a
recording too; `verify` exits with 1 and names the rule when a plan cannot be trusted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slotwise.cli._options import add_plan_options, plan_values
from slotwise.cli._output import write_output
from slotwise.cli._parser import Parser
from slotwise.core.errors import CheckpointError, OptionError, nearest

if TYPE_CHECKING:
    from slotwise.core.graph import Graph
    from slotwise.plans.compile import AfterPass
    from slotwise.plans.plan import Plan


def add_parser(commands: Any) -> None:
    """Add the command and its parts."""
    parser = commands.add_parser(
        "plan", help="show, diff, verify, fit and view plans", description=__doc__.partition("\n")[0]
    )
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
        description="Compare two plans: two files or folders, or one folder planned in two ways; or two recordings, "
        "plans and runs. Options hold for both plans; those after --against change the second: "
        "plan diff MODEL --draft D --against --speculate 0",
    )
    diff.add_argument("left", metavar="PLAN", help="a plan file, a checkpoint folder, or a recording")
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
    fit = parts.add_parser(
        "fit",
        help="what fits a memory, before anything is loaded",
        description="For each form of weights, what a plan takes part by part and the largest capacity that fits. Only "
        "the config and the headers of the checkpoint are read. With --capacity, whether that fits.",
    )
    fit.add_argument("plan", metavar="MODEL", help="a checkpoint folder")
    fit.add_argument("--sequences", dest="max_sequences", type=int, metavar="N", help="the same as --max-sequences")
    fit.add_argument("--json", action="store_true", help="print JSON")
    add_plan_options(fit)
    fit.set_defaults(run=run_fit)
    view = parts.add_parser(
        "view",
        help="write a page, or a trace, of a plan or a recording",
        description="Write one page that needs nothing else: a plan's calls with bytes, flops and roofline time, its "
        "arena, and for a recording its slots at every step. Or a trace for Perfetto.",
    )
    view.add_argument("plan", metavar="PLAN", help="a plan file, a checkpoint folder, or a recording")
    view.add_argument(
        "-o", "--output", metavar="F", help="the file to write (default: PLAN's name with .html or .json)"
    )
    view.add_argument("--format", choices=("html", "perfetto"), default="html", help="a page, or a trace for Perfetto")
    view.add_argument("--bandwidth", type=_positive, metavar="GB/S", help="for roofline times")
    view.add_argument("--gflops", type=_positive, metavar="GFLOP/S", help="for roofline times")
    add_plan_options(view)
    view.set_defaults(run=run_view)


def run_show(parsed: argparse.Namespace) -> int:
    """Print or save a plan."""
    from slotwise.core.printer import format_graph
    from slotwise.plans.compile import pass_names
    from slotwise.plans.show import show_plan, show_program

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
        write_output("--save", parsed.save, plan.to_json())
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
    from slotwise.inspect.diff import diff_recordings
    from slotwise.recording.file import is_recording, read_recording

    second = Parser("slotwise plan diff PLAN --against", allow_abbrev=False)
    add_plan_options(second)
    values, changes = plan_values(parsed), plan_values(second.parse_args(parsed.against))
    if is_recording(parsed.left) and parsed.right and is_recording(parsed.right):
        text, what = diff_recordings(read_recording(parsed.left), read_recording(parsed.right)), "recordings"
    else:
        left = _plan(parsed.left, values)
        right = _plan(parsed.right or parsed.left, {**values, **changes})
        text, what = left.diff(right), "plans"
    if not text:
        print(f"the {what} are equal", file=sys.stderr)
        return 0
    print(text)
    return 1


def run_fit(parsed: argparse.Namespace) -> int:
    """Print what fits; exit code 0 where something does, else 1."""
    from slotwise.inspect.fit import fit_json, fit_table
    from slotwise.planning import memory_here, open_models, subject_of
    from slotwise.plans.fit import survey
    from slotwise.plans.memory import Budget
    from slotwise.plans.options import WEIGHTS

    values = plan_values(parsed)
    memory, named = (values.pop(name, None) for name in ("memory", "weights"))
    given = None if memory is None else Budget.given(memory)
    draft, preset = (values.pop(name, None) for name in ("draft", "preset"))
    loaded, drafter, options = open_models(parsed.plan, draft, preset, {**values, "weights": named})
    budget = given or memory_here(options)
    if budget is None:
        raise OptionError("this system does not say how much memory it has; give --memory, 24GiB, say")
    subject = subject_of(loaded, drafter)
    rows = survey(subject, options, budget, WEIGHTS if named is None else (named,))
    print((fit_json if parsed.json else fit_table)(subject, options, budget, rows))
    return 0 if any(row.fits for row in rows) else 1


def run_view(parsed: argparse.Namespace) -> int:
    """Write the page or the trace."""
    from slotwise.inspect.perfetto import trace
    from slotwise.inspect.view import BANDWIDTH, GFLOPS, view_page
    from slotwise.recording.file import is_recording, read_recording

    recording = read_recording(parsed.plan) if is_recording(parsed.plan) else None
    plan = _plan(parsed.plan, plan_values(parsed)) if recording is None else recording.plan
    roofline = {"bandwidth": parsed.bandwidth or BANDWIDTH, "gflops": parsed.gflops or GFLOPS}
    is_page = parsed.format == "html"
    text = view_page(plan, recording, **roofline) if is_page else trace(plan, recording, **roofline)
    name = Path(parsed.plan).resolve()
    default = f"{name.name if name.is_dir() else name.stem}.{'html' if is_page else 'perfetto.json'}"
    write_output("--output", parsed.output or default, text)
    return 0


def run_verify(parsed: argparse.Namespace) -> int:
    """Verify, and say what was checked."""
    plan = _plan(parsed.plan, plan_values(parsed))
    plan.verify()
    print(
        f"verified: {len(plan.programs)} programs, {len(plan.steps)} steps proved in bounds, "
        f"backends {', '.join(plan.backends)}"
    )
    return 0


def _plan(source: str, values: dict[str, Any], observe: AfterPass | None = None) -> Plan:
    """The plan in a file, or of a checkpoint folder with these options."""
    from slotwise.models.folder import is_repository
    from slotwise.planning import plan_model
    from slotwise.plans.memory import Budget, refuse_beyond
    from slotwise.plans.plan import Plan
    from slotwise.recording.file import is_recording, read_recording

    path = Path(source)
    if is_recording(source):
        return read_recording(source).plan
    if path.is_file():
        memory = values.get("memory")
        values = {name: value for name, value in values.items() if name != "memory"}
        if values:
            raise OptionError(
                f"{source} is a plan file, which has its options in it; leave out {', '.join(sorted(values))}"
            )
        plan = Plan.load(path)
        if memory is not None:
            refuse_beyond(plan, Budget.given(memory))
        return plan
    if not path.exists() and not is_repository(source):
        raise CheckpointError(f"{source} does not exist; give a plan file or a checkpoint folder")
    return plan_model(source, observe=observe, **values)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value
