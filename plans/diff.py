"""Two plans side by side.

Owns `diff_plans`. What always holds: equal plans differ in nothing; a difference in options, roles, spans, widths,
programs, loops, kernels or buffers is named where it is, with both values.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

from slotwise.core.graph import Parameter
from slotwise.core.layouts import ROWS
from slotwise.core.sizes import size
from slotwise.plans.program import Program, RolePlan
from slotwise.plans.record import PlanRecord
from slotwise.plans.show import loop_table


def diff_plans(left: PlanRecord, right: PlanRecord) -> str:
    """A text with one line a difference, `name: left -> right`; empty when the plans are equal."""
    sections = [
        ("options", _options(left, right)),
        ("memory", _memory(left, right)),
        ("roles", _roles(left, right)),
        ("steps", _steps(left, right)),
        ("programs", _programs(left, right)),
        ("draft loops", _table(loop_table(left.loops), loop_table(right.loops))),
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


def _options(left: PlanRecord, right: PlanRecord) -> list[str]:
    def table(plan: PlanRecord) -> dict[str, str]:
        found = {field.name: str(getattr(plan.options, field.name)) for field in fields(plan.options)}
        found["dtype"] = "the checkpoint's" if plan.options.dtype is None else plan.options.dtype.value
        found["backend"] = "; ".join(f"{op}: {', '.join(names)}" for op, names in plan.options.backend)
        return {**found, "drafter": plan.draft}

    return _table(table(left), table(right))


def _memory(left: PlanRecord, right: PlanRecord) -> list[str]:
    def table(plan: PlanRecord) -> dict[str, str]:
        return {
            "total": size(plan.total_bytes),
            "arena": size(plan.arena_bytes),
            "buffers": size(plan.buffer_bytes),
            **{f"cache {role.role}": size(role.cache_bytes) for role in plan.roles},
            **{f"weights {role.role}": size(role.parameter_bytes) for role in plan.roles},
        }

    return _table(table(left), table(right))


def _roles(left: PlanRecord, right: PlanRecord) -> list[str]:
    before, after = ({role.role: role for role in plan.roles} for plan in (left, right))
    rows = _table(*({name: f"{role.model}" for name, role in roles.items()} for roles in (before, after)))
    for name in sorted(before.keys() & after.keys()):
        rows += [f"{name}.{row}" for row in _table(_role_fields(before[name]), _role_fields(after[name]))]
    return rows


def _held(parameter: Parameter) -> str:
    """How a parameter is held: `int8.codes i8 in octets`."""
    layout = "" if parameter.layout == ROWS else f" in {parameter.layout}"
    return f"{parameter.derive or 'as stored'} {parameter.value.spec.dtype.value}{layout}"


def _role_fields(role: RolePlan) -> dict[str, str]:
    names = [field.name for field in fields(role) if field.name not in ("role", "model", "parameters", "states")]
    kinds = Counter(_held(parameter) for parameter in role.parameters)
    held = ", ".join(f"{kind} x{count}" for kind, count in sorted(kinds.items()))
    groups = "; ".join(map(str, role.groups))
    listed = {"dtype": role.dtype.value, "parameters": held, "states": groups}
    return {name: str(getattr(role, name)) for name in names} | listed


def _steps(left: PlanRecord, right: PlanRecord) -> list[str]:
    def table(plan: PlanRecord) -> dict[str, str]:
        found: dict[str, str] = {}
        for step in plan.steps:
            for limit in step.limits:
                found[f"{step.name}: k <= {limit.bound}"] = limit.reason
            seen: Counter[str] = Counter()
            for op in step.ops:
                seen[op.op] += 1
                text = " ".join(str(op).partition("#")[0].split()[1:])
                found[f"{step.name}: {op.op}" + (f" {seen[op.op]}" if seen[op.op] > 1 else "")] = text or op.note
        return found

    return _table(table(left), table(right))


def _programs(left: PlanRecord, right: PlanRecord) -> list[str]:
    before = {program.name: program for program in left.programs}
    after = {program.name: program for program in right.programs}
    rows = _table(_bucket_table(left), _bucket_table(right))
    for name in sorted(before.keys() & after.keys(), key=_natural):
        if before[name] != after[name]:
            rows += [f"{name}: {line}" for line in _calls(before[name], after[name])]
    return rows


def _bucket_table(plan: PlanRecord) -> dict[str, str]:
    """Role and kind -> the rows that there are programs for."""
    kinds = dict.fromkeys((program.role, program.kind) for program in plan.programs)
    return {f"{role}.{kind} rows": ", ".join(map(str, plan.buckets(role, kind))) for role, kind in kinds}


def _calls(left: Program, right: Program) -> list[str]:
    def costs(program: Program) -> dict[str, str]:
        return {
            "arena": size(program.arena_bytes),
            "bytes moved": f"{program.bytes_moved():,}",
            "flops": f"{program.flops():,}",
        }

    rows = _table(costs(left), costs(right))

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


def _buffer_table(plan: PlanRecord) -> dict[str, str]:
    return {name: str(spec) for name, spec in plan.buffers}


def _natural(name: str) -> tuple[str, int]:
    stem, _, number = name.rpartition(".")
    return stem, int(number)
