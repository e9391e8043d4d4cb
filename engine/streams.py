"""Where started work runs while the host goes on.

Owns `Stream` and its two kinds. What always holds: work runs in the order in which it was started, one after another,
and what it raises is raised where its end is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import torch

Work = Callable[[], None]


class Done(Protocol):
    """The end of some work."""

    def wait(self) -> None:
        """Return when the work is done; raise what it raised."""


class Stream(Protocol):
    """Runs work beside the host."""

    def start(self, work: Work) -> Done:
        """Run `work` after all that was started before."""

    def join(self) -> None:
        """Make what the host launches from now on run after all that was started."""


class DeviceStream:
    """The GPU's current stream: work launches, and what it launched runs on. Later launches are in order by nature."""

    def start(self, work: Work) -> Done:
        """See `Stream`."""
        work()
        return _Recorded()

    def join(self) -> None:
        """Nothing to do: there is one stream."""


class _Recorded:
    def __init__(self) -> None:
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()


class ThreadStream:
    """A thread that runs work: what a GPU's stream is, for kernels that run on the thread that calls them."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "slotwise-stream")
        self._last: Future[None] | None = None

    def start(self, work: Work) -> Done:
        """See `Stream`."""
        self._last = self._thread.submit(work)
        return _Waited(self._last)

    def join(self) -> None:
        """Wait for all that was started; what it raised is for whoever waits for that."""
        if self._last is not None:
            wait([self._last])
            self._last = None


class _Waited:
    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()
