"""A closed model has freed its memory and threads, has ended what ran, and says so to whoever asks it again."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from slotwise import LLM, RequestError, Sampling
from slotwise.backends.numba_cpu.threads import _pools

STORY = "Once upon a time"
SHORT = Sampling(max_new_tokens=4)
LONG = Sampling(max_new_tokens=150, ignore_eos=True)


@pytest.fixture
def model(stories: Path) -> LLM:
    """A model of the test's own."""
    return LLM(stories, capacity=192, max_sequences=2, threads=1)


def test_closing_frees_the_engine_and_all_its_tensors(model: LLM) -> None:
    model.generate(STORY, SHORT)
    engine = weakref.ref(model.engine)
    tensors = [
        weakref.ref(model.engine.executor.arena),
        *map(weakref.ref, model.engine.executor.weights["target"].values()),
    ]
    model.close()
    assert engine() is None
    assert [tensor() for tensor in tensors] == [None] * len(tensors)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_closing_ends_the_threads_that_the_model_brought(stories: Path) -> None:
    known = set(threading.enumerate())
    with LLM(stories, capacity=64, max_sequences=1, threads=2, overlap=True) as model:
        model.generate(STORY, SHORT)
        ours = set(threading.enumerate()) - known
        pools = list(_pools)
    if 2 in pools:  # where there are two cores
        assert "slotwise-cpu-1" in {thread.name for thread in ours}
        assert 2 not in _pools
    assert ours
    for thread in ours:
        thread.join(30)
        assert not thread.is_alive()


ASKING: list[tuple[str, Callable[[LLM], object]]] = [
    ("generate", lambda llm: llm.generate(STORY)),
    ("stream", lambda llm: llm.stream(STORY)),
    ("logits", lambda llm: llm.logits([5, 6])),
    ("ledger", lambda llm: llm.ledger()),
    ("record", lambda llm: llm.record("nowhere.jsonl").__enter__()),
    ("engine", lambda llm: llm.engine),
]


def test_a_closed_model_refuses_what_needs_its_memory_and_answers_the_rest(model: LLM, tmp_path: Path) -> None:
    with model as entered:
        assert entered is model
    model.close()
    for name, ask in ASKING:
        with pytest.raises(RequestError, match="this model was closed") as caught:
            ask(model)
        assert "load it again" in str(caught.value), name
    with pytest.raises(RequestError, match="this model was closed"), model:
        pass
    several = model.generate([STORY, "The dog"])
    assert [each.finish_reason for each in several] == ["error", "error"]
    assert model.plan().target.model == "stories"
    assert model.tokenizer.decode(model.tokenizer.encode(STORY)).endswith(STORY)


def test_a_model_that_is_left_with_an_error_is_closed(model: LLM) -> None:
    with pytest.raises(ZeroDivisionError), model:
        raise ZeroDivisionError
    with pytest.raises(RequestError, match="this model was closed"):
        model.generate(STORY)


def test_streams_end_as_cancelled(model: LLM) -> None:
    streams = [model.stream(STORY, LONG) for _ in range(3)]  # two run, one waits
    next(streams[0])
    dropped = streams.pop()
    model.close()
    del dropped
    for stream in streams:
        assert list(stream)[-1].finish_reason == "cancelled"
        stream.close()


def test_another_thread_gets_what_it_had(model: LLM) -> None:
    started, found = threading.Event(), []

    def ask() -> None:
        stream = model.stream(STORY, LONG)
        next(stream)
        started.set()
        found.extend(model.generate([STORY, "The dog"], LONG))
        found.append(list(stream)[-1].completion)

    thread = threading.Thread(target=ask)
    thread.start()
    assert started.wait(60)
    model.close()
    thread.join(60)
    assert not thread.is_alive()
    # Those that had begun were cancelled; one that came too late was refused.
    assert {each.finish_reason for each in found} <= {"cancelled", "error"}
    assert found[-1].finish_reason == "cancelled"
    assert len(found[-1].token_ids) >= 1


def test_closing_waits_for_a_step_that_runs_beside_python(stories: Path) -> None:
    model = LLM(stories, capacity=192, max_sequences=1, threads=1, overlap=True)
    stream = model.stream(STORY, LONG)
    for _ in range(3):
        next(stream)
    assert model.engine._flight is not None
    model.close()
    assert list(stream)[-1].finish_reason == "cancelled"
