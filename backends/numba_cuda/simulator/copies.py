"""Copies that a thread begins and waits for later: `cp.async`.

Owns `begin`, `commit` and `finish`. What always holds: what is copied reaches its place when the thread waits, as late
as on a GPU it may; until then whoever touches the place races with the copy, the thread itself too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import memory

if TYPE_CHECKING:
    from .arrays import Array
    from .threads import Threads


@dataclass
class Copy:
    """Elements on their way: one row a thread in `places` and `values`; `groups` and `lanes` say whose."""

    array: Array
    places: Any
    values: Any
    lanes: Any
    groups: Any
    site: int


def begin(threads: Threads, array: Array, places: Any, values: Any, site: int) -> None:
    """Starts copies of the threads that run to `places`, shape (threads, elements)."""
    lanes = threads.mask.lanes
    if threads.checks and array.records is not None:
        array.records.begin_copy(threads, array, *memory.records_of(threads, array, places, lanes, site), lanes)
    lanes = threads.lane_numbers if lanes is None else lanes
    threads.copies.append(Copy(array, places, values, lanes, threads.copy_group[lanes], site))


def commit(threads: Threads) -> None:
    """Ends a group of copies for each thread that runs."""
    threads.copy_group = threads.copy_group + threads.mask.bits


def finish(threads: Threads, newest: int | None = None) -> None:
    """Waits for the copies of the threads that run: all, or those in groups before the `newest` so many."""
    going = []
    for copy in threads.copies:
        done = threads.mask.bits[copy.lanes]
        if newest is not None:
            done = done & (copy.groups < threads.copy_group[copy.lanes] - newest)
        if done.any():
            copy.array.flat[copy.places[done]] = copy.values[done]
            if threads.checks and copy.array.records is not None:
                at, stamps = memory.records_of(threads, copy.array, copy.places[done], copy.lanes[done], copy.site)
                copy.array.records.written[at] = stamps
        if not done.all():
            left = ~done
            going.append(
                Copy(
                    copy.array, copy.places[left], copy.values[left], copy.lanes[left], copy.groups[left], copy.site
                )
            )  # fmt: skip
    threads.copies = going
