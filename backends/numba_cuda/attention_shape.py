"""What an attention call fixes at compile time, and whose row is whose.

Owns `Shape` and `sequence_of`. What always holds: both follow from the call alone, so every kernel of a call agrees.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from slotwise.backends.numba_cuda.elements import PACK
from slotwise.backends.numba_cuda.simulator import device
from slotwise.core.specs import DType

MOST_HEADS = 4
"""Query heads of one kv head that a block does with the keys and values it has read."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What an attention call fixes at compile time."""

    dtype: DType
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    window: int
    capped: bool
    vector: bool

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.q_heads // self.kv_heads

    @property
    def heads(self) -> int:
        """Query heads of one block: what its registers hold."""
        return max(n for n in range(1, MOST_HEADS + 1) if self.group % n == 0)

    @property
    def lanes(self) -> int:
        """Neighbouring lanes that share a key: one a pack of its dimensions, in a power of two."""
        return 1 << max(0, math.ceil(self.head_dim / PACK) - 1).bit_length()


@device
def sequence_of(row, row_start, sequences):
    """The sequence that owns `row`, or `sequences` when none does: how many end at or before it."""
    low = np.int64(0)
    high = np.int64(sequences)
    while low < high:
        middle = (low + high) // 2
        if row_start[middle + 1] <= row:
            low = middle + 1
        else:
            high = middle
    return low
