"""Steps that look at a token and its count: penalties, biases, bans.

Owns `TokenStep` and its kinds. What always holds: an edit is a function of (token, in the prompt?, times in the output)
alone, so edits are kept from row to row and made anew only for tokens that came since.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from slotwise.engine.sampling.edits import BAN, Edit
from slotwise.engine.sampling.request import Sampling


class TokenStep(Protocol):
    """A step of the kind above. It may come and grow with history, never go away."""

    def fixed_tokens(self) -> Iterable[int]:
        """Return the token ids that are edited whatever the history."""
        ...

    def edit(self, token: int, in_prompt: bool, output_count: int) -> Edit | None:
        """Return the edit of `token`, None where this step does not touch it."""
        ...


@dataclass(frozen=True)
class RepetitionPenalty:
    """Makes tokens of prompt and output less likely (Keskar et al. 2019, CTRL), as transformers does."""

    penalty: float

    def fixed_tokens(self) -> Iterable[int]:
        """No token is edited before it is seen."""
        return ()

    def edit(self, token: int, in_prompt: bool, output_count: int) -> Edit | None:
        """Divide a positive logit, multiply a negative one."""
        return Edit(divide=self.penalty) if in_prompt or output_count else None


@dataclass(frozen=True)
class FrequencyPenalty:
    """Subtracts `penalty` per occurrence in the output, the prompt left out (OpenAI's definition)."""

    penalty: float

    def fixed_tokens(self) -> Iterable[int]:
        """No token is edited before it is generated."""
        return ()

    def edit(self, token: int, in_prompt: bool, output_count: int) -> Edit | None:
        """Subtract the penalty times the count."""
        return Edit(add=-self.penalty * output_count) if output_count else None


@dataclass(frozen=True)
class PresencePenalty:
    """Subtracts `penalty` once from a token that is in the output, the prompt left out (OpenAI's definition)."""

    penalty: float

    def fixed_tokens(self) -> Iterable[int]:
        """No token is edited before it is generated."""
        return ()

    def edit(self, token: int, in_prompt: bool, output_count: int) -> Edit | None:
        """Subtract the penalty."""
        return Edit(add=-self.penalty) if output_count else None


@dataclass(frozen=True)
class Bias:
    """Adds a number of the user's to the logits of chosen tokens; minus infinity bans."""

    bias: Mapping[int, float]

    def fixed_tokens(self) -> Iterable[int]:
        """Return the biased tokens."""
        return self.bias

    def edit(self, token: int, in_prompt: bool, output_count: int) -> Edit | None:
        """Add the token's bias."""
        return biased(self.bias[token]) if token in self.bias else None


@dataclass(frozen=True)
class Ban:
    """Makes tokens impossible, whatever other steps say of them."""

    tokens: frozenset[int]

    def fixed_tokens(self) -> Iterable[int]:
        """Return the banned tokens."""
        return self.tokens

    def edit(self, token: int, in_prompt: bool, output_count: int) -> Edit | None:
        """Ban it."""
        return BAN if token in self.tokens else None


def biased(bias: float) -> Edit:
    """The edit of a bias, where minus infinity bans."""
    return BAN if bias == float("-inf") else Edit(bias=bias)


def token_steps(sampling: Sampling) -> tuple[TokenStep, ...]:
    """The steps of this kind that `sampling` switches on."""
    steps: list[TokenStep] = []
    if sampling.logit_bias:
        steps.append(Bias(sampling.logit_bias))
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenalty(sampling.repetition_penalty))
    if sampling.frequency_penalty != 0:
        steps.append(FrequencyPenalty(sampling.frequency_penalty))
    if sampling.presence_penalty != 0:
        steps.append(PresencePenalty(sampling.presence_penalty))
    if sampling.banned_tokens:
        steps.append(Ban(frozenset(sampling.banned_tokens)))
    return tuple(steps)
