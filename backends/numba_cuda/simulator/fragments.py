"""What tensor-core instructions compute, for the simulated sides of intrinsics.

Owns `multiply_m16n8k16` and `load_matrices`. What always holds: registers are arrays of shape (warps, 32), where each
lane of a warp has its elements; the layout is that of the PTX ISA (sections "Matrix fragments for mma.m16n8k16 with
floating-point type" and "ldmatrix"), and nothing else here knows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .arrays import Array
    from .intrinsics import Active

Registers = Sequence[Any]
"""Arrays of shape (warps, 32)."""

_LANE = np.arange(32)
_GROUP, _IN_GROUP = _LANE // 4, _LANE % 4


def float32_of(halves: Any, kind: str) -> Any:
    """The float32 equal to 16-bit patterns of kind `f16` or `bf16`."""
    if kind == "f16":
        return np.ascontiguousarray(halves, np.uint16).view(np.float16).astype(np.float32)
    return (np.asarray(halves, np.uint32) << np.uint32(16)).view(np.float32)


def _halves(word: Any) -> tuple[Any, Any]:
    """The lower and the upper 16 bits."""
    word = np.asarray(word).astype(np.uint32)
    return (word & np.uint32(0xFFFF)).astype(np.uint16), (word >> np.uint32(16)).astype(np.uint16)


def multiply_m16n8k16(a: Registers, b: Registers, c: Registers, kind: str) -> tuple[Any, Any, Any, Any]:
    """`mma.sync.aligned.m16n8k16.row.col.f32.<kind>.<kind>.f32`: c + A (16 x 16) B (16 x 8), for each warp.

    `a` is four registers and `b` two, of two 16-bit elements each, the lower half first; `c` is four float32. Products
    are exact and summed in float64, then rounded once; the hardware's own order of sums is not told.
    """
    warps = np.asarray(a[0]).shape[0]
    left = np.empty((warps, 16, 16), np.float64)
    for register, (row, column) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
        for half, bits in enumerate(_halves(a[register])):
            left[:, _GROUP + row, 2 * _IN_GROUP + half + column] = float32_of(bits, kind)
    right = np.empty((warps, 16, 8), np.float64)
    for register in range(2):
        for half, bits in enumerate(_halves(b[register])):
            right[:, 2 * _IN_GROUP + half + 8 * register, _GROUP] = float32_of(bits, kind)
    product = left @ right
    found = [
        (np.asarray(c[i], np.float64) + product[:, _GROUP + 8 * (i // 2), 2 * _IN_GROUP + i % 2]).astype(np.float32)
        for i in range(4)
    ]
    return found[0], found[1], found[2], found[3]


def load_matrices(active: Active, array: Array, index: Any, count: int, transposed: bool = False) -> tuple[Any, ...]:
    """`ldmatrix.sync.aligned.m8n8.x<count>[.trans].shared.b16`: `count` (1, 2 or 4) matrices of 8 x 8 16-bit elements.

    Lane 8 m + r gives in `index` where row r of matrix m starts in `array`; rows are 16 bytes at aligned addresses.
    Gives a register a matrix: lane l holds elements 2 (l % 4) and the next of row l / 4, of column l / 4 if transposed.
    """
    first = np.asarray(index)[:, _LANE % (8 * count)]  # the other lanes' addresses count for nothing
    rows = np.stack(active.load_vector(array, first, 8), 2)  # (warps, row, column)
    found = []
    for matrix in range(count):
        whole = rows[:, 8 * matrix : 8 * matrix + 8]
        whole = whole.transpose(0, 2, 1) if transposed else whole
        lower, upper = (whole[:, _GROUP, 2 * _IN_GROUP + half].astype(np.uint32) for half in range(2))
        found.append(lower | (upper << np.uint32(16)))
    return tuple(found)
