"""AsyncLLM gives what LLM gives, to many tasks at once; the event loop runs meanwhile, and who leaves keeps no slot."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from slotwise import LLM, AsyncLLM, CheckpointError, Completion, OptionError, RequestError, Sampling
from slotwise.engine.engine import Engine

STORY = "Once upon a time"
SHORT = Sampling(max_new_tokens=12)
LONG = Sampling(max_new_tokens=150, ignore_eos=True)
PROMPTS = [STORY, "The dog", "A cat", "One day", "Lily and", "Tom was", "It was", "The sun"]


def served(llm: LLM, use: Callable[[AsyncLLM], Coroutine[Any, Any, None]]) -> None:
    """Run `use` in an event loop of its own; afterwards no slot is held and nothing waits."""

    async def main() -> None:
        async with AsyncLLM(llm) as model:
            await use(model)
            held = re.findall(r"held (\d+)", await model.ledger(0))
            assert set(held) == {"0"}

    asyncio.run(asyncio.wait_for(main(), 120))
    engine = llm.engine
    assert engine.is_idle
    engine.ledger.check(engine.epoch)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_many_tasks_share_steps_and_each_gets_its_own_tokens(drafting: LLM) -> None:
    expected = [drafting.generate(prompt, SHORT) for prompt in PROMPTS]

    async def use(model: AsyncLLM) -> None:
        before = drafting.engine.epoch
        found = await asyncio.gather(*(model.generate(prompt, SHORT) for prompt in PROMPTS))
        steps = drafting.engine.epoch - before
        assert [(each.token_ids, each.text) for each in found] == [(each.token_ids, each.text) for each in expected]
        assert steps < sum(each.stats.verifications for each in expected)

    served(drafting, use)


def test_a_list_of_prompts_comes_back_in_order_and_a_bad_one_is_its_own(llm: LLM) -> None:
    expected = llm.generate([STORY, [5] * 300, "The dog"], SHORT)

    async def use(model: AsyncLLM) -> None:
        found = await model.generate([STORY, [5] * 300, "The dog"], SHORT)
        assert [each.token_ids for each in found] == [each.token_ids for each in expected]
        assert [each.finish_reason for each in found] == [each.finish_reason for each in expected]
        assert "the prompt has 300 tokens" in str(found[1].error)
        with pytest.raises(RequestError, match="the prompt has 300 tokens"):
            await model.generate([5] * 300)
        with pytest.raises(RequestError, match="prompts must be text"):
            await model.generate(7)  # type: ignore[call-overload]
        with pytest.raises(OptionError, match=r"has no keyword 'samplng' \(did you mean 'sampling'\?\)"):
            await model.generate(STORY, samplng=SHORT)  # type: ignore[call-overload]

    served(llm, use)


def test_n_completions_of_a_task_are_those_of_the_model(llm: LLM) -> None:
    sampling = Sampling(max_new_tokens=5, temperature=3.0, seed=7, n=3)
    expected = [llm.generate("Once", sampling), llm.generate("There", sampling)]

    def all_of(completion: Completion) -> list[tuple[int, ...]]:
        return [each.token_ids for each in (completion, *completion.alternatives)]

    async def use(model: AsyncLLM) -> None:
        assert all_of(await model.generate("Once", sampling)) == all_of(expected[0])
        several = await model.generate(["Once", "There"], sampling)
        assert [all_of(each) for each in several] == [all_of(each) for each in expected]
        with pytest.raises(OptionError, match="n: a stream has one completion"):
            model.stream("Once", sampling)

    assert len(set(all_of(expected[0]))) > 1
    served(llm, use)


def test_chunks_join_to_the_completion(drafting: LLM) -> None:
    expected = drafting.generate(STORY, SHORT)

    async def use(model: AsyncLLM) -> None:
        stream = model.stream(STORY, SHORT)
        chunks = [chunk async for chunk in stream]
        last = chunks[-1].completion
        assert last is not None
        assert all(chunk.completion is None for chunk in chunks[:-1])
        assert len(chunks) > 1
        assert "".join(chunk.text for chunk in chunks) == last.text == expected.text
        assert last.token_ids == expected.token_ids
        assert [chunk async for chunk in stream] == []
        await stream.aclose()

    served(drafting, use)


def test_a_stream_raises_what_is_wrong_with_its_request(llm: LLM) -> None:
    async def use(model: AsyncLLM) -> None:
        stream = model.stream([5, 2048], SHORT)
        with pytest.raises(RequestError, match="token id 2048"):
            await stream.__anext__()
        assert [chunk async for chunk in stream] == []

    served(llm, use)


def test_conversations_are_rendered_by_the_template(talkative: Path) -> None:
    messages = [{"role": "user", "content": "Tell me a story"}]

    async def main() -> None:
        async with await AsyncLLM.load(talkative, capacity=96, max_sequences=2, threads=1) as model:
            expected = await asyncio.to_thread(model.llm.chat, messages, SHORT)
            assert (await model.chat(messages, SHORT)).token_ids == expected.token_ids
            chunks = [chunk async for chunk in model.stream_chat(messages, SHORT)]
            assert "".join(chunk.text for chunk in chunks) == expected.text
            with pytest.raises(RequestError):
                await model.chat([{"content": 3}], SHORT)
            with pytest.raises(RequestError):
                await model.stream_chat([{"content": 3}], SHORT).__anext__()
            assert model.tokenizer.decode(model.tokenizer.encode(STORY)).endswith(STORY)
            for method in (model.chat, model.stream_chat):
                with pytest.raises(OptionError, match=r"sampling=slotwise\.Sampling\(max_new_tokens=\.\.\.\)"):
                    method(messages, max_tokens=3)
                with pytest.raises(OptionError, match="'tokenize' has no meaning when generating"):
                    method(messages, tokenize=True)

    asyncio.run(main())


def test_what_cannot_be_loaded_is_raised_where_it_is_awaited(tmp_path: Path, stories: Path) -> None:
    async def main() -> None:
        with pytest.raises(CheckpointError, match="nowhere"):
            await AsyncLLM.load(tmp_path / "nowhere")
        with pytest.raises(OptionError, match=r"LLM has no keyword 'capcity' \(did you mean 'capacity'\?\)"):
            await AsyncLLM.load(stories, capcity=64)
        with pytest.raises(OptionError, match=r"serves a slotwise\.LLM, found '.*'; `await AsyncLLM\.load\(folder\)`"):
            AsyncLLM(str(stories))  # type: ignore[arg-type]

    asyncio.run(main())


# Ends


async def is_over(model: AsyncLLM) -> bool:
    return set(re.findall(r"held (\d+)", await model.ledger(0))) == {"0"} and model.llm.engine.is_idle


def test_cancelling_a_task_ends_its_request_and_no_other(drafting: LLM) -> None:
    expected = drafting.generate("The dog", LONG)

    async def use(model: AsyncLLM) -> None:
        tasks = [asyncio.create_task(model.generate(prompt, LONG)) for prompt in (STORY, "The dog")]
        await until(lambda: drafting.engine.roster.decoding)
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        assert (await tasks[1]).token_ids == expected.token_ids
        assert await is_over(model)

    served(drafting, use)


def test_a_task_that_is_cancelled_at_once_asks_nothing(llm: LLM) -> None:
    async def use(model: AsyncLLM) -> None:
        task = asyncio.create_task(model.generate([STORY] * 20, LONG))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await is_over(model)

    served(llm, use)


def test_a_time_limit_ends_the_request(llm: LLM) -> None:
    async def use(model: AsyncLLM) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(model.generate([STORY] * 8, LONG), 0.01)
        assert await is_over(model)

    served(llm, use)


async def leave_early(model: AsyncLLM, how: str) -> None:
    """Take one piece of a stream, then end it in one of several ways."""
    stream = model.stream(STORY, LONG)
    await stream.__anext__()
    if how == "closed":
        await stream.aclose()
        assert [chunk async for chunk in stream] == []
    elif how == "left":
        async with stream:
            pass
    elif how == "dropped":
        del stream
        gc.collect()
    else:

        async def rest() -> None:
            async for _ in stream:
                pass

        task = asyncio.create_task(rest())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("how", ["closed", "left", "dropped", "cancelled"])
def test_a_stream_that_ends_early_returns_its_slots(llm: LLM, how: str) -> None:
    async def use(model: AsyncLLM) -> None:
        await leave_early(model, how)
        assert await is_over(model)

    served(llm, use)


def test_the_event_loop_runs_while_the_engine_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed, step, threads = threading.Event(), Engine.step, set[str]()

    def waits(self: Engine) -> object:
        threads.add(threading.current_thread().name)
        assert allowed.wait(60)
        return step(self)

    async def use(model: AsyncLLM) -> None:
        task = asyncio.create_task(model.generate(STORY, SHORT))
        await until(lambda: threads)  # the engine is in its step now, and cannot leave it
        for _ in range(100):
            await asyncio.sleep(0)
        assert not task.done()
        allowed.set()
        assert (await task).finish_reason == "length"

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", waits)
        served(llm, use)
    assert threads == {"slotwise-async"}


def test_threads_and_tasks_share_a_model(llm: LLM) -> None:
    expected = [llm.generate(prompt, SHORT).token_ids for prompt in PROMPTS]

    async def use(model: AsyncLLM) -> None:
        tasks: list[Awaitable[Completion]] = [model.generate(prompt, SHORT) for prompt in PROMPTS[:4]]
        tasks += [asyncio.to_thread(llm.generate, prompt, SHORT) for prompt in PROMPTS[4:]]
        assert [each.token_ids for each in await asyncio.gather(*tasks)] == expected

    served(llm, use)


def test_a_step_that_fails_is_told_to_all_who_wait_and_the_thread_goes_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Engine) -> object:
        raise RuntimeError("the books do not balance")

    async def use(model: AsyncLLM) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "step", fails)
            found = await asyncio.gather(*(model.generate(p, SHORT) for p in PROMPTS[:3]), return_exceptions=True)
        assert [str(each) for each in found] == ["the books do not balance"] * 3
        assert (await model.generate(STORY, SHORT)).finish_reason == "length"

    served(llm, use)


def test_closing_ends_what_runs_and_refuses_what_comes(llm: LLM) -> None:
    async def main() -> None:
        model = AsyncLLM(llm)
        task = asyncio.create_task(model.generate(STORY, LONG))
        stream = model.stream("The dog", LONG)
        await stream.__anext__()
        await asyncio.gather(model.aclose(), model.aclose())
        assert (await task).finish_reason == "cancelled"
        last = [chunk async for chunk in stream][-1]
        assert last.finish_reason == "cancelled"
        with pytest.raises(RequestError, match="this AsyncLLM was closed"):
            await model.generate(STORY, SHORT)
        with pytest.raises(RequestError, match="this AsyncLLM was closed"):
            model.stream(STORY, SHORT)

    asyncio.run(main())
    assert llm.engine.is_idle
    assert llm.generate(STORY, SHORT).finish_reason == "length"  # it was lent, and is still there


def test_closing_a_model_that_was_loaded_for_it_frees_it(random_checkpoint: Path) -> None:
    async def main() -> weakref.ref[Engine]:
        async with await AsyncLLM.load(random_checkpoint, max_sequences=2, threads=1) as model:
            await model.generate([1, 2, 3], SHORT)
            engine = weakref.ref(model.llm.engine)
        with pytest.raises(RequestError, match="this model was closed"):
            model.llm.generate([1, 2, 3])
        return engine

    assert asyncio.run(main())() is None


def test_dropping_it_ends_its_thread(llm: LLM) -> None:
    async def main() -> threading.Thread:
        model = AsyncLLM(llm)
        await model.generate(STORY, SHORT)
        thread = model._worker._thread
        assert thread is not None
        return thread

    thread = asyncio.run(main())
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_an_event_loop_that_ends_leaves_no_request_behind(llm: LLM) -> None:
    model = AsyncLLM(llm)

    async def begin() -> object:
        stream = model.stream(STORY, LONG)
        await stream.__anext__()
        return stream  # kept, so that nothing but the loop ends

    stream = asyncio.run(begin())
    asyncio.run(asyncio.wait_for(until(lambda: llm.engine.is_idle), 60))
    assert stream is not None
    asyncio.run(model.aclose())
