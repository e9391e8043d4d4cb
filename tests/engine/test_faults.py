"""One sequence's failure is its own: it ends with an error and the tokens that it had, and its slots return.

The others give the same bits as without it, and the engine goes on serving. Faults are planted around the executor and
the page pool; a victim's rows are known by its first page, so nothing is shared here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotwise.core.errors import OutOfPages, SequenceFault
from slotwise.engine.calls import BoundCall
from slotwise.engine.engine import Engine
from slotwise.engine.request import Completion
from slotwise.engine.sequence import Sequence as Running
from slotwise.plans.loop import DraftLoop
from slotwise.plans.program import SAMPLER, Program
from slotwise.slots.step import DRAFT, TARGET

from .tiny import alone, assert_all_returned, finish, outcome, prompt_of, request, tiny_engine
from .victims import DRAFTS, MODEL, NEW, PROMPT, assert_only_victim_failed, engine_for, requests


class Planted:
    """An executor's conductor: `before` and `after` are called around each model call that has the victim's rows.

    They get (role, kind, positions of the victim's rows, the victim's rows in the call).
    """

    def __init__(self, engine: Engine, victim: Running) -> None:
        self.engine, self.victim = engine, victim
        self.before: Callable[[str, str, list[int], range], None] = lambda *_: None
        self.after: Callable[[str, str, list[int], range], None] = lambda *_: None
        engine.executor.conductor = self.run

    def run(self, program: Program, calls: tuple[BoundCall, ...]) -> None:
        found = None if program.role == SAMPLER else self._rows(program.role, calls)
        if found is not None:
            self.before(program.role, program.kind, *found)
        for call in calls:
            call.launch()
        if found is not None:
            self.after(program.role, program.kind, *found)

    def _rows(self, role: str, calls: tuple[BoundCall, ...]) -> tuple[list[int], range] | None:
        lane = self.victim.lane
        if lane is None:
            return None
        named = (pair for call in calls for pair in zip(call.node.inputs, call.inputs, strict=True))
        fed = {value.name: tensor.numpy() for value, tensor in named if value is not None and tensor is not None}
        at = np.flatnonzero(fed["page_table"][:, 0] == self.engine.ledger[role].page_table[lane, 0])
        at = at[fed["kv_len"][at] > 0]
        if not at.size:
            return None
        first, last = fed["row_start"][at[0]], fed["row_start"][at[0] + 1]
        return fed["positions"][first:last].tolist(), range(first, last)

    def logits(self) -> Any:
        return self.engine.executor.arrays["logits"]


CALLS = [(TARGET, "prefill"), (TARGET, "decode"), (DRAFT, "prefill"), (DRAFT, "decode")]


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize(("role", "kind"), CALLS)
def test_a_kernel_that_raises_for_one_sequence_ends_that_sequence(
    role: str, kind: str, draft: str, victim: int
) -> None:
    if role == DRAFT and draft != "model":
        return
    engine, wanted = engine_for(draft), requests()
    sequences = [engine.add(one) for one in wanted]
    planted = Planted(engine, sequences[victim])

    def fail(at_role: str, at_kind: str, positions: list[int], rows: range) -> None:
        if (at_role, at_kind) == (role, kind) and (kind == "prefill" or len(planted.victim.tokens) > PROMPT + 4):
            raise FloatingPointError("planted")

    planted.before = fail
    assert_only_victim_failed(engine, wanted, sequences, victim)
    assert "FloatingPointError: planted" in str(sequences[victim].error)


@given(
    st.sampled_from(sorted(DRAFTS)),
    st.integers(0, 2),
    st.integers(PROMPT + 1, PROMPT + NEW),
    st.sampled_from([np.nan, np.inf]),
    st.integers(1, 5),
    st.sampled_from(["coupled", "rejection"]),
)
@settings(max_examples=40)
def test_a_row_that_is_not_finite_ends_its_sequence_with_exactly_the_tokens_before_it(
    draft: str, victim: int, position: int, value: float, speculate: int, acceptance: str
) -> None:
    # Whatever drafts stood around it: the row is spoilt by its position, and what comes before stands. With rejection
    # only greedy tokens can be told in advance.
    engine = engine_for(draft, speculate=speculate, acceptance=acceptance)
    wanted = requests() if acceptance == "coupled" else requests(temperature=0.0)
    sequences = [engine.add(one) for one in wanted]
    planted = Planted(engine, sequences[victim])

    def spoil(role: str, kind: str, positions: list[int], rows: range) -> None:
        if role == TARGET and position in positions:
            planted.logits()[rows[positions.index(position)] if kind == "decode" else 0, 3] = value

    planted.after = spoil
    expected = alone(MODEL, wanted[victim]).token_ids
    before = position - len(wanted[victim].prompt_ids) + 1
    if 0 <= before < len(expected):
        assert_only_victim_failed(engine, wanted, sequences, victim)
        assert sequences[victim].completion().token_ids == expected[:before]
        assert "finite" in str(sequences[victim].error)


def test_a_row_that_is_not_finite_behind_a_stop_is_no_error() -> None:
    plain = alone(MODEL, requests()[0]).token_ids
    stop_at = next(n for n in range(4, NEW) if plain[n] not in plain[:n])
    one = request(prompt_of(PROMPT, 0), NEW, seed=0, stop_token_ids=[plain[stop_at]])
    engine = tiny_engine(MODEL, MODEL, share_prefixes=False, adaptive=False, speculate=6)
    sequence = engine.add(one)
    planted = Planted(engine, sequence)

    def spoil(role: str, kind: str, positions: list[int], rows: range) -> None:
        for position, row in zip(positions, rows, strict=True):
            if role == TARGET and kind == "decode" and position >= PROMPT + stop_at:
                planted.logits()[row] = np.nan

    planted.after = spoil
    finish(engine)
    assert outcome(sequence.completion()) == outcome(alone(MODEL, one))
    assert sequence.completion().finish_reason == "stop"
    assert_all_returned(engine)


def test_drafts_that_are_not_finite_end_their_sequence() -> None:
    engine, wanted = engine_for("model"), requests()
    sequences = [engine.add(one) for one in wanted]
    planted = Planted(engine, sequences[1])

    def spoil(role: str, kind: str, positions: list[int], rows: range) -> None:
        if role == DRAFT and kind == "decode":
            planted.logits()[rows[0] : rows[-1] + 1] = np.nan

    planted.after = spoil
    assert_only_victim_failed(engine, wanted, sequences, 1)
    assert "draft model" in str(sequences[1].error)


@pytest.mark.parametrize("kind", ["greedy", "sample", "accept", "draft loop"])
def test_a_call_that_fails_once_and_works_when_repeated_fails_nobody(kind: str) -> None:
    # One draft each, so that one call holds them all: what fails alone is not tried again.
    engine, wanted = engine_for("model", speculate=1), requests(3, temperature=0.0 if kind == "greedy" else 0.8)
    sequences = [engine.add(one) for one in wanted]
    while any(sequence.state != "decode" for sequence in sequences):
        engine.step()
    original, original_loop, failures = engine.executor.run, engine.executor.run_loop, []

    def fail_once(role: str, at_kind: str, rows: int) -> None:
        if at_kind == kind and not failures:
            failures.append(kind)
            raise RuntimeError("once")
        original(role, at_kind, rows)

    def fail_loop_once(loop: DraftLoop, rounds: int) -> None:
        original_loop(loop, rounds)
        if kind == "draft loop" and not failures:
            failures.append(kind)
            raise RuntimeError("once")

    engine.executor.run = fail_once  # type: ignore[method-assign]
    engine.executor.run_loop = fail_loop_once  # type: ignore[method-assign]
    finish(engine)
    assert failures
    assert [outcome(s.completion()) for s in sequences] == [outcome(alone(MODEL, one)) for one in wanted]


@pytest.mark.parametrize("after", [0, 1, 4, 6])
@pytest.mark.parametrize("role", [TARGET, DRAFT])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_pool_that_gives_one_sequence_no_page_ends_that_sequence(role: str, after: int, victim: int) -> None:
    engine, wanted = engine_for("model"), requests()
    sequences = [engine.add(one) for one in wanted]
    pool = engine.ledger[role].pool
    take, taken = pool.take, []

    def take_but_not_for_one(lane: int, ordinal: int) -> int:
        if lane == sequences[victim].lane:
            taken.append(ordinal)
            if len(taken) > after:
                raise OutOfPages("planted")
        return take(lane, ordinal)

    pool.take = take_but_not_for_one  # type: ignore[method-assign]
    finish(engine)
    del pool.take  # type: ignore[method-assign]
    assert_only_victim_failed(engine, wanted, sequences, victim)
    assert "OutOfPages: planted" in str(sequences[victim].error)


@given(st.sampled_from(sorted(DRAFTS)), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 16)), max_size=5))
@settings(max_examples=30)
def test_cancelling_at_any_point_leaves_the_others_alone(draft: str, cancels: list[tuple[int, int]]) -> None:
    # Two lanes and a small pool: at any step there are requests that wait, prefill, decode or have ended.
    options: dict[str, Any] = {"max_sequences": 2, "capacity": 30, "pages": 14, "prefill_chunk": 4}
    engine = tiny_engine(MODEL, DRAFTS[draft], adaptive=False, **options)
    wanted = requests(5)
    sequences = [engine.add(one) for one in wanted]
    for step in range(200):
        for who, when in cancels:
            if when == step:
                engine.cancel(sequences[who])
                engine.cancel(sequences[who])
        if engine.is_idle:
            break
        engine.step()
    assert_all_returned(engine)
    for i, sequence in enumerate(sequences):
        completion = sequence.completion()
        expected = alone(MODEL, wanted[i], prefill_chunk=4, capacity=30)
        if completion.finish_reason == "cancelled":
            assert i in {who for who, _ in cancels}
            assert completion.token_ids == expected.token_ids[: len(completion.token_ids)]
        else:
            assert outcome(completion) == outcome(expected)


def test_cancelling_one_that_has_ended_keeps_how_it_ended() -> None:
    engine = engine_for("ngram")
    sequence = engine.add(requests()[0])
    finish(engine)
    before: Completion = sequence.completion()
    engine.cancel(sequence)
    assert sequence.completion() == before
    assert before.finish_reason == "length"


def test_pages_that_a_failed_sequence_filled_are_not_shared() -> None:
    # The cache itself is spoilt once, in the first of three chunks; a retry must not find those pages.
    engine = tiny_engine(MODEL, page_size=3, prefill_chunk=6)
    one = request(prompt_of(17), NEW)
    first = engine.add(one)
    planted = Planted(engine, first)

    def spoil(role: str, kind: str, positions: list[int], rows: range) -> None:
        if 2 in positions:
            slot = int(engine.ledger[role].slots(first.lane or 0, 2, 3)[0])
            engine.executor.caches[role]["kv0.v"][slot] = np.nan

    planted.after = spoil
    finish(engine)
    assert first.finish_reason == "error"
    second = engine.add(one)
    finish(engine)
    assert outcome(second.completion()) == outcome(alone(MODEL, one, prefill_chunk=6))
    assert_all_returned(engine)


def test_a_fault_names_its_sequence_and_keeps_its_cause() -> None:
    engine, wanted = engine_for("none"), requests()
    sequences = [engine.add(one) for one in wanted]
    planted = Planted(engine, sequences[2])
    cause = ValueError("planted")

    def fail(role: str, kind: str, positions: list[int], rows: range) -> None:
        raise cause

    planted.before = fail
    finish(engine)
    error = sequences[2].error
    assert isinstance(error, SequenceFault)
    assert error.__cause__ is cause
    assert "sequence 2" in str(error)
