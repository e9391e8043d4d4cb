"""The plan viewer: one page that shows a plan's programs, draft loops and arena, and a recording's slots over time.

Owns `view_page` and the data behind it. What always holds: the page is self-contained; bytes and flops come from the
op contracts, and time is a roofline over two numbers that the reader can change; steps stay as the changes that were
recorded, and the page rebuilds any step from the nearest of a few states it keeps.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from slotwise.core.ops import contract_of
from slotwise.core.printer import format_node
from slotwise.inspect.page import build_page
from slotwise.plans.loop import DraftLoop
from slotwise.plans.passes.plan_buffers import call_spec
from slotwise.plans.plan import Plan
from slotwise.plans.program import Program
from slotwise.plans.show import show_plan
from slotwise.recording.file import Json, Recording

BANDWIDTH, GFLOPS = 50.0, 200.0
"""The roofline's defaults, GB/s and GFLOP/s: a laptop's order of magnitude, to be replaced by one's own."""

STEP_KEYS = ("step", "prefill", "decode", "bound", "after", "tokens", "sequences", "ended", "ledger", "s")


def view_page(
    plan: Plan, recording: Recording | None = None, *, bandwidth: float = BANDWIDTH, gflops: float = GFLOPS
) -> str:
    """The page for a plan, with the slot map where there is a recording; `bandwidth` in GB/s, `gflops` in GFLOP/s."""
    data = {
        "plan": plan_data(plan),
        "recording": None if recording is None else recording_data(recording),
        "bandwidth": bandwidth,
        "gflops": gflops,
    }
    title = f"{plan.target.model}: plan" if recording is None else f"{plan.target.model}: recording"
    return build_page(title, "viewer.html", data, scripts=("slots.js", "viewer.js"), styles=("viewer.css",))


def plan_data(plan: Plan) -> Json:
    """A plan as the page reads it."""
    return {
        "title": f"{plan.target.model}, drafter {plan.draft}, backends {', '.join(plan.backends)}",
        "text": show_plan(plan),
        "roles": [
            {
                "role": role.role,
                "model": role.model,
                "page_size": role.page_size,
                "pages": role.pages,
                "capacity": role.capacity,
            }
            for role in plan.roles
        ],
        "programs": [program_data(program) for program in plan.programs],
        "loops": [loop_data(plan, loop) for loop in plan.loops],
    }


def loop_data(plan: Plan, loop: DraftLoop) -> Json:
    """A draft loop, and the names of the programs that its rounds, counted from 1, run.

    Neighbouring rounds that run the same are one entry.
    """
    names = {(program.role, program.kind, program.rows): program.name for program in plan.programs}
    by_round = groupby(loop.programs(loop.rounds), key=lambda each: each[0])
    runs = [[names[key] for _, key in calls] for _, calls in by_round]
    rounds = []
    for programs, alike in groupby(enumerate(runs, 1), key=lambda each: each[1]):
        numbers = [number for number, _ in alike]
        rounds.append({"first": numbers[0], "last": numbers[-1], "programs": programs})
    return {"sampler": loop.sampler, "sequences": loop.sequences, "rounds": rounds}


def program_data(program: Program) -> Json:
    """A program's calls with their costs, and its places in the arena."""
    return {
        "name": program.name,
        "arena": program.arena_bytes,
        "calls": [call_data(program, index) for index in range(len(program.graph.nodes))],
        "placements": [[p.value, p.offset, p.nbytes, p.first, p.last] for p in program.placements],
    }


def call_data(program: Program, index: int) -> Json:
    """One call: its op, kernel, text, bytes and flops, and why other kernels were not chosen.

    Attention's cost is that of full page tables: what a call costs depends on lengths, which a plan does not have.
    """
    node = program.graph.nodes[index]
    cost = contract_of(node.op).call_cost(call_spec(node).inputs, node.attr_dict)
    chosen = node.selection
    return {
        "op": node.op,
        "kernel": "" if chosen is None else chosen.kernel,
        "text": format_node(node),
        "bytes": cost.bytes,
        "flops": cost.flops,
        "why": "" if chosen is None else chosen.reason,
        "rejected": [] if chosen is None else [f"{r.kernel}: {r.reason}" for r in chosen.rejected],
    }


def recording_data(recording: Recording) -> Json:
    """A recording as the page reads it: requests, and each step without what only a replay needs."""
    return {
        "name": recording.path.replace("\\", "/").rpartition("/")[2],
        "is_cut": recording.is_cut,
        "is_whole": recording.is_whole,
        "crash": None if recording.crash is None else _crash(recording.crash),
        "requests": {str(n): {"prompt": request["prompt_ids"]} for n, request in recording.requests.items()},
        "texts": {str(token): text for token, text in recording.texts.items()},
        "steps": [_step(step) for step in recording.steps],
    }


def _step(step: Json) -> Json:
    found = {key: step[key] for key in STEP_KEYS if key in step}
    if found["decode"] is not None:
        found["decode"] = {key: value for key, value in found["decode"].items() if key != "known"}
    return found


def _crash(crash: Json) -> dict[str, Any]:
    return {key: crash[key] for key in ("crash", "error", "message", "where", "ledger")}
