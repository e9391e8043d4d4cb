"""One engine that several callers and threads use.

Owns `SharedEngine`. What always holds: one caller at a time touches the engine, in order of asking, so that none
starves; Ctrl-C never lands in the middle of a step; a request that nobody holds any more is cancelled before the next
use, not by the garbage collector, which may run in the middle of a step; once closed, it holds no engine.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch

from slotwise.core.errors import RequestError
from slotwise.engine.engine import Engine
from slotwise.engine.request import Chunk, Request
from slotwise.engine.score import score
from slotwise.engine.sequence import Sequence as Running
from slotwise.progress import Report


class Turns:
    """A lock that is handed on in order of asking. (Python's may go to the same thread again and again.)"""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._is_taken = False

    def __enter__(self) -> None:
        with self._guard:
            if not self._is_taken:
                self._is_taken = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            turn.acquire()
        except BaseException:  # Ctrl-C while waiting: step out of the queue, or pass on what has just been handed over
            with self._guard:
                handed = turn not in self._waiting
                if not handed:
                    self._waiting.remove(turn)
            if handed:
                self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._is_taken = False


class SharedEngine:
    """An engine behind turns."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self._turns = Turns()
        self._abandoned: deque[Running] = deque()

    @property
    def engine(self) -> Engine:
        """The engine itself, for tools that watch it; not to be stepped while anyone else may use it."""
        return self._living()

    def add(self, request: Request) -> Running:
        """Queue a request; raises RequestError, and changes nothing, when it cannot be served at all."""
        added: list[Running] = []
        try:
            with self._turn():
                added.append(self._living().add(request))
        except BaseException:
            # Ctrl-C held back until now: the caller never gets to hold the request, so nobody would end it.
            for sequence in added:
                self.abandon(sequence)
            raise
        return added[0]

    def step(self, sequence: Running, report: Report | None = None) -> Chunk | None:
        """Run one step of everything, unless `sequence` has ended; returns what is new of it, if anything."""
        return self.advance([sequence], report)[0]

    def advance(self, sequences: Sequence[Running], report: Report | None = None) -> list[Chunk | None]:
        """Run one step of everything, unless all of `sequences` have ended; what is new of each, or None."""
        with self._turn():
            if any(sequence.state != "done" for sequence in sequences):
                engine = self._living()
                engine.step()
                if report is not None:
                    report("reading the prompt", *engine.prefill_progress())
            return [sequence.take_chunk() for sequence in sequences]

    def cancel(self, sequences: Iterable[Running]) -> None:
        """End requests at once; harmless for those that have ended."""
        with self._turn():
            if self._engine is not None:  # else all have ended with it
                for sequence in sequences:
                    self._engine.cancel(sequence)

    def abandon(self, sequence: Running) -> None:
        """Have a request cancelled before the next use; may be called at any time, by a finaliser too."""
        self._abandoned.append(sequence)

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """See `slotwise.engine.score`."""
        with self._turn():
            return score(self._living(), token_ids)

    def show_history(self, steps: int) -> str:
        """See `Engine.show_history`."""
        with self._turn():
            return self._living().show_history(steps)

    def close(self) -> None:
        """End all requests and let the engine go; whoever waits for a step finds its request cancelled."""
        with self._turn():
            if self._engine is not None:
                self._engine.close()
                self._engine = None

    def _living(self) -> Engine:
        if self._engine is None:
            raise RequestError("this model was closed, which freed its memory; load it again to ask it")
        return self._engine

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with _uninterrupted(), self._turns:
            while self._abandoned:
                abandoned = self._abandoned.popleft()
                if self._engine is not None:
                    self._engine.cancel(abandoned)
            yield


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the work is whole; a second one goes through. Signals reach the main thread alone."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            handler(number, frame)
        held.append((number, frame))

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(*held[0])
