"""The text form of a plan.

Owns `show_plan`, `show_program` and `show_loops`. What always holds: it is deterministic, and it says in words what a
reader needs: roles and memory, the steps with their width formula, each program's calls with kernels and places in the
arena, the draft loops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from slotwise.core.printer import format_node
from slotwise.core.sizes import size
from slotwise.plans.checks.overlap import why_no_overlap
from slotwise.plans.loop import DraftLoop
from slotwise.plans.program import Program, RolePlan
from slotwise.plans.record import PlanRecord


def show_plan(plan: PlanRecord, *, programs: bool = False) -> str:
    """The plan on a page; with `programs`, every call of every program too."""
    options = plan.options
    lines = [
        f"plan for {plan.target.model}: drafter {plan.draft}, backends {', '.join(plan.backends)}",
        f"  capacity {options.capacity} tokens, pages of {options.page_size} slots, up to {options.max_sequences} "
        f"sequences, speculate {options.speculate} ({options.acceptance}{', adaptive' if options.adaptive else ''})",
        f"  memory {size(plan.total_bytes)}: arena {size(plan.arena_bytes)} (peak activations), "
        f"buffers {size(plan.buffer_bytes)}",
    ]
    for role in plan.roles:
        lines.append(_show_role(role))
        lines += [f"    {size(group.nbytes)} a {group.unit}: {group}" for group in role.groups]
    grid = (
        "any rows, same bits" if plan.prefill_is_invariant else f"on a grid of {options.prefill_chunk} from the start"
    )
    lines.append(f"  prefill chunks: {grid}")
    refusal = why_no_overlap(plan)
    ahead = "a step without drafts need not be read before the next is started" if refusal is None else refusal
    lines.append(f"  overlap: {'none: ' if refusal else ''}{ahead}")
    lines.append("")
    for step in plan.steps:
        lines += [str(step), ""]
    lines.append("programs")
    lines += [f"  {line}" for line in _program_table(plan)]
    if plan.loops:
        lines += ["", *show_loops(plan.loops)]
    if programs:
        for program in plan.programs:
            lines += ["", show_program(program)]
    return "\n".join(lines)


def _show_role(role: RolePlan) -> str:
    schemes = sorted({p.derive.partition(".")[0] for p in role.parameters if p.derive})
    held = f"{', '.join(schemes)} weights" if schemes else "weights"
    return (
        f"  {role.role}: {role.model} in {role.dtype.value}, {held} {size(role.parameter_bytes)}, "
        f"capacity {role.capacity}, states {size(role.cache_bytes)} = {role.pages} pages and a scratch page"
    )


def _program_table(plan: PlanRecord) -> list[str]:
    """One line for all buckets that run the same kernels."""
    groups: dict[tuple[str, str, str, int], list[Program]] = {}
    for program in plan.programs:
        kernels = Counter(node.selection.kernel for node in program.graph.nodes if node.selection is not None)
        names = ", ".join(f"{kernel} x{count}" for kernel, count in sorted(kernels.items()))
        groups.setdefault((program.role, program.kind, names, len(program.graph.nodes)), []).append(program)
    lines = []
    for (role, kind, names, calls), programs in groups.items():
        rows = ", ".join(str(program.rows) for program in programs)
        peak = max(program.arena_bytes for program in programs)
        weights = programs[0].parameter_bytes
        lines.append(
            f"{role}.{kind} for {rows} rows: {calls} calls, arena {size(peak)}, reads {size(weights)} of weights"
        )
        lines.append(f"  {names}")
    return lines


def show_loops(loops: Sequence[DraftLoop]) -> list[str]:
    """What a loop is, then a line for all loops that draw with the same sampler."""
    lines = [
        "draft loops: rounds of drafting as one launch",
        "  a round is draft.decode.<sequences>, in the first round <first rows>, then sampler.<kind>.<sequences>;",
        "  what it samples is the next round's token_ids",
    ]
    for name, shapes in loop_table(loops).items():
        lines.append(f"  {name}; sequences (first rows): {shapes}")
    return lines


def loop_table(loops: Sequence[DraftLoop]) -> dict[str, str]:
    """Kind and rounds -> `sequences (first rows, first rows), ...` of the loops that have both."""
    found: dict[str, dict[int, list[str]]] = {}
    for loop in loops:
        shapes = found.setdefault(f"{loop.sampler}, up to {loop.rounds} rounds", {})
        shapes.setdefault(loop.sequences, []).append(str(loop.first))
    return {name: ", ".join(f"{n} ({', '.join(f)})" for n, f in shapes.items()) for name, shapes in found.items()}


def show_program(program: Program, *, rejections: bool = False) -> str:
    """Every call of a program with its place in the arena; with `rejections`, why other kernels were not chosen."""
    places = {p.value: p for p in program.placements}
    lines = [f"program {program.name}: arena {size(program.arena_bytes)}"]
    for index, node in enumerate(program.graph.nodes):
        lines.append(f"  {index:3d}  {format_node(node)}")
        spots = [places[v.name] for v in node.outputs if v.name in places]
        spots += [places[name] for name in (f"ws{index}",) if name in places]
        if spots:
            where = ", ".join(f"{p.value} @{p.offset}+{p.nbytes} until {p.last}" for p in spots)
            lines.append(f"         arena {where}")
        if rejections and node.selection is not None:
            lines.append(f"         {node.selection.kernel}: {node.selection.reason}")
            lines += [f"         not {r.kernel}: {r.reason}" for r in node.selection.rejected]
    return "\n".join(lines)
