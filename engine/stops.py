"""When a sequence ends, and how much of its text may be shown before that is known.

Owns the stop rules: token ids, strings, the token budget. What always holds: text handed out never has to be taken
back; where a string cuts the text does not depend on how the text is cut into tokens; the token that completes a stop
is the last one kept, so that a run of accepted tokens is cut at exactly that token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from slotwise.core.errors import OptionError
from slotwise.engine.sampling import Sampling

FinishReason = Literal["stop", "length"]


class StopStrings:
    """Finds the first of some strings in a text that arrives in pieces, and holds back what may be its beginning.

    The first to be complete wins, and of those complete at one character the longest: so that the cut depends on the
    text alone, never on where its pieces end. Held-back text is shorter than the longest string.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = tuple(strings)
        self._longest = max(map(len, self._strings), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece; return the text that is now certain, and whether a stop string ended it."""
        text = self._held + text
        matches = [(start + len(s), start) for s in self._strings if (start := text.find(s)) >= 0]
        if matches:
            self._held = ""
            return text[: min(matches)[1]], True
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def release(self) -> str:
        """Hand out the held-back text: nothing follows that could complete a stop string."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest suffix of `text`, which holds no stop string, that is a proper prefix of one."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            suffix = text[len(text) - length :]
            if any(s.startswith(suffix) for s in self._strings):
                return length
        return 0


@dataclass(frozen=True)
class StopVerdict:
    """What one token did: the text that may be shown now, and why the sequence ended, None while it goes on."""

    text: str
    reason: FinishReason | None


class StopChecker:
    """The stop rules of one sequence, fed with its tokens in order, each with the text that it adds.

    Tokens are pushed once they are accepted; the first push whose verdict has a reason is the last, and that token is
    kept. A stop token's id is in the output's token ids, its own text is not in the output's text.
    A stop wins over the budget where one token meets both.

    `budget` is the number of tokens that may be generated, where capacity leaves fewer than `sampling.max_new_tokens`.
    """

    def __init__(self, sampling: Sampling, eos_ids: Iterable[int], *, budget: int | None = None) -> None:
        self._stop_ids = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else frozenset(eos_ids)
        )
        self._strings = StopStrings(sampling.stop)
        self._left = sampling.max_new_tokens if budget is None else min(budget, sampling.max_new_tokens)
        if self._left < 1:
            raise OptionError(f"budget: expected room for at least one token, found {budget}")
        self._ended = False

    def push(self, token_id: int, text: str) -> StopVerdict:
        """Take the next token and the text it adds; return what may be shown, and the reason if this is the end.

        Raises `ValueError` after the end: a token beyond a stop must not have been kept.
        """
        if self._ended:
            raise ValueError(f"token {token_id} was pushed after the sequence had ended")
        self._left -= 1
        if token_id in self._stop_ids:
            return self._end("", "stop")
        shown, stopped = self._strings.push(text)
        if stopped:
            return self._end(shown, "stop")
        if self._left == 0:
            return self._end(shown, "length")
        return StopVerdict(shown, None)

    def release(self) -> str:
        """End the sequence from outside (cancelled, at capacity, failed); return the text that was held back."""
        self._ended = True
        return self._strings.release()

    def _end(self, shown: str, reason: FinishReason) -> StopVerdict:
        return StopVerdict(shown + self.release(), reason)
