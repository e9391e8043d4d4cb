"""How fast this machine's memory can be read: the limit that decoding is judged against.

What always holds: the buffer is far larger than any cache, was written before (no page faults are timed), and lies in
huge pages where the system grants them; sums are of integers in several independent accumulators, so that the reading
is the only thing to wait for. Each pattern reads everything once with all threads; the figure of a turn is the best
pattern's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numba
import numpy as np
import numpy.typing as npt

from slotwise.engine.memory import host_memory

BUFFER_BYTES = 1 << 30
_ZERO = np.uint64(0)

Words = npt.NDArray[np.uint64]


@numba.njit(nogil=True)
def _one_stream(words: Words) -> np.uint64:
    total = _ZERO
    for i in range(words.size):  # LLVM makes four vector accumulators of this: integer sums may be reordered
        total += words[i]
    return total


@numba.njit(nogil=True)
def _two_streams(words: Words) -> np.uint64:
    part = words.size // 2
    a, b = _ZERO, _ZERO
    for i in range(part):
        a += words[i]
        b += words[part + i]
    return a ^ b


@numba.njit(nogil=True)
def _four_streams(words: Words) -> np.uint64:
    part = words.size // 4
    a, b, c, d = _ZERO, _ZERO, _ZERO, _ZERO
    for i in range(part):
        a += words[i]
        b += words[part + i]
        c += words[2 * part + i]
        d += words[3 * part + i]
    return a ^ b ^ c ^ d


PATTERNS: tuple[Callable[[Words], np.uint64], ...] = (_one_stream, _two_streams, _four_streams)


class MemoryReader:
    """Reads a buffer of its own with `threads` threads."""

    def __init__(self, threads: int, size: int = BUFFER_BYTES) -> None:
        self.words = huge_buffer(size)
        self.parts = np.array_split(self.words, threads)
        for pattern in PATTERNS:
            pattern(self.words[:16])  # compiled now, not when timed

    def read(self) -> float:
        """Bytes a second of the best pattern, each tried once."""
        return max(self.words.nbytes / self._seconds(pattern) for pattern in PATTERNS)

    def copy(self) -> float:
        """Bytes a second of a plain copy of one half to the other, bytes read and written counted (for comparison)."""
        halves = [np.array_split(part, 2) for part in self.parts]
        pairs = [(source, target[: source.size]) for target, source in halves if source.size <= target.size]
        seconds = timed([lambda s=s, t=t: np.copyto(t, s) for s, t in pairs])
        return 2 * sum(source.nbytes for source, _ in pairs) / seconds

    def _seconds(self, pattern: Callable[[Words], np.uint64]) -> float:
        return timed([lambda part=part: pattern(part) for part in self.parts])


def huge_buffer(size: int) -> Words:
    """`size` bytes of written memory, in huge pages where the system has them."""
    words: Words = host_memory(size).numpy().view(np.uint64)
    words[:] = np.arange(words.size, dtype=np.uint64)
    return words


def timed(work: Sequence[Callable[[], object]]) -> float:
    """Seconds from a common start until all are done; the caller's thread does the first."""
    ready = threading.Barrier(len(work))

    def run(each: Callable[[], object]) -> None:
        ready.wait()
        each()

    others = [threading.Thread(target=run, args=(each,)) for each in work[1:]]
    for thread in others:
        thread.start()
    ready.wait()
    start = time.perf_counter()
    work[0]()
    for thread in others:
        thread.join()
    return time.perf_counter() - start
