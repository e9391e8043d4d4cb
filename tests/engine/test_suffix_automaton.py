"""What the suffix automaton promises: the brute-force definition, in linear space."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slotwise.engine.suffix_automaton import SuffixAutomaton

SEQUENCES = st.integers(1, 4).flatmap(lambda size: st.lists(st.integers(0, size - 1), max_size=40))


def automaton_of(tokens: list[int], **options: int) -> SuffixAutomaton:
    automaton = SuffixAutomaton(**options)
    for token in tokens:
        automaton.extend(token)
    return automaton


def longest_match(tokens: list[int]) -> tuple[int, list[int]]:
    """The length of the longest suffix that also ends earlier, and those earlier ends."""
    for length in range(len(tokens) - 1, 0, -1):
        suffix = tokens[len(tokens) - length :]
        ends = [end for end in range(length, len(tokens)) if tokens[end - length : end] == suffix]
        if ends:
            return length, ends
    return 0, []


def continuation(tokens: list[int], start: int, k: int) -> list[int]:
    text = list(tokens)
    for _ in range(k):
        text.append(text[start])
        start += 1
    return text[len(tokens) :]


@given(SEQUENCES, st.integers(0, 6), st.integers(1, 4))
def test_a_proposal_follows_the_most_recent_earlier_occurrence(tokens: list[int], k: int, min_match: int) -> None:
    automaton = SuffixAutomaton(recency_limit=len(tokens))
    for end in range(len(tokens) + 1):
        length, ends = longest_match(tokens[:end])
        expected = continuation(tokens[:end], ends[-1], k) if length >= min_match else []
        assert automaton.propose(k, min_match) == expected
        if end < len(tokens):
            automaton.extend(tokens[end])


@given(SEQUENCES, st.integers(0, 3))
def test_with_a_small_recency_limit_it_still_follows_the_longest_match(tokens: list[int], limit: int) -> None:
    length, ends = longest_match(tokens)
    proposed = automaton_of(tokens, recency_limit=limit).propose(3, min_match=1)
    assert proposed in ([continuation(tokens, end, 3) for end in ends] if length else [[]])


def test_proposing_changes_nothing() -> None:
    tokens = [1, 2, 3, 1, 2, 4, 1, 2]
    automaton = automaton_of(tokens)
    assert automaton.propose(2) == automaton.propose(2) == [4, 1]
    automaton.extend(3)
    assert automaton.propose(2) == [1, 2]


def test_a_loop_is_predicted_to_go_on_for_all_k_tokens() -> None:
    assert automaton_of([5, 1, 2, 3, 1, 2, 3]).propose(7) == [1, 2, 3, 1, 2, 3, 1]
    assert automaton_of([8] * 5).propose(4) == [8] * 4


def test_the_most_recent_occurrence_counts_where_a_longer_match_covered_it() -> None:
    a, b, x, y, z = 10, 11, 12, 13, 14
    assert automaton_of([y, a, b, 1, x, a, b, 2, x, a, b, 3, z, a, b]).propose(1) == [3]


def test_nothing_is_proposed_without_a_match_long_enough() -> None:
    assert SuffixAutomaton().propose(4) == []
    assert automaton_of([1, 2, 3]).propose(4) == []
    assert automaton_of([1, 2, 1]).propose(4) == []
    assert automaton_of([1, 2, 1]).propose(4, min_match=1) == [2, 1, 2, 1]


@pytest.mark.parametrize("kind", ["loop", "random", "blocks", "distinct"])
def test_size_and_work_are_linear(kind: str) -> None:
    n = 3000
    rng = random.Random(0)
    tokens = {
        "loop": [7] * n,
        "random": [rng.randrange(3) for _ in range(n)],
        "blocks": [(i * i) % 31 for i in range(n)],
        "distinct": list(range(n)),
    }[kind]
    automaton = automaton_of(tokens)
    assert len(automaton) == n
    assert len(automaton._length) <= 2 * n
    assert sum(map(len, automaton._next)) <= 3 * n
