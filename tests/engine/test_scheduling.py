"""Who runs when: in order of arrival, nobody overtakes, nobody starves, and what a pause costs is time alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotwise.engine.engine import Engine
from slotwise.engine.request import Request
from slotwise.engine.sequence import Sequence

from .tiny import (
    DraftChoice,
    alone,
    assert_all_returned,
    finish,
    outcome,
    prompt_of,
    request,
    run,
    tiny_engine,
    tiny_model,
)

MODEL = tiny_model(0)
DRAFTS: dict[str, DraftChoice] = {"none": None, "ngram": "ngram", "model": MODEL.draft(0.05)}


def one_sequence_pool(draft: str = "none", **options: Any) -> Engine:
    """Four lanes, and pages for one sequence of full capacity."""
    return tiny_engine(
        MODEL, DRAFTS[draft], **{"capacity": 30, "pages": 10, "page_size": 3, "adaptive": False, **options}
    )


def running(sequences: list[Sequence]) -> list[int]:
    return [sequence.id for sequence in sequences if sequence.lane is not None]


def test_requests_start_in_order_of_arrival() -> None:
    engine = tiny_engine(MODEL, max_sequences=2)
    sequences = [engine.add(request(prompt_of(n), 3 + n)) for n in (9, 3, 12, 1, 6)]
    first_seen: list[int] = []
    while not engine.is_idle:
        engine.step()
        first_seen += [n for n in running(sequences) if n not in first_seen]
        waiting = [s.id for s in sequences if s.state == "waiting"]
        assert not waiting or min(waiting) > max(running(sequences), default=-1)
    assert first_seen == sorted(first_seen)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_more_than_max_sequences_run_at_once(most: int) -> None:
    engine = tiny_engine(MODEL, max_sequences=most)
    sequences = [engine.add(request(prompt_of(4, n), 6)) for n in range(5)]
    seen = set()
    while not engine.is_idle:
        engine.step()
        seen.add(len(running(sequences)))
    assert max(seen) == most


def test_a_small_request_does_not_overtake_a_large_one_that_waits_for_pages() -> None:
    engine = one_sequence_pool()
    first = engine.add(request(prompt_of(20), 8))
    engine.step()
    large, small = engine.add(request(prompt_of(25, 1), 4)), engine.add(request((1,), 2))
    while large.state == "waiting":
        assert small.state == "waiting"
        engine.step()
    finish(engine)
    assert [s.finish_reason for s in (first, large, small)] == ["length"] * 3


@given(
    st.sampled_from(sorted(DRAFTS)),
    st.lists(st.tuples(st.integers(1, 29), st.integers(1, 40), st.integers(0, 6)), min_size=2, max_size=7),
    st.sampled_from([1, 3, 16]),
)
@settings(max_examples=30)
def test_nothing_starves_in_a_pool_for_one_sequence(
    draft: str, wanted: list[tuple[int, int, int]], page_size: int
) -> None:
    engine = one_sequence_pool(draft, page_size=page_size, pages=-(-30 // page_size))
    requests = [request(prompt_of(length, n), new) for n, (length, new, _) in enumerate(wanted)]
    sequences: list[Sequence] = []
    ended: list[int] = []
    for step in range(1000):
        for one, (_, _, arrival) in zip(requests[len(sequences) :], wanted[len(sequences) :], strict=True):
            if arrival <= step:
                sequences.append(engine.add(one))
            else:
                break
        if engine.is_idle and len(sequences) == len(requests):
            break
        known = {s.id: len(s.tokens) + _filled(engine, s) for s in sequences if s.state != "done"}
        engine.step()
        ended += [s.id for s in sequences if s.state == "done" and s.id not in ended]
        if known:
            # The oldest always gets on.
            oldest = sequences[min(known)]
            assert oldest.state == "done" or len(oldest.tokens) + _filled(engine, oldest) > known[oldest.id]
            assert oldest.preemptions == 0 or oldest.id != 0
    assert_all_returned(engine)
    assert sorted(ended) == list(range(len(requests)))
    for one, sequence in zip(requests, sequences, strict=True):
        assert outcome(sequence.completion()) == outcome(alone(MODEL, one, capacity=30))


def _filled(engine: Engine, sequence: Sequence) -> int:
    return 0 if sequence.lane is None else int(engine.ledger["target"].committed[sequence.lane])


@pytest.mark.parametrize("draft", DRAFTS)
def test_sequences_join_and_leave_between_steps(draft: str) -> None:
    engine = tiny_engine(MODEL, DRAFTS[draft], max_sequences=3, adaptive=False)
    requests = [request(prompt_of(3 + n, n), 4 + 3 * n, temperature=0.7) for n in range(6)]
    sequences: list[Sequence] = []
    together = set()
    while len(sequences) < len(requests) or not engine.is_idle:
        if len(sequences) < len(requests):
            sequences.append(engine.add(requests[len(sequences)]))
        engine.step()
        together.add(tuple(running(sequences)))
    assert len(together) > 4
    assert [outcome(s.completion()) for s in sequences] == [outcome(alone(MODEL, one)) for one in requests]


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_long_prompt_is_filled_in_chunks_while_others_go_on(draft: str) -> None:
    engine = tiny_engine(MODEL, DRAFTS[draft], prefill_chunk=4, adaptive=False)
    short = [engine.add(request(prompt_of(3, n), 20)) for n in range(2)]
    while any(s.state != "decode" for s in short):
        engine.step()
    long = engine.add(request(prompt_of(35), 5))
    steps = 0
    while long.new_tokens == 0:
        before = [len(s.tokens) for s in short]
        filled = _filled(engine, long)
        engine.step()
        steps += 1
        assert 0 < _filled(engine, long) - filled <= 4
        assert all(s.state == "done" or len(s.tokens) > n for s, n in zip(short, before, strict=True))
    assert steps == 9
    finish(engine)


def test_a_step_returns_those_with_something_new_in_order_of_arrival() -> None:
    engine = tiny_engine(MODEL, max_sequences=3, prefill_chunk=4)
    sequences = [engine.add(request(prompt_of(2 + n, n), 3 + n)) for n in range(5)]
    while not engine.is_idle:
        before = {s.id: (len(s.tokens), s.state == "done") for s in sequences}
        touched = engine.step()
        changed = [s for s in sequences if before[s.id] != (len(s.tokens), s.state == "done")]
        assert touched == changed


class TestPreemption:
    """When pages run out the youngest gives way; what it then gives is what it would have given."""

    REQUESTS = (
        request(prompt_of(10, 0), 18),
        request(prompt_of(8, 1), 18, temperature=0.9, seed=4, repetition_penalty=1.2),
        request(prompt_of(5, 2), 12, temperature=1.3, seed=5, frequency_penalty=0.8),
    )

    @pytest.mark.parametrize("share", [True, False])
    @pytest.mark.parametrize("draft", DRAFTS)
    @pytest.mark.parametrize("page_size", [1, 3, 16])
    def test_a_preempted_sequence_returns_and_completes_with_the_same_bits(
        self, page_size: int, draft: str, share: bool
    ) -> None:
        pages = -(-30 // page_size) + (1 if page_size == 16 else 0)
        engine = one_sequence_pool(draft, page_size=page_size, pages=pages, share_prefixes=share)
        completions = run(engine, self.REQUESTS)
        assert sum(c.stats.preemptions for c in completions) > 0
        assert completions[0].stats.preemptions == 0
        for completion, one in zip(completions, self.REQUESTS, strict=True):
            assert outcome(completion) == outcome(alone(MODEL, one, capacity=30))

    def test_a_preempted_sequence_goes_before_those_that_came_after_it(self) -> None:
        engine = one_sequence_pool(max_sequences=2)
        sequences = [engine.add(one) for one in (*self.REQUESTS, request((3, 4), 2))]
        while not sequences[1].preemptions:
            engine.step()
        while sequences[1].lane is None:
            assert running(sequences[2:]) == []
            engine.step()
        finish(engine)
        assert [s.finish_reason for s in sequences] == ["length"] * 4

    def test_what_was_streamed_before_a_preemption_is_not_streamed_again(self) -> None:
        engine = one_sequence_pool("ngram")
        sequences = [engine.add(one) for one in self.REQUESTS]
        streamed: list[list[int]] = [[] for _ in sequences]
        while not engine.is_idle:
            engine.step()
            for tokens, sequence in zip(streamed, sequences, strict=True):
                chunk = sequence.take_chunk()
                tokens += [] if chunk is None else chunk.token_ids
        assert sum(s.preemptions for s in sequences) > 0
        assert [tuple(tokens) for tokens in streamed] == [s.completion().token_ids for s in sequences]

    def test_speculation_preempts_nobody(self) -> None:
        # Two sequences whose next tokens fit, where the drafts of one would take the other's pages.
        def preemptions(draft: DraftChoice) -> int:
            engine = tiny_engine(
                MODEL, draft, capacity=30, page_size=1, pages=40, max_sequences=2, adaptive=False, speculate=6
            )
            wanted: list[Request] = [request(prompt_of(10, n), 10) for n in range(2)]
            return sum(c.stats.preemptions for c in run(engine, wanted))

        assert preemptions(None) == preemptions(MODEL) == 0


def test_a_pool_for_one_sequence_serves_a_full_one_beside_others() -> None:
    engine = one_sequence_pool("model")
    full = engine.add(request(prompt_of(15), 100))
    others = [engine.add(request(prompt_of(14, n), 100)) for n in range(1, 3)]
    finish(engine)
    assert_all_returned(engine)
    for sequence in (full, *others):
        assert len(sequence.tokens) == 30
        assert sequence.finish_reason == "length"


def test_requests_that_wait_together_are_not_promised_the_same_pages() -> None:
    # Pages for two of them: admitting all eight at once would only have six thrown out again.
    engine = tiny_engine(
        MODEL, capacity=30, page_size=3, pages=20, max_sequences=8, share_prefixes=False, prefill_chunk=3
    )
    sequences = [engine.add(request(prompt_of(25, n), 4)) for n in range(8)]
    finish(engine)
    assert [s.preemptions for s in sequences] == [0] * 8
    assert [s.finish_reason for s in sequences] == ["length"] * 8
