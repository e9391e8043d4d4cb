"""From logits to tokens.

Owns the kernels of `greedy`, `sample`, `accept_coupled` and `accept_rejection`; `filter_logits` is in `filters.py`.
What always holds: a row is one thread's; a row whose greatest value is not finite is not ok, NaN included; noise is
drawn only for tokens that can still win, which cannot change who does.
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
from slotwise.backends.numba_cpu.filters import FILTER_LOGITS
from slotwise.backends.numba_cpu.memory import as_int64, bytes_at, device, floats, int32s, int64s, stack_memory
from slotwise.backends.numba_cpu.noise import noise_block
from slotwise.backends.numba_cpu.threads import FIRST_FIELD, share
from slotwise.core.backend import CallSpec, Kernel, Launch, Tensors
from slotwise.core.graph import Attr
from slotwise.core.ops.noise import ACCEPT_STREAM, RESIDUAL_STREAM, TARGET_STREAM

_AT = FIRST_FIELD * 8

_GREATEST, _LEAST = np.float32(16.7), np.float32(-2.9)
"""Bounds of the Gumbel noise: -log(-log(u)) for the greatest and the least u that the noise can have."""

_LOWEST = np.float32(-np.inf)


@device
def _best_of(row: Any, size: int) -> tuple[int, bool]:
    """The first of the greatest entries, and whether it is finite: a NaN counts as the greatest of all."""
    best, at = row[0], 0
    nan = row[0] != row[0]
    for i in range(1, size):
        value = row[i]
        if value > best:
            best, at = value, as_int64(i)
        nan = nan or value != value
    return at, not nan and best > _LOWEST and best < np.float32(np.inf)


@device
def _gumbel(noise: np.float32) -> np.float32:
    return np.float32(-np.log(-np.log(noise)))


@device
def _draw(row: Any, size: int, seed: int, position: int, stream: int) -> Any:
    """The token with the greatest score plus noise; `row` has a finite greatest value."""
    at, _ = _best_of(row, size)
    uniform = floats(stack_memory(16), 4)
    noise_block(seed, position, at // 4, stream, uniform)
    best, token = row[at] + _gumbel(uniform[at % 4]), as_int64(at)
    for block in range((size + 3) // 4):
        first, last = block * 4, min(size, block * 4 + 4)
        highest = row[first]
        for i in range(first + 1, last):
            highest = max(highest, row[i])
        if highest + _GREATEST < best:
            continue
        noise_block(seed, position, block, stream, uniform)
        for i in range(first, last):
            value = row[i] + _gumbel(uniform[i - first])
            if value > best or (value == best and i < token):
                best, token = value, as_int64(i)
    return token


@functools.cache
def _greedy() -> Address:
    def greedy(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, 5)
        rows, size = field[3], field[4]
        tokens, ok = int32s(field[1], rows), bytes_at(field[2], rows)
        first, last = share(rows, thread, threads)
        for row in range(first, last):
            token, finite = _best_of(floats(field[0] + row * size * 4, size), size)
            tokens[row], ok[row] = token, finite

    return compile_kernel(greedy)


@functools.cache
def _sample(stream: int) -> Address:
    def sample(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, 7)
        rows, size = field[5], field[6]
        seeds, positions = int64s(field[1], rows), int32s(field[2], rows)
        tokens, ok = int32s(field[3], rows), bytes_at(field[4], rows)
        first, last = share(rows, thread, threads)
        for row in range(first, last):
            scores = floats(field[0] + row * size * 4, size)
            token, finite = _best_of(scores, size)
            if finite:
                token = _draw(scores, size, seeds[row], positions[row], stream)
            tokens[row], ok[row] = token, finite

    return compile_kernel(sample)


@functools.cache
def _accept_coupled() -> Address:
    def accept_coupled(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, 6)
        rows, batch = field[4], field[5]
        sampled, token_ids = int32s(field[0], rows), int32s(field[1], rows)
        row_start, accepted = int32s(field[2], batch + 1), int32s(field[3], batch)
        begin, end = share(batch, thread, threads)
        for b in range(begin, end):
            count = 0
            for row in range(row_start[b], row_start[b + 1] - 1):
                if sampled[row] != token_ids[row + 1]:
                    break
                count += 1
            accepted[b] = count

    return compile_kernel(accept_coupled)


@device
def _normaliser(row: Any, size: int) -> tuple[float, float]:
    """(greatest, sum of exp(x - greatest)) of a row, in float64."""
    highest = -math.inf
    for i in range(size):
        highest = max(highest, np.float64(row[i]))
    total = 0.0
    for i in range(size):
        total += math.exp(np.float64(row[i]) - highest)
    return highest, total


@functools.cache
def _accept_rejection() -> Address:
    def accept_rejection(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, 13)
        rows, batch, size, scratch = field[9], field[10], field[11], field[12]
        token_ids, row_start = int32s(field[2], rows), int32s(field[3], batch + 1)
        seeds, positions = int64s(field[4], rows), int32s(field[5], rows)
        accepted, following, ok = int32s(field[6], batch), int32s(field[7], batch), bytes_at(field[8], batch)
        uniform = floats(stack_memory(16), 4)
        begin, end = share(batch, thread, threads)
        for b in range(begin, end):
            accepted[b], following[b], ok[b] = 0, 0, 1
            first, last = as_int64(row_start[b]), as_int64(row_start[b + 1])
            if first == last:
                continue
            stop, refused = last - 1, False
            for row in range(first, last - 1):
                target = floats(field[0] + row * size * 4, size)
                _, finite = _best_of(target, size)
                if not finite:
                    stop = row
                    break
                draft = floats(field[1] + row * size * 4, size)
                p_high, p_sum = _normaliser(target, size)
                q_high, q_sum = _normaliser(draft, size)
                drafted = token_ids[row + 1]
                p = math.exp(np.float64(target[drafted]) - p_high) / p_sum
                q = math.exp(np.float64(draft[drafted]) - q_high) / q_sum
                noise_block(seeds[row], positions[row], 0, ACCEPT_STREAM, uniform)
                if np.float64(uniform[0]) * q >= p:
                    stop, refused = row, True
                    break
            accepted[b] = stop - first
            target = floats(field[0] + stop * size * 4, size)
            _, finite = _best_of(target, size)
            if not finite:
                ok[b] = 0
                continue
            if refused:
                draft = floats(field[1] + stop * size * 4, size)
                residual = floats(scratch + b * size * 4, size)
                p_high, p_sum = _normaliser(target, size)
                q_high, q_sum = _normaliser(draft, size)
                mass = 0.0
                for i in range(size):
                    p = math.exp(np.float64(target[i]) - p_high) / p_sum
                    q = math.exp(np.float64(draft[i]) - q_high) / q_sum
                    left = max(p - q, 0.0)
                    mass += left
                    residual[i] = np.float32(math.log(left)) if left > 0.0 else _LOWEST
                # A residual without mass means p = q up to rounding; a draw from p is then the same draw.
                if mass > 0.0:
                    following[b] = _draw(residual, size, seeds[stop], positions[stop], RESIDUAL_STREAM)
                    continue
            following[b] = _draw(target, size, seeds[stop], positions[stop], TARGET_STREAM)

    return compile_kernel(accept_rejection)


def _bind_greedy(
    inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], _: torch.Tensor | None
) -> Launch:
    return Call(Part("greedy", _greedy(), (*inputs, *outputs, *given(inputs[0]).shape)))


def _bind_sample(
    inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], _: torch.Tensor | None
) -> Launch:
    return Call(Part("sample", _sample(int(attrs["stream"])), (*inputs, *outputs, *given(inputs[0]).shape)))


def _bind_coupled(
    inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], _: torch.Tensor | None
) -> Launch:
    fields = (*inputs, *outputs, len(given(inputs[0])), len(outputs[0]))
    return Call(Part("accept_coupled", _accept_coupled(), fields))


def _bind_rejection(
    inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], workspace: torch.Tensor | None
) -> Launch:
    rows, size = given(inputs[0]).shape
    fields = (*inputs, *outputs, rows, len(outputs[0]), size, workspace)
    return Call(Part("accept_rejection", _accept_rejection(), fields))


def _residuals(call: CallSpec) -> int:
    scores = call.inputs[0]
    return call.outputs[0].sizes()[0] * (scores.sizes()[1] if scores is not None else 0) * 4


KERNELS = (
    FILTER_LOGITS,
    Kernel("greedy", "greedy", _bind_greedy),
    Kernel("sample", "sample", _bind_sample),
    Kernel("accept_coupled", "accept_coupled", _bind_coupled),
    Kernel("accept_rejection", "accept_rejection", _bind_rejection, workspace=_residuals),
)
