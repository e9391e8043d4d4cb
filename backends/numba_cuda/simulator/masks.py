"""Which threads run: masks, and the branches and loops that narrow them.

Owns `Mask`, `Branch` and `Loop`. What always holds: a mask within another holds no thread that the other does not;
threads that part meet again at the end of the statement that parted them, save those that have returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .faults import EndlessLoop, site_text
from .values import truth

if TYPE_CHECKING:
    from .threads import Threads

ENDLESS = 1 << 22
"""Rounds after which a loop whose counter is no `range` is taken for one that never ends."""


class Mask:
    """A set of the threads that are simulated together. `bits` has one boolean a thread."""

    __slots__ = ("_lanes", "bits", "count", "full")

    def __init__(self, bits: Any, count: int | None = None) -> None:
        self.bits = bits
        self.count = int(np.count_nonzero(bits)) if count is None else count
        self.full = self.count == len(bits)
        self._lanes: Any = None

    @property
    def lanes(self) -> Any:
        """The threads' numbers in order, or None for all of them."""
        if self.full:
            return None
        if self._lanes is None:
            self._lanes = np.flatnonzero(self.bits)
        return self._lanes

    def __and__(self, bits: Any) -> Mask:
        return Mask(bits if self.full else self.bits & bits)

    def __or__(self, other: Mask) -> Mask:
        if not self.count or other.full:
            return other
        if not other.count or self.full:
            return self
        return Mask(self.bits | other.bits)

    def without(self, bits: Any) -> Mask:
        """Those that are not among `bits`."""
        return Mask(self.bits & ~bits)


class Branch:
    """An `if`. The rewritten kernel asks `then`, `orelse` and `join` in this order."""

    __slots__ = ("_after", "_other", "_taken", "_threads", "entry", "site")

    def __init__(self, threads: Threads, taken: Mask, other: Mask, entry: Mask, site: int) -> None:
        self._threads, self._taken, self._other, self.entry, self.site = threads, taken, other, entry, site
        self._after: Mask | None = None
        threads.parted.append(self)

    def then(self) -> bool:
        """Runs those for whom the condition holds."""
        self._threads.run(self._taken)
        return True

    def orelse(self) -> bool:
        """Runs the others."""
        self._after = self._threads.mask
        self._threads.run(self._other)
        return True

    def join(self) -> None:
        """All of them again, less those that have left."""
        self._threads.parted.pop()
        mask = self._threads.mask
        first, second = (mask, self._other) if self._after is None else (self._after, mask)
        unchanged = first is self._taken and second is self._other
        self._threads.run(self.entry if unchanged else first | second)


class OneSided:
    """An `if` that all threads decide alike."""

    __slots__ = ("_taken",)

    def __init__(self, taken: bool) -> None:
        self._taken = taken

    def then(self) -> bool:
        """Whether the condition holds."""
        return self._taken

    def orelse(self) -> bool:
        """Whether it does not."""
        return not self._taken

    def join(self) -> None:
        """Nobody parted."""


TAKEN, NOT_TAKEN = OneSided(True), OneSided(False)


def branch(threads: Threads, condition: Any, site: int) -> Branch | OneSided:
    """The `if` of this condition for the threads that run."""
    condition = truth(condition)
    if condition.ndim == 0:
        return TAKEN if condition else NOT_TAKEN
    mask = threads.mask
    taken = mask & condition
    if taken.count == mask.count:
        return TAKEN
    if not taken.count:
        return NOT_TAKEN
    return Branch(threads, taken, Mask(mask.bits & ~condition, mask.count - taken.count), mask, site)


class Loop:
    """A `while` or `for`. Threads leave it one by one and meet again at `end`."""

    __slots__ = ("_continued", "_rounds", "_threads", "entry", "site")

    def __init__(self, threads: Threads, site: int) -> None:
        self._threads, self.site, self.entry = threads, site, threads.mask
        self._continued: Mask | None = None
        self._rounds = 0
        threads.parted.append(self)

    def test(self, condition: Any) -> bool:
        """Keeps the threads for whom the condition holds; False when there are none."""
        condition = truth(condition)
        if condition.ndim == 0:
            return bool(condition)
        mask = self._threads.mask
        kept = mask & condition
        if not kept.count:
            return False
        if kept.count != mask.count:
            self._threads.run(kept)
        return True

    def skip(self) -> None:
        """`continue` for the threads that run."""
        mask = self._threads.mask
        self._continued = mask if self._continued is None else self._continued | mask
        self._threads.run(self._threads.nobody)

    def leave(self) -> None:
        """`break` for the threads that run."""
        self._threads.run(self._threads.nobody)

    def next(self) -> bool:
        """The end of a round: whether anyone goes on."""
        if self._continued is not None:
            self._threads.run(self._threads.mask | self._continued)
            self._continued = None
        self._rounds += 1
        if self._rounds > ENDLESS:
            raise EndlessLoop(
                f"a loop ran {ENDLESS} rounds; threads that wait for others which have parted from them wait for ever\n"
                f"  at {site_text(self.site)}"
            )
        return self._threads.alive

    def rounds(self, *bounds: Any) -> Iterator[Any]:
        """The values of `range(...)`: numbers where all threads count alike, else one a thread."""
        start, stop, step = (np.int64(0), *bounds, np.int64(1))[:3] if len(bounds) == 1 else (*bounds, np.int64(1))[:3]
        if start.ndim == stop.ndim == step.ndim == 0:
            for value in range(int(start), int(stop), int(step)):
                yield np.int64(value)
                if self._continued is not None:
                    self._threads.run(self._threads.mask | self._continued)
                    self._continued = None
                if not self._threads.alive:
                    return
            return
        value = start.astype(np.int64)
        stop, step = stop.astype(np.int64), step.astype(np.int64)
        up = step > 0
        always_up = bool(np.all(up))
        while True:
            inside = value < stop if always_up else np.where(up, value < stop, value > stop)
            if not self.test(inside):
                return
            yield value
            if not self.next():
                return
            value = value + step

    def items(self, values: Any) -> Iterator[Any]:
        """The items of a tuple."""
        for value in values:
            yield value
            if not self.next():
                return

    def end(self) -> None:
        """All who entered again, less those that have returned."""
        self._threads.parted.pop()
        returned = self._threads.returned
        self._threads.run(self.entry if returned is None else self.entry.without(returned))
