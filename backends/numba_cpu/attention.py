"""Attention over paged caches, and the cache write.

Owns the kernels of `attention` and `write_slots`. What always holds: a row's queries of one K/V head are one piece of
work; keys are taken in runs of `RUN` positions that start at multiples of it, so a row's bits depend on its query and its
sequence's keys and values up to it alone: not on other rows, other sequences or which pages hold the tokens. Softmax is
taken in float32, run by run (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import torch

from slotwise.backends.numba_cpu.calls import Call, Part
from slotwise.backends.numba_cpu.compiled import Address, compile_kernel
from slotwise.backends.numba_cpu.elements import given, kind_of, refuses_wide_floats
from slotwise.backends.numba_cpu.memory import (
    ONE,
    ZERO,
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
from slotwise.backends.numba_cpu.products import packed_width, products
from slotwise.backends.numba_cpu.threads import FAULT, FIRST_FIELD, MAX_THREADS, next_chunk, share
from slotwise.backends.numba_cpu.vectors import BF16, BLOCK, F32, ITEMSIZE, LANES, mix_block, pack_row
from slotwise.core.backend import CallSpec, Kernel, Launch, Tensors
from slotwise.core.graph import Attr

_AT = FIRST_FIELD * 8

RUN = 128
"""Positions of one run of keys: whole vectors, and few enough for scores to stay in the nearest cache."""

HEADS = 6
"""Query heads that share one pass over keys and values, at most: as many rows as a tile of products has."""

_HEAD_BYTES, _LANE_BYTES, _BLOCK_BYTES = HEADS * 4, LANES * 4, BLOCK * 4
_LOWEST = np.float32(-np.inf)


@device
def _sum_of_run(scores: np.ndarray, at: int) -> np.float32:
    """The sum of a run's weights, over lanes first."""
    lanes = floats(stack_memory(_LANE_BYTES), LANES)
    for lane in range(LANES):
        lanes[lane] = ZERO
    for i in range(0, RUN, LANES):
        for lane in range(LANES):
            lanes[lane] += scores[at + i + lane]
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
def _scores_of_run(
    kind: int,
    heads: int,
    queries: int,
    cache: int,
    stride: int,
    head_dim: int,
    pages: int,
    page_size: int,
    first: int,
    last: int,
    scores: int,
) -> None:
    """Products of the queries with the keys at positions `first` to `last` of one run; a page's keys lie together."""
    table = int32s(pages, last // page_size + 1)
    position = first
    while position < last:
        page, inside = position // page_size, position % page_size
        together = min(page_size - inside, last - position)
        key = cache + (np.int64(table[page]) * page_size + inside) * stride
        products(kind, heads, queries, key, stride, head_dim, together, scores + (position % RUN) * 4, RUN * 4)
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
        value = cache + (np.int64(table[page]) * page_size + inside) * stride
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


@functools.cache
def _attention(kind: int, capped: bool) -> Address:
    item = ITEMSIZE[kind]

    def attention(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, 18)
        q, k_cache, v_cache = field[0], field[1], field[2]
        page_table, out, scratch = field[5], field[6], field[7]
        rows, batch, q_heads, kv_heads, head_dim = field[8], field[9], field[10], field[11], field[12]
        page_size, columns, window = field[13], field[14], field[15]
        scale, softcap = np.float32(double_of_bits(field[16])), np.float32(double_of_bits(field[17]))
        row_start, kv_len = int32s(field[3], batch + 1), int32s(field[4], batch)
        group = q_heads // kv_heads
        passes = (group + HEADS - 1) // HEADS
        stride = kv_heads * head_dim * item
        wide = (head_dim + BLOCK - 1) // BLOCK * BLOCK
        own = scratch + thread * (HEADS * (2 * wide + RUN) * 4)
        queries, sums, scores_at = own, own + HEADS * wide * 4, own + HEADS * 2 * wide * 4
        scores = floats(scores_at, HEADS * RUN)
        highest, total = floats(stack_memory(_HEAD_BYTES), HEADS), floats(stack_memory(_HEAD_BYTES), HEADS)
        mixed = floats(sums, HEADS * wide)
        pieces = rows * kv_heads * passes
        sequence = np.int64(0)
        while True:
            piece = next_chunk(call)
            if piece >= pieces:
                break
            row, kv_head = piece // (kv_heads * passes), piece // passes % kv_heads
            first_head = kv_head * group + piece % passes * HEADS
            heads = min(HEADS, (kv_head + 1) * group - first_head)
            result = elements(kind, out + (row * q_heads + first_head) * head_dim * item, heads * head_dim)
            if row >= row_start[batch]:
                for i in range(heads * head_dim):
                    result[i] = narrow(kind, ZERO)
                continue
            while row >= row_start[sequence + 1]:
                sequence += 1
            length = np.int64(kv_len[sequence]) - (np.int64(row_start[sequence + 1]) - row) + 1
            if length < 1 or length > columns * page_size:
                int64s(call, FIRST_FIELD)[FAULT] = 1
                continue
            begin = max(np.int64(0), length - window) if window > 0 else np.int64(0)
            for head in range(heads):
                source = q + (row * q_heads + first_head + head) * head_dim * item
                pack_row(kind, source, head_dim, queries + head * (BLOCK * 4), heads * (BLOCK * 4))
                highest[head], total[head] = _LOWEST, ZERO
            for i in range(heads * wide):
                mixed[i] = ZERO
            pages = page_table + sequence * columns * 4
            head_at = kv_head * head_dim * item
            for start in range(begin // RUN * RUN, length, RUN):
                low, high = max(begin, start), min(length, start + RUN)
                for head in range(heads):
                    at = head * RUN
                    for i in range(low - start):
                        scores[at + i] = _LOWEST
                    for i in range(high - start, RUN):
                        scores[at + i] = _LOWEST
                _scores_of_run(
                    kind, heads, queries, k_cache + head_at, stride, head_dim, pages, page_size, low, high, scores_at
                )
                for head in range(heads):
                    at = head * RUN
                    best = highest[head]
                    for i in range(low - start, high - start):
                        score = scores[at + i] * scale
                        if capped:
                            score = tanh(score / softcap) * softcap
                        scores[at + i] = score
                        # A NaN must not lose against a number: it is an error of its row, to be seen there.
                        best = score if score > best or score != score else best
                    for i in range(RUN):
                        scores[at + i] = exp(scores[at + i] - best)
                    keep = exp(highest[head] - best)
                    highest[head] = best
                    total[head] = total[head] * keep + _sum_of_run(scores, at)
                    if keep != ONE:
                        for block in range(wide // BLOCK):
                            base = (block * heads + head) * BLOCK
                            for i in range(BLOCK):
                                mixed[base + i] *= keep
                _mix_run(kind, heads, v_cache + head_at, stride, head_dim, pages, page_size, low, high, scores_at, sums)
            for head in range(heads):
                share_of_one = ONE / total[head]
                for i in range(head_dim):
                    block, inside = i // BLOCK, i % BLOCK
                    if kind == BF16:
                        inside = inside // 2 + (inside % 2) * LANES
                    value = mixed[(block * heads + head) * BLOCK + inside] * share_of_one
                    result[head * head_dim + i] = narrow(kind, value)

    return compile_kernel(attention)


@functools.cache
def _write_slots(kind: int) -> Address:
    item = ITEMSIZE[kind]

    def write_slots(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, 8)
        rows, width, all_slots = field[5], field[6], field[7]
        slots = int32s(field[4], rows)
        first, last = share(rows, thread, threads)
        for row in range(first, last):
            slot = np.int64(slots[row])
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


def _workspace(call: CallSpec) -> int:
    q = call.inputs[0]
    head_dim = q.sizes()[2] if q is not None else 0
    return MAX_THREADS * HEADS * (2 * packed_width(head_dim) + RUN) * 4


def _bind(
    inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], workspace: torch.Tensor | None
) -> Launch:
    q, k_cache, page_table = given(inputs[0]), given(inputs[1]), given(inputs[5])
    window, softcap = int(attrs["window"]), float(attrs["softcap"])
    rows, q_heads, head_dim = q.shape
    batch, columns = page_table.shape
    numbers = (
        rows, batch, q_heads, k_cache.shape[1], head_dim, int(attrs["page_size"]), columns, window,
        float(attrs["scale"]), softcap,
    )  # fmt: skip
    fault = f"a sequence has fewer tokens than rows, or more than its {columns} pages hold"
    kernel = _attention(kind_of(q), softcap > 0)
    return Call(Part("attention", kernel, (*inputs, *outputs, workspace, *numbers), fault))


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
