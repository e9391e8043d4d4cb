"""Steps started before those before them are read: the same tokens, the same books, and no waiting.

A thread stands for the GPU's stream, or one of the streams in `flights.py`. Faults are in `test_overlap_faults.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from slotwise.core.errors import PlanError, VerificationError
from slotwise.engine import executor as executor_module
from slotwise.engine import overlap as overlap_module
from slotwise.engine.engine import Engine
from slotwise.engine.observer import Observer
from slotwise.engine.request import Request
from slotwise.engine.score import score
from slotwise.engine.streams import DeviceStream, ThreadStream
from slotwise.slots.binding import Binding
from slotwise.slots.rows import FilledRows
from slotwise.slots.step import TARGET

from .flights import DRAFTS, MODEL, NEW, Held, assert_as_alone, decoding, overlapping, requests
from .tiny import alone, assert_all_returned, finish, outcome, prompt_of, request, tiny_engine


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module, "ThreadStream", Held)


def test_the_next_step_is_planned_and_started_before_this_one_has_run(held: None) -> None:
    engine = overlapping()
    sequences = decoding(engine, requests())
    stream = engine.executor.stream
    assert isinstance(stream, Held)
    for _ in range(4):
        known = [len(sequence.tokens) for sequence in sequences]
        engine.step()
        # One step has been read, and the next one stands started, though nothing of it has run.
        assert [len(sequence.tokens) for sequence in sequences] == [n + 1 for n in known]
        assert len(stream.waiting) == 1
    assert stream.most == 2
    stream.join()
    assert engine.executor.arrays["sampled"].tolist() == engine.executor.buffers["sampled"].tolist()
    finish(engine)
    assert_all_returned(engine)
    assert_as_alone(sequences, requests())
    assert engine._overlap.last_error is None


@pytest.mark.parametrize("stream", [Held, ThreadStream])
def test_a_step_is_started_from_marks_that_are_committed_and_verified_like_any_other(
    monkeypatch: pytest.MonkeyPatch, stream: type
) -> None:
    monkeypatch.setattr(executor_module, "ThreadStream", stream)
    engine = overlapping()
    sequences = decoding(engine, requests(2))
    lanes = np.array([sequence.lane for sequence in sequences])
    for _ in range(4):
        engine.step()
        role = engine.ledger[TARGET]
        # All that is known is filled, by the step in flight; nothing is left reserved.
        assert role.committed[lanes].tolist() == [len(sequence.tokens) for sequence in sequences]
        assert (role.reserved == role.committed).all()
        assert role.flow.reserved == role.flow.committed + role.flow.released
    epochs = [binding.epoch for binding, _ in engine.history]
    assert epochs == list(range(epochs[0], epochs[0] + len(epochs)))


def test_a_sequence_that_a_token_ends_costs_the_step_in_flight_a_row_and_nobody_a_token() -> None:
    wanted = requests(3, temperature=0.0)
    plain = alone(MODEL, wanted[1]).token_ids
    at = next(n for n in range(3, NEW) if plain[n] not in plain[:n])
    wanted[1] = request(wanted[1].prompt_ids, NEW, seed=1, logprobs=None, stop_token_ids=[plain[at]])
    engine, waiting = overlapping(), tiny_engine(MODEL)
    sequences = decoding(engine, wanted)
    one_by_one = decoding(waiting, wanted)
    finish(engine)
    finish(waiting)
    assert_all_returned(engine)
    assert_as_alone(sequences, wanted)
    assert sequences[1].completion().token_ids == plain[: at + 1]
    for sequence, other in zip(sequences, one_by_one, strict=True):
        mine, theirs = sequence.completion().stats, other.completion().stats
        assert (mine.verifications, mine.slots, mine.new_tokens) == (
            theirs.verifications,
            theirs.slots,
            theirs.new_tokens,
        )


@pytest.mark.parametrize("stream", [Held, ThreadStream])
def test_tokens_are_as_alone_when_requests_come_and_go(monkeypatch: pytest.MonkeyPatch, stream: type) -> None:
    monkeypatch.setattr(executor_module, "ThreadStream", stream)
    engine, wanted = overlapping(max_sequences=3, pages=24), requests(8)
    sequences = []
    for one in wanted:
        sequences.append(engine.add(one))
        for _ in range(3):
            engine.step()
    finish(engine)
    assert_all_returned(engine)
    assert_as_alone(sequences, wanted)


def test_nothing_is_computed_for_a_token_beyond_the_budget_or_the_capacity(held: None) -> None:
    engine = overlapping(capacity=20)
    wanted = [request(prompt_of(5), 6, logprobs=None), request(prompt_of(12, 1), 100, logprobs=None)]
    longest: dict[int, int] = {}
    bound: list[int] = []

    class Watch(Observer):
        is_in_step = False

        def bound(self, binding: Binding) -> None:
            if binding.step.limits:
                bound.extend(binding.sequences)
                longest.update(zip(binding.sequences, binding.length.tolist(), strict=True))

    engine.observers.append(Watch())
    sequences = decoding(engine, wanted)
    finish(engine)
    assert longest == {0: 10, 1: 19}
    assert [bound.count(sequence.id) for sequence in sequences] == [s.verifications for s in sequences]
    assert [outcome(s.completion()) for s in sequences] == [outcome(alone(MODEL, one, capacity=20)) for one in wanted]


@pytest.mark.parametrize("when", [0, 1, 2, 5])
def test_a_cancelled_sequence_leaves_the_step_in_flight(when: int) -> None:
    engine, wanted = overlapping(), requests()
    sequences = decoding(engine, wanted)
    for _ in range(when):
        engine.step()
    engine.cancel(sequences[1])
    kept = len(sequences[1].tokens)
    late = engine.add(wanted[1])
    finish(engine)
    assert_all_returned(engine)
    assert len(sequences[1].tokens) == kept
    assert sequences[1].completion().token_ids == alone(MODEL, wanted[1]).token_ids[: kept - 6]
    assert_as_alone([sequences[0], late, sequences[2]], wanted)


def test_scoring_between_steps_disturbs_no_step_in_flight() -> None:
    engine, wanted = overlapping(), requests()
    sequences = decoding(engine, wanted)
    while not engine.is_idle:
        engine.step()
        found = score(engine, prompt_of(6))
        assert found.equal(score(tiny_engine(MODEL), prompt_of(6)))
    assert_as_alone(sequences, wanted)


class Judged(Observer):
    """Hears of verdicts; wants every step settled before the next."""

    def __init__(self) -> None:
        self.bindings: list[Binding] = []
        self.judgements: list[Binding] = []

    def bound(self, binding: Binding) -> None:
        self.bindings.append(binding)

    def judged(self, binding: Binding, verdicts: Any) -> None:
        self.judgements.append(binding)


@pytest.mark.parametrize("how", ["stop", "cancel", "in the middle"])
def test_an_observer_that_comes_later_hears_of_no_step_that_was_in_flight(held: None, how: str) -> None:
    engine = overlapping()
    plain = alone(MODEL, request(prompt_of(6), NEW, logprobs=None)).token_ids
    stops = [plain[4]] if how == "stop" else []
    (first,) = decoding(engine, [request(prompt_of(6), NEW, logprobs=None, stop_token_ids=stops)])
    while engine._flight is None or (how == "stop" and first.state != "done"):
        engine.step()
    if how == "cancel":
        engine.cancel(first)
    assert engine.is_idle == (how != "in the middle")
    late = Judged()
    engine.observers.append(late)
    second = engine.add(request(prompt_of(7, 1), NEW, logprobs=None))
    finish(engine)
    assert late.judgements
    assert {binding.epoch for binding in late.judgements} <= {binding.epoch for binding in late.bindings}
    assert_as_alone([second], [second.request])


def test_whoever_takes_a_lane_next_has_slots_of_its_own_alone() -> None:
    engine = overlapping(max_sequences=1)
    (first,) = decoding(engine, [request(prompt_of(20), 30, logprobs=None)])
    for _ in range(4):
        engine.step()
    engine.cancel(first)
    second = engine.add(request(prompt_of(2, 1), 2, logprobs=None))
    finish(engine)
    assert second.completion().stats.slots == {TARGET: 3}


def test_a_stream_that_becomes_the_current_one_waits_for_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    class Current:
        def __init__(self) -> None:
            self.waited: list[object] = []

        def wait_stream(self, other: object) -> None:
            self.waited.append(other)

        def record(self) -> None:
            pass

    one, other = Current(), Current()
    monkeypatch.setattr(torch.cuda, "Event", Current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: one)
    stream = DeviceStream()
    stream.start(lambda: None)
    stream.start(lambda: None)
    assert one.waited == []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: other)
    stream.start(lambda: None)
    stream.join()
    assert other.waited == [one]


def test_requests_that_wait_for_pages_do_not_keep_others_from_overlapping() -> None:
    engine = overlapping(capacity=30, pages=10, page_size=3)
    first, second = (engine.add(request(prompt_of(12, n), 17, logprobs=None)) for n in range(2))
    ahead = 0
    while first.state != "done":
        engine.step()
        ahead += engine._flight is not None and second.state == "waiting"
    assert ahead > 10
    finish(engine)
    assert_all_returned(engine)
    assert_as_alone([first, second], [first.request, second.request])


def overlaps(engine: Engine, wanted: list[Request]) -> bool:
    """Whether any step was started ahead while these were served."""
    sequences = [engine.add(one) for one in wanted]
    seen = False
    while not engine.is_idle:
        engine.step()
        seen |= engine._flight is not None
    assert engine._overlap.last_error is None
    assert all(sequence.error is None for sequence in sequences)
    return seen


def test_whatever_needs_a_step_to_be_over_waits_for_it() -> None:
    assert overlaps(overlapping(), requests(1))
    assert not overlaps(tiny_engine(MODEL), requests(1))
    assert not overlaps(overlapping(), requests(1, repetition_penalty=1.3))
    assert not overlaps(overlapping(), requests(1, logprobs=1))
    for draft in ("ngram", "model"):
        assert not overlaps(tiny_engine(MODEL, DRAFTS[draft], overlap=True), requests(1))
    watched = overlapping()
    watched.observers.append(Observer())
    assert not overlaps(watched, requests(1))
    conducted = overlapping()
    conducted.executor.conductor = lambda program, calls: [call.launch() for call in calls] and None
    assert not overlaps(conducted, requests(1))


def test_programs_do_not_start_beside_a_host_whose_thread_runs_them() -> None:
    with pytest.raises(PlanError, match="load the model with overlap=True"):
        tiny_engine(MODEL).executor.start(((TARGET, "decode", 1),))


def _shifted(follows: Any, by: int) -> Any:
    return np.roll(follows, by)


@pytest.mark.parametrize(
    "wrong",
    [lambda f: _shifted(f, 1), lambda f: f + 1, lambda f: f[:-1], lambda f: np.zeros_like(f), lambda f: f - 1],
    ids=["shifted", "one too far", "one short", "all the first's", "one too near"],
)
def test_a_row_fed_another_sequences_token_is_refused_before_it_runs(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Any], Any]
) -> None:
    refused: list[VerificationError] = []
    verify = overlap_module.verify_follow

    def watch(before: FilledRows, after: FilledRows, follows: Any, ledger: Any) -> None:
        verify(before, after, follows, ledger)
        with pytest.raises(VerificationError) as error:
            verify(before, after, wrong(follows), ledger)
        refused.append(error.value)

    monkeypatch.setattr(overlap_module, "verify_follow", watch)
    engine = overlapping()
    # Of one length, so that only the lane tells one's row from the other's.
    decoding(engine, [request(prompt_of(3, n), NEW, logprobs=None) for n in range(2)])
    engine.step()
    engine.step()
    assert len(refused) >= 2
    assert {error.rule for error in refused} == {"overlap"}


def test_rows_that_follow_must_stand_one_position_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    verify = overlap_module.verify_follow
    monkeypatch.setattr(overlap_module, "verify_follow", lambda *given: (calls.append(given), verify(*given)))
    engine = overlapping()
    decoding(engine, requests())
    engine.step()
    before, after, follows, ledger = calls[-1]
    with pytest.raises(VerificationError, match="would be fed what rows at"):
        verify(after, after, follows, ledger)
    ledger.committed[before.lanes[0]] -= 1
    with pytest.raises(VerificationError, match="committed are"):
        verify(before, after, follows, ledger)
