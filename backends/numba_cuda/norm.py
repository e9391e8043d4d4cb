"""Normalisation and the residual stream.

Owns the kernels of `add`, `rms_norm`, `add_rms_norm` and `head_rms_norm`. What always holds: one block sums a row's
squares in float32 in an order that the width alone decides, so no row can touch another's bits. A row is rounded where
the op's definition rounds it.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from slotwise.backends.numba_cuda import elements
from slotwise.backends.numba_cuda.blocks import WARP, block_sum
from slotwise.backends.numba_cuda.elements import PACK, elements_of
from slotwise.backends.numba_cuda.launch import Grid, cuda_kernel
from slotwise.backends.numba_cuda.simulator import cuda, kernel
from slotwise.core.backend import CallSpec
from slotwise.core.specs import DType

THREADS = 256


@functools.cache
def add_elements(dtype: DType, vector: bool) -> Any:
    """`total = a + b`, over all elements, a pack a thread."""
    of = elements_of(dtype, vector)
    load, store, add = of.load, of.store, elements.add

    @kernel
    def add_elements(a, b, total, count):
        at = cuda.grid(1) * PACK
        if at < count:
            store(total, at, count - at, add(load(a, at, count - at), load(b, at, count - at)))

    return add_elements


@functools.cache
def normalise(dtype: DType, vector: bool, width: int, adds: bool, offset: float) -> Any:
    """`normed = rms_norm(x)`, or of `total = x + residual`, one row a block."""
    of = elements_of(dtype, vector)
    load, store = of.load, of.store
    add, dot, scale, shift, multiply = elements.add, elements.dot, elements.scale, elements.shift, elements.multiply
    rounded = elements.each(of.rounded)
    threads = threads_for(width)
    warps, step = threads // WARP, threads * PACK
    summed = block_sum(threads)
    zero, shifted, moved = np.float32(0), offset != 0.0, np.float32(offset)
    breadth = np.float32(width)

    @kernel
    def normalise(x, residual, weight, total, normed, eps):
        shared = cuda.shared.array(warps, np.float32)
        row = cuda.blockIdx.x * width
        square = zero
        for column in range(cuda.threadIdx.x * PACK, width, step):
            values = load(x, row + column, width - column)
            if adds:
                values = rounded(add(values, load(residual, row + column, width - column)))
                store(total, row + column, width - column, values)
            square = dot(square, values, values)
        square = summed(square, shared)
        factor = np.float32(1) / np.float32(math.sqrt(square / breadth + eps))
        for column in range(cuda.threadIdx.x * PACK, width, step):
            left = width - column
            values = load(total, row + column, left) if adds else load(x, row + column, left)
            values = scale(values, factor)
            weights = load(weight, column, width - column)
            if shifted:
                weights = shift(weights, moved)
            else:
                values = rounded(values)
            store(normed, row + column, width - column, multiply(values, weights))

    return normalise


def threads_for(width: int) -> int:
    """One warp for a head, more for a row of the model's width."""
    return WARP if width <= WARP * PACK else THREADS


def _add(call: CallSpec, aligned: bool) -> tuple[Grid, ...]:
    count = math.prod(call.outputs[0].sizes())
    made = add_elements(call.dtype, aligned and count % PACK == 0)
    return (Grid(made, (math.ceil(count / (THREADS * PACK)),), THREADS, ("a", "b", "sum", count)),)


def _norm(call: CallSpec, aligned: bool) -> tuple[Grid, ...]:
    *rows, width = call.outputs[0].sizes()
    adds = call.op == "add_rms_norm"
    made = normalise(call.dtype, aligned and width % PACK == 0, width, adds, float(call.attrs["weight_offset"]))
    arguments = ("x", "residual", "weight", "total", "normed") if adds else ("x", "x", "weight", "normed", "normed")
    return (Grid(made, (math.prod(rows),), threads_for(width), (*arguments, float(call.attrs["eps"]))),)


KERNELS = (
    cuda_kernel("add", "flat", _add),
    *(cuda_kernel(op, "rows", _norm) for op in ("rms_norm", "add_rms_norm", "head_rms_norm")),
)
