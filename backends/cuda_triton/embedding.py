"""Embedding and row selection.

Owns the kernels of `embedding` and `take_rows`. What always holds: rows are copied (and scaled element by element), so
no row can touch another's bits; ids are checked where they enter, so none is checked here.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from slotwise.backends.cuda_triton.configurations import configure
from slotwise.backends.cuda_triton.launch import Grid, triton_kernel
from slotwise.core.backend import CallSpec


@triton.jit
def copy_rows(rows, table, out, width, scale, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = table[rows[i]] (times scale), a block of columns a program."""
    i = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + i).to(tl.int64)
    values = tl.load(table + row * width + column, mask=column < width)
    if SCALED:
        values = (values.to(tl.float32) * scale).to(values.dtype)
    tl.store(out + i.to(tl.int64) * width + column, values, mask=column < width)


def _embedding(call: CallSpec, generation: str) -> tuple[Grid, ...]:
    scale = float(call.attrs["scale"])
    rounded = float(torch.tensor(scale, dtype=call.dtype.torch))
    return _copy(call, generation, {"rows": "token_ids", "table": "table", "out": "x"}, rounded, scale != 1.0)


def _take_rows(call: CallSpec, generation: str) -> tuple[Grid, ...]:
    return _copy(call, generation, {"rows": "rows", "table": "x", "out": "taken"}, 1.0, scaled=False)


def _copy(call: CallSpec, generation: str, tensors: dict[str, str], scale: float, scaled: bool) -> tuple[Grid, ...]:
    rows, width = call.outputs[0].sizes()
    chosen = configure("copy_rows", generation)
    grid = (rows, triton.cdiv(width, chosen.block["BLOCK"]))
    return (Grid(copy_rows, grid, chosen, {"width": width, "scale": scale}, {"SCALED": scaled}, tensors),)


KERNELS = (triton_kernel("embedding", "rows", _embedding), triton_kernel("take_rows", "rows", _take_rows))
