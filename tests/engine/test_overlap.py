"""Steps started before those before them are read: the same tokens, the same books, the same faults, and no waiting.

A thread stands for the GPU's stream. `Held` is a stream on which nothing runs before somebody waits for it: what is
planned meanwhile cannot have looked at any result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from slotwise.core.errors import PlanError, SequenceFault, VerificationError
from slotwise.engine import executor as executor_module
from slotwise.engine import overlap as overlap_module
from slotwise.engine.engine import Engine
from slotwise.engine.observer import Observer
from slotwise.engine.request import Request
from slotwise.engine.score import score
from slotwise.engine.sequence import Sequence
from slotwise.engine.streams import Done, ThreadStream, Work
from slotwise.plans.binding import Binding
from slotwise.plans.program import TARGET
from slotwise.plans.rows import FilledRows

from .tiny import DraftChoice, alone, assert_all_returned, finish, outcome, prompt_of, request, tiny_engine, tiny_model

MODEL = tiny_model(1, layers=2)
DRAFTS: dict[str, DraftChoice] = {"none": None, "ngram": "ngram", "model": MODEL.draft(0.05)}
NEW = 14


class Held:
    """A stream on which work runs when its end is waited for, and all before it."""

    def __init__(self) -> None:
        self.waiting: list[Work] = []
        self.most = 0

    def start(self, work: Work) -> Done:
        self.waiting.append(work)
        self.most = max(self.most, len(self.waiting))
        return _Until(self, work)

    def join(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


class AtOnce:
    """A stream on which work runs when it is started, as launches do that a GPU refuses."""

    def start(self, work: Work) -> Done:
        work()
        return self

    def wait(self) -> None:
        pass

    def join(self) -> None:
        pass


class _Until:
    def __init__(self, stream: Held, work: Work) -> None:
        self._stream, self._work = stream, work

    def wait(self) -> None:
        while self._work in self._stream.waiting:
            self._stream.waiting.pop(0)()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module, "ThreadStream", Held)


def requests(count: int = 3, **sampling: Any) -> list[Request]:
    """Greedy and sampled, of several lengths; whoever asks for log-probabilities waits for every step."""
    return [
        request(prompt_of(5 + n, n), NEW + n, **{"temperature": 0.8 * (n % 2), "seed": n, "logprobs": None, **sampling})
        for n in range(count)
    ]


def overlapping(**options: Any) -> Engine:
    return tiny_engine(MODEL, overlap=True, **options)


def decoding(engine: Engine, wanted: list[Request]) -> list[Sequence]:
    """The requests, all with their prompts behind them."""
    sequences = [engine.add(one) for one in wanted]
    while any(sequence.state != "decode" for sequence in sequences):
        engine.step()
    return sequences


def assert_as_alone(sequences: list[Sequence], wanted: list[Request]) -> None:
    assert [outcome(s.completion()) for s in sequences] == [outcome(alone(MODEL, one)) for one in wanted]


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
    finish(engine)
    assert_all_returned(engine)
    assert_as_alone(sequences, requests())


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
    assert epochs == sorted(set(epochs))


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


class Failing:
    """Fails launches of the target's decode programs, at most `times`, where `when(rows of the program)` says so."""

    def __init__(self, engine: Engine, when: Callable[[int], bool], times: int = 10**6) -> None:
        self.failures = 0
        executor = engine.executor

        def guard(launch: Callable[[], None], rows: int) -> Callable[[], None]:
            def run() -> None:
                if self.failures < times and when(rows):
                    self.failures += 1
                    raise FloatingPointError("planted")
                launch()

            return run

        for key, launches in executor._launches.items():
            if key[:2] == (TARGET, "decode"):
                executor._launches[key] = (guard(launches[0], key[2]), *launches[1:])
        executor._runs.clear()


def reaching(engine: Engine, victim: Sequence, position: int) -> Callable[[int], bool]:
    """Whether a call holds a row of `victim` beyond `position`."""

    def when(rows: int) -> bool:
        table, ends = (engine.executor.buffers[name][:rows] for name in ("target.page_table", "kv_len"))
        mine = table[:, 0] == int(engine.ledger[TARGET].page_table[victim.lane or 0, 0])
        return victim.lane is not None and bool((ends[mine] > position).any())

    return when


