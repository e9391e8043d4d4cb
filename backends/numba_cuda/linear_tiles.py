"""Products of many rows on tensor cores, for prefill.

Owns `multiply_tiles`. What always holds: a block makes 128 rows of x times 128 rows of weight (64 of gate and 64 of up,
where there are two); both pass through shared memory in slices of 32 of K, the next one being copied while the present
one is multiplied. Rows in shared memory are eight elements longer than they need be, so that the eight rows of a
matrix lie in different banks. Bits may depend on the tile: it promises no row invariance.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from slotwise.backends.numba_cuda.blocks import WARP, ZERO
from slotwise.backends.numba_cuda.elements import PACK
from slotwise.backends.numba_cuda.products import Product, finisher
from slotwise.backends.numba_cuda.simulator import cuda, device, kernel
from slotwise.backends.numba_cuda.tensor_cores import (
    ALIGNMENT,
    commit_copies,
    copies_done,
    copy_16,
    load_matrices,
    tensor_core_of,
)

ROWS, COLUMNS = 128, 128
"""Rows of x and rows of weight that a block multiplies."""

SLICE = 32
"""Elements of K between two barriers."""

STRIDE = SLICE + PACK
STAGE = ROWS * STRIDE
"""Elements of one slice of x, and of weight, in shared memory."""

STAGES = 2 * STAGE
THREADS = 256
PACKS = SLICE // PACK
HALF = 32
"""Of a warp's 64 columns, how many are gate's; the others are up's."""


def columns_of(gated: bool) -> int:
    """Columns of the result that a block makes."""
    return COLUMNS // 2 if gated else COLUMNS


@device
def copy_slice(target, start, source, row, rows, k, inner, at):
    """Thread's 16 bytes of a slice: of `row` of the source from `k` on, zeros beyond its end."""
    live = row < rows and k < inner
    copy_16(target, start + at, source, row * inner + k if live else 0, live)


@functools.cache
def multiply_tiles(of: Product) -> Any:
    """A tile of x [T, K] times weight [N, K] transposed."""
    mma, _ = tensor_core_of(of.dtype)
    finish, outputs, inner, gated = finisher(of), of.outputs, of.inner, of.gated
    weight_rows, own = outputs * (2 if gated else 1), columns_of(gated)

    @device
    def weight_row(j):
        """The row of weight that is row `j` of the block's tile."""
        if gated:
            column = cuda.blockIdx.x * own + j // (2 * HALF) * HALF + j % HALF
            up = j % (2 * HALF) // HALF
            return column + up * outputs if column < outputs else weight_rows
        return cuda.blockIdx.x * own + j

    @device
    def fetch(x, weight, left, right, k, stage, count):
        for part in range(ROWS * PACKS // THREADS):
            item = part * THREADS + cuda.threadIdx.x
            j = item // PACKS
            pack = item % PACKS * PACK
            at = j * STRIDE + pack
            copy_slice(left, stage * STAGE, x, cuda.blockIdx.y * ROWS + j, count, k + pack, inner, at)
            copy_slice(right, stage * STAGE, weight, weight_row(j), weight_rows, k + pack, inner, at)
        commit_copies()

    @device
    def multiply(acc, i, j, a, b0, b1):
        c0, c1, c2, c3 = mma(a[0], a[1], a[2], a[3], b0, b1, acc[i, j, 0], acc[i, j, 1], acc[i, j, 2], acc[i, j, 3])
        acc[i, j, 0] = c0
        acc[i, j, 1] = c1
        acc[i, j, 2] = c2
        acc[i, j, 3] = c3

    # Written out, with numbers for indices: where a loop over what follows a sum is not unrolled, `acc` is in memory.

    @device
    def finish_one(value, up, row, column, bias, out, second, third, count):
        if row < count and column < outputs:
            finish(row, column, value, up, bias, out, second, third)

    @device
    def finish_tile(acc, i, j, row, column, bias, out, second, third, count):
        up = j + 4 if gated else j
        finish_one(acc[i, j, 0], acc[i, up, 0], row, column, bias, out, second, third, count)
        finish_one(acc[i, j, 1], acc[i, up, 1], row, column + 1, bias, out, second, third, count)
        finish_one(acc[i, j, 2], acc[i, up, 2], row + 8, column, bias, out, second, third, count)
        finish_one(acc[i, j, 3], acc[i, up, 3], row + 8, column + 1, bias, out, second, third, count)

    @device
    def finish_rows(acc, i, row, column, bias, out, second, third, count):
        finish_tile(acc, i, 0, row, column, bias, out, second, third, count)
        finish_tile(acc, i, 1, row, column + 8, bias, out, second, third, count)
        finish_tile(acc, i, 2, row, column + 16, bias, out, second, third, count)
        finish_tile(acc, i, 3, row, column + 24, bias, out, second, third, count)
        if not gated:
            finish_tile(acc, i, 4, row, column + 32, bias, out, second, third, count)
            finish_tile(acc, i, 5, row, column + 40, bias, out, second, third, count)
            finish_tile(acc, i, 6, row, column + 48, bias, out, second, third, count)
            finish_tile(acc, i, 7, row, column + 56, bias, out, second, third, count)

    @kernel
    def multiply_tiles(x, weight, bias, out, second, third, count):
        left = cuda.shared.array(STAGES, np.uint16, alignment=ALIGNMENT)
        right = cuda.shared.array(STAGES, np.uint16, alignment=ALIGNMENT)
        acc = cuda.local.array((2, 8, 4), np.float32)
        lane = cuda.threadIdx.x % WARP
        warp = cuda.threadIdx.x // WARP
        warp_row = warp // 2 * 32
        warp_column = warp % 2 * 64
        for i in range(2):
            for j in range(8):
                for c in range(4):
                    acc[i, j, c] = ZERO
        # Where this lane's row of an 8 x 8 matrix lies: of x, matrices are (rows, k), (rows + 8, k), (rows, k + 8) and
        # so on; of weight (columns, k), (columns, k + 8), (columns + 8, k) and so on.
        left_at = (warp_row + lane % 16) * STRIDE + lane // 16 * 8
        right_at = (warp_column + lane // 16 * 8 + lane % 8) * STRIDE + lane // 8 % 2 * 8
        fetch(x, weight, left, right, 0, 0, count)
        stage = 0
        for k in range(0, inner, SLICE):
            fetch(x, weight, left, right, k + SLICE, 1 - stage, count)
            copies_done()
            cuda.syncthreads()
            for deep in range(0, SLICE, 16):
                at = stage * STAGE + deep
                a_0 = load_matrices(left, left_at + at)
                a_1 = load_matrices(left, left_at + at + 16 * STRIDE)
                for j in range(4):
                    b = load_matrices(right, right_at + at + j * 16 * STRIDE)
                    multiply(acc, 0, 2 * j, a_0, b[0], b[1])
                    multiply(acc, 0, 2 * j + 1, a_0, b[2], b[3])
                    multiply(acc, 1, 2 * j, a_1, b[0], b[1])
                    multiply(acc, 1, 2 * j + 1, a_1, b[2], b[3])
            cuda.syncthreads()
            stage = 1 - stage
        first_row = cuda.blockIdx.y * ROWS + warp_row + lane // 4
        if gated:
            first_column = cuda.blockIdx.x * own + warp_column // 2 + lane % 4 * 2
        else:
            first_column = cuda.blockIdx.x * own + warp_column + lane % 4 * 2
        finish_rows(acc, 0, first_row, first_column, bias, out, second, third, count)
        finish_rows(acc, 1, first_row + 16, first_column, bias, out, second, third, count)

    return multiply_tiles
