"""A lockstep run from a model and prompts to a report.

Owns `run_lockstep` and `LockstepReport`. What always holds: the leader's requests run as `generate` runs them, and the
run ends with the step in which the first op out of tolerance stands; a report says what was compared and what was not,
and a follower with which nothing was compared fails it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slotwise.core.errors import OptionError
from slotwise.core.model import WeightSource
from slotwise.engine.engine import Engine
from slotwise.engine.request import Request
from slotwise.engine.sequence import Sequence as Running
from slotwise.inspect.finding import Finding
from slotwise.inspect.lockstep import Drift, Lockstep, Tally
from slotwise.inspect.page import build_page
from slotwise.llm import LLM
from slotwise.models.load import load_model
from slotwise.plans.options import BackendChoice
from slotwise.slots.step import DRAFT, TARGET

SCHEMA = 2
BARS = "▁▂▃▄▅▆▇█"
SHOWN_WEIGHTS = 8
LEAST = 1e-12
"""Errors below this, but not 0, are drawn as this."""


@dataclass(frozen=True)
class LockstepReport:
    """What a run found. `tallies` say by follower what was compared, and what was not and why."""

    leader: str
    followers: tuple[str, ...]
    free_run: bool
    steps: int
    tokens: int
    tallies: Mapping[str, Tally]
    finding: Finding | None

    @property
    def compared(self) -> int:
        """Calls compared, over all followers."""
        return sum(tally.compared for tally in self.tallies.values())

    @property
    def passed(self) -> bool:
        """Whether something was compared with each follower, and no op was out of tolerance and no weight another.

        A free run compares no op with a tolerance.
        """
        if self.finding is not None:
            return False
        return all(tally.compared and not tally.weights.apart for tally in self.tallies.values())

    def to_data(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "slotwise_lockstep": SCHEMA,
            "leader": self.leader,
            "followers": list(self.followers),
            "free_run": self.free_run,
            "steps": self.steps,
            "tokens": self.tokens,
            "passed": self.passed,
            "compared": {name: tally.compared for name, tally in self.tallies.items()},
            "not_compared": {
                name: [{"op": op, "reason": why, "calls": n} for (op, why), n in tally.alone.items()]
                for name, tally in self.tallies.items()
            },
            "weights": {name: asdict(tally.weights) for name, tally in self.tallies.items()},
            "worst": {name: tally.worst for name, tally in self.tallies.items()},
            "drifts": {name: [_finite(asdict(each)) for each in tally.drifts] for name, tally in self.tallies.items()},
            "finding": None if self.finding is None else _finite(asdict(self.finding)),
        }

    def to_html(self) -> str:
        """A page with the growth of errors by depth and by step."""
        return build_page("slotwise lockstep", "drift.html", self.to_data(), scripts=("drift.js",))

    def __str__(self) -> str:
        kind = "free run" if self.free_run else f"{self.compared} calls compared on the same inputs"
        lines = [
            f"{self.leader} leads, {', '.join(self.followers)} follow: {self.steps} steps, {self.tokens} tokens, {kind}"
        ]
        for name, tally in self.tallies.items():
            lines += what_was_compared(name, tally)
            if not self.free_run and tally.worst:
                lines.append(f"  {name}: greatest distance by op, as a share of what two right kernels may differ by")
                lines += [f"    {op:<18} {share:8.2%}" for op, share in tally.worst.items()]
        if self.free_run:
            lines += self._growth()
        if self.finding is not None:
            lines.append(str(self.finding))
        elif self.compared and not self.free_run:
            lines.append("every op that was compared is within tolerance")
        return "\n".join(lines)

    def _growth(self) -> list[str]:
        lines = []
        for name, tally in self.tallies.items():
            drifts = tally.drifts
            last = max((d.step for d in drifts), default=0)
            calls = [d for d in drifts if d.step == last and d.program.startswith(TARGET)]
            lines.append(f"  {name}: relative error of each op's output, step {last}, from the first op to the logits")
            lines.append(f"    {plot([d.error for d in calls])}")
            lines += [f"    {d.call:>4} {d.op:<18} {d.error:9.2e}  1 - cosine {1 - d.cosine:9.2e}" for d in calls[-4:]]
            ends = final_by_step(drifts)
            lines.append(f"  {name}: relative error of the logits, step by step ({len(ends)} steps)")
            lines.append(f"    {plot([d.error for d in ends])}")
            if ends:
                most = max(d.error for d in ends)
                lines.append(f"    first {ends[0].error:.2e}, last {ends[-1].error:.2e}, greatest {most:.2e}")
        return lines


def what_was_compared(name: str, tally: Tally) -> list[str]:
    """Lines on one follower: its weights, how many calls were compared, how many were not, by op and reason."""
    same, apart = tally.weights.same, tally.weights.apart
    lines = [
        f"  {name}: {tally.compared} calls compared; {same} weights have the leader's elements"
        + (f", {len(apart)} have others" if apart else "")
    ]
    lines += [f"    WEIGHT {line}" for line in apart[:SHOWN_WEIGHTS]]
    if len(apart) > SHOWN_WEIGHTS:
        lines.append(f"    and {len(apart) - SHOWN_WEIGHTS} weights more")
    if tally.alone:
        lines.append(f"  {name}: {tally.alone.total()} calls could not be compared")
        lines += [f"    {count} of {op}: {reason}" for (op, reason), count in tally.alone.items()]
    if not tally.compared:
        lines.append(f"NOTHING was compared with {name}")
    return lines


def final_by_step(drifts: Sequence[Drift]) -> list[Drift]:
    """The logits' drift of each step: the last op of the target's last call."""
    found = {drift.step: drift for drift in drifts if drift.program.startswith(TARGET)}
    return list(found.values())


def plot(values: Sequence[float], width: int = 100) -> str:
    """A line of bars, logarithmic between the least and the greatest, `·` for 0; of many values, their peaks."""
    if not values:
        return "(nothing ran)"
    size = max(1, -(-len(values) // width))
    peaks = [max(values[i : i + size]) for i in range(0, len(values), size)]
    logs = [math.log10(max(LEAST, value)) if value and math.isfinite(value) else None for value in peaks]
    known = [value for value in logs if value is not None]
    if not known:
        return f"{'·' * len(peaks)}  no difference"
    low, high = min(known), max(known)
    span = (high - low) or 1.0

    def bar(value: float | None) -> str:
        return "·" if value is None else BARS[min(len(BARS) - 1, int((value - low) / span * len(BARS)))]

    return f"{''.join(map(bar, logs))}  1e{low:.1f} to 1e{high:.1f}"


def weights_of(llm: LLM) -> dict[str, WeightSource]:
    """The weight sources of a loaded model's checkpoints, by role."""
    plan, folders = llm.plan(), llm.folders
    model = folders["model"]
    if model is None:
        raise OptionError("the model's folder is not known")
    found: dict[str, WeightSource] = {TARGET: load_model(model, plan.target.dtype).weights}
    if plan.has_draft_model and folders["draft"] is not None:
        found[DRAFT] = load_model(folders["draft"], plan.role(DRAFT).dtype).weights
    return found


