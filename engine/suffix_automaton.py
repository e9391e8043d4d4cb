"""A suffix automaton over a growing token sequence, and what it predicts to follow.

Owns the index that prompt-lookup drafting uses. What always holds: after n tokens there are at most 2n states and 3n
transitions; a token costs amortised constant time; the longest suffix that has occurred before is one link away.
Source: Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text".
"""

from __future__ import annotations

# How many suffixes of a position, longest first, get to know of it as their latest end. Ordinary text has far fewer; a
# text that repeats itself has one per period, and there the longest ones are the ones that are asked for.
RECENCY_LIMIT = 32

_ROOT = 0


class SuffixAutomaton:
    """Index of every substring of a token sequence, built online.

    Each state stands for substrings with the same end positions; parallel lists hold its fields, by state number.
    """

    def __init__(self, recency_limit: int = RECENCY_LIMIT) -> None:
        self._recency_limit = recency_limit
        self._tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link: list[int] = [-1]  # the state of the longest suffix with more end positions; the root has none
        self._length: list[int] = [0]  # of the state's longest substring
        self._recent_end: list[int] = [0]  # tokens up to and with its latest end before the current one
        self._last = _ROOT

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, token: int) -> None:
        """Append one token."""
        self._record_end()
        self._tokens.append(token)
        new = self._add_state({}, len(self._tokens), len(self._tokens))
        state = self._last
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        if state < 0:
            self._link[new] = _ROOT
        else:
            self._link[new] = self._suffix_state(state, token)
        self._last = new

    def propose(self, k: int, min_match: int = 2) -> list[int]:
        """Return k tokens that may follow, or none where no suffix of at least `min_match` tokens occurred before.

        Takes the longest suffix of the sequence that also ends earlier, and copies what followed its most recent
        earlier end: a repeated phrase is likeliest to go on as it last did. A copy that reaches the end of the sequence
        goes on through the tokens just copied (as in LZ77), so a text in a loop is predicted to stay in it.
        Beyond `recency_limit` suffixes of one position, an earlier occurrence than the most recent may be used.
        """
        match = self._link[self._last]
        if k <= 0 or match <= _ROOT or self._length[match] < min_match:
            return []
        start = self._recent_end[match]
        copied = self._tokens[start : start + k]
        period = len(self._tokens) - start
        while len(copied) < k:
            copied.append(copied[len(copied) - period])
        return copied

    def _record_end(self) -> None:
        """Note the current position as the latest end of its suffixes, before a new token makes it an earlier one."""
        state = self._link[self._last]
        for _ in range(self._recency_limit):
            if state <= _ROOT:
                return
            self._recent_end[state] = len(self._tokens)
            state = self._link[state]

    def _suffix_state(self, state: int, token: int) -> int:
        """Return the state of exactly `state`'s longest substring and `token`, split off a longer one where needed."""
        target = self._next[state][token]
        length = self._length[state] + 1
        if self._length[target] == length:
            return target
        clone = self._add_state(dict(self._next[target]), length, self._recent_end[target])
        self._link[clone] = self._link[target]
        self._link[target] = clone
        while state >= 0 and self._next[state].get(token) == target:
            self._next[state][token] = clone
            state = self._link[state]
        return clone

    def _add_state(self, transitions: dict[int, int], length: int, recent_end: int) -> int:
        self._next.append(transitions)
        self._length.append(length)
        self._recent_end.append(recent_end)
        self._link.append(_ROOT)
        return len(self._length) - 1
