"""Matrix products with weights, and the gate between them.

Owns the kernels of `linear`, `linear_heads`, `linear_qkv`, `linear_gated`, `logits` and `gated_activation`. What always
holds: `<op>.rows` sums each output over K in one order that N and K alone decide, whatever the number of rows, so a
row's bits do not depend on the others': in bf16 and fp16 by tensor cores (`linear_rows.py`), else by groups of lanes,
here. `<op>.tiles` is for prefill (`linear_tiles.py`) and promises nothing.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from slotwise.backends.numba_cuda import elements
from slotwise.backends.numba_cuda.activation import activation_of
from slotwise.backends.numba_cuda.blocks import WARP, ZERO, lane_sum
from slotwise.backends.numba_cuda.elements import PACK, elements_of
from slotwise.backends.numba_cuda.launch import Grid, cuda_kernel
from slotwise.backends.numba_cuda.linear_rows import (
    COLUMNS,
    TILE,
    multiply_rows_on_tensor_cores,
    tiles_for,
    warps_for,
)
from slotwise.backends.numba_cuda.linear_tiles import ROWS, columns_of, multiply_tiles
from slotwise.backends.numba_cuda.linear_tiles import THREADS as TILE_THREADS
from slotwise.backends.numba_cuda.products import RESULTS, Product, finisher, operands, product_of
from slotwise.backends.numba_cuda.simulator import cuda, device, kernel
from slotwise.backends.numba_cuda.tensor_cores import HALVES
from slotwise.core.backend import CallSpec, Kernel
from slotwise.core.ops.linear import ACTIVATIONS
from slotwise.core.specs import DType

THREADS = 128

MOST_ROWS = 8
"""Rows that a group of lanes multiplies with the weights it has read."""


def lanes_for(inner: int) -> int:
    """Lanes that share an output's sum: a warp's, or fewer where K has fewer packs."""
    packs = math.ceil(inner / PACK)
    return min(WARP, 1 << max(0, packs - 1).bit_length())


@functools.cache
def lanes_to_outputs(of: Product, rows: int, lanes: int) -> Any:
    """`finish_lanes(...)`: sums of `lanes` neighbouring lanes for `rows` rows of a column, and what follows, stored."""
    finish, summed, outputs, gated = finisher(of), lane_sum(lanes), of.outputs, of.gated

    @device
    def finish_lanes(sums, ups, first, column, bias, out, second, third, count):
        for r in range(rows):
            value = summed(sums[r])
            up = summed(ups[r]) if gated else ZERO
            if cuda.threadIdx.x % lanes == 0 and column < outputs and first + r < count:
                finish(first + r, column, value, up, bias, out, second, third)

    return finish_lanes


@functools.cache
def multiply_rows(of: Product, rows: int) -> Any:
    """`rows` rows of x [T, K] times weight [N, K] transposed: a group of lanes sums one output of each row."""
    load, dot = elements_of(of.dtype, of.vector).load, elements.dot
    lanes = lanes_for(of.inner)
    finish_lanes, groups = lanes_to_outputs(of, rows, lanes), THREADS // lanes
    inner, outputs, gated = of.inner, of.outputs, of.gated
    step, up_start = lanes * PACK, of.outputs * of.inner

    @kernel
    def multiply_rows(x, weight, bias, out, second, third, count):
        sums = cuda.local.array(rows, np.float32)
        ups = cuda.local.array(rows, np.float32)
        lane = cuda.threadIdx.x % lanes
        column = cuda.blockIdx.x * groups + cuda.threadIdx.x // lanes
        first = cuda.blockIdx.y * rows
        for r in range(rows):
            sums[r] = ZERO
            ups[r] = ZERO
        if column < outputs:
            for k in range(lane * PACK, inner, step):
                left = inner - k
                weights = load(weight, column * inner + k, left)
                if gated:
                    more = load(weight, up_start + column * inner + k, left)
                for r in range(rows):
                    if first + r < count:
                        values = load(x, (first + r) * inner + k, left)
                        sums[r] = dot(sums[r], values, weights)
                        if gated:
                            ups[r] = dot(ups[r], values, more)
        finish_lanes(sums, ups, first, column, bias, out, second, third, count)

    return multiply_rows


@functools.cache
def gate_elements(dtype: DType, vector: bool, activation: str) -> Any:
    """`y = activation(gate) * up`, over all elements, a pack a thread."""
    of = elements_of(dtype, vector)
    load, store, multiply = of.load, of.store, elements.multiply
    activate = elements.each(activation_of(activation))

    @kernel
    def gate_elements(gate, up, y, count):
        at = cuda.grid(1) * PACK
        if at < count:
            left = count - at
            store(y, at, left, multiply(activate(load(gate, at, left)), load(up, at, left)))

    return gate_elements


def _rows(call: CallSpec, aligned: bool) -> tuple[Grid, ...]:
    rows, of = product_of(call, aligned)
    if of.vector and of.dtype in HALVES:
        tiles = tiles_for(rows, of.gated)
        made = multiply_rows_on_tensor_cores(of, tiles)
        grid = (math.ceil(of.outputs / TILE), math.ceil(rows / (tiles * COLUMNS)))
        return (Grid(made, grid, WARP * warps_for(of.outputs, of.inner), (*operands(of), rows)),)
    tile = min(MOST_ROWS, 1 << max(0, rows - 1).bit_length())
    groups = THREADS // lanes_for(of.inner)
    grid = (math.ceil(of.outputs / groups), math.ceil(rows / tile))
    return (Grid(multiply_rows(of, tile), grid, THREADS, (*operands(of), rows)),)


def _tiles(call: CallSpec, aligned: bool) -> tuple[Grid, ...]:
    rows, of = product_of(call, aligned)
    if not of.vector:
        return _rows(call, aligned)  # copies into shared memory are of 16 bytes
    grid = (math.ceil(of.outputs / columns_of(of.gated)), math.ceil(rows / ROWS))
    return (Grid(multiply_tiles(of), grid, TILE_THREADS, (*operands(of), rows)),)


def _refuses_tiles(call: CallSpec) -> str | None:
    if call.dtype not in HALVES:
        return f"tensor cores multiply bf16 and fp16, not {call.dtype.value}"
    _, of = product_of(call, True)
    if of.inner % PACK:
        return f"it copies 16 bytes at a time, and a row of {of.inner} elements has a rest"
    return refuses(call)


def _gate(call: CallSpec, aligned: bool) -> tuple[Grid, ...]:
    count = math.prod(call.outputs[0].sizes())
    made = gate_elements(call.dtype, aligned and count % PACK == 0, str(call.attrs["activation"]))
    return (Grid(made, (math.ceil(count / (THREADS * PACK)),), THREADS, ("gate", "up", "y", count)),)


def refuses(call: CallSpec) -> str | None:
    """Why no kernel of a product can run the call: an activation that is none of ours."""
    activation = call.attrs.get("activation")
    if activation is not None and activation not in ACTIVATIONS:
        return f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"
    return None


def _kernels(op: str) -> tuple[Kernel, ...]:
    return (
        cuda_kernel(op, "rows", _rows, refuses=refuses),
        cuda_kernel(op, "tiles", _tiles, refuses=_refuses_tiles, invariant_rows=0),
    )


KERNELS = (
    *(kernel for op in RESULTS for kernel in _kernels(op)),
    cuda_kernel("gated_activation", "flat", _gate, refuses=refuses),
)
