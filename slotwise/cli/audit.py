"""`slotwise audit`: compile a backend's kernels for GPUs that need not be here, and hold them to a budget.

What always holds: exit code 0 when every kernel keeps the budget, 1 when one does not; the table goes to the output
stream, what is broken to the error stream.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("audit", help="audit kernels' machine code", description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="cuda_triton", help="the backend whose kernels are audited")
    parser.add_argument("--gpu", action="append", default=[], metavar="sm_XX", help="one generation (default: all)")
    parser.add_argument("--kernel", action="append", default=[], metavar="NAME", help="one kernel (default: all)")
    parser.add_argument(
        "--dtype", action="append", default=[], metavar="TYPE", help="one of bf16, f16, f32 (default: all)"
    )
    parser.add_argument("--budget", type=Path, metavar="FILE", help="a budget in TOML (default: the project's)")
    parser.add_argument("--json", action="store_true", help="one object a line instead of a table")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Compile, print, judge."""
    from slotwise.audit.budget import BUDGET, load_budget
    from slotwise.audit.report import HEADINGS, Audit, Finding, row, table

    rules = load_budget(parsed.budget)
    findings: list[Finding] = []
    audit = Audit(parsed.backend, parsed.gpu, rules, parsed.kernel, parsed.dtype)
    for finding in audit.run():
        findings.append(finding)
        if parsed.json:
            cells = dict(zip(HEADINGS, row(finding), strict=True))
            print(json.dumps(cells | {"broken": finding.broken}), flush=True)
        elif sys.stderr.isatty():
            print(f"\r{len(findings)} compiled", end="", file=sys.stderr, flush=True)
    if not parsed.json:
        print(table(findings))
    broken = [finding for finding in findings if finding.broken]
    for finding in broken:
        code = finding.facts.code
        where = f"{code.kernel} ({code.function}, {code.dtype}, {code.generation}, {code.configuration})"
        print(f"{where}: {'; '.join(finding.broken)}", file=sys.stderr)
    unchosen = audit.unchosen()
    for text in unchosen:
        print(f"{text}: in the table, but no audited call chooses it; add one to audit/calls.py", file=sys.stderr)
    budget = parsed.budget.name if parsed.budget else BUDGET
    print(f"{len(findings)} functions, {len(broken)} outside the budget {budget}", file=sys.stderr)
    return 1 if broken or unchosen else 0
