"""What goes wrong in a step started ahead is its sequence's own, and whatever was under way is computed again."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from slotwise.core.errors import SequenceFault
from slotwise.engine import executor as executor_module
from slotwise.engine import overlap as overlap_module
from slotwise.engine.engine import Engine
from slotwise.engine.sequence import Sequence
from slotwise.engine.streams import ThreadStream
from slotwise.slots.step import TARGET

from .flights import MODEL, NEW, AtOnce, Held, assert_as_alone, decoding, overlapping, requests
from .tiny import alone, assert_all_returned, finish, outcome, prompt_of, request, tiny_engine


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_module, "ThreadStream", Held)


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


@pytest.mark.parametrize("where", ["reading", "starting", "planning"])
def test_an_interrupted_step_is_computed_again(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    engine, wanted = overlapping(), requests()
    sequences = decoding(engine, wanted)
    engine.step()
    owner, name = {
        "reading": (engine.executor, "finish"),
        "starting": (engine.executor, "start"),
        "planning": (engine._binder.planner, "plan"),
    }[where]
    inner = getattr(owner, name)

    def interrupted(*given: Any) -> Any:
        inner(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    finish(engine)
    assert_all_returned(engine)
    assert_as_alone(sequences, wanted)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_interrupted_after_a_stop_generates_nothing_behind_it(
    monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    plain = alone(MODEL, request(prompt_of(6), NEW, logprobs=None)).token_ids
    at = next(n for n in range(4, NEW) if plain[n] not in plain[:n])
    one = request(prompt_of(6), NEW, logprobs=None, stop_token_ids=[plain[at]])
    engine = tiny_engine(MODEL, overlap=overlap)
    (sequence,) = decoding(engine, [one])
    take_in = engine.roster.take_in

    def interrupted(given: Sequence, before: int) -> None:
        if given.finish_reason is not None:
            raise KeyboardInterrupt
        take_in(given, before)

    monkeypatch.setattr(engine.roster, "take_in", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finish(engine)
    monkeypatch.undo()
    finish(engine)
    assert_all_returned(engine)
    assert outcome(sequence.completion()) == outcome(alone(MODEL, one))


def test_nobody_is_overtaken_where_a_flight_fails() -> None:
    engine = overlapping(capacity=30, pages=13, page_size=3, share_prefixes=False)
    (old,) = decoding(engine, [request(prompt_of(6), 20, logprobs=None)])
    Failing(engine, reaching(engine, old, 12), times=1)
    young = engine.add(request(prompt_of(14, 1), 14, logprobs=None))
    while not engine.is_idle:
        engine.step()
        assert old.state == "done" or young.lane is None or old.lane is not None
    assert_as_alone([old, young], [old.request, young.request])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_goes_on_with_a_thread_of_its_own() -> None:
    engine, wanted = overlapping(), requests()
    sequences = decoding(engine, wanted)
    engine.step()
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            finish(engine)
            assert_as_alone(sequences, wanted)
            code = 0
        os._exit(code)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child did not end")
    assert os.waitstatus_to_exitcode(status) == 0
    finish(engine)
    assert_as_alone(sequences, wanted)


def test_a_step_that_could_not_be_started_ahead_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, wanted = overlapping(), requests()
    monkeypatch.setattr(overlap_module, "_places", lambda lanes, chosen: np.zeros(chosen.size, np.int64))
    sequences = decoding(engine, wanted)
    engine.step()
    engine.step()
    assert "a step that was started ahead failed and was run again: VerificationError" in engine.show_history()
    finish(engine)
    assert_as_alone(sequences, wanted)
