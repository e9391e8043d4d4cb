"""Temperature, top-k, top-p and min-p.

Owns the kernel of `filter_logits`. What always holds: a row is one thread's; the k-th greatest is found by counting bits
from the top, and the order of equals is that of their tokens, so no sort decides what the op leaves open.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from slotwise.backends.numba_cpu.calls import Call, Part
from slotwise.backends.numba_cpu.compiled import Address, compile_kernel
from slotwise.backends.numba_cpu.elements import given
from slotwise.backends.numba_cpu.memory import (
    device,
    exp,
    float_bits,
    float_of_bits,
    floats,
    int32s,
    int64s,
    stack_memory,
)
from slotwise.backends.numba_cpu.threads import FIRST_FIELD, share
from slotwise.core.backend import CallSpec, Kernel, Launch, Tensors
from slotwise.core.graph import Attr

_AT = FIRST_FIELD * 8
_LOWEST = np.float32(-np.inf)
_DIGITS = 256
_COUNTS = _DIGITS * 4


@device
def _rank(value: np.float32) -> int:
    """An integer in 0 .. 2**32 that orders as the numbers do."""
    bits = np.int64(float_bits(value))
    return (~bits & 0xFFFFFFFF) if bits < 0 else (bits | 0x80000000)


@device
def _value(rank: int) -> np.float32:
    """The number with that rank."""
    bits = (rank & 0x7FFFFFFF) if rank & 0x80000000 else (~rank & 0xFFFFFFFF)
    return float_of_bits(np.int32(bits))


@device
def kth_greatest(row: Any, size: int, k: int) -> np.float32:
    """The k-th greatest of a row, k from 1: eight bits at a time from the top."""
    counts = int32s(stack_memory(_COUNTS), _DIGITS)
    prefix, left = np.int64(0), np.int64(k)
    for level in range(4):
        shift = 24 - 8 * level
        for digit in range(_DIGITS):
            counts[digit] = 0
        for i in range(size):
            rank = _rank(row[i])
            if level == 0 or (rank >> (shift + 8)) == prefix:
                counts[(rank >> shift) & 255] += 1
        digit = 255
        while digit > 0 and left > counts[digit]:
            left -= counts[digit]
            digit -= 1
        prefix = (prefix << 8) | digit
    return _value(prefix)


@device
def _sort_descending(order: Any, spare: Any, row: Any, count: int) -> None:
    """Sort `count` tokens in `order` by their scores, greatest first; equals keep their order (four counting passes)."""
    counts = int32s(stack_memory(_COUNTS), _DIGITS)
    for level in range(4):
        shift = 8 * level
        for digit in range(_DIGITS):
            counts[digit] = 0
        for i in range(count):
            counts[255 - ((_rank(row[order[i]]) >> shift) & 255)] += 1
        total = 0
        for digit in range(_DIGITS):
            here = counts[digit]
            counts[digit] = total
            total += here
        for i in range(count):
            digit = 255 - ((_rank(row[order[i]]) >> shift) & 255)
            spare[counts[digit]] = order[i]
            counts[digit] += 1
        for i in range(count):
            order[i] = spare[i]


@device
def _keep_mass(row: Any, size: int, p: np.float32, order: Any, spare: Any) -> None:
    """Top-p: drop every token whose predecessors in descending order have mass p or more."""
    highest = _LOWEST
    for i in range(size):
        highest = max(highest, row[i])
    total, count = 0.0, 0
    for i in range(size):
        if row[i] > _LOWEST:
            total += np.float64(exp(row[i] - highest))
            order[count] = i
            count += 1
    _sort_descending(order, spare, row, count)
    before = 0.0
    for i in range(count):
        token = order[i]
        mass = np.float64(exp(row[token] - highest)) / total
        if i > 0 and before >= np.float64(p):
            row[token] = _LOWEST
        before += mass


@functools.cache
def _filter() -> Address:
    def filter_logits(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, 9)
        rows, size, scratch = field[6], field[7], field[8]
        temperature, top_k = floats(field[1], rows), int32s(field[2], rows)
        top_p, min_p = floats(field[3], rows), floats(field[4], rows)
        first, last = share(rows, thread, threads)
        for r in range(first, last):
            logits, row = floats(field[0] + r * size * 4, size), floats(field[5] + r * size * 4, size)
            if temperature[r] == np.float32(0.0):
                best, at = logits[0], np.int64(0)
                for i in range(1, size):
                    # A NaN, once met, stays the greatest: its row must not look like one that can be sampled.
                    if logits[i] > best or (logits[i] != logits[i] and best == best):
                        best, at = logits[i], np.int64(i)
                for i in range(size):
                    row[i] = _LOWEST
                row[at] = best * np.float32(0.0)
                continue
            for i in range(size):
                row[i] = logits[i] / temperature[r]
            if 0 < top_k[r] < size:
                limit = kth_greatest(row, size, top_k[r])
                for i in range(size):
                    if row[i] < limit:
                        row[i] = _LOWEST
            if top_p[r] < np.float32(1.0):
                at = scratch + r * size * 8
                _keep_mass(row, size, top_p[r], int32s(at, size), int32s(at + size * 4, size))
            if min_p[r] > np.float32(0.0):
                highest = _LOWEST
                for i in range(size):
                    highest = max(highest, row[i])
                limit = highest + np.float32(math.log(min_p[r]))
                for i in range(size):
                    if row[i] < limit:
                        row[i] = _LOWEST

    return compile_kernel(filter_logits)


def _bind(
    inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], workspace: torch.Tensor | None
) -> Launch:
    return Call(Part("filter_logits", _filter(), (*inputs, *outputs, *given(inputs[0]).shape, workspace)))


def _orders(call: CallSpec) -> int:
    rows, size = call.outputs[0].sizes()
    return rows * size * 8


FILTER_LOGITS = Kernel("filter_logits", "filter_logits", _bind, workspace=_orders)
