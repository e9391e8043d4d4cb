"""Where two runs of one request part, and whether that was a near-tie.

Owns `Parting`, `scores_at` and `judge_parting`. What always holds: with `coupled` acceptance a token is a function of
(logits, seed, position), so both tokens' scores, noise included, can be had again from the common tokens alone; the
gap between them is what a difference of logits must bridge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slotwise.core.ops.noise import TARGET_STREAM, uniform_noise
from slotwise.core.ops.sampling import filter_logits
from slotwise.core.specs import DType
from slotwise.engine.engine import Engine
from slotwise.engine.request import Request
from slotwise.engine.score import score

NEAR = {DType.F64: 2.0**-45, DType.F32: 2.0**-16, DType.F16: 2.0**-10, DType.BF16: 2.0**-7}
"""Scores this close, relative to the greatest of the row, are a near-tie: about two units in the last place of a
half-precision logit, and for wider dtypes what a few hundred roundings in a row of layers come to."""


@dataclass(frozen=True, slots=True)
class Parting:
    """Sequence `sequence` has other tokens from new token `index` on, at `position` of the whole sequence.

    `one` and `other` are the tokens there (None where a run had ended). `gap` is how far the run that was asked has its
    own token ahead of the other's, in scores after temperature and noise; `scale` the greatest score's size; `margin`
    the gap that rounding in the model's dtype explains.
    """

    sequence: int
    index: int
    position: int
    one: int | None
    other: int | None
    gap: float | None
    scale: float | None
    margin: float = 0.0

    @property
    def is_near_tie(self) -> bool:
        """Whether the gap is within what rounding explains."""
        return self.gap is not None and self.gap <= self.margin

    def __str__(self) -> str:
        one, other = ("the end" if token is None else str(token) for token in (self.one, self.other))
        head = f"sequence {self.sequence}: tokens part at new token {self.index} (position {self.position}): "
        if self.gap is None or self.scale is None:
            return f"{head}{one} -> {other}"
        word = "a near-tie" if self.is_near_tie else "no near-tie"
        return (
            f"{head}{one} -> {other}; {word}: the second is {self.gap:.3g} ahead, of scores up to {self.scale:.3g} "
            f"({self.margin:.2g} or less is a near-tie)"
        )


def scores_at(engine: Engine, request: Request, seed: int, tokens: Sequence[int]) -> torch.Tensor:
    """What is compared to draw the token after prompt + `tokens`: float64 [V], edits, temperature and noise included.

    The engine must have a lane to spare. The greatest entry is the token that `coupled` draws.
    """
    known = [*request.prompt_ids, *tokens]
    logits = score(engine, known)[-1:].clone()
    sampling = request.sampling
    adjuster = engine.adjuster_for(request)
    if adjuster is not None:
        adjuster.edits(list(tokens)).apply(logits[0].numpy())
    if sampling.temperature == 0:
        return logits[0].double()
    controls = (
        torch.tensor([sampling.temperature]),
        torch.tensor([sampling.top_k], dtype=torch.int32),
        torch.tensor([sampling.top_p]),
        torch.tensor([sampling.min_p]),
    )
    scores = filter_logits(logits, *controls)
    signed = seed - 2**64 if seed >= 2**63 else seed
    noise = uniform_noise(
        torch.tensor([signed]), torch.tensor([len(known)], dtype=torch.int32), scores.shape[1], TARGET_STREAM
    )
    return (scores.double() - torch.log(-torch.log(noise.double())))[0]


def judge_parting(
    engine: Engine, request: Request, seed: int, number: int, one: Sequence[int], other: Sequence[int], at: int
) -> Parting:
    """The parting of two token lists at new token `at`, with the gap that `engine`, whose tokens are `other`, sees."""
    first = one[at] if at < len(one) else None
    second = other[at] if at < len(other) else None
    position = len(request.prompt_ids) + at
    if first is None or second is None or engine.plan.options.acceptance != "coupled":
        return Parting(number, at, position, first, second, None, None)
    scores = scores_at(engine, request, seed, other[:at])
    gap = float(scores[second] - scores[first])
    scale = greatest(scores)
    return Parting(number, at, position, first, second, gap, scale, margin_of(engine, scale))


def greatest(scores: torch.Tensor) -> float:
    """The size of the greatest finite score."""
    return float(scores[scores.isfinite()].abs().max())


def margin_of(engine: Engine, scale: float) -> float:
    """The gap that counts as a near-tie among scores of this size, in the dtype that the target computes in."""
    return NEAR[engine.plan.target.dtype] * max(1.0, scale)
