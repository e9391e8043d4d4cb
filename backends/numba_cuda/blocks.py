"""What threads work out together: sums, maxima, and the lowest index of the greatest value.

Owns `block_sum`, `block_max` and `block_best`, device functions for a block of a fixed number of threads, which take
shared arrays with one element a warp that may be used again at once; and, within a warp, `lane_sum` over neighbouring
lanes and `team_sum` and `team_max` over groups of them. What always holds: every thread gets the result; a sum's order
is the tree of shuffles and then warp after warp, which numbers of threads and lanes alone decide; a NaN is passed over
by maxima.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from slotwise.backends.numba_cuda.simulator import cuda, device

WARP = 32
ALL = 0xFFFFFFFF
ZERO = np.float32(0)
LEAST = np.float32(-np.inf)
NOWHERE = 2147483647
"""The index of nothing: above every token."""


@device
def greater(a, b):
    """The greater of two; `a` where `b` is a NaN."""
    return b if b > a else a


@device
def warp_sum(value):
    """The sum over a warp's lanes, the same bits in each."""
    value += cuda.shfl_xor_sync(ALL, value, 16)
    value += cuda.shfl_xor_sync(ALL, value, 8)
    value += cuda.shfl_xor_sync(ALL, value, 4)
    value += cuda.shfl_xor_sync(ALL, value, 2)
    value += cuda.shfl_xor_sync(ALL, value, 1)
    return value


@device
def warp_max(value):
    """The greatest of a warp's lanes."""
    value = greater(value, cuda.shfl_xor_sync(ALL, value, 16))
    value = greater(value, cuda.shfl_xor_sync(ALL, value, 8))
    value = greater(value, cuda.shfl_xor_sync(ALL, value, 4))
    value = greater(value, cuda.shfl_xor_sync(ALL, value, 2))
    return greater(value, cuda.shfl_xor_sync(ALL, value, 1))


@functools.cache
def lane_sum(lanes: int) -> Any:
    """The sum over groups of `lanes` neighbouring lanes, the same bits in each."""
    wide_16, wide_8, wide_4, wide_2, wide_1 = (lanes > offset for offset in (16, 8, 4, 2, 1))

    @device
    def total(value):
        if wide_16:
            value += cuda.shfl_xor_sync(ALL, value, 16)
        if wide_8:
            value += cuda.shfl_xor_sync(ALL, value, 8)
        if wide_4:
            value += cuda.shfl_xor_sync(ALL, value, 4)
        if wide_2:
            value += cuda.shfl_xor_sync(ALL, value, 2)
        if wide_1:
            value += cuda.shfl_xor_sync(ALL, value, 1)
        return value

    return total


@functools.cache
def team_sum(lanes: int) -> Any:
    """The sum over a warp's teams of `lanes` lanes: of each lane and those in its place in the other teams."""
    over_1, over_2, over_4, over_8, over_16 = (lanes <= offset for offset in (1, 2, 4, 8, 16))

    @device
    def total(value):
        if over_16:
            value += cuda.shfl_xor_sync(ALL, value, 16)
        if over_8:
            value += cuda.shfl_xor_sync(ALL, value, 8)
        if over_4:
            value += cuda.shfl_xor_sync(ALL, value, 4)
        if over_2:
            value += cuda.shfl_xor_sync(ALL, value, 2)
        if over_1:
            value += cuda.shfl_xor_sync(ALL, value, 1)
        return value

    return total


@functools.cache
def team_max(lanes: int) -> Any:
    """The greatest over a warp's teams of `lanes` lanes, as `team_sum`."""
    over_1, over_2, over_4, over_8, over_16 = (lanes <= offset for offset in (1, 2, 4, 8, 16))

    @device
    def highest(value):
        if over_16:
            value = greater(value, cuda.shfl_xor_sync(ALL, value, 16))
        if over_8:
            value = greater(value, cuda.shfl_xor_sync(ALL, value, 8))
        if over_4:
            value = greater(value, cuda.shfl_xor_sync(ALL, value, 4))
        if over_2:
            value = greater(value, cuda.shfl_xor_sync(ALL, value, 2))
        if over_1:
            value = greater(value, cuda.shfl_xor_sync(ALL, value, 1))
        return value

    return highest


@functools.cache
def block_sum(threads: int, whole: bool = False) -> Any:
    """`total(value, shared)`: the sum over `threads` threads; of whole numbers where `whole`."""
    warps = threads // WARP
    zero = np.int64(0) if whole else ZERO

    if warps == 1:

        @device
        def total(value, shared):
            return warp_sum(value)

    else:

        @device
        def total(value, shared):
            value = warp_sum(value)
            thread = cuda.threadIdx.x
            if thread % WARP == 0:
                shared[thread // WARP] = value
            cuda.syncthreads()
            result = zero
            for warp in range(warps):
                result += shared[warp]
            cuda.syncthreads()
            return result

    return total


@functools.cache
def block_max(threads: int) -> Any:
    """`highest(value, shared)`: the greatest over `threads` threads."""
    warps = threads // WARP

    @device
    def highest(value, shared):
        value = warp_max(value)
        thread = cuda.threadIdx.x
        if thread % WARP == 0:
            shared[thread // WARP] = value
        cuda.syncthreads()
        result = LEAST
        for warp in range(warps):
            result = greater(result, shared[warp])
        cuda.syncthreads()
        return result

    return highest


@device
def better(value, index, other, other_index):
    """Whether (other, other_index) goes before (value, index): greater, or equal and at a lower index."""
    return other > value or (other == value and other_index < index)


@functools.cache
def block_best(threads: int) -> Any:
    """`best(value, index, values, indices)`: the greatest value and the lowest index that has it."""
    warps = threads // WARP

    @device
    def step(value, index, offset):
        other = cuda.shfl_xor_sync(ALL, value, offset)
        other_index = cuda.shfl_xor_sync(ALL, index, offset)
        takes = better(value, index, other, other_index)
        return (other if takes else value), (other_index if takes else index)

    @device
    def best(value, index, values, indices):
        value, index = step(value, index, 16)
        value, index = step(value, index, 8)
        value, index = step(value, index, 4)
        value, index = step(value, index, 2)
        value, index = step(value, index, 1)
        thread = cuda.threadIdx.x
        if thread % WARP == 0:
            values[thread // WARP] = value
            indices[thread // WARP] = index
        cuda.syncthreads()
        value = values[0]
        index = indices[0]
        for warp in range(1, warps):
            takes = better(value, index, values[warp], indices[warp])
            value = values[warp] if takes else value
            index = indices[warp] if takes else index
        cuda.syncthreads()
        return value, index

    return best
