"""Who touched which element when: the data-race checker and the check for unwritten shared memory.

Owns `Shadow`. What always holds: two accesses to an element by two threads are reported unless a barrier of their block
or a warp barrier of both lies between them, both are atomic, or both read. Threads of different blocks are never ordered.
There are no false reports; of an element's readers since the last write the latest is remembered, another of its warp and
another from elsewhere (for global memory: from another block), so that a write can miss a reader only where warp barriers
of a part of a warp order some of them and not others.

A record is one int64: when (a count of barriers) above the source line above the thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .faults import DataRace, Fault, UninitialisedRead, site_text

if TYPE_CHECKING:
    from .arrays import Array
    from .threads import Threads

THREAD_BITS, SITE_BITS = 24, 16
THREAD = (1 << THREAD_BITS) - 1
SITE = (1 << SITE_BITS) - 1
CLOCK_SHIFT = THREAD_BITS + SITE_BITS
CLOCK_LIMIT = 1 << (62 - CLOCK_SHIFT)

Places = np.ndarray[Any, np.dtype[np.int64]]


class Shadow:
    """The records of one piece of memory, in units of `unit` bytes. `shared` memory belongs to one block an element."""

    def __init__(self, size: int, unit: int, shared: bool) -> None:
        self.size, self.unit, self.shared = size, unit, shared
        self.written = np.zeros(size, np.int64)
        self.reads = np.zeros((3, size), np.int64)  # the latest; one of its warp; one from elsewhere
        self.atomic: Places | None = None

    def refine(self, unit: int) -> None:
        """Goes over to smaller units, for an array of a smaller dtype in the same memory."""
        more = self.unit // unit
        self.written, self.reads = self.written.repeat(more), self.reads.repeat(more, axis=1)
        self.atomic = None if self.atomic is None else self.atomic.repeat(more)
        self.size, self.unit = self.size * more, unit

    def read(self, threads: Threads, array: Array, places: Places, stamps: Places, lanes: Places | None) -> None:
        """Each thread reads its place."""
        last = self.written[places]
        if self.shared and not last.all():
            self._need_written(threads, array, places, stamps, last)
        self._compare(threads, array, places, stamps, lanes, last, "reads", "wrote")
        if self.atomic is not None:
            self._compare(threads, array, places, stamps, lanes, self.atomic[places], "reads", "changed atomically")
        self._remember_reads(threads, places, stamps)

    def write(self, threads: Threads, array: Array, places: Places, stamps: Places, lanes: Places | None) -> None:
        """Each thread writes its place."""
        self._compare(threads, array, places, stamps, lanes, self.written[places], "writes", "wrote")
        for reads in self.reads:
            self._compare(threads, array, places, stamps, lanes, reads[places], "writes", "read")
        if self.atomic is not None:
            self._compare(threads, array, places, stamps, lanes, self.atomic[places], "writes", "changed atomically")
        self.written[places] = stamps
        last = self.written[places]
        if not np.array_equal(last, stamps):
            self._compare(threads, array, places, stamps, lanes, last, "writes", "writes at once")

    def change(self, threads: Threads, array: Array, places: Places, stamps: Places, lanes: Places | None) -> None:
        """Each thread changes its place atomically."""
        self._compare(threads, array, places, stamps, lanes, self.written[places], "changes atomically", "wrote")
        for reads in self.reads:
            self._compare(threads, array, places, stamps, lanes, reads[places], "changes atomically", "read")
        if self.atomic is None:
            self.atomic = np.zeros(self.size, np.int64)
        self.atomic[places] = stamps

    def _need_written(
        self, threads: Threads, array: Array, places: Places, stamps: Places, last: Places
    ) -> None:
        never = last == 0
        if self.atomic is not None:
            never &= self.atomic[places] == 0
        if never.any():
            which = int(np.argmax(never))
            raise UninitialisedRead(
                f"{array.describe(int(places[which]) * self.unit)} is read and no thread of the block has written it\n"
                f"  {threads.name_of(int(stamps[which] & THREAD))} at {site_text(int(stamps[which] >> THREAD_BITS) & SITE)}"
            )

    def _compare(
        self, threads: Threads, array: Array, places: Places, stamps: Places, lanes: Places | None, records: Places,
        does: str, did: str,
    ) -> None:  # fmt: skip
        """Raises DataRace when a record is of another thread and nothing orders it before this access."""
        since = threads.since if lanes is None or threads.since.ndim == 0 else threads.since[lanes]
        if since.ndim and len(since) != len(records):
            since = since.repeat(len(records) // len(since))
        late = records >= since if self.shared else records != 0
        if not late.any():
            return
        late &= ((records ^ stamps) & THREAD) != 0
        which = np.flatnonzero(late)
        if not which.size:
            return
        theirs, mine = records[which] & THREAD, stamps[which] & THREAD
        same_block = theirs // threads.block_size == mine // threads.block_size
        bound = since if since.ndim == 0 else since[which]
        ordered = same_block & (records[which] < bound)
        if threads.warp_clocks is not None:
            ordered |= same_block & threads.ordered_in_warp(mine, theirs, records[which] >> CLOCK_SHIFT)
        which = which[~ordered]
        if which.size:
            first = int(which[0])
            record, stamp = int(records[first]), int(stamps[first])
            raise DataRace(
                f"{array.describe(int(places[first]) * self.unit)}: nothing orders these two accesses\n"
                f"  {threads.name_of(stamp & THREAD)} {does} it at {site_text(stamp >> THREAD_BITS & SITE)}\n"
                f"  {threads.name_of(record & THREAD)} {did} it at {site_text(record >> THREAD_BITS & SITE)}"
            )

    def _remember_reads(self, threads: Threads, places: Places, stamps: Places) -> None:
        latest, near, far = self.reads
        before = latest[places]
        latest[places] = stamps
        now = latest[places]
        if before.any():
            self._keep(threads, places, before, now, near, far, before != 0)
        if not np.array_equal(now, stamps):
            self._keep(threads, places, stamps, now, near, far, np.True_)

    def _keep(
        self, threads: Threads, places: Places, records: Places, now: Places, near: Places, far: Places, which: Any
    ) -> None:
        """Remembers `records` beside the latest reader `now`, where they are of other threads."""
        a, b = records & THREAD, now & THREAD
        apart = threads.warp_of(a) != threads.warp_of(b)
        if not self.shared:
            other_block = a // threads.block_size != b // threads.block_size
            far[places[which & other_block]] = records[which & other_block]
            chosen = which & ~other_block & (a != b)
        else:
            far[places[which & apart]] = records[which & apart]
            chosen = which & ~apart & (a != b)
        near[places[chosen]] = records[chosen]


def check_clock(clock: int) -> None:
    """Raises Fault when a launch passes more barriers than records can count."""
    if clock >= CLOCK_LIMIT:
        raise Fault(f"a launch passed {clock} barriers, more than the race checker counts; run it with checks=False")
