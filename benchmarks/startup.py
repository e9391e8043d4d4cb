"""From start to first token: a fresh process loads the bundled pair and says its first word.

    python benchmarks/startup.py [--repeats 7] [--cold] [--model FOLDER] [--draft FOLDER]

Each repeat is a process of its own, as a user starts it; the first, which fills the caches of compiled kernels and of
the file system, is not counted. With --cold, one more run has an empty cache of compiled kernels. Figures are medians
in seconds; the least and the most of the repeats stand beside them. Results go to benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from sidebyside.machine import describe, physical_cores
from sidebyside.rounds import Spread

HERE = Path(__file__).parent
MODELS = HERE.parent / "examples" / "models"
PHASES = ("interpreter", "import torch", "import slotwise", "import the backend", "load the pair", "first token")
TOTAL = "start to first token"

# What a user's program does; times are of the system's monotonic clock, which processes share.
_CHILD = """
import json, sys, time
times = [time.monotonic()]
options = json.loads(sys.argv[1])
import torch
times.append(time.monotonic())
import slotwise
times.append(time.monotonic())
from slotwise.core.backend import load_backend
load_backend(options["backend"])
times.append(time.monotonic())
llm = slotwise.LLM(**options, progress=False)
times.append(time.monotonic())
with llm.stream("Once upon a time", slotwise.Sampling(max_new_tokens=8)) as stream:
    while not next(stream).token_ids:
        pass
    times.append(time.monotonic())
print(json.dumps(times))
"""


def start_once(options: Mapping[str, object], environment: Mapping[str, str]) -> dict[str, float]:
    """Seconds of each phase of one start; raises RuntimeError with what the process said when it failed."""
    command = [sys.executable, "-c", _CHILD, json.dumps(options)]
    begun = time.monotonic()
    ended = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise RuntimeError(f"the process ended with {ended.returncode}: {ended.stderr.strip()[-500:]}")
    times = [begun, *json.loads(ended.stdout)]
    phases = {name: after - before for name, before, after in zip(PHASES, times, times[1:], strict=False)}
    return phases | {TOTAL: times[-1] - begun}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="processes that count (default 7)")
    parser.add_argument("--cold", action="store_true", help="also start once with no compiled kernels")
    parser.add_argument("--model", default=str(MODELS / "stories"))
    parser.add_argument("--draft", default=str(MODELS / "stories-draft"))
    parser.add_argument("--backend", default="numba_cpu", help="slotwise's (default numba_cpu)")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="default: cores")
    parsed = parser.parse_args()
    options = {name: getattr(parsed, name) for name in ("model", "draft", "backend", "threads")}
    console = Console()
    try:
        start_once(options, {})
        starts = [start_once(options, {}) for _ in range(parsed.repeats)]
        cold = None
        if parsed.cold:
            with tempfile.TemporaryDirectory() as empty:
                cold = start_once(options, {"SLOTWISE_CACHE": empty})
    except RuntimeError as error:
        console.print(f"startup: {error}", markup=False)
        return 1
    spreads = {name: Spread.of(start[name] for start in starts) for name in (*PHASES, TOTAL)}
    table = Table("phase", "seconds", *(["no compiled kernels"] if cold else []))
    for name, spread in spreads.items():
        table.add_row(name, str(spread), *([f"{cold[name]:.2f}"] if cold else []))
    console.print(table)
    results = {
        "machine": describe(),
        "options": {"repeats": parsed.repeats, "backend": parsed.backend, "threads": parsed.threads},
        "models": [Path(parsed.model).name, Path(parsed.draft).name],
        "seconds": {name: asdict(spread) for name, spread in spreads.items()},
        "cold": cold,
        "samples": starts,
    }
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    (folder / "startup.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print("written: startup.json in benchmarks/results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
