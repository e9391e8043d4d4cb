"""Decoding and prefill on a CPU: slotwise beside llama.cpp and transformers, on the same random weights.

    pip install -c constraints.txt -e ".[bench]"
    python benchmarks/cpu.py [--quick] [--shapes 135M,1B] [--engines slotwise,llama.cpp] [--rounds 3] [--threads 2]

All engines take turns in every round, each in a process of its own that sleeps while others run, and memory bandwidth
is read between the turns. Figures are medians over rounds, in tokens a second; ratios are medians of the rounds' own;
a share of bandwidth is what a step must read (weights and cache) over what the same time could have read. Results go
to benchmarks/results/ as JSON and as a chart. Exits with 1 when an engine's logits are wrong.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from sidebyside import charts, report
from sidebyside.comparison import Comparison, compare
from sidebyside.engine import EngineSpec
from sidebyside.machine import describe, physical_cores
from sidebyside.progress import saying
from sidebyside.shapes import SHAPES, Shape, make_checkpoint
from sidebyside.work import DECODE, DECODE_BATCH, PREFILL, PREFILL_LONG, QUICK_WORKS, UNITS, WORKS

RESULTS = Path(__file__).parent / "results"
LARGE = 5e8
"""Parameters of a large model."""


def engine_specs(backend: str) -> tuple[EngineSpec, ...]:
    """Every engine and precision."""

    def slotwise(name: str, size: float, **options: Any) -> EngineSpec:
        return EngineSpec(f"slotwise {name}", "sidebyside.slotwise_engine", {"backend": backend, **options}, size)

    def llama_cpp(kind: str, size: float) -> EngineSpec:
        return EngineSpec(f"llama.cpp {kind}", "sidebyside.llama_cpp_engine", {"kind": kind}, size)

    def transformers(name: str, dtype: str, size: float) -> EngineSpec:
        return EngineSpec(f"transformers {name}", "sidebyside.transformers_engine", {"dtype": dtype}, size)

    return (
        slotwise("bf16", 2.0, dtype="bfloat16"),
        slotwise("int8", 1.5, dtype="bfloat16", weights="int8"),
        slotwise("int4", 1.0, dtype="bfloat16", weights="int4"),
        llama_cpp("bf16", 2.0),
        llama_cpp("q8_0", 1.1),
        llama_cpp("q4_0", 0.6),
        transformers("bf16", "bfloat16", 2.0),
        transformers("float32", "float32", 4.0),
    )


def checked_specs(backend: str) -> tuple[EngineSpec, ...]:
    """Engines whose logits alone are looked at."""
    options = {"backend": backend, "dtype": "float32"}
    return (EngineSpec("slotwise float32", "sidebyside.slotwise_engine", options, 4.0),)


def rounds_of(shape: Shape, parsed: argparse.Namespace) -> int:
    """How many rounds for a shape."""
    if parsed.rounds is not None:
        return int(parsed.rounds)
    return 3 if not parsed.quick else 1 if shape.parameters > LARGE else 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="short turns, no long prompts, fewer rounds")
    parser.add_argument("--rounds", type=int, help="rounds (default 3; with --quick 2, for a large model 1)")
    parser.add_argument("--shapes", default="135M,1B", help=f"of {', '.join(SHAPES)}; separated by commas")
    parser.add_argument("--engines", default="", help="names or beginnings of names, separated by commas")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="of every engine (default: cores)")
    parser.add_argument("--backend", default="numba_cpu", help="slotwise's (default numba_cpu)")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "slotwise-benchmarks")
    parser.add_argument("--name", default="cpu", help="of the files written (default cpu)")
    parser.add_argument("--add", action="store_true", help="keep the other shapes that the file already has")
    parsed = parser.parse_args()
    if parsed.threads < 1 or (parsed.rounds is not None and parsed.rounds < 1):
        parser.error("--threads and --rounds must be 1 or more")
    chosen = [
        spec
        for spec in engine_specs(parsed.backend)
        if not parsed.engines or spec.name.startswith(tuple(parsed.engines.split(",")))
    ]
    unknown = [name for name in parsed.shapes.split(",") if name not in SHAPES]
    if unknown or not chosen:
        parser.error(f"no such shape: {', '.join(unknown)}" if unknown else f"no engine is called {parsed.engines}")
    checked = checked_specs(parsed.backend) if any(spec.name.startswith("slotwise") for spec in chosen) else ()
    console, results = Console(), []
    with saying() as say:
        for name in parsed.shapes.split(","):
            shape = SHAPES[name]
            say(f"{name}: making the checkpoint")
            folder = make_checkpoint(shape, parsed.cache)
            found = compare(
                shape,
                folder,
                chosen,
                # A second copy of a large model in float32 is more than a small machine has.
                () if shape.parameters > LARGE else checked,
                threads=parsed.threads,
                rounds=rounds_of(shape, parsed),
                share=0.8 if parsed.quick else 1.6,
                works=QUICK_WORKS if parsed.quick else WORKS,
                say=say,
            )
            results.append(found)
            report.show(found, console)
    _write(results, parsed, console)
    return 1 if any(found.wrong for found in results) else 0


def _write(results: list[Comparison], parsed: argparse.Namespace, console: Console) -> None:
    RESULTS.mkdir(exist_ok=True)
    machine = describe()
    options = {name: getattr(parsed, name) for name in ("rounds", "quick", "backend", "threads")}
    file = RESULTS / f"{parsed.name}.json"
    shapes = json.loads(file.read_text())["shapes"] if parsed.add and file.exists() else {}
    shapes |= {found.shape.name: {"machine": machine, "options": options, **report.as_json(found)} for found in results}
    file.write_text(json.dumps({"shapes": shapes}, indent=1) + "\n")
    rows = [panels for name, shape in shapes.items() if (panels := _panels(name, shape))]
    if rows:
        heading = f"{machine['processor']}, {parsed.threads} threads, {machine['date']}"
        most = max(len(shape["engines"]) for shape in shapes.values())
        charts.draw(file.with_suffix(".png"), f"{heading}. Red: the weights at memory bandwidth", rows, most)
    console.print(f"written: {file.name} and {file.with_suffix('.png').name} in benchmarks/results")


def _panels(name: str, shape: dict[str, Any]) -> list[charts.Painter]:
    panels: list[charts.Painter] = []
    for work in (DECODE, PREFILL, PREFILL_LONG, DECODE_BATCH):
        spreads = {who: medians[work] for who, medians in shape["medians"].items() if work in medians}
        limits = {}
        if work == DECODE and shape["bandwidth"]:
            read = shape["bandwidth"]["median"]
            limits = {who: read / shape["engines"][who]["weight_bytes"] for who in spreads}
        if spreads:
            title = f"{name}: {work}, {UNITS[work]}"
            panels.append(functools.partial(charts.bars, title=title, spreads=spreads, limits=limits))
    return panels


if __name__ == "__main__":
    sys.exit(main())
