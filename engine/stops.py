"""When a sequence ends, and how much of its text may be shown before that is known.

Owns the stop rules: token ids, strings, the token budget. What always holds: text handed out never has to be taken
back; where a string cuts the text does not depend on how the text is cut into tokens; the token that completes a stop
is the last one kept, so that a run of accepted tokens is cut at exactly that token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from slotwise.core.errors import OptionError
from slotwise.engine.sampling import Sampling
from slotwise.engine.sampling.values import MAX_COUNT
from slotwise.engine.stop_marks import StopMarks, is_marked, unmarked

FinishReason = Literal["stop", "length"]


class StopStrings:
    """Finds the first of some strings in a text that arrives in pieces, and holds back what may be its beginning.

    The first to be complete wins, and of those complete at one character the longest: so that the cut depends on the
    text alone, never on where its pieces end. Held-back text is shorter than the longest string. With `include`, the
    text ends after the string instead of before it.

    Pieces and strings may have marks (`stop_marks.py`), which stand for tokens without a text. A string with marks is
    looked for among them; any other sees the text alone. Marks are not handed out.
    """

    def __init__(self, strings: Iterable[str], *, include: bool = False) -> None:
        self._include = include
        self._plain: list[str] = []
        self._marked: list[str] = []
        for string in strings:
            (self._marked if is_marked(string) else self._plain).append(string)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece; return the text that is now certain, and whether a stop string ended it."""
        text = self._held + text
        bare = unmarked(text)
        # Where each character of the bare text stands in the text with marks.
        places = range(len(text)) if bare == text else [at for at, one in enumerate(text) if not is_marked(one)]
        matches = [(places[at + len(s) - 1], places[at]) for s in self._plain if (at := bare.find(s)) >= 0]
        matches += [(at + len(s) - 1, at) for s in self._marked if (at := text.find(s)) >= 0]
        if matches:
            self._held = ""
            last, start = min(matches)
            return unmarked(text[: last + 1 if self._include else start]), True
        plain, marked = _possible_beginning(bare, self._plain), _possible_beginning(text, self._marked)
        certain = min(places[len(bare) - plain] if plain else len(text), len(text) - marked)
        self._held = text[certain:]
        return unmarked(text[:certain]), False

    def release(self) -> str:
        """Hand out the held-back text: nothing follows that could complete a stop string."""
        held, self._held = unmarked(self._held), ""
        return held


def _possible_beginning(text: str, strings: Sequence[str]) -> int:
    """Length of the longest suffix of `text`, which holds none of `strings`, that is a proper prefix of one."""
    longest = max(map(len, strings), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        suffix = text[len(text) - length :]
        if any(s.startswith(suffix) for s in strings):
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
    kept. A stop token's id is in the output's token ids, its own text is not in the output's text unless it is asked
    for. A stop wins over the budget where one token meets both. Before the least number of tokens that is asked for
    nothing stops, and their text is not looked at.

    A stop string that holds the text of a `silent` token (text -> id of those that add nothing to the output's text)
    is also complete at that token.

    `budget` is the number of tokens that may be generated; None for what `sampling` asks for.
    Raises OptionError for a stop string that can never match.
    """

    def __init__(
        self,
        sampling: Sampling,
        eos_ids: Iterable[int],
        *,
        budget: int | None = None,
        prompt_length: int = 0,
        silent: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._stop_ids = sampling.ends(eos_ids)
        self._include = sampling.include_stop
        marks = StopMarks.of(sampling.stop or (), silent)
        self._marks = marks.by_id
        self._strings = StopStrings(marks.strings, include=sampling.include_stop)
        self._early = max(sampling.min_new_tokens, sampling.min_length - prompt_length)
        limits = [each for each in (budget, sampling.budget(prompt_length)) if each is not None]
        self._left = min(limits, default=MAX_COUNT)
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
        self._early -= 1
        if self._early >= 0:
            return StopVerdict(text, None) if self._left else self._end(text, "length")
        is_stop = token_id in self._stop_ids
        marked = text + self._marks.get(token_id, "")
        shown, stopped = ("", False) if is_stop and not self._include else self._strings.push(marked)
        if is_stop or stopped:
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
