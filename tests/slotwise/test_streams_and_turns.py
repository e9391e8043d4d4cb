"""Streams give what `generate` gives, callers take turns, and nothing that ends early keeps a slot.

Early ends: a stream that is closed, left or dropped, and Ctrl-C in a step, between steps or while waiting.
"""

from __future__ import annotations

import gc
import re
import signal
import threading

import pytest

from slotwise import LLM, Sampling
from slotwise.engine.engine import Engine
from slotwise.engine.request import Request
from slotwise.sharing import Turns

STORY = "Once upon a time"
SHORT = Sampling(max_new_tokens=12)


def held_pages(llm: LLM) -> int:
    """Pages that running requests hold, over all roles."""
    return sum(int(count) for count in re.findall(r"held (\d+)", llm.ledger(0)))


def test_chunks_join_to_the_completion(drafting: LLM) -> None:
    chunks = list(drafting.stream(STORY, SHORT))
    last = chunks[-1].completion
    assert last is not None
    assert all(chunk.completion is None for chunk in chunks[:-1])
    assert "".join(chunk.text for chunk in chunks) == last.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == last.token_ids
    assert last.token_ids == drafting.generate(STORY, SHORT).token_ids


def test_an_ended_stream_stays_ended(llm: LLM) -> None:
    stream = llm.stream(STORY, SHORT)
    list(stream)
    assert list(stream) == []
    stream.close()


def test_closing_a_stream_returns_its_slots(llm: LLM) -> None:
    stream = llm.stream(STORY, Sampling(max_new_tokens=100))
    next(stream)
    assert held_pages(llm) > 0
    stream.close()
    assert held_pages(llm) == 0
    assert list(stream) == []


def test_leaving_a_stream_returns_its_slots(llm: LLM) -> None:
    with llm.stream(STORY, Sampling(max_new_tokens=100)) as stream:
        next(stream)
    assert held_pages(llm) == 0


@pytest.mark.parametrize("taken", [0, 1])
def test_a_stream_that_is_dropped_returns_its_slots(llm: LLM, taken: int) -> None:
    stream = llm.stream(STORY, Sampling(max_new_tokens=100))
    for _ in range(taken):
        next(stream)
    del stream
    gc.collect()
    assert held_pages(llm) == 0
    assert llm.engine.is_idle  # nor is it waiting for its turn


def test_interleaved_streams_do_not_touch_each_other(llm: LLM) -> None:
    prompts = (STORY, "The dog")
    streams = [llm.stream(prompt, SHORT) for prompt in prompts]
    texts = ["", ""]
    pending = [0, 1]
    while pending:
        for i in list(pending):
            chunk = next(streams[i], None)
            if chunk is None:
                pending.remove(i)
            else:
                texts[i] += chunk.text
    assert texts == [llm.generate(prompt, SHORT).text for prompt in prompts]


def test_a_stream_and_generate_share_the_engine_from_two_threads(llm: LLM) -> None:
    alone = llm.generate(STORY, SHORT).text
    many = ["The dog", "A cat", "One day"]
    expected = [llm.generate(prompt, SHORT).text for prompt in many]
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.extend(out.text for out in llm.generate(many, SHORT)))
    stream = llm.stream(STORY, SHORT)
    thread.start()
    streamed = "".join(chunk.text for chunk in stream)
    thread.join(60)
    assert streamed == alone
    assert found == expected
    assert held_pages(llm) == 0


def test_callers_take_turns_in_order_of_asking() -> None:
    turns, order = Turns(), list[str]()

    def take(name: str) -> None:
        with turns:
            order.append(name)

    with turns:
        threads = []
        for name in "abc":
            threads.append(threading.Thread(target=take, args=(name,)))
            threads[-1].start()
            while len(turns._waiting) < len(threads):
                pass
    # Asking again at once does not overtake those who wait.
    take("d")
    for thread in threads:
        thread.join(10)
    assert order == ["a", "b", "c", "d"]


def test_an_interrupt_while_waiting_gives_the_turn_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def __init__(self) -> None:
            self.calls = 0

        def acquire(self) -> None:
            self.calls += 1
            if self.calls == 2:  # the wait itself
                raise KeyboardInterrupt

        def release(self) -> None:
            pass

    turns = Turns()
    turns.__enter__()
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Lock", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            turns.__enter__()
    assert not turns._waiting
    turns.__exit__()
    with turns:  # free for the next
        assert turns._is_taken


def interrupt_in_step(llm: LLM, monkeypatch: pytest.MonkeyPatch, times: int) -> list[str]:
    """Have Ctrl-C come `times` times at the beginning of the third step; returns a log of steps that ended."""
    engine, ended = llm.engine, list[str]()
    step = engine.step

    def interrupted() -> object:
        if len(ended) == 2:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        found = step()
        ended.append("step")
        return found

    monkeypatch.setattr(engine, "step", interrupted)
    return ended


def test_an_interrupt_waits_for_the_step_and_leaves_a_model_that_works(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llm.generate(STORY, SHORT).token_ids
    with monkeypatch.context() as patch:
        ended = interrupt_in_step(llm, patch, 1)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([STORY, "The dog"], Sampling(max_new_tokens=50))
    assert len(ended) == 3
    assert held_pages(llm) == 0
    assert llm.generate(STORY, SHORT).token_ids == expected


def test_a_second_interrupt_does_not_wait(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        ended = interrupt_in_step(llm, patch, 2)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(STORY, Sampling(max_new_tokens=50))
    assert len(ended) == 2
    assert held_pages(llm) == 0


def test_an_interrupt_while_a_request_is_queued_leaves_nothing_behind(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Engine.add

    def interrupted(self: Engine, request: Request) -> object:
        sequence = add(self, request)
        signal.raise_signal(signal.SIGINT)
        return sequence

    monkeypatch.setattr(Engine, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(STORY, SHORT)
    monkeypatch.undo()
    assert llm.generate(STORY, SHORT).finish_reason in ("length", "stop")
    assert "lane" not in llm.ledger(0), "a request that nobody holds is still running"
