"""The kinds of work that engines are compared in.

Owns `Work` and `WORKS`. What always holds: how much an engine does in a turn is fixed by its own speed in a trial, so
that no turn takes much longer than its share of time; what is reported is a rate, whatever the amount was.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

PROMPT, LONG_PROMPT, TRIAL_PROMPT, BATCH, BATCH_PROMPT, ROWS = 128, 512, 48, 8, 16, 6
Ask = Callable[..., Any]
"""Calls a method of an engine: (name, *arguments)."""

PREFILL, DECODE = f"prefill {PROMPT}", "decode"
PREFILL_LONG, DECODE_BATCH, VERIFY = f"prefill {LONG_PROMPT}", f"batch {BATCH}", f"{ROWS} rows"

UNITS = {
    PREFILL: "tokens/s",
    DECODE: "tokens/s",
    PREFILL_LONG: "tokens/s",
    DECODE_BATCH: "tokens/s",
    VERIFY: "times the cost of one row",
}


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast an engine was in its trial: tokens a second of a prompt, and steps a second of decoding."""

    prefill: float
    decode: float

    @classmethod
    def of(cls, ask: Ask, vocab: int) -> Pace:
        """Try the engine out, and warm it up by that."""
        ask("decode", _tokens(vocab, BATCH_PROMPT, 0), 2)
        prefill, decode = ask("decode", _tokens(vocab, TRIAL_PROMPT, 1), 4)
        return cls(TRIAL_PROMPT / prefill, 4 / decode)

    def steps(self, work: str, seconds: float) -> int:
        """Decode steps of `work` that fit `seconds`, one of a batch taken for two: 4 to 128."""
        return max(4, min(128, int(seconds * self.decode / (2 if work == DECODE_BATCH else 1))))

    def cached_tokens(self, work: str, seconds: float) -> float:
        """Tokens in the caches of all sequences, on average over such a turn."""
        sequences, prompt = (BATCH, BATCH_PROMPT) if work == DECODE_BATCH else (1, PROMPT)
        return sequences * (prompt + self.steps(work, seconds) / 2)


@dataclass(frozen=True)
class Work:
    """One kind of work: `run` gives rates by name, `fixed_seconds` what a turn takes beyond its share of time.

    Only work that `may_be_left_out` is, for engines that would take too long.
    """

    names: tuple[str, ...]
    run: Callable[[Ask, int, int, Pace, float], dict[str, float]]
    fixed_seconds: Callable[[Pace], float]
    may_be_left_out: bool = True


def _decode(ask: Ask, vocab: int, turn: int, pace: Pace, share: float) -> dict[str, float]:
    new = pace.steps(DECODE, share)
    prefill, decode = ask("decode", _tokens(vocab, PROMPT, turn), new)
    return {PREFILL: PROMPT / prefill, DECODE: new / decode}


def _prefill(ask: Ask, vocab: int, turn: int, pace: Pace, share: float) -> dict[str, float]:
    seconds, _ = ask("decode", _tokens(vocab, LONG_PROMPT, turn), 1)
    return {PREFILL_LONG: LONG_PROMPT / seconds}


def _batch(ask: Ask, vocab: int, turn: int, pace: Pace, share: float) -> dict[str, float]:
    steps = pace.steps(DECODE_BATCH, share)
    prompts = [_tokens(vocab, BATCH_PROMPT, turn * BATCH + place) for place in range(BATCH)]
    return {DECODE_BATCH: BATCH * steps / ask("decode_batch", prompts, steps)}


def _verify(ask: Ask, vocab: int, turn: int, pace: Pace, share: float) -> dict[str, float]:
    repeats = max(3, min(15, pace.steps(DECODE, share) // 8))
    pairs = [[ask("rows", _tokens(vocab, rows, turn)) for rows in (1, ROWS)] for _ in range(repeats)]
    one, several = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {VERIFY: several / one}


WORKS = (
    Work((PREFILL, DECODE), _decode, lambda pace: PROMPT / pace.prefill, may_be_left_out=False),
    Work((PREFILL_LONG,), _prefill, lambda pace: LONG_PROMPT / pace.prefill),
    Work((DECODE_BATCH,), _batch, lambda pace: BATCH * BATCH_PROMPT / pace.prefill),
    Work((VERIFY,), _verify, lambda pace: 0.0),
)
QUICK_WORKS = tuple(work for work in WORKS if work.names != (PREFILL_LONG,))
"""Without the longest turns."""


def _tokens(vocab: int, count: int, seed: int) -> Sequence[int]:
    """`count` random token ids, the same for every engine."""
    return random.Random(f"{seed}/{count}").choices(range(vocab), k=count)
