"""Tables for a terminal, and the JSON form of a comparison.

What always holds: a figure is a median with the least and the most of the rounds beside it; a missing one shows as a
dash, and the reason stands below the table.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from sidebyside.comparison import (
    ARITHMETIC,
    ARITHMETIC_SHARE,
    COPY,
    LIMIT_SHARE,
    MEMORY,
    MULTIPLY_ADDS,
    READ,
    Comparison,
)
from sidebyside.rounds import Spread
from sidebyside.work import DECODE, DECODE_BATCH, PREFILL, PREFILL_LONG, UNITS, VERIFY

WORK_NAMES = (DECODE, PREFILL, PREFILL_LONG, DECODE_BATCH)
PEERS = {
    "slotwise bf16": ("llama.cpp bf16", "transformers bf16", "transformers float32"),
    "slotwise int8": ("llama.cpp q8_0",),
    "slotwise int4": ("llama.cpp q4_0",),
}
"""Whom each precision is held against."""


def ratios(found: Comparison) -> dict[str, dict[str, dict[str, Spread]]]:
    """who -> peer -> work -> ratio of rates."""
    return {
        who: {
            peer: {work: ratio for work in WORK_NAMES if (ratio := found.samples.ratio(who, peer, work)) is not None}
            for peer in peers
        }
        for who, peers in PEERS.items()
    }


def show(found: Comparison, console: Console) -> None:
    """Print what was found for one shape."""
    shape, samples = found.shape, found.samples
    speed, copied = samples.spread(MEMORY, READ), samples.spread(MEMORY, COPY)
    title = f"Llama {shape.name}, {found.threads} threads: tokens/s, medians (least to most)"
    shares = (*LIMIT_SHARE.values(), *ARITHMETIC_SHARE.values())
    table = Table("engine", *WORK_NAMES, *shares, VERIFY, title=title, title_justify="left")
    for name in found.about:
        if samples.spread(name, DECODE) is None:
            continue  # one whose logits alone were looked at
        cells = [_cell(samples.spread(name, work)) for work in WORK_NAMES]
        cells += [_share(samples.spread(name, work)) for work in shares]
        table.add_row(name, *cells, _cell(samples.spread(name, VERIFY)))
    console.print(table)
    if speed is not None and copied is not None:
        console.print(f"memory read: {_giga(speed)} GB/s; copied (read + written): {_giga(copied)} GB/s")
    possible = samples.spread(ARITHMETIC, MULTIPLY_ADDS)
    if possible is not None:
        console.print(f"float32 multiply-adds: {_giga(possible)} thousand million a second")
    table = Table("ratio of rates", "to", *WORK_NAMES, title="Median of the rounds' ratios (least to most)")
    for who, peers in ratios(found).items():
        for peer, by_work in peers.items():
            if by_work:
                table.add_row(who, peer, *(_cell(by_work.get(work)) for work in WORK_NAMES))
    if table.row_count:
        console.print(table)
    for name, reason in found.missing.items():
        console.print(f"{name}: missing. {reason}", markup=False)
    for what, reason in found.left_out.items():
        console.print(f"{what}: {reason}", markup=False, highlight=False)
    for name, finding in found.findings.items():
        wrong = "WRONG RESULTS: " if finding.is_wrong else ""
        console.print(f"{name}: {wrong}logits against transformers float32: {finding}", markup=False, highlight=False)
    if not found.findings:
        console.print("No engine's logits were compared: transformers float32 is not among those that ran.")
    console.print(f"{found.shape.name} took {found.seconds:.0f} s; {disturbed(found.disturbance)}", highlight=False)


def disturbed(shares: dict[str, float]) -> str:
    """One line on what else the cores did."""
    host, others = shares.get("host", 0.0), shares.get("others", 0.0)
    return f"meanwhile {others:.0%} of the cores' time went to other processes, {host:.0%} to the host's other guests"


def as_json(found: Comparison) -> dict[str, Any]:
    """Everything of one shape, plain."""
    speed = found.samples.spread(MEMORY, READ)
    possible = found.samples.spread(ARITHMETIC, MULTIPLY_ADDS)
    spreads = found.samples.as_json()
    return {
        "parameters": found.shape.parameters,
        "threads": found.threads,
        "units": UNITS,
        "bandwidth": None if speed is None else asdict(speed),
        "multiply_adds": None if possible is None else asdict(possible),
        "engines": {name: asdict(about) for name, about in found.about.items()},
        "missing": found.missing,
        "left_out": found.left_out,
        "seconds": round(found.seconds, 1),
        "disturbance": {who: round(share, 4) for who, share in found.disturbance.items()},
        "logits": {name: asdict(finding) | {"wrong": finding.is_wrong} for name, finding in found.findings.items()},
        "medians": {
            who: {what: asdict(Spread.of(values)) for what, values in by_work.items()}
            for who, by_work in spreads.items()
        },
        "ratios": {
            who: {
                peer: {work: asdict(ratio) for work, ratio in by_work.items()}
                for peer, by_work in peers.items()
                if by_work
            }
            for who, peers in ratios(found).items()
        },
        "samples": spreads,
    }


def _cell(spread: Spread | None) -> str:
    return "-" if spread is None else str(spread)


def _share(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.median:.0%}" + (f" ({spread.least:.0%} to {spread.most:.0%})" if spread.count > 1 else "")


def _giga(spread: Spread) -> Spread:
    return Spread(spread.median / 1e9, spread.least / 1e9, spread.most / 1e9, spread.count)
