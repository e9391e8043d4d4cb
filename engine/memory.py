"""Memory for what a step reads: weights, caches, the arena.

Owns `host_memory`, `memory_on` and `Shelf`. What always holds: memory is zeroed, and the host's is asked for in
huge pages where the system has them on request. A decode step reads all weights once, in order; with pages of
4 KiB, looking their addresses up takes part of the time that reading takes.
"""

from __future__ import annotations

import mmap

import torch

HUGE = 2 << 20
"""Bytes of a huge page, and below which memory is no matter."""

_ALIGNMENT = 256
_HOST = torch.device("cpu")


def host_memory(nbytes: int) -> torch.Tensor:
    """`nbytes` of zeroed host memory, uint8, that begins at a huge page's border where it is larger than one."""
    if nbytes < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(nbytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return torch.zeros(nbytes, dtype=torch.uint8)  # a kernel built without them
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE
    return whole[start : start + nbytes]


def memory_on(device: torch.device, nbytes: int) -> torch.Tensor:
    """`nbytes` of zeroed memory, uint8, on `device`."""
    return host_memory(nbytes) if device.type == "cpu" else torch.zeros(nbytes, dtype=torch.uint8, device=device)


class Shelf:
    """Memory that is filled tensor by tensor, up to `nbytes` in all (each rounded up to 256 bytes)."""

    def __init__(self, nbytes: int, device: torch.device = _HOST) -> None:
        self._memory = memory_on(device, nbytes)
        self._used = 0

    @staticmethod
    def room(nbytes: int) -> int:
        """Bytes that a tensor of `nbytes` takes."""
        return -(-nbytes // _ALIGNMENT) * _ALIGNMENT

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A zeroed tensor in memory that nobody has taken yet; there must be enough left."""
        count = torch.Size(shape).numel() * dtype.itemsize
        found = self._memory[self._used : self._used + count].view(dtype).view(shape)
        self._used += self.room(count)
        return found

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` in this memory."""
        return self.take(tuple(tensor.shape), tensor.dtype).copy_(tensor)
