"""Host time of a decode step outside kernels, by phase: planning, binding, verifying, feeding, dispatch, settling.

    python benchmarks/overhead.py [--model examples/models/stories] [--draft examples/models/stories-draft] [--json
    FILE]

Kernels are replaced by calls that do nothing, so what is left is what the engine costs. The same step is measured for
batches of 1, 16 and 256 sequences, without drafts and with drafts of a fixed width. Medians over many steps, in
microseconds; `plan+bind+verify` is what the aim of 50 us + 2 us a sequence speaks of.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import slotwise.engine.drafters.model as drafting
import slotwise.engine.model_call as model_call
import slotwise.engine.planner as planner
from slotwise.engine.engine import Engine
from slotwise.engine.request import Request
from slotwise.engine.sampling import Sampling
from slotwise.models.load import load_model
from slotwise.plans.compile import compile_plan
from slotwise.plans.options import PlanOptions

STEPS = 60


class Clock:
    """Collects inclusive seconds by phase and step."""

    def __init__(self) -> None:
        self.now: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.now[phase] += time.perf_counter() - start

        setattr(owner, name, timed)

    def end_step(self) -> None:
        self.steps.append(dict(self.now))
        self.now.clear()


def measure(target: Any, draft: Any, batch: int, speculate: int, sampled: bool) -> dict[str, float]:
    """Median microseconds of each phase of a decode step of `batch` sequences."""
    options = PlanOptions(
        capacity=512, max_sequences=batch, speculate=speculate, adaptive=False, decode_rows=64, prefill_chunk=64
    )
    plan = compile_plan(target.spec, draft=draft.spec if speculate else None, options=options)
    engine = Engine(plan, {"target": target.weights, "draft": draft.weights})
    executor = engine.executor
    executor._launch = lambda launches: None
    for name in {"ok", "rounds.ok"} & executor.arrays.keys():
        executor.arrays[name][:] = True
    if "accepted" in executor.arrays:
        executor.arrays["accepted"][:] = max(0, speculate - 1)
    temperature = 0.8 if sampled else 0.0
    for n in range(batch):
        prompt = tuple(1 + (n * 31 + i) % 2000 for i in range(20))
        engine.add(Request(prompt, Sampling(max_new_tokens=480, temperature=temperature, ignore_eos=True, seed=n)))
    while engine.roster.waiting or engine.roster.filling:
        engine.step()
    for _ in range(3):
        engine.step()
    clock = _instrumented(engine)
    steps = min(STEPS, 440 // (speculate + 1) - 4)
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        clock.now["step"] = time.perf_counter() - start
        clock.end_step()
    phases = {name: statistics.median(step.get(name, 0.0) for step in clock.steps) * 1e6 for name in PHASES}
    return _exclusive(phases)


PHASES = (
    "step", "bind", "verify binding", "decode", "feed", "verify rows", "dispatch", "settle", "check"
)  # fmt: skip


def _instrumented(engine: Engine) -> Clock:
    """Wrap the phases of this engine; the wrappers' own cost (about 0.3 us a call) is part of what is reported."""
    clock = Clock()
    clock.wrap(engine._binder.planner, "plan", "bind")
    clock.wrap(engine._decoder, "run", "decode")
    clock.wrap(engine, "_settle", "settle")
    clock.wrap(engine.ledger, "check", "check")
    clock.wrap(engine.executor, "run", "dispatch")
    clock.wrap(engine.executor, "run_loop", "dispatch")
    for module, name, phase in (
        (drafting, "fill_rounds", "feed"),
        (drafting, "verify_rounds", "verify rows"),
        (planner, "verify_binding", "verify binding"),
        (model_call, "fill_rows", "feed"),
        (model_call, "verify_rows", "verify rows"),
    ):
        original = ORIGINALS.setdefault((module.__name__, name), getattr(module, name))
        setattr(module, name, original)
        clock.wrap(module, name, phase)
    return clock


ORIGINALS: dict[tuple[str, str], Any] = {}


def _exclusive(phases: dict[str, float]) -> dict[str, float]:
    """Phases without those inside them."""
    found = {
        "plan and bind": phases["bind"] - phases["verify binding"],
        "verify binding": phases["verify binding"],
        "feed rows": phases["feed"],
        "verify rows": phases["verify rows"],
        "dispatch": phases["dispatch"],
        "draft, sample, accept": phases["decode"] - phases["feed"] - phases["verify rows"] - phases["dispatch"],
        "settle (text, stops, commit)": phases["settle"],
        "check ledger": phases["check"],
    }
    found["rest"] = phases["step"] - sum(found.values())
    found["step"] = phases["step"]
    found["plan+bind+verify"] = found["plan and bind"] + found["verify binding"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="examples/models/stories")
    parser.add_argument("--draft", default="examples/models/stories-draft")
    parser.add_argument("--json", metavar="FILE")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    target, draft = load_model(parsed.model), load_model(parsed.draft)
    results = []
    for speculate, sampled in ((0, False), (4, False), (4, True)):
        for batch in (1, 16, 256):
            found = measure(target, draft, batch, speculate, sampled)
            results.append({"batch": batch, "speculate": speculate, "sampled": sampled, **found})
    names = list(results[0])[3:]
    heads = [f"B={r['batch']} k={r['speculate']}{' sampled' if r['sampled'] else ''}" for r in results]
    print(f"{'us a step':<30}" + "".join(f"{head:>18}" for head in heads))
    for name in names:
        print(f"{name:<30}" + "".join(f"{r[name]:>18.1f}" for r in results))
    aims = [50 + 2 * r["batch"] for r in results]
    print(f"{'aim for plan+bind+verify':<30}" + "".join(f"{aim:>18.1f}" for aim in aims))
    if parsed.json:
        about = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        Path(parsed.json).write_text(json.dumps({"about": about, "microseconds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
