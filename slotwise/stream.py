"""A completion that arrives piece by piece.

Owns `Stream`. What always holds: the request is cancelled, and its slots return, when the stream is closed, left in a
`with`, or dropped, also before the first piece was taken.
"""

from __future__ import annotations

from collections.abc import Iterator

from slotwise.engine.request import Chunk
from slotwise.engine.sequence import Sequence as Running
from slotwise.progress import progress_for
from slotwise.sharing import SharedEngine


class Stream(Iterator[Chunk]):
    """The chunks of one request; the last has the `completion`. Raises the request's error where it happens."""

    def __init__(self, engine: SharedEngine, sequence: Running, progress: bool | None) -> None:
        self._engine = engine
        self._sequence = sequence
        self._progress = progress
        self._ended = False

    def __next__(self) -> Chunk:
        """Run steps until there is something new."""
        if self._ended:
            raise StopIteration
        with progress_for(self._progress) as report:
            chunk = None
            while chunk is None:
                chunk = self._engine.step(self._sequence, report)
        if chunk.completion is not None:
            self._ended = True
            if chunk.completion.error is not None:
                raise chunk.completion.error
        return chunk

    def close(self) -> None:
        """Cancel the request if it is still running; harmless afterwards."""
        if not self._ended:
            self._ended = True
            self._engine.cancel([self._sequence])

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._ended:
            self._engine.abandon(self._sequence)
