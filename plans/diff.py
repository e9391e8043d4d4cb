"""Two plans side by side.

Owns `diff_plans`. What always holds: equal plans differ in nothing; a difference in options, roles, spans, widths,
programs, kernels or buffers is named where it is, with both values.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

from slotwise.plans.plan import Plan
from slotwise.plans.program import Program
from slotwise.plans.show import size


def diff_plans(left: Plan, right: Plan) -> str:
    """A text with one line a difference, `name: left -> right`; empty when the plans are equal."""
    sections = [
        ("options", _options(left, right)),
        ("memory", _memory(left, right)),
        ("roles", _roles(left, right)),
        ("steps", _steps(left, right)),
        ("programs", _programs(left, right)),
        ("buffers", _table(_buffer_table(left), _buffer_table(right))),
    ]
    lines: list[str] = []
    for title, rows in sections:
        if rows:
            lines += [title, *(f"  {row}" for row in rows)]
    if not lines and left != right:
        lines = ["placements or parameters", "  the plans differ in details that print the same; compare their JSON"]
    return "\n".join(lines)


def _table(left: dict[str, str], right: dict[str, str]) -> list[str]:
    rows = []
    for name in sorted(left.keys() | right.keys()):
        before, after = left.get(name, "absent"), right.get(name, "absent")
        if before != after:
            rows.append(f"{name}: {before} -> {after}")
    return rows


def _options(left: Plan, right: Plan) -> list[str]:
    def table(plan: Plan) -> dict[str, str]:
        found = {field.name: str(getattr(plan.options, field.name)) for field in fields(plan.options)}
        found["backend"] = "; ".join(f"{op}: {', '.join(names)}" for op, names in plan.options.backend)
        return {**found, "drafter": plan.draft}

    return _table(table(left), table(right))


def _memory(left: Plan, right: Plan) -> list[str]:
    def table(plan: Plan) -> dict[str, str]:
        return {
            "total": size(plan.total_bytes),
            "arena": size(plan.arena_bytes),
            "buffers": size(plan.buffer_bytes),
        } | {f"cache {role.role}": size(role.cache_bytes) for role in plan.roles}

    return _table(table(left), table(right))


def _roles(left: Plan, right: Plan) -> list[str]:
    def table(plan: Plan) -> dict[str, str]:
        return {
            f"{role.role}.{field.name}": str(getattr(role, field.name))
            for role in plan.roles
            for field in fields(role)
            if field.name not in ("parameters", "caches")
        }

    return _table(table(left), table(right))


def _steps(left: Plan, right: Plan) -> list[str]:
    def table(plan: Plan) -> dict[str, str]:
        found: dict[str, str] = {}
        for step in plan.steps:
            for limit in step.limits:
                found[f"{step.name}: k <= {limit.bound}"] = limit.reason
            seen: Counter[str] = Counter()
            for op in step.ops:
                seen[op.op] += 1
                found[f"{step.name}: {op.op}" + (f" {seen[op.op]}" if seen[op.op] > 1 else "")] = " ".join(
                    str(op).partition("#")[0].split()[1:]
                )
        return found

    return _table(table(left), table(right))


def _programs(left: Plan, right: Plan) -> list[str]:
    before = {program.name: program for program in left.programs}
    after = {program.name: program for program in right.programs}
    rows: list[str] = []
    for name in sorted(before.keys() | after.keys(), key=_natural):
        if name not in before or name not in after:
            rows.append(
                f"{name}: {'absent' if name not in before else 'present'} -> "
                f"{'absent' if name not in after else 'present'}"
            )
        elif before[name] != after[name]:
            rows += [f"{name}: {line}" for line in _calls(before[name], after[name])]
    return rows


def _calls(left: Program, right: Program) -> list[str]:
    rows = _table({"arena": size(left.arena_bytes)}, {"arena": size(right.arena_bytes)})

    def kernels(program: Program) -> dict[str, str]:
        chosen: Counter[tuple[str, str]] = Counter()
        for node in program.graph.nodes:
            chosen[node.op, node.selection.kernel if node.selection is not None else "none"] += 1
        by_op: dict[str, list[str]] = {}
        for (op, kernel), count in sorted(chosen.items()):
            by_op.setdefault(op, []).append(f"{kernel} x{count}")
        return {op: ", ".join(names) for op, names in by_op.items()}

    rows += _table(kernels(left), kernels(right))
    return rows or ["same kernels; specs, attributes, parameters or placements differ"]


def _buffer_table(plan: Plan) -> dict[str, str]:
    return {name: str(spec) for name, spec in plan.buffers}


def _natural(name: str) -> tuple[str, int]:
    stem, _, number = name.rpartition(".")
    return stem, int(number)
