"""Attention over paged caches, and the cache write.

Owns the kernels of `attention` and `write_slots`. What always holds: a row's queries of one K/V head are one
piece of work; keys are taken in runs of `RUN` positions that start at multiples of it, and runs are added up in order,
whoever computed them: so a row's bits depend on its query and its sequence's keys and values up to it alone, not on
other rows, other sequences, pages or threads. Softmax is float32, run by run (Milakov and Gimelshein, 2018; keys are
split among threads as in Flash-Decoding: Dao, Haziza, Massa and Sizov, 2023).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from slotwise.backends.numba_cpu.calls import Call, Part
from slotwise.backends.numba_cpu.compiled import Address, compile_kernel
from slotwise.backends.numba_cpu.elements import given, kind_of, refuses_wide_floats
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
    int64s,
    narrow,
    stack_memory,
    tanh,
)
from slotwise.backends.numba_cpu.products import packed_width, strided_products_function
from slotwise.backends.numba_cpu.threads import FAULT, FIRST_FIELD, MAX_THREADS, next_chunk, share
from slotwise.backends.numba_cpu.vectors import BF16, BLOCK, F32, ITEMSIZE, ask_for, greatest, mix_block, pack_row
from slotwise.core.backend import CallSpec, Kernel, Launch, Tensors
from slotwise.core.graph import Attr
from slotwise.core.specs import dim_size

_AT = FIRST_FIELD * 8

RUN = 128
"""Positions of one run of keys: whole vectors, and few enough for scores to stay in the nearest cache."""

HEADS = 6
"""Query heads that share one pass over keys and values, at most: as many rows as a tile of products has."""

FEW_PIECES = 32
"""Pieces of work below which runs are handed out one by one: few heads and a long sequence still keep all busy."""

_LINE = 64
"""Bytes of a cache line."""

_LANE_BYTES, _BLOCK_BYTES = LANES * 4, BLOCK * 4

# A record's fields: the op's arguments, then memory and sizes.
_Q, _K_CACHE, _V_CACHE, _ROW_START, _KV_LEN, _PAGE_TABLE, _OUT, _SCRATCH, _OWN, _PIECES = range(10)
_BATCH, _Q_HEADS, _KV_HEADS, _HEAD_DIM, _PAGE_SIZE, _COLUMNS, _WINDOW, _SCALE, _SOFTCAP, _PRODUCTS = range(10, 20)
_RUN_BYTES = 20
_FIELDS = 21

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
def _piece(field: Any, piece: int) -> tuple[int, int, int, int]:
    """(row, K/V head, first query head, query heads) of a piece of work."""
    q_heads, kv_heads = field[_Q_HEADS], field[_KV_HEADS]
    group = q_heads // kv_heads
    passes = (group + HEADS - 1) // HEADS
    row, kv_head = piece // (kv_heads * passes), piece // passes % kv_heads
    first = kv_head * group + piece % passes * HEADS
    return row, kv_head, first, min(HEADS, (kv_head + 1) * group - first)


@device
def _sight(field: Any, row: int, sequence: int) -> tuple[int, int, int]:
    """(sequence, first position, last + 1) that a row sees; the search begins at `sequence`. Empty for a padded row."""
    batch, window = field[_BATCH], field[_WINDOW]
    row_start, kv_len = int32s(field[_ROW_START], batch + 1), int32s(field[_KV_LEN], batch)
    if row >= row_start[batch]:
        return sequence, 0, 0
    while row >= row_start[sequence + 1]:
        sequence += 1
    end = as_int64(kv_len[sequence]) - (as_int64(row_start[sequence + 1]) - row) + 1
    return sequence, max(0, end - window) if window > 0 else 0, end


@device
def _attend_run(
    kind: int, capped: bool, field: Any, piece: int, sequence: int, low: int, high: int, own: int, found: int
) -> None:
    """A piece's attention to the positions `low` to `high` of one run.

    At `found`: sums of weighted values (packed), greatest scores, sums of weights. `own` is this thread's memory.
    """
    row, kv_head, first_head, heads = _piece(field, piece)
    head_dim, page_size, columns = field[_HEAD_DIM], field[_PAGE_SIZE], field[_COLUMNS]
    item = 4 if kind == F32 else 2
    wide = (head_dim + BLOCK - 1) // BLOCK * BLOCK
    stride = field[_KV_HEADS] * head_dim * item
    head_at, pages = kv_head * head_dim * item, field[_PAGE_TABLE] + sequence * columns * 4
    scale, softcap = np.float32(double_of_bits(field[_SCALE])), np.float32(double_of_bits(field[_SOFTCAP]))
    for head in range(heads):
        source = field[_Q] + (row * field[_Q_HEADS] + first_head + head) * head_dim * item
        pack_row(kind, source, head_dim, own + head * (BLOCK * 4), heads * (BLOCK * 4))
    scores_at = own + HEADS * wide * 4
    mixed, highest = floats(found, heads * wide), floats(found + HEADS * wide * 4, HEADS)
    total = floats(found + HEADS * (wide + 1) * 4, HEADS)
    for i in range(heads * wide):
        mixed[i] = ZERO
    _scores_of_run(
        field[_PRODUCTS],
        heads,
        own,
        field[_K_CACHE] + head_at,
        field[_V_CACHE] + head_at,
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
    _mix_run(kind, heads, field[_V_CACHE] + head_at, stride, head_dim, pages, page_size, low, high, scores_at, found)


@device
def _merge(heads: int, wide: int, into: int, found: int) -> None:
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
def _begin(heads: int, wide: int, into: int) -> None:
    """Sums of no run at all."""
    mixed, highest = floats(into, heads * wide), floats(into + HEADS * wide * 4, HEADS)
    total = floats(into + HEADS * (wide + 1) * 4, HEADS)
    for i in range(heads * wide):
        mixed[i] = ZERO
    for head in range(heads):
        highest[head], total[head] = _LOWEST, ZERO


@device
def _finish(kind: int, field: Any, row: int, first_head: int, heads: int, wide: int, sums: int, is_real: bool) -> None:
    """Write a piece's result: its sums over its sum of weights, zeros for a padded row."""
    head_dim = field[_HEAD_DIM]
    item = 4 if kind == F32 else 2
    at = field[_OUT] + (row * field[_Q_HEADS] + first_head) * head_dim * item
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


