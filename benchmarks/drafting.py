"""What drafting in one launch saves: a step's drafts as one loop, and round by round, on the same engine.

    python benchmarks/drafting.py [--repeats 9] [--model FOLDER] [--draft FOLDER] [--backend B] [--speculate K]

`draft` is the median time of a whole draft of K tokens a sequence, of steps that take turns; tok/s is of whole
generations of fixed width that take turns, the ratio the median of their own ratios. Tokens are compared. Results go to
benchmarks/results/drafting.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sidebyside.machine import describe, physical_cores
from sidebyside.rounds import Spread

from slotwise import LLM, Sampling

HERE = Path(__file__).parent
MODELS = HERE.parent / "examples" / "models"
PROMPTS = ("Once upon a time", "The dog ran", "One day, a little girl", "Tom and Sam went")
WAYS = ("rounds", "loop")


class Switch:
    """Lets an engine draft in loops, or not; times each draft."""

    def __init__(self, llm: LLM) -> None:
        self._find = llm.engine.executor.loops.find
        self._loops: Any = llm.engine.executor.loops
        drafter: Any = llm.engine._drafter
        self._draft = drafter.draft
        drafter.draft = self._timed
        self.turns = False
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.set("loop")

    def set(self, way: str) -> None:
        self.way = way
        self._loops.find = self._find if way == "loop" else lambda *_: None

    def _timed(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        found = self._draft(*arguments)
        self.seconds[self.way].append(time.perf_counter() - start)
        if self.turns:
            self.set(WAYS[1 - WAYS.index(self.way)])
        return found


def generate(llm: LLM, batch: int, sampling: Sampling) -> tuple[float, list[tuple[int, ...]]]:
    """(tokens a second, tokens)."""
    start = time.perf_counter()
    tokens = [out.token_ids for out in llm.generate(list(PROMPTS[:batch]), sampling)]
    return sum(map(len, tokens)) / (time.perf_counter() - start), tokens


def measure(llm: LLM, switch: Switch, batch: int, temperature: float, repeats: int) -> dict[str, Any]:
    """Figures of one batch size and temperature."""
    sampling = Sampling(max_new_tokens=200, temperature=temperature, seed=7, ignore_eos=True)
    speeds: dict[str, list[float]] = defaultdict(list)
    expected = None
    for turn in range(repeats + 1):
        for way in WAYS if turn % 2 else reversed(WAYS):
            switch.set(way)
            speed, tokens = generate(llm, batch, sampling)
            expected = expected or tokens
            if tokens != expected:
                raise RuntimeError(f"a loop drafts other tokens: {tokens} and {expected}")
            if turn:  # the first turn makes what is made once
                speeds[way].append(speed)
    switch.seconds.clear()
    switch.turns = True
    for _ in range(repeats):
        generate(llm, batch, sampling)
    switch.turns = False
    found: dict[str, Any] = {"batch": batch, "temperature": temperature}
    found["draft_us"] = {way: statistics.median(switch.seconds[way]) * 1e6 for way in WAYS}
    found["tokens_per_second"] = {way: asdict(Spread.of(speeds[way])) for way in WAYS}
    ratios = [loop / rounds for rounds, loop in zip(*(speeds[way] for way in WAYS), strict=True)]
    found["ratio"] = asdict(Spread.of(ratios))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=9, help="turns of each (default 9)")
    parser.add_argument("--model", default=str(MODELS / "stories"))
    parser.add_argument("--draft", default=str(MODELS / "stories-draft"))
    parser.add_argument("--backend", default="numba_cpu")
    parser.add_argument("--speculate", type=int, default=5)
    parser.add_argument("--threads", type=int, default=physical_cores(), help="default: cores")
    parsed = parser.parse_args()
    options = {name: getattr(parsed, name) for name in ("model", "draft", "backend", "threads", "speculate")}
    llm = LLM(**options, capacity=256, max_sequences=4, adaptive=False, progress=False)
    switch = Switch(llm)
    found = [measure(llm, switch, batch, t, parsed.repeats) for batch in (1, 4) for t in (0.0, 0.8)]
    table = Table("batch", "temperature", "draft us: rounds", "loop", "tok/s: rounds", "loop", "ratio")
    for each in found:
        speeds = [f"{each['tokens_per_second'][way]['median']:.0f}" for way in WAYS]
        drafts = [f"{each['draft_us'][way]:.0f}" for way in WAYS]
        table.add_row(str(each["batch"]), str(each["temperature"]), *drafts, *speeds, str(Spread(**each["ratio"])))
    Console().print(table)
    names = [Path(parsed.model).name, Path(parsed.draft).name]
    about = {"machine": describe(), "options": {**options, "model": names[0], "draft": names[1]}, "found": found}
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    (folder / "drafting.json").write_text(json.dumps(about, indent=1) + "\n")
    print("written: drafting.json in benchmarks/results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
