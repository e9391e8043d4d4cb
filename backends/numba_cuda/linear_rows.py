"""Products of few rows on tensor cores, for decode and verification.

Owns `multiply_rows_on_tensor_cores`. What always holds: the weights are the 16 rows of the product's left matrix and
rows of x the 8 columns of its right one, so one row wastes little; K goes to a block's warps in turn, 64 elements at a
time, and the warps' sums are added first to last: an order that N and K alone decide. Weights come straight from global
memory by 16-byte loads: a lane's eight consecutive k stand for the k that the instruction gives it, the same for both
matrices, which no sum can tell from the usual order.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from slotwise.backends.numba_cuda.blocks import WARP, ZERO
from slotwise.backends.numba_cuda.elements import PACK, load_words
from slotwise.backends.numba_cuda.products import Product, finisher
from slotwise.backends.numba_cuda.simulator import cuda, device, kernel
from slotwise.backends.numba_cuda.tensor_cores import tensor_core_of
from slotwise.core.specs import DType

TILE = 16
"""Outputs of a block: rows of the left matrix."""

COLUMNS = 8
"""Rows of x that one product takes: columns of the right matrix."""

MOST_SUMS = 8
"""Products that a warp makes with the weights it has read, gate's and up's together: what its registers hold."""

CHUNK = 64
"""Elements of K that a warp reads at a time."""

BUSY = 2048
"""Warps that keep a large GPU's memory busy."""

EMPTY = (np.uint32(0),) * 4


def warps_for(outputs: int, inner: int, chunk: int = CHUNK) -> int:
    """Warps that share a block's K: more while there are few blocks and each warp keeps two chunks."""
    warps, blocks = 4, math.ceil(outputs / TILE)
    while warps < 16 and blocks * warps < BUSY and inner >= 4 * warps * chunk:
        warps *= 2
    return warps


def tiles_for(rows: int, gated: bool) -> int:
    """Groups of 8 rows that a block takes."""
    return min(MOST_SUMS // (2 if gated else 1), 1 << max(0, math.ceil(rows / COLUMNS) - 1).bit_length())


@functools.cache
def product_pair(dtype: DType) -> Any:
    """`acc` row `place` plus the product over 32 of K: of two rows' weights (`low`, `high`) and one row of x."""
    mma, _ = tensor_core_of(dtype)

    @device
    def multiply(acc, place, low, high, x):
        c0, c1, c2, c3 = mma(
            low[0], high[0], low[1], high[1], x[0], x[1], acc[place, 0], acc[place, 1], acc[place, 2], acc[place, 3]
        )
        c0, c1, c2, c3 = mma(low[2], high[2], low[3], high[3], x[2], x[3], c0, c1, c2, c3)
        acc[place, 0] = c0
        acc[place, 1] = c1
        acc[place, 2] = c2
        acc[place, 3] = c3

    return multiply


@device
def words_of(array, row, rows, k, inner):
    """16 bytes of row `row` from `k` on; zeros beyond the last row and beyond K."""
    return load_words(array, row * inner + k) if row < rows and k < inner else EMPTY


@device
def put_tile(parts, acc, place, at, column):
    """A warp's sums for 16 outputs and 8 rows of x, into shared memory as [row of x, output]."""
    parts[column * TILE + at] = acc[place, 0]
    parts[(column + 1) * TILE + at] = acc[place, 1]
    parts[column * TILE + at + 8] = acc[place, 2]
    parts[(column + 1) * TILE + at + 8] = acc[place, 3]


@functools.cache
def sums_to_outputs(of: Product, tiles: int, warps: int) -> Any:
    """`finish_tiles(...)`: the warps' sums (`acc`, of up `ups`) added first to last, and what follows, stored."""
    finish, gated, outputs, threads = finisher(of), of.gated, of.outputs, warps * WARP

    @device
    def finish_tiles(parts, up_parts, acc, ups, bias, out, second, third, count):
        thread = cuda.threadIdx.x
        t = thread % 4
        at = thread // WARP * (TILE * COLUMNS) + thread % WARP // 4
        for r in range(tiles):
            put_tile(parts, acc, r, at, 2 * t)
            if gated:
                put_tile(up_parts, ups, r, at, 2 * t)
            cuda.syncthreads()
            for place in range(thread, TILE * COLUMNS, threads):
                row = (cuda.blockIdx.y * tiles + r) * COLUMNS + place // TILE
                column = cuda.blockIdx.x * TILE + place % TILE
                value, up = ZERO, ZERO
                for w in range(warps):
                    value += parts[w * (TILE * COLUMNS) + place]
                    if gated:
                        up += up_parts[w * (TILE * COLUMNS) + place]
                if row < count and column < outputs:
                    finish(row, column, value, up, bias, out, second, third)
            cuda.syncthreads()

    return finish_tiles


@functools.cache
def multiply_rows_on_tensor_cores(of: Product, tiles: int) -> Any:
    """Up to 8 `tiles` rows of x [T, K] times 16 rows of weight [N, K] (of gate and of up, where there are two)."""
    warps = warps_for(of.outputs, of.inner)
    multiply = product_pair(of.dtype)
    outputs, inner, gated = of.outputs, of.inner, of.gated
    step, size = warps * CHUNK, warps * TILE * COLUMNS
    up_size = size if gated else 1
    up_tiles = tiles if gated else 1
    finish_tiles = sums_to_outputs(of, tiles, warps)

    @kernel
    def multiply_rows_on_tensor_cores(x, weight, bias, out, second, third, count):
        parts = cuda.shared.array(size, np.float32)
        up_parts = cuda.shared.array(up_size, np.float32)
        acc = cuda.local.array((tiles, 4), np.float32)
        ups = cuda.local.array((up_tiles, 4), np.float32)
        thread = cuda.threadIdx.x
        warp = thread // WARP
        g = thread % WARP // 4
        t = thread % 4
        low = cuda.blockIdx.x * TILE + g
        first = cuda.blockIdx.y * (tiles * COLUMNS)
        for r in range(tiles):
            for i in range(4):
                acc[r, i] = ZERO
                if gated:
                    ups[r, i] = ZERO
        for start in range(warp * CHUNK, inner, step):
            k = start + t * PACK
            low_0 = words_of(weight, low, outputs, k, inner)
            high_0 = words_of(weight, low + 8, outputs, k, inner)
            low_1 = words_of(weight, low, outputs, k + 32, inner)
            high_1 = words_of(weight, low + 8, outputs, k + 32, inner)
            if gated:
                # Rows of up follow all rows of gate.
                up_low_0 = words_of(weight, low + outputs, 2 * outputs, k, inner)
                up_high_0 = words_of(weight, low + 8 + outputs, 2 * outputs, k, inner)
                up_low_1 = words_of(weight, low + outputs, 2 * outputs, k + 32, inner)
                up_high_1 = words_of(weight, low + 8 + outputs, 2 * outputs, k + 32, inner)
            for r in range(tiles):
                row = first + r * COLUMNS + g
                x_0 = words_of(x, row, count, k, inner)
                x_1 = words_of(x, row, count, k + 32, inner)
                multiply(acc, r, low_0, high_0, x_0)
                multiply(acc, r, low_1, high_1, x_1)
                if gated:
                    multiply(ups, r, up_low_0, up_high_0, x_0)
                    multiply(ups, r, up_low_1, up_high_1, x_1)
        finish_tiles(parts, up_parts, acc, ups, bias, out, second, third, count)

    return multiply_rows_on_tensor_cores
