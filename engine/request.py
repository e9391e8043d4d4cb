"""Requests, and what comes back for them.

Owns `Request`, `Stats`, `Completion` and `Chunk`. What always holds: these are frozen records; a
completion's counts are exact, and its `finish_reason` is one of `stop`, `length`, `cancelled` and `error`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from slotwise.core.errors import SlotwiseError
from slotwise.engine.sampling import Sampling
from slotwise.engine.sampling.logprobs import TokenLogprobs

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks for: the prompt's token ids and how to sample after them."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Stats:
    """What one request cost.

    `granted` is the most new tokens that the capacity left of those `requested`; when it is less, the budget was
    clamped. `verifications` are the target's decode steps, `drafted` and `accepted` the tokens proposed and
    kept; `shared_tokens` came from other sequences' pages; `preemptions` how often it gave its pages up. Seconds are
    wall time from admission. `slots` is the most cache slots that it held, by role.
    """

    prompt_tokens: int
    new_tokens: int
    requested: int
    granted: int
    seed: int
    verifications: int
    drafted: int
    accepted: int
    shared_tokens: int
    preemptions: int
    seconds_to_first_token: float
    seconds: float
    slots: Mapping[str, int]

    @property
    def clamped(self) -> bool:
        """Whether capacity left fewer tokens than were asked for."""
        return self.granted < self.requested

    @property
    def acceptance(self) -> float:
        """Accepted share of drafted tokens; 0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second after the first; 0 with fewer than two."""
        after_first = self.seconds - self.seconds_to_first_token
        return (self.new_tokens - 1) / after_first if self.new_tokens > 1 and after_first > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """The result of one request.

    `token_ids` end with the token that completed a stop, if one did; `text` ends before it, or after it with
    `include_stop`. With `finish_reason` `error`, `error` is what happened and the tokens before it are kept.
    `prompt_logprobs`, where they are asked for, are one a prompt token, None for the first.
    `alternatives` are the others of the `n` completions that were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None
    stats: Stats
    error: SlotwiseError | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    alternatives: tuple[Completion, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a stream: new text (whole characters) and the tokens that made it.

    The last chunk of a stream has the `completion`.
    """

    text: str
    token_ids: tuple[int, ...]
    completion: Completion | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the stream ended, None while it goes on."""
        return None if self.completion is None else self.completion.finish_reason
