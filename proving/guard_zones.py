"""Memory between guard zones: what shows a write past an end.

Owns `Guarded`. What always holds: a tensor lies between two zones of 0xFF bytes (NaN or -1 to whoever reads past an
end), and what was done to the zones, to an input or not done to an output comes back as a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

GUARD_BYTES = 256
"""Bytes of each guard zone: keeps tensors aligned for any vector load."""

GUARD = 0xFF


class Guarded:
    """A dense tensor between two guard zones; `poison` bytes fill it, or the contents of `source`."""

    def __init__(
        self,
        dtype: torch.dtype,
        shape: Sequence[int],
        device: str,
        *,
        poison: int = GUARD,
        source: torch.Tensor | None = None,
    ) -> None:
        size = math.prod(shape) * dtype.itemsize
        self._storage = torch.full((size + 2 * GUARD_BYTES,), GUARD, dtype=torch.uint8, device=device)
        self._bytes = self._storage[GUARD_BYTES : GUARD_BYTES + size]
        self._poison = poison
        self.tensor = self._bytes.view(dtype).view(tuple(shape))
        if source is None:
            self._bytes.fill_(poison)
        else:
            self.tensor.copy_(source)
        self._first = self._bytes.clone()

    def fault(self, name: str, *, may_change: bool) -> str:
        """What was done to this memory that should not have been; empty when nothing was."""
        before, after = self._storage[:GUARD_BYTES], self._storage[GUARD_BYTES + len(self._bytes) :]
        for side, zone in (("before the start", before.flip(0)), ("past the end", after)):
            touched = (zone != GUARD).nonzero()
            if len(touched):
                return f"wrote outside {name}: {int(touched[0]) + 1} bytes {side} of its {len(self._bytes)} bytes"
        if not may_change:
            changed = (self._bytes != self._first).nonzero()
            if len(changed):
                return f"changed its input {name} at {list(self._index(int(changed[0])))}"
        return ""

    def untouched(self, name: str) -> str:
        """Which element of an output was never written; empty when all were."""
        elements = self._bytes.view(-1, self.tensor.element_size())
        left = (elements == self._poison).all(-1).nonzero()
        if not len(left):
            return ""
        index = list(self._index(int(left[0]) * self.tensor.element_size()))
        return f"left {name}{index} unwritten ({len(left)} of {self.tensor.numel()} elements)"

    def _index(self, byte: int) -> tuple[int, ...]:
        return unravel(byte // self.tensor.element_size(), self.tensor.shape)


def unravel(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The index, one number a dimension, of element `flat` of a row-major tensor."""
    index: list[int] = []
    for size in reversed(shape):
        flat, rest = divmod(flat, size)
        index.insert(0, rest)
    return tuple(index)
