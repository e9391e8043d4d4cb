"""What speculation gains: slotwise beside transformers' assisted generation and prompt lookup, on the same pair.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/speculation.py [--quick] [--rounds 6] [--new 128] [--threads 2]

The target is the bundled one grown to the cost of a model of 135 million parameters without changing what it computes
(see sidebyside/grown.py; its logits are compared with the small one's first), the draft model is the bundled one.
Each round takes one prompt, greedily and at temperature 0.8; engines take turns, each in a process of its own.
Figures are new tokens over seconds of the whole call. Results go to benchmarks/results/ as JSON and as a chart. Exits
with 1 when the grown target computes something else, or when slotwise's tokens depend on the drafter.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sidebyside import charts
from sidebyside.engine import EngineSpec
from sidebyside.grown import LIKE_135M, grow
from sidebyside.guard import EXACT_LIMIT, logits_error
from sidebyside.machine import Disturbance, describe, physical_cores
from sidebyside.pairs import Generated
from sidebyside.progress import saying
from sidebyside.report import disturbed
from sidebyside.rounds import Samples, Spread, rotated
from sidebyside.workers import EngineFailed, Worker
from tokenizers import Tokenizer

HERE = Path(__file__).parent
RESULTS = HERE / "results"
MODELS = HERE.parent / "examples" / "models"
SPEEDS = {"greedy": 0.0, "temperature 0.8": 0.8}
SLOTWISE_PLAIN, TRANSFORMERS_PLAIN = "slotwise plain", "transformers plain"
PROMPTS = (
    "Once upon a time",
    "One day, a little girl named Lily",
    "There was a big dog who liked to play in the park.",
    "Tom and his mother went to the",
    "It was a sunny day and the birds",
    "The little boat was very sad because",
    "Ben found a red ball under",
    "In a small house near the forest there lived",
)


@dataclass
class Results:
    """What came out: tokens a second by engine and way of sampling, counts, widths, and what went wrong."""

    samples: Samples = field(default_factory=Samples)
    counts: dict[tuple[str, str], dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    widths: dict[tuple[str, str], list[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(list))
    tokens: dict[tuple[str, str, int], tuple[int, ...]] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    growth: dict[str, float] = field(default_factory=dict)
    disturbance: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, how: str, turn: int, made: Generated) -> None:
        """Take in one generation."""
        self.samples.add(name, how, turn, len(made.tokens) / made.seconds)
        self.tokens[name, how, turn] = made.tokens
        counts = self.counts[name, how]
        counts["tokens"] += len(made.tokens)
        counts["target_calls"] += made.target_calls
        counts["drafted"] += made.drafted
        counts["accepted"] += made.accepted

    def differing(self, engine: str) -> list[tuple[str, str, int]]:
        """Generations of `engine`, by (name, way of sampling, turn), whose tokens are not those of its plain one."""
        plain = f"{engine} plain"
        return [
            (name, how, turn)
            for (name, how, turn), tokens in self.tokens.items()
            if name.startswith(engine) and tokens != self.tokens.get((plain, how, turn), tokens)
        ]

    def gain(self, name: str, how: str) -> Spread | None:
        """Times the speed of the same engine without a drafter."""
        return self.samples.ratio(name, f"{name.split()[0]} plain", how)

    @property
    def is_wrong(self) -> bool:
        """Whether a figure must not be believed."""
        return any(error > EXACT_LIMIT for error in self.growth.values()) or bool(self.differing("slotwise"))


def engine_specs(parsed: argparse.Namespace) -> tuple[EngineSpec, ...]:
    """Every engine with its drafter."""

    def slotwise(name: str, draft: str | None) -> EngineSpec:
        options = {"engine": "slotwise", "draft": draft, "backend": parsed.backend, "speculate": parsed.speculate}
        return EngineSpec(f"slotwise {name}", "sidebyside.pairs", options | _slotwise_extra(parsed))

    def transformers(name: str, draft: str | None, drafts: int | None = None) -> EngineSpec:
        options = {"engine": "transformers", "draft": draft, "drafts": drafts, "dtype": parsed.transformers_dtype}
        return EngineSpec(f"transformers {name}", "sidebyside.pairs", options)

    draft = str(MODELS / "stories-draft")
    return (
        slotwise("plain", None),
        slotwise("draft model", draft),
        slotwise("n-gram", "ngram"),
        transformers("plain", None),
        transformers(f"assisted, {parsed.speculate} drafts", draft, parsed.speculate),
        transformers("assisted, its defaults", draft),
        transformers("prompt lookup", "prompt lookup", parsed.speculate),
    )


def _slotwise_extra(parsed: argparse.Namespace) -> dict[str, Any]:
    return {} if parsed.weights is None else {"weights": parsed.weights}


def check_growth(target: Path, parsed: argparse.Namespace, found: Results, say: Callable[[str], None]) -> None:
    """Compare the grown target's logits with the small one's, in float32, in both engines."""
    prompt = Tokenizer.from_file(str(target / "tokenizer.json")).encode(" ".join(PROMPTS)).ids[:64]
    for engine, options in (
        ("slotwise", {"draft": None, "backend": parsed.backend, "dtype": "float32"}),
        ("transformers", {"draft": None, "dtype": "float32"}),
    ):
        spec = EngineSpec(f"{engine} float32", "sidebyside.pairs", {"engine": engine, **options})
        logits = []
        for folder in (MODELS / "stories", target):
            say(f"comparing logits in {engine}: {folder.name}")
            try:
                worker = Worker(spec, parsed.threads, target=folder)
                logits.append(worker.ask("logits", prompt))
                worker.close()
            except EngineFailed as error:
                found.missing[f"{engine}'s check of the grown target"] = str(error)
        if len(logits) == 2:
            found.growth[engine] = logits_error(logits[1], logits[0])


def measure(target: Path, parsed: argparse.Namespace, found: Results, say: Callable[[str], None]) -> None:
    """Run all engines on the prompts, round by round."""
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    workers: dict[str, Worker] = {}
    try:
        for spec in engine_specs(parsed):
            say(f"loading {spec.name}")
            try:
                workers[spec.name] = worker = Worker(spec, parsed.threads, target=target)
                found.about[spec.name] = worker.about
                worker.ask("generate", prompts[0], 12, 0.8, 1)
            except EngineFailed as error:
                found.missing[spec.name] = str(error)
                workers.pop(spec.name, None)
        for turn in range(parsed.rounds):
            for how, temperature in SPEEDS.items():
                for name in rotated(list(workers), turn):
                    say(f"round {turn + 1} of {parsed.rounds}, {how}, {name}")
                    task = (prompts[turn % len(prompts)], parsed.new, temperature, turn)
                    try:
                        found.add(name, how, turn, workers[name].ask("generate", *task))
                        if name.startswith("slotwise") and name != SLOTWISE_PLAIN:
                            found.widths[name, how].append(workers[name].ask("widths", *task))
                    except EngineFailed as error:
                        found.missing[name] = str(error)
                        workers.pop(name).close()
    finally:
        for worker in workers.values():
            worker.close()


def show(found: Results, console: Console) -> None:
    """Print the tables and what was checked."""
    for how in SPEEDS:
        title = f"{how}: medians over prompts (least to most)"
        table = Table("engine", "tokens/s", "times its own plain", "times transformers plain", title=title)
        for column in ("acceptance", "tokens a target call", "mean width"):
            table.add_column(column)
        for name in found.about:
            speed = found.samples.spread(name, how)
            if speed is None:
                continue
            own = found.gain(name, how)
            other = found.samples.ratio(name, TRANSFORMERS_PLAIN, how)
            counts = found.counts[name, how]
            accepted = f"{counts['accepted'] / counts['drafted']:.0%}" if counts["drafted"] else "-"
            calls = f"{counts['tokens'] / counts['target_calls']:.2f}" if counts["target_calls"] else "-"
            width = mean_width(found.widths.get((name, how), []))
            table.add_row(name, str(speed), _cell(own), _cell(other), accepted, calls, width)
        console.print(table)
    for engine, error in found.growth.items():
        console.print(f"grown target in {engine}, float32: error of logits {error:.1e}, limit {EXACT_LIMIT:.0e}")
    for engine, ways in (("slotwise", tuple(SPEEDS)), ("transformers", ("greedy",))):
        drafted = [key for key in found.tokens if key[0].startswith(engine) and key[1] in ways]
        drafted = [key for key in drafted if key[0] != f"{engine} plain"]
        differing = [key for key in found.differing(engine) if key in drafted]
        same = f"{len(drafted) - len(differing)} of {len(drafted)} generations with a drafter"
        console.print(f"{engine}, {' and '.join(ways)}: {same} have the tokens of the plain one")
    for name, how, turn in found.differing("slotwise"):
        console.print(f"WRONG RESULTS: {name}, {how}, prompt {turn}: the tokens depend on the drafter", markup=False)
    for name, reason in found.missing.items():
        console.print(f"{name}: missing. {reason}", markup=False)
    console.print(disturbed(found.disturbance).capitalize(), highlight=False)


def mean_width(widths: Sequence[Sequence[int]]) -> str:
    """The mean over all steps, as text."""
    flat = [width for each in widths for width in each]
    return f"{sum(flat) / len(flat):.1f}" if flat else "-"


def by_step(widths: Sequence[Sequence[int]]) -> list[float]:
    """The mean width of the first step, the second, ..., as long as half of the generations last."""
    lengths = sorted(map(len, widths))
    steps = lengths[len(lengths) // 2] if lengths else 0
    return [sum(at) / len(at) for i in range(steps) if (at := [each[i] for each in widths if len(each) > i])]


def write(found: Results, parsed: argparse.Namespace, console: Console) -> None:
    """The JSON and the chart."""
    RESULTS.mkdir(exist_ok=True)
    machine = describe()
    names = ("rounds", "new", "threads", "backend", "speculate", "weights", "transformers_dtype", "quick")
    results = {
        "machine": machine,
        "options": {name: getattr(parsed, name) for name in names},
        "growth": asdict(LIKE_135M) | {"logits_errors": found.growth, "limit": EXACT_LIMIT},
        "engines": found.about,
        "missing": found.missing,
        "wrong": found.is_wrong,
        "disturbance": found.disturbance,
        "tokens_per_second": {
            name: {how: asdict(Spread.of(values)) for how, values in by_how.items()}
            for name, by_how in found.samples.as_json().items()
        },
        "times_own_plain": {
            name: {how: asdict(gain) for how in SPEEDS if (gain := found.gain(name, how)) is not None}
            for name in found.about
        },
        "counts": {f"{name}, {how}": dict(counts) for (name, how), counts in found.counts.items()},
        "mean_width_by_step": {f"{name}, {how}": by_step(widths) for (name, how), widths in found.widths.items()},
        "samples": found.samples.as_json(),
    }
    file = RESULTS / f"{parsed.name}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    rows = []
    for how in SPEEDS:
        spreads = {who: by_how[how] for who, by_how in results["tokens_per_second"].items() if how in by_how}
        widths = {name: by_step(found.widths[name, kind]) for name, kind in found.widths if kind == how}
        bars = functools.partial(charts.bars, title=f"{how}: tokens/s", spreads=spreads)
        drawn = functools.partial(charts.line, title=f"{how}: mean draft width", series=widths, label="decode step")
        rows.append([bars, drawn])
    heading = f"{machine['processor']}, {parsed.threads} threads, {machine['date']}"
    charts.draw(file.with_suffix(".png"), heading, rows, len(found.about))
    console.print(f"written: {file.name} and {file.with_suffix('.png').name} in benchmarks/results")


def _cell(spread: Spread | None) -> str:
    return "-" if spread is None else str(spread)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two rounds of 64 tokens")
    parser.add_argument("--rounds", type=int, help=f"prompts, of {len(PROMPTS)} (default 6)")
    parser.add_argument("--new", type=int, help="tokens of each generation (default 128)")
    parser.add_argument("--speculate", type=int, default=5, help="most drafts a step (default 5)")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="of every engine (default: cores)")
    parser.add_argument("--backend", default="numba_cpu", help="slotwise's (default numba_cpu)")
    parser.add_argument("--weights", help="slotwise's weights option: int8, int4, ... (default: as they are)")
    parser.add_argument("--transformers-dtype", default="bfloat16", help="bfloat16 (default) or float32")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "slotwise-benchmarks")
    parser.add_argument("--name", default="speculation", help="of the files written (default speculation)")
    parsed = parser.parse_args()
    parsed.rounds = parsed.rounds or (2 if parsed.quick else 6)
    parsed.new = parsed.new or (64 if parsed.quick else 128)
    found, console = Results(), Console()
    with saying() as say:
        say("growing the target")
        parsed.cache.mkdir(parents=True, exist_ok=True)
        target = grow(MODELS / "stories", LIKE_135M, parsed.cache / "stories-135M")
        check_growth(target, parsed, found, say)
        disturbance = Disturbance()
        measure(target, parsed, found, say)
        found.disturbance = disturbance.shares()
    show(found, console)
    write(found, parsed, console)
    return 1 if found.is_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
