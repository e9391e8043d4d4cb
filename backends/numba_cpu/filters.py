"""Temperature, top-k, top-p and min-p.

Owns the kernel of `filter_logits`. What always holds: a row is one thread's; nothing is sorted: the k-th greatest, and
the last score that top-p keeps, are found eight bits at a time from the top; mass is summed in whole numbers, as
core/ops/nucleus.py defines it, so no order decides what is kept.
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
    as_int64,
    device,
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
from slotwise.core.ops.nucleus import CURVE, FRACTION, LOG2_E, REACH, SHARE, SLACK, STEPS, UNIT

_AT = FIRST_FIELD * 8
_LOWEST = np.float32(-np.inf)
_DIGITS = 256
_COUNTS, _SUMS = _DIGITS * 4, _DIGITS * 8
_ZERO = np.float32(0.0)
_REACH, _STEPS, _SHARE_UNITS = np.float32(REACH), np.float32(STEPS), np.float32(2.0**SHARE)
_C1, _C2, _C3, _C4, _C5 = CURVE
_ONE, _FRACTION_MASK, _SHARE_MASK = 1 << FRACTION, (1 << FRACTION) - 1, (1 << SHARE) - 1


@device
def _rank(value: np.float32) -> Any:
    """An integer in 0 .. 2**32 that orders as the numbers do."""
    bits = as_int64(float_bits(value))
    return (~bits & 0xFFFFFFFF) if bits < 0 else (bits | 0x80000000)


@device
def _value(rank: int) -> Any:
    """The number with that rank."""
    bits = (rank & 0x7FFFFFFF) if rank & 0x80000000 else (~rank & 0xFFFFFFFF)
    return float_of_bits(np.int32(bits))


@device
def kth_greatest(row: Any, size: int, k: int) -> Any:
    """The k-th greatest of a row, k from 1: eight bits at a time from the top."""
    counts = int32s(stack_memory(_COUNTS), _DIGITS)
    prefix, left = 0, as_int64(k)
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
def _weight(distance: np.float32) -> Any:
    """`weights` of core/ops/nucleus.py, for a score that much less than the greatest."""
    near = distance < _REACH
    exponent = as_int64((distance if near else _ZERO) * _STEPS) * LOG2_E
    part = (exponent >> (56 - FRACTION)) & _FRACTION_MASK
    power = as_int64(_C5)
    power = _C4 - ((part * power) >> FRACTION)
    power = _C3 - ((part * power) >> FRACTION)
    power = _C2 - ((part * power) >> FRACTION)
    power = _C1 - ((part * power) >> FRACTION)
    power = _ONE - ((part * power) >> FRACTION)
    return ((power << (UNIT - FRACTION)) >> (exponent >> 56)) if near else 0


@device
def _wanted_mass(total: int, p: np.float32) -> Any:
    """`wanted_mass` of core/ops/nucleus.py."""
    cut = max(as_int64(p * _SHARE_UNITS) - SLACK, 0)
    return max((total >> SHARE) * cut + (((total & _SHARE_MASK) * cut) >> SHARE), 1)


@device
def _keep_mass(row: Any, size: int, p: np.float32, near: Any, mass: Any) -> None:
    """Top-p: drop every token before which the wanted mass stands; `near` and `mass` have room for a row.

    The last score that is kept is found as the k-th greatest is: its digits sum weights instead of counting tokens,
    those of the scores near enough to weigh anything.
    """
    highest = _LOWEST
    for i in range(size):
        highest = max(highest, row[i])
    count = 0
    for i in range(size):
        if highest - row[i] < _REACH:
            near[count] = row[i] + _ZERO  # the zeros of either sign are equal
            count += 1
    total = 0
    for i in range(count):
        weight = _weight(highest - near[i])
        mass[i] = weight
        total += weight
    wanted = _wanted_mass(total, p)
    sums = int64s(stack_memory(_SUMS), _DIGITS)
    prefix, above = 0, as_int64(0)
    for level in range(4):
        shift = 24 - 8 * level
        for digit in range(_DIGITS):
            sums[digit] = 0
        for i in range(count):
            rank = _rank(near[i])
            if level == 0 or (rank >> (shift + 8)) == prefix:
                sums[(rank >> shift) & 255] += mass[i]
        digit = 255
        while digit > 0 and above + sums[digit] < wanted:
            above += sums[digit]
            digit -= 1
        prefix = (prefix << 8) | digit
    last = _value(prefix)
    equals = _weight(highest - last)
    for i in range(size):
        if row[i] < last or (row[i] == last and above >= wanted):
            row[i] = _LOWEST
        elif row[i] == last:
            above += equals


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
                best, at = logits[0], 0
                for i in range(1, size):
                    # A NaN, once met, stays the greatest: its row must not look like one that can be sampled.
                    if logits[i] > best or (logits[i] != logits[i] and best == best):
                        best, at = logits[i], as_int64(i)
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
                at = scratch + r * size * 12
                _keep_mass(row, size, top_p[r], floats(at + size * 8, size), int64s(at, size))
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


def _weights(call: CallSpec) -> int:
    rows, size = call.outputs[0].sizes()
    return rows * size * 12


FILTER_LOGITS = Kernel("filter_logits", "filter_logits", _bind, workspace=_weights)
