"""Rotary position embedding, alone and fused with the cache write.

Owns the kernels of `rotary` and `rotary_write`. What always holds: heads are rotated element by element in float32 and
rounded once; a position or slot out of range is a fault of the call, and nothing is read or written for it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import torch

from slotwise.backends.numba_cpu.calls import Call, Part
from slotwise.backends.numba_cpu.compiled import Address, compile_kernel
from slotwise.backends.numba_cpu.elements import given, kind_of, refuses_wide_floats
from slotwise.backends.numba_cpu.memory import device, elements, floats, int32s, int64s, narrow, widen
from slotwise.backends.numba_cpu.threads import FAULT, FIRST_FIELD, share
from slotwise.backends.numba_cpu.vectors import ITEMSIZE
from slotwise.core.backend import CallSpec, Kernel, Launch, Tensors
from slotwise.core.graph import Attr

_AT = FIRST_FIELD * 8


@device
def _rotate(kind: int, source: int, target: int, cos: int, sin: int, width: int, head_dim: int) -> None:
    """One head: dimension i is paired with i + width; those from 2 width on pass through."""
    x, y = elements(kind, source, head_dim), elements(kind, target, head_dim)
    c, s = floats(cos, width), floats(sin, width)
    for i in range(width):
        first, second = widen(kind, x[i]), widen(kind, x[width + i])
        y[i] = narrow(kind, first * c[i] - second * s[i])
        y[width + i] = narrow(kind, second * c[i] + first * s[i])
    for i in range(2 * width, head_dim):
        y[i] = x[i]


@functools.cache
def _rotary(kind: int) -> Address:
    item = ITEMSIZE[kind]

    def rotary(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, 13)
        q, k, cos, sin, out_q, out_k = field[0], field[1], field[3], field[4], field[5], field[6]
        rows, q_heads, kv_heads, head_dim = field[7], field[8], field[9], field[10]
        positions, width, known = int32s(field[2], rows), field[11], field[12]
        heads, size = q_heads + kv_heads, head_dim * item
        first, last = share(rows * heads, thread, threads)
        for piece in range(first, last):
            row, head = piece // heads, piece % heads
            position = np.int64(positions[row])
            if position < 0 or position >= known:
                int64s(call, FIRST_FIELD)[FAULT] = 1
                continue
            at = position * width * 4
            if head < q_heads:
                offset = (row * q_heads + head) * size
                _rotate(kind, q + offset, out_q + offset, cos + at, sin + at, width, head_dim)
            else:
                offset = (row * kv_heads + head - q_heads) * size
                _rotate(kind, k + offset, out_k + offset, cos + at, sin + at, width, head_dim)

    return compile_kernel(rotary)


@functools.cache
def _rotary_write(kind: int) -> Address:
    item = ITEMSIZE[kind]

    def rotary_write(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, 17)
        q, k, v, cos, sin = field[0], field[1], field[2], field[4], field[5]
        k_cache, v_cache, out_q = field[6], field[7], field[9]
        rows, q_heads, kv_heads, head_dim = field[10], field[11], field[12], field[13]
        width, known, all_slots = field[14], field[15], field[16]
        positions, slots = int32s(field[3], rows), int32s(field[8], rows)
        heads, size = q_heads + 2 * kv_heads, head_dim * item
        first, last = share(rows * heads, thread, threads)
        for piece in range(first, last):
            row, head = piece // heads, piece % heads
            position, slot = np.int64(positions[row]), np.int64(slots[row])
            if position < 0 or position >= known or slot < 0 or slot >= all_slots:
                int64s(call, FIRST_FIELD)[FAULT] = 1
                continue
            at = position * width * 4
            if head < q_heads:
                offset = (row * q_heads + head) * size
                _rotate(kind, q + offset, out_q + offset, cos + at, sin + at, width, head_dim)
                continue
            head = (head - q_heads) % kv_heads
            source, target = (row * kv_heads + head) * size, (slot * kv_heads + head) * size
            if piece % heads < q_heads + kv_heads:
                _rotate(kind, k + source, k_cache + target, cos + at, sin + at, width, head_dim)
            else:
                value, stored = elements(kind, v + source, head_dim), elements(kind, v_cache + target, head_dim)
                for i in range(head_dim):
                    stored[i] = value[i]

    return compile_kernel(rotary_write)


def _refuses(call: CallSpec) -> str | None:
    dims = call.contract.match(call.inputs, call.attrs)[0]
    head_dim, width = dims["D"], dims["W"]
    if isinstance(head_dim, int) and isinstance(width, int) and 2 * width > head_dim:
        return f"tables of width {width} rotate {2 * width} dimensions, but a head has {head_dim}"
    return refuses_wide_floats(call)


def _bind_rotary(
    inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], _: torch.Tensor | None
) -> Launch:
    cos = given(inputs[3])
    rotated_q, rotated_k = outputs
    rows, q_heads, head_dim = rotated_q.shape
    numbers = (rows, q_heads, rotated_k.shape[1], head_dim, cos.shape[1], cos.shape[0])
    fault = f"a position is outside the rotary table of {cos.shape[0]}"
    return Call(Part("rotary", _rotary(kind_of(rotated_q)), (*inputs, *outputs, *numbers), fault))


def _bind_rotary_write(
    inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], _: torch.Tensor | None
) -> Launch:
    cos, k_cache = given(inputs[4]), given(inputs[6])
    (rotated_q,) = outputs
    rows, q_heads, head_dim = rotated_q.shape
    numbers = (rows, q_heads, k_cache.shape[1], head_dim, cos.shape[1], cos.shape[0], k_cache.shape[0])
    fault = f"a position is outside the rotary table of {cos.shape[0]}, or a slot outside the cache of {len(k_cache)}"
    return Call(Part("rotary_write", _rotary_write(kind_of(rotated_q)), (*inputs, *outputs, *numbers), fault))


KERNELS = (
    Kernel("rotary", "rotary", _bind_rotary, _refuses),
    Kernel("rotary_write", "rotary_write", _bind_rotary_write, _refuses),
)
