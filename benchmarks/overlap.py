"""What starting a step before the one before it is read is worth: step time with and without, on a device of set speed.

    python benchmarks/overlap.py [--model examples/models/stories] [--json FILE]

The device is a clock: a step's kernels do nothing, and what they gave may be read so many microseconds after the later
of their launch and the end of the step before, as on a GPU's stream. So the engine's own work is real, on this machine,
and the device's time is exact. Medians over the steps of several interleaved rounds. `host` is the step on a device
that takes no time, waiting; the ratio can reach (host + device) / max(host, device).

    python benchmarks/overlap.py --cpu [--threads N] [--tokens N] [--weights int4] [--model FOLDER]

Decodes with real kernels on the CPU, `LLM(overlap=False)` beside `LLM(overlap=True)`, where a thread of Python's stands
for the stream.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import slotwise
from slotwise.engine.engine import Engine
from slotwise.engine.request import Request
from slotwise.engine.sampling import Sampling
from slotwise.engine.streams import Work
from slotwise.models.load import load_model
from slotwise.plans.compile import compile_plan
from slotwise.plans.options import PlanOptions
from slotwise.plans.program import SAMPLER

BATCHES = (1, 16, 64)
DEVICE_US = (0, 200, 500, 2000)
STEPS, ROUNDS = 40, 5


class Clock:
    """A device that takes `seconds` for each step, one after another. It is a stream (`engine/streams.py`) too."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._busy_until = 0.0

    def launch(self) -> float:
        """Start a step; returns when it ends."""
        self._busy_until = max(time.perf_counter(), self._busy_until) + self._seconds
        return self._busy_until

    def wait_until(self, end: float) -> None:
        """Watch the clock: sleeping would be less exact than what is measured."""
        while time.perf_counter() < end:
            pass

    def start(self, work: Work) -> _End:
        """A step that runs beside the host."""
        work()
        return _End(self, self.launch())

    def join(self) -> None:
        """What the host launches itself comes after."""


class _End:
    def __init__(self, clock: Clock, end: float) -> None:
        self._clock, self._end = clock, end

    def wait(self) -> None:
        self._clock.wait_until(self._end)


def engine_on(clock: Clock, model: Any, batch: int, overlap: bool) -> Engine:
    """An engine of `batch` sequences that decode, whose kernels do nothing and take the clock's time."""
    options = PlanOptions(capacity=512, max_sequences=batch, speculate=0, decode_rows=max(BATCHES), prefill_chunk=64)
    engine = Engine(compile_plan(model.spec, options=options), {"target": model.weights}, overlap=True)
    executor = engine.executor
    for key, launches in executor._launches.items():
        executor._launches[key] = tuple(lambda: None for _ in launches)
    executor.arrays._buffers["ok"].fill_(True)
    executor.stream = clock if overlap else None
    if not overlap:
        # The host waits where it reads: after the sampler, which comes behind the model.
        run = executor.run

        def run_and_wait(role: str, kind: str, rows: int) -> None:
            run(role, kind, rows)
            if role == SAMPLER:
                clock.wait_until(clock._busy_until)
            else:
                clock.launch()

        executor.run = run_and_wait  # type: ignore[method-assign]
    for n in range(batch):
        prompt = tuple(1 + (n * 31 + i) % 2000 for i in range(20))
        engine.add(Request(prompt, Sampling(max_new_tokens=480, ignore_eos=True, seed=n)))
    while engine.roster.waiting or engine.roster.filling:
        engine.step()
    for _ in range(3):
        engine.step()
    return engine


def measure(model: Any, batch: int, device_us: float) -> dict[str, float]:
    """Median microseconds of a step, waiting and overlapped."""
    engines = {name: engine_on(Clock(device_us / 1e6), model, batch, name == "overlapped") for name in NAMES}
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(ROUNDS):
        for name, engine in engines.items():
            for _ in range(STEPS):
                start = time.perf_counter()
                engine.step()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) * 1e6 for name, found in times.items()}


NAMES = ("waiting", "overlapped")


def on_a_clock(folder: str) -> list[dict[str, Any]]:
    """The table: a line for each batch and device."""
    torch.set_num_threads(1)
    model, lines = load_model(folder), []
    print("| sequences | device us | host us | waiting us | overlapped us | ratio | at most |\n" + "|---" * 7 + "|")
    for batch in BATCHES:
        host = 0.0
        for device in DEVICE_US:
            found = measure(model, batch, device)
            host = host or found["waiting"]
            ratio = found["waiting"] / found["overlapped"]
            most = (host + device) / max(host, device)
            lines.append({"sequences": batch, "device us": device, "host us": host, **found, "ratio": ratio})
            cells = [f"{batch}", f"{device}", *(f"{v:.0f}" for v in (host, *found.values())), f"{ratio:.2f}"]
            print("| " + " | ".join([*cells, f"{most:.2f}"]) + " |", flush=True)
    return lines


def on_the_cpu(folder: str, threads: int | None, tokens: int, weights: str) -> list[dict[str, Any]]:
    """Milliseconds a step with real kernels, one and eight sequences."""
    lines = []
    common: dict[str, Any] = {"threads": threads, "weights": weights, "capacity": 512, "progress": False}
    models = {name: slotwise.LLM(folder, overlap=name == "overlapped", **common) for name in NAMES}
    for batch in (1, 8):
        prompts = [[1, 5 + n, 9] for n in range(batch)]
        sampling = slotwise.Sampling(max_new_tokens=tokens, ignore_eos=True)
        times: dict[str, list[float]] = {name: [] for name in NAMES}
        for _ in range(ROUNDS):
            for name, model in models.items():
                start = time.perf_counter()
                model.generate(prompts, sampling)
                times[name].append((time.perf_counter() - start) / tokens * 1e3)
        medians = {name: statistics.median(found) for name, found in times.items()}
        lines.append({"sequences": batch, "threads": threads, "ms a step": medians})
        print(json.dumps(lines[-1] | {"ratio": round(medians["waiting"] / medians["overlapped"], 2)}), flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="examples/models/stories")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--cpu", action="store_true", help="real kernels, a thread for the stream")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--weights", default="native")
    parsed = parser.parse_args()
    if parsed.cpu:
        lines = on_the_cpu(parsed.model, parsed.threads, parsed.tokens, parsed.weights)
    else:
        lines = on_a_clock(parsed.model)
    if parsed.json:
        parsed.json.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
