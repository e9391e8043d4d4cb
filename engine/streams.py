"""Where started work runs while the host goes on.

Owns `Stream` and its two kinds. What always holds: work runs in the order in which it was started, one after another,
and what it raises is raised where its end is waited for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import torch

from slotwise.core.errors import SlotwiseError

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
    """The GPU's current stream: work launches, and what it launched runs on. Later launches are in order by nature.

    Where another stream has become the current one (in another thread, say) it first waits for the last.
    """

    def __init__(self) -> None:
        self._last: Any = None

    def start(self, work: Work) -> Done:
        """See `Stream`."""
        self.join()
        work()
        return _Recorded()

    def join(self) -> None:
        """Work on another stream than the current one comes first."""
        current = torch.cuda.current_stream()
        if self._last is not None and current != self._last:
            current.wait_stream(self._last)
        self._last = current


class _Recorded:
    def __init__(self) -> None:
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()


class ThreadStream:
    """A thread that runs work: what a GPU's stream is, for kernels that run on the thread that calls them.

    A child process that was forked gets a thread of its own; what its parent had started fails there.
    """

    def __init__(self) -> None:
        self._last: Future[None] | None = None
        self._begin()

    def start(self, work: Work) -> Done:
        """See `Stream`."""
        if self._process != os.getpid():
            self._begin()
        self._last = self._thread.submit(work)
        return _Waited(self._last)

    def join(self) -> None:
        """Wait for all that was started; what it raised is for whoever waits for that."""
        if self._last is not None and self._process == os.getpid():
            wait([self._last])
        self._last = None

    def _begin(self) -> None:
        self._process = os.getpid()
        self._thread = ThreadPoolExecutor(1, "slotwise-stream")


class _Waited:
    def __init__(self, future: Future[Any]) -> None:
        self._future = future
        self._process = os.getpid()

    def wait(self) -> None:
        if self._process != os.getpid():
            raise SlotwiseError("this step was started by the process that this one was forked from")
        self._future.result()
