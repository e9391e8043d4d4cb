"""Attention over paged caches, and the cache write.

Owns the kernels of `attention` and `write_slots`. What always holds: a row's queries of one K/V head are one
piece of work; keys are taken in runs of `RUN` positions that start at multiples of it, and runs are added up in order,
whoever computed them: so a row's bits depend on its query and its sequence's keys and values up to it alone, not on
other rows, other sequences, pages or threads. What is done with a run is in `attention_runs.py`. (Keys are split among
threads as in Flash-Decoding: Dao, Haziza, Massa and Sizov, 2023.)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from slotwise.backends.numba_cpu.attention_runs import (
    BATCH,
    COLUMNS,
    FIELDS,
    HEAD_DIM,
    HEADS,
    KV_LEN,
    OWN,
    PAGE_SIZE,
    PIECES,
    RUN,
    RUN_BYTES,
    SCRATCH,
    attend_run,
    begin_sums,
    finish,
    merge,
    piece_of,
    sight_of,
)
from slotwise.backends.numba_cpu.calls import Call, Part
from slotwise.backends.numba_cpu.compiled import Address, compile_kernel
from slotwise.backends.numba_cpu.elements import given, kind_of, refuses_wide_floats
from slotwise.backends.numba_cpu.memory import as_int64, elements, int32s, int64s
from slotwise.backends.numba_cpu.products import packed_width, strided_products_function
from slotwise.backends.numba_cpu.threads import FAULT, FIRST_FIELD, MAX_THREADS, next_chunk, share
from slotwise.backends.numba_cpu.vectors import BLOCK, ITEMSIZE
from slotwise.core.backend import CallSpec, Kernel, Launch, Tensors
from slotwise.core.graph import Attr
from slotwise.core.specs import dim_size

_AT = FIRST_FIELD * 8

FEW_PIECES = 32
"""Pieces of work below which runs are handed out one by one: few heads and a long sequence still keep all busy."""


@functools.cache
def _attention(kind: int, capped: bool) -> Address:
    """Each piece of work is one thread's: run after run."""

    def attention(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, FIELDS)
        wide = (field[HEAD_DIM] + BLOCK - 1) // BLOCK * BLOCK
        own = field[SCRATCH] + thread * field[OWN]
        found = own + HEADS * (wide + RUN) * 4
        sums = found + field[RUN_BYTES]
        sequence = 0
        while True:
            piece = next_chunk(call)
            if piece >= field[PIECES]:
                break
            row, _, first_head, heads = piece_of(field, piece)
            sequence, begin, end = sight_of(field, row, sequence)
            if end < 0 or end > field[COLUMNS] * field[PAGE_SIZE]:
                int64s(call, FIRST_FIELD)[FAULT] = 1
                continue
            begin_sums(heads, wide, sums)
            for start in range(begin // RUN * RUN, end, RUN):
                attend_run(kind, capped, field, piece, sequence, max(begin, start), min(end, start + RUN), own, found)
                merge(heads, wide, sums, found)
            finish(kind, field, row, first_head, heads, wide, sums, end > 0)

    return compile_kernel(attention)


@functools.cache
def _attention_by_run(kind: int, capped: bool) -> Address:
    """Each run of each piece is one thread's; `_combine` adds them up."""

    def attention_by_run(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, FIELDS)
        own = field[SCRATCH] + thread * field[OWN]
        partial = field[SCRATCH] + MAX_THREADS * field[OWN]
        pieces = field[PIECES]
        longest: Any = 0
        kv_len = int32s(field[KV_LEN], field[BATCH])
        for b in range(field[BATCH]):
            longest = max(longest, as_int64(kv_len[b]))
        if longest > field[COLUMNS] * field[PAGE_SIZE]:
            int64s(call, FIRST_FIELD)[FAULT] = 1
            return
        units = pieces * ((longest + RUN - 1) // RUN)
        while True:
            unit = next_chunk(call)
            if unit >= units:
                break
            piece, start = unit % pieces, unit // pieces * RUN
            row, _, _, _ = piece_of(field, piece)
            sequence, begin, end = sight_of(field, row, 0)
            low, high = max(begin, start), min(end, start + RUN)
            if low < high:
                found = partial + unit * field[RUN_BYTES]
                attend_run(kind, capped, field, piece, sequence, low, high, own, found)

    return compile_kernel(attention_by_run)


@functools.cache
def _combine(kind: int) -> Address:
    """Adds up the runs of each piece, in order."""

    def combine_runs(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, FIELDS)
        wide = (field[HEAD_DIM] + BLOCK - 1) // BLOCK * BLOCK
        sums = field[SCRATCH] + thread * field[OWN]
        partial = field[SCRATCH] + MAX_THREADS * field[OWN]
        first, last = share(field[PIECES], thread, threads)
        for piece in range(first, last):
            row, _, first_head, heads = piece_of(field, piece)
            _, begin, end = sight_of(field, row, 0)
            if end < 0 or end > field[COLUMNS] * field[PAGE_SIZE]:
                int64s(call, FIRST_FIELD)[FAULT] = 1
                continue
            begin_sums(heads, wide, sums)
            for run in range(begin // RUN, (end + RUN - 1) // RUN):
                merge(heads, wide, sums, partial + (run * field[PIECES] + piece) * field[RUN_BYTES])
            finish(kind, field, row, first_head, heads, wide, sums, end > 0)

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
