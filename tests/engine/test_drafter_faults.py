"""A drafter that lies or fails about one sequence ends that sequence; one that guesses badly changes nothing.

Drafters are code that a user may bring, so nothing that they return is trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from slotwise.engine.drafters import Drafting
from slotwise.engine.drafters.ngram import NgramDrafter
from slotwise.engine.engine import Engine
from slotwise.engine.request import Request
from slotwise.engine.sequence import Sequence as Running
from slotwise.slots.binding import Binding, Ints

from .tiny import alone, assert_all_returned, finish, outcome, prompt_of, request, tiny_engine
from .victims import MODEL, NEW, PROMPT, assert_only_victim_failed, requests


class Liar(NgramDrafter):
    """Drafts well for all sequences but one, whose prompt begins with `victim`; there it does what `lie` says."""

    def __init__(self, lie: str, victim: int, from_length: int) -> None:
        super().__init__(min_match=1)
        self._lie, self._victim, self._from = lie, victim, from_length
        self._known: dict[int, list[int]] = {}

    def _lies(self, lane: int) -> bool:
        known = self._known.get(lane, [])
        return bool(known) and known[0] == self._victim and len(known) >= self._from

    def begin(self, lane: int, tokens: Sequence[int]) -> None:
        self._known[lane] = list(tokens)
        if self._lie == "begin" and tokens[0] == self._victim:
            raise RuntimeError("planted")
        super().begin(lane, tokens)

    def extend(self, lane: int, tokens: Sequence[int]) -> None:
        super().extend(lane, tokens)
        if lane in self._known and len(self._known[lane]) < len(self._known[lane]) + len(tokens):
            self._known[lane] += tokens if len(tokens) < self._from else []
        if self._lie == "extend" and self._lies(lane):
            raise RuntimeError("planted")

    def end(self, lane: int) -> None:
        lies = self._lie == "end" and self._lies(lane)
        self._known.pop(lane, None)
        super().end(lane)
        if lies:
            raise RuntimeError("planted")

    def offer(self, lanes: Ints, widths: Ints) -> Ints:
        found = super().offer(lanes, widths)
        for i, lane in enumerate(lanes.tolist()):
            if self._lies(lane):
                if self._lie == "offer raises":
                    raise RuntimeError("planted")
                if self._lie == "offer of another shape":
                    return found[:0].reshape(0, 7)
                found[i] = {"offer below zero": -5, "offer too wide": 10**6}.get(self._lie, min(2, int(widths[i])))
        return found

    def draft(self, binding: Binding, at: Ints) -> Any:
        honest = super().draft(binding, at)
        for i in at.tolist():
            if self._lies(int(binding.lanes[i])):
                width = int(binding.width[i])
                lies: dict[str, Any] = {
                    "too many": [1] * (width + 1),
                    "too few": [1] * (width - 1),
                    "none at all": [],
                    "id too large": [1] * (width - 1) + [MODEL.spec.vocab_size],
                    "id below zero": [-1] * width,
                    "a float": [1.0] * width,
                    "a string": "1" * width,
                    "no list": None,
                    "a number": 7,
                }
                if self._lie == "draft raises":
                    raise RuntimeError("planted")
                if self._lie == "no drafting":
                    return None
                if self._lie == "too few lists":
                    return Drafting(honest.tokens[:i])
                honest.tokens[i] = lies.get(self._lie, [1] * width)
        return honest


LIES = [
    "too many",
    "too few",
    "none at all",
    "id too large",
    "id below zero",
    "a float",
    "a string",
    "no list",
    "a number",
    "draft raises",
    "no drafting",
    "offer raises",
    "begin",
    "extend",
]


def serve_with(drafter: Liar) -> tuple[Engine, list[Request], list[Running]]:
    wanted = requests()
    wanted[1] = request((30, *prompt_of(PROMPT, 1)), NEW, temperature=0.8, seed=5)
    engine = tiny_engine(MODEL, "ngram", drafter=drafter, share_prefixes=False, adaptive=False)
    assert all(one.prompt_ids[0] != 30 for one in (wanted[0], wanted[2]))
    return engine, wanted, [engine.add(one) for one in wanted]


@pytest.mark.parametrize("lie", LIES)
def test_a_drafter_that_lies_about_one_sequence_ends_that_sequence(lie: str) -> None:
    engine, wanted, sequences = serve_with(Liar(lie, victim=30, from_length=PROMPT + 4))
    assert_only_victim_failed(engine, wanted, sequences, 1)


@pytest.mark.parametrize("lie", ["wrong guesses", "offer below zero", "offer too wide", "end"])
def test_a_drafter_that_guesses_or_offers_badly_changes_nothing(lie: str) -> None:
    engine, wanted, sequences = serve_with(Liar(lie, victim=30, from_length=PROMPT + 4))
    finish(engine)
    assert_all_returned(engine)
    assert [outcome(s.completion()) for s in sequences] == [outcome(alone(MODEL, one)) for one in wanted]


@pytest.mark.parametrize("failing", ["offer", "draft"])
def test_a_drafter_that_fails_for_many_together_and_for_none_alone_fails_nobody(failing: str) -> None:
    class Unsociable(NgramDrafter):
        def offer(self, lanes: Ints, widths: Ints) -> Ints:
            if failing == "offer" and lanes.size > 1:
                raise RuntimeError("too many")
            return super().offer(lanes, widths)

        def draft(self, binding: Binding, at: Ints) -> Drafting:
            if failing == "draft" and at.size > 1:
                raise RuntimeError("too many")
            return super().draft(binding, at)

    wanted = requests()
    engine = tiny_engine(MODEL, "ngram", drafter=Unsociable(1), share_prefixes=False, adaptive=False)
    sequences = [engine.add(one) for one in wanted]
    finish(engine)
    assert_all_returned(engine)
    assert [outcome(s.completion()) for s in sequences] == [outcome(alone(MODEL, one)) for one in wanted]
