"""The threads of some blocks, run side by side.

Owns `Threads`: what the rewritten kernel speaks to. What always holds: a value of the kernel is a numpy scalar, the same
for all threads, or an array with one element a thread, those of threads that do not run being of no meaning; memory is
touched for the threads that run and no others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import Array, dtype_of, shape_of, strides_of
from .faults import (
    DivergentBarrier,
    Fault,
    Misaligned,
    OutOfBounds,
    UnsupportedKernel,
    site_text,
)
from .masks import Branch, Loop, Mask
from .races import CLOCK_SHIFT, THREAD_BITS, Shadow, check_clock
from .values import truth

if TYPE_CHECKING:
    from .kernels import Launch

WARP = 32
UNSET: Any = None
_INT = np.dtype(np.int64)


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
        self._stamped = self.lane_numbers + first * size + (1 << CLOCK_SHIFT)
        self.warp_clocks: Any = None
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

    def both(self, first: Any, second: Callable[[], Any], site: int) -> Any:
        """`first and second`: the second is computed for threads whose first is true."""
        first = truth(first)
        return self.select(first, lambda: truth(second()), lambda: np.False_, site)

    def either(self, first: Any, second: Callable[[], Any], site: int) -> Any:
        """`first or second`: the second is computed for threads whose first is false."""
        first = truth(first)
        return self.select(first, lambda: np.True_, lambda: truth(second()), site)

    # Memory.

    def load(self, array: Any, index: Any, site: int) -> Any:
        """`array[index]`."""
        if not isinstance(array, Array):
            return self._item(array, index, site)
        if isinstance(index, slice):
            return self._slice(array, index, site)
        if array.kind == "local" and not isinstance(index, tuple) and index.ndim == 0 and len(array.shape) == 1:
            at = int(index)
            if not 0 <= at < array.shape[0]:
                self._out_of_bounds(array, (index,), None, site)
            return array.flat.reshape(-1, self.lanes)[at].copy()
        lanes = self.mask.lanes
        places = self.places(array, self._narrow(index, lanes), lanes, site)
        value = self.fetch(array, places, lanes, site)
        return value if lanes is None or places.ndim == 0 else self.spread(value, lanes)

    def store(self, array: Any, index: Any, value: Any, site: int) -> None:
        """`array[index] = value`."""
        if not isinstance(array, Array):
            raise UnsupportedKernel(f"an item of {array!r} is assigned at {site_text(site)}")
        if isinstance(index, slice) and not isinstance(value, Array):
            raise UnsupportedKernel(f"a slice is assigned at {site_text(site)}; write the loop out")
        lanes = self.mask.lanes
        places = self.places(array, self._narrow(index, lanes), lanes, site)
        if lanes is not None and value.ndim:
            value = value[lanes]
        self.put(array, places, value, lanes, site)

    @staticmethod
    def _narrow(index: Any, lanes: Any) -> tuple[Any, ...]:
        """The index of the threads that run, one number or array a dimension."""
        parts = index if isinstance(index, tuple) else (index,)
        return parts if lanes is None else tuple(p[lanes] if p.ndim else p for p in parts)

    def places(self, array: Array, index: tuple[Any, ...], lanes: Any, site: int) -> Any:
        """Positions in `array.flat` for the threads that run (`lanes`; None for all), inside the shape."""
        shape = array.shape
        if len(index) != len(shape):
            if len(index) == 1 and array.size == array.flat.size:  # a flat index, from an intrinsic
                shape = (array.size,)
            else:
                raise UnsupportedKernel(
                    f"{array.kind} array {array.name} has {len(array.shape)} dimensions, its index {len(index)}; slices of "
                    f"arrays with more dimensions are not known here\n  at {site_text(site)}"
                )
        strides = array.strides if shape is array.shape else (1,)
        found: Any = array.start if lanes is None or isinstance(array.start, (int, np.integer)) else array.start[lanes]
        for part, extent, stride in zip(index, shape, strides, strict=True):
            if part.dtype.kind not in "iu":
                raise UnsupportedKernel(f"{array.name} is indexed by a {part.dtype} at {site_text(site)}")
            if part.ndim == 0:
                if not 0 <= part < extent:
                    self._out_of_bounds(array, index, lanes, site)
            else:
                if part.dtype is not _INT:
                    part = part.astype(np.int64)
                if part.size and np.maximum.reduce(part.view(np.uint64), axis=None) >= extent:
                    self._out_of_bounds(array, index, lanes, site)
            step = part if stride == 1 else part * stride
            found = found + step
        return np.asarray(found) if isinstance(found, int) else found

    def _out_of_bounds(self, array: Array, index: tuple[Any, ...], lanes: Any, site: int) -> None:
        flat = len(index) == 1 and len(array.shape) != 1
        shape = (array.size,) if flat else array.shape
        bad: Any = np.False_
        for part, extent in zip(index, shape, strict=True):
            bad = bad | (part < 0) | (part >= extent)
        if self.mask.count == 0:
            return
        which = int(np.argmax(bad.reshape(-1))) if bad.ndim else 0
        at = [int(part.reshape(-1)[which]) if part.ndim else int(part) for part in index]
        per_lane = bad.size // max(1, self.mask.count) if bad.ndim else 1
        active = which // max(1, per_lane)
        lane = int(active if lanes is None else lanes[active]) if bad.ndim else self.some_lane()
        raise OutOfBounds(
            f"{array.kind} array {array.name}[{', '.join(map(str, at))}] is outside its shape {array.shape}\n"
            f"  {self.name_of_lane(lane)} at {site_text(site)}"
        )

    def fetch(self, array: Array, places: Any, lanes: Any, site: int) -> Any:
        """The elements at these positions, with the race checker told."""
        if self.checks and array.records is not None:
            at, stamps = self._records(array, places, lanes, site)
            array.records.read(self, array, at, stamps, lanes)
        return array.flat[places]

    def put(self, array: Array, places: Any, value: Any, lanes: Any, site: int) -> None:
        """Writes the elements at these positions, with the race checker told."""
        if array.kind == "const":
            raise UnsupportedKernel(f"constant array {array.name} is written at {site_text(site)}")
        if self.checks and array.records is not None:
            at, stamps = self._records(array, places, lanes, site)
            array.records.write(self, array, at, stamps, lanes)
        if value.dtype != array.dtype:
            value = value.astype(array.dtype)
        if places.ndim == 0 and value.ndim:
            value = value[-1]
        array.flat[places] = value

    def _records(self, array: Array, places: Any, lanes: Any, site: int) -> tuple[Any, Any]:
        """The same positions in the units that records have, and who is there, when, at which line."""
        stamps = (self._stamped if lanes is None else self._stamped[lanes]) + (site << THREAD_BITS)
        if places.ndim == 0:
            places = np.full(stamps.shape, places)
        elif places.ndim > 1:
            stamps = np.broadcast_to(stamps.reshape(-1, *[1] * (places.ndim - 1)), (len(stamps), *places.shape[1:]))
            stamps, places = stamps.reshape(-1), places.reshape(-1)
        assert array.records is not None
        unit = array.records.unit
        wide = array.itemsize // unit
        if wide != 1:
            places = places * wide
        if array.records_at:
            places = places + array.records_at // unit
        if wide > 1:
            places = (places[:, None] + np.arange(wide)).reshape(-1)
            stamps = stamps.repeat(wide)
        return places, stamps

    def spread(self, value: Any, lanes: Any) -> Any:
        """Values of the threads that run, put where those threads are among all."""
        if lanes is None or not isinstance(value, np.ndarray) or value.ndim == 0:
            return value
        out = np.zeros(self.lanes, value.dtype)
        out[lanes] = value
        return out

    def _item(self, values: Any, index: Any, site: int) -> Any:
        if isinstance(values, tuple) and isinstance(index, (np.generic, int)):
            if not -len(values) <= index < len(values):
                raise OutOfBounds(f"item {index} of a tuple of {len(values)} at {site_text(site)}")
            return values[int(index)]
        if isinstance(values, tuple) and isinstance(index, slice):
            return values[index]
        raise UnsupportedKernel(f"{values!r} is indexed by {index!r} at {site_text(site)}")

    def _slice(self, array: Array, index: slice, site: int) -> Array:
        ends = [index.start, index.stop]
        if len(array.shape) != 1 or index.step is not None or any(e is not None and e.ndim for e in ends):
            raise UnsupportedKernel(
                f"this slice of {array.name} at {site_text(site)}; of arrays with one dimension, with the same ends in all "
                "threads and no step, slices are known here"
            )
        first, last = (0 if ends[0] is None else int(ends[0])), (array.shape[0] if ends[1] is None else int(ends[1]))
        if not 0 <= first <= last <= array.shape[0]:
            raise OutOfBounds(
                f"{array.kind} array {array.name}[{first}:{last}] is outside its shape {array.shape}\n"
                f"  {self.name_of_lane(self.some_lane())} at {site_text(site)}"
            )
        return array.part_of(first, last - first)

    def shared_array(self, site: int, name: str, shape: Any, dtype: Any, alignment: Any = None) -> Array:
        """`cuda.shared.array`: one a block and place in the source; of size 0, the launch's dynamic shared memory."""
        kind, extents = dtype_of(dtype), shape_of(shape)
        dynamic = extents == (0,)
        if dynamic:
            count = self.launch.shared_bytes // kind.itemsize
            extents = (count,)
            key: Any = "dynamic"
        else:
            count, key = math.prod(extents), (site, name)
        if key not in self.shared:
            size = self.launch.shared_bytes if dynamic else count * kind.itemsize
            padded = -(-size // 16) * 16
            raw = np.full(self.blocks * padded, 0xFF, np.uint8)
            records = Shadow(self.blocks * padded // kind.itemsize, kind.itemsize, shared=True) if self.checks else None
            self.shared[key] = raw, records
        raw, records = self.shared[key]
        if records is not None and records.unit > kind.itemsize:
            records.refine(kind.itemsize)
        flat = raw.view(kind)
        part = len(flat) // self.blocks
        start: Any = 0 if self.blocks == 1 else self.block_of * part
        aligned = 16 if dynamic else kind.itemsize if alignment is None else int(alignment)
        made = Array(name, "shared", flat, extents, strides_of(extents), start, aligned)
        made.records, made.part = records, part
        return made

    def local_array(self, name: str, shape: Any, dtype: Any, alignment: Any = None) -> Array:
        """`cuda.local.array`: one a thread; what it holds before it is written is of no meaning."""
        kind, extents = dtype_of(dtype), shape_of(shape)
        flat = np.full(math.prod(extents) * self.lanes * kind.itemsize, 0xFF, np.uint8).view(kind)
        strides = tuple(stride * self.lanes for stride in strides_of(extents))
        aligned = kind.itemsize if alignment is None else int(alignment)
        return Array(name, "local", flat, extents, strides, self.lane_numbers, aligned)

    def check_aligned(self, array: Array, places: Any, size: int, lanes: Any, site: int) -> None:
        """Raises Misaligned where an access of `size` bytes is at an address that is no multiple of it."""
        if array.kind in ("shared", "local") and array.address % size:
            raise Misaligned(
                f"{array.kind} array {array.name} is accessed {size} bytes at a time and aligned to {array.address & -array.address}"
                f" alone; make it with alignment={size}\n  {self.name_of_lane(self.some_lane())} at {site_text(site)}"
            )
        base = array.address if array.kind in ("global", "const") else 0
        within = places if not array.part else places % array.part
        bad = (base + within * array.itemsize) % size != 0
        if array.kind != "local" and np.any(bad):
            which = int(np.argmax(bad.reshape(-1))) if bad.ndim else 0
            lane = self.some_lane() if not bad.ndim else int(which if lanes is None else lanes[which])
            place = int(within.reshape(-1)[which]) if bad.ndim else int(within)
            raise Misaligned(
                f"{array.element(place - array.where)} is accessed {size} bytes at a time, at an address that {size} does "
                f"not divide\n  {self.name_of_lane(lane)} at {site_text(site)}"
            )

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
        self._stamped = self.lane_numbers + self.first * self.block_size + (self.clock << CLOCK_SHIFT)

    def _divergent_barrier(self, counts: Any, site: int) -> None:
        block = int(np.argmax((counts != 0) & (counts != self.block_size)))
        lanes = np.arange(block * self.block_size, (block + 1) * self.block_size)
        here = self.mask.bits[lanes]
        lines = [f"  {self._threads_text(lanes[here])} wait at {site_text(site)}"]
        for what, place, gone in self._whereabouts(lanes[~here]):
            lines.append(f"  {self._threads_text(gone)} {what} {site_text(place)}")
        raise DivergentBarrier(
            f"deadlock in block {self._block_text(block)}: a barrier that {int(here.sum())} of its {self.block_size} threads "
            "reach\n" + "\n".join(lines)
        )

    def _whereabouts(self, lanes: Any) -> list[tuple[str, int, Any]]:
        """What became of threads that do not run: (words, place, threads)."""
        found: list[tuple[str, int, Any]] = []
        if self.left_at is not None:
            for place in np.unique(self.left_at[lanes]):
                if place:
                    found.append(("returned at", int(place), lanes[self.left_at[lanes] == place]))
            lanes = lanes[self.left_at[lanes] == 0]
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
        a, b = mine - self.first * self.block_size, theirs - self.first * self.block_size
        known = (b >= 0) & (b < self.lanes) & (self.warp_of(mine) == self.warp_of(theirs))
        b = np.where(known, b, 0)
        warps = -(-self.block_size // WARP)
        warp = a // self.block_size * warps + a % self.block_size // WARP
        return known & (self.warp_clocks[warp, a % self.block_size % WARP, b % self.block_size % WARP] > clocks)

    def warp_of(self, thread: Any) -> Any:
        """A number for the warp of each of these threads, counted over the launch."""
        return thread // self.block_size * (1 << 10) + thread % self.block_size // WARP

    # Names.

    def some_lane(self) -> int:
        """A thread that runs."""
        lanes = self.mask.lanes
        return 0 if lanes is None else int(lanes[0])

    def name_of_lane(self, lane: int) -> str:
        """`block (0, 1, 0), thread (3, 0, 0)` for one of these threads."""
        return self.name_of(lane + self.first * self.block_size)

    def name_of(self, thread: int) -> str:
        """The same for a thread counted over the launch."""
        x, y, _ = self.launch.block
        number = thread % self.block_size
        at = (number % x, number // x % y, number // (x * y))
        return f"block {self._block_text(thread // self.block_size - self.first)}, thread {at}"

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
