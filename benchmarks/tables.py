"""The results on disk as Markdown tables, for docs/cpu.md.

    python benchmarks/tables.py [cpu.json] [speculation.json] [startup.json]

Prints the tables of the files named, or of all three, as they lie in benchmarks/results/. Nothing is measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
KNOWN = ("cpu.json", "speculation.json", "startup.json")
RATES = ("decode", "prefill 128", "prefill 512", "batch 8")
SHARES = ("decode, of bandwidth", "batch 8, of bandwidth", "batch 8, of arithmetic", "prefill 128, of arithmetic")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def cpu_tables(results: Mapping[str, Any]) -> str:
    """Rates, ratios and logits of every shape."""
    return "\n".join(_shape_tables(name, shape) for name, shape in results["shapes"].items())


def _shape_tables(name: str, shape: Mapping[str, Any]) -> str:
    medians = shape["medians"]
    measured = [who for who in shape["engines"] if who in medians]
    read = shape["bandwidth"]
    speed = f"{read['median'] / 1e9:.1f} GB/s ({read['least'] / 1e9:.1f} to {read['most'] / 1e9:.1f})"
    possible = shape.get("multiply_adds")
    if possible is not None:
        speed += f"; {possible['median'] / 1e9:.0f} thousand million float32 multiply-adds a second"
    rates = table(
        ["", *RATES, *SHARES, "6 rows"],
        (
            [
                who,
                *(number(medians[who].get(work)) for work in RATES),
                *(percent(medians[who].get(work)) for work in SHARES),
                number(medians[who].get("6 rows")),
            ]
            for who in measured
        ),
    )
    ratios = table(
        ["times the rate of", *RATES],
        (
            [f"{who} / {peer}", *(number(by_work.get(work), spread=True) for work in RATES)]
            for who, peers in shape["ratios"].items()
            for peer, by_work in peers.items()
        ),
    )
    logits = table(
        ["logits against transformers float32", "error", "limit"],
        (
            [who, f"{found['error']:.1e}", "-" if found["limit"] is None else f"{found['limit']:.1e}"]
            for who, found in shape["logits"].items()
        ),
    )
    missing = "".join(f"{who}: missing. {why}\n" for who, why in shape["missing"].items())
    return "\n".join([f"{about(shape)}\n\n{name}; memory read {speed}.\n", rates, ratios, logits, missing])


def speculation_tables(results: Mapping[str, Any]) -> str:
    """Speed, gain and acceptance of every drafter."""
    rows = []
    for name, by_how in results["tokens_per_second"].items():
        for how, speed in by_how.items():
            counts = results["counts"][f"{name}, {how}"]
            accepted = f"{counts['accepted'] / counts['drafted']:.0%}" if counts["drafted"] else "-"
            calls = f"{counts['tokens'] / counts['target_calls']:.2f}" if counts["target_calls"] else "-"
            gain = number(results["times_own_plain"][name].get(how), spread=True)
            rows.append([name, how, number(speed), gain, accepted, calls])
    heads = ["", "", "tokens/s", "times its own plain", "acceptance", "tokens a target call"]
    return f"{about(results)}\n\n{table(heads, rows)}"


def startup_tables(results: Mapping[str, Any]) -> str:
    """Seconds by phase."""
    cold = results["cold"] or {}
    rows = (
        [phase, number(spread, spread=True), f"{cold[phase]:.2f}" if phase in cold else "-"]
        for phase, spread in results["seconds"].items()
    )
    return f"{about(results)}\n\n{table(['seconds', 'compiled kernels on disk', 'none on disk'], rows)}"


def about(results: Mapping[str, Any]) -> str:
    """What was measured on."""
    machine, options = results["machine"], results["options"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    elsewhere = results.get("disturbance")
    disturbed = f" Other processes took {elsewhere['others']:.0%} of the cores' time." if elsewhere else ""
    return (
        f"{machine['processor']}, {', '.join(machine['instructions'])}; {options['threads']} threads; "
        f"{machine['date']}. Python {machine['python']}, {versions}.{disturbed}"
    )


def number(found: Mapping[str, float] | None, spread: bool = False) -> str:
    """A median to three digits, with the least and the most if asked."""
    if found is None:
        return "-"
    values = (found["median"], found["least"], found["most"])
    middle, least, most = (f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in values)
    return f"{middle} ({least} to {most})" if spread else middle


def percent(found: Mapping[str, float] | None) -> str:
    """A median share in per cent."""
    return "-" if found is None else f"{found['median']:.0%}"


MAKERS = dict(zip(KNOWN, (cpu_tables, speculation_tables, startup_tables), strict=True))


def main() -> int:
    for name in sys.argv[1:] or KNOWN:
        maker = MAKERS.get(Path(name).name)
        file = RESULTS / Path(name).name
        if maker is None or not file.exists():
            print(f"{name}: expected one of {', '.join(KNOWN)} in benchmarks/results", file=sys.stderr)
            return 1
        print(maker(json.loads(file.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
