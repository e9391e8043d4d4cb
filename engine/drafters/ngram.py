"""The n-gram drafter: what followed the last time these tokens stood here.

What always holds: it knows committed tokens only, so there is nothing to roll back; its proposals for a step are made
before slots are planned and are what it then drafts. (Prompt lookup, Saxena 2023; with a suffix automaton instead of a
search, after SAM decoding, Hu et al. 2024.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slotwise.engine.drafters import Drafting
from slotwise.engine.suffix_automaton import SuffixAutomaton
from slotwise.slots.binding import Binding, Ints


class NgramDrafter:
    """One suffix automaton a lane, over prompt and output; `min_match` is the shortest repeated suffix that counts."""

    kind = "ngram"

    def __init__(self, min_match: int = 2) -> None:
        self._min_match = min_match
        self._automata: dict[int, SuffixAutomaton] = {}
        self._proposals: dict[int, list[int]] = {}

    def begin(self, lane: int, tokens: Sequence[int]) -> None:
        """Read the sequence's tokens."""
        self._automata[lane] = SuffixAutomaton()
        self.extend(lane, tokens)

    def extend(self, lane: int, tokens: Sequence[int]) -> None:
        """Read committed tokens."""
        automaton = self._automata[lane]
        for token in tokens:
            automaton.extend(token)

    def end(self, lane: int) -> None:
        """Forget the sequence."""
        self._automata.pop(lane, None)
        self._proposals.pop(lane, None)

    def offer(self, lanes: Ints, widths: Ints) -> Ints:
        """The lengths of the proposals made now."""
        offered = np.zeros_like(widths)
        for i, (lane, width) in enumerate(zip(lanes.tolist(), widths.tolist(), strict=True)):
            proposal = self._automata[lane].propose(width, self._min_match) if width else []
            self._proposals[lane] = proposal
            offered[i] = len(proposal)
        return offered

    def draft(self, binding: Binding, at: Ints) -> Drafting:
        """The first `width` tokens of each proposal."""
        tokens: list[list[int]] = [[] for _ in binding.sequences]
        for i in at.tolist():
            tokens[i] = self._proposals[int(binding.lanes[i])][: int(binding.width[i])]
        return Drafting(tokens)
