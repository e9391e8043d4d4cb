"""Paged attention for prefill chunks, on tensor cores.

Owns `attend_tiles`. What always holds: a block does up to 64 consecutive rows of one sequence for one query head (one
half of its dimensions where there are more than 128), tile by tile of its keys, with the softmax kept up as it goes
(Dao, 2023); scores never leave registers, and become weights there in the very layout that the second product takes. It
promises no row invariance.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from slotwise.backends.numba_cuda.activation import ONE, quick_tanh
from slotwise.backends.numba_cuda.attention_shape import Shape, sequence_of
from slotwise.backends.numba_cuda.blocks import ALL, LEAST, WARP, ZERO, greater
from slotwise.backends.numba_cuda.elements import PACK, elements_of
from slotwise.backends.numba_cuda.simulator import cuda, device, kernel
from slotwise.backends.numba_cuda.tensor_cores import (
    ALIGNMENT,
    all_copies_done,
    copy_16,
    load_matrices,
    load_matrices_transposed,
    tensor_core_of,
)

WIDE = 128
"""Dimensions of a result that a block's registers hold: wider heads are shared by two blocks."""

WARPS = 4
"""Each has 16 rows."""

ROWS, THREADS = WARPS * 16, WARPS * WARP


def parts_for(head_dim: int) -> int:
    """Blocks that share a head: each computes all scores, and its own dimensions of the result."""
    return math.ceil(head_dim / WIDE)


@device
def quad_max(value):
    """The greatest of four neighbouring lanes, which hold a row."""
    value = greater(value, cuda.shfl_xor_sync(ALL, value, 2))
    return greater(value, cuda.shfl_xor_sync(ALL, value, 1))


@device
def quad_sum(value):
    """The sum over four neighbouring lanes."""
    value += cuda.shfl_xor_sync(ALL, value, 2)
    value += cuda.shfl_xor_sync(ALL, value, 1)
    return value


