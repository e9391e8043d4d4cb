"""One run of keys and values: what a piece of attention's work makes of it, and how runs are added up.

Owns `attend_run`, `merge` and `finish`, and the fields of a call's record. What always holds: a run is `RUN` positions
that start at a multiple of it, and what it gives depends on a row's queries and on its keys and values alone; runs are
added up in order, both sides relative to the greater of their greatest scores. Softmax is float32, run by run (Milakov
and Gimelshein, 2018).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slotwise.backends.numba_cpu.machine import LANES
from slotwise.backends.numba_cpu.memory import (
    ONE,
    ZERO,
    as_int64,
    call_8,
    device,
    double_of_bits,
    elements,
    exp,
    floats,
    int32s,
    narrow,
    stack_memory,
    tanh,
)
from slotwise.backends.numba_cpu.vectors import BF16, BLOCK, F32, ask_for, greatest, mix_block, pack_row

RUN = 128
"""Positions of one run of keys: whole vectors, and few enough for scores to stay in the nearest cache."""

HEADS = 6
"""Query heads that share one pass over keys and values, at most: as many rows as a tile of products has."""

# A record's fields: the op's arguments, then memory and sizes.
Q, K_CACHE, V_CACHE, ROW_START, KV_LEN, PAGE_TABLE, OUT, SCRATCH, OWN, PIECES = range(10)
BATCH, Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, COLUMNS, WINDOW, SCALE, SOFTCAP, PRODUCTS = range(10, 20)
RUN_BYTES = 20
FIELDS = 21

_LINE = 64
"""Bytes of a cache line."""

_LANE_BYTES, _BLOCK_BYTES = LANES * 4, BLOCK * 4

_LOWEST = np.float32(-np.inf)


@device
def _sum_of_run(weights: np.ndarray, count: int) -> np.float32:
    """The sum of a run's weights, whole vectors of them, over lanes first."""
    lanes = floats(stack_memory(_LANE_BYTES), LANES)
    for lane in range(LANES):
        lanes[lane] = ZERO
    for i in range(0, count, LANES):
        for lane in range(LANES):
            lanes[lane] += weights[i + lane]
    total = ZERO
    for lane in range(LANES):
        total += lanes[lane]
    return total


@device
def _mix(kind: int, heads: int, values: int, stride: int, count: int, weights: int, sums: int) -> None:
    if heads == 1:
        mix_block(kind, 1, values, stride, count, weights, RUN * 4, sums)
    elif heads == 2:
        mix_block(kind, 2, values, stride, count, weights, RUN * 4, sums)
    elif heads == 3:
        mix_block(kind, 3, values, stride, count, weights, RUN * 4, sums)
    elif heads == 4:
        mix_block(kind, 4, values, stride, count, weights, RUN * 4, sums)
    elif heads == 5:
        mix_block(kind, 5, values, stride, count, weights, RUN * 4, sums)
    else:
        mix_block(kind, 6, values, stride, count, weights, RUN * 4, sums)


@device
def _ask_for_page(cache: int, page: int, page_size: int, stride: int, width: int) -> None:
    """Ask for a head's part, `width` bytes, of each position of a page."""
    start = cache + page * page_size * stride
    for position in range(page_size):
        for line in range(0, width, _LINE):
            ask_for(start + position * stride + line)


