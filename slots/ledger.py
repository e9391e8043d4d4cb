"""The slot ledger: one account of every KV-cache slot of every role.

Owns `RoleLedger` and `Ledger`. What always holds, at the end of every step and for every role:
`free + held + cached == total` over pages, and `reserved == committed + released` over slots. A slot goes
`reserve -> write -> commit(n) | release(rest)`; writes happen only between a lane's committed and reserved marks; a
lane's pages are exactly those that its marks need. Marks are arrays over lanes, so a step over hundreds of sequences
costs a few array operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slotwise.core.errors import LedgerError, OutOfPages
from slotwise.slots.pages import ROOT, SCRATCH_PAGE, PageCount, PagePool

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class SlotFlow:
    """Slots reserved, committed and released since the start."""

    reserved: int = 0
    committed: int = 0
    released: int = 0


class RoleLedger:
    """The slots of one role (target or draft).

    `committed[lane]` is the filled watermark: positions below it hold K and V of the lane's tokens, once all that was
    launched has run. `reserved[lane]` is
    where its reservation ends; between steps the two are equal. `written[lane]` is how far a running step has written
    (or is about to): beyond it nothing may be read. `page_table[lane]` lists its pages, `page_count[lane]`
    how many; entries beyond are the scratch page.
    """

    def __init__(self, role: str, *, lanes: int, capacity: int, page_size: int, pages: int) -> None:
        self.role = role
        self.capacity = capacity
        self.page_size = page_size
        self.pool = PagePool(pages, page_size)
        self.committed: Ints = np.zeros(lanes, np.int64)
        self.reserved: Ints = np.zeros(lanes, np.int64)
        self.written: Ints = np.zeros(lanes, np.int64)
        self.page_count: Ints = np.zeros(lanes, np.int64)
        columns = -(-capacity // page_size)
        self.page_table: npt.NDArray[np.int32] = np.full((lanes, columns), SCRATCH_PAGE, np.int32)
        self.is_open = np.zeros(lanes, bool)
        self.flow = SlotFlow()
        self._prefix_node: dict[int, int] = {}
        self._published: dict[int, int] = {}

    @staticmethod
    def table_bytes(lanes: int, capacity: int, page_size: int, pages: int) -> int:
        """Bytes of the tables: marks and pages of each lane, and the pool's; names of cached prefixes come on top."""
        return lanes * (4 * 8 + 1 + 4 * -(-capacity // page_size)) + PagePool.table_bytes(pages)

    def open(self, lane: int, prefix: Sequence[int] = ()) -> None:
        """Start an account for `lane`, holding the shared pages `prefix` (from `pool.find_prefix`), all committed."""
        if self.is_open[lane]:
            raise LedgerError(f"{self.role}: lane {lane} is opened twice; close it first")
        if len(prefix) * self.page_size > self.capacity:
            raise LedgerError(
                f"{self.role}: lane {lane} cannot hold a prefix of {len(prefix)} pages of {self.page_size} slots; the "
                f"capacity is {self.capacity}"
            )
        self.pool.share(prefix)
        self.is_open[lane] = True
        self.page_table[lane, : len(prefix)] = prefix
        self.page_count[lane] = len(prefix)
        self.committed[lane] = self.reserved[lane] = self.written[lane] = len(prefix) * self.page_size
        self._prefix_node[lane], self._published[lane] = ROOT, 0

    def close(self, lane: int) -> None:
        """End the account of `lane`: what it had reserved is released, its pages go back. Harmless when not open."""
        if not self.is_open[lane]:
            return
        self.flow.released += int(self.reserved[lane] - self.committed[lane])
        self.reserved[lane] = self.committed[lane] = self.written[lane] = 0
        self._trim(lane, 0)
        self.is_open[lane] = False
        del self._prefix_node[lane], self._published[lane]

    def pages_short(self, lanes: Ints, ends: Ints) -> Ints:
        """How many more pages each lane would need for its reservation to reach `ends`."""
        short: Ints = np.maximum(-(-ends // self.page_size) - self.page_count[lanes], 0)
        return short

    def reserve(self, lanes: Ints, ends: Ints) -> None:
        """Reserve slots up to `ends` (exclusive) for each lane, taking pages as needed.

        Raises LedgerError when an end lies below the committed mark or beyond capacity, OutOfPages when the pool cannot
        give enough; in both cases nothing is changed.
        """
        if lanes.size == 0:
            return
        current = self.reserved[lanes]
        # Counting is the cheapest question numpy answers; this runs in every step.
        if np.count_nonzero((ends < current) | (ends > self.capacity) | ~self.is_open[lanes]):
            raise LedgerError(
                f"{self.role}: cannot reserve up to {ends.tolist()} for lanes {lanes.tolist()}: their marks are "
                f"{current.tolist()}, the capacity is {self.capacity}, open are {self.is_open[lanes].tolist()}"
            )
        short = self.pages_short(lanes, ends)
        if np.count_nonzero(short):
            wanted = int(short.sum())
            if wanted > self.pool.available:
                raise OutOfPages(
                    f"{self.role}: {wanted} pages are needed for lanes {lanes[short > 0].tolist()}, "
                    f"{self.pool.available} of {self.pool.total} are free or cached"
                )
            held = self.page_count[lanes]
            try:
                for i in np.flatnonzero(short):
                    self._grow(int(lanes[i]), int(short[i]))
            except BaseException:
                for i in np.flatnonzero(short):
                    self._trim(int(lanes[i]), int(held[i]))
                raise
        self.reserved[lanes] = ends
        self.flow.reserved += int(np.add.reduce(ends - current))

    def commit(self, lanes: Ints, ends: Ints) -> None:
        """Commit written slots up to `ends` and release the rest of each lane's reservation, with pages not needed."""
        if lanes.size == 0:
            return
        committed, reserved = self.committed[lanes], self.reserved[lanes]
        if np.count_nonzero((ends < committed) | (ends > reserved)):
            raise LedgerError(
                f"{self.role}: cannot commit up to {ends.tolist()} for lanes {lanes.tolist()}: committed are "
                f"{committed.tolist()}, reserved {reserved.tolist()}"
            )
        self.flow.committed += int(np.add.reduce(ends - committed))
        self.flow.released += int(np.add.reduce(reserved - ends))
        self.committed[lanes] = ends
        self.reserved[lanes] = ends
        self.written[lanes] = ends
        kept = -(-ends // self.page_size)
        spare = self.page_count[lanes] > kept
        if np.count_nonzero(spare):
            for i in np.flatnonzero(spare):
                self._trim(int(lanes[i]), int(kept[i]))

    def publish(self, lane: int, tokens: Sequence[int], upto: int) -> None:
        """Share the lane's full committed pages that end at or before `upto`; `tokens` is its whole sequence."""
        size = self.page_size
        full = min(upto, int(self.committed[lane])) // size
        for ordinal in range(self._published[lane], full):
            page = int(self.page_table[lane, ordinal])
            key = tuple(tokens[ordinal * size : (ordinal + 1) * size])
            self._prefix_node[lane] = self.pool.publish(page, self._prefix_node[lane], key)
            self._published[lane] = ordinal + 1

    def withdraw(self, lane: int) -> None:
        """Let nobody find the lane's pages any more: what it failed on may lie in them."""
        for page in self.page_table[lane, : self.page_count[lane]].tolist():
            self.pool.withdraw(page)

    def slots(self, lane: int, begin: int, end: int) -> Ints:
        """The physical slots of positions `begin .. end` of `lane`."""
        position = np.arange(begin, end)
        pages = self.page_table[lane, position // self.page_size].astype(np.int64)
        found: Ints = pages * self.page_size + position % self.page_size
        return found

    def check(self, step: int) -> PageCount:
        """Raise LedgerError naming `step` and printing the ledger when an equation of this role does not hold."""
        count, flow = self.pool.count(), self.flow
        if count.free + count.held + count.cached != count.total:
            raise LedgerError(f"step {step}: free + held + cached != total for role {self.role}\n{self}")
        if flow.reserved != flow.committed + flow.released:
            raise LedgerError(f"step {step}: reserved != committed + released for role {self.role}\n{self}")
        return count

    def __str__(self) -> str:
        count, flow = self.pool.count(), self.flow
        lines = [
            f"{self.role}: pages of {self.page_size}: free {count.free} + held {count.held} + cached {count.cached}"
            f" (total {count.total}); slots: reserved {flow.reserved}, committed {flow.committed}, "
            f"released {flow.released}"
        ]
        for lane in np.flatnonzero(self.is_open):
            pages = self.page_table[lane, : self.page_count[lane]].tolist()
            lines.append(
                f"  lane {lane}: committed {self.committed[lane]} reserved {self.reserved[lane]} pages {pages}"
            )
        return "\n".join(lines)

    def _grow(self, lane: int, count: int) -> None:
        first = int(self.page_count[lane])
        for ordinal in range(first, first + count):
            self.page_table[lane, ordinal] = self.pool.take(lane, ordinal)
            self.page_count[lane] = ordinal + 1

    def _trim(self, lane: int, keep: int) -> None:
        for ordinal in range(int(self.page_count[lane]) - 1, keep - 1, -1):
            self.pool.give_back(int(self.page_table[lane, ordinal]), lane)
            self.page_table[lane, ordinal] = SCRATCH_PAGE
        self.page_count[lane] = keep


class Ledger:
    """The accounts of every role of an engine, checked together at the end of each step."""

    def __init__(self, roles: Sequence[RoleLedger]) -> None:
        self.roles = {role.role: role for role in roles}

    def __getitem__(self, role: str) -> RoleLedger:
        return self.roles[role]

    def __contains__(self, role: str) -> bool:
        return role in self.roles

    def close(self, lane: int) -> None:
        """End the accounts of `lane` in every role."""
        for role in self.roles.values():
            role.close(lane)

    def withdraw(self, lane: int) -> None:
        """Let nobody find the pages of `lane` any more, in any role."""
        for role in self.roles.values():
            role.withdraw(lane)

    def check(self, step: int) -> None:
        """Raise LedgerError when an equation fails in any role."""
        for role in self.roles.values():
            role.check(step)

    def __str__(self) -> str:
        return "\n".join(str(role) for role in self.roles.values())
