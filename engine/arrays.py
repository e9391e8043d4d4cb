"""The engine's arrays, where kernels may live in another memory than the engine.

Owns `Arrays`, `Parcel` and `lay_out`. What always holds: `arrays[name]` is host memory that may be read
and written; what the host may have changed since is in the kernels' memory before a program that reads it runs, and
what a program wrote is fetched when it is asked for, and not before. On a CPU both are one memory and nothing is
copied. Short arrays lie in two blocks, what programs are given and what they give, each copied as one. A step that runs
beside the host has a parcel of its own: nothing it is given or gives lies where the host writes the next step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from slotwise.core.specs import DType, TensorSpec

_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Block:
    """Arrays that lie in one piece of memory: `offsets` in bytes, by name."""

    memory: torch.Tensor
    offsets: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Layout:
    """Every array's tensor, and the blocks of those that programs read alone (`given`) and that they write (`results`).

    Both blocks hold one-dimensional arrays: a number a row.
    """

    buffers: Mapping[str, torch.Tensor]
    given: Block
    results: Block


def lay_out(specs: Iterable[tuple[str, TensorSpec]], written: Collection[str], device: torch.device) -> Layout:
    """Zeroed arrays on `device`; programs write those in `written`."""
    known = dict(specs)
    short = [name for name, spec in known.items() if len(spec.sizes()) == 1]
    blocks = [
        _block({name: known[name] for name in short if (name in written) == is_written}, device)
        for is_written in (False, True)
    ]
    buffers = {
        name: torch.zeros(spec.sizes(), dtype=spec.dtype.torch, device=device)
        for name, spec in known.items()
        if name not in short
    }
    for block in blocks:
        buffers |= {name: _view(block.memory, offset, known[name]) for name, offset in block.offsets.items()}
    return Layout(buffers, *blocks)


def _block(specs: Mapping[str, TensorSpec], device: torch.device) -> Block:
    offsets, size = {}, 0
    for name, spec in specs.items():
        offsets[name] = size
        size += -(-spec.nbytes() // _ALIGNMENT) * _ALIGNMENT
    return Block(torch.zeros(size, dtype=torch.uint8, device=device), offsets)


def _view(memory: torch.Tensor, offset: int, spec: TensorSpec) -> torch.Tensor:
    return memory[offset : offset + spec.nbytes()].view(spec.dtype.torch)


@dataclass(frozen=True, slots=True)
class Parcel:
    """Host copies of the short arrays that are `given` and of larger ones (`tables`); room for the short `results`.

    `short` are numpy views of the results, by name.
    """

    given: torch.Tensor
    tables: dict[str, torch.Tensor]
    results: torch.Tensor
    short: Mapping[str, npt.NDArray[np.generic]]


class Arrays(Mapping[str, npt.NDArray[np.generic]]):
    """numpy views of host memory beside the tensors that kernels use.

    `separate` keeps a copy of each tensor for the host, pinned where the tensors are a GPU's; parcels need it.
    """

    def __init__(self, layout: Layout, *, separate: bool) -> None:
        self._buffers = layout.buffers
        self._separate = separate
        self._host = {name: _mirror(buffer) if separate else buffer for name, buffer in self._buffers.items()}
        self._blocks = (layout.given, layout.results)
        self._host_blocks = tuple(_mirror(block.memory) if separate else block.memory for block in self._blocks)
        if separate:
            for block, host in zip(self._blocks, self._host_blocks, strict=True):
                for name, offset in block.offsets.items():
                    spec = TensorSpec(DType.of(self._buffers[name]), tuple(self._buffers[name].shape))
                    self._host[name] = _view(host, offset, spec)
        self._views = {name: host.numpy() for name, host in self._host.items()}
        self._written: set[str] = set()  # by a program, and not fetched yet
        self._spare: list[Parcel] = []

    def __getitem__(self, name: str) -> npt.NDArray[np.generic]:
        if name in self._written:
            _, results = self._blocks
            if name in results.offsets:
                self._host_blocks[1].copy_(results.memory)
                self._written.difference_update(results.offsets)
            else:
                self._host[name].copy_(self._buffers[name])
                self._written.discard(name)
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def before(self, read: Collection[str], rows: int) -> None:
        """A program of `rows` rows is about to read these: hand over what the host may have changed."""
        if not self._separate:
            return
        # Copies are waited for: the host may write the next call's rows as soon as this returns.
        given, _ = self._blocks
        if any(name in given.offsets for name in read):
            given.memory.copy_(self._host_blocks[0])
        for name in read:
            if name not in given.offsets and name not in self._written:
                self._buffers[name][:rows].copy_(self._host[name][:rows])

    def after(self, written: Iterable[str]) -> None:
        """A program has been started that writes these."""
        if self._separate:
            self._written.update(written)

    def pack(self, read: Iterable[str], rows: int) -> Parcel:
        """A parcel of what the arrays hold now, for programs of `rows` rows that read these."""
        given, _ = self._blocks
        parcel = self._spare.pop() if self._spare else self._new_parcel()
        parcel.given.copy_(self._host_blocks[0])
        for name in read:
            if name not in given.offsets:
                if name not in parcel.tables:
                    parcel.tables[name] = _mirror(self._buffers[name])
                parcel.tables[name][:rows].copy_(self._host[name][:rows])
        return parcel

    def send(self, parcel: Parcel, read: Iterable[str], rows: int) -> None:
        """Hand a parcel over, in the order of the kernels' work; the host does not wait."""
        given, _ = self._blocks
        given.memory.copy_(parcel.given, non_blocking=True)
        for name in read:
            if name not in given.offsets:
                self._buffers[name][:rows].copy_(parcel.tables[name][:rows], non_blocking=True)

    def fetch(self, parcel: Parcel) -> None:
        """Bring the short results back into the parcel, in the order of the kernels' work; the host does not wait."""
        parcel.results.copy_(self._blocks[1].memory, non_blocking=True)

    def give_back(self, parcel: Parcel) -> None:
        """A parcel that nobody reads any more, to be packed again."""
        self._spare.append(parcel)

    def _new_parcel(self) -> Parcel:
        given, results = self._blocks
        host = _mirror(results.memory)
        specs = {name: TensorSpec(DType.of(t), tuple(t.shape)) for name, t in self._buffers.items()}
        short = {name: _view(host, offset, specs[name]).numpy() for name, offset in results.offsets.items()}
        return Parcel(_mirror(given.memory), {}, host, short)


def _mirror(buffer: torch.Tensor) -> torch.Tensor:
    return torch.zeros(buffer.shape, dtype=buffer.dtype, pin_memory=buffer.is_cuda)
