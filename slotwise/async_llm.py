"""The Python API for asyncio: the same model, whose answers are awaited.

Owns `AsyncLLM` and `AsyncStream`. What always holds: the event loop never waits for the engine, which steps on one
worker thread, where prompts are made into tokens too; requests of all tasks share its steps, each with the tokens that
it would have alone; a task that is cancelled, and a stream that is closed or dropped, gives its slots back.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar, overload

from slotwise.core.errors import OptionError, RequestError, SlotwiseError
from slotwise.engine.request import Chunk, Completion, Request
from slotwise.engine.sampling import Sampling
from slotwise.engine.sequence import Sequence as Running
from slotwise.keywords import known_keywords
from slotwise.llm import LLM, Messages
from slotwise.models.tokenizer import Tokenizer
from slotwise.requests import Prompt, Samplings, by_prompt, each_completion, refused
from slotwise.sharing import SharedEngine

Found = TypeVar("Found")
Job = Callable[[], None]


class AsyncLLM:
    """A model to be asked from asyncio, by any number of tasks at once.

    `await AsyncLLM.load(model, ...)` takes what `LLM` takes; `AsyncLLM(llm)` serves a model that is loaded already,
    which may be used beside it. Both are async context managers. Every method raises what the `LLM`'s does.
    """

    def __init__(self, llm: LLM) -> None:
        if not isinstance(llm, LLM):
            raise OptionError(
                f"AsyncLLM serves a slotwise.LLM, found {llm!r:.80}; `await AsyncLLM.load(folder)` loads one"
            )
        self._llm = llm
        self._requests = llm.requests
        self._is_owner = False
        self._worker = _Worker(llm._engine)
        # Dropped without a word, it takes its thread along.
        weakref.finalize(self, self._worker.leave).atexit = False

    @classmethod
    async def load(cls, model: str | Path, **options: Any) -> AsyncLLM:
        """Load a model on another thread; options and errors are those of `LLM`. Closing closes the model too."""
        found = cls(await asyncio.to_thread(LLM, model, **options))
        found._is_owner = True
        return found

    @property
    def llm(self) -> LLM:
        """The model itself."""
        return self._llm

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._llm.tokenizer

    @overload
    async def generate(  # type: ignore[overload-overlap]
        self, prompts: Prompt, sampling: Sampling | None = None
    ) -> Completion: ...

    @overload
    async def generate(self, prompts: Sequence[Prompt], sampling: Samplings = None) -> list[Completion]: ...

    @known_keywords
    async def generate(self, prompts: Any, sampling: Samplings = None) -> Completion | list[Completion]:
        """Complete one prompt or several, as `LLM.generate` does."""
        single, asked = self._requests.asked(prompts, sampling)
        wanted = each_completion(asked)
        answers = [_Answer(self._worker, self._request(*each)) for each in wanted]
        found: list[Completion] = []
        try:
            for answer, (_, each) in zip(answers, wanted, strict=True):
                try:
                    found.append(await answer.completion())
                except SlotwiseError as error:
                    if single:
                        raise
                    found.append(refused(error, each))
        finally:
            for answer in answers:
                answer.close()
        if single and found[0].error is not None:
            raise found[0].error
        found = by_prompt(asked, found)
        return found[0] if single else found

    @known_keywords
    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> AsyncStream:
        """Complete one prompt piece by piece, as `LLM.stream` does; to be called where an event loop runs.

        The request begins at once; what is wrong with it is raised where the first piece is awaited.
        """
        request = self._request(prompt, self._requests.for_stream(sampling))
        return AsyncStream(self, _Answer(self._worker, request, in_pieces=True))

    @known_keywords
    async def chat(self, messages: Messages, sampling: Sampling | None = None, **options: Any) -> Completion:
        """Complete a conversation, as `LLM.chat` does."""
        prompt = await self._worker.call(lambda: self._llm.chat_prompt(messages, **options))
        return await self.generate(prompt, sampling)

    @known_keywords
    def stream_chat(self, messages: Messages, sampling: Sampling | None = None, **options: Any) -> AsyncStream:
        """`chat`, piece by piece."""

        def request() -> Request:
            return self._requests.request(
                self._llm.chat_prompt(messages, **options), self._requests.for_stream(sampling)
            )

        return AsyncStream(self, _Answer(self._worker, request, in_pieces=True))

    async def ledger(self, steps: int = 3) -> str:
        """See `LLM.ledger`."""
        return await self._worker.call(lambda: self._llm.ledger(steps))

    async def aclose(self) -> None:
        """End all requests, which come back as `cancelled`, and the worker thread; harmless when done before.

        A model that `load` loaded is closed too. What is asked afterwards raises RequestError.
        """
        await asyncio.to_thread(self._worker.close)
        if self._is_owner:
            await asyncio.to_thread(self._llm.close)

    def _request(self, prompt: Prompt, sampling: Sampling) -> Callable[[], Request]:
        """Makes the request; called by the worker, for a long prompt takes a while to encode."""
        return lambda: self._requests.request(prompt, sampling)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class AsyncStream(AsyncIterator[Chunk]):
    """The chunks of one request; the last has the `completion`. Raises the request's error where it happens.

    Leaving it in an `async with`, `aclose`, dropping it, and cancelling the task that awaits a piece end the request.
    """

    def __init__(self, llm: AsyncLLM, answer: _Answer) -> None:
        self._llm = llm  # whose thread serves as long as anyone holds it
        self._answer = answer

    async def __anext__(self) -> Chunk:
        """Wait until there is something new."""
        if self._answer.is_over:
            raise StopAsyncIteration
        chunk = await self._answer.next()
        if chunk.completion is not None and chunk.completion.error is not None:
            raise chunk.completion.error
        return chunk

    async def aclose(self) -> None:
        """Cancel the request if it is still running; harmless afterwards."""
        self._answer.close()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._answer.close()

    def __del__(self) -> None:
        self._answer.close()


class _Answer:
    """One request on its way: made and queued by the worker, heard of in the event loop that asked.

    `request` makes it. Only the event loop's thread calls the public methods, but for `close`, which any may.
    """

    def __init__(self, worker: _Worker, request: Callable[[], Request], *, in_pieces: bool = False) -> None:
        self.is_over = False
        self.in_pieces = in_pieces
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Chunk | Exception] = asyncio.Queue()
        worker.submit(lambda: worker.start(self, request))

    async def next(self) -> Chunk:
        """The next piece; ends the request when the task is cancelled meanwhile."""
        try:
            found = await self._arrived.get()
        except BaseException:
            self.close()
            raise
        if isinstance(found, Exception):
            self.is_over = True
            raise found
        self.is_over = found.completion is not None
        return found

    async def completion(self) -> Completion:
        """The end of it."""
        while True:
            completion = (await self.next()).completion
            if completion is not None:
                return completion

    def close(self) -> None:
        """End the request before the next step, unless it has ended."""
        if not self.is_over:
            self.is_over = True
            self._worker.drop(self)

    def deliver(self, found: Chunk | Exception) -> bool:
        """Called by the worker; False when nobody can hear of it, for the event loop has ended."""
        try:
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, found)
        except RuntimeError:
            return False
        return True


class _Worker:
    """The thread that makes requests and steps the engine while any of them runs.

    What others ask of it are jobs, done in order between steps. It begins with the first of them.
    """

    def __init__(self, engine: SharedEngine) -> None:
        self._engine = engine
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._running: dict[_Answer, Running] = {}
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def submit(self, job: Job) -> None:
        """Have a job done before the next step; raises RequestError once closed."""
        with self._guard:
            if self._is_closed:
                raise RequestError("this AsyncLLM was closed; make another to ask the model")
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="slotwise-async", daemon=True)
                self._thread.start()
            self._jobs.put(job)

    async def call(self, function: Callable[[], Found]) -> Found:
        """What `function` returns or raises, on the worker's thread."""
        outcome: Future[Found] = Future()

        def job() -> None:
            if outcome.set_running_or_notify_cancel():
                try:
                    outcome.set_result(function())
                except Exception as error:
                    outcome.set_exception(error)

        self.submit(job)
        return await asyncio.wrap_future(outcome)

    def start(self, answer: _Answer, request: Callable[[], Request]) -> None:
        """Queue the request that is behind an answer; a job."""
        if not answer.is_over:
            try:
                self._running[answer] = self._engine.add(request())
            except Exception as error:
                answer.deliver(error)

    def drop(self, answer: _Answer) -> None:
        """End an answer's request before the next step; may be called at any time, by a finaliser too."""
        self._jobs.put(lambda: self._end(answer))

    def leave(self) -> None:
        """Have the thread end all requests, then itself; may be called by a finaliser."""
        self._jobs.put(None)

    def close(self) -> None:
        """`leave`, and wait for it; nothing can be submitted afterwards."""
        with self._guard:
            self._is_closed = True
            thread = self._thread
        self.leave()
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            while not self._jobs.empty() or not self._running:
                job = self._jobs.get()
                if job is None:
                    with contextlib.suppress(Exception):  # a broken engine tells it in the step
                        self._engine.cancel(self._running.values())
                    self._step()
                    return
                job()
                del job  # which would keep alive who asked, while this thread waits
            self._step()

    def _step(self) -> None:
        """One step; every answer hears what is new of it, or what the step failed with."""
        answers = list(self._running.items())
        try:
            chunks = self._engine.advance([sequence for _, sequence in answers])
        except Exception as error:
            for answer, _ in answers:
                self._end(answer)
                answer.deliver(error)
            return
        for (answer, _), chunk in zip(answers, chunks, strict=True):
            if chunk is None or not (answer.in_pieces or chunk.completion):
                continue
            if chunk.completion is not None:
                del self._running[answer]
            if not answer.deliver(chunk):
                self._end(answer)

    def _end(self, answer: _Answer) -> None:
        sequence = self._running.pop(answer, None)
        if sequence is not None:
            with contextlib.suppress(Exception):  # a broken engine is told of by the next step; the thread must go on
                self._engine.cancel([sequence])
