"""Reading and writing arrays for the threads that run.

Owns `load`, `store` and what they are made of. What always holds: indices are checked before memory is touched; memory
is touched for the threads that run and no others; the race checker hears of every access to memory that threads share.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .arrays import NOWHERE, Array, dtype_of, shape_of, strides_of
from .faults import Misaligned, OutOfBounds, UnsupportedKernel, site_text
from .races import SITE_SHIFT, Shadow
from .threads import WARP_BITS, Threads
from .values import reinterpret

_INT = np.dtype(np.int64)
_largest = np.maximum.reduce


def load(threads: Threads, array: Any, index: Any, site: int) -> Any:
    """`array[index]`."""
    if not isinstance(array, Array):
        return _item(array, index, site)
    if isinstance(index, slice):
        return _slice(threads, array, index, site)
    if array.kind == "local" and not isinstance(index, tuple) and index.ndim == 0 and len(array.shape) == 1:
        at = int(index)
        if not 0 <= at < array.shape[0]:
            _out_of_bounds(threads, array, (index,), None, site)
        return array.flat[at * threads.lanes : (at + 1) * threads.lanes].copy()
    lanes = threads.mask.lanes
    at = places(threads, array, narrow(index, lanes), lanes, site)
    value = fetch(threads, array, at, lanes, site)
    return value if lanes is None or at.ndim == 0 else spread(threads, value, lanes)


def store(threads: Threads, array: Any, index: Any, value: Any, site: int) -> None:
    """`array[index] = value`."""
    if not isinstance(array, Array):
        raise UnsupportedKernel(f"an item of {array!r} is assigned at {site_text(site)}")
    if isinstance(index, slice):
        raise UnsupportedKernel(f"a slice is assigned at {site_text(site)}; write the loop out")
    lanes = threads.mask.lanes
    at = places(threads, array, narrow(index, lanes), lanes, site)
    if lanes is not None and value.ndim:
        value = value[lanes]
    put(threads, array, at, value, lanes, site)


def narrow(index: Any, lanes: Any) -> tuple[Any, ...]:
    """The index of the threads that run, one number or array a dimension."""
    parts = index if isinstance(index, tuple) else (index,)
    return parts if lanes is None else tuple([part[lanes] if part.ndim else part for part in parts])


def places(threads: Threads, array: Array, index: tuple[Any, ...], lanes: Any, site: int) -> Any:
    """Positions in `array.flat` for the threads that run (`lanes`; None for all), inside the shape."""
    shape, strides = array.shape, array.strides
    if len(index) != len(shape):
        if len(index) != 1 or strides != strides_of(shape):  # one number, from an intrinsic, is a flat index
            raise UnsupportedKernel(
                f"{array.kind} array {array.name} has {len(shape)} dimensions, its index {len(index)}; slices of "
                f"arrays with more dimensions are not known here\n  at {site_text(site)}"
            )
        shape, strides = (array.size,), (1,)
    start = array.start
    found: Any = start if lanes is None or start.ndim == 0 else start[lanes]
    for part, extent, stride in zip(index, shape, strides, strict=True):
        if part.dtype is not _INT:
            if part.dtype.kind not in "iu":
                raise UnsupportedKernel(f"{array.name} is indexed by a {part.dtype} at {site_text(site)}")
            part = part.astype(np.int64)
        if part.ndim == 0:
            if not 0 <= part < extent:
                _out_of_bounds(threads, array, index, lanes, site)
        elif part.size and _largest(part.view(np.uint64), None) >= extent:  # as an unsigned number, -1 is large
            _out_of_bounds(threads, array, index, lanes, site)
        step = part if stride == 1 else part * stride
        found = step if found is NOWHERE else found + step
    return found


def _out_of_bounds(threads: Threads, array: Array, index: tuple[Any, ...], lanes: Any, site: int) -> None:
    flat = len(index) == 1 and len(array.shape) != 1
    shape = (array.size,) if flat else array.shape
    bad: Any = np.False_
    for part, extent in zip(index, shape, strict=True):
        bad = bad | (part < 0) | (part >= extent)
    if threads.mask.count == 0:
        return
    which = int(np.argmax(bad.reshape(-1))) if bad.ndim else 0
    at = [int(part.reshape(-1)[which]) if part.ndim else int(part) for part in index]
    per_lane = bad.size // max(1, threads.mask.count) if bad.ndim else 1
    active = which // max(1, per_lane)
    lane = int(active if lanes is None else lanes[active]) if bad.ndim else threads.some_lane()
    raise OutOfBounds(
        f"{array.kind} array {array.name}[{', '.join(map(str, at))}] is outside its shape {array.shape}\n"
        f"  {threads.name_of_lane(lane)} at {site_text(site)}"
    )


def fetch(threads: Threads, array: Array, at: Any, lanes: Any, site: int) -> Any:
    """The elements at these positions, with the race checker told."""
    if array.records is not None and threads.checks:
        array.records.read(threads, array, *records_of(threads, array, at, lanes, site), lanes)
    return array.flat[at]


def put(threads: Threads, array: Array, at: Any, value: Any, lanes: Any, site: int) -> None:
    """Writes the elements at these positions, with the race checker told."""
    if array.kind == "const":
        raise UnsupportedKernel(f"constant array {array.name} is written at {site_text(site)}")
    if array.records is not None and threads.checks:
        array.records.write(threads, array, *records_of(threads, array, at, lanes, site), lanes)
    if value.dtype != array.dtype:
        value = value.astype(array.dtype)
    if at.ndim == 0 and value.ndim:
        value = value[-1]
    array.flat[at] = value


def records_of(threads: Threads, array: Array, at: Any, lanes: Any, site: int) -> tuple[Any, Any]:
    """The same positions in the units that records have, and who is there, when, at which line."""
    records = array.records
    assert records is not None
    stamps = (threads.stamps if lanes is None else threads.stamps[lanes]) + (site << SITE_SHIFT)
    if at.ndim == 0:
        at = np.full(stamps.shape, at)
    elif at.ndim > 1:
        stamps, at = stamps.repeat(at.shape[1]), at.reshape(-1)
    wide = array.itemsize // records.unit
    if wide != 1:
        at = at * wide
    if array.records_at:
        at = at + array.records_at // records.unit
    if wide > 1:
        at, stamps = (at[:, None] + np.arange(wide)).reshape(-1), stamps.repeat(wide)
    return at, stamps


def spread(threads: Threads, value: Any, lanes: Any) -> Any:
    """Values of the threads that run, put where those threads are among all."""
    if lanes is None or not isinstance(value, np.ndarray) or value.ndim == 0:
        return value
    out = np.zeros(threads.lanes, value.dtype)
    out[lanes] = value
    return out


def _item(values: Any, index: Any, site: int) -> Any:
    if isinstance(values, tuple) and isinstance(index, np.integer):
        if not -len(values) <= index < len(values):
            raise OutOfBounds(f"item {index} of a tuple of {len(values)} at {site_text(site)}")
        return values[int(index)]
    if isinstance(values, tuple) and isinstance(index, slice):
        return values[index]
    raise UnsupportedKernel(f"{values!r} is indexed by {index!r} at {site_text(site)}")


def _slice(threads: Threads, array: Array, index: slice, site: int) -> Array:
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
            f"  {threads.name_of_lane(threads.some_lane())} at {site_text(site)}"
        )
    return array.part_of(first, last - first)


def shared_array(threads: Threads, site: int, name: str, shape: Any, dtype: Any, alignment: Any = None) -> Array:
    """`cuda.shared.array`: one a block and place in the source; of size 0, the launch's dynamic shared memory."""
    kind, extents = dtype_of(dtype), shape_of(shape)
    dynamic = extents == (0,)
    if dynamic:
        count = threads.launch.shared_bytes // kind.itemsize
        extents = (count,)
        key: Any = "dynamic"
    else:
        count, key = math.prod(extents), (site, name)
    if key not in threads.shared:
        size = threads.launch.shared_bytes if dynamic else count * kind.itemsize
        padded = -(-size // 16) * 16
        raw = np.full(threads.blocks * padded, 0xFF, np.uint8)
        records = (
            Shadow(threads.blocks * padded // kind.itemsize, kind.itemsize, WARP_BITS, shared=True)
            if threads.checks
            else None
        )
        threads.shared[key] = raw, records
    raw, records = threads.shared[key]
    if records is not None and records.unit > kind.itemsize:
        records.refine(kind.itemsize)
    flat = raw.view(kind)
    part = len(flat) // threads.blocks
    start: Any = NOWHERE if threads.blocks == 1 else threads.block_of * part
    aligned = 16 if dynamic else kind.itemsize if alignment is None else int(alignment)
    made = Array(name, "shared", flat, extents, strides_of(extents), start, aligned)
    made.records, made.part = records, part
    return made


def local_array(threads: Threads, name: str, shape: Any, dtype: Any, alignment: Any = None) -> Array:
    """`cuda.local.array`: one a thread; what it holds before it is written is of no meaning."""
    kind, extents = dtype_of(dtype), shape_of(shape)
    flat = np.full(math.prod(extents) * threads.lanes * kind.itemsize, 0xFF, np.uint8).view(kind)
    strides = tuple(stride * threads.lanes for stride in strides_of(extents))
    aligned = kind.itemsize if alignment is None else int(alignment)
    return Array(name, "local", flat, extents, strides, threads.lane_numbers, aligned)


def check_aligned(threads: Threads, array: Array, places: Any, size: int, lanes: Any, site: int) -> None:
    """Raises Misaligned where an access of `size` bytes is at an address that is no multiple of it."""
    if array.kind in ("shared", "local") and array.address % size:
        raise Misaligned(
            f"{array.kind} array {array.name} is accessed {size} bytes at a time and aligned to "
            f"{array.address & -array.address} alone; make it with alignment={size}\n"
            f"  {threads.name_of_lane(threads.some_lane())} at {site_text(site)}"
        )
    base = array.address if array.kind in ("global", "const") else 0
    within = places if not array.part else places % array.part
    bad = (base + within * array.itemsize) % size != 0
    if array.kind != "local" and np.any(bad):
        which = int(np.argmax(bad.reshape(-1))) if bad.ndim else 0
        lane = threads.some_lane() if not bad.ndim else int(which if lanes is None else lanes[which])
        place = int(within.reshape(-1)[which]) if bad.ndim else int(within)
        raise Misaligned(
            f"{array.element(place - array.where)} is accessed {size} bytes at a time, at an address that {size} does "
            f"not divide\n  {threads.name_of_lane(lane)} at {site_text(site)}"
        )


def length(value: Any) -> Any:
    """`len` of an array or a tuple."""
    return np.int64(value.shape[0] if isinstance(value, Array) else len(value))


def view(value: Any, dtype: Any) -> Any:
    """`value.view(dtype)` of a number."""
    if isinstance(value, Array):
        raise UnsupportedKernel(f"an array, {value.name}, is viewed as another type")
    return reinterpret(value, dtype)


def attribute(owner: Any, name: str, site: int) -> Any:
    """`owner.name` of an array or a number."""
    if isinstance(owner, Array):
        if name == "shape":
            return tuple(map(np.int64, owner.shape))
        if name in ("size", "itemsize"):
            return np.int64(getattr(owner, name))
        if name == "ndim":
            return np.int64(len(owner.shape))
        if name == "strides":
            return tuple(np.int64(stride * owner.itemsize) for stride in owner.strides)
    if name == "dtype" and isinstance(owner, (Array, np.ndarray, np.generic)):
        return owner.dtype
    raise UnsupportedKernel(f"the attribute {name} of {owner!r} is not known here\n  at {site_text(site)}")
