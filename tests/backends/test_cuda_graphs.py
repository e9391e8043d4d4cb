"""Launches become one CUDA graph: captured once, at load, and replayed. A recorder stands in for the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

from slotwise.backends._gpu import graphs as graphs


class Recorder:
    """What CUDA does between the start and the end of a capture: launches are noted down, not run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.ran: list[str] = []
        self._noting: list[str] | None = None
        recorder = self

        class Graph:
            def __init__(self) -> None:
                self.noted: list[str] = []

            def replay(self) -> None:
                recorder.ran.extend(self.noted)

        class Stream:
            def wait_stream(self, other: object) -> None:
                recorder.events.append("wait")

        @contextlib.contextmanager
        def capture(graph: Graph, pool: object) -> Iterator[None]:
            recorder.events.append("capture")
            recorder._noting = graph.noted
            yield
            recorder._noting = None

        graphs._pool.cache_clear()
        for name, value in (
            ("is_available", lambda: True),
            ("Stream", Stream),
            ("current_stream", Stream),
            ("stream", lambda stream: contextlib.nullcontext()),
            ("CUDAGraph", Graph),
            ("graph", capture),
            ("graph_pool_handle", lambda: "pool"),
        ):
            monkeypatch.setattr(torch.cuda, name, value)

    def launch(self, name: str) -> Callable[[], None]:
        def called() -> None:
            self.events.append(name)
            (self.ran if self._noting is None else self._noting).append(name)

        return called


def test_launches_run_once_outside_the_capture_and_are_then_replayed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    launch = graphs.chain([recorder.launch("a"), recorder.launch("b")], None)
    # What is not compiled yet compiles in the first run: a capture must not see that.
    assert recorder.events == ["wait", "a", "b", "wait", "capture", "a", "b"]
    assert recorder.ran == ["a", "b"]
    recorder.events.clear()
    for _ in range(3):
        launch()
    assert recorder.ran == ["a", "b"] * 4
    assert recorder.events == [], "a replay calls nothing on the host"
    graphs._pool.cache_clear()


def test_without_a_gpu_launches_run_one_after_another() -> None:
    ran: list[str] = []
    launch = graphs.chain([lambda: ran.append("a"), lambda: ran.append("b")], None)
    assert ran == [], "nothing runs before it is asked for"
    launch()
    launch()
    assert ran == ["a", "b", "a", "b"]
