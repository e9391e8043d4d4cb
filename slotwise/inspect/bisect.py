"""Bisect: where two generations that should be the same first part, by step and by op, and why.

Owns `bisect` and its verdict. What always holds: both runs get the same requests and seeds on engines that have run
nothing before; the verdict `fault` names a kernel that is out of its op's tolerance on inputs that both had; `near-tie`
and `drift` are said only where ops were compared and none is, and every verdict says what was compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from slotwise.engine.request import Request
from slotwise.inspect.finding import Finding
from slotwise.inspect.lockstep_run import run_lockstep, what_was_compared
from slotwise.inspect.near_tie import Parting, greatest, margin_of, scores_at
from slotwise.inspect.replay import parts_at
from slotwise.llm import LLM
from slotwise.recording.file import Json
from slotwise.recording.recorder import Recorder

Verdict = Literal["same", "fault", "weights", "near-tie", "drift", "not compared"]
Load = Callable[[], LLM]
"""Loads a model anew: each run needs an engine with nothing behind it."""


@dataclass(frozen=True, slots=True)
class Gap:
    """What both runs make of the two tokens: how far each has its own ahead, and the logits' greatest difference."""

    left: float
    right: float
    apart: float


@dataclass(frozen=True)
class Bisection:
    """The outcome. `step` is the left run's step that gave the first token that differs; `finding` the first op out of
    tolerance up to there; `notes` say which ops were compared, under which options, and which could not be.
    """

    left: str
    right: str
    tokens: int
    verdict: Verdict
    parting: Parting | None = None
    step: int | None = None
    gap: Gap | None = None
    finding: Finding | None = None
    compared: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"{self.left} against {self.right}"
        if self.parting is None:
            lines = [f"{head}: the same {self.tokens} tokens" if self.tokens else f"{head}: neither made a token"]
        else:
            lines = [f"{head}: {str(self.parting).partition(';')[0]}, in step {self.step}"]
        if self.gap is not None:
            lines.append(
                f"  there {self.left} has its token {self.gap.left:.3g} ahead, {self.right} its own "
                f"{self.gap.right:.3g}; the two tokens' logits differ by up to {self.gap.apart:.3g}"
            )
        lines += self.notes
        if self.finding is not None:
            lines.append(str(self.finding))
        lines.append(f"verdict: {self._verdict()}")
        return "\n".join(lines)

    def _verdict(self) -> str:
        text = VERDICTS[self.verdict]
        if self.parting is None:
            return text
        near = self.parting.is_near_tie
        if self.verdict == "not compared" and near:
            text = "not compared: the two tokens were all but equally likely, but no op was compared"
        return text.format(compared=self.compared)


VERDICTS = {
    "same": "no difference in the tokens; where they are the same no op is compared",
    "fault": "a fault: a kernel is out of its op's tolerance",
    "weights": "a fault: weights that should be the same differ",
    "near-tie": "a near-tie: each of the {compared} calls compared is within tolerance, and the two tokens were all "
    "but equally likely",
    "drift": "drift: each of the {compared} calls compared is within tolerance on the same inputs, yet errors add up "
    "to more than a near-tie; `slotwise lockstep --free-run` shows where they grow",
    "not compared": "not compared: the tokens differ, but there was no op to compare",
}


