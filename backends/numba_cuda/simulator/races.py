"""Who touched which element when: the data-race checker and the check for unwritten shared memory.

Owns `Shadow`. What always holds: two accesses to an element by two threads are reported unless a barrier of their
block or a warp barrier of both lies between them, both are atomic, or both read. Threads of different blocks are never
ordered. There are no false reports. Of an element's readers the latest is remembered, another *near* it and another
*far* from it (shared memory: of its warp and not; global memory: of its block and not), so that a write can miss a
reader only where barriers of a part of the near ones order some of them and not others.

A record is one int64, from the top: when (a count of barriers), the source line, whether another reader near and far
was remembered at that time, the thread. Threads are numbered so that a warp is 5 bits and a block a fixed number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .faults import SITE_BITS, DataRace, Fault, UninitialisedRead, site_text

if TYPE_CHECKING:
    from .arrays import Array
    from .threads import Threads

THREAD_BITS = 26
THREAD_LIMIT = 1 << THREAD_BITS
THREAD = THREAD_LIMIT - 1
NEAR, FAR = 1 << THREAD_BITS, 2 << THREAD_BITS
_BESIDE = NEAR | FAR
SITE_SHIFT = THREAD_BITS + 2
SITE = (1 << SITE_BITS) - 1
CLOCK_SHIFT = SITE_SHIFT + SITE_BITS
CLOCK_LIMIT = (1 << (63 - CLOCK_SHIFT)) - 1
COPYING = CLOCK_LIMIT << CLOCK_SHIFT
"""When a copy is done that no thread has waited for: after everything."""

Places = np.ndarray[Any, np.dtype[np.int64]]


class Shadow:
    """The records of one piece of memory, in units of `unit` bytes.

    `near_bits` is how many bits number the threads that are near each other: 5, and shared memory, which belongs to one
    block an element and which a block must write before it reads; or those of a block, and global memory.
    """

    def __init__(self, size: int, unit: int, near_bits: int, shared: bool = False) -> None:
        self.size, self.unit, self.shared, self._near_bits = size, unit, shared, near_bits
        self.written = np.zeros(size, np.int64)
        self.latest, self.near, self.far = (np.zeros(size, np.int64) for _ in range(3))
        self.atomic: Places | None = None

    def refine(self, unit: int) -> None:
        """Goes over to smaller units, for an array of a smaller dtype in the same memory."""
        more = self.unit // unit
        self.written, self.latest, self.near, self.far = (
            records.repeat(more) for records in (self.written, self.latest, self.near, self.far)
        )
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
        for reads in (self.latest, self.near, self.far):
            self._compare(threads, array, places, stamps, lanes, reads[places], "writes", "read")
        if self.atomic is not None:
            self._compare(threads, array, places, stamps, lanes, self.atomic[places], "writes", "changed atomically")
        self.written[places] = stamps
        last = self.written[places]
        if (last != stamps).any():
            self._compare(threads, array, places, stamps, lanes, last, "writes", "writes at once")

    def begin_copy(self, threads: Threads, array: Array, places: Places, stamps: Places, lanes: Places | None) -> None:
        """Each thread begins to write its place, until it waits."""
        self.write(threads, array, places, stamps, lanes)
        self.written[places] = stamps | COPYING

    def change(self, threads: Threads, array: Array, places: Places, stamps: Places, lanes: Places | None) -> None:
        """Each thread changes its place atomically."""
        self._compare(threads, array, places, stamps, lanes, self.written[places], "changes atomically", "wrote")
        for reads in (self.latest, self.near, self.far):
            self._compare(threads, array, places, stamps, lanes, reads[places], "changes atomically", "read")
        if self.atomic is None:
            self.atomic = np.zeros(self.size, np.int64)
        self.atomic[places] = stamps

    def _need_written(self, threads: Threads, array: Array, places: Places, stamps: Places, last: Places) -> None:
        never = last == 0
        if self.atomic is not None:
            never &= self.atomic[places] == 0
        if never.any():
            which = int(np.argmax(never))
            raise UninitialisedRead(
                f"{array.describe(int(places[which]) * self.unit)} is read and no thread of the block has written it\n"
                f"  {_who_and_where(threads, int(stamps[which]), 'reads')}"
            )

    def _compare(
        self, threads: Threads, array: Array, places: Places, stamps: Places, lanes: Places | None, records: Places,
        does: str, did: str,
    ) -> None:  # fmt: skip
        """Raises DataRace when a record is of another thread and nothing orders it before this access."""
        since = threads.since
        if since.ndim:
            since = since if lanes is None else since[lanes]
            if len(since) != len(records):  # several elements a thread
                since = since.repeat(len(records) // len(since))
        late = records >= since if self.shared else records != 0
        if not late.any():
            return
        which = np.flatnonzero(late & ((((records ^ stamps) & THREAD) != 0) | (records >= COPYING)))
        if not which.size:
            return
        theirs, mine = records[which] & THREAD, stamps[which] & THREAD
        same_block = theirs >> threads.launch.block_bits == mine >> threads.launch.block_bits
        ordered = same_block & (records[which] < (since[which] if since.ndim else since))
        if threads.warp_clocks is not None and same_block.any():
            near = np.flatnonzero(same_block)
            ordered[near] |= threads.ordered_in_warp(mine[near], theirs[near], records[which[near]] >> CLOCK_SHIFT)
        which = which[~ordered]
        if which.size:
            first = int(which[0])
            did = "still copies to" if records[first] >= COPYING else did
            raise DataRace(
                f"{array.describe(int(places[first]) * self.unit)}: nothing orders these two accesses\n"
                f"  {_who_and_where(threads, int(stamps[first]), does)}\n"
                f"  {_who_and_where(threads, int(records[first]), did)}"
            )

    def _remember_reads(self, threads: Threads, places: Places, stamps: Places) -> None:
        before = self.latest[places]
        newest = before.max(initial=0)
        start = threads.clock << CLOCK_SHIFT
        if newest >= start:  # the same reader again, and no barrier since: what was remembered beside it still holds
            same = ((before ^ stamps) & THREAD == 0) & (before >= start)
            stamps = stamps | np.where(same, before & _BESIDE, 0)
        self.latest[places] = stamps
        now = self.latest[places]
        if newest:
            self._keep(places, before, now, start)
        self._keep(places, stamps, now, start)

    def _keep(self, places: Places, records: Places, now: Places, start: int) -> None:
        """Remembers `records` beside the latest reader `now`, where they are of other threads and `now` lacks one."""
        apart = (records ^ now) & THREAD
        if not apart.any() or (now & _BESIDE == _BESIDE).all():
            return
        distant = apart >> self._near_bits != 0
        for beside, flag, which in (
            (self.far, FAR, distant & (now & FAR == 0)),
            (self.near, NEAR, ~distant & (apart != 0) & (now & NEAR == 0)),
        ):
            if which.any():
                at, kept = places[which], records[which]
                filled = kept != 0
                beside[at[filled]] = kept[filled]
                self.latest[at[kept >= start]] |= flag


def _who_and_where(threads: Threads, stamp: int, does: str) -> str:
    return f"{threads.name_of(stamp & THREAD)} {does} it at {site_text(stamp >> SITE_SHIFT & SITE)}"


def check_clock(clock: int) -> None:
    """Raises Fault when a launch passes more barriers than records can count."""
    if clock >= CLOCK_LIMIT:
        raise Fault(f"a launch passed {clock} barriers, more than the race checker counts; run it with checks=False")
