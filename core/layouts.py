"""How a weight lies in memory.

Owns `ROWS`, `OCTETS`, `to_octets` and `from_octets`. What always holds: a layout changes where elements stand, never
what they are, nor the weight's shape, dtype or bytes; in which layout a weight stands is an attribute of the ops that
read it and a field of the parameter, chosen by a pass, so that a plan says so.

`rows` is as checkpoints store it: row after row. In `octets`, eight neighbouring rows stand together, a *word* of each
row after the other, so that a vector of eight words holds one place of eight rows: a product then sums each row in a
lane of its own. (Interleaving rows for products by lanes: llama.cpp's repacked formats do the same.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch

ROWS, OCTETS = "rows", "octets"
LAYOUTS = (ROWS, OCTETS)

OCTET = 8
"""Rows that stand together in `octets`."""

WEIGHT_WORD, CODES_WORD, GROUP_WORD = 2, 4, 1
"""Elements of a word: of a weight or table, of codes, and of what there is once a group."""

_LARGE = 1 << 24
"""Bytes from which compiling a loop pays."""
_STEP = 64
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def fits(rows: int, columns: int, word: int) -> bool:
    """Whether a matrix [rows, columns] can stand in octets."""
    return rows % OCTET == 0 and columns % word == 0


def to_octets(matrix: torch.Tensor, word: int) -> torch.Tensor:
    """`matrix` [N, C] with its elements in octets, as a new tensor [N, C]."""
    rows, columns = matrix.shape
    together = matrix.contiguous().view(rows // OCTET, OCTET, columns // word, word)
    kept = _INTEGERS.get(word * matrix.itemsize)
    if matrix.nbytes < _LARGE or kept is None:
        return together.transpose(1, 2).reshape(rows, columns)
    found = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    _interleave()(together.view(kept)[..., 0].numpy(), found.view(kept).view(rows // OCTET, -1, OCTET).numpy())
    return found


@functools.cache
def _interleave() -> Callable[[Any, Any], None]:
    """`target[o, w, r] = source[o, r, w]`, compiled: some ten times as fast as PyTorch's copy."""
    from numba import njit  # takes a moment to import

    def interleave(source: Any, target: Any) -> None:
        octets, words, _ = target.shape
        for o in range(octets):
            for start in range(0, words, _STEP):
                for r in range(OCTET):
                    for w in range(start, min(start + _STEP, words)):
                        target[o, w, r] = source[o, r, w]

    return cast("Callable[[Any, Any], None]", njit(error_model="numpy")(interleave))


def from_octets(matrix: torch.Tensor, word: int) -> torch.Tensor:
    """What `to_octets` was given."""
    rows, columns = matrix.shape
    return matrix.reshape(rows // OCTET, columns // word, OCTET, word).transpose(1, 2).reshape(rows, columns)


def in_rows(matrix: torch.Tensor, word: int, layout: str) -> torch.Tensor:
    """`matrix`, which stands in `layout`, row after row."""
    return matrix if layout == ROWS else from_octets(matrix, word)


def laid_out(matrix: torch.Tensor, word: int, layout: str) -> torch.Tensor:
    """`matrix`, which stands row after row, in `layout`."""
    return matrix if layout == ROWS else to_octets(matrix, word)
