"""What a plan says that it takes, beside what a process really takes.

    python benchmarks/memory.py [--shape 135M] [--cache FOLDER] [--model FOLDER] [--backends reference numba_cpu]

Each line is a process of its own: it loads a small model first, so that libraries, threads and compiled kernels are
there, then the model in question, writes every slot of its states, and reads how far its resident memory has grown:
anonymous memory, and weights that are used where the file is mapped. Needs Linux (/proc/self).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from sidebyside.shapes import SHAPES, make_checkpoint

HERE = Path(__file__).parent
WARM = HERE.parent / "examples" / "models" / "stories"


def resident(name: str) -> int:
    """Bytes of this process by a name of /proc/self/status: `RssAnon`, `RssFile`."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, f"/proc/self/status has no {name}"
    return int(found[1]) * 1024


def measure(model: str, backend: str, weights: str, capacity: int, sequences: int) -> dict[str, int]:
    """Load in this process; bytes that are planned, and by which it grew."""
    from slotwise.engine.engine import Engine
    from slotwise.llm import LLM
    from slotwise.planning import open_models, plan_model
    from slotwise.plans.memory import need_of
    from slotwise.slots.step import TARGET

    options = {"backend": backend, "weights": weights, "capacity": capacity, "max_sequences": sequences}
    with LLM(WARM, progress=False, backend=backend, weights=weights, max_sequences=sequences) as warm:
        warm.generate("Once upon a time")
    plan, (loaded, _, _) = plan_model(model, **options), open_models(model, None, None, options)  # type: ignore[arg-type]
    before = {name: resident(name) for name in ("RssAnon", "RssFile")}
    engine = Engine(plan, {TARGET: loaded.weights})
    executor = engine.executor
    for states in executor.caches.values():
        for state in states.values():
            state.fill_(1)
    executor.arena.fill_(1)
    for buffer in executor.buffers.values():
        buffer.fill_(1)
    engine.lanes.tokens.fill(1)
    mapped = {
        tensor.data_ptr(): tensor.nbytes
        for tensor in executor.weights[TARGET].values()
        if tensor.untyped_storage().nbytes() == tensor.nbytes  # else it lies on the shelf with others
    }
    for tensor in executor.weights[TARGET].values():
        tensor.view(-1).float().sum()  # touched, as a step does
    need = need_of(plan)
    grown = resident("RssAnon") - before["RssAnon"]
    return {"planned": need.held, "anonymous": grown, "mapped": sum(mapped.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="135M")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "slotwise-benchmarks")
    parser.add_argument("--model", help="a checkpoint folder instead of a shape")
    parser.add_argument("--backends", nargs="+", default=["reference", "numba_cpu"])
    parser.add_argument("--weights", nargs="+", default=["native", "int8", "int4_zp"])
    parser.add_argument("--capacity", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--child", nargs=2, metavar=("BACKEND", "WEIGHTS"), help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    model = parsed.model or str(make_checkpoint(SHAPES[parsed.shape], parsed.cache))
    if parsed.child:
        print(json.dumps(measure(model, *parsed.child, parsed.capacity, parsed.sequences)))
        return
    table = Table()
    for head in ("backend", "weights", "planned MiB", "measured MiB", "anonymous", "mapped", "measured / planned"):
        table.add_column(head, justify="right")
    for backend in parsed.backends:
        for weights in parsed.weights:
            words = [sys.executable, __file__, "--model", model, "--capacity", str(parsed.capacity)]
            words += ["--sequences", str(parsed.sequences), "--child", backend, weights]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            measured = found["anonymous"] + found["mapped"]
            amounts = (found["planned"], measured, found["anonymous"], found["mapped"])
            table.add_row(
                backend, weights, *(f"{n / 2**20:.1f}" for n in amounts), f"{measured / found['planned']:.3f}"
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
