"""Samplers that look at a sequence's history, or at nothing but the token id: penalties, bias, bans.

Owns the steps and their merging into sparse edits, at most one a token. What always holds: an edit is a function of
(token in the prompt?, times in the output) alone, so the edits of a drafted row are those of the sequence in which the
draft had been committed; asking for them changes nothing, so there is nothing to roll back.
Every divisor applies before every addend: merging steps is then exact.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from slotwise.engine.sampling import Sampling


class Edit(NamedTuple):
    """One change of one logit: `z = z / divide if z > 0 else z * divide`, then `z += add`."""

    divide: float = 1.0
    add: float = 0.0


class Step(Protocol):
    """A sampler of the kind above. An edit may divide or add; it may come and grow with history, never go away."""

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
    """Adds a number of the user's to the logits of chosen tokens."""

    bias: Mapping[int, float]

    def fixed_tokens(self) -> Iterable[int]:
        """Return the biased tokens."""
        return self.bias

    def edit(self, token: int, in_prompt: bool, output_count: int) -> Edit | None:
        """Add the token's bias."""
        return Edit(add=self.bias[token]) if token in self.bias else None


@dataclass(frozen=True)
class Ban:
    """Makes tokens impossible, whatever other steps say of them."""

    tokens: frozenset[int]

    def fixed_tokens(self) -> Iterable[int]:
        """Return the banned tokens."""
        return self.tokens

    def edit(self, token: int, in_prompt: bool, output_count: int) -> Edit | None:
        """Add minus infinity."""
        return Edit(add=-math.inf) if token in self.tokens else None


def steps_of(sampling: Sampling) -> tuple[Step, ...]:
    """Return the steps that `sampling` switches on, in the order in which they apply."""
    steps: list[Step] = []
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenalty(sampling.repetition_penalty))
    if sampling.frequency_penalty != 0:
        steps.append(FrequencyPenalty(sampling.frequency_penalty))
    if sampling.presence_penalty != 0:
        steps.append(PresencePenalty(sampling.presence_penalty))
    if sampling.logit_bias:
        steps.append(Bias(sampling.logit_bias))
    if sampling.banned_tokens:
        steps.append(Ban(frozenset(sampling.banned_tokens)))
    return tuple(steps)


@dataclass(frozen=True, eq=False)
class Edits:
    """Merged edits of one row of logits, one a token, by rising token id; the arrays are read-only."""

    tokens: npt.NDArray[np.int64]  # [E]
    divide: npt.NDArray[np.float32]  # [E]
    add: npt.NDArray[np.float32]  # [E]

    def __post_init__(self) -> None:
        for array in (self.tokens, self.divide, self.add):
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.tokens)

    def overlaid(self, other: Edits) -> Edits:
        """Return these edits with those of `other` put in place or inserted."""
        if not len(other):
            return self
        at = np.searchsorted(self.tokens, other.tokens)
        known = np.zeros(len(other), dtype=np.bool_)
        inside = at < len(self)
        known[inside] = self.tokens[at[inside]] == other.tokens[inside]
        divide, add = self.divide.copy(), self.add.copy()
        divide[at[known]], add[at[known]] = other.divide[known], other.add[known]
        new = ~known
        return Edits(
            np.insert(self.tokens, at[new], other.tokens[new]),
            np.insert(divide, at[new], other.divide[new]),
            np.insert(add, at[new], other.add[new]),
        )


class LogitAdjuster:
    """The history of one sequence, as the steps see it; committed tokens are all that it keeps.

    `commit` costs time in the number of distinct tokens it is given plus a copy of the edits; so does `edits`.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int]) -> None:
        self._steps = steps_of(sampling)
        self._in_prompt = frozenset(prompt_ids)
        self._output_counts: Counter[int] = Counter()
        fixed = {token for step in self._steps for token in step.fixed_tokens()}
        self._committed = self._edits_of(fixed | self._in_prompt, self._output_counts)

    def commit(self, token_ids: Sequence[int]) -> None:
        """Add generated tokens to the history, in any number."""
        self._committed = self.edits(token_ids)
        self._output_counts.update(token_ids)

    def edits(self, draft_prefix: Sequence[int] = ()) -> Edits:
        """Return the edits of the row whose history is the committed tokens and then `draft_prefix`."""
        if not draft_prefix or not self._steps:
            return self._committed
        drafted = Counter(draft_prefix)
        counts = {token: self._output_counts[token] + count for token, count in drafted.items()}
        return self._committed.overlaid(self._edits_of(counts, counts))

    def _edits_of(self, tokens: Iterable[int], output_counts: Mapping[int, int]) -> Edits:
        ids: list[int] = []
        divide: list[float] = []
        add: list[float] = []
        for token in sorted(tokens):
            in_prompt, count = token in self._in_prompt, output_counts.get(token, 0)
            found = [edit for step in self._steps if (edit := step.edit(token, in_prompt, count)) is not None]
            # A token that some step touches stays listed even where its edits cancel: the list then only grows.
            if found:
                ids.append(token)
                divide.append(math.prod(edit.divide for edit in found))
                add.append(sum(edit.add for edit in found))
        return Edits(np.array(ids, np.int64), np.array(divide, np.float32), np.array(add, np.float32))
