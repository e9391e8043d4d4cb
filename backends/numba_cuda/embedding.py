"""Embedding and row selection.

Owns the kernels of `embedding` and `take_rows`. What always holds: rows are copied (and scaled element by element), so
no row can touch another's bits; ids are checked where they enter, so none is checked here.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch

from slotwise.backends.numba_cuda import elements
from slotwise.backends.numba_cuda.elements import PACK, elements_of
from slotwise.backends.numba_cuda.launch import Grid, cuda_kernel
from slotwise.backends.numba_cuda.simulator import cuda, kernel
from slotwise.core.backend import CallSpec
from slotwise.core.specs import DType

THREADS = 128


@functools.cache
def copy_rows(dtype: DType, vector: bool, factor: float) -> Any:
    """`out[i] = table[rows[i]]` (times `factor`), a pack a thread."""
    of = elements_of(dtype, vector)
    load, store, scale = of.load, of.store, elements.scale
    scaled, by = factor != 1.0, np.float32(factor)

    @kernel
    def copy_rows(rows, table, out, width):
        row = cuda.blockIdx.x
        column = (cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x) * PACK
        if column < width:
            values = load(table, rows[row] * width + column, width - column)
            if scaled:
                values = scale(values, by)
            store(out, row * width + column, width - column, values)

    return copy_rows


def _embedding(call: CallSpec, aligned: bool) -> tuple[Grid, ...]:
    rounded = float(torch.tensor(float(call.attrs["scale"]), dtype=call.dtype.torch))
    return _copy(call, aligned, ("token_ids", "table", "x"), rounded)


def _take_rows(call: CallSpec, aligned: bool) -> tuple[Grid, ...]:
    return _copy(call, aligned, ("rows", "x", "taken"), 1.0)


def _copy(call: CallSpec, aligned: bool, names: tuple[str, ...], factor: float) -> tuple[Grid, ...]:
    rows, width = call.outputs[0].sizes()
    made = copy_rows(call.dtype, aligned and width % PACK == 0, factor)
    return (Grid(made, (rows, math.ceil(width / (THREADS * PACK))), THREADS, (*names, width)),)


KERNELS = (cuda_kernel("embedding", "rows", _embedding), cuda_kernel("take_rows", "rows", _take_rows))