@pytest.mark.parametrize("stream", [Held, AtOnce, ThreadStream])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_kernel_that_fails_in_flight_for_one_sequence_ends_that_sequence_alone(
    monkeypatch: pytest.MonkeyPatch, victim: int, stream: type
) -> None:
    monkeypatch.setattr(executor_module, "ThreadStream", stream)
    engine, wanted = overlapping(share_prefixes=False), requests()
    sequences = decoding(engine, wanted)
    planted = Failing(engine, reaching(engine, sequences[victim], len(wanted[victim].prompt_ids) + 4))
    finish(engine)
    assert_all_returned(engine)
    assert planted.failures
    others = [n for n in range(3) if n != victim]
    assert_as_alone([sequences[n] for n in others], [wanted[n] for n in others])
    failed = sequences[victim].completion()
    assert failed.finish_reason == "error"
    assert "FloatingPointError: planted" in str(failed.error)
    assert failed.token_ids == alone(MODEL, wanted[victim]).token_ids[: len(failed.token_ids)]
    assert 4 <= len(failed.token_ids) < NEW


@pytest.mark.parametrize(("stream", "computed_again"), [(Held, 3), (AtOnce, 0), (ThreadStream, 3)])
def test_a_kernel_that_fails_in_flight_once_fails_nobody(
    monkeypatch: pytest.MonkeyPatch, stream: type, computed_again: int
) -> None:
    monkeypatch.setattr(executor_module, "ThreadStream", stream)
    engine, wanted = overlapping(share_prefixes=False), requests()
    sequences = decoding(engine, wanted)
    planted = Failing(engine, reaching(engine, sequences[1], 10), times=1)
    finish(engine)
    assert_all_returned(engine)
    assert planted.failures == 1
    assert_as_alone(sequences, wanted)
    # What was launched is not to be trusted, so all that it held is computed again; what was not is run in another way.
    assert sum(sequence.preemptions for sequence in sequences) == computed_again


def test_a_row_that_is_not_finite_ends_its_sequence_with_the_tokens_before_it(held: None) -> None:
    engine, wanted = overlapping(share_prefixes=False), requests()
    sequences = decoding(engine, wanted)
    for _ in range(3):
        engine.step()
    known = len(sequences[2].tokens)
    engine.executor.caches[TARGET]["kv0.v"][engine.ledger[TARGET].slots(sequences[2].lane or 0, 2, 3)] = float("nan")
    finish(engine)
    assert_all_returned(engine)
    assert_as_alone(sequences[:2], wanted[:2])
    failed = sequences[2].completion()
    assert isinstance(failed.error, SequenceFault)
    assert "finite" in str(failed.error)
    assert len(sequences[2].tokens) == known


def test_nothing_that_a_failed_flight_should_have_written_is_shared() -> None:
    # Pages of one slot, so that each is full at once; what decoding wrote is shared where prefill keeps rows apart.
    options = {"invariant_prefill": True, "page_size": 1}
    one = request(prompt_of(6), NEW, logprobs=None)
    plain = alone(MODEL, one, invariant_prefill=True).token_ids
    at = next(n for n in range(4, NEW) if plain[n] not in plain[:n])
    stopped = request(one.prompt_ids, NEW, logprobs=None, stop_token_ids=[plain[at]])
    engine = overlapping(**options)
    (sequence,) = decoding(engine, [stopped])
    # The flight behind the last token fails: the slot of that token stays empty.
    planted = Failing(engine, lambda rows: int(engine.executor.buffers["kv_len"][:rows].max()) > 6 + at, times=1)
    finish(engine)
    assert engine.executor.stream is not None
    engine.executor.stream.join()
    assert planted.failures == 1
    assert sequence.finish_reason == "stop"
    longer = request((*one.prompt_ids, *plain[: at + 1], 3), NEW, logprobs=None)
    again = engine.add(longer)
    finish(engine)
    assert again.shared_tokens == 6 + at
    assert outcome(again.completion()) == outcome(alone(MODEL, longer, invariant_prefill=True))


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
    decoding(engine, requests())
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
