"""One request while it runs.

Owns `Sequence`: its tokens, its text, its stops, its counts. What always holds: only committed tokens reach it, in
order; its text, its stops, its penalties and its counts advance together and never go back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from typing import Literal

from slotwise.core.errors import SlotwiseError
from slotwise.engine.detokenize import Detokenizer
from slotwise.engine.request import Chunk, Completion, FinishReason, Request, Stats
from slotwise.engine.sampling.adjust import LogitAdjuster
from slotwise.engine.sampling.logprobs import BytesOf, TokenLogprobs
from slotwise.engine.stops import StopChecker

State = Literal["waiting", "prefill", "decode", "done"]


class Sequence:
    """The mutable side of a request; owned by the engine. `id` also is its place in the order of arrival."""

    def __init__(
        self,
        id: int,
        request: Request,
        *,
        seed: int,
        requested: int,
        granted: int,
        stops: StopChecker | None,
        text: Detokenizer | None,
        adjuster: LogitAdjuster | None,
        bytes_of: BytesOf | None,
    ) -> None:
        self.id = id
        self.request = request
        self.seed = seed
        self.requested = requested
        self.granted = granted
        self.state: State = "waiting"
        self.lane: int | None = None
        self.tokens: list[int] = list(request.prompt_ids)
        self.adjuster = adjuster
        self.bytes_of = bytes_of
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.verifications = self.drafted = self.accepted = 0
        self.shared_tokens = self.preemptions = 0
        self.is_doubted = False  # a step that was started ahead has failed with it
        self.peak_slots: dict[str, int] = {}
        self.finish_reason: FinishReason | None = None
        self.error: SlotwiseError | None = None
        self._stops = stops
        self._detokenizer = text
        self._text: list[str] = []
        self._fresh_text: list[str] = []
        self._fresh_tokens: list[int] = []
        self._started = time.perf_counter()
        self._first_token: float | None = None
        self._ended: float | None = None

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    def keep(self, candidates: SequenceOf[int]) -> int:
        """Take accepted tokens up to and including the first that ends the sequence; returns how many were taken."""
        kept = 0
        for token in candidates:
            kept += 1
            self.tokens.append(token)
            self._fresh_tokens.append(token)
            piece = "" if self._detokenizer is None else self._detokenizer.push(token)
            if self._stops is not None:
                verdict = self._stops.push(token, piece)
                self._show(verdict.text)
                if verdict.reason is not None:
                    self.finish_reason = verdict.reason
                    break
        if self._first_token is None and kept:
            self._first_token = time.perf_counter()
        if self.adjuster is not None:
            self.adjuster.commit(candidates[:kept])
        return kept

    def end(self, reason: FinishReason, error: SlotwiseError | None = None) -> None:
        """Finish for a reason from outside or inside; what was held back of the text is released."""
        if self._stops is not None and self.finish_reason is None:
            self._show(self._stops.release())
        self.finish_reason, self.error = reason, error
        self.state = "done"
        self._ended = time.perf_counter()

    def take_chunk(self) -> Chunk | None:
        """What is new since the last call, with the completion when the sequence has ended; None when nothing is."""
        done = self.state == "done"
        if not (self._fresh_tokens or self._fresh_text or done):
            return None
        chunk = Chunk("".join(self._fresh_text), tuple(self._fresh_tokens), self.completion() if done else None)
        self._fresh_text, self._fresh_tokens = [], []
        return chunk

    def completion(self) -> Completion:
        """The result so far (final once the state is `done`)."""
        now = time.perf_counter() if self._ended is None else self._ended
        first = now if self._first_token is None else self._first_token
        stats = Stats(
            prompt_tokens=self.prompt_length,
            new_tokens=self.new_tokens,
            requested=self.requested,
            granted=self.granted,
            seed=self.seed,
            verifications=self.verifications,
            drafted=self.drafted,
            accepted=self.accepted,
            shared_tokens=self.shared_tokens,
            preemptions=self.preemptions,
            seconds_to_first_token=first - self._started,
            seconds=now - self._started,
            slots=dict(self.peak_slots),
        )
        sampling = self.request.sampling
        logprobs = None if sampling.logprobs is None else tuple(self.logprobs)
        of_prompt = None if sampling.prompt_logprobs is None else (None, *self.prompt_logprobs)
        reason = self.finish_reason or "cancelled"
        tokens = tuple(self.tokens[self.prompt_length :])
        return Completion("".join(self._text), tokens, reason, logprobs, stats, self.error, of_prompt)

    def _show(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._fresh_text.append(text)
