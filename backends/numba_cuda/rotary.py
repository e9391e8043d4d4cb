"""Rotary position embedding, alone and fused with the cache write.

Owns the kernels of `rotary` and `rotary_write`. What always holds: a thread rotates one pair of dimensions of one head
in float32 and rounds once; what is not rotated, and values, are copied. Of rows with one slot (padding, in the
scratch page) the last alone writes it, so what a slot holds does not depend on the order of threads.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from slotwise.backends.numba_cuda.elements import elements_of
from slotwise.backends.numba_cuda.launch import Grid, cuda_kernel, dims_of
from slotwise.backends.numba_cuda.simulator import cuda, device, kernel
from slotwise.core.backend import CallSpec
from slotwise.core.specs import DType

THREADS = 128


@device
def is_last_writer(slots, row, rows):
    """Whether `row` writes its slot: no later row has the same one. All threads of a block ask together."""
    later = np.int32(0)
    for other in range(row + 1 + cuda.threadIdx.x, rows, cuda.blockDim.x):
        if slots[other] == slots[row]:
            later = np.int32(1)
    return cuda.syncthreads_or(later) == 0


@functools.cache
def _rotate_pair(dtype: DType, head_dim: int, width: int) -> Any:
    """A device function: one of a head's `head_dim - width` units of work, from `source` to `target`.

    Unit i < width rotates dimensions i and i + width; each unit beyond copies one of the dimensions from 2 width on.
    """
    of = elements_of(dtype, False)
    widen, narrow = of.widen, of.narrow

    @device
    def rotate_pair(x, source, out, target, cos, sin, at, unit):
        if unit < width:
            c = cos[at + unit]
            s = sin[at + unit]
            first = widen(x[source + unit])
            second = widen(x[source + width + unit])
            out[target + unit] = narrow(first * c - second * s)
            out[target + width + unit] = narrow(second * c + first * s)
        else:
            out[target + width + unit] = x[source + width + unit]

    return rotate_pair


@functools.cache
def rotate(dtype: DType, q_heads: int, kv_heads: int, head_dim: int, width: int) -> Any:
    """Rotate q and k, a unit of a head a thread."""
    pair, units = _rotate_pair(dtype, head_dim, width), head_dim - width
    work = (q_heads + kv_heads) * units

    @kernel
    def rotate(q, k, positions, cos, sin, rotated_q, rotated_k):
        row = cuda.blockIdx.x
        item = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        if item < work:
            head = item // units
            unit = item - head * units
            at = positions[row] * width
            if head < q_heads:
                place = (row * q_heads + head) * head_dim
                pair(q, place, rotated_q, place, cos, sin, at, unit)
            else:
                place = (row * kv_heads + head - q_heads) * head_dim
                pair(k, place, rotated_k, place, cos, sin, at, unit)

    return rotate


@functools.cache
def rotate_and_write(dtype: DType, q_heads: int, kv_heads: int, head_dim: int, width: int) -> Any:
    """Rotate q; rotate k and copy v into the row's slot."""
    pair, units = _rotate_pair(dtype, head_dim, width), head_dim - width
    rotated = (q_heads + kv_heads) * units
    work = rotated + kv_heads * head_dim
    copied = kv_heads * head_dim

    @kernel
    def rotate_and_write(q, k, v, positions, cos, sin, k_cache, v_cache, slots, rotated_q, rows):
        row = cuda.blockIdx.x
        item = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        writes = is_last_writer(slots, row, rows)
        if item < work:
            at = positions[row] * width
            head = item // units
            unit = item - head * units
            if head < q_heads:
                place = (row * q_heads + head) * head_dim
                pair(q, place, rotated_q, place, cos, sin, at, unit)
            elif writes:
                slot = slots[row] * copied
                if item < rotated:
                    place = (head - q_heads) * head_dim
                    pair(k, row * copied + place, k_cache, slot + place, cos, sin, at, unit)
                else:
                    v_cache[slot + item - rotated] = v[row * copied + item - rotated]

    return rotate_and_write


def _rotary(call: CallSpec, aligned: bool) -> tuple[Grid, ...]:
    dims = dims_of(call)
    heads, kv_heads, head_dim, width = dims["Hq"], dims["Hkv"], dims["D"], dims["W"]
    items = (heads + kv_heads) * (head_dim - width)
    if call.op == "rotary":
        made = rotate(call.dtype, heads, kv_heads, head_dim, width)
        names: tuple[str | int, ...] = ("q", "k", "positions", "cos", "sin", "rotated_q", "rotated_k")
    else:
        items += kv_heads * head_dim
        made = rotate_and_write(call.dtype, heads, kv_heads, head_dim, width)
        names = ("q", "k", "v", "positions", "cos", "sin", "k_cache", "v_cache", "slots", "rotated_q", dims["T"])
    return (Grid(made, (dims["T"], math.ceil(items / THREADS)), THREADS, names),)


def _refuses(call: CallSpec) -> str | None:
    dims = dims_of(call)
    if 2 * dims["W"] > dims["D"]:
        return f"tables of width {dims['W']} rotate {2 * dims['W']} dimensions, but a head has {dims['D']}"
    return None


KERNELS = tuple(cuda_kernel(op, "heads", _rotary, refuses=_refuses) for op in ("rotary", "rotary_write"))
