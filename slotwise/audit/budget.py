"""What machine code may be: the rules of a budget file, and where a kernel leaves them.

Owns `Rule`, `load_budget` and `broken_rules`. What always holds: every rule that names a kernel holds for it, later
ones do not undo earlier ones; shared memory within the chip's and a block that fits the chip at all need no rule.

A rule is a table `[[rule]]`: `why`, and which code it speaks of (`backends`, `kernels`, `functions`, `dtypes`,
`generations`: lists of patterns as in a shell, all if left out), and limits: `max_spills`, `max_registers`,
`max_instructions`, `min_occupancy`, `min_load_bytes`, `min_store_bytes`, `tensor_any` (one of these instructions must
be there), `tensor_only` (no other may be).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import Any

import tomli

from slotwise.audit.cubin import CHIPS, AuditError, KernelFacts

BUDGET = "budget.toml"
"""The project's own budget, a file of this package."""
_EVERY = ("*",)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of a budget."""

    why: str
    backends: tuple[str, ...] = _EVERY
    kernels: tuple[str, ...] = _EVERY
    functions: tuple[str, ...] = _EVERY
    dtypes: tuple[str, ...] = _EVERY
    generations: tuple[str, ...] = _EVERY
    max_spills: int | None = None
    max_registers: int | None = None
    max_instructions: int | None = None
    min_occupancy: float | None = None
    min_load_bytes: int | None = None
    min_store_bytes: int | None = None
    tensor_any: tuple[str, ...] = ()
    tensor_only: tuple[str, ...] = ()

    def speaks_of(self, backend: str, facts: KernelFacts) -> bool:
        """Whether this rule is about that code."""
        code = facts.code
        pairs = (
            (self.backends, backend),
            (self.kernels, code.kernel),
            (self.functions, code.function),
            (self.dtypes, code.dtype),
            (self.generations, code.generation),
        )
        return all(any(fnmatch(value, pattern) for pattern in patterns) for patterns, value in pairs)

    def broken_by(self, facts: KernelFacts) -> Iterator[str]:
        """What of this rule the code does not keep."""
        most = (
            ("spills", facts.spills, self.max_spills),
            ("registers", facts.registers, self.max_registers),
            ("instructions", facts.instructions, self.max_instructions),
        )
        for name, found, limit in most:
            if limit is not None and found > limit:
                yield f"{found} {name}, at most {limit} allowed"
        least: tuple[tuple[str, float, float | None], ...] = (
            ("occupancy", facts.occupancy, self.min_occupancy),
            ("bytes in the widest load", facts.widest_load, self.min_load_bytes),
            ("bytes in the widest store", facts.widest_store, self.min_store_bytes),
        )
        for name, share, needed in least:
            if needed is not None and share < needed:
                yield f"{share:g} {name}, at least {needed:g} needed"
        kinds = {op.partition(".")[0] for op in facts.tensor}
        if self.tensor_any and not kinds & set(self.tensor_any):
            names = ", ".join(sorted(kinds)) or "none"
            yield f"no tensor-core instruction of {', '.join(self.tensor_any)}; found {names}"
        if self.tensor_only and kinds - set(self.tensor_only):
            yield f"{', '.join(sorted(kinds - set(self.tensor_only)))} where only {', '.join(self.tensor_only)} may be"


def load_budget(path: Path | None = None) -> tuple[Rule, ...]:
    """Read a budget, by default the project's; raises AuditError that names the file and what is wrong in it."""
    source = path or resources.files("slotwise.audit") / BUDGET
    try:
        raw = tomli.loads(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as error:
        raise AuditError(f"the budget {source} cannot be read: {error}") from error
    rules = raw.pop("rule", None)
    if raw or not isinstance(rules, list):
        raise AuditError(
            f"the budget {source} must hold [[rule]] tables alone; found {', '.join(raw) or 'none of them'}"
        )
    return tuple(_rule(str(source), number, rule) for number, rule in enumerate(rules, 1))


def _rule(source: str, number: int, raw: Any) -> Rule:
    known = {field.name: str(field.type) for field in fields(Rule)}
    unknown = [name for name in raw if name not in known]
    if unknown or "why" not in raw:
        raise AuditError(
            f"the budget {source}, rule {number}: "
            + (f"{', '.join(unknown)} unknown; known are {', '.join(known)}" if unknown else "it says no `why`")
        )
    for name, value in raw.items():
        wanted: type | tuple[type, ...] = (
            str if name == "why" else list if known[name].startswith("tuple") else (int, float)
        )
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise AuditError(f"the budget {source}, rule {number}: {name} = {value!r} is not of the right kind")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    return Rule(**values)


def broken_rules(backend: str, facts: KernelFacts, rules: tuple[Rule, ...]) -> tuple[str, ...]:
    """What the code does not keep: of the chip's limits, then of each rule that speaks of it."""
    found = []
    limit = CHIPS[facts.code.generation].shared_per_block
    if facts.shared_bytes > limit:
        found.append(f"{facts.shared_bytes} bytes of shared memory, the chip gives a block {limit}")
    if facts.occupancy == 0:
        found.append(f"no block of {facts.code.threads} threads with {facts.registers} registers each fits the chip")
    for rule in rules:
        if rule.speaks_of(backend, facts):
            found += [f"{what} ({rule.why})" for what in rule.broken_by(facts)]
    return tuple(found)