def bisect(load_left: Load, load_right: Load, requests: Sequence[Request]) -> Bisection:
    """Run `requests` on both, and look for the first op at which they part.

    Each request must have a seed unless it is greedy. With tokens that are all the same the ops are not compared.
    """
    left, right = load_left(), load_right()
    names = _name(left, right)
    one, steps = _generate(left, requests)
    other, _ = _generate(right, requests)
    found = [(number, at) for number in range(len(requests)) if (at := _parts(one[number], other[number])) is not None]
    total = sum(map(len, one))
    if not found:
        return Bisection(*names, total, "same" if total else "not compared")
    made = {(number, at): _step_of(steps, number, at) for number, at in found}
    number, at = min(found, key=lambda pair: (made[pair], pair[1]))
    step = made[number, at]
    parting, gap = _gap(left, right, requests[number], number, one[number], other[number], at)
    backends = {op: list(chosen) for op, chosen in right.plan().options.backend}
    report = run_lockstep(load_left(), {names[1]: backends}, requests, until_step=step)
    tally = report.tallies[names[1]]
    notes = (*_other_options(left, right), *what_was_compared(names[1], tally))
    verdict: Verdict
    if tally.weights.apart:
        verdict = "weights"
    elif report.finding is not None:
        verdict = "fault"
    elif not tally.compared:
        verdict = "not compared"
    else:
        verdict = "near-tie" if parting.is_near_tie else "drift"
    return Bisection(*names, total, verdict, parting, step, gap, report.finding, tally.compared, notes)


def _other_options(left: LLM, right: LLM) -> tuple[str, ...]:
    """A note on what the two runs differ in beside their backends: ops are compared under the left run's options."""
    one, other = vars(left.plan().options), vars(right.plan().options)
    names = [name for name in one if name != "backend" and one[name] != other[name]]
    differ = [f"{name} {_shown(one[name])} and not {_shown(other[name])}" for name in names]
    if left.plan().draft != right.plan().draft:
        differ.append(f"drafter {left.plan().draft} and not {right.plan().draft}")
    if not differ:
        return ()
    return (f"  ops are compared under the left run's options ({', '.join(differ)}), on both runs' backends",)


def _shown(value: object) -> object:
    return getattr(value, "value", value)


def _generate(llm: LLM, requests: Sequence[Request]) -> tuple[list[list[int]], list[Json]]:
    """Tokens of each request, and the steps that gave them."""
    lines: list[Json] = []
    engine = llm.engine
    recorder = Recorder(engine, lines.append)
    engine.observers.append(recorder)
    try:
        sequences = [engine.add(request) for request in requests]
        while not engine.is_idle:
            engine.step()
    finally:
        engine.observers.remove(recorder)
    for sequence in sequences:
        if sequence.error is not None:
            raise sequence.error
    return [s.tokens[s.prompt_length :] for s in sequences], [line for line in lines if "step" in line]


def _parts(one: list[int], other: list[int]) -> int | None:
    return parts_at(one, other, recorded_ended=True, ended=True)


def _step_of(steps: Sequence[Json], number: int, at: int) -> int:
    """The step that gave new token `at` of sequence `number`; the last one where the run had ended before it."""
    count = 0
    for step in steps:
        for sequence, tokens in step["tokens"]:
            if sequence == number:
                count += len(tokens)
                if count > at:
                    return int(step["step"])
    return int(steps[-1]["step"]) if steps else 0


def _gap(
    left: LLM, right: LLM, request: Request, number: int, one: list[int], other: list[int], at: int
) -> tuple[Parting, Gap | None]:
    """What each run makes of the two tokens at `at`; no gap where one had ended, or without seeds."""
    first = one[at] if at < len(one) else None
    second = other[at] if at < len(other) else None
    position = len(request.prompt_ids) + at
    seed = request.sampling.seed or 0
    coupled = all(llm.plan().options.acceptance == "coupled" for llm in (left, right))
    if first is None or second is None or not coupled:
        return Parting(number, at, position, first, second, None, None), None
    mine, its = (scores_at(llm.engine, request, seed, one[:at]) for llm in (left, right))
    gap = Gap(
        float(mine[first] - mine[second]),
        float(its[second] - its[first]),
        max(abs(float(mine[token] - its[token])) for token in (first, second)),
    )
    scale = greatest(mine)
    margin = margin_of(left.engine, scale)
    return Parting(number, at, position, first, second, max(gap.left, gap.right), scale, margin), gap


def _name(left: LLM, right: LLM) -> tuple[str, str]:
    """What to call the two: their backends, with more where that is the same."""
    one, other = (", ".join(llm.plan().backends) for llm in (left, right))
    if one != other:
        return one, other
    return f"{one} (left)", f"{other} (right)"
