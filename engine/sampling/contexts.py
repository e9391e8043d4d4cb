"""Steps that look at the order or the number of a sequence's tokens: n-grams, words, lengths, forced tokens.

Owns `Context`, `ContextStep` and its kinds. What always holds: what a step says is a function of a row's context alone,
which is the prompt, the committed output and the drafts before that row; it keeps nothing, so there is nothing to roll
back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from slotwise.engine.sampling.edits import BAN, Edit, Ints
from slotwise.engine.sampling.penalties import biased
from slotwise.engine.sampling.request import Sampling

TokenEdit = tuple[int, Edit]


@dataclass(frozen=True, eq=False)
class Context:
    """All tokens before a row's, and how many of them are the prompt's."""

    tokens: Ints
    prompt_length: int

    @property
    def new_tokens(self) -> int:
        """Tokens of the output."""
        return self.tokens.size - self.prompt_length


class ContextStep(Protocol):
    """A step of the kind above."""

    def edits(self, context: Context) -> Iterable[TokenEdit]:
        """The edits of the row that follows `context`; a token may come more than once."""
        ...


class SequenceEdits:
    """Edits a token where it would complete one of some sequences of two tokens or more, the prompt's included.

    Biased sequences as transformers' `sequence_bias`, banned ones as its `bad_words_ids`.
    """

    def __init__(self, edits: Iterable[tuple[tuple[int, ...], Edit]]) -> None:
        # By the token before the last: of many words few can be about to be completed.
        self._by_link: dict[int, list[tuple[tuple[int, ...], Edit]]] = {}
        for ids, edit in edits:
            self._by_link.setdefault(ids[-2], []).append((ids, edit))

    def edits(self, context: Context) -> Iterable[TokenEdit]:
        """Those whose beginning the context ends with."""
        if not context.tokens.size:
            return
        for ids, edit in self._by_link.get(int(context.tokens[-1]), ()):
            known = len(ids) - 1
            if context.tokens[-known:].tolist() == list(ids[:-1]):
                yield ids[-1], edit


@dataclass(frozen=True)
class NoRepeatedNgrams:
    """Bans what would repeat a run of `size` tokens, of prompt and output, as transformers' `no_repeat_ngram_size`."""

    size: int

    def edits(self, context: Context) -> Iterable[TokenEdit]:
        """Bans of what followed earlier occurrences of the last `size - 1` tokens."""
        if context.tokens.size < self.size:
            return
        runs = np.lib.stride_tricks.sliding_window_view(context.tokens, self.size)
        known = self.size - 1
        last = context.tokens[context.tokens.size - known :]
        for token in np.unique(runs[(runs[:, :known] == last).all(axis=1), known]).tolist():
            yield token, BAN


@dataclass(frozen=True)
class NoEarlyEnd:
    """Bans what ends a sequence until there are `new_tokens` of output and `length` tokens in all."""

    ends: frozenset[int]
    new_tokens: int
    length: int

    def edits(self, context: Context) -> Iterable[TokenEdit]:
        """Bans of all ends, while it is too early."""
        if context.new_tokens < self.new_tokens or context.tokens.size < self.length:
            for token in self.ends:
                yield token, BAN


@dataclass(frozen=True)
class EndsGrow:
    """Makes ends likelier by `factor ** n`, n tokens after the first `start`: `exponential_decay_length_penalty`."""

    ends: frozenset[int]
    start: int
    factor: float

    def edits(self, context: Context) -> Iterable[TokenEdit]:
        """The share of its size by which each end's logit grows."""
        over = context.new_tokens - self.start
        if over > 0:
            # A logit is float32: beyond its range nothing grows.
            grow = float(np.exp(min(over * np.log(self.factor), 88.0))) - 1
            for token in self.ends:
                yield token, Edit(grow=grow)


@dataclass(frozen=True)
class NotAt:
    """Bans tokens as the output's token number `place`."""

    tokens: tuple[int, ...]
    place: int

    def edits(self, context: Context) -> Iterable[TokenEdit]:
        """Bans, at that place."""
        if context.new_tokens == self.place:
            for token in self.tokens:
                yield token, BAN


@dataclass(frozen=True)
class ForcedTokens:
    """Which tokens must come: `second` behind a single one, one of `last` as the last that the budget leaves."""

    second: int | None
    last: tuple[int, ...]
    budget: int | None

    def of(self, context: Context) -> tuple[int, ...]:
        """The ids to choose from, none where none are forced."""
        if self.last and self.budget is not None and context.new_tokens == self.budget - 1:
            return self.last
        return (self.second,) if self.second is not None and context.tokens.size == 1 else ()


def context_steps(sampling: Sampling, ends: frozenset[int]) -> tuple[ContextStep, ...]:
    """The steps of this kind that `sampling` switches on; `ends` are the ids that end a sequence."""
    steps: list[ContextStep] = []
    longer = [(tuple(ids), biased(bias)) for ids, bias in sampling.sequence_bias]
    longer += [(ids, BAN) for ids in sampling.bad_word_ids if len(ids) > 1]
    if longer:
        steps.append(SequenceEdits(longer))
    if sampling.no_repeat_ngram_size:
        steps.append(NoRepeatedNgrams(sampling.no_repeat_ngram_size))
    if ends and (sampling.min_new_tokens or sampling.min_length):
        steps.append(NoEarlyEnd(ends, sampling.min_new_tokens, sampling.min_length))
    if ends and sampling.exponential_decay_length_penalty is not None:
        steps.append(EndsGrow(ends, *sampling.exponential_decay_length_penalty))
    if sampling.begin_suppress_tokens:
        steps.append(NotAt(tuple(sampling.begin_suppress_tokens), 0))
    return tuple(steps)


def together(edits: Iterable[TokenEdit]) -> Mapping[int, list[Edit]]:
    """Edits by their token."""
    found: dict[int, list[Edit]] = {}
    for token, edit in edits:
        found.setdefault(token, []).append(edit)
    return found
