"""What a cross-validation found, and how people read it: a table, JSON, a page.

Owns `CrossValidation`. What always holds: a table has a line for each kernel and dtype with the worst of its cases;
whatever is wrong stands below it in full, one block a check, and nothing wrong is left out of any form.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from slotwise.inspect.checks import Agreement, Check
from slotwise.inspect.page import build_page

SCHEMA = 1
RULES = ("runs", "guard zones", "inputs stay", "all written")


@dataclass(frozen=True)
class CrossValidation:
    """What a run found. `missing` maps backends that could not run here to the reason; `left_out` counts the
    trials that a quick run has not made.
    """

    checks: tuple[Check, ...]
    agreements: tuple[Agreement, ...]
    missing: Mapping[str, str]
    seed: int
    about: str
    left_out: int = 0

    @property
    def passed(self) -> bool:
        """Whether no check is out of its declared tolerance and no waiver is left over."""
        return not self.wrong

    @property
    def wrong(self) -> tuple[Check, ...]:
        """The checks that fail the run."""
        return tuple(check for check in self.checks if check.is_wrong)

    def to_json(self) -> str:
        """Everything, as JSON text; what is not a finite number is null."""
        return json.dumps(_data(self), indent=1, allow_nan=False) + "\n"

    def to_html(self) -> str:
        """One page without a reference to anything outside itself."""
        return build_page("slotwise xval", "report.html", _data(self), scripts=("report.js",))

    def __str__(self) -> str:
        """The table, what is wrong, and a closing line."""
        text = io.StringIO()
        show(self, Console(file=text, width=140, no_color=True, highlight=False, legacy_windows=False))
        return text.getvalue().rstrip("\n")


def show(found: CrossValidation, console: Console, *, every_case: bool = False) -> None:
    """Print to a console, in colour where it has any."""
    console.print(_table(found.checks, every_case=every_case))
    agreements = _pair_table(found.agreements)
    if agreements is not None:
        console.print(agreements)
    for name, reason in found.missing.items():
        console.print(f"not here: {name}: {reason}", markup=False, soft_wrap=True)
    for check in found.checks:
        if check.verdict == "waived":
            console.print(f"waived: {_name(check)}: {check.reason}", markup=False, soft_wrap=True)
    for check in found.wrong:
        console.print(f"{check.verdict.upper()}: {_name(check)}", markup=False, style="bold red", soft_wrap=True)
        if check.verdict == "failed":
            console.print(f"  {check.rule}: {check.message}", markup=False, soft_wrap=True)
        else:
            console.print(f"  it passes; remove its waiver ({check.reason})", markup=False, soft_wrap=True)
    console.print(closing_line(found), markup=False, soft_wrap=True)


def closing_line(found: CrossValidation) -> str:
    """What was checked and how it ended, in one line."""
    counts: dict[str, int] = {}
    for check in found.checks:
        counts[check.verdict] = counts.get(check.verdict, 0) + 1
    parts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    rest = f"; {found.left_out} more trials with --all (quick=False)" if found.left_out else ""
    return f"{len(found.checks)} checks of {found.about}, seed {found.seed}: {parts}{rest}"


def _table(checks: Iterable[Check], *, every_case: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    heads = ("op", "backend:kernel", "dtype", "case" if every_case else "cases", "max abs", "max rel", "ULPs")
    for head in (*heads, "1 - cosine", "borders", "rows", "time", "verdict"):
        table.add_column(head, justify="left" if head in ("op", "backend:kernel", "dtype", "case") else "right")
    groups: dict[tuple[str, ...], list[Check]] = {}
    for check in checks:
        key: tuple[str, ...] = (check.op, f"{check.backend}:{check.kernel}", check.dtype)
        groups.setdefault((*key, check.case) if every_case else key, []).append(check)
    for key, group in groups.items():
        names = key if every_case else (*key, str(len({check.case for check in group})))
        oracle = [check for check in group if check.check == "oracle"]
        table.add_row(*names, *_measures(oracle), _borders(oracle), _rows(group), _time(oracle), _verdict(group))
    return table


def _measures(checks: list[Check]) -> tuple[str, ...]:
    cosines = [check.cosine for check in checks if check.cosine is not None]
    ulps = [check.ulps for check in checks if check.ulps is not None]
    return (
        _greatest(check.max_abs for check in checks),
        _greatest(check.max_rel for check in checks),
        (f"{max(ulps):,}" if max(ulps) < 2**62 else "NaN") if ulps else "-",
        f"{max(0.0, 1 - min(cosines)):.1e}" if cosines else "-",
    )


def _greatest(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return "-" if not known else "0" if not max(known) else f"{max(known):.1e}"


def _borders(checks: list[Check]) -> str:
    broken = [check.rule for check in checks if check.rule in RULES]
    ran = [check for check in checks if check.verdict != "refused"]
    return broken[0] if broken else "kept" if ran else "-"


def _rows(checks: list[Check]) -> str:
    rows = [check for check in checks if check.check == "rows"]
    return "-" if not rows else "broken" if any(check.rule for check in rows) else "same bits"


def _time(checks: list[Check]) -> str:
    seconds = [check.seconds for check in checks if check.seconds is not None]
    return "-" if not seconds else f"{max(seconds) * 1e6:,.0f} us"


def _verdict(checks: list[Check]) -> str:
    wrong = sum(check.is_wrong for check in checks)
    if wrong:
        return f"[bold red]{wrong} WRONG[/]"
    waived = sum(check.verdict == "waived" for check in checks)
    if waived:
        return f"[yellow]{waived} waived[/]"
    return "refused" if all(check.verdict == "refused" for check in checks) else "[green]ok[/]"


def _pair_table(agreements: Iterable[Agreement]) -> Table | None:
    """Kernels against each other: the greatest distance, and how many cases have the same bits."""
    groups: dict[tuple[str, str, str, str], list[Agreement]] = {}
    for each in agreements:
        groups.setdefault((each.op, each.dtype, each.left, each.right), []).append(each)
    if not groups:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="backends against each other", title_justify="left")
    for head in ("op", "dtype", "one", "another"):
        table.add_column(head)
    for head in ("max abs", "ULPs", "same bits"):
        table.add_column(head, justify="right")
    for key, group in groups.items():
        equal = sum(each.is_bit_equal for each in group)
        ulps = max(each.ulps for each in group)
        most = "NaN" if ulps >= 2**62 else f"{ulps:,}"
        table.add_row(*key, _greatest(each.max_abs for each in group), most, f"{equal} of {len(group)}")
    return table


def _name(check: Check) -> str:
    return f"{check.op} {check.backend}:{check.kernel} {check.dtype} case {check.case!r} ({check.check})"


def _data(found: CrossValidation) -> dict[str, Any]:
    return {
        "slotwise_xval": SCHEMA,
        "about": found.about,
        "seed": found.seed,
        "left_out": found.left_out,
        "passed": found.passed,
        "summary": closing_line(found),
        "torch": torch.__version__,
        "missing": dict(found.missing),
        "checks": [_plain(asdict(check)) for check in found.checks],
        "agreements": [_plain(asdict(each)) for each in found.agreements],
    }


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