def run_lockstep(
    llm: LLM,
    followers: Mapping[str, BackendChoice],
    requests: Sequence[Request],
    *,
    free_run: bool = False,
    until_step: int | None = None,
) -> LockstepReport:
    """Run `requests` on `llm`, which nobody else uses, with each follower beside it.

    Raises BackendError when a follower cannot run here, PlanError when it cannot run freely where that was asked.
    """
    plans = {name: llm.plan(backend=choice) for name, choice in followers.items()}
    engine = llm.engine
    lockstep = Lockstep(engine, plans, weights_of(llm), free_run=free_run)
    first = engine.epoch
    try:
        sequences = [engine.add(each) for each in requests]
        run_until(engine, sequences, lambda: lockstep.finding is not None or engine.epoch - first == until_step)
    finally:
        lockstep.detach()
    tokens = sum(sequence.new_tokens for sequence in sequences)
    for sequence in sequences:
        engine.cancel(sequence)
    return LockstepReport(
        leader=", ".join(llm.plan().backends),
        followers=tuple(followers),
        free_run=free_run,
        steps=engine.epoch - first,
        tokens=tokens,
        tallies=lockstep.tallies,
        finding=lockstep.finding,
    )


def run_until(engine: Engine, sequences: Sequence[Running], done: Callable[[], bool]) -> None:
    """Step until all sequences have ended or `done()`."""
    while not engine.is_idle and any(sequence.state != "done" for sequence in sequences):
        engine.step()
        if done():
            return


def _finite(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
