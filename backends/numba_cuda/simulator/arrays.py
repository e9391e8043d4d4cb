"""Arrays as kernels see them: arguments, shared memory, local memory.

Owns `Array` and how an index becomes a position in memory. What always holds: every index of every active thread is
checked against the shape before memory is touched, checks on or off; a position is counted in elements of `flat`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .faults import BadLaunch, UnsupportedKernel
from .races import Shadow

NOWHERE: Any = np.int64(0)
"""Where an array starts that begins with its memory."""


class Array:
    """One array, the same for all threads or with a part for each block or thread.

    `start` is where the array begins in `flat`: 0, or one number a thread. `strides` count elements. `address` is what
    alignment is judged by: of the first element, in bytes. `part` is the size in elements of one block's part.
    """

    __slots__ = (
        "address", "dtype", "flat", "itemsize", "kind", "name", "part", "records", "records_at", "shape", "start",
        "strides", "where",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        kind: str,
        flat: Any,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        start: Any,
        address: int,
    ) -> None:
        self.name, self.kind, self.flat, self.shape, self.strides, self.start = name, kind, flat, shape, strides, start
        self.dtype, self.itemsize, self.address = flat.dtype, flat.dtype.itemsize, address
        self.records: Shadow | None = None
        self.records_at, self.part, self.where = 0, 0, 0

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def describe(self, byte: int) -> str:
        """`shared array tile[3, 1]` for a byte of the memory that records count from."""
        element = (byte - self.records_at) // self.itemsize
        if self.part:
            element %= self.part
        return self.element(element - self.where)

    def element(self, offset: int) -> str:
        """`shared array tile[3, 1]` for an element so far from the first."""
        index = []
        for stride in self.strides:
            index.append(str(offset // stride if stride else 0))
            offset = offset % stride if stride else offset
        return f"{self.kind} array {self.name}[{', '.join(index)}]"

    def part_of(self, first: int, count: int) -> Array:
        """A slice of a one-dimensional array."""
        made = Array(
            self.name, self.kind, self.flat, (count,), self.strides, self.start + np.int64(first * self.strides[0]),
            self.address + first * self.strides[0] * self.itemsize,
        )  # fmt: skip
        made.records, made.records_at, made.part = self.records, self.records_at, self.part
        made.where = self.where + first * self.strides[0]
        return made


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a C-contiguous array, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def global_array(name: str, value: Any, kind: str = "global") -> Array:
    """An argument of a kernel; shares memory with `value`, which is a numpy array or becomes one without a copy."""
    data = value if isinstance(value, np.ndarray) else np.asarray(value)
    if data.dtype.kind not in "biuf":
        raise BadLaunch(f"argument {name} has dtype {data.dtype}; numbers and booleans are known here (bf16 as uint16)")
    strides = tuple(stride // data.itemsize for stride in data.strides)
    if data.size and (any(s % data.itemsize for s in data.strides) or min(strides, default=0) < 0):
        raise BadLaunch(
            f"argument {name} has strides {data.strides}; whole positive numbers of elements are known here"
        )
    extent = 1 + sum((n - 1) * s for n, s in zip(data.shape, strides, strict=True)) if data.size else 0
    flat = np.lib.stride_tricks.as_strided(data, (extent,), (data.itemsize,))
    return Array(name, kind, flat, data.shape, strides, NOWHERE, data.__array_interface__["data"][0])


def share_records(arrays: list[Array], written: set[str], block_bits: int) -> None:
    """Gives arrays that a kernel writes, and those that overlap them in memory, their records.

    `block_bits` is `Launch.block_bits`. Arrays that are only read, and whose memory is not written through another,
    need none.
    """
    spans = sorted((a for a in arrays if a.flat.size), key=lambda a: a.address)
    group: list[Array] = []
    end = -1
    for array in [*spans, None]:
        if array is None or array.address >= end:
            _records_of(group, end, written, block_bits)
            group = []
        if array is not None:
            group.append(array)
            end = max(end, array.address + array.flat.size * array.itemsize)


def _records_of(group: list[Array], end: int, written: set[str], block_bits: int) -> None:
    if not any(array.name in written for array in group):
        for array in group:
            array.records = None
        return
    first = group[0].address
    unit = math.gcd(*(a.itemsize for a in group), *(a.address - first for a in group))
    records = Shadow((end - first) // unit, unit, block_bits)
    for array in group:
        array.records, array.records_at = records, array.address - first


def dtype_of(value: Any) -> np.dtype[Any]:
    """What a kernel names as an array's dtype: a numpy type, or Numba's type of the same name."""
    try:
        return np.dtype(getattr(value, "name", value) if not isinstance(value, type) else value)
    except TypeError:
        raise UnsupportedKernel(f"{value!r} is no dtype that is known here") from None


def shape_of(value: Any) -> tuple[int, ...]:
    """A shape written as a number or a tuple."""
    return tuple(int(n) for n in value) if isinstance(value, tuple) else (int(value),)
