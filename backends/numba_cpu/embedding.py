"""Embedding and row selection.

Owns the kernels of `embedding` and `take_rows`. What always holds: rows are copied (and scaled element by element); an
id out of range is a fault of the call, and nothing is read for it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import torch

from slotwise.backends.numba_cpu.calls import Call, Part
from slotwise.backends.numba_cpu.compiled import Address, compile_kernel
from slotwise.backends.numba_cpu.elements import given, kind_of, refuses_wide_floats
from slotwise.backends.numba_cpu.memory import as_int64, double_of_bits, elements, int32s, int64s, narrow, widen
from slotwise.backends.numba_cpu.threads import FAULT, FIRST_FIELD, share
from slotwise.backends.numba_cpu.vectors import ITEMSIZE
from slotwise.core.backend import Kernel, Launch, Tensors
from slotwise.core.graph import Attr
from slotwise.core.layouts import OCTET, OCTETS, WEIGHT_WORD

_AT = FIRST_FIELD * 8


@functools.cache
def _gather(kind: int, together: int) -> Address:
    """Rows of a table that stand `together`: 1 (row after row) or 8, two elements of each at a time."""
    item = ITEMSIZE[kind]
    word = WEIGHT_WORD if together > 1 else 1

    def gather(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, 7)
        table, out, rows, width, size = field[1], field[2], field[3], field[4], field[5]
        scale = np.float32(double_of_bits(field[6]))
        ids = int32s(field[0], rows)
        first, last = share(rows, thread, threads)
        for row in range(first, last):
            source_row = as_int64(ids[row])
            if source_row < 0 or source_row >= size:
                int64s(call, FIRST_FIELD)[FAULT] = 1
                continue
            # Among the rows that stand together, a word of each row follows the other.
            first_row = source_row // together * together
            source = elements(kind, table + first_row * width * item, together * width)
            start = (source_row - first_row) * word
            target = elements(kind, out + row * width * item, width)
            for i in range(0, width, word):
                for j in range(word):
                    value = source[start + i * together + j]
                    target[i + j] = value if scale == np.float32(1.0) else narrow(kind, widen(kind, value) * scale)

    return compile_kernel(gather)


def _bind(
    op: str, inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], _: torch.Tensor | None
) -> Launch:
    ids, table = inputs if op == "embedding" else (inputs[1], inputs[0])
    table = given(table)
    (out,) = outputs
    # The scale is rounded to the table's dtype first, as the op defines.
    scale = float(torch.tensor(float(attrs.get("scale", 1.0)), dtype=table.dtype))
    fields = (ids, table, out, len(out), out.shape[1], len(table), scale)
    kernel = _gather(kind_of(out), OCTET if attrs.get("layout") == OCTETS else 1)
    return Call(Part(op, kernel, fields, f"an index is outside the table of {len(table)} rows"))


KERNELS = tuple(Kernel(op, op, functools.partial(_bind, op), refuses_wide_floats) for op in ("embedding", "take_rows"))