@device
def _scores_of_run(
    products: int,
    heads: int,
    queries: int,
    keys: int,
    values: int,
    stride: int,
    head_dim: int,
    width: int,
    pages: int,
    page_size: int,
    first: int,
    last: int,
    scores: int,
) -> None:
    """Products of the queries with the keys at positions `first` to `last` of one run; a page's keys lie together.

    Meanwhile the next page's keys are asked for, and the values of this one, `width` bytes each.
    """
    table = int32s(pages, last // page_size + 1)
    position = first
    while position < last:
        page, inside = position // page_size, position % page_size
        together = min(page_size - inside, last - position)
        if position + together < last:
            _ask_for_page(keys, as_int64(table[page + 1]), page_size, stride, width)
        _ask_for_page(values, as_int64(table[page]), page_size, stride, width)
        key = keys + (as_int64(table[page]) * page_size + inside) * stride
        at = scores + (position % RUN) * 4
        call_8(products, (heads, queries, key, stride, head_dim, together, at, RUN * 4))
        position += together


@device
def _mix_run(
    kind: int,
    heads: int,
    cache: int,
    stride: int,
    head_dim: int,
    pages: int,
    page_size: int,
    first: int,
    last: int,
    weights: int,
    sums: int,
) -> None:
    """Add the weighted values at positions `first` to `last` of one run to the sums."""
    table = int32s(pages, last // page_size + 1)
    item = 4 if kind == F32 else 2
    edge = stack_memory(_BLOCK_BYTES)
    position = first
    while position < last:
        page, inside = position // page_size, position % page_size
        together = min(page_size - inside, last - position)
        value = cache + (as_int64(table[page]) * page_size + inside) * stride
        weight = weights + (position % RUN) * 4
        for block in range(head_dim // BLOCK):
            at = value + block * BLOCK * item
            _mix(kind, heads, at, stride, together, weight, sums + block * (heads * BLOCK * 4))
        rest = head_dim % BLOCK
        if rest > 0:
            # Values beyond a head's last belong to others: they are copied out, position by position.
            start = head_dim - rest
            copied = elements(kind, edge, BLOCK)
            for i in range(rest, BLOCK):
                copied[i] = narrow(kind, ZERO)
            for i in range(together):
                source = elements(kind, value + i * stride + start * item, rest)
                for j in range(rest):
                    copied[j] = source[j]
                _mix(kind, heads, edge, 0, 1, weight + i * 4, sums + (head_dim // BLOCK) * (heads * BLOCK * 4))
        position += together


@device
def piece_of(field: Any, piece: int) -> tuple[int, int, int, int]:
    """(row, K/V head, first query head, query heads) of a piece of work."""
    q_heads, kv_heads = field[Q_HEADS], field[KV_HEADS]
    group = q_heads // kv_heads
    passes = (group + HEADS - 1) // HEADS
    row, kv_head = piece // (kv_heads * passes), piece // passes % kv_heads
    first = kv_head * group + piece % passes * HEADS
    return row, kv_head, first, min(HEADS, (kv_head + 1) * group - first)


@device
def sight_of(field: Any, row: int, sequence: int) -> tuple[int, int, int]:
    """(sequence, first position, last + 1) that a row sees; the search begins at `sequence`. Empty for a padded row."""
    batch, window = field[BATCH], field[WINDOW]
    row_start, kv_len = int32s(field[ROW_START], batch + 1), int32s(field[KV_LEN], batch)
    if row >= row_start[batch]:
        return sequence, 0, 0
    while row >= row_start[sequence + 1]:
        sequence += 1
    end = as_int64(kv_len[sequence]) - (as_int64(row_start[sequence + 1]) - row) + 1
    return sequence, max(0, end - window) if window > 0 else 0, end


@device
def attend_run(
    kind: int, capped: bool, field: Any, piece: int, sequence: int, low: int, high: int, own: int, found: int
) -> None:
    """A piece's attention to the positions `low` to `high` of one run.

    At `found`: sums of weighted values (packed), greatest scores, sums of weights. `own` is this thread's memory.
    """
    row, kv_head, first_head, heads = piece_of(field, piece)
    head_dim, page_size, columns = field[HEAD_DIM], field[PAGE_SIZE], field[COLUMNS]
    item = 4 if kind == F32 else 2
    wide = (head_dim + BLOCK - 1) // BLOCK * BLOCK
    stride = field[KV_HEADS] * head_dim * item
    head_at, pages = kv_head * head_dim * item, field[PAGE_TABLE] + sequence * columns * 4
    scale, softcap = np.float32(double_of_bits(field[SCALE])), np.float32(double_of_bits(field[SOFTCAP]))
    for head in range(heads):
        source = field[Q] + (row * field[Q_HEADS] + first_head + head) * head_dim * item
        pack_row(kind, source, head_dim, own + head * (BLOCK * 4), heads * (BLOCK * 4))
    scores_at = own + HEADS * wide * 4
    mixed, highest = floats(found, heads * wide), floats(found + HEADS * wide * 4, HEADS)
    total = floats(found + HEADS * (wide + 1) * 4, HEADS)
    for i in range(heads * wide):
        mixed[i] = ZERO
    _scores_of_run(
        field[PRODUCTS],
        heads,
        own,
        field[K_CACHE] + head_at,
        field[V_CACHE] + head_at,
        stride,
        head_dim,
        head_dim * item,
        pages,
        page_size,
        low,
        high,
        scores_at,
    )
    # Whole vectors about the run's scores: what else stands in them weighs nothing.
    first, count = low % RUN // LANES * LANES, high - low
    before = low % RUN - first
    whole = (before + count + LANES - 1) // LANES * LANES
    for head in range(heads):
        at = scores_at + (head * RUN + first) * 4
        scores, all_scores = floats(at + before * 4, count), floats(at, whole)
        for i in range(count):
            score = scores[i] * scale
            if capped:
                score = tanh(score / softcap) * softcap
            scores[i] = score
        for i in range(before):
            all_scores[i] = _LOWEST
        for i in range(before + count, whole):
            all_scores[i] = _LOWEST
        # A NaN must not lose against a number: it is an error of its row, to be seen there.
        best = greatest(at, whole)
        for i in range(whole):
            all_scores[i] = exp(all_scores[i] - best)
        highest[head], total[head] = best, _sum_of_run(all_scores, whole)
    _mix_run(kind, heads, field[V_CACHE] + head_at, stride, head_dim, pages, page_size, low, high, scores_at, found)


@device
def merge(heads: int, wide: int, into: int, found: int) -> None:
    """Add a run's sums to those of the runs before it, both relative to the greater of their greatest scores."""
    mixed, more = floats(into, heads * wide), floats(found, heads * wide)
    highest, its_highest = floats(into + HEADS * wide * 4, HEADS), floats(found + HEADS * wide * 4, HEADS)
    total, its_total = floats(into + HEADS * (wide + 1) * 4, HEADS), floats(found + HEADS * (wide + 1) * 4, HEADS)
    for head in range(heads):
        old, new = highest[head], its_highest[head]
        best = new if new > old or new != new else old
        keep, take = exp(old - best), exp(new - best)
        highest[head], total[head] = best, total[head] * keep + its_total[head] * take
        for block in range(wide // BLOCK):
            at = (block * heads + head) * BLOCK
            for i in range(at, at + BLOCK):
                mixed[i] = mixed[i] * keep + more[i] * take


@device
def begin_sums(heads: int, wide: int, into: int) -> None:
    """Sums of no run at all."""
    mixed, highest = floats(into, heads * wide), floats(into + HEADS * wide * 4, HEADS)
    total = floats(into + HEADS * (wide + 1) * 4, HEADS)
    for i in range(heads * wide):
        mixed[i] = ZERO
    for head in range(heads):
        highest[head], total[head] = _LOWEST, ZERO


@device
def finish(kind: int, field: Any, row: int, first_head: int, heads: int, wide: int, sums: int, is_real: bool) -> None:
    """Write a piece's result: its sums over its sum of weights, zeros for a padded row."""
    head_dim = field[HEAD_DIM]
    item = 4 if kind == F32 else 2
    at = field[OUT] + (row * field[Q_HEADS] + first_head) * head_dim * item
    result = elements(kind, at, heads * head_dim)
    if not is_real:
        for i in range(heads * head_dim):
            result[i] = narrow(kind, ZERO)
        return
    mixed, total = floats(sums, heads * wide), floats(sums + HEADS * (wide + 1) * 4, HEADS)
    for head in range(heads):
        part = ONE / total[head]
        for i in range(head_dim):
            inside = i % BLOCK
            if kind == BF16:
                inside = inside // 2 + (inside % 2) * LANES
            result[head * head_dim + i] = narrow(kind, mixed[(i // BLOCK * heads + head) * BLOCK + inside] * part)
