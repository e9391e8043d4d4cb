"""The threads of some blocks, run side by side.

Owns `Threads`: who runs, and the barriers. What always holds: a value of the kernel is a numpy scalar, the same for all
threads, or an array with one element a thread, those of threads that do not run being of no meaning; threads within a
function call, a branch or a loop are some of those outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import Array
from .faults import (
    DivergentBarrier,
    Fault,
    UnsupportedKernel,
    site_text,
)
from .masks import Branch, Loop, Mask
from .races import CLOCK_SHIFT, Shadow, check_clock
from .values import truth

if TYPE_CHECKING:
    from .copies import Copy
    from .kernels import Launch

WARP_BITS = 5
WARP = 1 << WARP_BITS
UNSET: Any = None


class Frame:
    """One call of a function: who entered, who has returned, with what."""

    __slots__ = ("entry", "outer", "outer_returned", "outer_returned_count", "value")

    def __init__(self, entry: Mask, outer: Frame | None, returned: Any, count: int) -> None:
        self.entry, self.outer, self.outer_returned, self.outer_returned_count = entry, outer, returned, count
        self.value: Any = UNSET


class Threads:
    """The threads of the blocks `first` to `first + blocks` of a launch.

    `mask` says who runs; `alive` whether anyone does; `partial` whether someone in this function call is left out, so
    that an assignment must keep the old values of the others.
    """

    def __init__(self, launch: Launch, first: int, blocks: int) -> None:
        size = launch.block_size
        self.launch, self.first, self.blocks, self.block_size = launch, first, blocks, size
        self.lanes = blocks * size
        self.checks = launch.checks
        self.nobody = Mask(np.zeros(self.lanes, np.bool_), 0)
        self.mask = Mask(np.ones(self.lanes, np.bool_), self.lanes)
        self.alive, self.partial = True, False
        self.frame: Frame | None = None
        self.returned: Any = None
        self._returned_count = 0
        self.parted: list[Branch | Loop] = []
        self.left_at: Any = None
        self.block_of = np.arange(self.lanes) // size
        self.lane_numbers = np.arange(self.lanes)
        self.clock = 1
        self.since: Any = np.int64(1 << CLOCK_SHIFT)
        self._numbers = (first + self.block_of << launch.block_bits) + self.lane_numbers % size
        self.stamps = self._numbers + (1 << CLOCK_SHIFT)
        self.warp_clocks: Any = None
        self.copies: list[Copy] = []
        self.copy_group = np.zeros(self.lanes, np.int64)
        self.shared: dict[Any, tuple[Any, Shadow | None]] = {}
        self._set_indices()

    def _set_indices(self) -> None:
        bx, by, bz = self.launch.block
        gx, gy, gz = self.launch.grid
        thread = self.lane_numbers % self.block_size
        block = self.first + self.block_of if self.blocks > 1 else np.int64(self.first)

        def axes(number: Any, x: int, y: int, z: int) -> tuple[Any, Any, Any]:
            zero = np.int64(0)
            return (
                number % x if x > 1 else zero,
                number // x % y if y > 1 else zero,
                number // (x * y) if z > 1 else zero,
            )

        self.thread_index, self.block_index = axes(thread, bx, by, bz), axes(block, gx, gy, gz)
        self.block_dim, self.grid_dim = tuple(map(np.int64, self.launch.block)), tuple(map(np.int64, self.launch.grid))
        self.lane_of = thread % WARP

    # Control flow.

    def run(self, mask: Mask) -> None:
        """Runs these threads from here on."""
        self.mask = mask
        self.alive = mask.count > 0
        assert self.frame is not None
        self.partial = mask.count + self._returned_count != self.frame.entry.count

    def enter(self) -> None:
        """Begins a function call."""
        self.frame = Frame(self.mask, self.frame, self.returned, self._returned_count)
        self.returned, self._returned_count, self.partial = None, 0, False

    def give(self, value: Any, site: int) -> None:
        """`return value` for the threads that run."""
        frame, mask = self.frame, self.mask
        assert frame is not None
        frame.value = value if mask.count == frame.entry.count else self.blend(frame.value, value)
        self.returned = mask.bits if self.returned is None else self.returned | mask.bits
        self._returned_count += mask.count
        if frame.outer is None:
            self.left_at = np.zeros(self.lanes, np.int64) if self.left_at is None else self.left_at
            self.left_at[mask.bits] = site
        self.run(self.nobody)

    def leave(self) -> Any:
        """Ends a function call; gives what it returned."""
        frame = self.frame
        assert frame is not None
        self.frame, self.returned, self._returned_count = frame.outer, frame.outer_returned, frame.outer_returned_count
        if self.frame is not None:
            self.run(frame.entry)
        return frame.value

    def blend(self, old: Any, new: Any) -> Any:
        """The new value for the threads that run, the old one for the others."""
        return self._chosen(self.mask, old, new)

    def _chosen(self, mask: Mask, old: Any, new: Any) -> Any:
        if old is UNSET or old is new:
            return new
        if isinstance(new, tuple) and isinstance(old, tuple) and len(old) == len(new):
            return tuple(self._chosen(mask, a, b) for a, b in zip(old, new, strict=True))
        if not isinstance(new, (np.ndarray, np.generic)) or not isinstance(old, (np.ndarray, np.generic)):
            if isinstance(new, Array) and isinstance(old, Array) and (new.flat is old.flat or new.kind == "local"):
                return new
            raise UnsupportedKernel(f"a variable is {old!r} in some threads and {new!r} in others")
        if old.ndim == new.ndim == 0 and old == new and old.dtype == new.dtype:
            return new
        return np.where(mask.bits, new, old)

    def select(self, condition: Any, value: Callable[[], Any], other: Callable[[], Any], site: int) -> Any:
        """`value if condition else other`: each side runs for its own threads."""
        condition, mask = truth(condition), self.mask
        if condition.ndim == 0:
            return value() if condition else other()
        taken = mask & condition
        if taken.count == mask.count:
            return value()
        if not taken.count:
            return other()
        split = Branch(self, taken, Mask(mask.bits & ~condition, mask.count - taken.count), mask, site)
        split.then()
        chosen = value()
        split.orelse()
        rest = other()
        split.join()
        return self._chosen(taken, rest, chosen)

    def choose(self, condition: Any, value: Any, other: Any) -> Any:
        """`value if condition else other`, both computed."""
        if not isinstance(value, (np.ndarray, np.generic)) or not isinstance(other, (np.ndarray, np.generic)):
            return self.select(condition, lambda: value, lambda: other, 0)
        if condition.ndim:
            return np.where(condition, value, other)
        chosen = value if condition else other
        return chosen if value.dtype == other.dtype else chosen.astype(np.result_type(value, other))

    def both(self, first: Any, second: Callable[[], Any], site: int) -> Any:
        """`first and second`: the second is computed for threads whose first is true."""
        first = truth(first)
        return self.select(first, lambda: truth(second()), lambda: np.False_, site)

    def either(self, first: Any, second: Callable[[], Any], site: int) -> Any:
        """`first or second`: the second is computed for threads whose first is false."""
        first = truth(first)
        return self.select(first, lambda: np.True_, lambda: truth(second()), site)

    # Barriers.

    def barrier(self, site: int) -> None:
        """`cuda.syncthreads`: all threads of each block that comes here, or a fault."""
        mask = self.mask
        if mask.full:
            here: Any = slice(None)
        else:
            counts = mask.bits.reshape(self.blocks, self.block_size).sum(1)
            if ((counts != 0) & (counts != self.block_size)).any():
                self._divergent_barrier(counts, site)
            here = mask.bits
        self.clock += 1
        check_clock(self.clock)
        stamp = self.clock << CLOCK_SHIFT
        if mask.full:
            self.since = np.int64(stamp)
        else:
            self.since = np.array(np.broadcast_to(self.since, self.lanes))
            self.since[here] = stamp
        self._tick()

    def _tick(self) -> None:
        self.stamps = self._numbers + (self.clock << CLOCK_SHIFT)

    def _divergent_barrier(self, counts: Any, site: int) -> None:
        block = int(np.argmax((counts != 0) & (counts != self.block_size)))
        lanes = np.arange(block * self.block_size, (block + 1) * self.block_size)
        here = self.mask.bits[lanes]
        lines = [f"  {self._threads_text(lanes[here])} wait at {site_text(site)}"]
        for what, place, gone in self._whereabouts(lanes[~here]):
            lines.append(f"  {self._threads_text(gone)} {what} {site_text(place)}")
        raise DivergentBarrier(
            f"deadlock in block {self._block_text(block)}: a barrier that {int(here.sum())} of its {self.block_size} "
            "threads reach\n" + "\n".join(lines)
        )

    def _whereabouts(self, lanes: Any) -> list[tuple[str, int, Any]]:
        """What became of threads that do not run: (words, place, threads)."""
        found: list[tuple[str, int, Any]] = []
        if self.left_at is not None:
            left = self.left_at[lanes]
            found += [("returned at", int(place), lanes[left == place]) for place in np.unique(left[left != 0])]
            lanes = lanes[left == 0]
        inner = self.mask.bits
        for parted in reversed(self.parted):
            gone = lanes[parted.entry.bits[lanes] & ~inner[lanes]]
            if gone.size:
                words = "took the other way at" if isinstance(parted, Branch) else "have left the loop at"
                found.append((words, parted.site, gone))
            lanes = np.setdiff1d(lanes, gone)
        if lanes.size:
            found.append(("are not in the call at", self.parted[0].site if self.parted else 0, lanes))
        return found

    def sync_warps(self, members: Any) -> None:
        """Orders what came before for the lanes of `members`, booleans of shape (warps, 32), warp by warp."""
        if self.warp_clocks is None:
            self.warp_clocks = np.zeros((len(members), WARP, WARP), np.int64)
        self.clock += 1
        check_clock(self.clock)
        whole = members.all(1)
        self.warp_clocks[whole] = self.clock
        for warp in np.flatnonzero(members.any(1) & ~whole):
            who = np.flatnonzero(members[warp])
            known = self.warp_clocks[warp][who].max(0)
            known[who] = self.clock
            self.warp_clocks[warp][who] = known
        self._tick()

    def ordered_in_warp(self, mine: Any, theirs: Any, clocks: Any) -> Any:
        """Whether warp barriers order accesses of `theirs` at `clocks` before what `mine` does now."""
        same = mine >> WARP_BITS == theirs >> WARP_BITS
        bits = self.launch.block_bits
        warps = -(-self.block_size // WARP)
        warp = ((mine >> bits) - self.first) * warps + ((mine & (1 << bits) - 1) >> WARP_BITS)
        return same & (self.warp_clocks[warp, mine & WARP - 1, theirs & WARP - 1] > clocks)

    # Names.

    def some_lane(self) -> int:
        """A thread that runs."""
        lanes = self.mask.lanes
        return 0 if lanes is None else int(lanes[0])

    def name_of_lane(self, lane: int) -> str:
        """`block (0, 1, 0), thread (3, 0, 0)` for one of these threads."""
        return self.name_of(int(self._numbers[lane]))

    def name_of(self, thread: int) -> str:
        """The same for a thread as records number it."""
        x, y, _ = self.launch.block
        bits = self.launch.block_bits
        number = thread & (1 << bits) - 1
        at = (number % x, number // x % y, number // (x * y))
        return f"block {self._block_text((thread >> bits) - self.first)}, thread {at}"

    def _block_text(self, block: int) -> str:
        x, y, _ = self.launch.grid
        number = self.first + block
        return str((number % x, number // x % y, number // (x * y)))

    def _threads_text(self, lanes: Any) -> str:
        """`threads 0 to 15, 20`, counted within their block."""
        numbers = [int(lane) % self.block_size for lane in lanes]
        runs: list[list[int]] = []
        for number in numbers:
            if runs and runs[-1][1] == number - 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])
        text = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs)
        return f"thread{'s' if len(numbers) > 1 else ''} {text}"


def fault_at(kind: type[Fault], words: str, threads: Threads, lane: int, site: int) -> Fault:
    """A fault of one thread at one line."""
    return kind(f"{words}\n  {threads.name_of_lane(lane)} at {site_text(site)}")
