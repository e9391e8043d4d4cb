"""Running the audit and printing its table.

Owns `Finding`, `Audit` and `table`. What always holds: a configuration of the table that no audited call chooses is a
finding too, so nothing that could run goes unseen.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slotwise.audit.budget import Rule, broken_rules
from slotwise.audit.calls import calls_of
from slotwise.audit.cubin import AuditError, KernelFacts, facts_of
from slotwise.core.backend import CallSpec, Kernel, load_backend
from slotwise.core.errors import nearest
from slotwise.core.specs import DType

DTYPES = (DType.BF16, DType.F16, DType.F32)
_DTYPES = tuple(dtype.value for dtype in DTYPES)


@dataclass(frozen=True, slots=True)
class Finding:
    """One compiled function, where it is used, and what it does not keep."""

    facts: KernelFacts
    broken: tuple[str, ...]


def generations_of(backend: str) -> tuple[str, ...]:
    """The GPU generations that a backend compiles for; raises AuditError for a backend without machine code."""
    found: tuple[str, ...] = _ahead(backend).GENERATIONS
    return found


def _ahead(backend: str):  # type: ignore[no-untyped-def]
    load_backend(backend)
    try:
        return importlib.import_module(f"slotwise.backends.{backend}.ahead")
    except ModuleNotFoundError as error:
        raise AuditError(f"backend {backend} has no machine code to audit ({error})") from error


class Audit:
    """Compiles and judges kernels for every call of `calls_of`, each distinct code once; those named, or all.

    Raises AuditError for a name that is not there.
    """

    def __init__(
        self,
        backend: str,
        generations: Sequence[str],
        rules: tuple[Rule, ...],
        kernels: Sequence[str] = (),
        dtypes: Sequence[str] = (),
    ) -> None:
        self._backend, self._rules, self._only = backend, rules, kernels
        self._dtypes = dtypes or _DTYPES
        self._ahead = _ahead(backend)
        self._kernels = load_backend(backend).kernels
        self._generations = tuple(generations) or generations_of(backend)
        self._chosen: dict[str, set[str]] = {generation: set() for generation in self._generations}
        names = [kernel.name for kernel in self._kernels]
        for what, wanted, there in (
            ("generation", self._generations, self._ahead.GENERATIONS),
            ("kernel", kernels, names),
            ("dtype", dtypes, _DTYPES),
        ):
            for name in wanted:
                if name not in there:
                    raise AuditError(
                        f"{what} {name!r} is not known{nearest(name, there)}; there are {', '.join(there)}"
                    )

    def run(self) -> Iterator[Finding]:
        """Every finding as it is made."""
        seen: set[bytes] = set()
        for generation in self._generations:
            for kernel, call in self._calls():
                for code in self._ahead.compile_call(kernel.name, call, generation):
                    self._chosen[generation].add(code.configuration)
                    if code.cubin not in seen:
                        seen.add(code.cubin)
                        facts = facts_of(code)
                        yield Finding(facts, broken_rules(self._backend, facts, self._rules))

    def _calls(self) -> Iterator[tuple[Kernel, CallSpec]]:
        for kernel in self._kernels:
            if not self._only or kernel.name in self._only:
                for dtype in map(DType, self._dtypes):
                    for call in calls_of(kernel.op, dtype):
                        if call.dtype is dtype and kernel.refuses(call) is None:
                            yield kernel, call

    def unchosen(self) -> tuple[str, ...]:
        """Configurations that could run and were not compiled; empty when only some calls were asked for."""
        if self._only or len(self._dtypes) < len(DTYPES):
            return ()
        return tuple(
            f"{generation}: {text}"
            for generation, chosen in self._chosen.items()
            for text in sorted(self._ahead.choices(generation) - chosen)
        )


HEADINGS = ("kernel", "function", "dtype", "gpu", "configuration", "regs", "spills", "shared", "occupancy", "load",
            "store", "tensor cores", "instructions")  # fmt: skip


def row(finding: Finding) -> tuple[str, ...]:
    """The cells of one line of the table."""
    facts, code = finding.facts, finding.facts.code
    tensor = " ".join(f"{op}x{count}" for op, count in facts.tensor.items()) or "-"
    return (
        code.kernel, code.function, code.dtype, code.generation, code.configuration, str(facts.registers),
        str(facts.spills), str(facts.shared_bytes), f"{facts.occupancy:.0%}", _widths(facts.loads),
        _widths(facts.stores), tensor, str(facts.instructions),
    )  # fmt: skip


def _widths(counts: object) -> str:
    assert isinstance(counts, dict)
    return " ".join(f"{width}Bx{counts[width]}" for width in sorted(counts, reverse=True)) or "-"


def table(findings: Sequence[Finding]) -> str:
    """All findings, a line each, columns aligned."""
    lines = [HEADINGS, *(row(finding) for finding in findings)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