@functools.cache
def _attention(kind: int, capped: bool) -> Address:
    """Each piece of work is one thread's: run after run."""

    def attention(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, _FIELDS)
        wide = (field[_HEAD_DIM] + BLOCK - 1) // BLOCK * BLOCK
        own = field[_SCRATCH] + thread * field[_OWN]
        found = own + HEADS * (wide + RUN) * 4
        sums = found + field[_RUN_BYTES]
        sequence = 0
        while True:
            piece = next_chunk(call)
            if piece >= field[_PIECES]:
                break
            row, _, first_head, heads = _piece(field, piece)
            sequence, begin, end = _sight(field, row, sequence)
            if end < 0 or end > field[_COLUMNS] * field[_PAGE_SIZE]:
                int64s(call, FIRST_FIELD)[FAULT] = 1
                continue
            _begin(heads, wide, sums)
            for start in range(begin // RUN * RUN, end, RUN):
                _attend_run(kind, capped, field, piece, sequence, max(begin, start), min(end, start + RUN), own, found)
                _merge(heads, wide, sums, found)
            _finish(kind, field, row, first_head, heads, wide, sums, end > 0)

    return compile_kernel(attention)


@functools.cache
def _attention_by_run(kind: int, capped: bool) -> Address:
    """Each run of each piece is one thread's; `_combine` adds them up."""

    def attention_by_run(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, _FIELDS)
        own = field[_SCRATCH] + thread * field[_OWN]
        partial = field[_SCRATCH] + MAX_THREADS * field[_OWN]
        pieces = field[_PIECES]
        longest: Any = 0
        kv_len = int32s(field[_KV_LEN], field[_BATCH])
        for b in range(field[_BATCH]):
            longest = max(longest, as_int64(kv_len[b]))
        if longest > field[_COLUMNS] * field[_PAGE_SIZE]:
            int64s(call, FIRST_FIELD)[FAULT] = 1
            return
        units = pieces * ((longest + RUN - 1) // RUN)
        while True:
            unit = next_chunk(call)
            if unit >= units:
                break
            piece, start = unit % pieces, unit // pieces * RUN
            row, _, _, _ = _piece(field, piece)
            sequence, begin, end = _sight(field, row, 0)
            low, high = max(begin, start), min(end, start + RUN)
            if low < high:
                found = partial + unit * field[_RUN_BYTES]
                _attend_run(kind, capped, field, piece, sequence, low, high, own, found)

    return compile_kernel(attention_by_run)


@functools.cache
def _combine(kind: int) -> Address:
    """Adds up the runs of each piece, in order."""

    def combine_runs(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, _FIELDS)
        wide = (field[_HEAD_DIM] + BLOCK - 1) // BLOCK * BLOCK
        sums = field[_SCRATCH] + thread * field[_OWN]
        partial = field[_SCRATCH] + MAX_THREADS * field[_OWN]
        first, last = share(field[_PIECES], thread, threads)
        for piece in range(first, last):
            row, _, first_head, heads = _piece(field, piece)
            _, begin, end = _sight(field, row, 0)
            if end < 0 or end > field[_COLUMNS] * field[_PAGE_SIZE]:
                int64s(call, FIRST_FIELD)[FAULT] = 1
                continue
            _begin(heads, wide, sums)
            for run in range(begin // RUN, (end + RUN - 1) // RUN):
                _merge(heads, wide, sums, partial + (run * field[_PIECES] + piece) * field[_RUN_BYTES])
            _finish(kind, field, row, first_head, heads, wide, sums, end > 0)

    return compile_kernel(combine_runs)


@functools.cache
def _write_slots(kind: int) -> Address:
    item = ITEMSIZE[kind]

    def write_slots(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, 8)
        rows, width, all_slots = field[5], field[6], field[7]
        slots = int32s(field[4], rows)
        first, last = share(rows, thread, threads)
        for row in range(first, last):
            slot = as_int64(slots[row])
            if slot < 0 or slot >= all_slots:
                int64s(call, FIRST_FIELD)[FAULT] = 1
                continue
            for which in range(2):
                source = elements(kind, field[which] + row * width * item, width)
                target = elements(kind, field[2 + which] + slot * width * item, width)
                for i in range(width):
                    target[i] = source[i]

    return compile_kernel(write_slots)


def _refuses(call: CallSpec) -> str | None:
    dims = call.contract.match(call.inputs, call.attrs)[0]
    q_heads, kv_heads = dims["Hq"], dims["Hkv"]
    if isinstance(q_heads, int) and isinstance(kv_heads, int) and q_heads % kv_heads:
        return f"{q_heads} query heads cannot share {kv_heads} key and value heads evenly"
    return refuses_wide_floats(call)


def _pieces(rows: int, q_heads: int, kv_heads: int) -> int:
    return rows * kv_heads * -(-(q_heads // kv_heads) // HEADS)


def _apart(nbytes: int) -> int:
    """`nbytes` in whole pairs of cache lines: two threads that write one line, or neighbours, wait for each other."""
    return -(-nbytes // 128) * 128


def _run_bytes(head_dim: int) -> int:
    """What is found in one run, or in all: sums of weighted values, greatest scores, sums of weights."""
    return _apart(HEADS * (packed_width(head_dim) + 2) * 4)


def _own_bytes(head_dim: int) -> int:
    """One thread's memory: packed queries, scores, and sums of one run and of all."""
    return _apart(HEADS * (packed_width(head_dim) + RUN) * 4 + 2 * _run_bytes(head_dim))


def _workspace(call: CallSpec) -> int:
    dims = {name: dim_size(dim, {}) for name, dim in call.contract.match(call.inputs, call.attrs)[0].items()}
    needed = MAX_THREADS * _own_bytes(dims["D"])
    pieces = _pieces(dims["T"], dims["Hq"], dims["Hkv"])
    if pieces < FEW_PIECES:
        runs = -(-dims["P"] * int(call.attrs["page_size"]) // RUN)
        needed += pieces * runs * _run_bytes(dims["D"])
    return needed


def _bind(
    inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], workspace: torch.Tensor | None
) -> Launch:
    q, k_cache, page_table = given(inputs[0]), given(inputs[1]), given(inputs[5])
    (rows, q_heads, head_dim), kv_heads = q.shape, k_cache.shape[1]
    (batch, columns), page_size = page_table.shape, int(attrs["page_size"])
    window, scale, softcap = int(attrs["window"]), float(attrs["scale"]), float(attrs["softcap"])
    pieces, kind, capped = _pieces(rows, q_heads, kv_heads), kind_of(q), softcap > 0
    numbers = (
        pieces,
        batch,
        q_heads,
        kv_heads,
        head_dim,
        page_size,
        columns,
        window,
        scale,
        softcap,
        strided_products_function(kind),
        _run_bytes(head_dim),
    )
    fields = (*inputs, *outputs, workspace, _own_bytes(head_dim), *numbers)
    fault = f"a sequence has fewer tokens than rows, or more than its {columns} pages hold"
    if pieces >= FEW_PIECES:
        return Call(Part("attention", _attention(kind, capped), fields, fault))
    by_run = Part("attention", _attention_by_run(kind, capped), fields, fault)
    return Call(by_run, Part("attention", _combine(kind), fields, fault))


def _bind_write(
    inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], _: torch.Tensor | None
) -> Launch:
    k, cache = given(inputs[0]), given(inputs[2])
    fields = (*inputs, len(k), k.shape[1] * k.shape[2], len(cache))
    return Call(Part("write_slots", _write_slots(kind_of(k)), fields, f"a slot is outside the cache of {len(cache)}"))


KERNELS = (
    Kernel("write_slots", "write_slots", _bind_write, refuses_wide_floats),
    Kernel("attention", "attention", _bind, _refuses, workspace=_workspace),
)
