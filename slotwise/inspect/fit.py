"""What fits a memory, as a table and as JSON.

Owns `fit_table` and `fit_json`. What always holds: both say the same, the numbers of `plans/memory.py`; what a form of
weights cannot do is said in words, and what no number counts is named below the table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from slotwise.core.sizes import size
from slotwise.plans.fit import Row, Subject
from slotwise.plans.memory import Budget, Need, device_of, need_of
from slotwise.plans.options import PlanOptions
from slotwise.plans.plan import Plan

NOT_COUNTED = {
    "cpu": "Not counted: Python, PyTorch and compiled kernels; temporary results of PyTorch's functions, which the\n"
    "backend reference calls; pages of the checkpoint's file, which the system keeps as long as it has room.",
    "cuda": "Not counted: CUDA's context, kernels and captured graphs ({graphs}), which the\n"
    "driver keeps; on the host, tables, copies of arrays, and while loading a copy of the weights.",
}


def fit_table(subject: Subject, options: PlanOptions, budget: Budget, rows: Sequence[Row]) -> str:
    """A column for each form of weights, a line for each part of what its plan takes."""
    plans = {row.weights: row.plan for row in rows if row.plan is not None}
    needs = {name: need_of(plan, overlap=subject.overlap) for name, plan in plans.items()}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("weights")
    for row in rows:
        table.add_column(row.weights, justify="right")

    def line(name: str, texts: dict[str, str]) -> None:
        table.add_row(name, *(texts.get(row.weights, "-") for row in rows))

    line("largest capacity that fits", {row.weights: str(row.capacity) if row.capacity else "none" for row in rows})
    if options.capacity:
        line(f"capacity {options.capacity} fits", {row.weights: "yes" if row.fits else "no" for row in rows})
    line("capacity shown", {name: str(plan.options.capacity) for name, plan in plans.items()})
    line("pages", {name: str(plan.target.pages) for name, plan in plans.items()})
    if options.capacity:
        line("pages that fit", {row.weights: str(row.pages) if row.pages else "none" for row in rows})
    names = dict.fromkeys(part.name for need in needs.values() for part in need.parts)
    for part in names:
        line(part, {name: size(sum(p.nbytes for p in need.parts if p.name == part)) for name, need in needs.items()})
    line("more while loading", {name: size(need.loading) for name, need in needs.items()})
    line("all", {name: size(need.peak) for name, need in needs.items()})
    line(f"of {size(budget.nbytes)}", {name: f"{need.peak / budget.nbytes:.1%}" for name, need in needs.items()})
    console = Console(width=160, no_color=True, highlight=False)
    with console.capture() as captured:
        console.print(table)
    told = [
        _title(subject, options, budget, list(plans.values())),
        "",
        *filter(str.strip, captured.get().split("\n")),
        "",
    ]
    told += [f"{row.weights}: {row.refused}" for row in rows if row.refused]
    if plans:
        some = next(iter(plans.values()))
        told.append(NOT_COUNTED[device_of(some)].format(graphs=_graphs(some)))
    return "\n".join(line.rstrip() for text in told for line in text.split("\n"))


def fit_json(subject: Subject, options: PlanOptions, budget: Budget, rows: Sequence[Row]) -> str:
    """The same as JSON; bytes, and null for what there is not."""
    found = {
        "model": subject.target.name,
        "draft": _drafter(subject),
        "sequences": options.max_sequences,
        "asked_capacity": options.capacity or None,
        "memory": {"bytes": budget.nbytes, "of": budget.said},
        "weights": [_row(row, subject) for row in rows],
    }
    return json.dumps(found, indent=2)


def _row(row: Row, subject: Subject) -> dict[str, object]:
    found: dict[str, object] = {"format": row.weights, "largest_capacity": row.capacity or None}
    if row.plan is None:
        return {**found, "refused": row.refused}
    need: Need = need_of(row.plan, overlap=subject.overlap)
    return {
        **found,
        "fits": row.fits,
        "capacity": row.plan.options.capacity,
        "pages": row.plan.target.pages,
        "largest_pages": row.pages or None,
        "parts": [{"kind": p.kind, "name": p.name, "bytes": p.nbytes} for p in need.parts],
        "loading": need.loading,
        "bytes": need.peak,
    }


def _title(subject: Subject, options: PlanOptions, budget: Budget, plans: Sequence[Plan]) -> str:
    drafter = _drafter(subject)
    with_draft = "" if drafter is None else f", draft {drafter}"
    backends = f", {', '.join(plans[0].backends)}" if plans else ""
    return f"{subject.target.name}{with_draft}{backends}: {options.max_sequences} sequences at once; {budget}"


def _drafter(subject: Subject) -> str | None:
    return subject.draft if subject.draft is None or isinstance(subject.draft, str) else subject.draft.name


def _graphs(plan: Plan) -> str:
    """How many programs are captured, and their launches."""
    calls = sum(len(program.graph.nodes) for program in plan.programs)
    return f"{len(plan.programs)} programs of {calls} launches together"