@functools.cache
def attend_tiles(shape: Shape) -> Any:
    """One tile of rows of a sequence, one query head, all keys that it sees."""
    mma, pack = tensor_core_of(shape.dtype)
    narrow = elements_of(shape.dtype, False).narrow
    head_dim, q_heads, kv_heads, group = shape.head_dim, shape.q_heads, shape.kv_heads, shape.group
    page_size, window, capped = shape.page_size, shape.window, shape.capped
    rows, threads, keys = ROWS, THREADS, 32 if head_dim <= WIDE else 16
    deep = math.ceil(head_dim / 16)  # steps of 16 dimensions
    own = math.ceil(deep / parts_for(head_dim))  # of which the block has a result for so many
    packs, stride = deep * 2, deep * 16 + PACK
    own_packs, own_stride = own * 2, own * 16 + PACK
    query_size, key_size, value_size = rows * stride, keys * stride, keys * own_stride
    key_frags, out_frags = keys // 8, own * 2

    @device
    def multiply(acc, j, a0, a1, a2, a3, b0, b1):
        c0, c1, c2, c3 = mma(a0, a1, a2, a3, b0, b1, acc[j, 0], acc[j, 1], acc[j, 2], acc[j, 3])
        acc[j, 0] = c0
        acc[j, 1] = c1
        acc[j, 2] = c2
        acc[j, 3] = c3

    # Called for either row with a number for `i`: a loop over both is not unrolled where its body is long, and what it
    # indexes is then in memory. No exact division before or within the loop over keys: each has a call for rare cases,
    # after which ptxas no longer takes a warp's lanes to be together, and what is live must outlive calls.

    @device
    def weigh(scores, acc, best, mass, i, its_place, last_place, first, scale, softcap):
        """Scores of the lane's row `i` become weights, under the greatest so far; what was summed shrinks to that.

        Places are counted from the tile's first key. `scale` is over `softcap` already, where there is one.
        """
        newest = np.int32(min(its_place, last_place))
        oldest = np.int32(max(its_place - window, -1)) if window > 0 else np.int32(-1)
        highest = best[i]
        for j in range(key_frags):
            for c in range(2):
                place = np.int32(first + j * 8 + c)
                score = scores[j, i * 2 + c] * scale
                if capped:
                    score = quick_tanh(score) * softcap
                score = score if oldest < place <= newest else LEAST
                scores[j, i * 2 + c] = score
                highest = greater(highest, score)
        highest = quad_max(highest)
        # A row that has seen nothing yet keeps -inf; subtracting that from itself would make a NaN.
        base = ZERO if highest == LEAST else highest
        shrink = math.exp(best[i] - base)
        total = ZERO
        for j in range(key_frags):
            for c in range(2):
                weight = math.exp(scores[j, i * 2 + c] - base)
                scores[j, i * 2 + c] = weight
                total += weight
        mass[i] = mass[i] * shrink + quad_sum(total)
        best[i] = highest
        for j in range(out_frags):
            for c in range(2):
                acc[j, i * 2 + c] *= shrink

    @device
    def write_row(out, acc, mass, i, its_row, stop, head, first, end_d):
        """The lane's part of the result's row `i`."""
        if its_row < stop:
            place = (its_row * q_heads + head) * head_dim
            share = ONE / mass[i]
            for j in range(out_frags):
                for c in range(2):
                    d = first + j * 8 + c
                    if d < end_d:
                        out[place + d] = narrow(acc[j, i * 2 + c] * share)

    @kernel
    def attend_tiles(q, k_cache, v_cache, row_start, kv_len, page_table, out, sequences, columns, scale, softcap):
        queries = cuda.shared.array(query_size, np.uint16, alignment=ALIGNMENT)
        near_keys = cuda.shared.array(key_size, np.uint16, alignment=ALIGNMENT)
        near_values = cuda.shared.array(value_size, np.uint16, alignment=ALIGNMENT)
        acc = cuda.local.array((out_frags, 4), np.float32)
        scores = cuda.local.array((key_frags, 4), np.float32)
        best = cuda.local.array(2, np.float32)
        mass = cuda.local.array(2, np.float32)
        thread = cuda.threadIdx.x
        lane = thread % WARP
        warp = thread // WARP
        g = lane // 4
        t = lane % 4
        own_row = warp * 16 + g
        # Where this lane's row of an 8 x 8 matrix lies, in the first step; the others are a fixed distance away.
        query_at = (warp * 16 + lane % 16) * stride + lane // 16 * 8
        key_at = (lane // 16 * 8 + lane % 8) * stride + lane // 8 % 2 * 8
        value_at = lane % 16 * own_stride + lane // 16 * 8
        row = np.int64(cuda.blockIdx.x)
        head = cuda.blockIdx.y
        kv_head = head // group
        begin_d = cuda.blockIdx.z * (own * 16)
        end_d = min(begin_d + own * 16, head_dim)
        b = sequence_of(row, row_start, sequences)
        first, last = np.int64(0), np.int64(0)
        starts = False
        if b < sequences:
            first = np.int64(row_start[b])
            last = np.int64(row_start[b + 1])
            # The tile that starts at an earlier row has this one otherwise.
            starts = (row - first) % rows == 0
        else:
            for d in range(begin_d + thread, end_d, threads):
                out[(row * q_heads + head) * head_dim + d] = narrow(ZERO)
        if starts:
            position = kv_len[b] - last + row
            stop = min(row + rows, last)
            end = position + stop - row
            begin = np.int64(0)
            if window > 0:
                begin = max(position - window + 1, 0) // keys * keys
            for item in range(thread, rows * packs, threads):
                r = item // packs
                d = item % packs * PACK
                live = row + r < stop and d < head_dim
                copy_16(queries, r * stride + d, q, ((row + r) * q_heads + head) * head_dim + d if live else 0, live)
            for i in range(2):
                best[i] = LEAST
                mass[i] = ZERO
            for j in range(out_frags):
                for c in range(4):
                    acc[j, c] = ZERO
            for start in range(begin, end, keys):
                for item in range(thread, keys * packs, threads):
                    key = start + item // packs
                    d = item % packs * PACK
                    at = item // packs * stride + d
                    live = key < end and d < head_dim
                    source = np.int64(0)
                    if live:
                        slot = page_table[b * columns + key // page_size] * page_size + key % page_size
                        source = (slot * kv_heads + kv_head) * head_dim + d
                    copy_16(near_keys, at, k_cache, source, live)
                for item in range(thread, keys * own_packs, threads):
                    key = start + item // own_packs
                    d = item % own_packs * PACK
                    at = item // own_packs * own_stride + d
                    live = key < end and begin_d + d < head_dim
                    source = np.int64(0)
                    if live:
                        slot = page_table[b * columns + key // page_size] * page_size + key % page_size
                        source = (slot * kv_heads + kv_head) * head_dim + begin_d + d
                    copy_16(near_values, at, v_cache, source, live)
                all_copies_done()
                cuda.syncthreads()
                for j in range(key_frags):
                    for c in range(4):
                        scores[j, c] = ZERO
                for step in range(deep):
                    a = load_matrices(queries, query_at + step * 16)
                    for j in range(key_frags // 2):
                        m = load_matrices(near_keys, key_at + (j * stride + step) * 16)
                        multiply(scores, 2 * j, a[0], a[1], a[2], a[3], m[0], m[1])
                        multiply(scores, 2 * j + 1, a[0], a[1], a[2], a[3], m[2], m[3])
                last_key = end - 1 - start
                weigh(scores, acc, best, mass, 0, position + own_row - start, last_key, t * 2, scale, softcap)
                weigh(scores, acc, best, mass, 1, position + own_row + 8 - start, last_key, t * 2, scale, softcap)
                for j in range(key_frags // 2):
                    a0 = pack(scores[2 * j, 0], scores[2 * j, 1])
                    a1 = pack(scores[2 * j, 2], scores[2 * j, 3])
                    a2 = pack(scores[2 * j + 1, 0], scores[2 * j + 1, 1])
                    a3 = pack(scores[2 * j + 1, 2], scores[2 * j + 1, 3])
                    for step in range(own):
                        m = load_matrices_transposed(near_values, value_at + (j * own_stride + step) * 16)
                        multiply(acc, 2 * step, a0, a1, a2, a3, m[0], m[1])
                        multiply(acc, 2 * step + 1, a0, a1, a2, a3, m[2], m[3])
                cuda.syncthreads()
            write_row(out, acc, mass, 0, row + own_row, stop, head, begin_d + t * 2, end_d)
            write_row(out, acc, mass, 1, row + own_row + 8, stop, head, begin_d + t * 2, end_d)

    return attend_tiles
